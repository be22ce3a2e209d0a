"""The bytes that one decode step must read, which a memory's bandwidth turns into a speed limit."""

from __future__ import annotations

from pathlib import Path

from dure.frontends.gguf.file import open_gguf
from dure.models.gguf_config import config_from_gguf

CACHE_ELEMENT = 2
"""Bytes of a KV cache's element: 16-bit floats."""


def bytes_per_token(model: Path, context: float) -> int:
    """Bytes a token of one sequence reads: every tensor once as stored, and ``context`` positions.

    A tied head is the embedding table and counts once; an untied embedding gives one row.  A layer
    with a window reads at most that many positions.
    """
    with open_gguf(model) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        config = config_from_gguf(file.metadata, shapes, str(model))
        sizes = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    if "output.weight" in sizes:
        sizes["token_embd.weight"] //= config.vocabulary
    windows = config.windows or (0,) * config.layers
    positions = sum(min(context, window) if window else context for window in windows)
    position = 2 * config.kv_heads * config.head_dim * CACHE_ELEMENT
    return sum(sizes.values()) + round(positions * position)
