"""Layouts: where an element lies.

A layout maps a logical index to an address by mixed-radix strides.  Each logical axis is cut into
digits, major to minor; a digit has an extent, a stride, and the address dimension it counts in.  In
the dimension ``offset`` strides count **bits**, so that nibbles, packed panels and a GGUF file's
bytes are layouts like any other; the other dimensions (``chip``, ``core``, ``partition``, ``bank``)
count places.  The outermost digit of an axis has no extent of its own (None): it runs as far as the
axis does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dure.errors import IRError
from dure.ir.dtypes import BlockFormat
from dure.ir.expr import Const, Expr, IntLike, as_expr, const

AddressDim: TypeAlias = Literal["offset", "chip", "core", "partition", "bank"]


@dataclass(frozen=True, slots=True)
class Digit:
    """One digit of a mixed-radix index: ``extent`` values (None: the rest), ``stride`` apart."""

    extent: int | None
    stride: IntLike
    dim: AddressDim = "offset"


@dataclass(frozen=True, slots=True)
class Layout:
    """Digits for each logical axis, and the bit at which index zero lies."""

    axes: tuple[tuple[Digit, ...], ...]
    offset: IntLike = 0

    @property
    def rank(self) -> int:
        return len(self.axes)

    def address(self, index: Sequence[IntLike], dim: AddressDim = "offset") -> Expr:
        """Where the element at ``index`` lies in ``dim`` (bits for ``offset``)."""
        if len(index) != self.rank:
            raise IRError(
                f"an index of {len(index)} for a layout of {self.rank} axes",
                rule="an index has one entry per logical axis",
                fix=f"give {self.rank} entries",
            )
        total = as_expr(self.offset) if dim == "offset" else const(0)
        for position, digits in zip(index, self.axes, strict=True):
            rest = as_expr(position)
            for place, digit in enumerate(digits):
                below = _product(d.extent for d in digits[place + 1 :])
                value = rest // below
                rest = rest - value * below
                if digit.dim == dim:
                    total = total + value * digit.stride
        return total

    def permuted(self, order: Sequence[int]) -> Layout:
        """The same bytes with the logical axes in another order."""
        return Layout(tuple(self.axes[a] for a in order), self.offset)

    def is_static(self) -> bool:
        """Whether every stride and the offset are constants."""
        strides = [d.stride for digits in self.axes for d in digits]
        return all(isinstance(as_expr(s), Const) for s in (*strides, self.offset))

    def __str__(self) -> str:
        axes = ", ".join(
            "[" + " ".join(_digit_text(digit) for digit in digits) + "]" for digits in self.axes
        )
        return f"layout({axes}; {self.offset})"


def _digit_text(digit: Digit) -> str:
    extent = "*" if digit.extent is None else str(digit.extent)
    dim = "" if digit.dim == "offset" else f"@{digit.dim}"
    return f"{extent}:{digit.stride}{dim}"


def _product(extents: Iterable[int | None]) -> int:
    total = 1
    for extent in extents:
        if extent is None:
            raise IRError(
                "an inner digit without an extent",
                rule="only the outermost digit of an axis may run freely",
                fix="give the digit an extent",
            )
        total *= extent
    return total


def strided(strides_in_elements: Sequence[IntLike], bits: int, offset: IntLike = 0) -> Layout:
    """A plain strided layout of ``bits``-wide elements."""
    return Layout(tuple((Digit(None, s * bits),) for s in strides_in_elements), offset)


def row_major(shape: Sequence[IntLike], bits: int) -> Layout:
    """Contiguous, the last axis fastest."""
    strides: list[IntLike] = []
    running: IntLike = 1
    for extent in reversed(shape):
        strides.append(running)
        running = as_expr(extent) * running
    return strided([_plain(s) for s in reversed(strides)], bits)


def _plain(value: IntLike) -> IntLike:
    expr = as_expr(value)
    return expr.value if isinstance(expr, Const) else expr


@dataclass(frozen=True, slots=True)
class PlaneLayouts:
    """The layouts of a block-quantized tensor's planes, all in one buffer.

    A plane's layout takes the tensor's logical index with the quantized axis divided by the plane's
    ``per``.
    """

    planes: tuple[tuple[str, Layout], ...]

    def __getitem__(self, name: str) -> Layout:
        return dict(self.planes)[name]

    def __str__(self) -> str:
        return "planes(" + ", ".join(f"{n}={layout}" for n, layout in self.planes) + ")"


AnyLayout: TypeAlias = Layout | PlaneLayouts


def row_planes(format: BlockFormat, shape: Sequence[IntLike], axis: int) -> PlaneLayouts:
    """The default layout of a block-quantized tensor: each row holds its planes one after another.

    ``axis`` is the quantized axis and must be the last, with a constant extent.
    """
    if axis % len(shape) != len(shape) - 1 or not isinstance(as_expr(shape[-1]), Const):
        raise IRError(
            f"no default layout for a {format} tensor quantized along axis {axis}",
            rule="by default a block-quantized tensor is cut along its last axis, of constant size",
            fix="give the tensor a layout",
        )
    length = as_expr(shape[-1])
    assert isinstance(length, Const)
    row_bits = sum(length.value // p.per * p.dtype.bits for p in format.planes)
    layouts: list[tuple[str, Layout]] = []
    offset = 0
    for plane in format.planes:
        bits = plane.dtype.bits
        digits: list[tuple[Digit, ...]] = [(Digit(None, bits),)]
        stride: IntLike = row_bits
        for extent in reversed(shape[:-1]):
            digits.append((Digit(None, _plain(as_expr(stride))),))
            stride = as_expr(stride) * extent
        layouts.append((plane.name, Layout(tuple(reversed(digits)), offset)))
        offset += length.value // plane.per * bits
    return PlaneLayouts(tuple(layouts))
