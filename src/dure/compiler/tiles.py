"""Choosing tile sizes: a roofline estimate of a whole launch, and a search over sizes.

The estimate reads the specialised function alone, so that it knows no kernel: work of its ops,
bytes that its loads and stores move, a fixed overhead for every loop over a tile, work on elements
beyond the edge, and idle workers at the end of the grid.  What an instance touches first comes from
the level that holds all tensors, what it or another one has touched before from the one that holds
all that an instance touches, and what its loops carry from the one that holds its tiles.  It ranks
tile sizes and is not meant to predict seconds; :func:`dure.tune` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from dure.errors import DureError, KernelError
from dure.ir.core import Function, Op, Region, Value, walk
from dure.ir.dtypes import bfloat16
from dure.ir.expr import Expr, as_expr, bounds, evaluate, substitute, symbols
from dure.ir.types import TensorType, TileType

_START = 32
_COARSE = (1, 4, 16, 64, 256)
_LARGEST = 2048
#: The cache that holds the rows of a tile that covers them, from the nearest, and its part for one.
_NEAR = 1
_ROW_PART = 8
#: Elements of a row whose stores are brought onto cache lines; those of shorter ones cross them.
_LONG = 256
#: What is computed, like elementwise ops, in the loop of an op that uses it.
_FUSED = frozenset({"full", "iota", "broadcast", "reshape", "transpose", "load", "view"})
#: Registers that a loop which carries tiles element by element works on at a time.
_STRIP = 4


@dataclass(frozen=True, slots=True)
class TileMachine:
    """What tile sizes depend on.

    Rates are a worker's: ``dot_flops`` and ``vector_flops`` in operations a second, bandwidths in
    bytes a second; ``lanes`` float32 values in a vector register; ``op_seconds`` is what starting
    a loop over a tile costs.  ``levels`` are (bytes, bandwidth) of each cache, nearest first.
    """

    workers: int
    lanes: int
    dot_flops: float
    vector_flops: float
    levels: tuple[tuple[int, float], ...]
    memory_bandwidth: float
    op_seconds: float = 5e-9
    #: Runs of addresses that prefetchers follow at once, and what a further one has to wait.
    streams: int = 4
    run_seconds: float = 10e-9
    #: Accumulator rows that a dot's inner loop holds: fewer rows use the multipliers less.
    dot_rows: int = 8
    #: Operations a second of dots of bfloat16 by tile registers, 0 where there are none; the rows
    #: of one, and how many are so few that nothing is copied for them.
    tile_flops: float = 0.0
    tile_rows: int = 16
    few_rows: int = 4

    def bandwidth(self, bytes: float) -> float:
        """Of the nearest level that holds so many bytes beside others."""
        fitting = (rate for capacity, rate in self.levels if bytes <= capacity // 2)
        return next(fitting, self.memory_bandwidth)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of a launch, and the most bytes of tiles alive at once in an instance."""

    seconds: float
    live_bytes: int


def estimate(function: Function, sizes: Mapping[str, int], machine: TileMachine) -> Estimate:
    """The estimated time of a whole launch with these sizes."""
    extents = [max(0, evaluate(extent, sizes)) for extent in function.grid]
    live = live_bytes(function.body)
    # Where an even number of instances get longer and longer, none of them is the mean.
    middles = {tuple((extent - 1 + up) // 2 for extent in extents) for up in (0, 1)}
    one = sum(_instance(function, sizes, machine, live, middle) for middle in middles)
    turns = math.ceil(math.prod(extents) / machine.workers)
    return Estimate(one / len(middles) * turns, live)


def _instance(
    function: Function,
    sizes: Mapping[str, int],
    machine: TileMachine,
    live: int,
    number: Sequence[int],
) -> float:
    """Seconds of the instance of this number along each axis of the grid."""
    work = _Work(machine, dict(sizes), function)
    for place, own in zip(number, function.program_ids, strict=True):
        work.known[own.name] = max(0, place)
    work.region(function.body, 1)
    tensors = sum(_tensor_bytes(p.value.tensor, sizes) for p in function.params)
    first = sum(max(moved) for moved in work.moved.values())
    again = sum(sum(moved) for moved in work.moved.values()) - first
    seconds = work.seconds + work.ops * machine.op_seconds
    seconds += first / machine.bandwidth(tensors) + again / machine.bandwidth(work.loaded)
    seconds += work.shared / machine.bandwidth(first + work.shared)
    # What is kept is read soon after it was written: it may fill a cache.
    seconds += work.kept_moved / machine.bandwidth(work.kept / 2)
    return seconds + work.carried / machine.bandwidth(live)


def _tensor_bytes(kind: TensorType, sizes: Mapping[str, int]) -> float:
    bits = kind.dtype.bits
    for extent in kind.shape:
        bits *= max(0, evaluate(extent, sizes))
    return bits / 8


def _is_fused(op: Op) -> bool:
    return op.definition.elementwise or op.name in _FUSED


def _is_along(op: Op) -> bool:
    """Whether an op reduces the rows of a tile."""
    if op.name not in ("reduce", "reduce_with"):
        return False
    rank = op.operands[0].tile.rank
    return op.attr("axis") % rank == rank - 1


class _Work:
    """Totals of one instance: ``moved`` are the bytes of each load or store of a tensor, ``loaded``
    those that loads bring from different places, ``shared`` those that every instance loads;
    ``kept`` the bytes of tiles that are computed once for several uses, and ``kept_moved`` what is
    written and read of them.
    """

    def __init__(self, machine: TileMachine, known: dict[str, int], function: Function) -> None:
        self.machine = machine
        self.known = known
        self.seconds = 0.0
        self.carried = 0.0
        self.ops = 0.0
        self.loaded = 0.0
        self.shared = 0.0
        self.kept = 0.0
        self.kept_moved = 0.0
        self.moved: dict[Value, list[float]] = {}
        self._own = set(function.program_ids)
        self._users: dict[Value, list[Op]] = {}
        for op in walk(function.body):
            for value in dict.fromkeys(op.operands):
                self._users.setdefault(value, []).append(op)
        self._views: dict[Value, Value] = {}
        self._makers: dict[Value, Op] = {}
        self._inside_out = False

    def region(self, region: Region, times: float) -> None:
        """Add a region that runs ``times`` times."""
        for op in region.ops:
            self.op(op, times)

    def op(self, op: Op, times: float) -> None:
        """Add one op and what is inside of it."""
        if op.name == "for":
            trips = self._number(op.attr("stop")) - self._number(op.attr("start"))
            turns = max(0, -(-trips // op.attr("step")))
            variable = op.regions[0].symbols[0]
            self.known[variable.name] = self._number(op.attr("start")) + trips // 2
            body = op.regions[0]
            self._inside_out = bool(body.args) and all(map(_is_fused, body.ops))
            self._carry(body, times * turns)
            self.region(body, times * turns)
            self._inside_out = False
            return
        if op.name == "if":
            self._branches(op, times)
            return
        cost = op.definition.cost(op)
        self._makers.update(dict.fromkeys(op.results, op))
        if op.name == "dot":
            self.seconds += times * (self._turned(op.operands[1]) + self._copied(op))
        if op.name == "view":
            self._views[op.result] = self._views.get(op.operands[0], op.operands[0])
        if op.name in ("load", "store"):
            self._move(op, times * cost.bytes)
            self.seconds += times * self._runs(op) * self.machine.run_seconds
        elif op.definition.elementwise and not self._inside_out:
            self._keep(op.result, times)
        self.ops += 0 if _is_fused(op) else times
        self.seconds += times * (self._lanes_combined(op) + cost.flops / self._rate(op))

    def _keep(self, value: Value, times: float) -> None:
        """A computed tile of several uses is written once, and read for each."""
        uses = len(self._users.get(value, ()))
        if uses > 1:
            self.kept += _bytes(value)
            self.kept_moved += times * (1 + uses) * _bytes(value)

    def _move(self, op: Op, bytes: float) -> None:
        """What a load brings is read where it lies as often as it is used."""
        tensor = self._views.get(op.operands[0], op.operands[0])
        if op.name == "store":
            narrow = op.operands[1].tile.shape[-1:] < (_LONG,)
            self.moved.setdefault(tensor, []).extend([bytes] * (2 if narrow else 1))
            return
        uses = max(1, len(self._users.get(op.result, ())))
        places = [*op.attr("index"), *op.attr("offset")]
        moving = (self._own & set(symbols(as_expr(place))) for place in places if place is not None)
        if not op.attr("list_axes") and not any(moving):
            self.shared += uses * bytes * self._rows(op.result)
            return
        self.loaded += 0.0 if tensor in self.moved else bytes
        self.moved.setdefault(tensor, []).extend([bytes] * uses)

    def _rows(self, value: Value) -> float:
        """The rows that a tile is broadcast to, each of which reads it."""
        most = 1.0
        for op in self._users.get(value, ()):
            if op.name in ("cast", "reshape", "broadcast"):
                more = op.result.tile.elements / max(1, value.tile.elements)
                same = op.result.tile.shape[-1:] == value.tile.shape[-1:]
                most = max(most, (more if same else 1.0) * self._rows(op.result))
        return most

    def _branches(self, op: Op, times: float) -> None:
        """The branch that is taken; half of each where that isn't known."""
        then, otherwise = op.regions
        try:
            taken = evaluate(op.attr("condition"), self.known)
        except DureError:
            self.region(then, times / 2)
            self.region(otherwise, times / 2)
            return
        self.region(then if taken else otherwise, times)

    def _turned(self, right: Value) -> float:
        """Seconds that a dot's right operand takes to be copied where it lies turned: it is read,
        exchanged in halves, quarters, and so on to single lanes, and written to the level that
        holds the copy.
        """
        maker = self._makers.get(right)
        if maker is None or maker.name != "transpose":
            return 0.0
        count, machine = right.tile.elements, self.machine
        passes = 2 + math.log2(machine.lanes)
        copied = 4 * count
        return count * passes / machine.vector_flops + 2 * copied / machine.bandwidth(copied)

    def _by_tiles(self, op: Op) -> bool:
        left, right = (operand.tile.dtype for operand in op.operands[:2])
        return self.machine.tile_flops > 0 and left == right == bfloat16

    def _copied(self, op: Op) -> float:
        """Seconds that copies of a dot's operands take, and its accumulators' way to tiles and
        back.
        """
        if not self._by_tiles(op) or op.result.tile.shape[-2] <= self.machine.few_rows:
            return 0.0
        left, right, sums = (operand.tile.elements for operand in op.operands)
        left *= self._groups(op.result.tile.shape[-1])
        return 2 * (left + right + sums) / self.machine.vector_flops

    def _groups(self, columns: int) -> int:
        """How often rows are copied: once for the columns that half of the second cache holds as
        deep as two blocks of rows are that fill two thirds of the nearest one.
        """
        (near, _), (second, _) = self.machine.levels[0], self.machine.levels[: _NEAR + 1][-1]
        deep = near * 2 / 3 / (2 * self.machine.tile_rows)
        return math.ceil(columns * deep / (second / 2))

    def _runs(self, op: Op) -> int:
        """Runs of addresses that begin unforeseen: those of a tile with more rows than are followed
        at once, unless it has the tensor's whole rows.
        """
        shape = (op.result if op.results else op.operands[1]).tile.shape
        rows = math.prod(shape[:-1])
        if shape[-1] >= self._number(op.operands[0].tensor.shape[-1]):
            return 0
        if self._inside_out:
            # Rows are walked one after another, in strips of a few registers.
            return rows * (math.ceil(shape[-1] / (_STRIP * self.machine.lanes)) - 1)
        return rows if rows > self.machine.streams else 0

    def _carry(self, region: Region, turns: float) -> None:
        """What a loop carries is read and written in every turn, but for what stays in registers:
        sums of products, and what is carried element by element.  Sums of a loop of loops are read
        by no first turn and written by no last one.
        """
        makers = {r: op for op in region.ops for r in op.results}
        for value in region.yields:
            maker = makers.get(value)
            if not self._inside_out and (maker is None or maker.name != "dot"):
                moved = turns - 1 if _is_sum(region, value) else turns
                self.ops += moved
                self.carried += moved * 2 * _bytes(value)

    def _lanes_combined(self, op: Op) -> float:
        """Seconds of the ends of reductions along the rows of a tile, where the lanes of a strip of
        registers are combined by halves, each half waiting for the one before: as if one by one.
        """
        if not _is_along(op):
            return 0.0
        machine, (*rows, last) = self.machine, op.operands[0].tile.shape
        combined = math.prod(rows) * min(last, _STRIP * machine.lanes)
        return combined * machine.lanes / machine.vector_flops

    def _rate(self, op: Op) -> float:
        machine = self.machine
        made = op.operands[:1] if _is_along(op) else op.results
        shape = [r.type.shape for r in made if isinstance(r.type, TileType)]
        last = shape[0][-1] if shape and shape[0] else 1
        filled = last / (math.ceil(last / machine.lanes) * machine.lanes)
        if op.name != "dot":
            return machine.vector_flops * max(filled, 1 / machine.lanes)
        rows = shape[0][-2]
        if self._by_tiles(op):
            used = rows / (math.ceil(rows / machine.tile_rows) * machine.tile_rows)
            return machine.tile_flops * filled * used
        return machine.dot_flops * filled * min(1.0, rows / machine.dot_rows)

    def _number(self, expr: Expr) -> int:
        """An expression with what is known, else the middle of its bounds."""
        try:
            return evaluate(expr, self.known)
        except DureError:
            low, high = bounds(substitute(expr, {}))
            if low is None or high is None:
                return 1 if low is None else max(low, 1)
            return (low + high) // 2


def _is_sum(region: Region, value: Value) -> bool:
    """Whether a dot adds to what a region yields, maybe in a loop of loops."""
    maker = next((op for op in region.ops if value in op.results), None)
    if maker is None or maker.name != "for":
        return maker is not None and maker.name == "dot"
    inner = maker.regions[0]
    return _is_sum(inner, inner.yields[maker.results.index(value)])


def live_bytes(region: Region) -> int:
    """The most bytes of tiles alive at once, as if every op's result were stored."""
    last: dict[Value, int] = {}
    for place, op in enumerate(region.ops):
        for value in op.operands:
            last[value] = place
    for value in region.yields:
        last[value] = len(region.ops)
    alive = sum(_bytes(a) for a in region.args)
    most = alive
    for place, op in enumerate(region.ops):
        inner = max((live_bytes(r) for r in op.regions), default=0)
        alive += sum(_bytes(r) for r in op.results)
        most = max(most, alive + inner)
        ended = {v for v in op.operands if last.get(v) == place}
        ended |= {r for r in op.results if r not in last}
        alive -= sum(_bytes(v) for v in ended)
    return most


def _bytes(value: Value) -> int:
    return value.type.bytes if isinstance(value.type, TileType) else 0


def ranked(
    specialize: Callable[[Mapping[str, int]], Function],
    open_names: Sequence[str],
    sizes: Mapping[str, int],
    machine: TileMachine,
) -> list[tuple[float, dict[str, int]]]:
    """Tile sizes that compile, with their estimated seconds, best first.

    ``specialize`` compiles the kernel with values for ``open_names``; a KernelError means that they
    don't fit.  One size after another is varied, first in steps of four and by the tensors' extents
    that are no powers of two, then by two and a half; a dot's that became the largest are doubled
    on while that repays.
    Raises the last error if none fits.
    """
    extents = {size for size in sizes.values() if 1 < size <= _LARGEST and size & (size - 1)}
    covers: set[int] = set()
    tried: dict[tuple[int, ...], float] = {}
    error: DureError | None = None

    def function_of(values: tuple[int, ...]) -> Function:
        return specialize(dict(zip(open_names, values, strict=True)))

    def cost(values: tuple[int, ...]) -> float:
        nonlocal error
        if values not in tried:
            try:
                function = function_of(values)
                covers.update(_covering(function, sizes, machine))
                tried[values] = estimate(function, sizes, machine).seconds
            except DureError as found:
                error = found
                tried[values] = math.inf
        return tried[values]

    best = tuple(_START for _ in open_names)
    cost(best)
    # Where a tile covers an axis, the others' first choice was for another kernel.
    for coarse in (True, True, False) if covers else (True, False):
        for place in range(len(best)):
            now = best[place]
            near = (
                (*_COARSE, *extents, *covers)
                if coarse
                else (max(1, now // 2), min(_LARGEST, now * 2))
            )
            options = [(*best[:place], s, *best[place + 1 :]) for s in sorted({now, *near})]
            # Among equals the larger tile: fewer instances, and fewer starts of ops.
            best = min(reversed(options), key=cost)
    # The larger a dot, the less of it is brought and copied: what is as large as has been tried
    # grows as long as that repays.
    grown = None
    while best != grown and math.isfinite(cost(best)) and _multiplies(function_of(best)):
        grown = best
        for place, now in enumerate(best):
            if 2 * _COARSE[-1] <= now <= _LARGEST // 2:
                best = min(best, (*best[:place], 2 * now, *best[place + 1 :]), key=cost)
    # What one size alone decided about the work of all workers may suit another one better.
    if math.isfinite(cost(best)) and _multiplies(function_of(best)):
        best = min([best, *_traded(best)], key=cost)
    ordered = sorted(tried.items(), key=lambda entry: entry[1])
    found = [(c, dict(zip(open_names, v, strict=True))) for v, c in ordered]
    return _possible(found, open_names, error)


def _traded(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Half of one size and twice another one."""
    for less, more in permutations(range(len(sizes)), 2):
        if sizes[less] > 1 and sizes[more] <= _LARGEST // 2:
            traded = list(sizes)
            traded[less], traded[more] = sizes[less] // 2, sizes[more] * 2
            yield tuple(traded)


def _multiplies(function: Function) -> bool:
    return any(op.name == "dot" for op in walk(function.body))


def _covering(function: Function, sizes: Mapping[str, int], machine: TileMachine) -> Iterator[int]:
    """Tiles, in whole strips of registers, that cover the extents which a kernel's branches ask
    for, where the second cache holds some rows of them.
    """
    strip, fitting = _STRIP * machine.lanes, machine.levels[: _NEAR + 1][-1:]
    most = sum(capacity // _ROW_PART for capacity, _ in fitting)
    for op in walk(function.body):
        asked = symbols(op.attr("condition")) if op.name == "if" else ()
        for extent in (sizes[s.name] for s in asked if s.name in sizes):
            tile = math.ceil(extent / strip) * strip
            if 0 < 4 * tile <= most:
                yield tile


def _possible(
    found: list[tuple[float, dict[str, int]]],
    open_names: Sequence[str],
    error: DureError | None,
) -> list[tuple[float, dict[str, int]]]:
    kept = [entry for entry in found if math.isfinite(entry[0])]
    if kept:
        return kept
    if error is not None:
        names = ", ".join(open_names)
        raise KernelError(
            f"{error.what} (while choosing a tile size for {names})",
            where=error.where,
            rule=error.rule,
            fix=f"{error.fix}; or give {names} if that isn't a tile size",
        )
    raise KernelError(
        f"no value fits the open consts {', '.join(open_names)}",
        rule="an open const is a power of two with which the kernel compiles",
        fix="pass the consts that aren't tile sizes",
    )


def choose(
    specialize: Callable[[Mapping[str, int]], Function],
    open_names: Sequence[str],
    sizes: Mapping[str, int],
    machine: TileMachine,
) -> dict[str, int]:
    """The tile sizes with the least estimated time."""
    return ranked(specialize, open_names, sizes, machine)[0][1]
