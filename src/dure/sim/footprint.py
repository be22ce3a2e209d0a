"""What a transfer touches at its far end: bytes, and runs of bytes that lie side by side.

A transfer's elements are a box: along each axis so many of them, evenly apart, or the entries of an
index list.  The tensor's layout turns an axis into digits with strides; a digit whose stride is the
length of the run below it makes the run longer, any other repeats it.  The planes of a
block-quantized tensor are segments of one pattern, and join where they touch.  The entries of a
list lie anywhere: each is at least one run of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod

from dure.ir.dtypes import BlockFormat
from dure.ir.expr import Const, IntLike, as_expr
from dure.ir.layout import Digit, Layout, PlaneLayouts
from dure.ir.types import TensorType, default_layout


@dataclass(frozen=True, slots=True)
class Reach:
    """The elements of one axis: ``elements`` of them, ``stride`` apart, in ``entries`` of an index
    list (1 where none rules the axis).
    """

    elements: int
    stride: int = 1
    entries: int = 1


@dataclass(frozen=True, slots=True)
class Footprint:
    """``bytes`` that move, in ``runs``; ``granules`` is the bytes of the whole granules that the
    runs fill (each run starts at one).
    """

    bytes: int
    runs: int
    granules: int


@dataclass(slots=True)
class _Segment:
    """``run`` bits at ``offset``, repeated by ``dims``: (count, stride in bits), nearest first."""

    offset: int
    run: int
    dims: list[tuple[int, int]]

    def grow(self) -> None:
        """Take in the dims that only make the run longer."""
        while self.dims and self.dims[0][1] == self.run:
            self.run *= self.dims.pop(0)[0]


def footprint(tensor: TensorType, reach: Sequence[Reach], granule: int = 1) -> Footprint:
    """What the box ``reach`` of a tensor of constant shape touches."""
    if any(r.elements == 0 for r in reach):
        return Footprint(0, 0, 0)
    entries = prod(r.entries for r in reach)
    planes = _planes(tensor)
    bits, segments = 0, list[_Segment]()
    for width, axis, per, layout in planes:
        counts = [-(-r.elements // per) if a == axis else r.elements for a, r in enumerate(reach)]
        bits += prod(counts) * width
        dims = list[tuple[int, int]]()
        for count, r, digits in zip(counts, reach, layout.axes, strict=True):
            dims += _dims(-(-count // r.entries), r.stride, digits)
        dims = sorted(((n, s) for n, s in dims if n > 1), key=lambda dim: dim[1])
        segments.append(_Segment(_number(layout.offset), width, dims))
    segments = _joined(segments)
    repeats = [prod(n for n, _ in s.dims) * entries for s in segments]
    granules = sum(
        n * ceil(s.run / (8 * granule)) * granule for s, n in zip(segments, repeats, strict=True)
    )
    total = -(-bits // 8)
    return Footprint(total, sum(repeats), max(granules, total))


def _planes(tensor: TensorType) -> list[tuple[int, int, int, Layout]]:
    """(bits of an entry, the axis that is divided, by what, layout) of each plane."""
    layout = default_layout(tensor)
    if isinstance(tensor.dtype, BlockFormat):
        assert isinstance(layout, PlaneLayouts)
        axis = tensor.quantized_axis % tensor.rank
        planes = tensor.dtype.planes
        return [(p.dtype.bits, axis, p.per, layout[p.name]) for p in planes]
    assert isinstance(layout, Layout)
    return [(tensor.dtype.bits, 0, 1, layout)]


def _dims(count: int, stride: int, digits: Sequence[Digit]) -> list[tuple[int, int]]:
    """(count, stride in bits) of an axis's digits, for ``count`` elements from a digit's start."""
    minor = _number(digits[-1].stride)
    if len(digits) == 1 or stride != 1:
        return [(count, minor * stride)]
    found: list[tuple[int, int]] = []
    for digit in reversed(digits):
        here = count if digit.extent is None else min(count, digit.extent)
        count = 1 if digit.extent is None else -(-count // digit.extent)
        found.append((here, _number(digit.stride) if digit.dim == "offset" else -1))
    return found


def _joined(segments: list[_Segment]) -> list[_Segment]:
    for segment in segments:
        segment.grow()
    while len(segments) > 1 and all(s.dims == segments[0].dims for s in segments):
        segments = sorted(segments, key=lambda s: s.offset)
        first = segments[0]
        if any(a.offset + a.run != b.offset for a, b in pairwise(segments)):
            break
        segments = [_Segment(first.offset, sum(s.run for s in segments), first.dims)]
        segments[0].grow()
    return segments


def _number(value: IntLike) -> int:
    expr = as_expr(value)
    assert isinstance(expr, Const), f"a layout with a stride of {expr}"
    return expr.value
