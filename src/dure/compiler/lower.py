"""From tensor ops to launches of kernels, by the table of :mod:`dure.ir.lowering`.

Every intermediate value gets the layout that the target wants for its type; the library's lowering
then specialises kernels for exactly these types.  ``reshape_tensor`` stays (it is the same bytes).
"""

from __future__ import annotations

from collections.abc import Sequence

from dure.compiler.rebuild import Rebuilder, rebuild
from dure.errors import IRError
from dure.ir.core import Function, Op, Value, infer, walk
from dure.ir.expr import as_expr
from dure.ir.lowering import (
    Argument,
    CompilerTarget,
    Launch,
    LoweringContext,
    Updated,
    argument_types,
    lowering_of,
    normalized_sizes,
)
from dure.ir.tensor.program import without_range

_KEPT = ("repeat", "reshape_tensor", "copy", "barrier", "launch")


def lower(function: Function, target: CompilerTarget) -> Function:
    """``function`` with every tensor op replaced by launches.

    A launch knows the number of its op among those of :func:`numbered`.  Raises :class:`IRError`
    for an op without a lowering, and for launches that don't fit the op.
    """
    numbers = {op: number for number, op in enumerate(numbered(function))}

    def visit(builder: Rebuilder, op: Op) -> bool:
        if op.name in _KEPT:
            return False
        laid_out = _laid_out(op, builder.operands(op), target)
        context = LoweringContext(target)
        launches = lowering_of(op.name)(laid_out, context)
        _append(builder, op, laid_out, launches, numbers[op])
        return True

    return rebuild(function, visit)


def numbered(function: Function) -> list[Op]:
    """The ops of a program that are lowered to launches, in the order of its text."""
    return [op for op in walk(function.body) if op.name not in _KEPT]


def _laid_out(op: Op, operands: Sequence[Value], target: CompilerTarget) -> Op:
    """``op`` over its new operands, its results laid out as the target wants them."""
    made = infer(op.name, operands, op.attrs, span=op.span)
    results: list[Value] = []
    for old, new in zip(op.results, made.results, strict=True):
        kind = new.tensor
        if kind.layout is None:
            kind = kind.with_layout(target.buffer_layout(kind))
        results.append(Value(kind, old.name))
    return Op(made.name, made.operands, tuple(results), made.attrs, (), (), op.span)


def _append(
    builder: Rebuilder, op: Op, laid_out: Op, launches: Sequence[Launch], place: int
) -> None:
    written: dict[Value, Value] = {}
    cost = op.definition.cost(laid_out)
    for number, launch in enumerate(launches):
        types = argument_types(launch)
        works = not number or launch.instead
        attrs = {
            "variants": tuple((as_expr(v.guard), v.kernel) for v in launch.variants),
            "sizes": tuple(normalized_sizes(v, types) for v in launch.variants),
            "source": op.name,
            "number": place,
            "flops": cost.flops if works else 0,
            "bytes": cost.bytes if works else 0,
        }
        operands, results = _split(op, launch, written)
        made = infer("launch", operands, attrs, span=op.span)
        named = tuple(
            # A kernel's result has no range; what its op declares holds for later launches.
            Value(r.type if without_range(r.tensor) == without_range(m.tensor) else m.type, r.name)
            for m, r in zip(made.results, results, strict=True)
        )
        for result, value in zip(results, named, strict=True):
            if value.type != result.type:
                raise _unfit(op, f"gives {value.type} for {result.type}")
            written[result] = value
        builder.append(Op("launch", made.operands, named, made.attrs, (), (), op.span))
    missing = [r for r in laid_out.results if r not in written]
    if missing:
        raise _unfit(op, f"writes nothing to {', '.join(str(r.type) for r in missing)}")
    builder.replace(op, [written[r] for r in laid_out.results])


def _split(op: Op, launch: Launch, written: dict[Value, Value]) -> tuple[list[Value], list[Value]]:
    """A launch's operands and the values that it writes, in the kernel's order."""
    if not launch.variants:
        raise _unfit(op, "has no variant")
    operands: list[Value] = []
    results: list[Value] = []
    params = launch.variants[0].kernel.params
    if len(params) != len(launch.arguments):
        raise _unfit(op, f"passes {len(launch.arguments)} arguments to {len(params)} parameters")
    for param, argument in zip(params, launch.arguments, strict=True):
        _place(op, param.access, argument, written, operands, results)
    return operands, results


def _place(
    op: Op,
    access: str,
    argument: Argument,
    written: dict[Value, Value],
    operands: list[Value],
    results: list[Value],
) -> None:
    if isinstance(argument, Updated):
        if access != "inout":
            raise _unfit(op, f"updates an argument that the kernel declares {access}")
        operands.append(written.get(argument.operand, argument.operand))
        results.append(argument.result)
    elif access == "in":
        operands.append(written.get(argument, argument))
    elif access == "out":
        results.append(argument)
    else:
        raise _unfit(op, "passes an inout argument that is not Updated")


def _unfit(op: Op, what: str) -> IRError:
    return IRError(
        f"the lowering of {op.name} {what}",
        where="" if op.span is None else op.span.render(),
        rule="a lowering's launches take the op's operands and write each of its results once",
        fix="mend the lowering in the library",
    )
