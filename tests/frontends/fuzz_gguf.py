"""Fuzzes the GGUF reader and the tokenizer that is built from what it reads.

    python tests/frontends/fuzz_gguf.py --minutes 60 --seed 7

Half of the cases are small valid files, changed: bytes flipped, cut, doubled, swapped or inserted
anywhere, and integers where the format has integers replaced by the values that break readers.
The other half keep the format and lie within it: values of other types, odd tokens, scores, merges
and ids, tensors of odd shapes at odd offsets.  Only :class:`dure.errors.DureError` may come out;
anything else, a case that takes longer than a second of processor time, or memory that grows, ends
the run with exit code 1 and leaves the file behind.
"""

from __future__ import annotations

import argparse
import random
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gguf_builder as gb
from gguf_builder import Builder, Tensor

from dure.errors import DureError, ModelFileError
from dure.frontends.gguf import GGUFFile, open_gguf

SECONDS_PER_CASE = 1.0
MEMORY_GROWTH = 256 << 20
NASTY = [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 127, 255, 256, 65535, 65536, 2**24, 2**31 - 1]
NASTY += [2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]


def builders() -> list[Builder]:
    """Valid files, one for each kind of content."""
    bpe = Builder().add("general.architecture", gb.STRING, "llama")
    byte_symbols = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ab", "abc", "Ġa", "<|e|>"]
    bpe.add("tokenizer.ggml.model", gb.STRING, "gpt2").add(
        "tokenizer.ggml.pre", gb.STRING, "smollm"
    )
    bpe.add_array("tokenizer.ggml.tokens", gb.STRING, byte_symbols)
    bpe.add_array("tokenizer.ggml.token_type", gb.I32, [1] * (len(byte_symbols) - 1) + [3])
    bpe.add_array("tokenizer.ggml.merges", gb.STRING, ["a b", "ab c", "Ġ a"])
    bpe.add("tokenizer.ggml.eos_token_id", gb.U32, len(byte_symbols) - 1)
    bpe.tensor("token_embd.weight", (8, 32), "Q8_0").tensor("norm", (32,))

    spm = Builder(version=2).add("general.architecture", gb.STRING, "gemma3")
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "a", "b", "ab", "▁ab", "\n\n"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 5 + [4]
    spm.add("tokenizer.ggml.model", gb.STRING, "llama")
    spm.add_array("tokenizer.ggml.tokens", gb.STRING, pieces)
    spm.add_array("tokenizer.ggml.scores", gb.F32, [-float(index) for index in range(len(pieces))])
    spm.add_array("tokenizer.ggml.token_type", gb.I32, kinds)
    spm.add("tokenizer.ggml.bos_token_id", gb.U32, 1).add("tokenizer.ggml.eos_token_id", gb.U32, 2)
    spm.tensor("w", (2, 256), "Q4_K").tensor("v", (1, 256), "Q6_K").tensor("u", (3, 2, 32), "Q5_1")

    values = Builder(alignment=64).add("general.alignment", gb.U32, 64)
    for kind in range(13):
        if kind not in (gb.ARRAY, gb.STRING):
            values.add(f"scalar{kind}", kind, 1).add_array(f"array{kind}", kind, [1, 0, 1])
    nested = struct.pack("<IQ", gb.ARRAY, 2) + gb.array(gb.U8, [1]) + gb.array(gb.STRING, ["x"])
    values.add_raw("nested", gb.ARRAY, nested).add("text", gb.STRING, "두레")
    values.add("split.count", gb.U16, 1)
    for index, name in enumerate(gb.BLOCKS):
        values.tensor(name, (index % 3 + 1, gb.BLOCKS[name][1]), name)
    return [bpe, spm, values]


def seeds() -> list[bytes]:
    """The bytes of the valid files."""
    return [builder.build() for builder in builders()]


def mutate(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """One to eight changes, each blind or at a place where the format has an integer."""
    data = bytearray(content)
    for _ in range(min(1 + int(rng.expovariate(0.7)), 8)):
        if data:
            MUTATIONS[rng.randrange(len(MUTATIONS))](rng, data, others)
    return bytes(data)


def _place(rng: random.Random, data: bytearray) -> int:
    """Anywhere, with the header twice as likely as its length says."""
    return rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 2048))


def _flip(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _byte(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    data[_place(rng, data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _cut(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    del data[rng.randrange(len(data)) :]


def _remove(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    start = _place(rng, data)
    del data[start : start + rng.choice((1, 2, 4, 8, rng.randrange(1, 64)))]


def _insert(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    start = _place(rng, data)
    data[start:start] = rng.randbytes(rng.choice((1, 4, 8, 32)))


def _double(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    start = _place(rng, data)
    piece = data[start : start + rng.randrange(1, 256)]
    data[start:start] = piece * rng.choice((1, 1, 2, 16))


def _splice(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    other = rng.choice(others)
    start, source = _place(rng, data), rng.randrange(len(other))
    length = rng.randrange(1, 256)
    data[start : start + length] = other[source : source + length]


def _integer(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    """A nasty number where a length, count, type or offset may stand: before zeros, in the head."""
    size = rng.choice((4, 8))
    value = rng.choice(NASTY) + rng.choice((0, 0, 0, -1, 1))
    starts = [
        index for index in range(min(len(data), 8192) - 8) if not any(data[index + 1 : index + 4])
    ]
    start = rng.choice(starts) if starts and rng.random() < 0.8 else _place(rng, data)
    data[start : start + size] = (value % (1 << (8 * size))).to_bytes(size, "little")


def _header(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    start, size = rng.choice(((4, 4), (8, 8), (16, 8)))
    data[start : start + size] = (rng.choice(NASTY) % (1 << (8 * size))).to_bytes(size, "little")


MUTATIONS = [_flip, _byte, _cut, _remove, _insert, _double, _splice, _integer, _integer, _header]


def lie(rng: random.Random) -> bytes:
    """A file whose format is right and whose content is not."""
    builder = rng.choice(builders())
    for _ in range(1 + int(rng.expovariate(0.7))):
        if builder.tensors and rng.random() < 0.3:
            _lie_in_tensor(rng, rng.choice(builder.tensors))
        else:
            _lie_in_metadata(rng, builder)
    content = builder.build()
    return mutate(rng, content, [content]) if rng.random() < 0.1 else content


def _lie_in_tensor(rng: random.Random, tensor: Tensor) -> None:
    sizes = [*NASTY, 64, 256, 512]
    tensor.data = tensor.payload()
    match rng.randrange(4):
        case 0:
            tensor.shape = tuple(rng.choice(sizes) % 2**64 for _ in range(rng.randrange(6)))
        case 1:
            tensor.offset = rng.choice(sizes) * rng.choice((1, 32)) % 2**64
        case 2:
            tensor.type_number = rng.randrange(45)
        case _:
            tensor.name = rng.choice(("w", "norm", "", b"\xff", "n" * 70_000, "\0", "é"))


def _lie_in_metadata(rng: random.Random, builder: Builder) -> None:
    key = rng.choice(KEYS)
    raw = gb.string(key)
    size = 1 << 16
    if rng.random() < 0.9:  # else the key is there twice
        old = [entry for entry in builder.entries if entry.startswith(raw)]
        size = int.from_bytes(old[0][len(raw) + 8 : len(raw) + 16], "little") if old else 3
        builder.entries = [entry for entry in builder.entries if not entry.startswith(raw)]
    length = max(0, min(size + rng.choice((0, 0, 0, 0, -1, 1)), 400))
    match rng.randrange(8):
        case 0:
            builder.add_array(key, gb.STRING, [_odd_text(rng) for _ in range(length)])
        case 1:
            values = [
                rng.choice((0.0, -1.0, 1e38, -1e38, float("nan"), float("inf")))
                for _ in range(length)
            ]
            builder.add_array(key, gb.F32, values)
        case 2:
            builder.add_array(
                key, gb.I32, [rng.choice((1, 1, 3, 4, 5, 6, 7, -1)) for _ in range(length)]
            )
        case 3:
            builder.add_array(key, gb.I32, [rng.randrange(1, 7) for _ in range(length)])
        case 4:
            builder.add(key, gb.STRING, _odd_text(rng))
        case 5:
            builder.add(key, gb.U32, rng.choice(NASTY) % 2**32)
        case 6:
            builder.add(key, gb.BOOL, rng.random() < 0.5)
        case _:
            return


def _odd_text(rng: random.Random) -> str | bytes:
    pieces = [
        "a",
        "b",
        "c",
        "ab",
        "Ġ",
        "Ċ",
        "▁",
        "▁▁",
        "<0x41>",
        "<|e|>",
        "gpt2",
        "llama",
        "smollm",
        "tekken",
        "\x00",
        "é",
        "두",
        "🌾",
        "{{",
        "\n",
    ]
    if rng.random() < 0.05:
        return rng.choice((b"\xff", b"", b"\xe2\x96", b"\xed\xa0\x80", b"a" * 5000))
    return rng.choice(("", " ", "")).join(rng.choice(pieces) for _ in range(rng.randrange(1, 4)))


KEYS = ["general.architecture", "general.alignment", "split.count", "tokenizer.chat_template"]
KEYS += [
    "tokenizer.ggml." + name
    for name in [
        "model",
        "pre",
        "tokens",
        "token_type",
        "scores",
        "merges",
        "bos_token_id",
        "eos_token_id",
        "eot_token_id",
        "unknown_token_id",
        "add_bos_token",
        "add_eos_token",
        "add_space_prefix",
    ]
] * 3


def exercise(path: Path) -> str:
    """Read all of a file; returns how it ended.  Lets through whatever is not a ModelFileError."""
    try:
        with open_gguf(path) as file:
            checksum = _read_everything(file)
            return f"read {checksum & 1}" if _build_tokenizer(file) else "read, no tokenizer"
    except ModelFileError as error:
        assert error.what and error.where, "an error without what or where"
        return "refused"


def _read_everything(file: GGUFFile) -> int:
    total = 0
    for key in file.metadata:
        try:
            total += len(repr(file.metadata[key]))
        except ModelFileError:
            continue
    for name, info in file.tensors.items():
        view = file.bytes_of(name)
        assert view.nbytes == info.nbytes
        total += int(view.sum())
    return total


def _build_tokenizer(file: GGUFFile) -> bool:
    from dure.serve.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_gguf(file)
        ids = tokenizer.encode("ab abc  <|e|>\n\n두레", add_special=True, parse_special=True)
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        tokenizer.decode(ids)
    except DureError:
        return False
    return True


def run(cases: int | None, seconds: float | None, seed: int, keep: Path) -> dict[str, int]:
    """Runs until either limit; returns how many cases ended how."""
    rng = random.Random(seed)
    files = seeds()
    outcomes: dict[str, int] = {}
    deadline = None if seconds is None else time.monotonic() + seconds
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.gguf"
        number = 0
        while (cases is None or number < cases) and (
            deadline is None or time.monotonic() < deadline
        ):
            content = mutate(rng, rng.choice(files), files) if rng.random() < 0.5 else lie(rng)
            path.write_bytes(content)
            start = time.process_time()
            try:
                outcome = exercise(path)
                took = time.process_time() - start
                assert took < SECONDS_PER_CASE, f"{took:.1f} s for one case"
                grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10
                assert grown < MEMORY_GROWTH, f"memory grew by {grown >> 20} MiB"
            except BaseException:
                saved = keep / f"fuzz-{seed}-{number}.gguf"
                saved.write_bytes(content)
                print(f"case {number} of seed {seed} failed; kept as {saved}", file=sys.stderr)
                raise
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            number += 1
            if number % 10_000 == 0:
                print(f"{number} cases so far: {outcomes}", file=sys.stderr, flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path())
    options = parser.parse_args()
    if options.minutes is None and options.cases is None:
        parser.error("give --minutes or --cases")
    seconds = None if options.minutes is None else 60 * options.minutes
    start = time.monotonic()
    outcomes = run(options.cases, seconds, options.seed, options.keep)
    total = sum(outcomes.values())
    print(f"{total} cases in {time.monotonic() - start:.0f} s, seed {options.seed}: {outcomes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
