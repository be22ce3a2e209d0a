"""What a transfer touches at its far end: bytes, and runs of bytes that lie side by side.

A transfer's elements are a box: along each axis so many of them, evenly apart, or the entries of an
index list.  The tensor's layout turns an axis into digits with strides; a digit whose stride is the
length of the run below it makes the run longer, any other repeats it.  The planes of a
block-quantized tensor are segments of one pattern, and join where they touch.  The entries of a
list lie anywhere: each is at least one run of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod

from dure.ir.dtypes import BlockFormat, DType
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
    return _footprint(tensor, tuple(reach), granule)


@lru_cache(maxsize=1 << 14)
def _footprint(tensor: TensorType, reach: tuple[Reach, ...], granule: int) -> Footprint:
    if any(r.elements == 0 for r in reach):
        return Footprint(0, 0, 0)
    layout = default_layout(tensor)
    if isinstance(layout, PlaneLayouts):
        bits, segments = _blocks(tensor, layout, reach)
    else:
        assert isinstance(tensor.dtype, DType)
        width = tensor.dtype.bits
        bits = prod(r.elements for r in reach) * width
        segments = [_Segment(_number(layout.offset), width, _near_first(reach, layout))]
    entries = prod(r.entries for r in reach)
    segments = _joined(segments)
    repeats = [prod(n for n, _ in s.dims) * entries for s in segments]
    granules = sum(
        n * ceil(s.run / (8 * granule)) * granule for s, n in zip(segments, repeats, strict=True)
    )
    total = -(-bits // 8)
    return Footprint(total, sum(repeats), max(granules, total))


def _blocks(
    tensor: TensorType, layout: PlaneLayouts, reach: Sequence[Reach]
) -> tuple[int, list[_Segment]]:
    """The bits and the segments of a block-quantized tensor's planes.

    Where a block's planes lie together, the segments are those of one block, else whole planes.
    """
    format = tensor.dtype
    assert isinstance(format, BlockFormat)
    axis = tensor.quantized_axis % tensor.rank
    bits, planes, inside = 0, list[_Segment](), list[_Segment]()
    for plane in format.planes:
        here, width = layout[plane.name], plane.dtype.bits
        entries = format.block // plane.per
        blocks = ceil(reach[axis].elements / format.block)
        others = prod(r.elements for a, r in enumerate(reach) if a != axis)
        bits += others * blocks * entries * width
        start = _number(here.offset)
        box = [
            replace(r, elements=blocks * entries) if a == axis else r for a, r in enumerate(reach)
        ]
        planes.append(_Segment(start, width, _near_first(box, here)))
        stride = _address(here.axes[axis], entries)
        box[axis] = replace(reach[axis], elements=reach[axis].entries)
        each = (ceil(blocks / reach[axis].entries), stride)
        dims = sorted(d for d in (*_near_first(box, here), each) if d[0] > 1)
        dims.sort(key=lambda dim: dim[1])
        inside += [
            _Segment(start + _address(here.axes[axis], e), width, list(dims))
            for e in range(entries)
        ]
    together = all(s.dims == inside[0].dims for s in inside)
    return bits, _touching(inside) if together else planes


def _near_first(reach: Sequence[Reach], layout: Layout) -> list[tuple[int, int]]:
    """(count, stride in bits) of all that repeats an element, of one entry of each list."""
    found: list[tuple[int, int]] = []
    for r, digits in zip(reach, layout.axes, strict=True):
        found += _dims(ceil(r.elements / r.entries), r.stride, digits)
    return sorted(((n, s) for n, s in found if n > 1), key=lambda dim: dim[1])


def _address(digits: Sequence[Digit], index: int) -> int:
    """The bit at which an axis's element lies, counted from its first."""
    total = 0
    for digit in reversed(digits):
        here = index if digit.extent is None else index % digit.extent
        index = 0 if digit.extent is None else index // digit.extent
        total += here * _number(digit.stride) if digit.dim == "offset" else 0
    return total


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
    """The segments, as long as they can be made."""
    for segment in segments:
        segment.grow()
    while len(segments) > 1 and all(s.dims == segments[0].dims for s in segments):
        whole = _touching(segments)
        if len(whole) == len(segments):
            break
        segments = whole
        if len(segments) == 1:
            segments[0].grow()
    return segments


def _touching(segments: Sequence[_Segment]) -> list[_Segment]:
    """Segments of equal dims, those that touch as one."""
    found: list[_Segment] = []
    for segment in sorted(segments, key=lambda s: s.offset):
        if found and found[-1].offset + found[-1].run == segment.offset:
            found[-1].run += segment.run
        else:
            found.append(_Segment(segment.offset, segment.run, list(segment.dims)))
    return found


def _number(value: IntLike) -> int:
    expr = as_expr(value)
    assert isinstance(expr, Const), f"a layout with a stride of {expr}"
    return expr.value
