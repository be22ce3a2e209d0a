"""The kernels of attention on chips: rotary embedding, writes to the KV cache, and attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from dure.ir.core import Op, Value
from dure.ir.dtypes import BlockFormat, float32
from dure.ir.types import TensorType, static_extent
from dure.library.attention_columns import attention_columns
from dure.library.attention_grouped import grouped_attention, quantized_attention
from dure.library.attention_rows import attention_rows
from dure.library.attention_split import join_attention, split_attention
from dure.library.call import IndexArray, KernelCall, stored_bytes, tensor
from dure.library.chip_lowering import (
    SUITS,
    ChipCall,
    ChipLowering,
    Launch,
    elements,
    launch,
    lowers_on_chips,
)
from dure.library.chip_tensors import ABSENT, Argument, Operand, Stored
from dure.library.embedding import gather_rows
from dure.library.kv_quantized import kv_write_quantized, rope_kv_write_quantized
from dure.library.operators_common import power_of_two, tile
from dure.library.rope import kv_write, rope, rope_kv_write
from dure.library.rope_whole import rope_whole, rope_whole_kv_write
from dure.machine.chip import Chip

#: Keys of a piece of attention, and queries of a tile, at most; the compiler chooses.
_PIECE, _QUERIES = 256, 16
#: Keys of a run, at least, and which argument has the lengths of sequences that are cut in runs.
_LEAST, _CONTEXT = 64, 7
#: Rows of queries by which tiles along rows start.
_ROWS = 512
#: Tokens that are enough for kernels that work on many side by side.
_MANY = 128

#: Queries lie along columns where several tiles fill an instruction, and along rows where engines
#: do several ops in one pass: there the matrix engine also turns keys, which are turned ahead.
SUITS["attention_columns"] = lambda call, chip: bool(chip.bundles)
SUITS["attention_rows"] = lambda call, chip: chip.passes


def _turns_well(call: KernelCall, chip: Chip) -> bool:
    # A stored kernel is one form, which doesn't say which.
    return call.consts.get("ahead", 0) != (1 if chip.passes else 2)


SUITS["grouped_attention"] = SUITS["quantized_attention"] = _turns_well


def _shares_well(call: KernelCall, chip: Chip) -> bool:
    # As many runs as there are cores for, and keys.
    kind, splits = call.types[0], cast(int, call.consts["splits"])
    assert kind is not None
    tokens, heads, *_ = (static_extent(e) or 1 for e in kind.shape)
    cores, longest = tokens * heads * splits, int(call.indices[_CONTEXT].max())
    every = chip.cores.base < 2 * cores or longest < 2 * splits * _LEAST
    return cores <= chip.cores.base and every and _turns_well(call, chip)


SUITS["split_attention"] = _shares_well


def _heads(lowering: ChipLowering, op: Op, x: Value, table: Value) -> dict[str, object]:
    half, size = lowering.extent(table.tensor.shape[1]), lowering.extent(x.tensor.shape[2])
    rest = size - 2 * half
    return {
        "half": power_of_two(half),
        "rest": power_of_two(rest) if rest else 0,
        "interleaved": op.attr("order") == "llama",
        "epsilon": op.attr("eps"),
    }


def _tables(
    lowering: ChipLowering, tables: Sequence[Value], positions: Value
) -> Iterator[list[Argument]]:
    """Rope's tables, and the positions by which tokens choose their rows.  Of many tokens, whose
    rows take as many descriptors, before that the rows themselves, gathered once for all layers,
    without positions.
    """
    (tokens,) = (lowering.extent(e) for e in positions.tensor.shape)
    if tokens >= _MANY:
        yield [*(_gathered(lowering, table, positions, tokens) for table in tables), ABSENT]
    yield [*map(lowering.given, tables), lowering.indices(positions)]


def _gathered(lowering: ChipLowering, table: Value, positions: Value, tokens: int) -> Argument:
    """The tokens' rows of a table."""
    if (table, positions) not in lowering.first:
        width = lowering.extent(table.tensor.shape[1])
        kind = tensor(table.tensor.dtype, tokens, width)
        value = Value(kind)
        rows = Argument(kind, Operand(Stored((value,))))
        arguments = [lowering.given(table), lowering.indices(positions), rows]
        tiles = {"bt": tile(tokens, 16), "bd": tile(width, 256)}
        made = launch(gather_rows, arguments, tiles, lists={1: lowering.list(positions)})
        found = replace(ChipCall.of(f"rows of {table.name}", [made], 0), spare=value)
        lowering.first[table, positions] = found, rows
    return lowering.first[table, positions][1]


@lowers_on_chips("rope")
def _rope(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    x, cosines, sines, positions, *norm = op.operands
    kind = lowering.type(x)
    weight = lowering.given(norm[0]) if norm else ABSENT
    heads = static_extent(kind.shape[1]) or 1
    made: list[Launch] = []
    consts = _heads(lowering, op, x, cosines)
    whole = _turns_whole(consts, kind)
    for tables in _tables(lowering, (cosines, sines), positions):
        arguments = [lowering.given(x), *tables, weight, lowering.given(op.result)]
        lists = {} if tables[-1] is ABSENT else {3: lowering.list(positions)}
        if lists or not whole:
            tiles = {"bt": 1, "bh": tile(heads, 8)}
            made.append(launch(rope, arguments, tiles, consts, lists))
        for joined in ((1, 2) if heads % 2 == 0 else (1,)) if whole else ():
            own = {"half": consts["half"], "epsilon": consts["epsilon"], "joined": joined}
            tiles = {"bt": 1, "bh": max(joined, tile(heads, 8))}
            made.append(launch(rope_whole, arguments, tiles, own, lists))
    return [ChipCall.of("rope", made, 3 * elements(kind))]


@lowers_on_chips("kv_write")
def _kv_write(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    pool, x, slots, *rest = op.operands
    lowering.pools.add(op.result)
    lowering.same[op.result] = pool
    kind = lowering.type(x)
    heads, size = (static_extent(e) or 1 for e in kind.shape[1:])
    kept = _pool(lowering, pool)
    written = sum(_row_bytes(part) for part in kept) * (static_extent(kind.shape[0]) or 1)
    quantized, first = len(kept) > 1, len(kept) + 1
    lists = {first: lowering.list(slots)}
    updates = tuple(range(len(kept)))
    arguments = [*kept, lowering.given(x), lowering.indices(slots)]
    consts: dict[str, object] = {} if quantized else {"heads_first": True}
    if not op.attr("order"):
        tiles = {"bt": 1, "bh": tile(heads, 8)}
        if quantized:
            consts["bd"] = power_of_two(size)
        else:
            tiles["bd"] = tile(size, 256)
        kernel = kv_write_quantized if quantized else kv_write
        made = launch(kernel, arguments, tiles, consts, lists, unique=(first,), updates=updates)
        return [ChipCall.of("kv write", [made], 0, 0, written)]
    cosines, sines, positions, *norm = rest
    weight = lowering.given(norm[0]) if norm else ABSENT
    tiles = {"bt": 1, "bh": tile(heads, 8)}
    consts |= _heads(lowering, op, x, cosines)
    whole = not quantized and _turns_whole(consts, kind)
    kernel = rope_kv_write_quantized if quantized else rope_kv_write
    own = {name: consts[name] for name in ("half", "epsilon", "heads_first") if name in consts}
    found: list[Launch] = []
    for tables in _tables(lowering, (cosines, sines), positions):
        given = [*arguments, *tables, weight]
        places = dict(lists)
        if tables[-1] is not ABSENT:
            places[first + 3] = lowering.list(positions)
        more = {"unique": (first,), "updates": updates}
        if tables[-1] is not ABSENT or not whole:
            found.append(launch(kernel, given, tiles, consts, places, **more))
        if whole:
            found.append(launch(rope_whole_kv_write, given, tiles, own, places, **more))
    return [ChipCall.of("rope, kv write", found, 3 * elements(kind), 0, written)]


def _turns_whole(consts: Mapping[str, object], kind: TensorType) -> bool:
    """Whether many heads of this type turn as a whole, in 16 bits and the order of halves: one
    token's few don't make up for a product.
    """
    plain = not consts["rest"] and not consts["interleaved"]
    tokens, _, size = (static_extent(e) or 1 for e in kind.shape)
    known = not isinstance(kind.dtype, BlockFormat) and kind.dtype.bits == 16
    return plain and known and tokens >= _MANY and size == power_of_two(size)


def _pool(lowering: ChipLowering, pool: Value) -> list[Argument]:
    """A pool (slots, heads, D) as it lies on a chip: (heads, slots, D), or its codes and scales."""
    found = lowering.given(pool, form="heads_first")
    assert found.type is not None and found.operand is not None
    slots, heads, size = (static_extent(e) or 1 for e in found.type.shape)
    if lowering.kv is None:
        return [replace(found, type=tensor(found.type.dtype, heads, slots, size))]
    stored = replace(found.operand.stored, form="pool_codes", weights=lowering.kv)
    codes = Argument(tensor(lowering.kv.code, heads, slots, size), Operand(stored))
    if lowering.kv.code.is_float:
        return [codes]
    scales = Operand(replace(stored, form="pool_scales"))
    return [codes, Argument(tensor(lowering.kv.scale, heads, slots, 1), scales)]


def _row_bytes(pool: Argument) -> int:
    """Bytes of a slot in a pool, all heads together."""
    assert pool.type is not None
    heads, _, size = pool.type.shape
    return stored_bytes(replace(pool.type, shape=(heads, size)))


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
    }
    heads_shape = (tokens, groups, group, size)
    pools = [_pool(lowering, p) if cached else [lowering.given(p)] for p in (k_pool, v_pool)]
    # Keys and values, then the scales of both.
    caches = [part for both in zip(*pools, strict=True) for part in both]
    sink = lowering.given(sinks[0], (groups, group, 1)) if sinks else ABSENT
    piece = max(page, op.attr("query_rows"), tile(longest, _PIECE))
    tiles = {"bq": tile(most, _QUERIES), "bh": 1, "piece": piece}
    places = [lowering.indices(v) for v in op.operands[3:9]]
    y = lowering.given(op.result, heads_shape)
    arguments = [lowering.given(q, heads_shape), *caches, *places, sink, y]
    seen, read = _seen(op, lists)
    kernel = grouped_attention
    if len(caches) > 2:
        kernel, lists = quantized_attention, {n + 2: found for n, found in lists.items()}
    else:
        consts["heads_first"] = cached
    forms = (0, 1, 2) if longest > page else (0,)
    made = [launch(kernel, arguments, tiles, {**consts, "ahead": ahead}, lists) for ahead in forms]
    if most > page and cached and kernel is grouped_attention:
        side = {name: consts[name] for name in consts if name != "heads_first"}
        side["pages"] = lists[4][0].shape[1]
        # Tiles of queries of a longer item than a piece don't lie in two, if it starts at one.
        side["aligned"] = int(np.gcd.reduce(lists[3][0][lists[7][0]])) or side["rows"]
        queries = tile(most, max(1, _ROWS // power_of_two(group)))
        start = {"bq": queries, "bh": 1, "piece": max(page, queries, tile(longest, _PIECE))}
        side["early"] = int(np.gcd.reduce(lists[8][0])) % queries == 0
        table, low, high = lists[4]
        flat = {**lists, 4: (table.reshape(-1), low, high)}
        made.append(launch(attention_rows, arguments, start, side, flat))
    parts = next((n for n in (4, 2) if groups % n == 0), 0)
    if parts and most >= _MANY and cached and kernel is grouped_attention:
        del consts["heads_first"]
        made.append(launch(attention_columns, arguments, tiles, {**consts, "parts": parts}, lists))
    moved = read * sum(map(_row_bytes, caches)) if cached else 0
    found = ChipCall.of("attention", made, 4 * heads * size * seen, 0, moved)
    if most > 1 or not cached:
        return [found]
    given = [arguments[0], *caches, *[ABSENT] * (4 - len(caches)), *places[:5]]
    shift = 0 if kernel is quantized_attention else 2
    kept = {n + shift: found for n, found in lists.items() if n + shift < len(given)}
    own = {name: consts[name] for name in consts if name not in ("rows", "heads_first")}
    sizes = {"bh": 1, "piece": piece}
    ways = _shared(given, sink, y, longest, (sizes, own, kept))
    return [replace(found, chains=tuple(ways))]


def _shared(
    given: Sequence[Argument],
    sink: Argument,
    y: Argument,
    longest: int,
    how: tuple[Mapping[str, int], Mapping[str, object], Mapping[int, tuple[IndexArray, int, int]]],
) -> Iterator[tuple[Launch, ...]]:
    """The ways in which cores share the keys of a token: in 2, 4, 8 and more runs."""
    assert y.type is not None
    tokens, groups, group, size = (static_extent(e) or 1 for e in y.type.shape)
    tiles, consts, lists = how
    page, splits = int(cast(int, consts["page"])), 2
    while splits * _LEAST <= longest:
        kinds = [tensor(float32, tokens, groups, splits, group, n) for n in (1, 1, size)]
        parts = [Argument(kind, Operand(Stored((Value(kind),)))) for kind in kinds]
        piece = max(page, min(tiles["piece"], power_of_two(longest) // splits))
        own = {**consts, "splits": splits}
        sizes = {"bg": consts["bg"], "bd": consts["bd"], "splits": splits}
        joined = launch(join_attention, [*parts, sink, y], {"bh": 1, "bs": 1}, sizes)
        for ahead in (0, 1, 2) if longest > splits * page else (0,):
            form, sizes = {**own, "ahead": ahead}, {**tiles, "piece": piece}
            yield launch(split_attention, [*given, *parts], sizes, form, lists), joined
        splits *= 2


def _seen(op: Op, lists: Mapping[int, tuple[IndexArray, int, int]]) -> tuple[int, int]:
    """Keys that the queries of attention see, each by itself, and that they read together."""
    window = op.attr("window")
    if op.attr("causal"):
        seen = sum(min(int(p) + 1, window or int(p) + 1) for p in lists[3][0])
    else:
        items = zip(lists[6][0], lists[8][0], strict=True)
        seen = sum(int(lists[5][0][of]) * int(count) for of, count in items)
    # A window of each new position, which overlap.
    new = np.bincount(lists[6][0], lists[8][0], len(lists[5][0])).astype(int)
    pairs = zip(lists[5][0], new, strict=True)
    return seen, sum(min(int(c), window + int(n) - 1 if window else int(c)) for c, n in pairs)
