"""Reductions and scans.

Where the reduced axis is the one that vectors run along, each lane of several registers keeps a
partial result, and the lanes are combined by halves at the end; otherwise a vector of results walks
along the axis.  Either order depends on the tile's shape and the vector width alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dure.ir import dtypes
from dure.ir.core import Op, Region
from dure.ir.dtypes import DType
from dure.targets.cpu import elementwise
from dure.targets.cpu.bounds import Bounds
from dure.targets.cpu.copies import lies_along
from dure.targets.cpu.distant import Ask
from dure.targets.cpu.lanes import reduce_lanes
from dure.targets.cpu.memory import Extent
from dure.targets.cpu.numbers import register_type
from dure.targets.cpu.values import TOGETHER, Buffer, Emitter, Tile, constant, lane_axis
from dure.targets.cpu.writer import Reg, integer, lanes_of, vector_type

if TYPE_CHECKING:
    from dure.targets.cpu.body import BodyEmitter

Combine = Callable[[Reg, Reg], Reg]


def reduce(body: BodyEmitter, op: Op, source: Tile, target: Buffer) -> None:
    """A named reduction into ``target`` (extent 1 along the axis)."""
    e = body.e
    combiner: str = op.attr("combiner")
    axis = op.attr("axis") % source.type.rank
    extents = body.extents(op.result)
    if combiner in ("argmax", "argmin"):
        _arg(e, source, target, axis, combiner, extents)
        return
    name: str = {"sum": "add", "prod": "mul"}.get(combiner, combiner)
    dtype = source.dtype
    # Sums of 16-bit floats are kept in float32 and rounded once.
    wide = dtypes.float32 if dtype.is_float and dtype.bits < 32 else dtype

    def combine(a: Reg, b: Reg) -> Reg:
        return elementwise.apply(e, name, wide, [a, b])

    ask = body.distant.asked_by(body, op)
    _reduce(e, source, target, axis, combine, _identity(name, wide), wide, extents, ask)


def _identity(name: str, dtype: DType) -> float:
    if name == "add":
        return 0
    if name == "mul":
        return 1
    if dtype.is_float:
        return float("-inf") if name == "max" else float("inf")
    low, high = (0, 2**dtype.bits - 1) if dtype.kind == "uint" else _signed(dtype)
    return low if name == "max" else high


def _signed(dtype: DType) -> tuple[int, int]:
    return -(2 ** (dtype.bits - 1)), 2 ** (dtype.bits - 1) - 1


def reduce_with(body: BodyEmitter, op: Op, source: Tile, target: Buffer) -> None:
    """A reduction by the author's own associative function."""
    e, region = body.e, op.regions[0]
    axis = op.attr("axis") % source.type.rank

    def combine(a: Reg, b: Reg) -> Reg:
        return _inline(body, region, [a, b])

    identity = float(op.attr("identity"))
    _reduce(e, source, target, axis, combine, identity, source.dtype, body.extents(op.result))


def _inline(body: BodyEmitter, region: Region, operands: Sequence[Reg]) -> Reg:
    """A region of elementwise ops on registers."""
    e = body.e
    found = dict(zip(region.args, operands, strict=True))
    for op in region.ops:
        if op.name == "full":
            dtype = op.result.tile.dtype
            assert isinstance(dtype, DType)
            found[op.result] = constant(e, dtype, op.attr("value"), lanes_of(operands[0].type))
        elif op.name in ("broadcast", "reshape"):
            found[op.result] = found[op.operands[0]]
        elif op.definition.elementwise:
            function = elementwise.function_of(e, op)
            found[op.result] = function([found[o] for o in op.operands])
        else:
            body.refuse(op, f"a combine function uses '{op.name}'", "use elementwise ops alone")
    return found[region.yields[0]]


def _reduce(
    e: Emitter,
    source: Tile,
    target: Buffer,
    axis: int,
    combine: Combine,
    identity: float,
    dtype: DType,
    extents: Sequence[Extent],
    ask: Ask | None = None,
) -> None:
    w, length = e.w, source.type.shape[axis]
    lane = lane_axis(source.type.shape)
    kept = [Extent(1) if a == axis else x for a, x in enumerate(extents)]
    if lane != axis:

        def across(index: list[Reg], lanes: int) -> None:
            def step(at: Reg, totals: list[Reg]) -> list[Reg]:
                inner = [at if a == axis else i for a, i in enumerate(index)]
                return [combine(totals[0], source.vector(e, inner, lane, lanes))]

            start = constant(e, dtype, identity, lanes)
            (total,) = w.loop(integer(0), integer(length), 1, step, [start])
            target.put(e, e.convert.rounded(total, target.dtype), index, lane)

        e.for_each(kept, lane, across)
        return

    counts = [w.index(length if a == axis else x.bound) for a, x in enumerate(extents)]
    whole = _Along(
        e, source, axis, counts, combine, lambda lanes: constant(e, dtype, identity, lanes), ask
    )

    def along(index: list[Reg], _: int) -> None:
        target.put(e, e.convert.rounded(whole.reduced(index), target.dtype), index, axis)

    e.for_each(kept, axis, along)


class _Along:
    """A reduction along the axis that vectors run along, of one row after another.

    A partial result waits for the one before it, so that several registers of them are combined at
    a time.
    """

    def __init__(
        self,
        e: Emitter,
        source: Tile,
        axis: int,
        counts: Sequence[Reg],
        combine: Combine,
        identity: Callable[[int], Reg],
        ask: Ask | None,
    ) -> None:
        """``counts`` are the extents that are used; ``identity`` fills a vector of so many lanes.

        Bounds are compared for all rows at once, in front of the loop over them.
        """
        self.e, self.source, self.axis, self.counts = e, source, axis, counts
        self.combine, self.identity, self.ask = combine, identity, ask
        self.length = source.type.shape[axis]
        wide = TOGETHER * e.lanes
        self.width = wide if self.length >= wide and lies_along(source, axis, wide) else e.lanes
        accesses = source.accesses(range(source.type.rank))
        self.bounds = Bounds(e.w, accesses, axis, self.width)
        several = self.bounds.open and not self.bounds.ragged
        self.limit = self.bounds.limit(counts) if several else None

    def reduced(self, index: Sequence[Reg]) -> Reg:
        """All elements of the row at ``index``: whole vectors, then one of each smaller size."""
        total: Reg | None = None
        main = self.length - self.length % self.width
        if main:
            total = reduce_lanes(self.e, self._vectors(index, main), self.combine)
        at, rest = main, self.length - main
        while rest:
            piece = 1 << (rest.bit_length() - 1)
            part = self._vector(index, integer(at), piece)
            part = reduce_lanes(self.e, part, self.combine) if piece > 1 else part
            total = part if total is None else self.combine(total, part)
            at, rest = at + piece, rest - piece
        assert total is not None
        return total

    def _vectors(self, index: Sequence[Reg], main: int) -> Reg:
        """The partial results: what lies inside of all tensors first, then what is masked."""
        w, width = self.e.w, self.width

        def step(at: Reg, totals: list[Reg]) -> list[Reg]:
            return [self.combine(totals[0], self._vector(index, at, width))]

        start, totals = integer(0), [self.identity(width)]
        if self.bounds.open:
            limit = self.limit or self.bounds.limit(self.counts, index)
            inside = w.sub(limit, w.mod(limit, width))
            with self.bounds.kept():
                totals = w.loop(start, inside, width, step, totals)
            start = inside
        return w.loop(start, integer(main), width, step, totals)[0]

    def _vector(self, index: Sequence[Reg], at: Reg, lanes: int) -> Reg:
        inner = [at if a == self.axis else i for a, i in enumerate(index)]
        if self.ask is not None:
            self.ask(inner, lanes)
        return self.source.vector(self.e, inner, self.axis, lanes)


def _arg(
    e: Emitter,
    source: Tile,
    target: Buffer,
    axis: int,
    combiner: str,
    extents: Sequence[Extent],
) -> None:
    """The lowest index of the largest (smallest) element; NaN counts as larger than any number."""
    w, dtype, length = e.w, source.dtype, source.type.shape[axis]
    lane = lane_axis(source.type.shape)

    def better(new: Reg, old: Reg) -> Reg:
        """Whether ``new`` replaces ``old``, both seen in order of the index."""
        if not dtype.is_float:
            sign = "s" if dtype.kind == "int" else "u"
            return w.compare(f"icmp {sign}{'gt' if combiner == 'argmax' else 'lt'}", new, old)
        first = w.compare("fcmp ogt" if combiner == "argmax" else "fcmp olt", new, old)
        nan = w.binary("and", w.compare("fcmp uno", new, new), w.compare("fcmp ord", old, old))
        return w.binary("or", first, nan)

    along = lane == axis
    kept = [Extent(1) if a == axis else x for a, x in enumerate(extents)]

    def scan(index: list[Reg], lanes: int, at_lane: int) -> tuple[Reg, Reg]:
        """The best value and its index, element by element along the axis."""
        first = [integer(0) if a == axis else i for a, i in enumerate(index)]
        best = source.vector(e, first, at_lane, lanes)
        where = w.constant("i32", 0, lanes)

        def step(at: Reg, state: list[Reg]) -> list[Reg]:
            inner = [at if a == axis else i for a, i in enumerate(index)]
            new = source.vector(e, inner, at_lane, lanes)
            wins = better(new, state[0])
            here = w.splat(w.cast("trunc", at, "i32"), lanes)
            return [w.select(wins, new, state[0]), w.select(wins, here, state[1])]

        found = w.loop(integer(1), integer(length), 1, step, [best, where])
        return found[0], found[1]

    def lanes_along(index: list[Reg]) -> Reg:
        """Each lane keeps the best of its own elements; then the lanes are compared."""
        lanes = e.lanes
        first = [integer(0) if a == axis else i for a, i in enumerate(index)]
        best = source.vector(e, first, axis, lanes)
        iota = w.iota("i32", lanes)

        def step(at: Reg, state: list[Reg]) -> list[Reg]:
            inner = [at if a == axis else i for a, i in enumerate(index)]
            new = source.vector(e, inner, axis, lanes)
            wins = better(new, state[0])
            here = w.binary("add", w.splat(w.cast("trunc", at, "i32"), lanes), iota)
            return [w.select(wins, new, state[0]), w.select(wins, here, state[1])]

        found = w.loop(integer(lanes), integer(length), lanes, step, [best, iota])
        value, where = found
        count = lanes
        while count > 1:
            half = count // 2
            low_value, high_value = (
                w.shuffle(value, range(half)),
                w.shuffle(value, range(half, count)),
            )
            low, high = w.shuffle(where, range(half)), w.shuffle(where, range(half, count))
            wins = better(high_value, low_value)
            loses = better(low_value, high_value)
            tie = w.compare("icmp slt", high, low)
            truth = w.constant("i1", 1, half)
            even = w.binary("and", tie, w.binary("xor", loses, truth))
            wins = w.binary("or", wins, even)
            value, where = w.select(wins, high_value, low_value), w.select(wins, high, low)
            count = half
        return w.lane(where, 0)

    def body(index: list[Reg], lanes: int) -> None:
        if along and length % e.lanes == 0:
            where = lanes_along(index)
        else:
            where = scan(index, 1 if along else lanes, lane)[1]
        target.put(e, where, index, lane)

    e.for_each(kept, lane, body)


def cumsum(body: BodyEmitter, op: Op, source: Tile, target: Buffer) -> None:
    """Running sums along an axis, element by element."""
    e, w = body.e, body.e.w
    axis: int = op.attr("axis") % source.type.rank
    shape = source.type.shape
    lane = next((a for a in range(len(shape) - 1, -1, -1) if a != axis and shape[a] > 1), axis)
    kept = [Extent(1) if a == axis else x for a, x in enumerate(body.extents(op.result))]
    dtype = source.dtype
    wide = dtypes.float32 if dtype.is_float and dtype.bits < 32 else dtype

    def across(index: list[Reg], lanes: int) -> None:
        def step(at: Reg, totals: list[Reg]) -> list[Reg]:
            inner = [at if a == axis else i for a, i in enumerate(index)]
            new = source.vector(e, inner, lane, lanes)
            total = elementwise.apply(e, "add", wide, [totals[0], new])
            target.put(e, e.convert.rounded(total, dtype), inner, lane)
            return [total]

        zero = constant(e, wide, 0, lanes)
        assert zero.type == vector_type(register_type(wide), lanes)
        w.loop(integer(0), integer(shape[axis]), 1, step, [zero])

    e.for_each(kept, lane, across)
