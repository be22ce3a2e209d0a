"""Code for Arm processors: run by an emulator, to the bits that this machine gives.

Needs a C compiler for Arm and qemu's user mode (Debian: gcc-aarch64-linux-gnu, qemu-user).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from library_runner import Emulated, specialized
from tensor_programs import SIZES, decoder, values_of

import dure.library
from dure.compiler.fuse import fuse
from dure.compiler.pipeline import compile_objects
from dure.compiler.quantize import quantize_activations
from dure.errors import TargetError
from dure.ir.blocks import Blocks, quantize
from dure.ir.core import Function
from dure.ir.dtypes import (
    ACTIVATION_FORMATS,
    FORMATS,
    BlockFormat,
    float32,
    int8_block32,
    int16_block32,
)
from dure.ir.expr import const
from dure.ir.interpret import execute
from dure.ir.layout import PlaneLayouts, row_planes
from dure.ir.pack import pack, packed_bytes
from dure.ir.types import TensorType, shape_of
from dure.library.matmul import matmul
from dure.library.suite import CASES, Case
from dure.library.suite import case as case_of
from dure.runtime.host import LEVELS, HostFeatures, features_of, host_features
from dure.runtime.llvm import assembly
from dure.runtime.standalone import toolchain
from dure.targets.cpu.codegen import emit_kernel
from dure.targets.cpu.instructions import TABLE, Operation, has
from dure.targets.cpu.packing import packed_layout
from dure.targets.cpu.standalone import of_kernel, of_step

assert dure.library
ARM = {one.name: features_of(one.name) for one in LEVELS if one.architecture == "aarch64"}
WEIGHTS = [f for f in FORMATS.values() if f not in ACTIVATION_FORMATS]
#: One case each of float chains, of blocks, of sums along vectors, of functions and of indices.
FEW = (
    *("matmul f32", "matmul f16", "matmul q4_0 x int8 blocks", "rmsnorm f32", "softmax bf16"),
    *("paged decode attention f16", "top-k"),
)


@pytest.fixture(params=ARM)
def emulated(request: pytest.FixtureRequest) -> Emulated:
    """A machine of each of Arm's levels."""
    try:
        found = Emulated(ARM[request.param])
    except TargetError as error:
        pytest.skip(str(error))
    if not has(found.own, Operation.FUSED):
        pytest.skip("this machine rounds products before sums, which Arm doesn't")
    return found


def check(emulated: Emulated, case: Case, size: tuple[int, ...]) -> None:
    """The reference agrees, and this machine's code bit by bit."""
    drawn = case.drawn(size)
    found = drawn.copied()
    emulated(case.kernel, found, updates=bool(case.updates), **drawn.consts, **case.tiles)
    assert case.error(drawn, found) <= 1, f"{case.name} of {size}"


@pytest.mark.parametrize("name", FEW)
def test_kernels_by_an_emulator(emulated: Emulated, name: str) -> None:
    check(emulated, case_of(name), case_of(name).sizes[1])


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_kernel_by_an_emulator(emulated: Emulated, case: Case) -> None:
    for size in case.sizes[:2]:
        check(emulated, case, size)


# --- blocks in panels ---------------------------------------------------------------------------


def largest_codes(format: BlockFormat, rows: int, length: int) -> Blocks:
    """Random scales; codes at either end of what the format holds, and some between."""
    rng = np.random.default_rng(3)
    planes: dict[str, np.ndarray] = {}
    for plane in format.planes:
        shape = (rows, length // plane.per)
        if plane.dtype.is_float:
            planes[plane.name] = (rng.standard_normal(shape) * 0.1).astype(plane.dtype.numpy)
            continue
        signed = plane.dtype.kind == "int"
        low, high = (-128, 127) if signed else (0, (1 << plane.dtype.bits) - 1)
        codes = rng.integers(low, high + 1, shape)
        codes[: rows // 3], codes[rows // 3 : rows // 2] = high, low
        planes[plane.name] = codes.astype(np.int8 if signed else np.uint8)
    return Blocks(format, 1, (rows, length), planes)


def rows_of(count: int, length: int) -> np.ndarray:
    """Rows whose codes are random, the largest, and low bytes of -128 beside the largest."""
    x = np.random.default_rng(4).standard_normal((count, length)).astype(np.float32)
    x[1] = 1
    x[2] = -(1 - 127.5 / 32512)
    x[2, ::32] = -1
    return x


def product(host: HostFeatures, weight: Blocks, left: Blocks) -> tuple[np.ndarray, str]:
    """``left @ weight.T`` by a machine's code in a process of its own, and its assembly."""
    (rows, length), columns = left.shape, weight.shape[0]
    kind = TensorType(shape_of(columns, length), weight.format, None, 1)
    layout = packed_layout(kind, host.vector_bits // 32)
    assert isinstance(layout, PlaneLayouts)
    left_layout = row_planes(left.format, [rows, length], 1)
    types = [
        TensorType((const(rows), const(length)), left.format, None, 1),
        kind.with_layout(layout),
        TensorType((const(rows), const(columns)), float32),
    ]
    function = matmul.specialize(types, {"bm": 4, "bn": 16, "bk": max(64, weight.format.block)})
    tensors: list[bytes] = []
    for blocks, planes in ((left, left_layout), (weight, layout)):
        size = packed_bytes(planes, blocks.format, blocks.shape, 1, {})
        tensors.append(pack(blocks, planes, blocks.format, np.zeros(size, np.uint8)).tobytes())
    tensors.append(bytes(4 * rows * columns))
    program = of_kernel(function, host, tensors, [])
    (result,) = program.run(toolchain(host.architecture)).values()
    text = assembly(emit_kernel(function, host).llvm_ir, host)
    return np.frombuffer(result, np.float32).reshape(rows, columns), text


def in_short_runs(format: BlockFormat, *names: str) -> Any:
    """A parameter that is left to long runs unless it is one of these."""
    marks = [] if format.name in names else [pytest.mark.long]
    return pytest.param(format, marks=marks, id=format.name)


@pytest.mark.parametrize("activations", [int8_block32, int16_block32], ids=str)
@pytest.mark.parametrize("format", [in_short_runs(f, "q4_1", "q8_0") for f in WEIGHTS])
def test_products_of_blocks_have_the_same_bits(
    emulated: Emulated, format: BlockFormat, activations: BlockFormat
) -> None:
    """Whatever the instruction for bytes and the width of vectors: sums of codes are exact."""
    weight = largest_codes(format, 24, 256)
    left = quantize(rows_of(5, 256), activations)
    try:
        expected, _ = product(host_features(), weight, left)
    except TargetError as error:
        pytest.skip(str(error))
    found, text = product(emulated.host, weight, left)
    np.testing.assert_array_equal(found, expected)
    assert ("sdot" in text) == emulated.host.has("dotprod")
    assert ("smull" in text) != emulated.host.has("dotprod")


# --- whole steps --------------------------------------------------------------------------------


def step_results(program: Function, host: HostFeatures) -> dict[str, bytes]:
    """The outputs of a decoder's step on random weights and states."""
    prepared, artifact = compile_objects(program, host)
    stored = {p.value.name: p.value.tensor for p in program.params}
    kinds = {p.value.name: p.value.tensor for p in prepared.laid_out.step.params}
    given: dict[str, Any] = {}
    named = zip(program.attrs["names"], program.attrs["roles"], values_of(program), strict=True)
    for (name, role, value), param in zip(named, program.params, strict=True):
        kind = kinds[param.value.name] if role == "state" else stored[param.value.name]
        packed = role == "state" or isinstance(value, Blocks)
        given[name] = pack(value, kind.layout, kind.dtype) if packed else value
    step = prepared.laid_out.step
    return of_step(step, prepared.load, artifact, given, SIZES).run(toolchain(host.architecture))


def test_a_models_step_has_the_same_bits(emulated: Emulated) -> None:
    program = decoder(["q4_1", "q4_1", "q8_0"])
    try:
        expected = step_results(program, emulated.own)
    except TargetError as error:
        pytest.skip(str(error))
    assert step_results(program, emulated.host) == expected
    logits = execute(fuse(quantize_activations(program)), values_of(program), SIZES)[0]
    found = np.frombuffer(expected["logits"], np.float32).reshape(logits.shape)
    np.testing.assert_allclose(found, logits, atol=1e-4 * np.abs(logits).max())


# --- what code asks for -------------------------------------------------------------------------


@pytest.mark.parametrize("level", [level.name for level in LEVELS])
def test_kernels_ask_for_nothing_that_a_level_lacks(level: str) -> None:
    """Of what LLVM names by a machine, code holds what the table gives the level."""
    host = features_of(level)
    allowed = {row.intrinsic for row in TABLE if has(host, row.operation)}
    for name in (*FEW, "matmul q8_0 x int8 blocks", "matmul q6_k x int8 blocks"):
        case = case_of(name)
        drawn = case.drawn(case.sizes[1])
        function = specialized(case.kernel, drawn.copied(), **drawn.consts, **case.tiles)
        called = re.findall(r"llvm\.(?:x86|aarch64)[\w.]*", emit_kernel(function, host).llvm_ir)
        assert set(called) <= allowed, name


def test_a_level_knows_its_instructions() -> None:
    dots = {
        level.name: [
            has(features_of(level.name), operation)
            for operation in (Operation.FOUR_BYTES, Operation.FOUR_SIGNED_BYTES, Operation.FUSED)
        ]
        for level in LEVELS
    }
    assert dots == {
        "x86-64": [False, False, False],
        "avx2": [False, False, True],
        "avx2-vnni": [True, False, True],
        "avx512": [False, False, True],
        "avx512-vnni": [True, False, True],
        "amx": [True, False, True],
        "neon": [False, False, True],
        "neon-dotprod": [False, True, True],
    }
