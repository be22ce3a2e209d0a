"""What a compute instruction costs, from the chip's laws.

An instruction takes the largest issue cost of its engines, then as long as its slowest engine.  An
engine's work is the sum of the laws of its tile ops, in cycles of its clock, but that ops which
elements pass in one go (:class:`Pass`) take as long as the slowest; an op runs on the first of the
instruction's engines that has a law for its class of work
(:func:`dure.ir.machine.compute.works`).

The variables of a law are :data:`dure.machine.law.VARIABLES`, from the op's tile types.  A
block-quantized tile counts its elements; ``bits`` is of the widest element that an op reads or
writes; ``rate`` is the highest of the engine's rates for the types that it reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import Any, TypeAlias

from dure.errors import IRError
from dure.ir.core import Op, Region, Value
from dure.ir.dtypes import BlockFormat
from dure.ir.machine.compute import Operation, works
from dure.ir.types import TileType
from dure.machine.chip import Chip, Engine
from dure.machine.quantity import Quantity

Makers: TypeAlias = Mapping[Value, Op]

#: Reductions and scans: the law is about what they read.
_READERS = frozenset({"reduce", "sum", "scan"})


@lru_cache(maxsize=1 << 14)
def _picoseconds_of(amount: float, hertz: float) -> int:
    return picoseconds(Fraction(amount) / Fraction(hertz))


def picoseconds(seconds: Fraction) -> int:
    """A duration as the simulator counts it: rounded to a thousandth of a picosecond, which takes
    away the noise of binary fractions, then up to a whole one.
    """
    return ceil(round(seconds * 10**12, 3))


def duration(chip: Chip, quantity: Quantity, clock: Quantity | None = None) -> int:
    """A duration of a machine file in picoseconds."""
    hertz = (clock or chip.clock).base if quantity.kind == "cycles" else 1
    return _picoseconds_of(quantity.base, hertz)


@dataclass(frozen=True, slots=True)
class ComputeCost:
    """Picoseconds of an instruction, and of each of its engines without the issue.

    ``memories`` are those in which it contends with transfers of its core, where there are any.
    """

    ps: int
    engines: Mapping[str, int]
    memories: tuple[str, ...] = ()


class Pass:
    """What elements go through at once on an engine, op by op.

    An op joins the pass if a later stage takes it and it reads what the op before made there; an op
    but a reduction only if no other one needs that.  A reduction leaves what it reads to the next
    stages.  ``shared`` are the values that are needed besides (:func:`shared_values`).
    """

    def __init__(self, engine: Engine, makers: Makers, shared: Set[Value]) -> None:
        self.stages = engine.passes
        self.engine = engine
        self.makers = makers
        self.shared = shared
        self.stage, self.longest = 0, 0.0
        self.last: Value | None = None

    def add(self, operation: Operation, op: Op, cycles: float) -> float:
        """The cycles that one more op takes, of which it takes so many alone."""
        if not self.stages:
            return cycles
        law, reduces = self.engine.law(operation), operation in ("reduce", "sum")
        joins = any(_source(o, self.makers) is self.last for o in op.operands)
        joins = joins and (reduces or self.last not in self.shared)
        stage = self._stage(law, self.stage) if joins else None
        if stage is None:
            joins, self.longest = False, 0.0
            stage = self._stage(law, 0)
        before, self.longest = self.longest, max(self.longest, cycles)
        self.stage = len(self.stages) if stage is None else stage + 1
        if not (joins and reduces):
            self.last = op.results[0]
        return self.longest - before

    def _stage(self, law: str, start: int) -> int | None:
        """The first stage from ``start`` on that takes work of this law."""
        places = range(start, len(self.stages))
        return next((n for n in places if law in self.stages[n]), None)


def shared_values(ops: Iterable[Op], needed: Iterable[Value], makers: Makers) -> set[Value]:
    """What several of these ops read, reductions apart, or one reads and ``needed`` names."""
    found = {_source(value, makers) for value in needed}
    read: set[Value] = set()
    for op in ops:
        if op.name in ("reduce", "reshape"):
            continue
        for source in {_source(o, makers) for o in op.operands}:
            (found if source in read else read).add(source)
    return found


def _source(value: Value, makers: Makers) -> Value:
    """The value that one is a reshape of."""
    maker = makers.get(value)
    while maker is not None and maker.name == "reshape":
        value = maker.operands[0]
        maker = makers.get(value)
    return value


class Costs:
    """Costs of one chip's instructions; a cost is computed once for each shape of op."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self._instructions: dict[Op, ComputeCost] = {}
        #: By engines and the cycles of each op.
        self._sums: dict[tuple[object, ...], ComputeCost] = {}
        self._cycles: dict[tuple[object, ...], float] = {}
        self._numbers: dict[str, dict[str, float]] = {
            name: {n: q.base for n, q in engine.numbers.items()}
            for name, engine in chip.engines.items()
        }

    def compute(self, op: Op) -> ComputeCost:
        """The cost of a ``compute``.

        Raises :class:`IRError` for an engine that the chip lacks or that belongs to another queue,
        and for a tile op that none of the engines has a law for.
        """
        found = self._instructions.get(op)
        if found is None:
            found = self._instructions[op] = self._instruction(op)
        return found

    def _instruction(self, op: Op) -> ComputeCost:
        engines: tuple[str, ...] = tuple(op.attr("engines"))
        for name in engines:
            engine = self.chip.engines.get(name)
            if engine is None or engine.queue != op.attr("queue"):
                owner = f"is in queue '{engine.queue}'" if engine else "isn't an engine"
                raise IRError(
                    f"a compute in queue '{op.attr('queue')}' on '{name}', which {owner}",
                    where=op.span.render() if op.span is not None else "",
                    rule=f"an instruction of {self.chip.name} occupies engines of its own queue",
                    fix="assign it to one of " + ", ".join(self.chip.engines),
                )
        parts = tuple(self._parts(op.regions[0], engines))
        found = self._sums.get((engines, parts))
        if found is None:
            found = self._sums[engines, parts] = self._sum(engines, parts)
        return found

    def _sum(self, engines: Sequence[str], parts: Sequence[tuple[str, float]]) -> ComputeCost:
        """The cost of an instruction of these cycles on its engines."""
        cycles = dict.fromkeys(engines, Fraction())
        for name, count in parts:
            cycles[name] += Fraction(count)
        times: dict[str, int] = {}
        issue = 0
        for name, count in cycles.items():
            engine = self.chip.engines[name]
            clock = engine.clock or self.chip.clock
            times[name] = picoseconds(count / Fraction(clock.base))
            issue = max(issue, duration(self.chip, engine.issue, engine.clock))
        return ComputeCost(issue + max(times.values()), times)

    def _parts(self, region: Region, engines: Sequence[str]) -> Iterator[tuple[str, float]]:
        """The engine of each op of an instruction, and its cycles there."""
        makers = {r: op for op in region.ops for r in op.results}
        shared = shared_values(region.ops, region.yields, makers)
        passes = {name: Pass(self.chip.engines[name], makers, shared) for name in engines}
        for operation, op in works(region):
            name = next((e for e in engines if self.chip.engines[e].law(operation)), None)
            if name is None:
                raise IRError(
                    f"'{op.name}' on {', '.join(engines)}, which have no law for {operation}",
                    where=op.span.render() if op.span is not None else "",
                    rule="each op of an instruction runs on an engine that has its operation",
                    fix=f"add an engine of {self.chip.name} that has {operation}",
                )
            yield name, passes[name].add(operation, op, self.cycles(name, operation, op))

    def cycles(self, engine: str, operation: Operation, op: Op) -> float:
        """Cycles of one tile op on an engine."""
        variables = _variables(operation, op)
        types = tuple(dict.fromkeys(str(v.tile.dtype) for v in op.operands or op.results))
        key = (engine, operation, types, *variables.values())
        found = self._cycles.get(key)
        if found is None:
            found = self._cycles[key] = self._law(engine, operation, op, variables)
        return found

    def _law(
        self, name: str, operation: Operation, op: Op, variables: Mapping[str, float]
    ) -> float:
        engine = self.chip.engines[name]
        law = engine.laws[engine.law(operation)]
        values = {**self._numbers[name], **variables}
        if "rate" in law.names and "rate" not in values:
            values["rate"] = self._rate(name, op)
        return law(values)

    def _rate(self, name: str, op: Op) -> float:
        engine = self.chip.engines[name]
        read = op.operands[:2] if op.name == "dot" else op.operands or op.results
        types = [n for v in read for n in _type_names(v.tile)]
        rates = [engine.rates[t].base for t in types if t in engine.rates]
        if not rates:
            raise IRError(
                f"'{op.name}' of {', '.join(dict.fromkeys(types))} on {name}, which has no rate "
                "for it",
                where=op.span.render() if op.span is not None else "",
                rule=f"{name} has rates for {', '.join(engine.rates) or 'nothing'}",
                fix="convert the operands to one of these types",
            )
        return max(rates)


def _type_names(tile: TileType) -> tuple[str, ...]:
    """The names that a rate may stand under: of the type, or of a block format's codes."""
    if isinstance(tile.dtype, BlockFormat):
        return (tile.dtype.name, *(p.dtype.name for p in tile.dtype.planes if p.role == "code"))
    return (tile.dtype.name,)


def _variables(operation: Operation, op: Op) -> dict[str, float]:
    """What a law may say about a tile op."""
    reads = operation in _READERS and op.operands
    shaped = op.operands[0].tile if reads else op.results[0].tile
    tiles = [v.tile for v in (*op.operands, *op.results) if isinstance(v.type, TileType)]
    columns = shaped.shape[-1] if shaped.shape else 1
    found: dict[str, float] = {
        "elements": shaped.elements,
        "rows": shaped.elements // columns,
        "columns": columns,
        "axis": _axis(op, shaped),
        "bits": max(t.dtype.bits for t in tiles),
    }
    if operation == "dot":
        a, b = op.operands[0].tile, op.operands[1].tile
        batch = a.elements // (a.shape[-2] * a.shape[-1])
        found |= {"m": a.shape[-2], "n": b.shape[-1], "k": a.shape[-1], "batch": batch}
    return found


def _axis(op: Op, shaped: TileType) -> int:
    axis: Any = op.attrs.get("axis")
    if not isinstance(axis, int) or not shaped.shape:
        return shaped.shape[-1] if shaped.shape else 1
    return shaped.shape[axis]
