"""Arguments kept the way round that the matrix engine wants them.

Where an engine takes the left operand of a dot with K along its rows, a two-dimensional argument
that is only ever loaded as such an operand is kept transposed in the far memory, as the callers of
such chips' own libraries do: whoever writes it writes it so, or the host turns it once.  The
program then says so in its attribute ``transposed``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dure.compiler.chip.legalise import dot_engine
from dure.compiler.chip.usage import Usage, usage_of
from dure.ir.core import Function, Op, Param, Region, Value, infer, walk
from dure.ir.dtypes import BlockFormat
from dure.machine.chip import Chip


def orient(function: Function, chip: Chip) -> Function:
    """The same program, with such arguments transposed."""
    return laid(function, orientable(function, chip, ("in",)))


def orientable(
    function: Function, chip: Chip, accesses: Sequence[str] = ("in", "out")
) -> frozenset[str]:
    """The names of the arguments that may lie transposed: those that are only loaded as left
    operands, of an engine that wants these so, and those that are only stored.
    """
    usage = usage_of(function)

    def fits(param: Param) -> bool:
        if param.access == "in":
            return _always_left(param.value, function, usage, chip)
        return param.access == "out" and _stored(param.value, function)

    return frozenset(p.value.name for p in function.params if p.access in accesses and fits(p))


def laid(function: Function, names: frozenset[str]) -> Function:
    """The same program with these arguments transposed."""
    turned = [p.value for p in function.params if p.value.name in names]
    if not turned:
        return function
    values: dict[Value, Value] = {}
    params: list[Param] = []
    for param in function.params:
        kind = param.value.tensor
        if param.value in turned:
            value = Value(replace(kind, shape=kind.shape[::-1]), param.value.name)
            values[param.value] = value
            param = Param(value, param.access)
        params.append(param)
    body = _turned(function.body, values)
    turned_names = tuple(v.name for v in turned)
    attrs = {**function.attrs, "transposed": turned_names}
    return replace(function, params=tuple(params), body=body, attrs=attrs)


def _stored(tensor: Value, function: Function) -> bool:
    kind = tensor.tensor
    plain = kind.layout is None and not isinstance(kind.dtype, BlockFormat) and kind.index is None
    uses = [op for op in walk(function.body) if tensor in op.operands]
    return (
        kind.rank == 2
        and plain
        and all(op.name == "store" and len(op.operands) == 2 for op in uses)
    )


def _always_left(tensor: Value, function: Function, usage: Usage, chip: Chip) -> bool:
    kind = tensor.tensor
    plain = kind.layout is None and not isinstance(kind.dtype, BlockFormat) and kind.index is None
    if kind.rank != 2 or not plain:
        return False
    found = False
    for op in walk(function.body):
        if tensor not in op.operands:
            continue
        if op.name != "load" or op.attr("list_axes"):
            return False
        found = True
        for consumer in usage.consumers[op.result]:
            if not isinstance(consumer, Op) or consumer.name != "dot":
                return False
            if consumer.operands[0] is not op.result or op.result in consumer.operands[1:]:
                return False
            name = dot_engine(chip, str(kind.dtype))
            rules = chip.engines[name].dot if name is not None else None
            if rules is None or not rules.stationary_k_first or "a" in rules.transposed:
                return False
            if consumer.operands[1].tile.dtype is not kind.dtype:
                return False
    return found


def _turned(region: Region, values: dict[Value, Value]) -> Region:
    return replace(region, ops=tuple(_ops(region, values)))


def _ops(region: Region, values: dict[Value, Value]) -> Iterator[Op]:
    swapped = ("index", "step", "offset", "stride", "shape")
    for op in region.ops:
        if op.name == "load" and op.operands[0] in values:
            attrs: dict[str, Any] = dict(op.attrs)
            attrs.update((k, tuple(reversed(attrs[k]))) for k in swapped)
            made = infer("load", [values[op.operands[0]]], attrs, span=op.span)
            yield made
            yield Op("transpose", made.results, op.results, {"order": (1, 0)}, span=op.span)
        elif op.name == "store" and op.operands[0] in values:
            attrs = dict(op.attrs)
            attrs.update((k, tuple(reversed(attrs[k]))) for k in swapped if k in attrs)
            back = infer("transpose", [op.operands[1]], {"order": (1, 0)}, span=op.span)
            yield back
            yield infer("store", [values[op.operands[0]], back.result], attrs, span=op.span)
        elif op.regions:
            yield replace(op, regions=tuple(_turned(r, values) for r in op.regions))
        else:
            yield op
