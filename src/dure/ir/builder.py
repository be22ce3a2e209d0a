"""The tensor-program builder: how models are written, for every target.

    b = ProgramBuilder("tiny")
    tokens_count = b.symbol("T", 1, 512)
    tokens = b.input("tokens", (tokens_count,), "int32", index=(0, 31999))
    x = b.embedding(b.weight("token_embd.weight", (32000, 512), "q8_0"), tokens)
    x = b.layers(signatures, layer, x)
    b.output("logits", b.linear(x, b.weight("output.weight", (32000, 512), "q8_0")))
    program = b.build()

Every method checks shapes and dtypes at once and raises :class:`IRError` with the caller's line.
The built function says in ``attrs`` what its parameters are: ``roles`` (input, weight or state) and
``names``, one each, and ``outputs``, the names of its first yields; the states' final values follow
them.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from dure.errors import IRError
from dure.ir import tensor as _declares_tensor_ops
from dure.ir import tile as _declares_tile_ops
from dure.ir.core import Function, Op, Param, Region, Span, Value, infer
from dure.ir.dtypes import BlockFormat, ElementType, element_type
from dure.ir.expr import IntLike, Symbol, as_expr, symbol
from dure.ir.layers import Run, group
from dure.ir.stored import stored_type
from dure.ir.types import TensorType

__all__ = ["Layer", "ProgramBuilder", "State"]

Role: TypeAlias = Literal["input", "weight", "state"]
Shape: TypeAlias = "Sequence[IntLike]"
_DECLARED = (_declares_tensor_ops, _declares_tile_ops)


@dataclass(eq=False)
class State:
    """A tensor that a step updates in place (a KV pool): ``value`` is what it holds now."""

    name: str
    value: Value


LayerBody: TypeAlias = "Callable[[Layer, *tuple[Value, ...]], Value | Sequence[Value]]"


class ProgramBuilder:
    """Builds one tensor program; see the module's docstring."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._params: dict[str, tuple[Role, Value]] = {}
        self._states: dict[str, State] = {}
        self._symbols: dict[str, Symbol] = {}
        self._outputs: list[tuple[str, Value]] = []
        self._bodies: list[list[Op]] = [[]]

    # Parameters ---------------------------------------------------------------------------------

    def symbol(self, name: str, low: int, high: int) -> Symbol:
        """A size that is known when a step runs, from ``low`` to ``high`` inclusive."""
        if name in self._symbols:
            raise self._error(f"two symbols '{name}'", "a symbol is declared once")
        if not 0 <= low <= high:
            raise self._error(f"symbol '{name}' from {low} to {high}", "0 <= low <= high")
        found = symbol(name, "size", low, high)
        self._symbols[name] = found
        return found

    def input(
        self,
        name: str,
        shape: Shape,
        dtype: str = "float32",
        *,
        index: tuple[IntLike, IntLike] | None = None,
        unique: bool = False,
    ) -> Value:
        """A tensor given at every step; ``index`` is the inclusive range of its values."""
        bounds = None if index is None else (as_expr(index[0]), as_expr(index[1]))
        value = TensorType(_shape(shape), element_type(dtype), index=bounds, unique=unique)
        return self._param("input", name, value)

    def weight(self, name: str, shape: Shape, dtype: str) -> Value:
        """A tensor loaded once, of any dtype or block format (quantized along its last axis)."""
        return self._param("weight", name, _weight_type(shape, element_type(dtype)))

    def state(self, name: str, shape: Shape, dtype: str = "float16") -> State:
        """A tensor that lives from step to step and is updated in place."""
        value = self._param("state", name, TensorType(_shape(shape), element_type(dtype)))
        return self._states.setdefault(name, State(name, value))

    def output(self, name: str, value: Value) -> None:
        """Names a result of the program."""
        if any(name == other for other, _ in self._outputs):
            raise self._error(f"two outputs '{name}'", "an output is named once")
        self._outputs.append((name, value))

    def build(self) -> Function:
        """The program."""
        if not self._outputs:
            raise self._error("a program without an output", "a program has at least one output")
        accesses = {"input": "in", "weight": "in", "state": "inout"}
        params = tuple(
            Param(value, "inout" if accesses[role] == "inout" else "in")
            for role, value in self._params.values()
        )
        states = [s.value for s in self._states.values()]
        yields = (*(v for _, v in self._outputs), *states)
        attrs = {
            "roles": tuple(role for role, _ in self._params.values()),
            "names": tuple(self._params),
            "outputs": tuple(name for name, _ in self._outputs),
        }
        body = Region(tuple(p.value for p in params), tuple(self._bodies[0]), yields)
        return Function(
            self.name, "tensor", params, body, tuple(self._symbols.values()), attrs=attrs
        )

    def _param(self, role: Role, name: str, kind: TensorType) -> Value:
        known = self._params.get(name)
        if known is None:
            known = self._params[name] = (role, Value(kind, name))
        if known != (role, known[1]) or known[1].type != kind:
            raise self._error(
                f"'{name}' is declared as {role} {kind} and as {known[0]} {known[1].type}",
                "a parameter has one role and one type",
                "use the value that the first declaration gave",
            )
        return known[1]

    # Layers -------------------------------------------------------------------------------------

    def layers(
        self, signatures: Sequence[Hashable], body: LayerBody, *carried: Value
    ) -> tuple[Value, ...]:
        """Layers 0, 1, ... of which ``signatures`` says what is alike; returns what the last gives.

        ``body(layer, *carried)`` builds one layer and returns its carried values (one or several,
        of the types it was given).  It declares its weights and states through ``layer`` with names
        that hold a ``{}`` for the layer's number, and must build the same for equal
        ``layer.signature``. Runs of equal signatures, or of a repeating period, become one
        ``repeat``.
        """
        values = tuple(carried)
        for run in group(signatures):
            values = self._run(run, signatures, body, values)
        return values

    def _run(
        self,
        run: Run,
        signatures: Sequence[Hashable],
        body: LayerBody,
        carried: tuple[Value, ...],
    ) -> tuple[Value, ...]:
        if run.count == 1:
            for place in range(run.start, run.start + run.period):
                layer = Layer(self, signatures[place], range(place, place + 1), None)
                carried = self._layer(body, layer, carried)
            return carried
        tables = _Tables(self)
        arguments = tuple(Value(v.type, v.name) for v in carried)
        self._bodies.append([])
        values = arguments
        for place in range(run.period):
            stop = run.start + run.period * run.count
            numbers = range(run.start + place, stop, run.period)
            values = self._layer(body, Layer(self, signatures[numbers[0]], numbers, tables), values)
        ops = self._bodies.pop()
        return tables.finish(ops, arguments, carried, values, run.count)

    def _layer(
        self, body: LayerBody, layer: Layer, carried: tuple[Value, ...]
    ) -> tuple[Value, ...]:
        result = body(layer, *carried)
        values = (result,) if isinstance(result, Value) else tuple(result)
        if [v.type for v in values] != [v.type for v in carried]:
            raise self._error(
                f"layer {layer.numbers[0]} takes {[str(v.type) for v in carried]} and gives "
                f"{[str(v.type) for v in values]}",
                "a layer gives values of the types that it takes",
            )
        return values

    # Ops ----------------------------------------------------------------------------------------

    def op(self, op: str, *operands: Value, hint: str = "", **attrs: Any) -> tuple[Value, ...]:
        """Any declared tensor op."""
        made = infer(op, operands, attrs, span=_caller(), hint=hint)
        self._bodies[-1].append(made)
        return made.results

    def _op(self, op: str, *operands: Value, **attrs: Any) -> Value:
        return self.op(op, *operands, **attrs)[0]

    def append(self, op: Op) -> None:
        """Adds an op that was made elsewhere."""
        self._bodies[-1].append(op)

    def embedding(self, table: Value, tokens: Value, *, scale: float = 1.0) -> Value:
        """Rows of ``table`` (V, N), times ``scale``: (T, N) float32."""
        return self._op("embedding", table, tokens, scale=float(scale))

    def linear(
        self, x: Value, weight: Value, bias: Value | None = None, *, activation_bits: int = 8
    ) -> Value:
        """``x @ weight.T + bias``: (T, K) and (N, K) to (T, N).

        ``activation_bits`` are the least that the policy for activations may leave of ``x``.
        """
        rest = () if bias is None else (bias,)
        flags = {"bias": bias is not None, "activation_bits": activation_bits}
        return self._op("linear", x, weight, *rest, **flags)

    def rms_norm(self, x: Value, weight: Value, eps: float) -> Value:
        """``x / sqrt(mean(x^2) + eps) * weight`` along the last axis."""
        return self._op("rms_norm", x, weight, eps=float(eps))

    def layer_norm(self, x: Value, weight: Value, bias: Value, eps: float) -> Value:
        """Mean 0 and variance 1 along the last axis, times ``weight`` plus ``bias``."""
        return self._op("layer_norm", x, weight, bias, eps=float(eps))

    def softmax(self, x: Value) -> Value:
        """Softmax along the last axis."""
        return self._op("softmax", x)

    def elementwise(self, function: str, *operands: Value, value: float = 1.0) -> Value:
        """A function of :data:`dure.ir.tensor.elementwise.FUNCTIONS`, broadcast like NumPy."""
        return self._op("elementwise", *operands, function=function, value=float(value))

    def add(self, a: Value, b: Value) -> Value:
        """``a + b``."""
        return self.elementwise("add", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        """``a * b``."""
        return self.elementwise("mul", a, b)

    def scale(self, x: Value, factor: float) -> Value:
        """``x * factor``."""
        return self.elementwise("scale", x, value=factor)

    def silu(self, x: Value) -> Value:
        """``x * sigmoid(x)``."""
        return self.elementwise("silu", x)

    def gelu(self, x: Value, approximate: Literal["tanh", "none"] = "tanh") -> Value:
        """GELU by the tanh approximation or by erf."""
        return self.elementwise("gelu_tanh" if approximate == "tanh" else "gelu_erf", x)

    def softcap(self, x: Value, cap: float) -> Value:
        """``cap * tanh(x / cap)``."""
        return self.elementwise("softcap", x, value=cap)

    def reshape(self, x: Value, *shape: int) -> Value:
        """The same elements in another shape; one extent may be -1."""
        return self._op("reshape_tensor", x, shape=tuple(shape))

    def rope(
        self,
        x: Value,
        tables: tuple[Value, Value],
        positions: Value,
        *,
        order: str,
        norm: Value | None = None,
        eps: float = 1e-6,
    ) -> Value:
        """Rotary embedding of (T, H, D); ``tables`` are cos and sin, (positions, R / 2) float32.

        ``order`` is ``neox`` (halves) or ``llama`` (neighbours); ``norm`` (D) is the weight of an
        RMS norm of each head before it.
        """
        rest = () if norm is None else (norm,)
        flags = {"order": order, "norm": norm is not None, "eps": float(eps)}
        return self._op("rope", x, *tables, positions, *rest, **flags)

    def kv_write(self, pool: State, x: Value, slots: Value) -> None:
        """Writes rows (T, heads, head_dim) into a pool at ``slots`` (-1: not written)."""
        pool.value = self._op("kv_write", pool.value, x, slots)

    def attention(
        self,
        q: Value,
        k_pool: State | Value,
        v_pool: State | Value,
        positions: Value,
        block_table: Value,
        context: Value,
        work: tuple[Value, Value, Value],
        *,
        scale: float,
        page_size: int,
        query_rows: int = 16,
        window: int = 0,
        softcap: float = 0.0,
        causal: bool = True,
        sinks: Value | None = None,
    ) -> Value:
        """Attention over paged pools for a ragged batch: (T, H, D) to (T, H * D).

        ``work`` is (work_sequence, work_start, work_rows), each of at most ``query_rows`` rows; see
        :mod:`dure.ir.tensor.attention`.  ``sinks`` (H) are the heads' extra logits.
        """
        pools = (p.value if isinstance(p, State) else p for p in (k_pool, v_pool))
        rest = () if sinks is None else (sinks,)
        return self._op(
            "attention",
            *(q, *pools, positions, block_table, context, *work, *rest),
            scale=float(scale),
            page_size=page_size,
            query_rows=query_rows,
            window=window,
            softcap=float(softcap),
            causal=causal,
            sinks=sinks is not None,
        )

    def route(self, logits: Value, k: int, *, normalized: bool = True) -> tuple[Value, Value]:
        """The k experts of each token, by the softmax of ``logits`` (T, E): their weights and
        numbers, (T, k) each.
        """
        weights, experts = self.op("route", logits, k=k, normalized=normalized)
        return weights, experts

    def dispatch(
        self, experts: Value, count: int, part: Value | None = None, parts: int = 1
    ) -> tuple[Value, Value, Value]:
        """Where each choice of (T, k) goes in an order by expert, and where each of the ``count``
        experts' rows start and stop; see :mod:`dure.ir.tensor.experts`.  Of several ``parts`` of
        the experts only those of one count: its number is ``part``, (1) int32.
        """
        rest = () if part is None else (part,)
        places, starts, stops = self.op("dispatch", experts, *rest, experts=count, parts=parts)
        return places, starts, stops

    def all_reduce(self, x: Value, devices: int) -> Value:
        """The sum of ``x`` over the devices of a sharded program."""
        return self._op("all_reduce", x, devices=devices)

    def all_gather(self, x: Value, devices: int, *, axis: int = 1) -> Value:
        """The devices' ``x`` side by side."""
        return self._op("all_gather", x, devices=devices, axis=axis)

    def reduce_scatter(self, x: Value, devices: int, *, axis: int = 1) -> Value:
        """The device's part of the sum of ``x`` over the devices."""
        return self._op("reduce_scatter", x, devices=devices, axis=axis)

    def all_to_all(self, x: Value, devices: int) -> Value:
        """Part d of ``x``, along axis 0, from each device to device d."""
        return self._op("all_to_all", x, devices=devices)

    def expert_rows(self, x: Value, places: Value) -> Value:
        """Rows (T, D) in the order of ``places`` (T, k): (T * k, D)."""
        return self._op("expert_rows", x, places)

    def grouped_linear(
        self, x: Value, weight: Value, ends: tuple[Value, Value], bias: Value | None = None
    ) -> Value:
        """``x @ weight[e].T + bias[e]`` of each expert's rows: (P, K), (E, N, K), (E, N) to (P, N).

        ``ends`` are the starts and stops of the experts' rows.
        """
        rest = () if bias is None else (bias,)
        return self._op("grouped_linear", x, weight, *ends, *rest, bias=bias is not None)

    def expert_sum(self, y: Value, places: Value, weights: Value) -> Value:
        """A token's rows of ``y`` (P, N), at its ``places``, times its ``weights``: (T, N)."""
        return self._op("expert_sum", y, places, weights)

    def clamped_swiglu(self, gate: Value, up: Value, limit: float, alpha: float) -> Value:
        """``(up + 1) * gate * sigmoid(alpha * gate)``, with both clamped by ``limit``."""
        return self._op("clamped_swiglu", gate, up, limit=float(limit), alpha=float(alpha))

    def gather_rows(self, x: Value, rows: Value) -> Value:
        """``x[rows]``."""
        return self._op("gather_rows", x, rows)

    def argmax(self, x: Value) -> Value:
        """The lowest index of the largest element along the last axis."""
        return self._op("argmax", x)

    def top_k(self, x: Value, k: int) -> tuple[Value, Value]:
        """The k largest along the last axis, descending, and their indices."""
        values, indices = self.op("top_k", x, k=k)
        return values, indices

    def batched_matmul(self, a: Value, b: Value) -> Value:
        """(B, M, K) and (B, K, N) to (B, M, N)."""
        return self._op("batched_matmul", a, b)

    def conv2d(
        self,
        x: Value,
        weight: Value,
        bias: Value | None = None,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> Value:
        """(B, H, W, C) and (O, KH, KW, C) to (B, H', W', O)."""
        rest = () if bias is None else (bias,)
        flags = {"stride": stride, "padding": padding, "dilation": dilation}
        return self._op("conv2d", x, weight, *rest, bias=bias is not None, **flags)

    def _error(self, what: str, rule: str, fix: str = "") -> IRError:
        return IRError(what, where=_caller().render(), rule=rule, fix=fix)


class Layer:
    """The layer that a body builds: its signature, its number(s), and its own weights and
    states."""

    def __init__(
        self,
        builder: ProgramBuilder,
        signature: Hashable,
        numbers: range,
        tables: _Tables | None,
    ) -> None:
        self.builder = builder
        self.signature = signature
        self.numbers = numbers
        self._tables = tables

    def weight(self, name: str, shape: Shape, dtype: str) -> Value:
        """This layer's weight; ``name`` holds ``{}`` for the layer's number."""
        values = [self.builder.weight(name.format(i), shape, dtype) for i in self.numbers]
        return values[0] if self._tables is None else self._tables.weight(tuple(values), name)

    def state(self, name: str, shape: Shape, dtype: str = "float16") -> State:
        """This layer's state; ``name`` holds ``{}`` for the layer's number."""
        states = [self.builder.state(name.format(i), shape, dtype) for i in self.numbers]
        return states[0] if self._tables is None else self._tables.state(tuple(states), name)


class _Tables:
    """The tables of a repeat while its body is built."""

    def __init__(self, builder: ProgramBuilder) -> None:
        self._builder = builder
        self._rows: list[tuple[Value, ...]] = []
        self._arguments: list[Value] = []
        self._states: list[tuple[int, State, tuple[State, ...]]] = []

    def weight(self, row: tuple[Value, ...], name: str) -> Value:
        """The region's argument for a row of weights; one row has one argument."""
        if row not in self._rows:
            self._rows.append(row)
            self._arguments.append(Value(row[0].type, name))
        return self._arguments[self._rows.index(row)]

    def state(self, row: tuple[State, ...], name: str) -> State:
        """The region's view of a row of states."""
        for _, inner, outer in self._states:
            if outer == row:
                return inner
        argument = self.weight(tuple(s.value for s in row), name)
        inner = State(name, argument)
        self._states.append((self._arguments.index(argument), inner, row))
        return inner

    def finish(
        self,
        ops: list[Op],
        arguments: tuple[Value, ...],
        carried: tuple[Value, ...],
        values: tuple[Value, ...],
        count: int,
    ) -> tuple[Value, ...]:
        """Makes the repeat; gives its carried results and moves the states on."""
        changed = [s for s in self._states if s[1].value is not self._arguments[s[0]]]
        region = Region(
            (*arguments, *self._arguments), tuple(ops), (*values, *(s[1].value for s in changed))
        )
        made = infer(
            "repeat",
            (*carried, *(v for row in self._rows for v in row)),
            {
                "count": count,
                "carried": len(carried),
                "tables": len(self._rows),
                "updated": tuple(s[0] for s in changed),
            },
            (region,),
            span=_caller(),
        )
        self._builder.append(made)
        rest = made.results[len(carried) :]
        for place, (_, _, outer) in enumerate(changed):
            for i, state in enumerate(outer):
                state.value = rest[place * count + i]
        return made.results[: len(carried)]


def _shape(shape: Shape) -> tuple[Any, ...]:
    return tuple(as_expr(extent) for extent in shape)


def _weight_type(shape: Shape, dtype: ElementType) -> TensorType:
    kind = TensorType(_shape(shape), dtype)
    if isinstance(dtype, BlockFormat):
        return stored_type(replace(kind, quantized_axis=kind.rank - 1))
    return kind


def _caller() -> Span:
    """The line outside this file that called in."""
    frame = inspect.currentframe()
    assert frame is not None
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    name, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(name, line).rstrip("\n")
    indent = len(text) - len(text.lstrip())
    return Span(name, line, indent, max(len(text), indent + 1), text)
