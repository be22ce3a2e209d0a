"""Moving a tensor from one layout to another: the load program's inner loops, as LLVM IR.

Both layouts cut each axis into digits; their common refinement is a nest of loops with a constant
source and destination stride each.  Digits that are contiguous on both sides merge into wide units.
Entries narrower than a byte move whole words at a time: a word is loaded, shifted, masked and or-ed
into place (four neighbouring bytes of nibbles are one 32-bit word), or spread from neighbouring
bits to neighbouring bytes by a multiplication.  The outermost digit of the first axis (a panel of
rows) is the loop that workers share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

from dure.errors import IRError
from dure.ir.dtypes import BlockFormat
from dure.ir.layout import AnyLayout, Digit, Layout, PlaneLayouts, row_major
from dure.ir.types import TensorType, static_extent
from dure.targets.cpu.writer import Reg, Writer, integer

#: The most copies of an innermost body that are written out.
_UNROLL = 16


@dataclass(frozen=True)
class _Loop:
    """``extent`` steps of ``source`` and ``target`` bits along ``axis``.

    ``limit`` is set where the last turn of the axis's outer loop has fewer steps than ``extent``.
    """

    axis: int
    extent: int
    source: int
    target: int
    limit: int | None = None


@dataclass(frozen=True)
class _Plane:
    """One plane's loops, entry width and first bits."""

    name: str
    bits: int
    loops: tuple[_Loop, ...]
    source: int
    target: int


@dataclass(frozen=True)
class Relayout:
    """A compiled relayout: ``void symbol(ptr source, ptr target, i64 begin, i64 end)``.

    ``begin`` and ``end`` count in the outermost digit of the first axis, of which there are
    ``panels``.
    """

    symbol: str
    definition: str
    panels: int


def emit_relayout(symbol: str, source: TensorType, target: TensorType, attributes: str) -> Relayout:
    """LLVM IR that moves every element of ``source`` to where ``target`` has it.

    The types differ in layout alone; shape and strides are constants.  The destination must be
    zeroed.  Raises :class:`IRError` for layouts without a common refinement.
    """
    planes = [_plane(*entry) for entry in _pairs(source, target)]
    shared = {_outer(p).extent for p in planes}
    if len(shared) != 1:
        raise _unfit(source, target, "their planes are cut differently along the first axis")
    w = Writer()
    begin, end = Reg("i64", "%begin"), Reg("i64", "%end")

    def panel(number: Reg, _: list[Reg]) -> list[Reg]:
        for plane in planes:
            _emit_plane(w, plane, number)
        return []

    w.loop(begin, end, 1, panel)
    w.do("ret void")
    declarations = "\n".join(w.declarations.values())
    text = w.text
    head = f"define void @{symbol}(ptr noalias %source, ptr noalias %target, i64 %begin, i64 %end)"
    definition = f"{declarations}\n{head} nounwind {attributes} {{\nentry:\n{text}\n}}\n"
    return Relayout(symbol, definition, shared.pop())


def _unfit(source: TensorType, target: TensorType, why: str) -> IRError:
    return IRError(
        f"cannot move {source} to {target}: {why}",
        rule="both layouts of a relayout cut an axis at common multiples",
        fix="choose a layout whose digits divide those of the other",
    )


def _pairs(
    source: TensorType, target: TensorType
) -> list[tuple[str, int, Layout, Layout, list[int]]]:
    """(name, bits, source layout, target layout, entries) of each plane."""
    shape = [static_extent(e) for e in source.shape]
    extents = [e for e in shape if e is not None]
    if len(extents) != source.rank or source.shape != target.shape or source.dtype != target.dtype:
        raise _unfit(source, target, "they differ in more than their layout, or are symbolic")
    if not isinstance(source.dtype, BlockFormat):
        default = row_major(extents, source.dtype.bits)
        layouts = (_single(source.layout, default), _single(target.layout, default))
        return [("", source.dtype.bits, *layouts, extents)]
    assert isinstance(source.layout, PlaneLayouts)
    assert isinstance(target.layout, PlaneLayouts)
    axis = source.quantized_axis % source.rank
    found: list[tuple[str, int, Layout, Layout, list[int]]] = []
    for name, layout in target.layout.planes:
        plane = source.dtype.plane(name)
        entries = [e // plane.per if a == axis else e for a, e in enumerate(extents)]
        found.append((name, plane.dtype.bits, source.layout[name], layout, entries))
    return found


def _single(layout: AnyLayout | None, default: Layout) -> Layout:
    if layout is None:
        return default
    assert isinstance(layout, Layout)
    return layout


def _plane(name: str, bits: int, source: Layout, target: Layout, extents: list[int]) -> _Plane:
    loops: list[_Loop] = []
    for axis, extent in enumerate(extents):
        loops.extend(_refine(axis, extent, source.axes[axis], target.axes[axis]))
    return _Plane(name, bits, tuple(loops), _constant(source.offset), _constant(target.offset))


def _constant(value: object) -> int:
    if not isinstance(value, int):
        raise IRError(
            f"a stride of {value} in a relayout",
            rule="a weight's layout has constant strides",
            fix="use a layout without symbols",
        )
    return value


def _refine(axis: int, extent: int, one: Sequence[Digit], other: Sequence[Digit]) -> list[_Loop]:
    """The loops of an axis, outermost first; an inner loop may be cut at the axis's end."""
    left = [(d.extent, _constant(d.stride)) for d in reversed(one)]
    right = [(d.extent, _constant(d.stride)) for d in reversed(other)]
    loops: list[_Loop] = []
    covered = 1
    while True:
        (a, source), (b, target) = left[0], right[0]
        if a is None and b is None:
            break
        step = min(x for x in (a, b) if x is not None)
        if any(x is not None and x % step for x in (a, b)):
            raise IRError(
                f"digits of {a} and {b} along axis {axis}",
                rule="both layouts of a relayout cut an axis at common multiples",
                fix="choose a layout whose digits divide those of the other",
            )
        loops.append(_Loop(axis, step, source, target))
        covered *= step
        for digits, (size, stride) in ((left, (a, source)), (right, (b, target))):
            digits[0] = (None if size is None else size // step, stride * step)
            if digits[0][0] == 1:
                digits.pop(0)
    outer = _Loop(axis, -(-extent // covered), left[0][1], right[0][1])
    if extent % covered:
        if len(loops) != 1:
            raise IRError(
                f"an axis of {extent} cut into digits of {covered}",
                rule="an axis that is cut in several digits is a whole multiple of them",
                fix="choose a layout whose digits divide the axis",
            )
        loops[0] = replace(loops[0], limit=extent)
    # Digits of one value are no loops, but the outermost is what workers share.
    return [outer, *(loop for loop in reversed(loops) if loop.extent > 1 or loop.limit)]


def _outer(plane: _Plane) -> _Loop:
    return plane.loops[0]


# --- one plane ------------------------------------------------------------------------------------


def _emit_plane(w: Writer, plane: _Plane, panel: Reg) -> None:
    outer = _outer(plane)
    rest = [loop for loop in plane.loops[1:] if loop.extent > 1 or loop.limit]
    width, rest = _widened(plane.bits, rest)
    aligned = all(
        bit % 8 == 0
        for bit in (plane.source, plane.target, *(b for p in rest for b in (p.source, p.target)))
    )
    if width % 8 == 0 and aligned:
        body = _copy(w, width // 8)
        loops = rest
    else:
        body, loops = _shifted(w, plane, width, rest)
    base_source = w.offset(Reg("ptr", "%source"), _bytes(w, panel, outer.source, plane.source))
    base_target = w.offset(Reg("ptr", "%target"), _bytes(w, panel, outer.target, plane.target))
    # Writing in order lets the caches combine stores; the reads are a few parallel streams.
    ordered = sorted(loops, key=lambda loop: -loop.target)
    _nest(w, ordered, panel, base_source, base_target, body)


def _bytes(w: Writer, number: Reg, stride: int, offset: int) -> Reg:
    """The whole bytes of ``number * stride + offset`` bits (the stride is whole bytes)."""
    if stride % 8:
        raise IRError(
            f"a stride of {stride} bits between panels",
            rule="panels of rows start on whole bytes",
            fix="choose a layout whose rows are whole bytes",
        )
    return w.add(w.mul(number, integer(stride // 8)), integer(offset // 8))


_Body = Callable[[Reg, Reg], None]


def _nest(
    w: Writer, loops: Sequence[_Loop], panel: Reg, source: Reg, target: Reg, body: _Body
) -> None:
    """The loops around ``body(source, target)``; small constant ones inside are written out."""
    if not loops:
        body(source, target)
        return
    loop, inner = loops[0], loops[1:]

    def turn(number: Reg, _: list[Reg]) -> list[Reg]:
        at_source = w.offset(source, w.mul(number, integer(loop.source // 8)))
        at_target = w.offset(target, w.mul(number, integer(loop.target // 8)))
        _nest(w, inner, panel, at_source, at_target, body)
        return []

    small = prod(p.extent for p in loops) <= _UNROLL and not any(p.limit for p in loops)
    if small:
        for number in range(loop.extent):
            turn(integer(number), [])
        return
    stop = integer(loop.extent)
    if loop.limit is not None:
        left = w.sub(integer(loop.limit), w.mul(panel, integer(loop.extent)))
        stop = w.minimum(stop, left)
    w.loop(integer(0), stop, 1, turn)


def _widened(bits: int, loops: Sequence[_Loop]) -> tuple[int, list[_Loop]]:
    """Merges digits that are contiguous on both sides into one wide unit (at most 64 bytes)."""
    rest = list(loops)
    while True:
        found = next(
            (
                p
                for p in rest
                if p.source == p.target == bits and not p.limit and bits * p.extent <= 512
            ),
            None,
        )
        if found is None:
            return bits, rest
        rest.remove(found)
        bits *= found.extent


def _copy(w: Writer, size: int) -> _Body:
    """Moves ``size`` bytes."""
    pieces: list[tuple[int, int]] = []
    start = 0
    while start < size:
        piece = next(p for p in (64, 32, 16, 8, 4, 2, 1) if p <= size - start)
        pieces.append((start, piece))
        start += piece

    def body(source: Reg, target: Reg) -> None:
        for offset, piece in pieces:
            kind = f"i{8 * piece}" if piece <= 8 else f"<{piece} x i8>"
            value = w.load(kind, w.offset(source, integer(offset)))
            w.store(value, w.offset(target, integer(offset)))

    return body


@dataclass(frozen=True)
class _Term:
    """Bits of one word of the source that go to one word of the target (offsets in bits)."""

    source: int
    target: int


def _shifted(
    w: Writer, plane: _Plane, bits: int, loops: Sequence[_Loop]
) -> tuple[_Body, list[_Loop]]:
    """The body for entries narrower than a byte, and the loops that remain around it."""
    lanes = next(
        (p for p in loops if p.source == p.target == 8 and p.extent in (2, 4, 8) and not p.limit),
        None,
    )
    spread = None
    if lanes is None:
        spread = next(
            (
                p
                for p in loops
                if p.source == bits
                and p.target == 8
                and bits * (p.extent + 1) <= 8
                and p.extent in (2, 4, 8)
            ),
            None,
        )
    taken = lanes or spread
    rest = [p for p in loops if p is not taken]
    inside = [p for p in rest if p.source % 8 or p.target % 8]
    outside = [p for p in rest if p not in inside]
    width = 8 * (taken.extent if taken else 1)
    offsets = [_Term(plane.source % 8, plane.target % 8)]
    for loop in inside:
        if loop.limit:
            raise IRError(
                "an axis cut inside a byte", rule="rows that are cut start on whole bytes"
            )
        offsets = [
            _Term(o.source + i * loop.source, o.target + i * loop.target)
            for o in offsets
            for i in range(loop.extent)
        ]
    covered = _covers(offsets, bits, width)

    def body(source: Reg, target: Reg) -> None:
        _move_bits(w, source, target, offsets, bits, width, spread, covered)

    return body, outside


def _covers(offsets: Sequence[_Term], bits: int, width: int) -> bool:
    """Whether the terms fill every bit of every byte that they touch."""
    filled: dict[int, int] = {}
    for term in offsets:
        filled[term.target // 8] = filled.get(term.target // 8, 0) + bits
    return all(total == 8 for total in filled.values())


def _move_bits(
    w: Writer,
    source: Reg,
    target: Reg,
    offsets: Sequence[_Term],
    bits: int,
    width: int,
    spread: _Loop | None,
    covered: bool,
) -> None:
    kind = f"i{width}"
    mask = sum(((1 << bits) - 1) << shift for shift in range(0, width, 8))
    loaded: dict[int, Reg] = {}
    words: dict[int, Reg] = {}

    def load(place: int) -> Reg:
        if place not in loaded:
            at = w.offset(source, integer(place))
            if spread is None:
                loaded[place] = w.load(kind, at)
            else:
                loaded[place] = w.cast("zext", w.load("i8", at), kind)
        return loaded[place]

    for term in offsets:
        value = load(term.source // 8)
        value = _shift(w, "lshr", value, term.source % 8)
        if spread is not None:
            low = (1 << (bits * spread.extent)) - 1
            value = w.binary("and", value, Reg(kind, str(low)))
            factor = sum(1 << ((8 - bits) * lane) for lane in range(spread.extent))
            value = w.binary("mul", value, Reg(kind, str(factor)))
        value = w.binary("and", value, Reg(kind, str(mask)))
        value = _shift(w, "shl", value, term.target % 8)
        place = term.target // 8
        words[place] = w.binary("or", words[place], value) if place in words else value
    for place, value in words.items():
        at = w.offset(target, integer(place))
        if not covered:
            # Another plane has its bits in the same bytes.
            value = w.binary("or", w.load(kind, at), value)
        w.store(value, at)


def _shift(w: Writer, direction: str, value: Reg, by: int) -> Reg:
    return value if by == 0 else w.binary(direction, value, Reg(value.type, str(by)))
