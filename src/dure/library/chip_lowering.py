"""Which kernel computes which tensor op on a chip, for known sizes (:class:`ChipLowering`).

Matrices lie as (K, N) there: a weight's layout is the chip's, made by its load program.  Linear
layers of one input are one product with their weights side by side; what they give is seen in
parts.  The pools of a KV cache lie as (heads, slots, D), so that a page of a head is one block.
Values between ops are of the step's activation type; sums are float32 inside a kernel.
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
from dure.library.attention_grouped import grouped_attention
from dure.library.call import IndexArray, KernelCall, stored_bytes, tensor
from dure.library.embedding import gather_rows
from dure.library.ffn import gated_linear_kn
from dure.library.matmul import matmul_kn
from dure.library.matmul_scaled import gated_linear_scaled, matmul_scaled
from dure.library.norm import layer_norm, rms_norm, rms_norm_folded
from dure.library.operators_common import call, power_of_two, tile
from dure.library.rope import kv_write, rope, rope_kv_write
from dure.library.weight_types import WeightType

#: Parts of a row that is folded over the lanes of an engine.
_LANES = 128
#: Keys of a piece of attention, and queries of a tile, at most; the compiler chooses.
_PIECE, _QUERIES = 256, 16


@dataclass(frozen=True)
class ChipCall:
    """A launch (of several that compute the same, the fastest is taken), the operations that its
    op's definition needs, and the bytes of weights and of the KV cache that it can't do without.
    """

    name: str
    calls: tuple[KernelCall, ...]
    flops: int
    weight_bytes: int = 0
    kv_bytes: int = 0


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
    weights: WeightType | None = None
    quantized: frozenset[str] = frozenset()

    def region(self, ops: Sequence[Op]) -> list[ChipCall]:
        """The launches of a body's ops, in order."""
        found: list[ChipCall] = []
        done: set[Op] = set()
        for place, op in enumerate(ops):
            if op in done or op.name in ("reshape_tensor", "repeat"):
                continue
            alike = [op]
            if op.name == "linear" and _plain(op):
                alike = [o for o in ops[place:] if _joins(op, o)]
                done.update(alike)
            found += self.lower(alike)
        return found

    def lower(self, ops: Sequence[Op]) -> Sequence[ChipCall]:
        """The launches of an op, or of several linear layers of one input."""
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

    def scheme(self, weight: Value) -> WeightType | None:
        """How a weight is quantized, or None where it lies as numbers."""
        return self.weights if _short(weight) in self.quantized else None

    def list(self, value: Value, *, tight: bool = False) -> tuple[IndexArray, int, int]:
        """An index argument's values and range: the declared one, or that of its values."""
        values = self.made[value] if value in self.made else self.inputs[value.name]
        if tight:
            return values, int(values.min()), int(values.max())
        declared = value.tensor.index
        assert declared is not None
        low, high = (evaluate(e, self.sizes) for e in declared)
        return values, low, high


_Lowering: TypeAlias = Callable[[ChipLowering, Sequence[Op]], Sequence[ChipCall]]
_LOWERINGS: dict[str, _Lowering] = {}


def lowers_on_chips(*names: str) -> Callable[[_Lowering], _Lowering]:
    """Registers the decorated function as what lowers these tensor ops on chips."""

    def register(function: _Lowering) -> _Lowering:
        _LOWERINGS.update(dict.fromkeys(names, function))
        return function

    return register


def _plain(linear: Op) -> bool:
    """A linear layer without an epilogue, but perhaps with a bias."""
    ignored = {"precise", "bias"}
    defaults = linear.definition.defaults
    return all(linear.attr(n) == d for n, d in defaults.items() if n not in ignored)


def _joins(first: Op, other: Op) -> bool:
    """Whether two linear layers are one product."""
    if other.name != "linear" or other.operands[0] is not first.operands[0]:
        return False
    return _plain(other) and other.attr("bias") == first.attr("bias")


def _rows_columns(lowering: ChipLowering, value: Value) -> tuple[int, int]:
    shape = [lowering.extent(e) for e in value.tensor.shape]
    rows = 1
    for extent in shape[:-1]:
        rows *= extent
    return rows, shape[-1]


@lowers_on_chips("linear")
def _linear(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    x, w, *rest = op.operands
    m, k = _rows_columns(lowering, x)
    n = sum(lowering.extent(o.operands[1].tensor.shape[0]) for o in ops)
    kind = lowering.type(x, (m, k))
    stages: list[epilogue.Epilogue] = []
    extras: list[TensorType | None] = []
    if op.attr("scale") != 1.0:
        stages.append(epilogue.scaled(op.attr("scale")))
    if op.attr("bias"):
        stages.append(epilogue.bias(len(extras)))
        extras.append(tensor(rest[0].tensor.dtype, n))
    if op.attr("activation"):
        stages.append(epilogue.activated(op.attr("activation")))
    if op.attr("softcap"):
        stages.append(epilogue.softcapped(op.attr("softcap")))
    if op.attr("residual"):
        stages.append(epilogue.residual(len(extras)))
        extras.append(tensor(kind.dtype, m, n))
    weight, scheme = matrix(lowering, w, k, n), lowering.scheme(w)
    types = [kind, *weight, tensor(kind.dtype, m, n), *extras]
    tiles, consts = scaled_tiles(scheme, m, k, n)
    kernel = matmul_kn if scheme is None else matmul_scaled
    launch = call(kernel, types, tiles, {**consts, "epilogue": epilogue.compose(stages)})
    # A head that is tied is the table of the embeddings.
    name = "+".join(_short(o.operands[1]).replace("embedding", "head") for o in ops)
    return [ChipCall(name, (launch,), 2 * m * k * n, sum(map(stored_bytes, weight)))]


def matrix(
    lowering: ChipLowering, weight: Value, k: int, n: int, *lead: int
) -> tuple[TensorType, ...]:
    """The types of a weight matrix (K, N) on a chip: its numbers, or its codes and scales."""
    scheme = lowering.scheme(weight)
    if scheme is None:
        return (tensor(weight.tensor.dtype, *lead, k, n),)
    return scheme.types(k, n, *lead)


def scaled_tiles(
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
    x, gate, _ = ops[0].operands
    m, k = _rows_columns(lowering, x)
    n = lowering.extent(gate.tensor.shape[0])
    kind = lowering.type(x, (m, k))
    weight, scheme = matrix(lowering, gate, k, 2 * n), lowering.scheme(gate)
    tiles, consts = scaled_tiles(scheme, m, k, n)
    consts["activation"] = activation_function(ops[0].attr("activation") or "identity")
    kernel = gated_linear_kn if scheme is None else gated_linear_scaled
    launch = call(kernel, [kind, *weight, tensor(kind.dtype, m, n)], tiles, consts)
    return [ChipCall("gate+up", (launch,), 4 * m * k * n, sum(map(stored_bytes, weight)))]


@lowers_on_chips("rms_norm", "layer_norm")
def _norm(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    biased = op.name == "layer_norm"
    x, weight, *rest = op.operands
    m, d = _rows_columns(lowering, x)
    kind = lowering.type(x, (m, d))
    extra = rest[1:] if biased else rest
    kinds = [kind, lowering.type(weight), *([lowering.type(rest[0])] if biased else [])]
    types = [*kinds, kind if extra else None, kind]
    tiles = {"bm": tile(m, 8), "bd": tile(d, 256)}
    kernel: Any = layer_norm if biased else rms_norm
    launch = call(kernel, types, tiles, {"epsilon": op.attr("eps")})
    calls = [launch]
    if kernel is rms_norm and not extra and d % _LANES == 0:
        folded = [tensor(k.dtype, *lead, _LANES, d // _LANES) for k, lead in zip(
            (kind, kinds[1], kind), ((m,), (), (m,)), strict=True)]  # fmt: skip
        consts = {"parts": _LANES, "columns": d // _LANES, "epsilon": op.attr("eps")}
        calls.append(call(rms_norm_folded, folded, {}, consts))
    return [ChipCall(_short(weight), tuple(calls), 4 * m * d, stored_bytes(lowering.type(weight)))]


def _heads(lowering: ChipLowering, op: Op, x: Value, table: Value) -> dict[str, object]:
    half, size = lowering.extent(table.tensor.shape[1]), lowering.extent(x.tensor.shape[2])
    rest = size - 2 * half
    return {
        "half": power_of_two(half),
        "rest": power_of_two(rest) if rest else 0,
        "interleaved": op.attr("order") == "llama",
        "epsilon": op.attr("eps"),
    }


@lowers_on_chips("rope")
def _rope(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    x, cosines, sines, positions, *norm = op.operands
    kind = lowering.type(x)
    weight = lowering.type(norm[0]) if norm else None
    types = [kind, lowering.type(cosines), lowering.type(sines), None, weight, kind]
    heads = static_extent(kind.shape[1]) or 1
    tiles = {"bt": 1, "bh": tile(heads, 8)}
    lists = {3: lowering.list(positions)}
    launch = call(rope, types, tiles, _heads(lowering, op, x, cosines), lists)
    return [ChipCall("rope", (launch,), 3 * _elements(kind))]


@lowers_on_chips("kv_write")
def _kv_write(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    pool, x, slots, *rest = op.operands
    lowering.pools.add(op.result)
    kind = lowering.type(x)
    heads, size = (static_extent(e) or 1 for e in kind.shape[1:])
    kept = _heads_first(lowering.type(pool))
    written = stored_bytes(replace(kept, shape=kind.shape))
    lists = {2: lowering.list(slots)}
    if not op.attr("order"):
        tiles = {"bt": 1, "bh": tile(heads, 8), "bd": tile(size, 256)}
        types, consts = [kept, kind, None], {"heads_first": True}
        launch = call(kv_write, types, tiles, consts, lists, unique=(2,), updates=(0,))
        return [ChipCall("kv write", (launch,), 0, 0, written)]
    cosines, sines, positions, *norm = rest
    weight = lowering.type(norm[0]) if norm else None
    types = [kept, kind, None, lowering.type(cosines), lowering.type(sines), None, weight]
    tiles = {"bt": 1, "bh": tile(heads, 8)}
    lists[5] = lowering.list(positions)
    consts = {**_heads(lowering, op, x, cosines), "heads_first": True}
    launch = call(rope_kv_write, types, tiles, consts, lists, unique=(2,), updates=(0,))
    return [ChipCall("rope, kv write", (launch,), 3 * _elements(kind), 0, written)]


def _heads_first(pool: TensorType) -> TensorType:
    """The type of a pool (slots, heads, D) as it lies on a chip."""
    slots, heads, size = pool.shape
    return replace(pool, shape=(heads, slots, size))


@lowers_on_chips("attention")
def _attention(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    q, k_pool, v_pool, positions, table, context, sequence, start, rows, *sinks = op.operands
    kind, pool = lowering.type(q), lowering.type(k_pool)
    tokens, heads, size = (static_extent(e) or 1 for e in kind.shape)
    groups = static_extent(pool.shape[1]) or 1
    group, page = heads // groups, int(op.attr("page_size"))
    # Keys and values that the step itself makes are no cache, and lie as they were made.
    cached = k_pool in lowering.pools
    lists = {
        3: lowering.list(positions),
        # Every page is there: nothing that a load leaves out has to be filled in.
        4: lowering.list(table, tight=True),
        5: lowering.list(context),
        6: lowering.list(sequence),
        7: lowering.list(start),
        8: lowering.list(rows, tight=True),
    }
    longest, most = int(lists[5][0].max()), int(lists[8][0].max())
    consts = {
        "rows": op.attr("query_rows"),
        "bg": power_of_two(group),
        "bd": power_of_two(size),
        "page": page,
        "scale": op.attr("scale"),
        "window": op.attr("window"),
        "softcap": op.attr("softcap"),
        "causal": op.attr("causal"),
        "heads_first": cached,
    }
    queries = tensor(kind.dtype, tokens, groups, group, size)
    pools = [_heads_first(p) if cached else p for p in (pool, lowering.type(v_pool))]
    sink = lowering.type(sinks[0], (groups, group, 1)) if sinks else None
    tiles = {"bq": tile(most, _QUERIES), "bh": 1, "piece": max(page, tile(longest, _PIECE))}
    types = [queries, *pools, *[None] * 6, sink, queries]
    launch = call(grouped_attention, types, tiles, consts, lists)
    seen, read = _seen(op, lists)
    moved = 2 * stored_bytes(tensor(pool.dtype, read, groups, size)) if cached else 0
    return [ChipCall("attention", (launch,), 4 * heads * size * seen, 0, moved)]


def _seen(op: Op, lists: Mapping[int, tuple[IndexArray, int, int]]) -> tuple[int, int]:
    """Keys that the queries of attention see, each by itself, and that they read together."""
    window = op.attr("window")
    if op.attr("causal"):
        seen = sum(min(int(p) + 1, window or int(p) + 1) for p in lists[3][0])
    else:
        items = zip(lists[6][0], lists[8][0], strict=True)
        seen = sum(int(lists[5][0][of]) * int(count) for of, count in items)
    return seen, sum(min(int(c), window or int(c)) for c in lists[5][0])


@lowers_on_chips("embedding")
def _embedding(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    table, tokens = op.operands
    found = _rows_of(lowering, table, tokens, op.result, op.attr("scale"))
    count, width = _rows_columns(lowering, op.result)
    read = stored_bytes(tensor(lowering.type(table).dtype, count, width))
    return [ChipCall("embedding", (found,), 0, read)]


@lowers_on_chips("gather_rows")
def _gather(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    table, rows = ops[0].operands
    return [ChipCall("gather rows", (_rows_of(lowering, table, rows, ops[0].result, 1.0),), 0)]


def _rows_of(
    lowering: ChipLowering, table: Value, rows: Value, y: Value, scale: float
) -> KernelCall:
    """Rows of a table by index lists."""
    count, width = _rows_columns(lowering, y)
    result = tensor(lowering.activation, count, width)
    tiles = {"bt": tile(count, 16), "bd": tile(width, 256)}
    lists = {1: lowering.list(rows)}
    types = [lowering.type(table), None, result]
    return call(gather_rows, types, tiles, {"scale": scale}, lists)


@lowers_on_chips("elementwise")
def _elementwise(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    function = elementwise.function_of(op.attr("function"), op.attr("value"))
    return [mapped(lowering, op, op.attr("function"), function)]


def mapped(lowering: ChipLowering, op: Op, name: str, function: Callable[..., Any]) -> ChipCall:
    """An elementwise kernel over operands of any broadcast shapes."""
    result = lowering.type(op.result)
    rank = len(result.shape)
    kinds = [lowering.type(o) for o in op.operands]
    single = tuple(
        tuple(a is not b for a, b in zip(k.shape, result.shape[rank - len(k.shape) :], strict=True))
        for k in kinds
    )
    consts: dict[str, object] = {"function": elementwise.apply(function, single, rank)}
    tiles = {"bn": tile(static_extent(result.shape[-1]) or 1, 256)}
    if rank > 1:
        tiles["bm"] = 1
    launch = call(elementwise.KERNELS[rank], [result, *kinds], tiles, consts)
    return ChipCall(name, (launch,), _elements(result))


def _elements(kind: TensorType) -> int:
    total = 1
    for extent in kind.shape:
        total *= static_extent(extent) or 1
    return total
