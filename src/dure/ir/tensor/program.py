"""What holds a program together: repeated layers, launches of kernels, barriers.

``repeat`` runs its region ``count`` times.  Its operands are the carried values' first values, then
for each table ``count`` values of one type, one an iteration (a layer's weights, its KV pools).
The region's arguments are the carried values and one value a table; it yields the carried values,
then a new value for each table in ``updated``.  Results are the carried values after the last
iteration, then ``count`` values for each updated table.  An updated table is donated: its new
values lie where the old ones lay.

``launch`` runs the first of its kernel ``variants`` whose guard holds, if one does.  Operands are
the kernel's in and inout arguments in the order of its parameters, results its out and inout ones;
an inout argument is donated.  ``sizes`` gives, for each variant, the value of each of the kernel's
symbols over the program's symbols.

``offsets``, once planned, are the bytes in the arena at which a launch's out arguments, a copy's
result and a repeat's carried values lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dure.ir.core import Cost, Function, Op, OpDef, Region, Value, declare
from dure.ir.expr import Expr, substitute
from dure.ir.rules import broken, free, tensor
from dure.ir.types import TensorType, Type


def _repeat_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    count, carried, tables = attrs["count"], attrs["carried"], attrs["tables"]
    updated: tuple[int, ...] = attrs["updated"]
    if count < 1 or len(operands) != carried + tables * count:
        raise broken(
            f"repeat of {count} with {len(operands)} operands",
            f"a repeat has {carried} carried values and {count} values for each of {tables} tables",
        )
    body = regions[0]
    rows = [operands[carried + t * count : carried + (t + 1) * count] for t in range(tables)]
    expected = [*operands[:carried], *(row[0] for row in rows)]
    if any(value != row[0] for row in rows for value in row):
        raise broken("a table of values of several types", "a table's values have one type")
    if [a.type for a in body.args] != expected:
        raise broken(
            f"a repeat's region over {[str(a.type) for a in body.args]}",
            f"it takes {[str(e) for e in expected]}",
        )
    yields: list[Type] = [*expected[:carried], *(expected[carried + t] for t in updated)]
    if [y.type for y in body.yields] != yields:
        raise broken(
            f"a repeat's region that yields {[str(y.type) for y in body.yields]}",
            f"it yields {[str(y) for y in yields]}",
        )
    return [*operands[:carried], *(value for t in updated for value in rows[t])]


declare(
    OpDef(
        "repeat",
        "tensor",
        _repeat_typing,
        None,
        free,
        defaults={"updated": (), "offsets": ()},
        doc="repeat(*carried, *table_0, ...) {count, carried, tables, updated, offsets}",
    )
)


def labels(program: Function, attribute: str) -> tuple[str, ...]:
    """A program's ``names`` or ``roles`` of its parameters, or the names of its ``outputs``."""
    found = program.attrs[attribute]
    assert isinstance(found, tuple), f"attribute {attribute} of {program.name}"
    return tuple(str(one) for one in found)


def repeat_tables(op: Op) -> list[tuple[Value, ...]]:
    """A repeat's tables: for each, its ``count`` operands."""
    count, carried = op.attr("count"), op.attr("carried")
    rest = op.operands[carried:]
    return [rest[start : start + count] for start in range(0, len(rest), count)]


def bound(kernel: Function, sizes: Sequence[Expr], value: TensorType) -> TensorType:
    """The type of a kernel's parameter once its symbols have these values."""
    values: dict[Expr, Expr | int] = dict(zip(kernel.symbols, sizes, strict=True))
    return replace(value, shape=tuple(substitute(extent, values) for extent in value.shape))


def without_range(value: TensorType) -> TensorType:
    """The type without the declared range of its values."""
    return replace(value, index=None, unique=False)


def _launch_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    results: list[list[TensorType]] = []
    if not attrs["variants"]:
        raise broken("a launch without a kernel", "a launch has at least one variant")
    for (_, kernel), sizes in zip(attrs["variants"], attrs["sizes"], strict=True):
        if len(sizes) != len(kernel.symbols):
            raise broken(
                f"{len(sizes)} sizes for kernel '{kernel.name}'",
                f"it takes {len(kernel.symbols)}: {', '.join(map(str, kernel.symbols))}",
            )
        results.append(_check_arguments(kernel, sizes, operands))
    if any(r != results[0] for r in results):
        raise broken("variants of a launch that give different types", "variants agree")
    return results[0]


def _check_arguments(
    kernel: Function, sizes: Sequence[Expr], operands: Sequence[Type]
) -> list[TensorType]:
    given = iter(operands)
    results: list[TensorType] = []
    for param in kernel.params:
        wanted = bound(kernel, sizes, param.value.tensor)
        if param.access != "out":
            operand = next(given, None)
            if operand is None:
                raise broken(f"too few operands for kernel '{kernel.name}'", "one each argument")
            found = tensor(operand, f"argument '{param.value.name}' of '{kernel.name}'")
            if without_range(found) != without_range(wanted):
                raise broken(
                    f"argument '{param.value.name}' of kernel '{kernel.name}' is {found}",
                    f"it takes {wanted}",
                )
        if param.access != "in":
            results.append(wanted)
    if next(given, None) is not None:
        raise broken(f"too many operands for kernel '{kernel.name}'", "one each argument")
    return results


def _launch_cost(op: Op) -> Cost:
    """The work of the op that it was lowered from."""
    return Cost(op.attr("flops"), op.attr("bytes"))


declare(
    OpDef(
        "launch",
        "tensor",
        _launch_typing,
        None,
        _launch_cost,
        defaults={"offsets": (), "source": "", "number": -1, "flops": 0, "bytes": 0},
        exact=False,
        error_bound=8.0,
        doc="launch(*in and inout arguments) {variants: ((guard, kernel), ...), sizes, offsets}",
    )
)


def launch_arguments(op: Op) -> list[tuple[Value | None, Value | None]]:
    """A launch's arguments in the kernel's order: (operand or None, result or None) of each."""
    operands, results = iter(op.operands), iter(op.results)
    kernel: Function = op.attr("variants")[0][1]
    return [
        (
            next(operands) if param.access != "out" else None,
            next(results) if param.access != "in" else None,
        )
        for param in kernel.params
    ]


def _barrier_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    return []


declare(
    OpDef(
        "barrier",
        "tensor",
        _barrier_typing,
        None,
        free,
        defaults={"because": ""},
        doc="barrier() {because}: what launches before it wrote is seen by the launches after it",
    )
)


def _copy_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    (source,) = operands
    return [without_range(tensor(source, "the operand of copy"))]


def _copy(attrs: Mapping[str, Any], x: Any) -> Any:
    return x


declare(
    OpDef(
        "copy",
        "tensor",
        _copy_typing,
        _copy,
        free,
        defaults={"offsets": ()},
        doc="copy(x) {offsets}: the same bytes in a buffer of its own",
    )
)


def donated(op: Op) -> dict[int, int]:
    """Results that lie where an operand lay: result position -> operand position."""
    if op.name == "kv_write":
        return {0: 0}
    if op.name == "launch":
        pairs = launch_arguments(op)
        return {
            op.results.index(result): op.operands.index(operand)
            for operand, result in pairs
            if operand is not None and result is not None
        }
    if op.name == "repeat":
        count, carried = op.attr("count"), op.attr("carried")
        pairs = dict[int, int]()
        for place, table in enumerate(op.attr("updated")):
            for i in range(count):
                pairs[carried + place * count + i] = carried + table * count + i
        return pairs
    return {}
