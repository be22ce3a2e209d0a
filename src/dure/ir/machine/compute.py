"""The compute instruction: a region of tile ops between buffers.

``compute(*read, *written) {queue, engines, reads}``: the first ``reads`` operands are read, and
become the region's arguments; the others receive what the region yields.  A buffer that is updated
occurs in both.  The instruction reads everything before it writes.  ``engines`` are occupied
together, at the slowest one's rate; each op of the region runs on one of them (the first that has
its operation, :func:`operation_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from dure.ir.core import Cost, Op, OpDef, Region, Value, declare, walk
from dure.ir.rules import broken, tile
from dure.ir.types import Type

#: Classes of work that an engine declares.  Special cases, which engines may tell apart: ``scale``
#: multiplies by what is the same along the last axis, ``shift`` adds that or takes it away,
#: ``square`` multiplies a tile by itself, ``sum`` adds up along the last axis.
Operation: TypeAlias = Literal[
    "dot",
    "elementwise",
    "transcendental",
    "reduce",
    "transpose",
    "scan",
    "convert",
    "copy",
    "scale",
    "shift",
    "square",
    "sum",
    "none",
]

_TRANSCENDENTAL = frozenset(
    {"exp", "exp2", "log", "log2", "sqrt", "rsqrt", "tanh", "sigmoid", "erf", "sin", "cos", "div"}
    | {"pow"}
)
_BY_NAME: dict[str, Operation] = {
    "dot": "dot",
    "reduce": "reduce",
    "reduce_with": "reduce",
    "cumsum": "scan",
    "transpose": "transpose",
    "cast": "convert",
    "quantize": "convert",
    "dequantize": "convert",
    "full": "none",
    "iota": "none",
    "reshape": "none",
    "broadcast": "none",
}


def operation_of(op: Op, makers: Mapping[Value, Op] = MappingProxyType({})) -> Operation:
    """The class of work that a tile op is; ``makers`` are those of the values that it reads."""
    if op.name in _TRANSCENDENTAL:
        return "transcendental"
    if op.name == "mul" and op.operands[0] is op.operands[1]:
        return "square"
    if op.name in ("add", "sub", "mul") and _by_row(op, makers):
        return "scale" if op.name == "mul" else "shift"
    if op.name == "reduce" and op.attr("combiner") == "sum":
        return "sum" if op.attr("axis") == op.operands[0].tile.rank - 1 else "reduce"
    return _BY_NAME.get(op.name, "elementwise")


def _by_row(op: Op, makers: Mapping[Value, Op]) -> bool:
    """Whether what an op adds, takes away or multiplies by is the same along the last axis."""
    shape = op.results[0].tile.shape
    if not shape or shape[-1] == 1:
        return False
    others = op.operands if op.name != "sub" else op.operands[1:]
    return any(_uniform(value, shape[-1], makers) for value in others)


def _uniform(value: Value, extent: int, makers: Mapping[Value, Op]) -> bool:
    """Whether a tile with this last extent repeats one element along it."""
    maker = makers.get(value)
    if maker is None:
        return False
    if maker.name == "broadcast":
        shape = maker.operands[0].tile.shape
        return not shape or shape[-1] != extent or _uniform(maker.operands[0], extent, makers)
    return maker.name == "full"


def works(region: Region) -> Iterator[tuple[Operation, Op]]:
    """What the engines do for an instruction's region: the class of work, and the op it is.

    Constants and reindexings are no work.  A transpose is work, but for one that a dot reads its
    operand through (unless it says ``stored``).  Writing what no op of the region computes (what
    was read, or a constant) is a ``copy``, given as a reshape of the tile to itself.
    """
    multiplies = any(op.name == "dot" for op in region.ops)
    makers: dict[Value, Op] = {}
    for op in region.ops:
        makers.update(dict.fromkeys(op.results, op))
        operation = operation_of(op, makers)
        if operation == "transpose" and multiplies and not op.attrs.get("stored"):
            operation = "none"
        if operation != "none" and op.name not in ("for", "if"):
            yield operation, op
        for inner in op.regions:
            yield from works(replace(inner, yields=()))
    for value in region.yields:
        maker = makers.get(value)
        while maker is not None and operation_of(maker) == "none" and maker.operands:
            maker = makers.get(maker.operands[0])
        if maker is None or operation_of(maker) == "none":
            yield "copy", Op("reshape", (value,), (value,))


def ops_of(region: Region) -> Iterator[Op]:
    """The ops of a machine program, those of loops and branches among them."""
    for op in region.ops:
        yield op
        if op.name != "compute":
            for inner in op.regions:
                yield from ops_of(inner)


def _compute_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    count: int = attrs["reads"]
    region = regions[0]
    for operand in operands:
        tile(operand, "an operand of compute")
    if [a.type for a in region.args] != list(operands[:count]):
        raise broken(
            "a compute whose region takes other tiles than it reads",
            "the region's arguments are the buffers read",
        )
    if [y.type for y in region.yields] != list(operands[count:]):
        raise broken(
            "a compute whose region yields other tiles than it writes",
            "the region yields the buffers written",
        )
    if not attrs["engines"]:
        raise broken("a compute without engines", "a compute occupies at least one engine")
    return []


def _cost(op: Op) -> Cost:
    total = Cost()
    for inner in walk(op.regions[0]):
        total = total + Cost(flops=inner.definition.cost(inner).flops)
    return total


declare(
    OpDef(
        "compute",
        "machine",
        _compute_typing,
        None,
        _cost,
        doc="compute(*read, *written) {queue, engines, reads} (region): one instruction",
    )
)
