"""Which kernel computes which tensor op, with which tile sizes (see :mod:`dure.ir.lowering`).

Tile sizes along K, along a normalised row and along keys fix the order in which numbers are added,
so they depend on those extents alone; sizes along rows and columns of the result are free, and have
variants that a step chooses among by its number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dure.errors import IRError
from dure.ir.core import Function, Op, Value
from dure.ir.dtypes import BlockFormat, bfp9_block32, float32
from dure.ir.expr import Const, Expr, as_expr, compare, const, logic
from dure.ir.lowering import Launch, LoweringContext, Updated, Variant, lowers
from dure.ir.types import TensorType, static_extent
from dure.library import elementwise, epilogue
from dure.library.activation import activation_function
from dure.library.attention import paged_attention
from dure.library.attention_runs import attention_runs, join_runs
from dure.library.conv import conv2d
from dure.library.embedding import embedding, gather_rows
from dure.library.matmul import batched_matmul, gated_linear, matmul
from dure.library.norm import layer_norm, rms_norm, softmax
from dure.library.rope import kv_write, rope, rope_kv_write
from dure.library.sampling import argmax, top_k

#: (most rows, bm, most of bn) of the variants of a matmul; the last one takes any number of rows.
#: What a tile copies to multiply it many times (rows to panels, panels to rows) is copied for every
#: tile: large ones do so less often, as long as there are several for each worker.
MATMUL_VARIANTS: tuple[tuple[int, int, int], ...] = (
    (1, 1, 32),
    (8, 8, 32),
    (128, 64, 64),
    (0, 128, 256),
)
#: The same where activations are block floating point: weights are rounded to it for every tile, so
#: that one is tall, and as wide as tile registers take at once.
BFP_VARIANTS: tuple[tuple[int, int, int], ...] = ((1, 1, 32), (8, 8, 32), (0, 256, 32))
#: Keys of one piece of attention, the same for prefill and decode.
ATTENTION_PIECE = 64
#: Runs into which the keys of a token fall, each summed by itself.
ATTENTION_RUNS = 4
#: At most so many tokens are so few that workers share the keys of each.
SHARED_ITEMS = 8
_QUANTUM = 32


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(value - 1, 0).bit_length()


def block_of(extent: Expr, least: int = 1, most: int = 256) -> int:
    """A tile size for walking ``extent``: the largest power of two that divides it.

    Where that is below 32, a power of two that covers it, cut at the edge.  Within [least, most].
    """
    size = static_extent(extent)
    if size is None:
        return max(least, min(most, 64))
    dividing = size & -size if size else 1
    if dividing < _QUANTUM:
        return max(least, min(most, 128, power_of_two(max(size, 1))))
    return max(least, min(most, dividing))


def even_block(extent: Expr, most: int) -> int:
    """A tile size of at most ``most`` for walking ``extent`` in tiles as even as they can be."""
    size = static_extent(extent)
    if not size:
        return most
    pieces = -(-size // most)
    return -(-size // (pieces * _QUANTUM)) * _QUANTUM


def _axes(op: Op, position: int, expected: int) -> TensorType:
    """The type of an operand that the kernels take with so many axes."""
    found = op.operands[position].tensor
    if found.rank != expected:
        raise IRError(
            f"{op.name} of {found}",
            where="" if op.span is None else op.span.render(),
            rule=f"the library computes {op.name} of tensors of {expected} axes",
            fix="reshape the operand before it and the result after it",
        )
    return found


_SPECIALIZED: dict[object, Function] = {}


def _specialize(
    kernel: Any, types: Sequence[TensorType | None], consts: Mapping[str, object]
) -> Function:
    """The kernel for these types; the same request gives the same function."""
    key = (kernel, tuple(types), tuple(sorted(consts.items(), key=lambda item: item[0])))
    found = _SPECIALIZED.get(key)
    if found is None:
        found = _SPECIALIZED[key] = kernel.specialize(types, consts)
    return found


def _updating(function: Function) -> Function:
    """The kernel with its first parameter updated in place: it writes only some of its rows."""
    first = replace(function.params[0], access="inout")
    return replace(function, params=(first, *function.params[1:]))


def _types(values: Sequence[Value | None]) -> list[TensorType | None]:
    return [None if value is None else value.tensor for value in values]


def launch(kernel: Any, values: Sequence[Value | None], **consts: object) -> list[Launch]:
    """One launch of one variant; None stands for an absent tensor."""
    function = _specialize(kernel, _types(values), consts)
    return [Launch([v for v in values if v is not None], [Variant(function)])]


def _row_variants(
    op: Op,
    kernel: Any,
    values: Sequence[Value | None],
    rows: Expr,
    consts: Mapping[str, object],
) -> list[Launch]:
    """A launch with the variants of :data:`MATMUL_VARIANTS` that ``rows`` can need."""
    variants: list[Variant] = []
    columns = op.result.tensor.shape[-1]
    in_bfp = op.operands[0].tensor.block is bfp9_block32
    for most, bm, widest in BFP_VARIANTS if in_bfp else MATMUL_VARIANTS:
        guard = compare("<=", rows, most) if most else const(1)
        if isinstance(guard, Const) and not guard.value:
            continue
        tile = {"bm": bm, "bn": even_block(columns, widest)}
        function = _specialize(kernel, _types(values), {**consts, **tile})
        variants.append(Variant(function, guard))
        if isinstance(guard, Const):
            break
    return [Launch([v for v in values if v is not None], variants)]


def k_block(x: TensorType, w: TensorType) -> int:
    formats = [t.dtype.block for t in (x, w) if isinstance(t.dtype, BlockFormat)]
    return block_of(x.shape[-1], least=max(formats, default=1))


def _activation(name: str) -> Callable[[Any], Any]:
    return activation_function(name or "identity")


@lowers("linear")
def lower_linear(op: Op, context: LoweringContext) -> list[Launch]:
    """A matmul; its epilogue is scale, bias, activation, soft cap, residual, in this order."""
    x, w, *rest = op.operands
    rows = _axes(op, 0, 2).shape[0]
    stages: list[epilogue.Epilogue] = []
    if op.attr("scale") != 1.0:
        stages.append(epilogue.scaled(op.attr("scale")))
    if op.attr("bias"):
        stages.append(epilogue.bias(0))
    if op.attr("activation"):
        stages.append(epilogue.activated(op.attr("activation")))
    if op.attr("softcap"):
        stages.append(epilogue.softcapped(op.attr("softcap")))
    if op.attr("residual"):
        stages.append(epilogue.residual(1 if op.attr("bias") else 0))
    consts = {"bk": k_block(x.tensor, w.tensor), "epilogue": epilogue.compose(stages)}
    return _row_variants(op, matmul, [x, w, op.result, *rest], rows, consts)


@lowers("gated_linear")
def lower_gated_linear(op: Op, context: LoweringContext) -> list[Launch]:
    """Both products and the gate in one kernel."""
    x, gate, up = op.operands
    rows = _axes(op, 0, 2).shape[0]
    block = max(k_block(x.tensor, gate.tensor), k_block(x.tensor, up.tensor))
    consts = {"bk": block, "activation": _activation(op.attr("activation"))}
    return _row_variants(op, gated_linear, [x, gate, up, op.result], rows, consts)


@lowers("batched_matmul")
def lower_batched_matmul(op: Op, context: LoweringContext) -> list[Launch]:
    """(B, M, K) times (B, K, N)."""
    a, b = op.operands
    consts = {"bk": block_of(a.tensor.shape[2]), "transposed": False}
    return _row_variants(op, batched_matmul, [a, b, op.result], a.tensor.shape[1], consts)


@lowers("conv2d")
def lower_conv2d(op: Op, context: LoweringContext) -> list[Launch]:
    """A dot for each tap."""
    x, w, *bias = op.operands
    columns = static_extent(op.result.tensor.shape[2]) or 16
    stride, padding, dilation = op.attr("stride"), op.attr("padding"), op.attr("dilation")
    return launch(
        conv2d,
        [x, w, bias[0] if bias else None, op.result],
        bh=1,
        bw=min(16, power_of_two(columns)),
        bo=min(64, power_of_two(static_extent(w.tensor.shape[0]) or 64)),
        bc=block_of(w.tensor.shape[3], most=64),
        stride_h=stride[0],
        stride_w=stride[1],
        pad_h=padding[0],
        pad_w=padding[1],
        dilation_h=dilation[0],
        dilation_w=dilation[1],
    )


@lowers("rms_norm")
def lower_rms_norm(op: Op, context: LoweringContext) -> list[Launch]:
    """A row an instance."""
    x, weight, *rest = op.operands
    columns = block_of(_axes(op, 0, 2).shape[1])
    values = [x, weight, rest[0] if rest else None, op.result]
    return launch(rms_norm, values, bm=1, bd=columns, epsilon=op.attr("eps"))


@lowers("layer_norm")
def lower_layer_norm(op: Op, context: LoweringContext) -> list[Launch]:
    """A row an instance."""
    x, weight, bias, *rest = op.operands
    columns = block_of(_axes(op, 0, 2).shape[1])
    values = [x, weight, bias, rest[0] if rest else None, op.result]
    return launch(layer_norm, values, bm=1, bd=columns, epsilon=op.attr("eps"))


@lowers("softmax")
def lower_softmax(op: Op, context: LoweringContext) -> list[Launch]:
    """A row an instance."""
    columns = block_of(_axes(op, 0, 2).shape[1])
    return launch(softmax, [op.operands[0], op.result], bm=1, bd=columns)


def _head_consts(op: Op, x: Value, table: Value) -> dict[str, object]:
    """Tile sizes of the rope kernels."""
    half = static_extent(table.tensor.shape[1])
    size = static_extent(x.tensor.shape[2])
    assert half is not None and size is not None
    rest = size - 2 * half
    return {
        "bt": 1,
        "bh": 1,
        "half": power_of_two(half),
        "rest": power_of_two(rest) if rest else 0,
        "interleaved": op.attr("order") == "llama",
        "epsilon": op.attr("eps"),
    }


@lowers("rope")
def lower_rope(op: Op, context: LoweringContext) -> list[Launch]:
    """One head of one token an instance."""
    x, cosines, sines, positions, *norm = op.operands
    values = [x, cosines, sines, positions, norm[0] if norm else None, op.result]
    return launch(rope, values, **_head_consts(op, x, cosines))


@lowers("kv_write")
def lower_kv_write(op: Op, context: LoweringContext) -> list[Launch]:
    """A scatter of rows, with rope before it where the op asks for it."""
    pool, x, slots, *rest = op.operands
    donated = Updated(pool, op.result)
    if not op.attr("order"):
        size = static_extent(x.tensor.shape[2])
        assert size is not None
        consts: dict[str, object] = {"bt": 1, "bh": 1, "bd": power_of_two(size)}
        function = _specialize(kv_write, _types([pool, x, slots]), consts)
        return [Launch([donated, x, slots], [Variant(_updating(function))])]
    cosines, sines, positions, *norm = rest
    values = [pool, x, slots, cosines, sines, positions, norm[0] if norm else None]
    function = _specialize(rope_kv_write, _types(values), _head_consts(op, x, cosines))
    arguments = [donated, *(v for v in values[1:] if v is not None)]
    return [Launch(arguments, [Variant(_updating(function))])]


@lowers("attention")
def lower_attention(op: Op, context: LoweringContext) -> list[Launch]:
    """Paged attention; a head whose size is no power of two is quantized in a launch of its own."""
    size = static_extent(op.operands[0].tensor.shape[2])
    assert size is not None
    result = op.result
    if op.attr("quantize") and (power_of_two(size) != size or size % _QUANTUM):
        result = context.temporary(TensorType(op.result.tensor.shape, float32), "attention")
    launches = _attention(op, result, context)
    return launches if result is op.result else launches + mapped(_same, [result], op.result)


def _attention(op: Op, result: Value, context: LoweringContext) -> list[Launch]:
    """A work item and KV head an instance, or, where there are only few tokens, a run of its keys
    an instance.
    """
    consts, heads = _attention_consts(op)
    sinks = op.operands[9] if op.attr("sinks") else None
    work = op.operands[6]
    tokens, items = op.operands[0].tensor.shape[0], work.tensor.shape[0]
    few = logic("and", compare("<=", tokens, items), compare("<=", items, SHARED_ITEMS))
    many = logic("or", compare("<", items, tokens), compare("<", SHARED_ITEMS, items))
    alone = context.temporary(result.tensor, "attention")
    values = [*op.operands[:9], sinks, alone]
    whole = _specialize(paged_attention, _types(values), consts)
    extents = items, heads, consts["runs"], consts["group"]
    shape = tuple(map(as_expr, extents))
    sums = [
        context.temporary(TensorType((*shape, as_expr(wide)), float32), name)
        for name, wide in (("highest", 1), ("total", 1), ("weighted", consts["bd"]))
    ]
    apart = [*op.operands[:8], *sums]
    numbers = {n: c for n, c in consts.items() if n not in ("bq", "apart")}
    share = _specialize(attention_runs, _types(apart), numbers)
    joint = [result, *sums, op.operands[7], sinks]
    numbers = {n: consts[n] for n in ("group", "bg", "bd", "runs")}
    size = static_extent(op.operands[0].tensor.shape[2])
    join = _specialize(join_runs, _types(joint), {**numbers, "size": size})
    return [
        Launch([v for v in values if v is not None], [Variant(whole, many)]),
        Launch(apart, [Variant(share, few)], instead=True),
        Launch(
            [Updated(alone, result), *(v for v in joint[1:] if v is not None)],
            [Variant(_updating(join), few)],
        ),
    ]


def _attention_consts(op: Op) -> tuple[dict[str, Any], int]:
    """The consts of paged attention, and the KV heads."""
    q, k_pool = op.operands[0].tensor, op.operands[1].tensor
    heads, groups = static_extent(q.shape[1]), static_extent(k_pool.shape[1])
    size = static_extent(q.shape[2])
    assert heads is not None and groups is not None and size is not None
    page: int = op.attr("page_size")
    if page != power_of_two(page):
        raise IRError(
            f"attention over pages of {page} tokens",
            rule="a page holds a power of two of tokens",
            fix="use a page size of 16 or 32",
        )
    consts = {
        "bq": power_of_two(op.attr("query_rows")),
        "group": heads // groups,
        "bg": power_of_two(heads // groups),
        "bd": power_of_two(size),
        "page": page,
        "piece": max(page, ATTENTION_PIECE),
        "scale": op.attr("scale"),
        "window": op.attr("window"),
        "softcap": op.attr("softcap"),
        "causal": op.attr("causal"),
        "apart": True,
        "runs": ATTENTION_RUNS,
    }
    return consts, groups


def _same(x: Any) -> Any:
    return x


def mapped(function: Callable[..., Any], inputs: Sequence[Value], result: Value) -> list[Launch]:
    """An elementwise kernel over inputs of any broadcast shapes."""
    shape = result.tensor.shape
    rank = len(shape)
    if rank not in elementwise.KERNELS:
        raise IRError(
            f"an elementwise op of {result.type}",
            rule="the library computes elementwise ops of one to four axes",
            fix="reshape the operands before it and the result after it",
        )
    single = tuple(
        tuple(
            extent is not full
            for extent, full in zip(x.tensor.shape, shape[rank - x.tensor.rank :], strict=True)
        )
        for x in inputs
    )
    consts: dict[str, object] = {
        "bn": block_of(shape[-1]),
        "function": elementwise.apply(function, single, rank),
    }
    if rank > 1:
        consts["bm"] = 1
    return launch(elementwise.KERNELS[rank], [result, *inputs], **consts)


@lowers("elementwise")
def lower_elementwise(op: Op, context: LoweringContext) -> list[Launch]:
    """One kernel, whatever the function."""
    function = elementwise.function_of(op.attr("function"), op.attr("value"))
    return mapped(function, op.operands, op.result)


@lowers("quantize_rows")
def lower_quantize(op: Op, context: LoweringContext) -> list[Launch]:
    """An elementwise kernel whose store quantizes."""
    return mapped(_same, op.operands, op.result)


@lowers("embedding")
def lower_embedding(op: Op, context: LoweringContext) -> list[Launch]:
    """A row an instance."""
    table = op.operands[0].tensor
    least = table.block.block if table.block is not None else 1
    columns = block_of(table.shape[1], least)
    return launch(embedding, [*op.operands, op.result], bd=columns, scale=op.attr("scale"))


@lowers("gather_rows")
def lower_gather_rows(op: Op, context: LoweringContext) -> list[Launch]:
    """Rows by index list."""
    columns = block_of(_axes(op, 0, 2).shape[1])
    return launch(gather_rows, [*op.operands, op.result], bt=1, bd=columns)


@lowers("argmax")
def lower_argmax(op: Op, context: LoweringContext) -> list[Launch]:
    """A row an instance."""
    columns = block_of(_axes(op, 0, 2).shape[1])
    return launch(argmax, [op.operands[0], op.result], bm=1, bn=columns)


@lowers("top_k")
def lower_top_k(op: Op, context: LoweringContext) -> list[Launch]:
    """k passes over a row."""
    columns = block_of(_axes(op, 0, 2).shape[1])
    return launch(top_k, [op.operands[0], *op.results], bm=1, bn=columns)
