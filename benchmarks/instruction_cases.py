"""What ``instructions.py`` counts: launches, products of quantized weights, and a model's step.

Each is built for a machine that is given, with tile sizes of its own, so that the same code comes
out wherever it is built.  What numbers the operands hold changes no count.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from peers.kernels.dure_launches import LAUNCHES

import dure.library
from dure.compiler.pipeline import compile_objects
from dure.ir.blocks import Blocks
from dure.ir.builder import ProgramBuilder
from dure.ir.core import Function
from dure.ir.dtypes import BlockFormat
from dure.ir.expr import Symbol
from dure.ir.pack import pack
from dure.ir.tensor.program import labels
from dure.ir.types import TensorType, static_extent
from dure.lang.launch import executing
from dure.models import shapes
from dure.models.decoder import ROPE_TABLES, StepLimits, WeightTypes, step_program
from dure.models.rope import rope_tables
from dure.models.weights import weight_specs
from dure.runtime.arrays import ArrayView
from dure.runtime.host import HostFeatures
from dure.serve.kv import KVCache
from dure.serve.work import BatchEntry, build_step
from dure.targets.cpu.standalone import Standalone, of_kernel, of_step

assert dure.library
Array = npt.NDArray[Any]

#: Builds what is counted for a machine.
Build = Callable[[HostFeatures], Standalone]


# --- launches -----------------------------------------------------------------------------------


class Captured:
    """An executor that keeps what a launch compiles, and what it would run on."""

    def __init__(self) -> None:
        self.function: Function | None = None
        self.tensors: list[bytes] = []
        self.sizes: list[int] = []

    def __call__(self, function: Function) -> Callable[[Sequence[ArrayView], Sequence[int]], None]:
        """See :data:`dure.lang.launch.Executor`."""
        self.function = function

        def run(views: Sequence[ArrayView], sizes: Sequence[int]) -> None:
            self.tensors = [ctypes.string_at(v.address, v.size * v.itemsize) for v in views]
            self.sizes = list(sizes)

        return run


def launch(operator: str, *operands: tuple[int, ...], **tiles: int) -> Build:
    """A launch on float32 arrays of these shapes."""

    def build(host: HostFeatures) -> Standalone:
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(shape).astype(np.float32) for shape in operands]
        call, _ = LAUNCHES[operator](*arrays)
        captured = Captured()
        with executing(captured):
            call(**tiles)
        assert captured.function is not None
        return of_kernel(captured.function, host, captured.tensors, captured.sizes)

    return build


# --- tensor programs ----------------------------------------------------------------------------


def drawn(kind: TensorType, rng: np.random.Generator) -> Array:
    """A random weight as a file stores it."""
    shape = tuple(static_extent(extent) or 0 for extent in kind.shape)
    if not isinstance(kind.dtype, BlockFormat):
        return rng.standard_normal(shape).astype(kind.dtype.numpy)
    planes: dict[str, Array] = {}
    for plane in kind.dtype.planes:
        entries = (*shape[:-1], shape[-1] // plane.per)
        if plane.dtype.is_float:
            planes[plane.name] = (rng.standard_normal(entries) * 0.01).astype(plane.dtype.numpy)
        else:
            codes = rng.integers(0, 1 << plane.dtype.bits, entries)
            planes[plane.name] = codes.astype(np.uint8).view(
                np.int8 if plane.dtype.kind == "int" else np.uint8
            )
    assert kind.layout is not None
    return pack(Blocks(kind.dtype, 1, shape, planes), kind.layout, kind.dtype)


def program(function: Function, host: HostFeatures, given: Mapping[str, Array]) -> Standalone:
    """A tensor program on the given inputs and tables, and random weights."""
    prepared, artifact = compile_objects(function, host)
    rng = np.random.default_rng(0)
    values, sizes = dict(given), dict[str, int]()
    named = zip(labels(function, "names"), labels(function, "roles"), function.params, strict=True)
    for name, role, param in named:
        kind = param.value.tensor
        if role == "weight" and name not in values:
            values[name] = drawn(kind, rng)
        elif role == "input":
            extents = zip(kind.shape, values[name].shape, strict=True)
            sizes |= {e.name: length for e, length in extents if isinstance(e, Symbol)}
    return of_step(prepared.laid_out.step, prepared.load, artifact, values, sizes)


def product(weights: str, rows: int, columns: int, depth: int) -> Build:
    """Rows of float32 times a quantized weight of (columns, depth)."""

    def build(host: HostFeatures) -> Standalone:
        builder = ProgramBuilder("product")
        x = builder.input("x", (rows, depth))
        weight = builder.weight("w", (columns, depth), weights)
        builder.output("y", builder.linear(x, weight))
        values = np.random.default_rng(1).standard_normal((rows, depth)).astype(np.float32)
        return program(builder.build(), host, {"x": values})

    return build


def step(context: int, tokens: int) -> Build:
    """A step of SmolLM2's shape, but for two layers and a small vocabulary, in the file's formats:
    new tokens of one sequence, of whose tokens ``context`` are in the cache.
    """

    def build(host: HostFeatures) -> Standalone:
        whole_model = shapes.model_config("smollm2-135m")
        config = replace(
            whole_model, layers=2, vocabulary=1024, windows=(0, 0), rotated=(True, True)
        )
        limits = StepLimits(
            tokens=64, sequences=1, pages=16, pool_pages=16, logit_rows=1, positions=256
        )
        specs = weight_specs(config)
        layer, whole = (
            {s.name: matrices if len(s.shape) == 2 else "float32" for s in specs if s.layer == of}
            for of, matrices in ((0, "q4_1"), (None, "q8_0"))
        )
        function = step_program(config, WeightTypes(whole, (layer,) * config.layers), limits)
        tables = rope_tables(config.rope, config.head_dim, limits.positions)
        given: dict[str, Array] = dict(zip(ROPE_TABLES["global"], tables, strict=True))
        return program(function, host, given | inputs(limits, context, tokens))

    return build


def inputs(limits: StepLimits, context: int, tokens: int) -> dict[str, Array]:
    """The inputs of a step of one sequence."""
    cache = KVCache(
        sequences=limits.sequences,
        pool_pages=limits.pool_pages,
        pages_per_sequence=limits.pages,
        page_size=limits.page_size,
    )
    sequence = cache.sequence()
    if context:
        cache.extend(sequence, context)
        cache.commit(sequence)
    cache.extend(sequence, tokens)
    entry = BatchEntry(sequence, np.arange(tokens, dtype=np.int32), (tokens - 1,))
    return dict(build_step(cache, [entry], limits.query_rows).arrays())


# --- what is counted ----------------------------------------------------------------------------

CASES: dict[str, Build] = {
    "launch of c = a + b, 64 numbers": launch("launch", (64,), (64,)),
    "gemm f32, 128 x 128 x 256": launch("gemm", (128, 256), (256, 128), bm=128, bn=128, bk=256),
    "softmax f32, 32 x 1000": launch("softmax", (32, 1000), bm=32, bd=128),
    "rms_norm f32, 32 x 1000": launch("rms_norm", (32, 1000), (1000,), bm=32, bd=128),
    "attention f32, 8 heads, 1 query of 512 keys": launch(
        "attention", (8, 1, 64), (8, 512, 64), (8, 512, 64), bq=1, bk=512
    ),
    "row times q4_0, 576 x 576": product("q4_0", 1, 576, 576),
    "row times q8_0, 576 x 576": product("q8_0", 1, 576, 576),
    "32 rows times q4_0, 192 x 576": product("q4_0", 32, 192, 576),
    "decode step of two layers, context 128": step(context=128, tokens=1),
    "prefill step of two layers, 32 tokens": step(context=0, tokens=32),
}
