"""Write a GGUF of a Qwen3's shape with random weights and a small valid tokenizer.

Speed depends on shapes and formats, not on what the weights say, so this measures an architecture,
a size or a quantization for which no file is at hand::

    python benchmarks/random_gguf.py qwen3-0.6b-q4_0.gguf --quantization Q4_0
    python benchmarks/random_gguf.py small.gguf --quantization Q4_K --layers 4 --vocabulary 4096

Weights are normal with a standard deviation of 0.02 (the formats that ``gguf`` can quantize) or
random blocks of about that spread (the K formats, which ``gguf`` can only read).  Norms are one.
The tokenizer is byte-level BPE: all bytes, a few merges, ChatML's control tokens, the rest unused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Format

FILE_TYPES = {
    Format.F32: gguf.LlamaFileType.ALL_F32,
    Format.F16: gguf.LlamaFileType.MOSTLY_F16,
    Format.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Format.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Format.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    Format.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    Format.Q5_1: gguf.LlamaFileType.MOSTLY_Q5_1,
    Format.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Format.Q4_K: gguf.LlamaFileType.MOSTLY_Q4_K_S,
    Format.Q5_K: gguf.LlamaFileType.MOSTLY_Q5_K_S,
    Format.Q6_K: gguf.LlamaFileType.MOSTLY_Q6_K,
}
"""What the metadata calls a file whose matrices have the format."""

SPREAD = 0.02
BLOCK = 256
"""Weights in a super-block of the K formats."""

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "Ġ the", "i n", "e r", "Ġ a", "o n", "Ġ o", "r e", "Ġ s")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A Qwen3's sizes, from the models' public ``config.json``."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int = 128
    vocabulary: int = 151_936
    context: int = 40_960
    rope_base: float = 1_000_000.0
    epsilon: float = 1e-6


SHAPES = {
    "qwen3-0.6b": Shape(1024, 3072, 28, 16, 8),
    "qwen3-1.7b": Shape(2048, 6144, 28, 16, 8),
    "qwen3-4b": Shape(2560, 9728, 36, 32, 8),
}


def byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte, as GPT-2 defined it."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(moved)) for byte in range(256)]


def add_tokenizer(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    """Bytes, merges, control tokens, and unused ones up to ``vocabulary``."""
    known = [*byte_letters(), *(merge.replace(" ", "") for merge in MERGES), *CONTROL]
    if vocabulary < len(known):
        raise SystemExit(f"the vocabulary must have at least {len(known)} tokens")
    unused = [f"[UNUSED{index}]" for index in range(vocabulary - len(known))]
    ordinary = len(known) - len(CONTROL)
    types = [gguf.TokenType.NORMAL] * ordinary + [gguf.TokenType.CONTROL] * len(CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(known + unused)
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * len(unused))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(ordinary)
    writer.add_eos_token_id(ordinary + 2)
    writer.add_pad_token_id(ordinary)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def scale_bytes(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Q4_K's and Q5_K's twelve bytes of 6-bit scales and mins, each min equal to its scale.

    With ``dmin = d * middle`` the values are then centred on zero.  Layout as in ggml's
    ``get_scale_min_k4``: six bits each of the first four scales and mins, then the low nibbles of
    the last four, whose high bits sit above the first ones.
    """
    scales = rng.integers(32, 64, (blocks, 8), np.uint8)
    first, last = scales[:, :4], scales[:, 4:]
    head = first | ((last >> 4) << 6)
    return np.concatenate([head, head, (last & 0xF) * np.uint8(0x11)], axis=1)


def half(value: float, blocks: int) -> np.ndarray:
    """``value`` as float16, one a block, as bytes."""
    return np.full((blocks, 1), value, np.float16).view(np.uint8)


def q4_k(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Random Q4_K super-blocks: 144 bytes each."""
    step = SPREAD / (4.6 * 48)
    codes = rng.integers(0, 256, (blocks, 128), np.uint8)
    heads = [half(step, blocks), half(7.5 * step, blocks), scale_bytes(rng, blocks)]
    return np.concatenate([*heads, codes], axis=1)


def q5_k(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Random Q5_K super-blocks: 176 bytes each."""
    step = SPREAD / (9.2 * 48)
    codes = rng.integers(0, 256, (blocks, 160), np.uint8)
    heads = [half(step, blocks), half(15.5 * step, blocks), scale_bytes(rng, blocks)]
    return np.concatenate([*heads, codes], axis=1)


def q6_k(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Random Q6_K super-blocks: 210 bytes each."""
    step = SPREAD / (18.5 * 96)
    codes = rng.integers(0, 256, (blocks, 192), np.uint8)
    scales = rng.integers(64, 128, (blocks, 16), np.uint8)
    return np.concatenate([codes, scales, half(step, blocks)], axis=1)


SUPER_BLOCKS: dict[Format, Callable[[np.random.Generator, int], np.ndarray]] = {
    Format.Q4_K: q4_k,
    Format.Q5_K: q5_k,
    Format.Q6_K: q6_k,
}


def weights(rng: np.random.Generator, rows: int, columns: int, form: Format) -> np.ndarray:
    """A random matrix in ``form``: bytes ``[rows, bytes of a row]``, or floats for F32 and F16."""
    if form in SUPER_BLOCKS:
        if columns % BLOCK:
            raise SystemExit(f"{form.name} needs rows of a multiple of {BLOCK}, not {columns}")
        blocks = SUPER_BLOCKS[form](rng, rows * columns // BLOCK)
        return blocks.reshape(rows, -1)
    values = rng.standard_normal((rows, columns), np.float32) * np.float32(SPREAD)
    return gguf.quants.quantize(values, form)


def write(path: Path, shape: Shape, form: Format, embedding: Format, seed: int) -> None:
    """Write the file.  One tensor is in memory at a time for each distinct shape."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen3", use_temp_file=True)
    writer.add_name(f"random-{path.stem}")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[form])
    add_tokenizer(writer, shape.vocabulary)

    def matrix(name: str, rows: int, columns: int, kind: Format = form) -> None:
        writer.add_tensor(name, weights(rng, rows, columns, kind), raw_dtype=kind)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    matrix("token_embd.weight", shape.vocabulary, shape.hidden, embedding)
    norm("output_norm.weight", shape.hidden)
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        norm(prefix + "attn_norm.weight", shape.hidden)
        matrix(prefix + "attn_q.weight", queries, shape.hidden)
        matrix(prefix + "attn_k.weight", keys, shape.hidden)
        matrix(prefix + "attn_v.weight", keys, shape.hidden)
        matrix(prefix + "attn_output.weight", shape.hidden, queries)
        norm(prefix + "attn_q_norm.weight", shape.head_size)
        norm(prefix + "attn_k_norm.weight", shape.head_size)
        norm(prefix + "ffn_norm.weight", shape.hidden)
        matrix(prefix + "ffn_gate.weight", shape.intermediate, shape.hidden)
        matrix(prefix + "ffn_up.weight", shape.intermediate, shape.hidden)
        matrix(prefix + "ffn_down.weight", shape.hidden, shape.intermediate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--quantization", default="Q4_0", help="Q8_0, Q4_0, Q4_K, BF16, ...")
    parser.add_argument("--embedding", help="the embedding's and head's format; Q8_0 or as floats")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--vocabulary", type=int, help="fewer tokens than the shape has")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    shape = replace(
        shape,
        layers=arguments.layers or shape.layers,
        vocabulary=arguments.vocabulary or shape.vocabulary,
    )
    form = Format[arguments.quantization.upper()]
    if form not in FILE_TYPES:
        raise SystemExit(f"{form.name}: not one of {', '.join(kind.name for kind in FILE_TYPES)}")
    floats = form in (Format.F32, Format.F16, Format.BF16)
    default = form.name if floats else "Q8_0"
    embedding = Format[(arguments.embedding or default).upper()]
    write(arguments.path, shape, form, embedding, arguments.seed)
    print(f"{arguments.path}: {arguments.path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
