"""A planned tensor program as one native function that every worker runs.

    void step(ptr context, i64 worker, i64 workers, ptr pool_state)

``context`` is an array of 64-bit words that the host fills: the arena, the workers' scratch, the
program's sizes, the addresses of its parameters, and for each repeat a table of addresses.  A
launch stores its arguments' addresses and its kernel's sizes and calls the kernel's function; its
variants are chosen by their guards right there.  A repeat is a native loop that reads its tables.
The length of the code depends on the number of different layer bodies, not on the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dure.errors import IRError
from dure.ir.core import Function, Op, Region, Value
from dure.ir.expr import Expr, Symbol, as_expr
from dure.ir.sizes import tensor_bytes
from dure.ir.tensor.program import donated, launch_arguments, repeat_tables
from dure.ir.types import TensorType
from dure.runtime import pool_code
from dure.runtime.host import HostFeatures
from dure.targets.cpu.codegen import KernelCode
from dure.targets.cpu.context import (
    ARENA_WORD,
    BARRIER,
    CHECK,
    COPY,
    SCRATCH_WORD,
    STEP,
    Arena,
    ContextLayout,
    Fixed,
    Param,
)
from dure.targets.cpu.stamps import Stamps
from dure.targets.cpu.writer import Reg, Writer, integer, lanes_of

_CONTEXT = Reg("ptr", "%context")
_WORKER = Reg("i64", "%worker")
_WORKERS = Reg("i64", "%workers")


@dataclass(frozen=True)
class Row:
    """An address read from a repeat's table in each turn: the register that holds it."""

    register: Reg


Place: TypeAlias = "Param | Arena | Row"


@dataclass(frozen=True)
class StepCode:
    """The step's module text, its context's layout, and where its outputs lie.

    ``scratch_bytes`` is what each worker needs.
    """

    llvm_ir: str
    layout: ContextLayout
    outputs: tuple[Fixed, ...]
    scratch_bytes: int


def emit_step(
    function: Function,
    kernels: Mapping[Function, KernelCode],
    host: HostFeatures,
    *,
    recorded: bool = False,
) -> StepCode:
    """LLVM IR of a planned program; its kernels are declared, not defined.

    ``recorded`` stamps the cycle at which each worker ends each launch, copy and barrier.
    """
    emitter = _StepEmitter(function, kernels, recorded)
    emitter.body(function.body)
    outputs: list[Fixed] = []
    for value in function.body.yields:
        place = emitter.places[value]
        assert not isinstance(place, Row)
        outputs.append(place)
    definition = emitter.definition(host)
    check = _emit_check(function, emitter.layout, host)
    declarations = {
        code.symbol: f"declare void @{code.symbol}(ptr, ptr, i64, i64, ptr)"
        for code in kernels.values()
    }
    intrinsics = {**emitter.writer.declarations, **check.declarations}
    text = "\n".join(
        [
            pool_code.barrier_ir(),
            *declarations.values(),
            *intrinsics.values(),
            definition,
            check.definition,
        ]
    )
    return StepCode(text, emitter.layout, tuple(outputs), emitter.scratch)


class _StepEmitter:
    """Writes the step function of one program."""

    def __init__(
        self, function: Function, kernels: Mapping[Function, KernelCode], recorded: bool
    ) -> None:
        self.writer = Writer()
        self.kernels = kernels
        self.layout = ContextLayout()
        self.places: dict[Value, Place] = {}
        self.scratch = _line(max((k.arena_bytes for k in kernels.values()), default=0))
        self._arguments = self._sizes = 0
        for symbol in function.symbols:
            self.layout.symbols[symbol.name] = self.layout.take(1)
        for position, param in enumerate(function.params):
            self.layout.params.append(self.layout.take(1))
            self.places[param.value] = Param(position)
        self._entry(function.symbols)
        self._stamps = Stamps(self.writer, self.layout, function.body) if recorded else None

    def _entry(self, symbols: Sequence[Symbol]) -> None:
        w = self.writer
        for symbol in symbols:
            w.symbols[symbol] = self._word("i64", self.layout.symbols[symbol.name])
        self._arena = self._word("ptr", ARENA_WORD)
        base = self._word("ptr", SCRATCH_WORD)
        self._scratch = w.offset(base, w.mul(_WORKER, integer(self.scratch)))

    def definition(self, host: HostFeatures) -> str:
        """The finished function."""
        self.writer.do("ret void")
        head = f"define void @{STEP}(ptr %context, i64 %worker, i64 %workers, ptr %pool)"
        text = self.writer.text
        return (
            f"{head} nounwind {host.function_attributes} {{\nentry:\n"
            f"  %arguments = alloca [{max(1, self._arguments)} x ptr], align 16\n"
            f"  %sizes = alloca [{max(1, self._sizes)} x i64], align 16\n{text}\n}}\n"
        )

    def _word(self, kind: str, word: int) -> Reg:
        w = self.writer
        return w.load(kind, w.offset(_CONTEXT, integer(8 * word)), 8)

    def address(self, value: Value) -> Reg:
        """The register that holds a value's address."""
        place = self.places[value]
        match place:
            case Param():
                return self._word("ptr", self.layout.params[place.position])
            case Arena():
                return self.writer.offset(self._arena, integer(place.offset))
            case Row():
                return place.register

    def body(self, region: Region) -> None:
        """The ops of a region, in order."""
        emitters: dict[str, Callable[[Op], None]] = {
            "launch": self._launch,
            "barrier": self._barrier,
            "reshape_tensor": self._reshape,
            "copy": self._copy,
            "repeat": self._repeat,
        }
        for op in region.ops:
            if op.name not in emitters:
                raise IRError(
                    f"op '{op.name}' in a planned program",
                    where="" if op.span is None else op.span.render(),
                    rule=f"a planned program holds {', '.join(emitters)}",
                    fix="lower it first",
                )
            emitters[op.name](op)

    def _reshape(self, op: Op) -> None:
        self.places[op.results[0]] = self.places[op.operands[0]]

    def _barrier(self, op: Op) -> None:
        self.writer.do("call void @dure.barrier(ptr %pool, i64 %worker, i64 %workers)")
        if self._stamps is not None:
            self._stamps.ended(BARRIER, because=str(op.attr("because")))

    def _own_places(self, op: Op) -> None:
        """Where a launch's or a copy's results lie."""
        given = donated(op)
        offsets = iter(op.attr("offsets"))
        for place, result in enumerate(op.results):
            if place in given:
                self.places[result] = self.places[op.operands[given[place]]]
            else:
                offset = next(offsets, None)
                assert offset is not None, f"{op.name} of {op.attrs.get('source')} is not planned"
                self.places[result] = Arena(offset)

    def _launch(self, op: Op) -> None:
        self._own_places(op)
        w = self.writer
        arguments = launch_arguments(op)
        self._arguments = max(self._arguments, len(arguments))
        for place, (operand, result) in enumerate(arguments):
            value = operand if operand is not None else result
            assert value is not None
            slot = w.offset(Reg("ptr", "%arguments"), integer(8 * place))
            w.store(self.address(value), slot, 8)
        self._choose(list(zip(op.attr("variants"), op.attr("sizes"), strict=True)))
        if self._stamps is not None:
            self._stamps.ended(str(op.attr("source")), int(op.attr("number")))

    def _choose(self, variants: Sequence[tuple[tuple[Expr, Function], Sequence[Expr]]]) -> None:
        """Calls the first variant whose guard holds."""
        if not variants:
            return
        (guard, kernel), sizes = variants[0]
        if as_expr(guard) is as_expr(1):
            self._call(kernel, sizes)
            return
        self.writer.when(
            self.writer.condition(guard),
            lambda: self._call(kernel, sizes),
            lambda: self._choose(variants[1:]),
        )

    def _call(self, kernel: Function, sizes: Sequence[Expr]) -> None:
        w = self.writer
        self._sizes = max(self._sizes, len(sizes))
        for place, size in enumerate(sizes):
            w.store(w.index(size), w.offset(Reg("ptr", "%sizes"), integer(8 * place)), 8)
        arguments = f"ptr %arguments, ptr %sizes, {_WORKER}, {_WORKERS}, {self._scratch}"
        w.do(f"call void @{self.kernels[kernel].symbol}({arguments})")

    def _copy(self, op: Op) -> None:
        source = self.address(op.operands[0])
        self._own_places(op)
        target = self.address(op.results[0])
        kind = op.results[0].tensor
        w = self.writer
        total = w.index(_bytes(kind))
        begin = w.binary("udiv", w.mul(total, _WORKER), _WORKERS)
        end = w.binary("udiv", w.mul(total, w.add(_WORKER, integer(1))), _WORKERS)
        w.call(
            "void",
            "llvm.memmove.p0.p0.i64",
            w.offset(target, begin),
            w.offset(source, begin),
            w.sub(end, begin),
            Reg("i1", "false"),
        )
        if self._stamps is not None:
            self._stamps.ended(COPY)

    def _repeat(self, op: Op) -> None:
        w = self.writer
        body = op.regions[0]
        count, carried = int(op.attr("count")), int(op.attr("carried"))
        offsets: Sequence[int] = op.attr("offsets")
        for argument, offset in zip(body.args[:carried], offsets, strict=True):
            self.places[argument] = Arena(offset)
        tables = [self._table(row) for row in repeat_tables(op)]

        def turn(number: Reg, _: list[Reg]) -> list[Reg]:
            for argument, first in zip(body.args[carried:], tables, strict=True):
                slot = w.add(w.mul(number, integer(8)), integer(8 * first))
                self.places[argument] = Row(w.load("ptr", w.offset(_CONTEXT, slot), 8))
            if self._stamps is None:
                self.body(body)
            else:
                with self._stamps.turn(number, count, body):
                    self.body(body)
            return []

        w.loop(integer(0), integer(count), 1, turn)
        for result, offset in zip(op.results[:carried], offsets, strict=True):
            self.places[result] = Arena(offset)
        for result, operand in donated(op).items():
            self.places[op.results[result]] = self.places[op.operands[operand]]

    def _table(self, row: Sequence[Value]) -> int:
        """The first word of a table that holds the addresses of ``row``."""
        places: list[Fixed] = []
        for value in row:
            place = self.places[value]
            if isinstance(place, Row):
                raise IRError(
                    "a repeat inside a repeat over the outer one's tables",
                    rule="a table holds parameters and buffers",
                    fix="flatten the repeats",
                )
            places.append(place)
        first = self.layout.take(len(places))
        self.layout.tables.append((first, tuple(places)))
        return first


def _bytes(kind: TensorType) -> Expr:
    """The bytes of a tensor, symbolic where its shape is."""
    if kind.layout is not None:
        return as_expr(tensor_bytes(kind))
    total = as_expr(int(kind.dtype.bits))
    for extent in kind.shape:
        total = total * extent
    return (total + 7) // 8


def _line(value: int) -> int:
    return -(-value // 128) * 128


@dataclass(frozen=True)
class _Check:
    definition: str
    declarations: Mapping[str, str]


def _emit_check(function: Function, layout: ContextLayout, host: HostFeatures) -> _Check:
    """``i64 check(ptr context)``: 1 + the position of the first index argument with an element
    outside its declared range, or 0.
    """
    w = Writer()
    for symbol in function.symbols:
        slot = w.offset(_CONTEXT, integer(8 * layout.symbols[symbol.name]))
        w.symbols[symbol] = w.load("i64", slot, 8)
    for position, param in enumerate(function.params):
        kind = param.value.tensor
        if kind.index is None:
            continue
        total = as_expr(1)
        for extent in kind.shape:
            total = total * extent
        base = w.load("ptr", w.offset(_CONTEXT, integer(8 * layout.params[position])), 8)
        low, high = (w.index(end) for end in kind.index)
        outside = _outside(w, base, w.index(total), low, high, host.vector_bits // 32)
        done = w.fresh("ok")
        bad = w.fresh("outside")
        w.do(f"br {outside}, label %{bad}, label %{done}")
        w.start_block(bad)
        w.do(f"ret i64 {position + 1}")
        w.start_block(done)
    w.do("ret i64 0")
    text = w.text
    head = f"define i64 @{CHECK}(ptr %context) nounwind {host.function_attributes}"
    return _Check(f"{head} {{\nentry:\n{text}\n}}\n", w.declarations)


def _outside(w: Writer, base: Reg, total: Reg, low: Reg, high: Reg, lanes: int) -> Reg:
    """Whether an int32 among ``total`` of them lies outside [low, high].

    The distances from ``low`` count unsigned, so that one comparison of the largest finds both
    sides.
    """
    lowest, highest = w.maximum(low, integer(-(2**31))), w.minimum(high, integer(2**31 - 1))
    least, most = (w.cast("trunc", end, "i32") for end in (lowest, highest))
    whole = w.sub(total, w.mod(total, lanes))
    vectors = _furthest(w, base, (integer(0), whole), w.splat(least, lanes))
    rest = _furthest(w, base, (whole, total), least)
    furthest = w.call("i32", f"llvm.vector.reduce.umax.v{lanes}i32", vectors)
    furthest = w.call("i32", "llvm.umax.i32", furthest, rest)
    beyond = w.compare("icmp ugt", furthest, w.binary("sub", most, least))
    none = w.compare("icmp slt", highest, lowest)
    return w.binary("and", w.binary("or", beyond, none), w.compare("icmp sgt", total, integer(0)))


def _furthest(w: Writer, base: Reg, span: tuple[Reg, Reg], least: Reg) -> Reg:
    """The largest distance from ``least`` of the elements in a span, a vector of them at once."""
    lanes = lanes_of(least.type)
    name = "llvm.umax.i32" if lanes == 1 else f"llvm.umax.v{lanes}i32"

    def step(number: Reg, found: list[Reg]) -> list[Reg]:
        slot = w.offset(base, w.mul(number, integer(4)))
        distance = w.binary("sub", w.load(least.type, slot), least)
        return [w.call(least.type, name, found[0], distance)]

    nothing = w.splat(Reg("i32", "0"), lanes)
    return w.loop(*span, lanes, step, [nothing])[0]
