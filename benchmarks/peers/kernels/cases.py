"""What is measured: kernels and their sizes, and what dure is to reach there.

Only the standard library is used here, so that every worker can read a case before it imports
anything that starts threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

Shape: TypeAlias = tuple[int, ...]

BLOCK = 32
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18}
"""Weights in a block of GGUF, and the bytes that it takes."""

ELEMENT_BYTES = {"f32": 4, "bf16": 2}
TOLERANCE = {"f32": 1e-4, "bf16": 2e-2, "q8_0": 3e-2, "q4_0": 3e-2}
"""The largest difference from the reference, as a part of its largest magnitude.

Activations that meet quantized weights are quantized to int8 in blocks of 32.
"""

STREAMED = 1 << 28
"""Bytes of weights that a matrix times a vector goes round, so that no cache holds them."""


@dataclass(frozen=True)
class Goal:
    """What dure is to reach beside ``against``, and the floor below which it must not fall.

    ``against`` an engine: how many times as fast; ``"bandwidth"``: the part of the read bandwidth;
    ``"seconds"``: at most so many.
    """

    against: str
    goal: float
    floor: float | None


@dataclass(frozen=True)
class Case:
    """A kernel of some sizes.  What the sizes are, ``shapes`` says for each kernel."""

    op: str
    sizes: Shape
    dtype: str
    goals: tuple[Goal, ...] = ()

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.op} {'x'.join(map(str, self.sizes))} {self.dtype}"

    @property
    def engines(self) -> tuple[str, ...]:
        """dure and the engines that it is held against."""
        others = (goal.against for goal in self.goals)
        return ("dure", *(name for name in others if name not in ("bandwidth", "seconds")))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of the floating-point operands."""
        match self.op, self.sizes:
            case "gemm", (m, n, k):
                return (m, k), (k, n)
            case "attention", (heads, queries, keys, size):
                return (heads, queries, size), (heads, keys, size), (heads, keys, size)
            case "gemv", (_, _, k):
                return ((1, k),)
            case "conv2d", (batch, height, width, channels, out, taps):
                return (batch, height, width, channels), (out, taps, taps, channels)
            case "launch", (n,):
                return (n,), (n,)
            case op, (m, d):
                return (m, d), *(((d,),) * _VECTORS[op])
            case _:
                return ()

    @property
    def flops(self) -> int:
        """Operations of the products; 0 where the kernel is a matter of bytes."""
        match self.op, self.sizes:
            case "gemm", (m, n, k):
                return 2 * m * n * k
            case "attention", (heads, queries, keys, size) if queries > 1:
                return (
                    4 * heads * size * (queries * (keys - queries) + queries * (queries + 1) // 2)
                )
            case "conv2d", (batch, height, width, channels, out, taps):
                return 2 * batch * height * width * channels * out * taps * taps
            case _:
                return 0

    @property
    def bytes(self) -> int:
        """Bytes that are read and written at least once."""
        match self.op, self.sizes:
            case "gemv", (copies, n, k):
                return copies * n * k // BLOCK * BLOCK_BYTES[self.dtype]
            case "softmax" | "rms_norm" | "layer_norm" | "gelu_chain", (m, d):
                return 2 * m * d * ELEMENT_BYTES[self.dtype]
            case _:
                return ELEMENT_BYTES[self.dtype] * sum(prod(shape) for shape in self.shapes)


def case_of(fields: dict[str, Any]) -> Case:
    """A case that has been through JSON."""
    goals = tuple(Goal(**goal) for goal in fields["goals"])
    return Case(fields["op"], tuple(fields["sizes"]), fields["dtype"], goals)


_VECTORS = {"softmax": 0, "rms_norm": 1, "layer_norm": 2, "gelu_chain": 3}
"""What works on rows, and the operands that it has beside them, each as long as a row."""

_GEMM = {"f32": (Goal("numpy", 1.0, 0.9),), "bf16": (Goal("torch", 1.0, 0.9),)}
_ATTENTION = (Goal("torch", 1.5, 1.0),)
_ROWS = (Goal("torch", 2.0, 1.0), Goal("torch.compile", 1.2, 1.0))
_GEMV = (Goal("bandwidth", 0.9, 0.8),)
_CONV = (Goal("torch", 1.0, 0.8),)
_LAUNCH = (Goal("seconds", 0.5e-6, 2e-6),)
_COLD, _WARM = (Goal("seconds", 0.1, 0.3),), (Goal("seconds", 0.005, None),)


def compile_cases() -> tuple[tuple[Case, Case], ...]:
    """A kernel of 30 lines without and with the object cache: tile sizes given, or left to dure."""
    return (
        (Case("compile_cold", (30,), "f32", _COLD), Case("compile_warm", (30,), "f32", _WARM)),
        (Case("compile_open_cold", (30,), "f32"), Case("compile_open_warm", (30,), "f32")),
    )


def cases(smallest: bool) -> list[Case]:
    """All cases, or one small case of every kernel, to see that it runs and agrees."""
    squares = (96,) if smallest else (512, 1024, 2048, 4096)
    attention = [(2, 48, 48, 64), (2, 1, 200, 64)] if smallest else _attention_sizes()
    rows = ((16, 200),) if smallest else ((128, 1024), (1024, 4096), (8192, 4096))
    weights = ((64, 256),) if smallest else ((4096, 4096), (14336, 4096), (4096, 14336))
    return [
        *(Case("gemm", (n, n, n), kind, goals) for kind, goals in _GEMM.items() for n in squares),
        *(Case("attention", s, kind, _ATTENTION) for kind in ELEMENT_BYTES for s in attention),
        *(Case(op, sizes, "f32", _ROWS) for op in _VECTORS for sizes in rows),
        *(_gemv(n, k, kind, smallest) for kind in BLOCK_BYTES for n, k in weights),
        *(Case("conv2d", sizes, "f32", _CONV) for sizes in _conv_sizes(smallest)),
        Case("launch", (64,), "f32", _LAUNCH),
    ]


def _attention_sizes() -> list[Shape]:
    """Heads, queries, keys, D: causal prefills, and one query that sees all keys."""
    prefill = [(8, length, length, size) for length in (512, 2048) for size in (64, 128)]
    return [*prefill, *((8, 1, 4096, size) for size in (64, 128))]


def _gemv(n: int, k: int, format: str, smallest: bool) -> Case:
    one = n * k // BLOCK * BLOCK_BYTES[format]
    copies = 2 if smallest else -(-STREAMED // one)
    return Case("gemv", (copies, n, k), format, _GEMV)


def _conv_sizes(smallest: bool) -> tuple[Shape, ...]:
    """Batch, height, width, channels in and out, taps a side: layers of a ResNet-50."""
    if smallest:
        return ((1, 9, 9, 16, 24, 3), (1, 9, 9, 16, 24, 1))
    return (
        (1, 56, 56, 64, 64, 3),
        (1, 28, 28, 128, 128, 3),
        (1, 14, 14, 256, 256, 3),
        (1, 56, 56, 64, 256, 1),
        (1, 14, 14, 1024, 256, 1),
    )
