"""What releases of dure wrote runs on every chip, also on one that they didn't know.

A failure here means that an artefact of a release can't be read any more, or means something else
than it did: mend the code, never the files (docs/artefacts.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from math import erf
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from golden_artefacts import FOLDER, inputs, kept, results, step_arrays

import dure
from dure.compiler.chip.allocate import ScratchpadError
from dure.compiler.chip.pipeline import Compiled, compile_for
from dure.ir.verifier import verify
from dure.library.build import build, index_values, tile_function
from dure.library.call import KernelCall
from dure.library.matrix import fewest_digits, run_on_chip
from dure.library.suite.execute import compile_and_run, interpret
from dure.machine.chip import Chip
from dure.models.artefact import launches
from dure.models.chip_program import Chosen, options_for, step_program
from dure.models.chip_step import ChipStep
from dure.models.chip_values import run_step
from dure.sim.sanitizer import sanitize
from dure.sim.timing import simulate
from dure.targets import chip, chip_names

FILES = sorted(FOLDER.glob("*/*.dure"))
#: A chip that isn't in the package.
NEW = str(Path(__file__).parents[2] / "examples" / "tpu_v4.toml")
ON_NEW = ("gemm_gelu", "softmax", "matmul_q4_k")
#: How far off results may be: roundings of the coarsest type, as a part of the largest result.
_ROUNDINGS = 8
IDS = [f"{file.parent.name}-{file.stem}" for file in FILES]
Floats = npt.NDArray[np.float64]


@cache
def loaded(file: Path) -> tuple[KernelCall, ...]:
    return launches(dure.load(file))


@cache
def expected(file: Path, number: int) -> tuple[Any, dict[str, Floats]]:
    """The arguments of a kernel, and what the interpreter makes of them."""
    call = loaded(file)[number]
    function = tile_function(call)
    arguments = inputs(call, function)
    interpret(function, arguments)
    return inputs(call, function), results(function, arguments)


def recorded(file: Path) -> Any:
    """What the interpreter of the release computed."""
    return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))


def test_there_are_files() -> None:
    assert {"0.1.0-gemm_gelu", "0.1.0-grouped_attention", "0.1.0-decode_step"} <= set(IDS)


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_it_means_what_it_meant(file: Path) -> None:
    """The interpreter computes what it did when the file was written."""
    said = recorded(file)["kernels"]
    assert len(said) == len(loaded(file))
    for number, entry in enumerate(said):
        found = {name: kept(array) for name, array in expected(file, number)[1].items()}
        assert set(found) == set(entry)
        for name, summary in entry.items():
            limit = 0.02 * summary["rms"]
            assert found[name]["rms"] == pytest.approx(summary["rms"], abs=limit)
            assert found[name]["elements"] == pytest.approx(summary["elements"], abs=limit)


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_it_runs_on_the_cpu(file: Path) -> None:
    for number, call in enumerate(loaded(file)):
        given, wanted = expected(file, number)
        function = tile_function(call)
        arguments = [a.copy() if isinstance(a, np.ndarray) else a for a in given]
        compile_and_run(function, arguments)
        close(results(function, arguments), wanted, 8)


@pytest.mark.parametrize("name", chip_names())
@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_it_runs_on_every_chip(file: Path, name: str) -> None:
    """Compiled, proved, timed, and run on bytes."""
    check(file, chip(name))


# That file declares nothing that reads index lists.
@pytest.mark.parametrize("file", [f for f in FILES if f.stem in ON_NEW])
def test_it_runs_on_a_chip_that_is_not_in_the_package(file: Path) -> None:
    check(file, chip(NEW))


def test_it_runs_with_little_scratchpad() -> None:
    small = chip("rngd", {"memories.sram.size": "16KiB"})
    file = FOLDER / "0.1.0" / "gemm_gelu.dure"
    call = loaded(file)[0]
    with pytest.raises(ScratchpadError):
        compile_for(tile_function(call, call.variants[-1]), small)
    check(file, small)
    assert build(call, small).consts in call.variants


def check(file: Path, target: Chip) -> None:
    for number, call in enumerate(loaded(file)):
        compiled = fitting(call, target)
        verify(compiled.function)
        verdict = sanitize(compiled.function, target)
        assert verdict.ok, f"{call.kernel.__name__}: {verdict.render()}"
        lists = index_values(call, compiled.function)
        assert simulate(compiled.function, target, indices=lists).ps > 0
        given, wanted = expected(file, number)
        arguments = [a.copy() if isinstance(a, np.ndarray) else a for a in given]
        run_on_chip(compiled, target, arguments)
        digits = fewest_digits(target, compiled)
        close(results(compiled.function, arguments), wanted, 8 if digits is None else digits)


def middling(call: KernelCall) -> Sequence[Mapping[str, int]]:
    """The smaller half of the stored sizes."""
    sizes = call.variants or ({},)
    return sizes[: (len(sizes) + 1) // 2]


def fitting(call: KernelCall, target: Chip) -> Compiled:
    """The program of middling sizes, or of the largest below that fit."""
    for sizes in reversed(middling(call)):
        try:
            return compile_for(tile_function(call, sizes), target)
        except ScratchpadError:
            continue
    raise AssertionError(f"no sizes of {call.kernel.__name__} fit {target.name}")


def close(found: dict[str, Floats], wanted: dict[str, Floats], digits: int) -> None:
    for name, array in wanted.items():
        limit = _ROUNDINGS * 2.0 ** -min(digits, 8) * np.abs(array).max()
        assert np.abs(found[name] - array).max() <= limit, name


@pytest.mark.parametrize("name", chip_names())
@pytest.mark.parametrize("file", [f for f in FILES if recorded(f)["step"] is not None])
def test_a_step_runs_as_one_program(file: Path, name: str) -> None:
    step, target = dure.load(file), chip(name)
    assert isinstance(step, ChipStep)
    options = options_for(step, target, strict=False, prefetch=True)
    chosen: list[Chosen] = []
    for entry in step.calls:
        call, operands = entry.part.ways(target)[0][0]
        built = build(call, target, tiles=middling(call)[-1], base=options)
        chosen.append(Chosen(entry, operands, built))
    program = step_program(step, target, chosen, prefetch=True)
    verify(program.function)
    assert sanitize(program.function, target).ok
    assert simulate(program.function, target, indices=program.indices).ps > 0
    found = run_step(step, program, target, step_arrays(step))
    for output, summary in recorded(file)["step"].items():
        got = kept(found[output].astype(np.float64))
        assert got["elements"] == pytest.approx(summary["elements"], abs=0.06 * summary["rms"])


def test_a_product_against_numpy() -> None:
    given, wanted = expected(FOLDER / "0.1.0" / "gemm_gelu.dure", 0)
    x, w = (a.astype(np.float64) for a in given[:2])
    y = x @ w
    gelu = 0.5 * y * (1 + np.vectorize(erf)(y / np.sqrt(2)))
    assert np.abs(wanted["y"] - gelu).max() <= 2.0**-8 * np.abs(gelu).max()


def test_a_softmax_against_numpy() -> None:
    given, wanted = expected(FOLDER / "0.1.0" / "softmax.dure", 0)
    powers = np.exp(given[0].astype(np.float64))
    exact = powers / powers.sum(axis=1, keepdims=True)
    assert np.abs(wanted["y"] - exact).max() <= 2.0**-8 * exact.max()
