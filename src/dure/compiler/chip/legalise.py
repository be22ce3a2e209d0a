"""What a chip can't do as it stands becomes what it can: types, scans, block-quantized operands.

Every change of a number's type is an explicit op in the result, and is listed as a
:class:`Conversion`; ``strict`` refuses them instead.  Nothing is narrowed: an operand is converted
along the chip's own ``conversions`` until its matrix engine takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dure.compiler.chip.usage import is_free
from dure.errors import KernelError
from dure.ir import dtypes
from dure.ir.core import Function, Op, Param, Region, Value, declared_ops, infer
from dure.ir.dtypes import BlockFormat, DType, element_type
from dure.ir.machine.compute import operation_of
from dure.ir.rewrite import Pattern, Rewritten, Scope, clone_region, rewrite
from dure.ir.types import TensorType, TileType
from dure.machine.chip import Chip, Engine


@dataclass(frozen=True, slots=True)
class Conversion:
    """A type that the chip doesn't take, what it becomes, and for which op or parameter."""

    what: str
    found: str
    becomes: str
    where: str


@dataclass(frozen=True)
class Legalised:
    """The program that the chip can run, and what was converted for it."""

    function: Function
    conversions: tuple[Conversion, ...]


def _arithmetic_ops() -> list[str]:
    """Elementwise ops and reductions of the tile level that compute in their operands' type."""
    return [
        name
        for name, definition in declared_ops().items()
        if definition.level == "tile"
        and (definition.elementwise or name in ("reduce", "cumsum"))
        and name not in ("full", "iota", "cast")
    ]


def dot_engine(chip: Chip, dtype: str) -> str | None:
    """The engine whose matrix unit takes operands of this type."""
    for name, engine in chip.engines.items():
        if engine.dot is not None and dtype in engine.dot.types:
            return name
    return None


def legalise(function: Function, chip: Chip, *, strict: bool = False) -> Legalised:
    """The same computation in types and ops that the chip has.

    Raises :class:`KernelError` with the author's line where there is no way, and with ``strict``
    for every conversion.
    """
    work = _Legaliser(chip)
    function = work.parameters(function)
    patterns: list[Pattern] = [("dot", work.dot)]
    patterns += [(name, work.arithmetic) for name in _arithmetic_ops()]
    if not any("scan" in e.laws for e in chip.engines.values()):
        patterns.append(("cumsum", _scan_as_product))
    function = rewrite(function, patterns)
    if strict and work.found:
        first = work.found[0]
        raise KernelError(
            f"{first.what} has {first.found}, which {chip.name} lacks",
            where=first.where,
            rule="with strict, nothing is converted for the chip",
            fix=f"convert it yourself with .to(dl.{first.becomes}), or leave strict out",
        )
    return Legalised(function, tuple(dict.fromkeys(work.found)))


class _Legaliser:
    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.found: list[Conversion] = []

    # --- parameters ------------------------------------------------------------------------------

    def parameters(self, function: Function) -> Function:
        """Parameters of types that the chip can't even store are converted by the host."""
        changed: dict[Value, Value] = {}
        params: list[Param] = []
        for param in function.params:
            kind = param.value.tensor
            storage = self._storage(kind, param.value.name)
            if storage is kind.dtype:
                params.append(param)
                continue
            value = Value(replace(kind, dtype=storage), param.value.name)
            changed[param.value] = value
            params.append(Param(value, param.access))
        if not changed:
            return function
        body = _retyped(function.body, changed)
        return replace(function, params=tuple(params), body=body)

    def _storage(self, kind: TensorType, name: str) -> Any:
        if isinstance(kind.dtype, BlockFormat) or kind.dtype.name in self.chip.storage:
            return kind.dtype
        target = self._convertible(kind.dtype, self.chip.storage)
        if target is None:
            raise KernelError(
                f"argument '{name}' is {kind.dtype}, which {self.chip.name} can't store",
                rule=f"{self.chip.name} stores {', '.join(self.chip.storage)}",
                fix="pass an array of one of these types",
            )
        self.found.append(Conversion(f"argument '{name}'", str(kind.dtype), str(target), ""))
        return target

    def _convertible(self, dtype: DType, allowed: tuple[str, ...]) -> DType | None:
        seen = {dtype.name}
        name = dtype.name
        while name not in allowed:
            name = self.chip.conversions.get(name, "")
            if not name or name in seen:
                return None
            seen.add(name)
        found = element_type(name)
        assert isinstance(found, DType)
        return found

    # --- arithmetic on floats that no vector engine has -------------------------------------------

    def arithmetic(self, op: Op, scope: Scope) -> Rewritten | None:
        """Compute in float32 what the chip's engines can't in the type at hand, and round once:
        the same numbers, since that is how such types are defined to be computed.
        """
        operation = operation_of(op)
        lacking = {
            v.tile.dtype
            for v in op.operands
            if isinstance(v.tile.dtype, DType)
            and v.tile.dtype.is_float
            and v.tile.dtype is not dtypes.float32
            and not self._computes(operation, v.tile.dtype)
        }
        if not lacking or not self._computes(operation, dtypes.float32):
            return None
        ops: list[Op] = []
        operands = [
            _cast(v, dtypes.float32, op, ops) if v.tile.dtype in lacking else v for v in op.operands
        ]
        where = op.span.render() if op.span is not None else ""
        for dtype in lacking:
            found = Conversion(f"an operand of {op.name}", str(dtype), "float32", where)
            self.found.append(found)
        made = infer(op.name, operands, op.attrs, [clone_region(r) for r in op.regions])
        made = replace(made, span=op.span)
        ops.append(made)
        result = made.result
        kind = op.result.tile.dtype
        if result.tile.dtype is not kind:
            assert isinstance(kind, DType)
            result = _cast(result, kind, op, ops)
        return Rewritten(tuple(ops), (result,))

    def _computes(self, operation: str, dtype: DType) -> bool:
        return any(
            engine.law(operation) and (dtype.name in engine.types or dtype.name in engine.rates)
            for engine in self.chip.engines.values()
        )

    # --- dots ------------------------------------------------------------------------------------

    def dot(self, op: Op, scope: Scope) -> Rewritten | None:
        """Give a dot operands that a matrix engine takes."""
        types = [self._dot_type(op, value.tile) for value in op.operands[:2]]
        target = _wider(types[0], types[1])
        if dot_engine(self.chip, target.name) is None:
            target = self._engine_type(op, target)
        turned = [self._turned(v, place, target, scope) for place, v in enumerate(op.operands[:2])]
        if all(v.tile.dtype is target for v in op.operands[:2]) and not any(turned):
            return None
        ops: list[Op] = []
        operands = [self._converted(op, value, target, ops) for value in op.operands[:2]]
        for place, needed in enumerate(turned):
            if needed:
                k_first = self._k_first(place, target)
                operands[place] = _turn(operands[place], k_first, op, ops, scope)
        accumulator = op.operands[2]
        wanted = dtypes.int32 if target.is_integer else dtypes.float32
        if accumulator.tile.dtype is not wanted:
            accumulator = _cast(accumulator, wanted, op, ops)
        product = infer("dot", [*operands, accumulator], span=op.span)
        ops.append(product)
        result = product.result
        if result.tile.dtype is not op.result.tile.dtype:
            kind = op.result.tile.dtype
            assert isinstance(kind, DType)
            result = _cast(result, kind, op, ops)
        return Rewritten(tuple(ops), (result,))

    def _turned(self, value: Value, place: int, target: DType, scope: Scope) -> bool:
        """Whether an operand lies the wrong way round for the matrix engine."""
        name = dot_engine(self.chip, target.name)
        assert name is not None
        rules = self.chip.engines[name].dot
        assert rules is not None
        # A conversion writes the operand anew, the right way round.
        transposed = value.tile.dtype is target and _lies_transposed(value, scope)
        if self._k_first(place, target):
            return not transposed and "a" not in rules.transposed
        return transposed and ("a", "b")[place] not in rules.transposed

    def _k_first(self, place: int, target: DType) -> bool:
        """Whether the engine wants this operand with K along its rows."""
        name = dot_engine(self.chip, target.name)
        rules = self.chip.engines[name].dot if name is not None else None
        return place == 0 and rules is not None and rules.stationary_k_first

    def _dot_type(self, op: Op, kind: TileType) -> DType:
        """The type in which an operand enters a dot."""
        dtype = kind.dtype
        if isinstance(dtype, BlockFormat):
            dtype = dtypes.float32
        if dot_engine(self.chip, dtype.name) is not None:
            return dtype
        return self._engine_type(op, dtype)

    def _engine_type(self, op: Op, dtype: DType) -> DType:
        allowed = tuple(
            t for e in self.chip.engines.values() if e.dot is not None for t in e.dot.types
        )
        found = self._convertible(dtype, allowed)
        if found is None:
            raise KernelError(
                f"a dot of {dtype} operands, which no engine of {self.chip.name} multiplies",
                where=op.span.render() if op.span is not None else "",
                rule=f"its matrix engine takes {', '.join(allowed)}",
                fix=f"convert the operands with .to(dl.{allowed[0]})",
            )
        return found

    def _converted(self, op: Op, value: Value, target: DType, ops: list[Op]) -> Value:
        kind = value.tile
        if kind.dtype is target:
            return value
        where = op.span.render() if op.span is not None else ""
        self.found.append(Conversion("an operand of dot", str(kind.dtype), str(target), where))
        if isinstance(kind.dtype, BlockFormat):
            made = infer("dequantize", [value], {"dtype": dtypes.float32}, span=op.span)
            ops.append(made)
            value = made.result
        return value if value.tile.dtype is target else _cast(value, target, op, ops)


def _wider(one: DType, other: DType) -> DType:
    """The operand type that loses nothing of either."""
    if one is other:
        return one
    if one.is_float != other.is_float:
        return one if one.is_float else other
    if one.bits == other.bits:
        return dtypes.float32 if one.is_float else one
    return one if one.bits > other.bits else other


def _lies_transposed(value: Value, scope: Scope) -> bool:
    """Whether the last two axes of a value are those of a stored tile, swapped."""
    swapped = False
    maker = scope.maker(value)
    while maker is not None and is_free(maker):
        if maker.name == "transpose":
            order = list(maker.attr("order"))
            rank = len(order)
            swapped ^= order == [*range(rank - 2), rank - 1, rank - 2]
        maker = scope.maker(maker.operands[0])
    return swapped


def _turn(value: Value, k_first: bool, op: Op, ops: list[Op], scope: Scope) -> Value:
    """The value through a stored copy that lies the other way round than it does now.

    ``k_first``: the copy is the transposed tile, and the value a view of it.  Else the value is a
    view of a transposed tile, and the copy is the value itself.
    """
    rank = value.tile.rank
    order = (*range(rank - 2), rank - 1, rank - 2)

    def transposed(source: Value, stored: bool) -> Value:
        made = infer("transpose", [source], {"order": order}, span=op.span)
        ops.append(replace(made, attrs={**made.attrs, "stored": True}) if stored else made)
        return made.result

    if k_first:
        return transposed(transposed(value, True), False)
    maker = scope.maker(value)
    if maker is not None and maker.name == "transpose" and tuple(maker.attr("order")) == order:
        # Each transpose in an instruction is work, also one that undoes another.
        return transposed(maker.operands[0], True)
    return transposed(transposed(value, False), True)


def _cast(value: Value, dtype: DType, op: Op, ops: list[Op]) -> Value:
    made = infer("cast", [value], {"dtype": dtype}, span=op.span)
    ops.append(made)
    return made.result


def _scan_as_product(op: Op, scope: Scope) -> Rewritten | None:
    """A running sum is a product with a triangle of ones, exact in float32 like any sum."""
    source = op.operands[0].tile
    axis: int = op.attr("axis") % source.rank
    if source.rank != 2 or source.dtype not in (dtypes.float32, dtypes.int32):
        raise KernelError(
            f"cumsum of {source}, which the chip has no instruction for",
            where=op.span.render() if op.span is not None else "",
            rule="without a scan, a running sum is a product with a triangle: rank 2, float32",
            fix="reshape the tile to two axes and convert it with .to(dl.float32)",
        )
    n = source.shape[axis]
    ops: list[Op] = []

    def add(name: str, operands: list[Value], **attrs: Any) -> Value:
        made = infer(name, operands, attrs, span=op.span)
        ops.append(made)
        return made.result

    counter = add("iota", [], size=n, dtype=dtypes.int32)
    down = add("broadcast", [add("reshape", [counter], shape=(n, 1))], shape=(n, n))
    right = add("broadcast", [add("reshape", [counter], shape=(1, n))], shape=(n, n))
    # Along the last axis the triangle is on the right, upper; along the first on the left, lower.
    order = [down, right] if axis == 1 else [right, down]
    triangle = add("cast", [add("le", order)], dtype=dtypes.float32)
    value = op.operands[0]
    if source.dtype is not dtypes.float32:
        value = add("cast", [value], dtype=dtypes.float32)
    zero = add("full", [], shape=source.shape, value=0.0, dtype=dtypes.float32)
    pair = [value, triangle] if axis == 1 else [triangle, value]
    result = add("dot", [*pair, zero])
    if source.dtype is not dtypes.float32:
        result = add("cast", [result], dtype=source.dtype)
    return Rewritten(tuple(ops), (result,))


def _retyped(body: Region, changed: Mapping[Value, Value]) -> Region:
    """The body on parameters of other types: loads convert back, stores convert before."""
    return Region(body.args, tuple(_retyped_ops(body, dict(changed))), body.yields, body.symbols)


def _retyped_ops(body: Region, values: dict[Value, Value]) -> Iterator[Op]:
    for op in body.ops:
        if op.regions:
            regions = tuple(
                Region(r.args, tuple(_retyped_ops(r, values)), _mapped(r.yields, values), r.symbols)
                for r in op.regions
            )
            yield replace(op, operands=_mapped(op.operands, values), regions=regions)
        elif op.name == "view" and op.operands[0] in values:
            made = infer("view", [values[op.operands[0]]], op.attrs, span=op.span)
            values[op.result] = made.result
            yield made
        elif op.name == "load" and op.operands[0] in values:
            operands = [values[op.operands[0]], *_mapped(op.operands[1:], values)]
            made = infer("load", operands, op.attrs, span=op.span)
            yield made
            back = infer("cast", [made.result], {"dtype": op.result.tile.dtype}, span=op.span)
            values[op.result] = back.result
            yield back
        elif op.name == "store" and op.operands[0] in values:
            target = values[op.operands[0]]
            kind = {"dtype": target.tensor.dtype}
            made = infer("cast", [values.get(op.operands[1], op.operands[1])], kind, span=op.span)
            yield made
            rest = _mapped(op.operands[2:], values)
            yield infer("store", [target, made.result, *rest], op.attrs, span=op.span)
        elif any(o in values for o in op.operands):
            yield replace(op, operands=_mapped(op.operands, values))
        else:
            yield op


def _mapped(found: tuple[Value, ...], values: Mapping[Value, Value]) -> tuple[Value, ...]:
    return tuple(values.get(v, v) for v in found)


def engines_with(chip: Chip, operation: str) -> Iterator[tuple[str, Engine]]:
    """The engines that have a law for an operation."""
    for name, engine in chip.engines.items():
        if engine.law(operation):
            yield name, engine
