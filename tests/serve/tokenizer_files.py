"""Small tokenizers as GGUF files, and slow references to judge them by."""

from __future__ import annotations

from pathlib import Path

import gguf_builder as gb
from gguf_builder import Builder

from dure.frontends.gguf import GGUFFile, open_gguf

T = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

TEXT = """The village works together: in the morning they plant rice, in the evening they sing.
두레는 마을 사람들이 함께 일하는 풍습이다. 모내기를 할 때 온 마을이 함께 일한다.
def plant(rice: int = 12345) -> str:
    return f"{rice} plants, {rice * 2} seeds"

I'll say it's fine; they've said they'd come, don't you think?  Yes!!  1999, 2024, 3.14159.
"""


def train_bpe() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE trained on TEXT by the `tokenizers` library."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator([TEXT], trainer)
    model = json.loads(library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


BPE_TOKENS, BPE_MERGES = train_bpe()
BPE_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FIRST = len(BPE_TOKENS)
"""The id of <|endoftext|>; the other special tokens follow."""


def bpe_builder(pre: str | None = "smollm") -> Builder:
    """A valid byte-level file: trained tokens, three control tokens, a user-defined one."""
    tokens = [*BPE_TOKENS, *BPE_SPECIAL, "<tool>"]
    types = [NORMAL] * FIRST + [CONTROL] * 3 + [USER_DEFINED]
    builder = Builder().add(T + "model", gb.STRING, "gpt2")
    if pre is not None:
        builder.add(T + "pre", gb.STRING, pre)
    builder.add_array(T + "tokens", gb.STRING, tokens)
    builder.add_array(T + "token_type", gb.I32, types)
    builder.add_array(T + "merges", gb.STRING, BPE_MERGES)
    builder.add(T + "bos_token_id", gb.U32, FIRST).add(T + "eos_token_id", gb.U32, FIRST)
    return builder


def spm_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types: unknown, control and byte tokens, characters, merged pieces."""
    tokens = ["<unk>", "<s>", "</s>", "<pad>"]
    types = [UNKNOWN, CONTROL, CONTROL, UNUSED]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [BYTE] * 256
    merged = ["▁t", "he", "▁the", "in", "ing", "▁w", "er", "or", "▁r", "▁▁", "▁▁▁▁", "라", "두레"]
    merged += [
        "th",
        "the",
        "▁ri",
        "ce",
        "ice",
        "▁rice",
        "lan",
        "▁p",
        "▁plan",
        "nt",
        "t▁",
        "aa",
        "aaa",
    ]
    characters = sorted(set(TEXT.replace(" ", "▁").replace("\n", "")) | set("a▁레두"))
    tokens += merged + characters + ["\n\n", "<tool>"]
    types += [NORMAL] * (len(merged) + len(characters)) + [USER_DEFINED] * 2
    scores = [0.0] * 260 + [-float(index) for index in range(len(merged) + len(characters))]
    return tokens, [*scores, -1000.0, -1000.0], types


def spm_builder(add_space_prefix: bool | None = None) -> Builder:
    """A valid SentencePiece file."""
    tokens, scores, types = spm_vocabulary()
    builder = Builder().add(T + "model", gb.STRING, "llama")
    builder.add_array(T + "tokens", gb.STRING, tokens)
    builder.add_array(T + "scores", gb.F32, scores)
    builder.add_array(T + "token_type", gb.I32, types)
    builder.add(T + "bos_token_id", gb.U32, 1).add(T + "eos_token_id", gb.U32, 2)
    builder.add(T + "unknown_token_id", gb.U32, 0)
    if add_space_prefix is not None:
        builder.add(T + "add_space_prefix", gb.BOOL, add_space_prefix)
    return builder


def spm_reference(text: str) -> list[int]:
    """Greedy merging by score as its definition says it, in quadratic time; no special tokens."""
    tokens, scores, types = spm_vocabulary()
    usable = {t: i for i, t in enumerate(tokens) if types[i] in (NORMAL, USER_DEFINED)}
    pieces = list(text.replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[usable[pieces[i] + pieces[i + 1]]], i)
            for i in range(len(pieces) - 1)
            if pieces[i] + pieces[i + 1] in usable
        ]
        if not pairs:
            break
        _, at = min(pairs)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    ids: list[int] = []
    for piece in pieces:
        ids += [usable[piece]] if piece in usable else [4 + byte for byte in piece.encode()]
    return ids


def opened(builder: Builder, folder: Path) -> GGUFFile:
    path = folder / "tokenizer.gguf"
    path.write_bytes(builder.build())
    return open_gguf(path)
