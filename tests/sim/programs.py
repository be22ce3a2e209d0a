"""Builds machine programs op by op, a toy chip to run them on, and two programs with their
semaphores: a double-buffered copy and a matmul.

    p = Program("copy", grid=(4,))
    x, y = p.tensor("x", (64, 128)), p.tensor("y", (64, 128), access="out")
    tile = p.buffer("tile", (16, 128), stages=2)
    full, free = p.semaphore("full", maximum=2), p.semaphore("free", initial=2, maximum=2)
    with p.loop(4, name="i") as i:
        p.wait("in", free)
        p.load("in", x, tile, (i, 0))
        p.signal("in", full)
        p.wait("out", full)
        p.store("out", y, tile, (i, 0))
        p.signal("out", free)
        p.rotate(tile)
    function = p.build()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import dure.ir.machine
import dure.ir.tile
from dure.ir import dtypes
from dure.ir.core import Function, Op, Param, Region, Span, Value, infer
from dure.ir.expr import Expr, IntLike, Symbol, as_expr, symbol
from dure.ir.types import Access, TensorType, shape_of
from dure.ir.verifier import verify
from dure.machine.chip import Chip

assert dure.ir.machine and dure.ir.tile


class Tiles:
    """The body of a compute: tile ops on the buffers it reads."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def __call__(self, name: str, *operands: Value, **attrs: Any) -> Value:
        op = infer(name, operands, attrs)
        self.ops.append(op)
        return op.result

    def full(self, shape: Sequence[int], value: float, dtype: str = "float32") -> Value:
        return self("full", shape=tuple(shape), value=value, dtype=dtypes.element_type(dtype))

    def cast(self, value: Value, dtype: str) -> Value:
        return self("cast", value, dtype=dtypes.element_type(dtype))


#: (tile ops, the values read) -> the values written
Work = Callable[..., Any]


class Program:
    """A machine program under construction.  Buffers without an offset lie one after another, in
    each memory, aligned to 64 bytes."""

    def __init__(self, name: str = "program", grid: Sequence[int] = ()) -> None:
        self.name = name
        self.params: list[Param] = []
        self.top: list[Op] = []
        self.bodies: list[list[Op]] = [[]]
        self.grid = tuple(grid)
        self.ids = tuple(symbol(f"core{a}", "grid", 0, n - 1) for a, n in enumerate(grid))
        self.ends: dict[str, int] = {}
        self.line = 0

    # --- declarations ----------------------------------------------------------------------------

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str = "float32",
        access: Access = "in",
        index: tuple[int, int] | None = None,
        **more: Any,
    ) -> Value:
        """A tensor in the chip's home memory; ``index`` makes it an index argument."""
        bounds = None if index is None else (as_expr(index[0]), as_expr(index[1]))
        kind = TensorType(shape_of(*shape), dtypes.element_type(dtype), index=bounds, **more)
        value = Value(kind, name)
        self.params.append(Param(value, access))
        return value

    def buffer(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str = "float32",
        *,
        memory: str = "sram",
        stages: int = 1,
        offset: int | None = None,
        pitch: int | None = None,
        quantized_axis: int = -1,
    ) -> Value:
        """A buffer, in a flat memory unless ``pitch`` (bytes in each partition) is given."""
        element = dtypes.element_type(dtype)
        size = -(-int(element.bits * _product(shape)) // 8)
        step = -(-size // 64) * 64 if pitch is None else pitch
        start = self.ends.get(memory, 0) if offset is None else offset
        self.ends[memory] = max(self.ends.get(memory, 0), start + step * stages)
        attrs = {
            "memory": memory,
            "offset": start,
            "shape": tuple(shape),
            "dtype": element,
            "stages": stages,
            "pitch": step,
            "quantized_axis": quantized_axis,
        }
        op = infer("buffer", (), attrs, hint=name)
        self.top.append(op)
        return op.result

    def semaphore(self, name: str, initial: int = 0, maximum: int = 1) -> Value:
        op = infer("semaphore", (), {"initial": initial, "maximum": maximum}, hint=name)
        self.top.append(op)
        return op.result

    # --- instructions ----------------------------------------------------------------------------

    def wait(self, queue: str, semaphore: Value, count: int = 1) -> None:
        self._add("wait", [semaphore], queue=queue, count=count)

    def signal(self, queue: str, semaphore: Value, count: int = 1) -> None:
        self._add("signal", [semaphore], queue=queue, count=count)

    def rotate(self, *buffers: Value) -> None:
        self._add("rotate", buffers)

    def load(
        self,
        queue: str,
        tensor: Value,
        buffer: Value,
        index: Sequence[IntLike | Value],
        *,
        fill: float = 0.0,
        filling: bool = True,
        **descriptor: Any,
    ) -> None:
        """A dma_load.  ``index`` counts in tiles (``step``: the buffer's extents where nothing is
        given); a buffer among the indices is an index list."""
        attrs, lists = _descriptor(index, buffer.tile.shape, descriptor)
        attrs.update(queue=queue, fill=fill, filling=filling)
        self._add("dma_load", [tensor, buffer, *lists], **attrs)

    def store(
        self,
        queue: str,
        tensor: Value,
        buffer: Value,
        index: Sequence[IntLike | Value],
        *,
        combine: str = "",
        **descriptor: Any,
    ) -> None:
        """A dma_store, described like a load."""
        attrs, lists = _descriptor(index, buffer.tile.shape, descriptor)
        attrs.update(queue=queue, combine=combine)
        self._add("dma_store", [tensor, buffer, *lists], **attrs)

    def compute(
        self,
        queue: str,
        engines: Sequence[str],
        reads: Sequence[Value],
        writes: Sequence[Value],
        work: Work,
    ) -> None:
        """One instruction: ``work(tiles, *read)`` gives what is written (a value or several)."""
        arguments = tuple(Value(r.type, r.name) for r in reads)
        tiles = Tiles()
        found = work(tiles, *arguments)
        yields = (found,) if isinstance(found, Value) else tuple(found)
        region = Region(arguments, tuple(tiles.ops), yields)
        attrs = {"queue": queue, "engines": tuple(engines), "reads": len(reads)}
        self._add("compute", [*reads, *writes], [region], **attrs)

    def view(self, tensor: Value, axis: int, start: IntLike, stop: IntLike) -> Value:
        attrs = {"axis": axis, "start": as_expr(start), "stop": as_expr(stop)}
        return self._add("view", [tensor], **attrs).result

    def scalar(self, tensor: Value, index: Sequence[IntLike], name: str) -> Symbol:
        """An element of an index argument."""
        limits = tensor.tensor.index
        assert limits is not None
        found = symbol(name, "index", *limits)
        op = infer("index_load", [tensor], {"index": tuple(map(as_expr, index))}, symbols=(found,))
        self.bodies[-1].append(op)
        return found

    @contextmanager
    def loop(
        self, stop: IntLike, *, start: IntLike = 0, step: int = 1, name: str = "i"
    ) -> Iterator[Symbol]:
        counter = symbol(name, "loop", start, as_expr(stop) - 1)
        self.bodies.append([])
        yield counter
        region = Region((), tuple(self.bodies.pop()), (), (counter,))
        self._add("for", [], [region], start=as_expr(start), stop=as_expr(stop), step=step)

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        """The ops inside run where the condition holds."""
        self.bodies.append([])
        yield
        then = Region((), tuple(self.bodies.pop()))
        self._add("if", [], [then, Region((), ())], condition=condition)

    def _add(
        self, name: str, operands: Sequence[Value], regions: Sequence[Region] = (), **attrs: Any
    ) -> Op:
        self.line += 1
        text = f"{name} {', '.join(o.name for o in operands)}"
        span = Span(f"{self.name}.py", self.line, 0, len(text), text)
        op = infer(name, operands, attrs, regions, span=span)
        self.bodies[-1].append(op)
        return op

    def build(self) -> Function:
        """The program, verified."""
        (body,) = self.bodies
        region = Region(tuple(p.value for p in self.params), (*self.top, *body))
        grid = tuple(as_expr(n) for n in self.grid)
        params = tuple(self.params)
        function = Function(self.name, "machine", params, region, (), grid, self.ids)
        verify(function)
        return function


def _descriptor(
    index: Sequence[IntLike | Value], shape: Sequence[int], given: dict[str, Any]
) -> tuple[dict[str, Any], list[Value]]:
    lists = {a: v for a, v in enumerate(index) if isinstance(v, Value)}
    step = list(given.get("step", shape))
    if "step" not in given:
        for axis, entries in lists.items():
            step[axis] = shape[axis] // entries.tile.shape[0]
    attrs: dict[str, Any] = {
        "index": tuple(None if isinstance(v, Value) else as_expr(v) for v in index),
        "step": tuple(step),
        "offset": tuple(map(as_expr, given.get("offset", [0] * len(shape)))),
        "stride": tuple(given.get("stride", [1] * len(shape))),
        "list_axes": tuple(lists),
    }
    if "share" in given:
        attrs["share"] = given["share"]
    return attrs, list(lists.values())


def _product(extents: Sequence[int]) -> int:
    total = 1
    for extent in extents:
        total *= extent
    return total


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


# --- programs ------------------------------------------------------------------------------------


def copy_program(
    rows: int = 64, columns: int = 128, tile: int = 16, cores: int = 1, stages: int = 2
) -> Function:
    """Every core copies its share of the rows through a ring of ``stages`` slots."""
    p = Program("copy", grid=(cores,))
    x = p.tensor("x", (rows, columns))
    y = p.tensor("y", (rows, columns), access="out")
    ring = p.buffer("ring", (tile, columns), stages=stages)
    full = p.semaphore("full", maximum=stages)
    free = p.semaphore("free", initial=stages, maximum=stages)
    each = _ceil(_ceil(rows, tile), cores)
    with p.loop(each, name="i") as i:
        place = p.ids[0] * each + i
        p.wait("in", free)
        p.load("in", x, ring, (place, 0))
        p.signal("in", full)
        p.wait("out", full)
        p.store("out", y, ring, (place, 0))
        p.signal("out", free)
        p.rotate(ring)
    return p.build()


def matmul_program(
    m: int = 64,
    n: int = 64,
    k: int = 64,
    tile: tuple[int, int, int] = (16, 32, 16),
    cores: tuple[int, int] = (1, 1),
    dtype: str = "float32",
) -> Function:
    """C = A B on a grid of cores; operands and results double-buffered.

    Queues: ``in`` loads, ``mxu`` multiplies into the accumulator, ``vec`` clears the accumulator
    and moves it out, ``out`` stores.
    """
    bm, bn, bk = tile
    p = Program("matmul", grid=cores)
    a, b = p.tensor("a", (m, k), dtype), p.tensor("b", (k, n), dtype)
    c = p.tensor("c", (m, n), access="out")
    left = p.buffer("left", (bm, bk), dtype, stages=2)
    right = p.buffer("right", (bk, bn), dtype, stages=2)
    total = p.buffer("total", (bm, bn))
    result = p.buffer("result", (bm, bn), stages=2)
    loaded = p.semaphore("loaded", maximum=2)
    consumed = p.semaphore("consumed", initial=2, maximum=2)
    cleared = p.semaphore("cleared", maximum=1)
    summed = p.semaphore("summed", maximum=1)
    ready = p.semaphore("ready", maximum=2)
    stored = p.semaphore("stored", initial=2, maximum=2)
    rows, columns = _ceil(_ceil(m, bm), cores[0]), _ceil(_ceil(n, bn), cores[1])
    with p.loop(rows, name="i") as i, p.loop(columns, name="j") as j:
        row, column = p.ids[0] * rows + i, p.ids[1] * columns + j
        p.compute("vec", ["vec"], [], [total], lambda t: t.full((bm, bn), 0.0))
        p.signal("vec", cleared)
        p.wait("mxu", cleared)
        with p.loop(_ceil(k, bk), name="s") as s:
            p.wait("in", consumed)
            p.load("in", a, left, (row, s))
            p.load("in", b, right, (s, column))
            p.signal("in", loaded)
            p.wait("mxu", loaded)
            p.compute(
                "mxu",
                ["mxu"],
                [left, right, total],
                [total],
                lambda t, x, y, z: t("dot", x, y, z),
            )
            p.signal("mxu", consumed)
            p.rotate(left, right)
        p.signal("mxu", summed)
        p.wait("vec", summed)
        p.wait("vec", stored)
        p.compute("vec", ["vec"], [total], [result], lambda t, x: t("reshape", x, shape=(bm, bn)))
        p.signal("vec", ready)
        p.wait("out", ready)
        p.store("out", c, result, (row, column))
        p.signal("out", stored)
        p.rotate(result)
    return p.build()


# --- a chip --------------------------------------------------------------------------------------


def number(value: float, unit: str = "1") -> dict[str, object]:
    return {"value": value, "unit": unit, "status": "published", "source": "a test's chip"}


def law(text: str) -> dict[str, str]:
    return {"law": text, "unit": "cycle", "status": "published", "source": "a test's chip"}


def toy_tables(cores: int = 4) -> dict[str, Any]:
    """The tables of a toy chip's machine file: ``in`` and ``out`` move bytes between ``hbm`` and
    ``sram`` (flat) or ``lists``; ``mxu`` multiplies, ``vec`` does the rest."""
    vector = {
        "elementwise": law("ceil(elements / lanes)"),
        "transcendental": law("ceil(elements / lanes) * 4"),
        "reduce": law("ceil(elements / lanes) + axis"),
        "scan": law("ceil(elements / lanes) * 2"),
        "transpose": law("rows + columns"),
        "convert": law("ceil(elements * bits / (32 * lanes))"),
        "copy": law("ceil(elements / lanes)"),
    }

    def dma(queue: str, moves: list[tuple[str, str]]) -> dict[str, Any]:
        return {
            "queue": queue,
            "moves": moves,
            "bandwidth": number(90, "GB/s"),
            "stream": number(50, "GB/s"),
            "latency": number(300, "ns"),
            "issue": number(7, "ns"),
            "descriptor": number(3, "ns"),
            "outstanding": number(4),
            "efficiency": {**law("min(1, run / (run + overhead))"), "unit": "1"},
            "numbers": {"overhead": number(32)},
            "granule": number(32, "B"),
            "route": ["hbm", "bus"],
            "fills": True,
        }

    return {
        "schema": 2,
        "name": "toy",
        "kind": "chip",
        "summary": "a chip for tests",
        "cores": number(cores),
        "clock": number(0.9, "GHz"),
        "home": "hbm",
        "scratchpad": "sram",
        "lists": "lists",
        "launch": number(2, "us"),
        "memories": {
            "hbm": {
                "scope": "chip",
                "size": number(1, "GiB"),
                "alignment": number(64, "B"),
                "bandwidth": number(120, "GB/s"),
            },
            "sram": {"scope": "core", "size": number(256, "KiB"), "alignment": number(64, "B")},
            "lists": {"scope": "core", "size": number(16, "KiB"), "alignment": number(64, "B")},
        },
        "engines": {
            "mxu": {
                "queue": "mxu",
                "reads": ["sram"],
                "writes": ["sram"],
                "clock": number(1.1, "GHz"),
                "numbers": {"fill": number(20)},
                "rates": {"float32": number(256), "bfloat16": number(1024), "int8": number(2048)},
                "laws": {"dot": law("batch * (fill + m * n * k / rate)")},
                "issue": number(5, "cycle"),
                "types": ["float32", "bfloat16", "int8"],
                "dot": {"accumulators": ["sram"], "types": ["float32", "bfloat16", "int8"]},
            },
            "vec": {
                "queue": "vec",
                "reads": ["sram"],
                "writes": ["sram"],
                "numbers": {"lanes": number(64)},
                "laws": vector,
                "issue": number(10, "ns"),
            },
        },
        "dma": {
            "loader": dma("in", [("hbm", "sram"), ("hbm", "lists")]),
            "storer": dma("out", [("sram", "hbm")]),
        },
        "fabrics": {"bus": {"scope": "core", "bandwidth": number(100, "GB/s")}},
        "sync": {
            "semaphores": number(32),
            "maximum": number(1000),
            "latency": number(11, "ns"),
        },
        "storage": ["float32", "bfloat16", "int32", "int8", "q8_0", "q4_1"],
        "peaks": {"compute": {"float32": number(1, "TFLOP/s")}, "bandwidth": number(120, "GB/s")},
    }


def toy_chip(cores: int = 4, **changes: Any) -> Chip:
    """The toy chip; ``changes`` are dotted paths with ``__`` for the dot, and their new entries."""
    tables = toy_tables(cores)
    for path, entry in changes.items():
        *parts, last = path.split("__")
        table = tables
        for part in parts:
            table = table[part]
        table[last] = entry
    return Chip.model_validate(tables)
