"""Fusion at the tensor level: neighbours become one op, whose kernel then makes one pass.

Each pattern merges a producer that nobody else uses into its consumer (or the other way round), by
setting an attribute that the op's declaration defines: the fused op rounds where its declaration
says so, which is inside the bound that ``DURE_CHECK`` allows.  Patterns run until none applies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dure.compiler.rebuild import Rebuilder, rebuild, uses, without_dead_ops
from dure.ir.core import Function, Op, Region, Value
from dure.ir.tensor.checks import ACTIVATIONS, extent

_QUANTIZING = ("rms_norm", "layer_norm", "linear", "gated_linear", "elementwise", "attention")


@dataclass(frozen=True)
class Fused:
    """The op that replaces a consumer: what it is, its operands (old values) and attributes."""

    name: str
    operands: tuple[Value, ...]
    attrs: Mapping[str, Any]


class Scope:
    """What a pattern may ask: who produces a value, and whether only one op uses it."""

    def __init__(self, function: Function) -> None:
        self._uses = uses(function.body)
        self._region: dict[Op, Region] = {}
        self._producer: dict[Value, Op] = {}
        #: Ops replaced in this sweep: what became of them is seen in the next.
        self.fused = set[Op]()
        self._collect(function.body)

    def _collect(self, region: Region) -> None:
        for op in region.ops:
            self._region[op] = region
            self._producer.update(dict.fromkeys(op.results, op))
            for inner in op.regions:
                self._collect(inner)

    def single(self, consumer: Op, value: Value, name: str) -> Op | None:
        """The op ``name`` that gives ``value``, if only ``consumer``, in its region, uses it."""
        producer = self._producer.get(value)
        if (
            producer in self.fused
            or producer is None
            or producer.name != name
            or len(self._uses[value]) != 1
        ):
            return None
        if len(producer.results) != 1 or self._region[producer] is not self._region[consumer]:
            return None
        return producer

    def producer(self, consumer: Op, value: Value, names: Sequence[str]) -> Op | None:
        """Like :meth:`single`, for one of several names."""
        for name in names:
            found = self.single(consumer, value, name)
            if found is not None:
                return found
        return None


Pattern: TypeAlias = Callable[[Scope, Op], "Fused | None"]


def fuse(function: Function) -> Function:
    """``function`` with every pattern applied as often as it can be."""
    # Results are quantized last: an op that still merges with its consumer must stay in float32.
    for patterns in (PATTERNS, (quantized_result,)):
        changed = True
        while changed:
            function, changed = _sweep(function, patterns)
    return function


def _sweep(function: Function, patterns: Sequence[Pattern]) -> tuple[Function, bool]:
    scope = Scope(function)

    def visit(builder: Rebuilder, op: Op) -> bool:
        for pattern in patterns:
            fused = pattern(scope, op)
            if fused is not None:
                operands = [builder.value(o) for o in fused.operands]
                builder.replace(op, builder.make(fused.name, operands, fused.attrs, op))
                scope.fused.add(op)
                return True
        return False

    result = rebuild(function, visit)
    return without_dead_ops(result), bool(scope.fused)


def _function(op: Op) -> str:
    return op.attr("function") if op.name == "elementwise" and not op.attr("quantize") else ""


def _plain(linear: Op) -> bool:
    """A linear layer with nothing in its epilogue yet."""
    return all(
        linear.attr(name) == linear.definition.defaults[name] for name in linear.definition.defaults
    )


def gated(scope: Scope, op: Op) -> Fused | None:
    """activation(x @ gate.T) * (x @ up.T) is one gated_linear: x is read once."""
    if _function(op) != "mul":
        return None
    for first, second in (op.operands, tuple(reversed(op.operands))):
        gate, up = scope.single(op, first, "linear"), scope.single(op, second, "linear")
        if gate is None or up is None or not _plain(up):
            continue
        activation: str = gate.attr("activation")
        bare = _plain(Op(gate.name, (), (), {**gate.attrs, "activation": ""}))
        if activation and bare and gate.operands[0] is up.operands[0]:
            operands = (*gate.operands, up.operands[1])
            return Fused("gated_linear", operands, {"activation": activation})
    return None


def gated_experts(scope: Scope, op: Op) -> Fused | None:
    """Both products of experts' rows and the gate: the rows are read once."""
    if op.name == "clamped_swiglu":
        attrs = {**op.attrs, "activation": ""}
        return _gated_experts(scope, (op, op.operands[0]), (op, op.operands[1]), attrs)
    if _function(op) != "mul":
        return None
    for first, second in (op.operands, tuple(reversed(op.operands))):
        opened = scope.single(op, first, "elementwise")
        if opened is None or _function(opened) not in ACTIVATIONS or not _function(opened):
            continue
        attrs = {"activation": _function(opened)}
        found = _gated_experts(scope, (opened, opened.operands[0]), (op, second), attrs)
        if found is not None:
            return found
    return None


def _gated_experts(
    scope: Scope, gate: tuple[Op, Value], up: tuple[Op, Value], attrs: Mapping[str, Any]
) -> Fused | None:
    """The op of these values, each with its user, if both are products of the same rows."""
    first, second = (scope.single(*found, "grouped_linear") for found in (gate, up))
    if first is None or second is None or first.attr("bias") != second.attr("bias"):
        return None
    (x, one, *rest), (other, two, *others) = first.operands, second.operands
    if x is not other or rest[:2] != others[:2]:
        return None
    operands = (x, one, two, *rest[:2], *rest[2:], *others[2:])
    return Fused("grouped_gated", operands, {**attrs, "bias": first.attr("bias")})


def epilogue(scope: Scope, op: Op) -> Fused | None:
    """linear, then scale, activation or soft cap."""
    function = _function(op)
    if len(op.operands) != 1 or not function:
        return None
    linear = scope.single(op, op.operands[0], "linear")
    if linear is None or linear.attr("residual") or linear.attr("quantize"):
        return None
    later = linear.attr("softcap") or linear.attr("activation")
    if function == "softcap" and not linear.attr("softcap"):
        change: dict[str, Any] = {"softcap": op.attr("value")}
    elif function in ACTIVATIONS and not later:
        change = {"activation": function}
    elif function == "scale" and not later and not linear.attr("bias"):
        if linear.attr("scale") != 1.0:
            return None
        change = {"scale": op.attr("value")}
    else:
        return None
    return Fused("linear", linear.operands, {**linear.attrs, **change})


def residual(scope: Scope, op: Op) -> Fused | None:
    """A linear layer, a norm or a sum over devices, added to something of the same shape."""
    if _function(op) != "add":
        return None
    # The second operand first: in `x + f(x)` it is the newer one.
    for other, value in (op.operands, tuple(reversed(op.operands))):
        found = scope.producer(op, value, ("linear", "rms_norm", "layer_norm", "all_reduce"))
        if found is None or found.attr("residual"):
            continue
        if found.name != "all_reduce" and found.attr("quantize"):
            continue
        if other.tensor.shape == value.tensor.shape and other.type == op.results[0].type:
            return Fused(found.name, (*found.operands, other), {**found.attrs, "residual": True})
    return None


def quantized_result(scope: Scope, op: Op) -> Fused | None:
    """An op whose result is only quantized stores it quantized."""
    if op.name != "quantize_rows":
        return None
    found = scope.producer(op, op.operands[0], _QUANTIZING)
    if found is None or found.attr("quantize"):
        return None
    # A head that isn't whole blocks would share a block with the next one.
    if found.name == "attention" and extent(found.operands[2].tensor.shape[2]) % 32:
        return None
    return Fused(found.name, found.operands, {**found.attrs, "quantize": op.attr("quantize")})


def head_norm(scope: Scope, op: Op) -> Fused | None:
    """An RMS norm of each head, then rope (or the KV write that ropes)."""
    if op.name not in ("rope", "kv_write") or op.attr("norm") or not op.attr("order"):
        return None
    place = 0 if op.name == "rope" else 1
    norm = scope.single(op, op.operands[place], "rms_norm")
    if norm is None or norm.attr("residual") or norm.attr("quantize"):
        return None
    x, weight = norm.operands
    operands = (*op.operands[:place], x, *op.operands[place + 1 :], weight)
    return Fused(op.name, operands, {**op.attrs, "norm": True, "eps": norm.attr("eps")})


def rope_write(scope: Scope, op: Op) -> Fused | None:
    """Rope, then the KV write."""
    if op.name != "kv_write" or op.attr("order"):
        return None
    rope = scope.single(op, op.operands[1], "rope")
    if rope is None:
        return None
    x, *rest = rope.operands
    return Fused("kv_write", (op.operands[0], x, op.operands[2], *rest), dict(rope.attrs))


def scaled_embedding(scope: Scope, op: Op) -> Fused | None:
    """Rows of an embedding, then a factor."""
    if _function(op) != "scale":
        return None
    embedding = scope.single(op, op.operands[0], "embedding")
    if embedding is None or embedding.attr("scale") != 1.0:
        return None
    return Fused("embedding", embedding.operands, {"scale": op.attr("value")})


PATTERNS: tuple[Pattern, ...] = (
    gated,
    gated_experts,
    epilogue,
    residual,
    head_norm,
    rope_write,
    scaled_embedding,
)
