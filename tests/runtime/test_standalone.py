"""Executables of their own: what they compute, and what they say where they can't be made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from library_runner import specialized

import dure
import dure.lang as dl
from dure.errors import TargetError
from dure.ir.interpret import bind_sizes
from dure.runtime import standalone
from dure.runtime.host import architecture_name, host_features
from dure.runtime.standalone import Executable, Memory, Toolchain, toolchain
from dure.targets.cpu.standalone import of_kernel


@pytest.fixture(scope="module")
def tools() -> Toolchain:
    try:
        return toolchain(architecture_name())
    except TargetError as error:
        pytest.skip(str(error))


@dure.kernel
def add_one(x: dl.Tensor, y: dl.Tensor):
    i = dl.program_id(0)
    dl.store(y, (i,), dl.load(x, (i,), (8,)) + 1 + dl.load(y, (i,), (8,)))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("turns", [1, 4])
def test_a_kernel_runs_turns_on_all_its_instances(
    tools: Toolchain, workers: int, turns: int
) -> None:
    x, y = np.arange(50, dtype=np.float32), np.ones(50, np.float32)
    function = specialized(add_one, [x, y])
    function = replace(
        function, params=(function.params[0], replace(function.params[1], access="inout"))
    )
    sizes = bind_sizes(function, [x, y])
    numbers = [sizes[s.name] for s in function.symbols]
    case = of_kernel(function, host_features(), [x.tobytes(), y.tobytes()], numbers, workers)
    program = Executable(case.objects, tools)
    (found,), _ = program.run(case.memory, turns=turns, workers=workers)
    np.testing.assert_array_equal(np.frombuffer(found, np.float32), 1 + turns * (x + 1))


def test_memory_keeps_what_was_asked_for() -> None:
    memory = Memory()
    first = memory.add(b"abc", 8)
    second = memory.add(b"xy", kept=True)
    third = memory.add(size=3, kept=True)
    memory.point(first, 0, second, 1)
    assert (first, second, third) == (0, 1, 2)
    assert memory.to_bytes().endswith(b"abcxy")
    assert memory.split(b"xyz12") == [b"xy", b"z12"]


def test_a_program_that_fails_says_so(tools: Toolchain) -> None:
    with pytest.raises(TargetError, match="dure_step"):
        Executable([], tools)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standalone.shutil, "which", lambda command: None)
    with pytest.raises(TargetError, match="no C compiler for aarch64") as caught:
        toolchain("aarch64")
    assert "aarch64-linux-gnu-gcc" in caught.value.rule
    monkeypatch.setattr(standalone.shutil, "which", lambda command: "gcc" in command)
    if architecture_name() != "aarch64":
        with pytest.raises(TargetError, match="no emulator for aarch64"):
            toolchain("aarch64")
