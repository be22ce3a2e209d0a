"""Which kernel computes which tensor op on a chip, for known sizes (:class:`ChipLowering`).

Matrices lie as (K, N) there: a weight's layout is the chip's, made by its load program.  Linear
layers of one input are one product with their weights side by side; what they give is seen in
parts.  The pools of a KV cache lie as (heads, slots, D), so that a page of a head is one block.
Values between ops are of the step's activation type; sums are float32 inside a kernel.

Where a step quantizes activations, rows that meet quantized weights are codes with a scale each:
a launch makes them of a value once, for all products that take it.  Products with other weights
(head, routers) and those of experts take the value itself.  Of several devices each scales its own
part of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from dure.errors import TargetError
from dure.ir.core import Op, Value
from dure.ir.dtypes import DType, ElementType, float32
from dure.ir.expr import Expr, evaluate
from dure.ir.types import TensorType, static_extent
from dure.library import elementwise, epilogue
from dure.library.activation import activation_function
from dure.library.call import IndexArray, KernelCall, stored_bytes, tensor
from dure.library.chip_lowering_joined import in_parts, joins, plain, summed
from dure.library.chip_tensors import ABSENT, Argument, Form, Operand, Part, Stored
from dure.library.embedding import gather_rows
from dure.library.ffn import gated_linear_kn
from dure.library.matmul import matmul_kn
from dure.library.matmul_scaled import gated_linear_scaled, matmul_scaled
from dure.library.norm import (
    layer_norm,
    layer_norm_rows,
    rms_norm,
    rms_norm_folded,
    rms_norm_rows,
    rms_norm_sums,
)
from dure.library.operators_common import bytes_of, call, power_of_two, tile
from dure.library.quantized import quantize_rows, quantize_whole_rows
from dure.library.weight_types import WeightType
from dure.machine.chip import Chip

#: Parts of a row that is folded over the lanes of an engine, at most; few aren't worth it.
_LANES = 128
#: Columns of a norm whose squares an engine adds up as they pass.
_SUMMED = 256
#: Which chips a launch of a kernel is for, by the kernel's name: others don't try it.
SUITS: dict[str, Callable[[KernelCall, Chip], bool]] = {
    "rms_norm_sums": lambda call, chip: chip.passes,
}

#: A launch and what its arguments take.
Launch: TypeAlias = "tuple[KernelCall, tuple[Operand | None, ...]]"


@dataclass(frozen=True)
class ChipCall:
    """A launch (of several that compute the same, the fastest is taken), the operations that its
    op's definition needs, and the bytes of weights and of the KV cache that it can't do without.

    ``operands`` are each call's arguments, in the order of its kernel's parameters.
    """

    name: str
    calls: tuple[KernelCall, ...]
    flops: int
    weight_bytes: int = 0
    kv_bytes: int = 0
    operands: tuple[tuple[Operand | None, ...], ...] = ()
    #: What it is made for, where a step that doesn't read this needs no such launch.
    spare: Value | None = None
    #: Ways of several launches, one after another.
    chains: tuple[tuple[Launch, ...], ...] = ()

    @classmethod
    def of(
        cls, name: str, launches: Sequence[Launch], flops: int, weights: int = 0, kv: int = 0
    ) -> ChipCall:
        """The launches, each with its operands."""
        calls, operands = zip(*launches, strict=True)
        return cls(name, tuple(calls), flops, weights, kv, tuple(operands))

    def ways(self, chip: Chip) -> tuple[tuple[Launch, ...], ...]:
        """The ways to compute it on a chip, each the launches that it makes one after another."""
        found = (*zip(zip(self.calls, self.operands, strict=True)), *self.chains)
        return tuple(way for way in found if all(_suits(call, chip) for call, _ in way))

    def others(self, chip: Chip) -> tuple[tuple[Launch, ...], ...]:
        """Slower ways, for where none of those can be had."""
        return ()


@dataclass(frozen=True)
class ChipLowering:
    """Lowers the ops of a fused tensor program whose symbols have the values ``sizes``.

    ``inputs`` are the index arguments by name, ``made`` those that ops of the program give, and
    ``activation`` is the type of values between ops.  Weights whose own names are in ``quantized``
    lie as codes and scales of the type ``weights``.
    """

    sizes: Mapping[str, int]
    inputs: Mapping[str, IndexArray]
    activation: DType
    made: dict[Value, IndexArray] = field(default_factory=dict[Value, "IndexArray"])
    #: Pools of the KV cache, once they are written.
    pools: set[Value] = field(default_factory=set[Value])
    #: Values that lie where others do: reshaped, or written in place.
    same: dict[Value, Value] = field(default_factory=dict[Value, Value])
    #: Results that are part of a product with others.
    parts: dict[Value, Part] = field(default_factory=dict[Value, Part])
    #: What is made once for all layers, before anything else, by what it is made of.
    first: dict[tuple[Value, Value], tuple[ChipCall, Argument]] = field(
        default_factory=dict[tuple[Value, Value], "tuple[ChipCall, Argument]"]
    )
    #: Places of choices that lie by columns, a row for each of a token's choices: that list.
    columns: dict[Value, Value] = field(default_factory=dict[Value, Value])
    weights: WeightType | None = None
    quantized: frozenset[str] = frozenset()
    #: How the KV cache is quantized.
    kv: WeightType | None = None
    #: How rows that meet quantized weights are.
    rows: WeightType | None = None
    #: Values whose rows are quantized: their codes and scales.
    coded: dict[Value, tuple[Argument, Argument]] = field(
        default_factory=dict[Value, "tuple[Argument, Argument]"]
    )

    def region(self, ops: Sequence[Op]) -> list[ChipCall]:
        """The launches of a body's ops, in order."""
        found: list[ChipCall] = []
        added = summed(ops)
        done: set[Op] = {*added.values()}
        for place, op in enumerate(ops):
            if op.name == "reshape_tensor":
                self.same[op.result] = op.operands[0]
            if op in done or op.name in ("reshape_tensor", "repeat"):
                continue
            alike = [op, added[op]] if op in added else [op]
            if op.name == "linear" and plain(op) and in_parts(op, ops):
                alike = [o for o in ops[place:] if joins(op, o) and in_parts(o, ops)]
                done.update(alike)
            found += self.lower(alike)
        return found

    def lower(self, ops: Sequence[Op]) -> Sequence[ChipCall]:
        """The launches of an op, of several linear layers of one input, or of a sum over devices
        and the linear layer whose results it adds up.
        """
        lowering = _LOWERINGS.get(ops[0].name)
        if lowering is None:
            raise TargetError(
                f"no kernel for chips computes the tensor op '{ops[0].name}'",
                where="" if ops[0].span is None else ops[0].span.render(),
                rule=f"the library computes {', '.join(sorted(_LOWERINGS))} on chips",
                fix="use a model whose layers consist of these",
            )
        return lowering(self, ops)

    def extent(self, extent: Expr) -> int:
        """An extent as a number."""
        return evaluate(extent, self.sizes)

    def type(self, value: Value, shape: tuple[int, ...] | None = None) -> TensorType:
        """The type of a tensor on the chip, seen in another shape where one is given."""
        kind = value.tensor
        found = shape or tuple(self.extent(e) for e in kind.shape)
        dtype: ElementType = kind.dtype
        # Parameters have names and keep their types; what ops give is of the activations' type.
        if dtype is float32 and not value.name:
            dtype = self.activation
        return tensor(dtype, *found)

    def root(self, value: Value) -> Value:
        """The value that lies where this one does."""
        while value in self.same:
            value = self.same[value]
        return value

    def given(
        self, value: Value, shape: tuple[int, ...] | None = None, form: Form = "plain"
    ) -> Argument:
        """A value as an argument, seen in a shape, or lying in a form."""
        kind, root = self.type(value, shape), self.root(value)
        part = self.parts.get(root)
        if part is None:
            return Argument(kind, Operand(Stored((root,), form)))
        return Argument(kind, part.seen(kind))

    def scheme(self, weight: Value) -> WeightType | None:
        """How a weight is quantized, or None where it lies as numbers."""
        return self.weights if _short(weight) in self.quantized else None

    def matrix(self, values: Sequence[Value], *shape: int) -> list[Argument]:
        """Weights (N, K) side by side, as a matrix (K, N) of this shape: its numbers, or its codes
        and scales.
        """
        stored, scheme = Stored(tuple(map(self.root, values)), "columns"), self.scheme(values[0])
        if scheme is None:
            return [Argument(tensor(values[0].tensor.dtype, *shape), Operand(stored))]
        codes, scales = scheme.types(*shape[-2:], *shape[:-2])
        return [
            Argument(codes, Operand(replace(stored, form="codes", weights=scheme))),
            Argument(scales, Operand(replace(stored, form="scales", weights=scheme))),
        ]

    def indices(self, value: Value) -> Argument:
        """An index argument."""
        return Argument(None, Operand(Stored((self.root(value),))))

    def list(self, value: Value, *, tight: bool = False) -> tuple[IndexArray, int, int]:
        """An index argument's values and range: the declared one, or that of its values."""
        values = self.made[value] if value in self.made else self.inputs[value.name]
        if tight:
            return values, int(values.min()), int(values.max())
        declared = value.tensor.index
        assert declared is not None
        low, high = (evaluate(e, self.sizes) for e in declared)
        return values, low, high


def _suits(call: KernelCall, chip: Chip) -> bool:
    suits = SUITS.get(call.kernel.__name__)
    return suits is None or suits(call, chip)


_Lowering: TypeAlias = Callable[[ChipLowering, Sequence[Op]], Sequence[ChipCall]]
_LOWERINGS: dict[str, _Lowering] = {}


def lowers_on_chips(*names: str) -> Callable[[_Lowering], _Lowering]:
    """Registers the decorated function as what lowers these tensor ops on chips."""

    def register(function: _Lowering) -> _Lowering:
        _LOWERINGS.update(dict.fromkeys(names, function))
        return function

    return register


def launch(
    kernel: Any,
    arguments: Sequence[Argument],
    tiles: Mapping[str, int],
    consts: Mapping[str, object] | None = None,
    lists: Mapping[int, tuple[IndexArray, int, int]] | None = None,
    *,
    unique: tuple[int, ...] = (),
    updates: tuple[int, ...] = (),
) -> Launch:
    """A launch of a kernel on these arguments; the rest is :func:`call`'s."""
    types = [a.type for a in arguments]
    made = call(kernel, types, tiles, consts, lists, unique=unique, updates=updates)
    return made, tuple(a.operand for a in arguments)


def _rows_columns(lowering: ChipLowering, value: Value) -> tuple[int, int]:
    shape = [lowering.extent(e) for e in value.tensor.shape]
    rows = 1
    for extent in shape[:-1]:
        rows *= extent
    return rows, shape[-1]


def _left(
    lowering: ChipLowering, x: Value, weight: Value
) -> tuple[list[ChipCall], Argument, list[Argument]]:
    """What a product with this weight takes of x (M, K): the launches that make it, where they
    aren't made yet, the rows, and, of a kernel for codes, their scales.
    """
    m, k = _rows_columns(lowering, x)
    given, scheme = lowering.given(x, (m, k)), lowering.rows
    if lowering.scheme(weight) is None:
        return [], given, []
    if scheme is None:
        return [], given, [ABSENT]
    made: list[ChipCall] = []
    if x not in lowering.coded:
        codes, scales = (
            _between(tensor(t, m, n)) for t, n in ((scheme.code, k), (scheme.scale, 1))
        )
        arguments, consts = [given, codes, scales], {"top": scheme.top}
        tiles = {"bm": tile(m, 8), "bd": tile(k, 256)}
        launches = [launch(quantize_rows, arguments, tiles, consts)]
        whole = {"bd": power_of_two(k), **consts}
        launches.append(launch(quantize_whole_rows, arguments, {"bm": 1}, whole))
        made = [ChipCall.of(f"{scheme.name} rows", launches, 0)]
        lowering.coded[x] = codes, scales
    rows, scales = lowering.coded[x]
    return made, rows, [scales]


def _between(kind: TensorType) -> Argument:
    """A tensor that one launch makes for others, and that isn't a value of the tensor program."""
    return Argument(kind, Operand(Stored((Value(kind),))))


@lowers_on_chips("linear")
def _linear(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    x, _, *rest = op.operands
    m, k = _rows_columns(lowering, x)
    n = sum(lowering.extent(o.operands[1].tensor.shape[0]) for o in ops)
    made, rows, scales = _left(lowering, x, op.operands[1])
    result = Stored(tuple(lowering.root(o.result) for o in ops))
    y = Argument(tensor(lowering.type(x).dtype, m, n), Operand(result))
    stages: list[epilogue.Epilogue] = []
    extras: list[Argument] = []
    if op.attr("scale") != 1.0:
        stages.append(epilogue.scaled(op.attr("scale")))
    if op.attr("bias"):
        stages.append(epilogue.bias(len(extras)))
        biases = Stored(tuple(lowering.root(o.operands[2]) for o in ops))
        extras.append(Argument(tensor(rest[0].tensor.dtype, n), Operand(biases)))
    if op.attr("activation"):
        stages.append(epilogue.activated(op.attr("activation")))
    if op.attr("softcap"):
        stages.append(epilogue.softcapped(op.attr("softcap")))
    if op.attr("residual"):
        stages.append(epilogue.residual(len(extras)))
        extras.append(lowering.given(rest[-1], (m, n)))
    if len(ops) > 1:
        start = 0
        for o in ops:
            stop = start + lowering.extent(o.operands[1].tensor.shape[0])
            lowering.parts[o.result] = Part(result, start, stop, n)
            start = stop
    weight = lowering.matrix([o.operands[1] for o in ops], k, n)
    scheme = lowering.scheme(op.operands[1])
    tiles, consts = product_tiles(scheme, m, k, n)
    consts["epilogue"] = epilogue.compose(stages)
    kernel = matmul_kn if scheme is None else matmul_scaled
    product = launch(kernel, [rows, *weight, *scales, y, *extras], tiles, consts)
    # A head that is tied is the table of the embeddings.
    name = "+".join(_short(o.operands[1]).replace("embedding", "head") for o in ops)
    read = bytes_of(a.type for a in weight)
    return [*made, ChipCall.of(name, [product], 2 * m * k * n, read)]


def product_tiles(
    scheme: WeightType | None, m: int, k: int, n: int
) -> tuple[dict[str, int], dict[str, object]]:
    """Legal tile sizes of a product with a weight of this scheme, and the consts that say which."""
    tiles = {"bm": tile(m), "bn": tile(n), "bk": tile(k)}
    if scheme is None:
        return tiles, {}
    # Work on the sums of a group grows with the rows, that on its weights doesn't.
    early = 2 * m > scheme.group > 0
    return {**tiles, "bk": max(scheme.group, tiles["bk"])}, {"group": scheme.group, "early": early}


def _short(value: Value) -> str:
    """A weight's own name."""
    return value.name.rsplit(".", 1)[-1]


@lowers_on_chips("gated_linear")
def _gated(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    x, gate, up = ops[0].operands
    m, k = _rows_columns(lowering, x)
    n = lowering.extent(gate.tensor.shape[0])
    weight = lowering.matrix([gate, up], k, 2 * n)
    made, rows, scales = _left(lowering, x, gate)
    arguments = [rows, *weight, *scales, lowering.given(ops[0].result, (m, n))]
    scheme = lowering.scheme(gate)
    tiles, consts = product_tiles(scheme, m, k, n)
    consts["activation"] = activation_function(ops[0].attr("activation") or "identity")
    kernel = gated_linear_kn if scheme is None else gated_linear_scaled
    product, read = launch(kernel, arguments, tiles, consts), bytes_of(a.type for a in weight)
    return [*made, ChipCall.of("gate+up", [product], 4 * m * k * n, read)]


@lowers_on_chips("rms_norm", "layer_norm")
def _norm(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    biased = op.name == "layer_norm"
    x, weight, *rest = op.operands
    m, d = _rows_columns(lowering, x)
    extra = rest[1:] if biased else rest
    kernel: Any = layer_norm if biased else rms_norm

    def arguments(*columns: int) -> list[Argument]:
        """Rows and weights, with their columns in this shape."""
        rows, row = (m, *columns), tuple(columns)
        weights = [lowering.given(v, row) for v in (weight, *(rest[:1] if biased else []))]
        added = [lowering.given(v, rows) for v in extra] if extra else [ABSENT]
        if kernel is rms_norm and len(columns) > 1:
            added = []
        return [lowering.given(x, rows), *weights, *added, lowering.given(op.result, rows)]

    tiles = {"bm": tile(m, 8), "bd": tile(d, 256)}
    launches = [launch(kernel, arguments(d), tiles, {"epsilon": op.attr("eps")})]
    if kernel is layer_norm:
        width = power_of_two(d)
        consts = {"bd": width, "epsilon": op.attr("eps"), "padded": width != d}
        launches.append(launch(layer_norm_rows, arguments(d), {"bm": 1}, consts))
    if kernel is rms_norm and m > 1:
        consts = {"bd": power_of_two(d), "epsilon": op.attr("eps")}
        launches.append(launch(rms_norm_rows, arguments(d), {"bm": 1}, consts))
        consts = {"bd": tile(d, _SUMMED), "epsilon": op.attr("eps")}
        launches.append(launch(rms_norm_sums, arguments(d), {"bm": tile(m, 8)}, consts))
    parts = max(n for n in range(1, _LANES + 1) if d % n == 0)
    if kernel is rms_norm and not extra and parts * 4 >= _LANES:
        consts = {"parts": parts, "columns": d // parts, "epsilon": op.attr("eps")}
        launches.append(launch(rms_norm_folded, arguments(parts, d // parts), {}, consts))
    read = stored_bytes(lowering.type(weight))
    return [ChipCall.of(_short(weight), launches, 4 * m * d, read)]


@lowers_on_chips("embedding")
def _embedding(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    table, tokens = op.operands
    found = _rows_of(lowering, table, tokens, op.result, op.attr("scale"))
    count, width = _rows_columns(lowering, op.result)
    read = stored_bytes(tensor(lowering.type(table).dtype, count, width))
    return [ChipCall.of("embedding", [found], 0, read)]


@lowers_on_chips("gather_rows")
def _gather(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    table, rows = ops[0].operands
    found = _rows_of(lowering, table, rows, ops[0].result, 1.0)
    return [ChipCall.of("gather rows", [found], 0)]


def _rows_of(lowering: ChipLowering, table: Value, rows: Value, y: Value, scale: float) -> Launch:
    """Rows of a table by index lists."""
    count, width = _rows_columns(lowering, y)
    tiles = {"bt": tile(count, 16), "bd": tile(width, 256)}
    lists = {1: lowering.list(rows)}
    result = replace(lowering.given(y), type=tensor(lowering.activation, count, width))
    arguments = [lowering.given(table), lowering.indices(rows), result]
    return launch(gather_rows, arguments, tiles, {"scale": scale}, lists)


@lowers_on_chips("elementwise")
def _elementwise(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    function = elementwise.function_of(op.attr("function"), op.attr("value"))
    return [mapped(lowering, op, op.attr("function"), function)]


def mapped(lowering: ChipLowering, op: Op, name: str, function: Callable[..., Any]) -> ChipCall:
    """An elementwise kernel over operands of any broadcast shapes."""
    given = [lowering.given(v) for v in (op.result, *op.operands)]
    result, *kinds = (lowering.type(v) for v in (op.result, *op.operands))
    rank = len(result.shape)
    single = tuple(
        tuple(a is not b for a, b in zip(k.shape, result.shape[rank - len(k.shape) :], strict=True))
        for k in kinds
    )
    consts: dict[str, object] = {"function": elementwise.apply(function, single, rank)}
    tiles = {"bn": tile(static_extent(result.shape[-1]) or 1, 256)}
    if rank > 1:
        tiles["bm"] = 1
    made = launch(elementwise.KERNELS[rank], given, tiles, consts)
    return ChipCall.of(name, [made], elements(result))


def elements(kind: TensorType) -> int:
    """The elements of a tensor."""
    total = 1
    for extent in kind.shape:
        total *= static_extent(extent) or 1
    return total
