"""The artefacts that releases of dure wrote, and what their kernels compute.

``python tests/golden_artefacts.py`` writes those of this release, ``tests/golden/RELEASE``: once,
when the release is made.  A file that a release wrote is never written again: that later releases
run it as it is, on all chips, is what tests/models/test_golden_artefacts.py is for.

Beside each NAME.dure lies NAME.json, what the interpreter of the release that wrote it computed of
:func:`inputs`: for each kernel and result, the root mean square and some elements; and what it
computed of a step's tensor program on :func:`step_arrays`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

import dure
from dure.ir.blocks import Blocks
from dure.ir.core import Function
from dure.ir.dtypes import BlockFormat, DType
from dure.ir.interpret import empty_value, execute
from dure.ir.types import static_extent
from dure.library.build import index_values, tile_function
from dure.library.call import KernelCall
from dure.library.suite.execute import interpret
from dure.library.work import Work, operator_work
from dure.models.artefact import launches
from dure.models.batch import Batch
from dure.models.chip_step import ChipStep, chip_step
from dure.models.config import ModelConfig, RopeConfig

FOLDER = Path(__file__).parent / "golden"
#: Elements of a result that are kept.
_KEPT = 12
MODEL = ModelConfig(
    "qwen3", 64, 96, 2, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e6), tied=False, qk_norm=True
)


def subjects() -> dict[str, Work | ChipStep]:
    """What a release writes."""
    return {
        "gemm_gelu": operator_work("gemm_gelu", "48x80x96", "bf16"),
        "softmax": operator_work("softmax", "24x200", "bf16"),
        "matmul_q4_k": operator_work("matmul_q4_k", "3x256x64", "f32"),
        "grouped_attention": operator_work("grouped_attention", "4x2x3x40x32", "bf16"),
        "moe_route": operator_work("moe_route", "5x8x2", "bf16"),
        "grouped_matmul": operator_work("grouped_matmul", "6x4x32x64", "bf16"),
        "decode_step": chip_step(MODEL, Batch("decode", 3, 40), "bf16", "tiny"),
    }


def inputs(call: KernelCall, function: Function) -> list[Any]:
    """Arguments that are the same everywhere: sines, small integers, and the stored indices."""
    lists = index_values(call, function)
    found: list[Any] = []
    for place, param in enumerate(function.params):
        kind = param.value.tensor
        value = lists[param.value.name] if kind.index is not None else empty_value(kind, {})
        if kind.index is None and param.access != "out":
            value = _filled(value, kind.dtype.bits, 1.0 + place)
        found.append(value.copy() if isinstance(value, np.ndarray) else value)
    return found


def _filled(value: Any, bits: int, phase: float) -> Any:
    if isinstance(value, Blocks):
        return _blocks(value)
    # More positive than negative: sums don't cancel, so that roundings show as what they are.
    waves = 0.3 + np.sin(1.7 * np.arange(value.size) + phase).reshape(value.shape)
    if value.dtype.kind in "iu" or bits < 8:
        return np.round(3 * waves).astype(value.dtype)
    return waves.astype(np.float32).astype(value.dtype)


def _blocks(value: Blocks) -> Blocks:
    """Codes in turn, under scales between 0.005 and 0.015; a format without planes of sums."""
    assert isinstance(value.format, BlockFormat)
    for plane in value.format.planes:
        array = value.planes[plane.name]
        count = np.arange(array.size).reshape(array.shape)
        if plane.dtype.is_float:
            array[...] = (0.01 + 0.005 * np.sin(count)).astype(array.dtype)
        else:
            assert plane.dtype.kind == "uint" and plane.role != "sum"
            array[...] = (7 * count % (1 << plane.dtype.bits)).astype(array.dtype)
    return value


def results(function: Function, arguments: list[Any]) -> dict[str, npt.NDArray[np.float64]]:
    """What a function has written, by the names of its parameters."""
    return {
        param.value.name: array.astype(np.float32).astype(np.float64)
        for param, array in zip(function.params, arguments, strict=True)
        if param.access != "in"
    }


def summary(call: KernelCall) -> dict[str, dict[str, Any]]:
    """What the interpreter computes."""
    function = tile_function(call)
    arguments = inputs(call, function)
    interpret(function, arguments)
    return {name: kept(array) for name, array in results(function, arguments).items()}


def kept(array: npt.NDArray[np.float64]) -> dict[str, Any]:
    """The root mean square of an array, and some of its elements."""
    places = np.linspace(0, array.size - 1, min(_KEPT, array.size)).round().astype(int)
    rms = float(np.sqrt(np.mean(array**2)))
    return {"rms": float(f"{rms:.6g}"), "elements": [float(f"{v:.6g}") for v in array.flat[places]]}


def step_arrays(step: ChipStep) -> dict[str, npt.NDArray[Any]]:
    """What a step runs on, by name: norms about 1, all else sines, and the stored indices."""
    values = {
        v.name: v
        for entry in step.calls
        for operands in entry.part.operands
        for operand in operands
        if operand is not None
        for value in operand.stored.values
        for v in (entry.layers.tables.get(value, (value,)) if entry.layers else (value,))
    }
    found: dict[str, npt.NDArray[Any]] = dict(step.inputs)
    for place, name in enumerate(sorted(set(values) - set(found) - {""})):
        kind = values[name].tensor
        shape = [static_extent(extent) or 0 for extent in kind.shape]
        waves = np.sin(1.7 * np.arange(np.prod(shape)) + place).reshape(shape)
        waves = 1 + 0.2 * waves if len(shape) == 1 else waves / 4
        assert isinstance(kind.dtype, DType)
        found[name] = waves.astype(np.float32).astype(kind.dtype.numpy)
    return found


def step_summary(step: ChipStep, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """What the interpreter computes of the step's tensor program."""
    program = step.program
    assert program is not None
    names = cast("tuple[str, ...]", program.attrs["names"])
    given = [arrays[name].copy() for name in names]
    results = execute(program, given, step.sizes)
    outputs = zip(cast("tuple[str, ...]", program.attrs["outputs"]), results, strict=False)
    return {name: kept(cast("Any", array).astype(np.float64)) for name, array in outputs}


def main() -> None:
    folder = FOLDER / dure.__version__
    if folder.exists():
        sys.exit(f"{folder} is there: what a release wrote stays as it is")
    folder.mkdir(parents=True)
    for name, what in subjects().items():
        path = folder / f"{name}.dure"
        dure.save(path, what, chips=())
        found = dure.load(path)
        lines = [json.dumps(summary(call)) for call in launches(found)]
        step = "null"
        if isinstance(what, ChipStep) and isinstance(found, ChipStep):
            step = json.dumps(step_summary(what, step_arrays(found)))
        kernels = ",\n".join(lines)
        text = f'{{"kernels": [\n{kernels}\n],\n"step": {step}}}\n'
        path.with_suffix(".json").write_text(text, encoding="utf-8")
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB, {len(lines)} kernels")


if __name__ == "__main__":
    main()
