"""Elementwise ops on registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dure.ir.core import Op
from dure.ir.dtypes import DType
from dure.targets.cpu.values import Buffer, DecodedTile, Emitter, Loaded, Mapped, Reindexed, Tile
from dure.targets.cpu.vecmath import unary_functions
from dure.targets.cpu.writer import Reg, lanes_of, vector_type

_FLOAT = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_INTEGER = {"add": "add", "sub": "sub", "mul": "mul", "and": "and", "or": "or", "xor": "xor"}
_FLOAT_COMPARE = {"lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge", "eq": "oeq", "ne": "une"}
_SIGNED_COMPARE = {"lt": "slt", "le": "sle", "gt": "sgt", "ge": "sge", "eq": "eq", "ne": "ne"}
_UNSIGNED_COMPARE = {"lt": "ult", "le": "ule", "gt": "ugt", "ge": "uge", "eq": "eq", "ne": "ne"}

#: Ops that take ten instructions or more.
COSTLY = frozenset(
    [
        "exp",
        "exp2",
        "log",
        "log2",
        "tanh",
        "sigmoid",
        "erf",
        "sin",
        "cos",
        "pow",
        "floordiv",
        "mod",
        "rsqrt",
        "sqrt",
    ]
)

Function = Callable[[Sequence[Reg]], Reg]


class OpFunction:
    """The function of one elementwise op, with the op's name for those who weigh its cost."""

    def __init__(self, name: str, function: Function) -> None:
        self.name = name
        self.function = function

    def __call__(self, operands: Sequence[Reg]) -> Reg:
        return self.function(operands)


def is_costly(tile: Mapped) -> bool:
    """Whether the tile's own op is worth storing rather than doing twice."""
    return isinstance(tile.function, OpFunction) and tile.function.name in COSTLY


def cost_of(tile: Tile) -> int:
    """Roughly how many instructions a vector of this tile takes."""
    match tile:
        case Mapped():
            own = 1 if not is_costly(tile) else 10
            return own + sum(cost_of(o) for o in tile.operands)
        case Reindexed():
            return cost_of(tile.source)
        case DecodedTile():
            return 20
        case Buffer() | Loaded():
            return 1
        case _:
            return 0


def function_of(e: Emitter, op: Op) -> OpFunction:
    """What an elementwise op does to vectors of registers."""
    if op.name == "cast":
        source, target = op.operands[0].tile.dtype, op.attr("dtype")
        assert isinstance(source, DType)
        return OpFunction("cast", lambda regs: e.convert.convert(regs[0], source, target))
    if op.name == "where":
        return OpFunction("where", lambda regs: e.w.select(regs[0], regs[1], regs[2]))
    dtype = op.operands[0].tile.dtype
    assert isinstance(dtype, DType)
    return OpFunction(op.name, lambda regs: apply(e, op.name, dtype, regs))


def apply(e: Emitter, name: str, dtype: DType, operands: Sequence[Reg]) -> Reg:
    """``name`` of operands of one type, rounded to it."""
    if name in _SIGNED_COMPARE:
        return _compare(e, name, dtype, operands)
    if dtype.is_float:
        return e.convert.rounded(_float(e, name, operands), dtype)
    return _integer(e, name, dtype, operands)


def _compare(e: Emitter, name: str, dtype: DType, operands: Sequence[Reg]) -> Reg:
    a, b = operands
    if dtype.is_float:
        return e.w.compare(f"fcmp {_FLOAT_COMPARE[name]}", a, b)
    table = _SIGNED_COMPARE if dtype.kind == "int" else _UNSIGNED_COMPARE
    return e.w.compare(f"icmp {table[name]}", a, b)


def _float(e: Emitter, name: str, operands: Sequence[Reg]) -> Reg:
    w, first = e.w, operands[0]
    if name in _FLOAT:
        return w.binary(_FLOAT[name], first, operands[1])
    if name in ("min", "max"):
        return extremum(e, name, first, operands[1])
    if name == "neg":
        return w.emit(first.type, f"fneg {first}")
    double = "double" in first.type
    if name == "pow":
        return e.math.pow(first, operands[1])
    if double and name not in ("sqrt", "rsqrt", "floor", "ceil", "round", "abs"):
        # float64 is a reference type: its functions are computed in float32.
        lanes = lanes_of(first.type)
        single = w.cast("fptrunc", first, vector_type("float", lanes))
        return w.cast("fpext", unary_functions(e.math)[name](single), first.type)
    return unary_functions(e.math)[name](first)


def extremum(e: Emitter, name: str, a: Reg, b: Reg) -> Reg:
    """The smaller or larger of two floats; NaN if either is, as in NumPy."""
    w = e.w
    better = w.compare("fcmp ogt" if name == "max" else "fcmp olt", a, b)
    # A sum is NaN, too.  Of ``a`` itself, where it has just been loaded, a store would be masked,
    # which some processors are slow at.
    nan = w.binary("fadd", a, b)
    return w.select(w.compare("fcmp uno", a, a), nan, w.select(better, a, b))


def _integer(e: Emitter, name: str, dtype: DType, operands: Sequence[Reg]) -> Reg:
    w, first = e.w, operands[0]
    lanes = lanes_of(first.type)
    element = f"i{1 if dtype.kind == 'bool' else dtype.bits}"
    signed = dtype.kind == "int"
    if name in _INTEGER:
        return w.binary(_INTEGER[name], first, operands[1])
    if name in ("min", "max"):
        predicate = ("s" if signed else "u") + ("gt" if name == "max" else "lt")
        return w.select(w.compare(f"icmp {predicate}", first, operands[1]), first, operands[1])
    zero = w.constant(element, 0, lanes)
    match name:
        case "neg":
            return w.binary("sub", zero, first)
        case "abs":
            return w.select(w.compare("icmp slt", first, zero), w.binary("sub", zero, first), first)
        case "not":
            return w.binary("xor", first, w.constant(element, 1 if element == "i1" else -1, lanes))
        case "shl" | "shr":
            # A shift by the width or more gives zero, as in NumPy.
            inside = w.compare("icmp ult", operands[1], w.constant(element, dtype.bits, lanes))
            count = w.select(inside, operands[1], zero)
            moved = w.binary("shl" if name == "shl" else "lshr", first, count)
            return w.select(inside, moved, zero)
        case "floordiv" | "mod":
            return _divide(e, name, signed, element, first, operands[1])
        case _:
            raise AssertionError(f"no integer {name}")


def _divide(e: Emitter, name: str, signed: bool, element: str, a: Reg, b: Reg) -> Reg:
    """Floor division or its remainder; by zero both are zero, as in NumPy."""
    w, lanes = e.w, lanes_of(a.type)
    zero, one = w.constant(element, 0, lanes), w.constant(element, 1, lanes)
    by_zero = w.compare("icmp eq", b, zero)
    if not signed:
        safe = w.select(by_zero, one, b)
        return w.select(by_zero, zero, w.binary("udiv" if name == "floordiv" else "urem", a, safe))
    minus = w.constant(element, -1, lanes)
    # The smallest integer divided by -1 overflows; a - (-1) x quotient is done as a negation.
    flip = w.compare("icmp eq", b, minus)
    safe = w.select(w.binary("or", by_zero, flip), one, b)
    quotient, rest = w.binary("sdiv", a, safe), w.binary("srem", a, safe)
    mixed = w.compare("icmp slt", w.binary("xor", rest, safe), zero)
    adjust = w.binary("and", mixed, w.compare("icmp ne", rest, zero))
    if name == "floordiv":
        lower = w.select(adjust, w.binary("sub", quotient, one), quotient)
        value = w.select(flip, w.binary("sub", zero, a), lower)
    else:
        value = w.select(flip, zero, w.select(adjust, w.binary("add", rest, safe), rest))
    return w.select(by_zero, zero, value)
