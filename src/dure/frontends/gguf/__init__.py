"""GGUF files: a memory-mapped reader that trusts nothing it reads.

>>> with open_gguf("model.gguf") as file:
...     file.metadata.require_int(f"{file.architecture}.block_count")
...     file.bytes_of("token_embd.weight")
"""

from __future__ import annotations

from dure.frontends.gguf.file import GGUFFile, TensorInfo, open_gguf
from dure.frontends.gguf.metadata import Metadata, MetadataValue
from dure.frontends.gguf.types import BLOCK, Block, GGMLType, ValueType

__all__ = [
    "BLOCK",
    "Block",
    "GGMLType",
    "GGUFFile",
    "Metadata",
    "MetadataValue",
    "TensorInfo",
    "ValueType",
    "open_gguf",
]
