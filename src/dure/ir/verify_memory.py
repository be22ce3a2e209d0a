"""The memory rules of tile kernels: access modes, index sources, bounds, independence."""

from __future__ import annotations

from collections.abc import Iterator

from dure.ir.accesses import Accesses, AxisAccess, TensorAccess, accesses_of
from dure.ir.core import Function, Op, walk
from dure.ir.disjoint import check_disjoint
from dure.ir.expr import Compare, Expr, Symbol, as_expr, compare, const, proves, symbols
from dure.ir.types import TensorType, TileType
from dure.ir.verifier import Obligation, broken


def memory_obligations(function: Function) -> Iterator[Obligation]:
    """Check a structurally sound kernel; gives what its launch must check."""
    _check_control(function)
    accesses = accesses_of(function)
    _check_access_modes(function, accesses)
    for access in accesses.all:
        _check_lists(access)
        for axis, entry in enumerate(access.axes):
            _check_axis(access, axis, entry)
    yield from _views(function)
    for access in accesses.all:
        if access.kind == "index_load":
            yield from _scalar_read(access)
    for question in check_disjoint(function, accesses):
        names = ", ".join(map(str, question.axes))
        yield Obligation(
            f"stores into '{question.param.value.name}' by instances that differ in {names} are "
            "disjoint because of the values of index arguments",
            None,
            question.store.op.span,
        )


def _check_control(function: Function) -> None:
    for op in walk(function.body):
        carried = [*op.operands, *op.results] if op.name in ("for", "if") else []
        for value in carried:
            if not isinstance(value.type, TileType):
                raise broken(
                    f"{op.name} carries {value.type}",
                    "loops and branches carry tiles",
                    op,
                    "take the view inside of the loop",
                )


def _check_access_modes(function: Function, accesses: Accesses) -> None:
    written: set[int] = set()
    for access in accesses.all:
        name, mode = access.param.value.name, access.param.access
        if access.kind == "store":
            if mode == "in":
                raise broken(
                    f"a store into '{name}', which is only read",
                    "a kernel stores into arguments that are out or inout",
                    access.op,
                    "declare the argument as an output, or store elsewhere",
                )
            if access.op.attr("combine") and mode != "inout":
                raise broken(
                    f"a store with combine= into '{name}', which holds nothing yet",
                    "combine= reads what is there, so that its argument is inout",
                    access.op,
                )
            written.add(id(access.param))
        elif mode == "out" and id(access.param) not in written:
            raise broken(
                f"'{name}' is read before it is written",
                "an output holds nothing until the kernel stores into it",
                access.op,
                "store first, keep the value in a tile, or make the argument inout",
            )
        elif mode != "in" and access.tensor.tensor.index is not None:
            raise broken(
                f"index argument '{name}' is {mode}",
                "index arguments are only read: their values are checked before the kernel runs",
                access.op,
            )
    for param in function.params:
        if param.access == "out" and id(param) not in written:
            raise broken(
                f"'{param.value.name}' is an output and is never stored",
                "a kernel stores into each of its outputs",
            )


def _check_lists(access: TensorAccess) -> None:
    for axis, entry in enumerate(access.axes):
        if access.kind == "index_load" or axis not in access.op.attr("list_axes"):
            continue
        if entry.entries is None:
            raise broken(
                f"an index list of '{access.param.value.name}' that was computed",
                "run-time indices come from program ids, loop variables and dl.Index arguments",
                access.op,
                "load the list from a dl.Index argument, unchanged but for its shape",
            )
        source = entry.entries
        absent = float(source.op.attr("fill")) < 0
        if access.kind == "store" and not absent and not _whole(source):
            raise broken(
                f"a store through a list of '{source.param.value.name}' that may be cut at an "
                f"edge and is filled with {source.op.attr('fill')}",
                "entries of a list that lie outside of its argument are absent in a store",
                source.op,
                "load the list with fill=-1",
            )


def _whole(access: TensorAccess) -> bool:
    """Whether a load provably lies inside of its tensor."""
    shape = access.param.value.tensor.shape
    return all(
        proves(const(0) <= axis.start) and proves(axis.start + axis.span <= extent)
        for axis, extent in zip(access.axes, shape, strict=True)
    )


def _check_axis(access: TensorAccess, axis: int, entry: AxisAccess) -> None:
    name, op = access.param.value.name, access.op
    if access.kind == "index_load":
        return
    for what, value in (("step", entry.step), ("stride", entry.stride)):
        if not proves(const(1) <= value):
            raise broken(
                f"a {access.kind} of '{name}' with {what} {value} along axis {axis}",
                "steps and strides are positive",
                op,
            )
    if axis in op.attr("list_axes"):
        return
    extent = access.tensor.tensor.shape[axis]
    start = entry.start - entry.view
    if proves(start + entry.span <= 0):
        where = "before its first element"
    elif proves(const(1) <= extent) and proves(extent <= start):
        where = f"beyond its {extent} elements"
    else:
        return
    if any(_takes_no_value(symbol) for symbol in symbols(start)):
        return
    raise broken(
        f"a {access.kind} of '{name}' along axis {axis} from {start}, wholly {where}",
        "a tile index lies inside of its tensor, but for the edges",
        op,
        "check the index and the tile's extent: indices count tiles",
    )


def _takes_no_value(symbol: Symbol) -> bool:
    """Whether a symbol has an empty range, as a loop variable that no turn takes has."""
    return symbol.high is not None and proves(symbol.high < symbol.low)


def _views(function: Function) -> Iterator[Obligation]:
    for op in walk(function.body):
        if op.name != "view":
            continue
        source: TensorType = op.operands[0].tensor
        axis: int = op.attr("axis")
        start, stop = as_expr(op.attr("start")), as_expr(op.attr("stop"))
        text = f"view {start}:{stop} of axis {axis} of {source.shape[axis]} elements"
        rule = "a view lies inside of its tensor: 0 <= start <= stop <= size"
        yield from _holds(op, text, rule, compare("<=", 0, start))
        yield from _holds(op, text, rule, compare("<=", start, stop))
        yield from _holds(op, text, rule, compare("<=", stop, source.shape[axis]))


def _scalar_read(access: TensorAccess) -> Iterator[Obligation]:
    shape = access.tensor.tensor.shape
    name, rule = access.param.value.name, "a scalar read of an index argument lies inside of it"
    for axis, (entry, extent) in enumerate(zip(access.axes, shape, strict=True)):
        at = entry.start - entry.view
        text = f"element {at} of axis {axis} of '{name}', which has {extent} elements"
        yield from _holds(access.op, text, rule, compare("<=", 0, at))
        yield from _holds(access.op, text, rule, compare("<", at, extent))


def _holds(op: Op, what: str, rule: str, condition: Expr) -> Iterator[Obligation]:
    """Raise if a condition never holds; an obligation where it isn't proved."""
    if proves(condition):
        return
    if _never(condition):
        raise broken(what, rule, op, "clip the index with min and max")
    yield Obligation(what, condition, op.span)


def _never(condition: Expr) -> bool:
    if isinstance(condition, Compare):
        if condition.relation == "<=":
            return proves(condition.right < condition.left)
        return proves(condition.right <= condition.left)
    return proves(compare("==", condition, 0))
