"""The value simulator: hand-written machine programs against NumPy, over shapes and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import Program, copy_program, matmul_program, number, toy_chip

from dure.errors import IRError, TargetError
from dure.ir import dtypes
from dure.ir.blocks import Blocks
from dure.ir.core import Function, Region, Value
from dure.ir.dtypes import Array
from dure.ir.pack import plane_shape
from dure.sim.storage import with_sums
from dure.sim.values import run_values

CHIP = toy_chip()
PARTITIONED = toy_chip(
    memories__rows={
        "scope": "core",
        "size": number(1, "MiB"),
        "alignment": number(64, "B"),
        "partitions": number(128),
    },
    memories__common={"scope": "chip", "size": number(64, "KiB"), "alignment": number(64, "B")},
)
SEEDS = range(4)


def _floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _run(function: Function, *arrays: Array | Blocks, seeds: Sequence[int] = SEEDS) -> None:
    """Run under several seeds, which must agree bit for bit; leaves the results of the first."""
    before = [a.copy() if isinstance(a, np.ndarray) else None for a in arrays]
    first: list[bytes] | None = None
    for seed in seeds:
        for array, start in zip(arrays, before, strict=True):
            if isinstance(array, np.ndarray) and start is not None:
                array[...] = start
        run_values(function, PARTITIONED, arrays, seed=seed)
        found = [a.tobytes() for a in arrays if isinstance(a, np.ndarray)]
        assert first is None or found == first, f"seed {seed} gives other results"
        first = found


def _through(
    kind: str,
    shape: tuple[int, ...],
    tile: tuple[int, ...],
    index: tuple[int, ...],
    *,
    memory: str = "sram",
    fill: float = 0.0,
    filling: bool = True,
    start: float | None = None,
) -> Function:
    """Loads a tile of ``x`` and stores it as the whole of ``y``, through a buffer."""
    p = Program("through", grid=(1,))
    x, y = p.tensor("x", shape, kind), p.tensor("y", tile, kind, access="out")
    buffer = p.buffer("tile", tile, kind, memory=memory)
    full, ready = p.semaphore("full"), p.semaphore("ready")
    if start is not None:
        p.compute("vec", ["vec"], [], [buffer], lambda t: t.full(tile, start, kind))
    p.signal("vec", ready)
    p.wait("in", ready)
    p.load("in", x, buffer, index, fill=fill, filling=filling)
    p.signal("in", full)
    p.wait("out", full)
    p.store("out", y, buffer, (0,) * len(tile))
    return p.build()


# --- whole programs -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(1, 40),
    st.integers(1, 17),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_a_copy_through_a_ring(
    rows: int, columns: int, tile: int, cores: int, stages: int, seed: int
) -> None:
    x = _floats(rows, columns)
    y = np.full_like(x, np.nan)
    run_values(copy_program(rows, columns, tile, cores, stages), CHIP, [x, y], seed=seed)
    np.testing.assert_array_equal(y, x)


@settings(max_examples=25, deadline=None)
@given(
    *(st.integers(1, 40) for _ in range(3)),
    st.sampled_from(["float32", "bfloat16", "float8_e4m3fn", "float16"]),
    st.integers(0, 2**32),
)
def test_a_matmul_on_four_cores(m: int, n: int, k: int, kind: str, seed: int) -> None:
    dtype = dtypes.DTYPES[kind].numpy
    a, b = _floats(m, k).astype(dtype), _floats(k, n, seed=1).astype(dtype)
    c = np.full((m, n), np.nan, np.float32)
    function = matmul_program(m, n, k, (8, 16, 8), (2, 2), kind)
    run_values(function, CHIP, [a, b, c], seed=seed)
    wide = a.astype(np.float64), b.astype(np.float64)
    bound = k * 2.0**-23 * (abs(wide[0]) @ abs(wide[1])) + 1e-30
    assert np.all(abs(c - wide[0] @ wide[1]) <= bound)


def test_every_seed_gives_the_same_bits() -> None:
    a, b, c = _floats(40, 24), _floats(24, 50, seed=1), np.zeros((40, 50), np.float32)
    _run(matmul_program(40, 50, 24, (16, 16, 8), (2, 1)), a, b, c, seeds=range(12))
    np.testing.assert_allclose(c, a @ b, rtol=1e-5, atol=1e-5)


def test_a_missing_wait_shows() -> None:
    """The store may run before the load that fills its buffer: garbage under some seed."""
    p = Program("racy", grid=(1,))
    x, y = p.tensor("x", (8, 8)), p.tensor("y", (8, 8), access="out")
    tile = p.buffer("tile", (8, 8))
    p.load("in", x, tile, (0, 0))
    p.store("out", y, tile, (0, 0))
    function = p.build()
    values, wrong = _floats(8, 8), 0
    for seed in range(20):
        y_values = np.zeros((8, 8), np.float32)
        run_values(function, CHIP, [values, y_values], seed=seed)
        wrong += bool(np.isnan(y_values).any())
    assert 0 < wrong < 20


def test_a_signal_waits_for_its_transfers() -> None:
    """Two slots, and a reader that is never asked for its slot back: the second lap tears."""
    p = Program("lapped", grid=(1,))
    x, y = p.tensor("x", (32, 8)), p.tensor("y", (32, 8), access="out")
    ring = p.buffer("ring", (4, 8), stages=2)
    full = p.semaphore("full", maximum=100)
    with p.loop(8) as i:
        p.load("in", x, ring, (i, 0))
        p.signal("in", full)
        p.wait("out", full)
        p.store("out", y, ring, (i, 0))
        p.rotate(ring)
    function, values, wrong = p.build(), _floats(32, 8), 0
    for seed in range(10):
        y_values = np.zeros_like(values)
        run_values(function, CHIP, [values, y_values], seed=seed)
        wrong += not np.array_equal(y_values, values)
    assert wrong


def _without(region: Region, semaphore: Value) -> Region:
    ops = tuple(
        replace(op, regions=tuple(_without(r, semaphore) for r in op.regions))
        for op in region.ops
        if not (op.name in ("wait", "signal") and op.operands[0] is semaphore)
    )
    return replace(region, ops=ops)


def test_every_semaphore_of_a_program_is_missed() -> None:
    """Without any one of them, some interleaving gives a wrong result or breaks another's count."""
    function = matmul_program(48, 48, 48, (16, 16, 16))
    a, b = _floats(48, 48), _floats(48, 48, seed=1)
    for semaphore in (op.result for op in function.body.ops if op.name == "semaphore"):
        racy, missed = function.with_body(_without(function.body, semaphore)), False
        for seed in range(40):
            c = np.zeros_like(a)
            try:
                run_values(racy, CHIP, [a, b, c], seed=seed)
            except IRError:
                missed = True
            missed = missed or not np.allclose(c, a @ b, atol=1e-4)
            if missed:
                break
        assert missed, semaphore.name


def test_an_instruction_reads_before_it_writes() -> None:
    p = Program("inplace", grid=(1,))
    x = p.tensor("x", (8, 8), access="inout")
    tile = p.buffer("tile", (8, 8))
    full, done = p.semaphore("full"), p.semaphore("done")
    p.load("in", x, tile, (0, 0))
    p.signal("in", full)
    p.wait("vec", full)
    p.compute("vec", ["vec"], [tile], [tile], lambda t, v: t("transpose", v, order=(1, 0)))
    p.signal("vec", done)
    p.wait("out", done)
    p.store("out", x, tile, (0, 0))
    values = _floats(8, 8)
    found = values.copy()
    _run(p.build(), found)
    np.testing.assert_array_equal(found, values.T)


def test_an_instruction_knows_its_symbols() -> None:
    p = Program("numbered", grid=(3,))
    y = p.tensor("y", (12,), "int32", access="out")
    tile = p.buffer("tile", (2,), "int32", stages=2)
    full, free = p.semaphore("full", maximum=2), p.semaphore("free", initial=2, maximum=2)
    with p.loop(2) as i:
        start = p.ids[0] * 4 + i * 2
        p.wait("vec", free)
        p.compute(
            "vec",
            ["vec"],
            [],
            [tile],
            lambda t, start=start: t(
                "add",
                t("iota", size=2, dtype=dtypes.int32),
                t("full", shape=(2,), value=start, dtype=dtypes.int32),
            ),
        )
        p.signal("vec", full)
        p.wait("out", full)
        p.store("out", y, tile, (p.ids[0] * 2 + i,))
        p.signal("out", free)
        p.rotate(tile)
    found = np.zeros(12, np.int32)
    _run(p.build(), found)
    assert found.tolist() == list(range(12))


# --- edges and descriptors ----------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["sram", "rows"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4", "bool"])
def test_an_edge_is_filled(kind: str, memory: str) -> None:
    dtype = dtypes.DTYPES[kind].numpy
    x = np.random.default_rng(0).integers(0, 2, (5, 7)).astype(dtype)
    y = np.zeros((4, 5), dtype)
    _run(_through(kind, (5, 7), (4, 5), (1, 1), memory=memory, fill=1.0), x, y)
    expected = np.ones((4, 5), dtype)
    expected[:1, :2] = x[4:, 5:]
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("memory", ["sram", "rows"])
@pytest.mark.parametrize("kind", ["float32", "int4"])
def test_without_filling_the_buffer_keeps_its_bytes(kind: str, memory: str) -> None:
    dtype = dtypes.DTYPES[kind].numpy
    x = np.random.default_rng(0).integers(0, 3, (5, 7)).astype(dtype)
    y = np.zeros((4, 5), dtype)
    function = _through(kind, (5, 7), (4, 5), (1, 1), memory=memory, filling=False, start=5.0)
    _run(function, x, y)
    expected = np.full((4, 5), 5).astype(dtype)
    expected[:1, :2] = x[4:, 5:]
    np.testing.assert_array_equal(y, expected)


def test_what_nobody_wrote_is_nan() -> None:
    x, y = _floats(5, 7), np.zeros((4, 5), np.float32)
    run_values(_through("float32", (5, 7), (4, 5), (1, 1), filling=False), CHIP, [x, y])
    assert np.isnan(y).sum() == 18


def test_a_tile_wholly_outside_and_a_tensor_without_elements() -> None:
    y = np.zeros((4, 5), np.float32)
    _run(_through("float32", (0, 7), (4, 5), (0, 0), fill=2.0), _floats(0, 7), y)
    assert np.all(y == 2)
    x, y = _floats(5, 7), np.ones((4, 5), np.float32)
    _run(_through("float32", (5, 7), (4, 5), (9, 0)), x, y)
    assert not y.any()
    y = np.ones((5, 2), np.float32)
    _run(_through("float32", (5, 0), (5, 2), (0, 0)), _floats(5, 0), y)
    assert not y.any()


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4", "uint2", "bool"])
def test_a_tile_in_partitions(kind: str, rows: int) -> None:
    dtype = dtypes.DTYPES[kind].numpy
    x = np.random.default_rng(0).integers(0, 2, (rows, 3)).astype(dtype)
    y = np.zeros_like(x)
    _run(_through(kind, (rows, 3), (rows, 3), (0, 0), memory="rows"), x, y, seeds=(0,))
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("shape", [(5,), (3, 2, 4), (2, 130, 3)])
def test_a_tile_of_any_rank_in_partitions(shape: tuple[int, ...]) -> None:
    x = _floats(*shape)
    y = np.zeros_like(x)
    _run(_through("float32", shape, shape, (0,) * len(shape), memory="rows"), x, y, seeds=(0,))
    np.testing.assert_array_equal(y, x)


def test_strides_offsets_and_views() -> None:
    p = Program("strided", grid=(1,))
    x, y = p.tensor("x", (20, 9)), p.tensor("y", (4, 3), access="out")
    tile = p.buffer("tile", (4, 3))
    full = p.semaphore("full")
    part = p.view(p.view(x, 0, 2, 18), 1, 1, 8)
    p.load("in", part, tile, (0, 1), offset=(3, 0), stride=(4, 2), step=(4, 1), fill=-1.0)
    p.signal("in", full)
    p.wait("out", full)
    p.store("out", y, tile, (0, 0))
    x_values, y_values = _floats(20, 9), np.zeros((4, 3), np.float32)
    _run(p.build(), x_values, y_values)
    np.testing.assert_array_equal(y_values, x_values[2:18, 1:8][3::4, 1::2][:4, :3])


def test_a_negative_start() -> None:
    p = Program("backwards", grid=(1,))
    x, y = p.tensor("x", (6,)), p.tensor("y", (8,), access="out")
    tile = p.buffer("tile", (8,))
    full = p.semaphore("full")
    p.load("in", x, tile, (0,), offset=(-1,), fill=9.0)
    p.signal("in", full)
    p.wait("out", full)
    p.store("out", y, tile, (0,))
    x_values, y_values = _floats(6), np.zeros(8, np.float32)
    _run(p.build(), x_values, y_values)
    np.testing.assert_array_equal(y_values, [9, *x_values, 9])


@pytest.mark.parametrize("page", [1, 4])
def test_index_lists(page: int) -> None:
    """Rows (or pages) of a table by a list with an absent entry; stored through another list."""
    p = Program("gather", grid=(1,))
    x = p.tensor("x", (24, 5))
    picks = p.tensor("picks", (4,), "int32", index=(-1, 24 // page - 1))
    places = p.tensor("places", (4,), "int32", index=(-1, 24 // page - 1), unique=True)
    y = p.tensor("y", (24, 5), access="inout")
    tile = p.buffer("tile", (4 * page, 5))
    lists = [p.buffer(name, (4,), "int32", memory="lists") for name in ("from", "to")]
    listed, full = p.semaphore("listed"), p.semaphore("full")
    for source, target in zip((picks, places), lists, strict=True):
        p.load("in", source, target, (0,))
    p.signal("in", listed)
    p.wait("in", listed)
    p.load("in", x, tile, (lists[0], 0), fill=7.0)
    p.signal("in", full)
    p.wait("out", full)
    p.store("out", y, tile, (lists[1], 0))
    x_values, y_values = _floats(24, 5), np.zeros((24, 5), np.float32)
    chosen, put = np.array([3, -1, 0, 3], np.int32), np.array([5, 2, -1, 1], np.int32)
    _run(p.build(), x_values, chosen, put, y_values)
    expected = np.zeros_like(x_values).reshape(-1, page, 5)
    pages = x_values.reshape(-1, page, 5)
    expected[5], expected[2], expected[1] = pages[3], 7.0, pages[3]
    np.testing.assert_array_equal(y_values, expected.reshape(24, 5))


def test_a_scalar_of_an_index_argument_bounds_a_view() -> None:
    p = Program("ragged", grid=(2,))
    ends = p.tensor("ends", (3,), "int32", index=(0, 10))
    x, y = p.tensor("x", (10, 4)), p.tensor("y", (10, 4), access="out")
    tile = p.buffer("tile", (8, 4))
    full = p.semaphore("full")
    start, stop = p.scalar(ends, (p.ids[0],), "a"), p.scalar(ends, (p.ids[0] + 1,), "b")
    p.load("in", p.view(x, 0, start, stop), tile, (0, 0))
    p.signal("in", full)
    p.wait("out", full)
    p.store("out", p.view(y, 0, start, stop), tile, (0, 0))
    x_values, y_values = _floats(10, 4), np.zeros((10, 4), np.float32)
    _run(p.build(), np.array([0, 3, 9], np.int32), x_values, y_values)
    np.testing.assert_array_equal(y_values[:9], x_values[:9])
    assert not y_values[9].any()
    with pytest.raises(IRError, match="a view lies inside"):
        run_values(p.build(), CHIP, [np.array([5, 3, 9], np.int32), x_values, y_values])


@pytest.mark.parametrize("combine", ["add", "max", "min"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int32"])
def test_combining_stores_go_in_the_order_of_the_cores(combine: str, kind: str) -> None:
    p = Program("combined", grid=(3,))
    x, y = p.tensor("x", (12, 6), kind), p.tensor("y", (2, 6), kind, access="inout")
    tile = p.buffer("tile", (2, 6), kind)
    full, free = p.semaphore("full"), p.semaphore("free", initial=1)
    with p.loop(2) as i:
        p.wait("in", free)
        p.load("in", x, tile, (p.ids[0] * 2 + i, 0))
        p.signal("in", full)
        p.wait("out", full)
        p.store("out", y, tile, (0, 0), combine=combine)
        p.signal("out", free)
    dtype = dtypes.DTYPES[kind].numpy
    x_values = (_floats(12, 6) * 50).astype(dtype)
    y_values = _floats(2, 6, seed=5).astype(dtype)
    expected = y_values.copy()
    function = {"add": np.add, "max": np.maximum, "min": np.minimum}[combine]
    wide = np.int32 if kind == "int32" else np.float32
    for part in x_values.reshape(6, 2, 6):
        expected = function(expected.astype(wide), part.astype(wide)).astype(dtype)
    _run(p.build(), x_values, y_values)
    np.testing.assert_array_equal(y_values, expected)


# --- types --------------------------------------------------------------------------------------


def _random_blocks(name: str, shape: tuple[int, ...], axis: int) -> Blocks:
    generator, format = np.random.default_rng(0), dtypes.FORMATS[name]
    planes: dict[str, Array] = {}
    for plane in format.planes:
        extents = plane_shape(shape, axis, plane.per)
        if plane.dtype.is_float:
            planes[plane.name] = generator.normal(size=extents).astype(plane.dtype.numpy)
        else:
            top = 1 << min(plane.dtype.bits, 7)
            codes = generator.integers(0, top, extents)
            planes[plane.name] = codes.astype(plane.dtype.numpy)
    return with_sums(Blocks(format, axis, shape, planes))


@pytest.mark.parametrize("memory", ["sram", "rows"])
@pytest.mark.parametrize("name", sorted(dtypes.FORMATS))
@pytest.mark.parametrize("axis", [0, 1])
def test_block_quantized_tiles_keep_their_planes(name: str, axis: int, memory: str) -> None:
    shape = (3, 512) if axis else (512, 3)
    tile = (2, 256) if axis else (256, 2)
    x = _random_blocks(name, shape, axis)
    y = _random_blocks(name, tile, axis)
    for plane in y.planes.values():
        plane[...] = 0
    p = Program("blocks", grid=(1,))
    source = p.tensor("x", shape, name, quantized_axis=axis)
    target = p.tensor("y", tile, name, access="out", quantized_axis=axis)
    buffer = p.buffer("tile", tile, name, memory=memory, quantized_axis=axis)
    full = p.semaphore("full")
    p.load("in", source, buffer, (1, 1))
    p.signal("in", full)
    p.wait("out", full)
    p.store("out", target, buffer, (0, 0))
    run_values(p.build(), PARTITIONED, [x, y])
    for plane in x.format.planes:
        each = [plane.per if a == axis else 1 for a in (0, 1)]
        cut = tuple(slice(t // e, 2 * t // e) for t, e in zip(tile, each, strict=True))
        expected = np.zeros_like(y.planes[plane.name])
        found = x.planes[plane.name][cut]
        expected[tuple(slice(n) for n in found.shape)] = found
        np.testing.assert_array_equal(y.planes[plane.name], expected)


def test_a_dot_with_quantized_weights() -> None:
    p = Program("quantized", grid=(1,))
    a, w = p.tensor("a", (8, 64)), p.tensor("w", (64, 16), "q8_0", quantized_axis=0)
    c = p.tensor("c", (8, 16), access="out")
    left, right = p.buffer("left", (8, 64)), p.buffer("right", (64, 16), "q8_0", quantized_axis=0)
    total = p.buffer("total", (8, 16))
    full, done = p.semaphore("full"), p.semaphore("done")
    p.load("in", a, left, (0, 0))
    p.load("in", w, right, (0, 0))
    p.signal("in", full)
    p.wait("mxu", full)
    p.compute(
        "mxu",
        ["mxu"],
        [left, right],
        [total],
        lambda t, x, y: t("dot", x, y, t.full((8, 16), 0.0)),
    )
    p.signal("mxu", done)
    p.wait("out", done)
    p.store("out", c, total, (0, 0))
    weights = _random_blocks("q8_0", (64, 16), 0)
    a_values, c_values = _floats(8, 64), np.zeros((8, 16), np.float32)
    _run(p.build(), a_values, weights, c_values)
    np.testing.assert_allclose(c_values, a_values @ weights.decode(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["int8", "int4", "uint8", "int16", "int32"])
def test_integer_dots_are_exact(kind: str) -> None:
    p = Program("integers", grid=(1,))
    a, b = p.tensor("a", (8, 33), kind), p.tensor("b", (33, 5), kind)
    c = p.tensor("c", (8, 5), "int32", access="out")
    left, right = p.buffer("left", (8, 33), kind), p.buffer("right", (33, 5), kind)
    total = p.buffer("total", (8, 5), "int32")
    full, done = p.semaphore("full"), p.semaphore("done")
    p.load("in", a, left, (0, 0))
    p.load("in", b, right, (0, 0))
    p.signal("in", full)
    p.wait("mxu", full)
    p.compute(
        "mxu",
        ["mxu"],
        [left, right],
        [total],
        lambda t, x, y: t("dot", x, y, t.full((8, 5), 0, "int32")),
    )
    p.signal("mxu", done)
    p.wait("out", done)
    p.store("out", c, total, (0, 0))
    dtype = dtypes.DTYPES[kind]
    generator = np.random.default_rng(0)
    low, high = (0, 200) if dtype.kind == "uint" else (-(1 << (dtype.bits - 1)) // 2, 7)
    x, y = (generator.integers(low, high, s).astype(dtype.numpy) for s in ((8, 33), (33, 5)))
    found = np.zeros((8, 5), np.int32)
    _run(p.build(), x, y, found)
    with np.errstate(over="ignore"):
        expected = x.astype(np.int64) @ y.astype(np.int64)
    np.testing.assert_array_equal(found, expected.astype(np.int32))


# --- memories and errors ------------------------------------------------------------------------


def _shared(cores: int) -> Function:
    p = Program("shared", grid=(cores,))
    x, y = p.tensor("x", (4 * cores, 8)), p.tensor("y", (4 * cores, 8), access="out")
    tile = p.buffer("tile", (4, 8), memory="common")
    full = p.semaphore("full")
    p.load("in", x, tile, (p.ids[0], 0))
    p.signal("in", full)
    p.wait("out", full)
    p.store("out", y, tile, (p.ids[0], 0))
    return p.build()


def test_a_memory_of_the_chip_exists_once() -> None:
    x, y = _floats(4, 8), np.zeros((4, 8), np.float32)
    _run(_shared(1), x, y)
    np.testing.assert_array_equal(y, x)
    # Two cores that use the same bytes without any order between them.
    x, wrong = _floats(8, 8), 0
    for seed in range(10):
        y = np.zeros_like(x)
        run_values(_shared(2), PARTITIONED, [x, y], seed=seed)
        wrong += not np.array_equal(x, y)
    assert wrong


def test_a_deadlock_names_queues_and_semaphores() -> None:
    p = Program("stuck", grid=(1,))
    x, y = p.tensor("x", (8, 8)), p.tensor("y", (8, 8), access="out")
    tile = p.buffer("tile", (8, 8))
    full, free = p.semaphore("full"), p.semaphore("free")
    p.wait("in", free)
    p.load("in", x, tile, (0, 0))
    p.signal("in", full)
    p.wait("out", full)
    p.store("out", y, tile, (0, 0))
    p.signal("out", free)
    with pytest.raises(IRError) as error:
        run_values(p.build(), CHIP, [_floats(8, 8), _floats(8, 8)])
    for part in ("deadlock", "queue in: wait for 1 of 'free', which is at 0", "'full'", "stuck.py"):
        assert part in str(error.value)


def test_a_semaphore_that_leaks_or_overflows() -> None:
    p = Program("leak", grid=(1,))
    full = p.semaphore("full")
    p.signal("in", full)
    with pytest.raises(IRError, match="'full' ends at 1 on core 0"):
        run_values(p.build(), CHIP, [])
    p.signal("in", full)
    with pytest.raises(IRError, match="'full' counts to 2"):
        run_values(p.build(), CHIP, [])


def test_what_the_chip_lacks() -> None:
    function = copy_program(8, 8, 4)
    arrays = [_floats(8, 8), _floats(8, 8)]
    with pytest.raises(IRError, match="sram has 100 bytes"):
        run_values(function, toy_chip(memories__sram__size=number(100, "B")), arrays)
    with pytest.raises(TargetError, match="uses the queue 'out'"):
        run_values(function, toy_chip(dma__storer__queue="elsewhere"), arrays)
    p = Program("nowhere", grid=(1,))
    p.buffer("tile", (4, 4), memory="attic")
    with pytest.raises(TargetError, match="a buffer in 'attic'"):
        run_values(p.build(), CHIP, [])


def test_an_engine_that_does_not_fill() -> None:
    chip = toy_chip(dma__loader__fills=False)
    arrays = [_floats(5, 7), _floats(4, 5)]
    with pytest.raises(IRError, match="fills what lies outside"):
        run_values(_through("float32", (5, 7), (4, 5), (1, 1)), chip, arrays)
    run_values(_through("float32", (5, 7), (4, 5), (0, 0)), chip, arrays)


def test_arguments_are_checked() -> None:
    with pytest.raises(IRError, match="argument 'x'"):
        run_values(copy_program(8, 8, 4), CHIP, [_floats(8, 9), _floats(8, 8)])
    p = Program("store", grid=(1,))
    x = p.tensor("x", (4, 4))
    tile = p.buffer("tile", (4, 4))
    p.store("out", x, tile, (0, 0))
    with pytest.raises(IRError, match="only read"):
        run_values(p.build(), CHIP, [_floats(4, 4)])
