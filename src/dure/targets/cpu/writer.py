"""A writer of textual LLVM IR: registers, blocks, structured loops and branches.

Integers of type i64 that are known while writing stay literals, so that addresses fold as they are
built.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dure.ir.core import Span
from dure.ir.expr import (
    Compare,
    Const,
    Expr,
    FloorDiv,
    IntLike,
    Logic,
    MinMax,
    Sum,
    Symbol,
    as_expr,
)
from dure.targets.cpu.locations import Locations
from dure.targets.cpu.scopes import Lines, Scopes, is_pure


@dataclass(frozen=True, slots=True)
class Reg:
    """An SSA register or a literal, with its LLVM type."""

    type: str
    name: str

    def __str__(self) -> str:
        return f"{self.type} {self.name}"

    @property
    def literal(self) -> int | None:
        """The integer that this register is known to be, or None."""
        return int(self.name) if self.type == "i64" and self.name.lstrip("-").isdigit() else None


def integer(value: int) -> Reg:
    """An i64 literal."""
    return Reg("i64", str(value))


def vector_type(element: str, lanes: int) -> str:
    """``<lanes x element>``, or the element itself for one lane."""
    return element if lanes == 1 else f"<{lanes} x {element}>"


def lanes_of(type: str) -> int:
    """How many lanes a type has."""
    return int(type[1:].split(" ", 1)[0]) if type.startswith("<") else 1


def element_of(type: str) -> str:
    """The element type of a vector, or the type itself."""
    return type[1:-1].split(" x ", 1)[1] if type.startswith("<") else type


class Writer:
    """The body of one LLVM function under construction."""

    def __init__(self) -> None:
        self._lines: Lines = []
        self._scopes = Scopes()
        self.declarations: dict[str, str] = {}
        self.block = "entry"
        self._count = 0
        #: The loads that are being remembered, if any are.
        self._keeping: list[str] | None = None
        self.symbols: dict[Symbol, Reg] = {}
        #: What is written comes from here; ``locations`` keeps it where somebody asks for it.
        self.span: Span | None = None
        self.locations: Locations | None = None

    # -- plain emission ---------------------------------------------------------------------------

    def fresh(self, hint: str = "v") -> str:
        """A name not used before."""
        self._count += 1
        return f"{hint}{self._count}"

    def emit(self, type: str, text: str) -> Reg:
        """``%new = text``, or what computed the same before."""
        pure = is_pure(text)
        known = self._scopes.find(text)
        if known is not None:
            return Reg(type, known)
        name, lines = "%" + self.fresh(), None
        if pure:
            lines = self._scopes.place(text, name)
        else:
            self._scopes.define(name)
            if self._keeping is not None and text.startswith("load "):
                self._keeping.append(text)
                self._scopes.now.known[text] = name
        (self._lines if lines is None else lines).append(f"  {name} = {text}{self._location()}")
        return Reg(type, name)

    @contextmanager
    def kept(self, read: Callable[[], object]) -> Generator[None]:
        """Inside, what ``read`` loads is loaded no more: nothing there writes to it."""
        loads = self._keeping = []
        read()
        self._keeping = None
        yield
        for text in loads:
            del self._scopes.now.known[text]

    def do(self, text: str) -> None:
        """An instruction without a result."""
        self._lines.append(f"  {text}{self._location()}")

    def reserve(self) -> Lines:
        """Room between what was written and what comes, for what is only known later."""
        room: Lines = []
        self._lines.append(room)
        return room

    @contextmanager
    def into(self, room: Lines) -> Generator[None]:
        """Inside, what has no result is written into reserved room."""
        outside, self._lines = self._lines, room
        yield
        self._lines = outside

    def _location(self) -> str:
        return "" if self.locations is None else self.locations.of(self.span)

    @contextmanager
    def at(self, span: Span | None) -> Generator[None]:
        """What is written inside comes from ``span``, if there is one."""
        outside = self.span
        self.span = outside if span is None else span
        yield
        self.span = outside

    def start_block(self, label: str) -> None:
        """Begin the block of this label; the last block must have been ended."""
        self._lines.append(f"{label}:")
        self.block = label

    @property
    def text(self) -> str:
        """All that was written."""
        return "\n".join(_flat(self._lines))

    def branch(self, label: str) -> None:
        """End the block by going to ``label``."""
        self.do(f"br label %{label}")

    def call(self, result: str, function: str, *arguments: Reg) -> Reg:
        """Call a declared function or intrinsic; ``result`` may be ``void``."""
        types = ", ".join(a.type for a in arguments)
        self.declarations[function] = f"declare {result} @{function}({types})"
        text = f"call {result} @{function}({', '.join(map(str, arguments))})"
        if result == "void":
            self.do(text)
            return Reg("void", "")
        return self.emit(result, text)

    def binary(self, op: str, left: Reg, right: Reg) -> Reg:
        """``op`` of two registers of one type."""
        return self.emit(left.type, f"{op} {left.type} {left.name}, {right.name}")

    def cast(self, op: str, value: Reg, type: str) -> Reg:
        """A conversion instruction, or the value itself where the types agree."""
        return value if value.type == type else self.emit(type, f"{op} {value} to {type}")

    def compare(self, predicate: str, left: Reg, right: Reg) -> Reg:
        """``icmp`` or ``fcmp`` (``predicate`` names which) of two registers."""
        type = vector_type("i1", lanes_of(left.type))
        return self.emit(type, f"{predicate} {left.type} {left.name}, {right.name}")

    def select(self, condition: Reg, yes: Reg, no: Reg) -> Reg:
        """``yes`` where the condition holds, else ``no``."""
        return self.emit(yes.type, f"select {condition}, {yes}, {no}")

    def both(self, left: Reg, right: Reg) -> Reg:
        """Whether two conditions hold."""
        return right if left.name == "true" else self.binary("and", left, right)

    # -- i64 arithmetic that folds ----------------------------------------------------------------

    def add(self, left: Reg, right: Reg) -> Reg:
        """Sum of two i64."""
        a, b = left.literal, right.literal
        if a is not None and b is not None:
            return integer(a + b)
        if a == 0:
            return right
        if b == 0:
            return left
        return self.binary("add nsw", left, right)

    def sub(self, left: Reg, right: Reg) -> Reg:
        """Difference of two i64."""
        a, b = left.literal, right.literal
        if a is not None and b is not None:
            return integer(a - b)
        return left if b == 0 else self.binary("sub nsw", left, right)

    def mul(self, left: Reg, right: Reg) -> Reg:
        """Product of two i64."""
        a, b = left.literal, right.literal
        if a is not None and b is not None:
            return integer(a * b)
        if a == 0 or b == 0:
            return integer(0)
        if a == 1:
            return right
        if b == 1:
            return left
        return self.binary("mul nsw", left, right)

    def floordiv(self, left: Reg, right: Reg) -> Reg:
        """Floor division of i64 by a positive i64."""
        a, b = left.literal, right.literal
        if a is not None and b is not None:
            return integer(a // b)
        if b == 1:
            return left
        if b is not None and b & (b - 1) == 0:
            return self.binary("ashr", left, integer(b.bit_length() - 1))
        quotient = self.binary("sdiv", left, right)
        remainder = self.sub(left, self.mul(quotient, right))
        negative = self.compare("icmp slt", remainder, integer(0))
        return self.add(quotient, self.emit("i64", f"sext {negative} to i64"))

    def mod(self, left: Reg, divisor: int) -> Reg:
        """Remainder (never negative) by a positive constant."""
        known = left.literal
        if known is not None:
            return integer(known % divisor)
        if divisor == 1:
            return integer(0)
        if divisor & (divisor - 1) == 0:
            return self.binary("and", left, integer(divisor - 1))
        return self.sub(left, self.mul(self.floordiv(left, integer(divisor)), integer(divisor)))

    def minimum(self, left: Reg, right: Reg) -> Reg:
        """The smaller of two i64."""
        a, b = left.literal, right.literal
        if a is not None and b is not None:
            return integer(min(a, b))
        return self.call("i64", "llvm.smin.i64", left, right)

    def maximum(self, left: Reg, right: Reg) -> Reg:
        """The larger of two i64."""
        a, b = left.literal, right.literal
        if a is not None and b is not None:
            return integer(max(a, b))
        return self.call("i64", "llvm.smax.i64", left, right)

    def index(self, value: IntLike) -> Reg:
        """An index expression as i64 (conditions as 0 or 1)."""
        expr = as_expr(value)
        match expr:
            case Const():
                return integer(expr.value)
            case Symbol():
                return self.symbols[expr]
            case Sum():
                total = integer(expr.constant)
                for product, coefficient in expr.terms:
                    part = integer(coefficient)
                    for factor in product:
                        part = self.mul(part, self.index(factor))
                    total = self.add(total, part)
                return total
            case FloorDiv():
                return self.floordiv(self.index(expr.numerator), self.index(expr.divisor))
            case MinMax():
                pick = self.minimum if expr.function == "min" else self.maximum
                found = self.index(expr.arguments[0])
                for argument in expr.arguments[1:]:
                    found = pick(found, self.index(argument))
                return found
            case Compare() | Logic():
                return self.emit("i64", f"zext {self.condition(expr)} to i64")
            case _:
                raise AssertionError(f"unknown index expression {expr!r}")

    def condition(self, expr: Expr) -> Reg:
        """A condition as i1."""
        match expr:
            case Compare():
                predicate = {"<": "slt", "<=": "sle", "==": "eq", "!=": "ne"}[expr.relation]
                left, right = self.index(expr.left), self.index(expr.right)
                return self.compare(f"icmp {predicate}", left, right)
            case Logic():
                found = self.condition(expr.arguments[0])
                for argument in expr.arguments[1:]:
                    found = self.binary(expr.function, found, self.condition(argument))
                return found
            case _:
                return self.compare("icmp ne", self.index(expr), integer(0))

    # -- structured control -----------------------------------------------------------------------

    def loop(
        self,
        start: Reg,
        stop: Reg,
        step: int,
        body: Callable[[Reg, list[Reg]], Sequence[Reg]],
        carried: Sequence[Reg] = (),
    ) -> list[Reg]:
        """``for i in range(start, stop, step)``; ``body(i, carried)`` gives what the next turn
        carries.
        """
        first, last = start.literal, stop.literal
        if first is not None and last is not None and first < last <= first + step:
            return list(body(start, list(carried)))
        if first is not None and last is not None and last <= first:
            return list(carried)
        head, inside, done = self.fresh("head"), self.fresh("body"), self.fresh("done")
        before = self.block
        front: Lines = []
        self._lines.append(front)
        self.branch(head)
        self.start_block(head)
        variable = Reg("i64", "%" + self.fresh("i"))
        phis = [Reg(c.type, "%" + self.fresh("c")) for c in carried]
        self._scopes.enter(front)
        for phi in (variable, *phis):
            self._scopes.define(phi.name)
        patch = len(self._lines)
        self._lines.extend([""] * (1 + len(phis)))
        test = self.compare("icmp slt", variable, stop)
        self.do(f"br {test}, label %{inside}, label %{done}")
        self.start_block(inside)
        values = list(body(variable, list(phis)))
        following = self.binary("add nsw", variable, integer(step))
        latch = self.block
        self.branch(head)
        incoming = [(variable, start, following), *zip(phis, carried, values, strict=True)]
        for place, (phi, initial, new) in enumerate(incoming):
            sources = f"[ {initial.name}, %{before} ], [ {new.name}, %{latch} ]"
            self._lines[patch + place] = f"  {phi.name} = phi {phi.type} {sources}"
        self._scopes.leave()
        for phi in (variable, *phis):
            self._scopes.define(phi.name)
        self.start_block(done)
        return phis

    def when(self, condition: Reg, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
        """Run one of two bodies."""

        def of(write: Callable[[], None]) -> Callable[[], list[Reg]]:
            def body() -> list[Reg]:
                write()
                return []

            return body

        self.choose(condition, of(then), of(otherwise))

    def choose(
        self,
        condition: Reg,
        then: Callable[[], Sequence[Reg]],
        otherwise: Callable[[], Sequence[Reg]],
    ) -> list[Reg]:
        """Run one of two bodies, and give what it gives; one is written where that is known."""
        if condition.name in ("true", "false"):
            return list(then() if condition.name == "true" else otherwise())
        yes, no, done = self.fresh("then"), self.fresh("else"), self.fresh("join")
        self.do(f"br {condition}, label %{yes}, label %{no}")
        given: list[tuple[Sequence[Reg], str]] = []
        for label, write in ((yes, then), (no, otherwise)):
            self.start_block(label)
            self._scopes.enter()
            given.append((write(), self.block))
            self._scopes.leave()
            self.branch(done)
        self.start_block(done)
        (first, one), (second, other) = given
        return [
            self.emit(a.type, f"phi {a.type} [{a.name}, %{one}], [{b.name}, %{other}]")
            for a, b in zip(first, second, strict=True)
        ]

    # -- memory -----------------------------------------------------------------------------------

    def offset(self, base: Reg, by: Reg) -> Reg:
        """``base`` plus ``by`` bytes."""
        return base if by.literal == 0 else self.emit("ptr", f"getelementptr i8, {base}, {by}")

    def load(self, type: str, address: Reg, align: int = 1) -> Reg:
        """Load from memory."""
        return self.emit(type, f"load {type}, {address}, align {align}")

    def store(self, value: Reg, address: Reg, align: int = 1) -> None:
        """Store to memory."""
        self.do(f"store {value}, {address}, align {align}")

    def stream(self, value: Reg, address: Reg, align: int) -> None:
        """Store to memory, past the caches; others see it after a fence."""
        self.do(f"store {value}, {address}, align {align}, !nontemporal !{{i32 1}}")

    # -- vectors ----------------------------------------------------------------------------------

    def splat(self, value: Reg, lanes: int) -> Reg:
        """A scalar in every lane."""
        if lanes == 1:
            return value
        type = vector_type(value.type, lanes)
        first = self.emit(type, f"insertelement {type} poison, {value}, i64 0")
        mask = f"<{lanes} x i32> zeroinitializer"
        return self.emit(type, f"shufflevector {type} {first.name}, {type} poison, {mask}")

    def together(self, values: Sequence[Reg]) -> Reg:
        """Scalars as the lanes of a vector; one of them is itself."""
        if len(values) == 1:
            return values[0]
        type = vector_type(values[0].type, len(values))
        found = Reg(type, "poison")
        for lane, value in enumerate(values):
            found = self.emit(type, f"insertelement {found}, {value}, i64 {lane}")
        return found

    def constant(self, element: str, value: int | float | str, lanes: int) -> Reg:
        """A literal in every lane; floats are given as LLVM writes them or as Python floats."""
        text = float_literal(value) if isinstance(value, float) else str(value)
        if lanes == 1:
            return Reg(element, text)
        return Reg(vector_type(element, lanes), f"splat ({element} {text})")

    def iota(self, element: str, lanes: int) -> Reg:
        """0, 1, 2, ... in the lanes."""
        if lanes == 1:
            return Reg(element, "0")
        items = ", ".join(f"{element} {i}" for i in range(lanes))
        return Reg(vector_type(element, lanes), f"<{items}>")

    def shuffle(self, value: Reg, order: Sequence[int]) -> Reg:
        """The lanes of ``value`` in this order; one lane is a scalar."""
        if len(order) == 1:
            return self.lane(value, order[0])
        mask = ", ".join(f"i32 {i}" for i in order)
        lanes = len(order)
        type = f"<{lanes} x {element_of(value.type)}>"
        text = f"shufflevector {value}, {value.type} poison, <{lanes} x i32> <{mask}>"
        return self.emit(type, text)

    def merge(self, first: Reg, second: Reg, order: Sequence[int]) -> Reg:
        """Lanes of two vectors in this order, those of the second counted on."""
        mask = ", ".join(f"i32 {i}" for i in order)
        type = vector_type(element_of(first.type), len(order))
        return self.emit(type, f"shufflevector {first}, {second}, <{len(order)} x i32> <{mask}>")

    def lane(self, value: Reg, place: int | Reg) -> Reg:
        """One lane as a scalar."""
        if not value.type.startswith("<"):
            return value
        where = place if isinstance(place, Reg) else integer(place)
        return self.emit(element_of(value.type), f"extractelement {value}, {where}")


def _flat(lines: Lines) -> Iterator[str]:
    for line in lines:
        if isinstance(line, str):
            yield line
        else:
            yield from _flat(line)


def float_literal(value: float) -> str:
    """A float32 as LLVM writes it: the bits of the double with the same value."""
    import struct

    single = struct.unpack("<f", struct.pack("<f", value))[0] if abs(value) < 3.5e38 else value
    return "0x" + struct.pack(">d", single).hex().upper()
