"""A kernel compiles to the same text in every process, whatever order its sets are in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
from dure.compiler.chip.pipeline import compile_for
from dure.errors import DureError
from dure.library.build import tile_function
from dure.library.suite import case
from dure.targets import chip, chip_names

for title in ("rmsnorm with weight and residual f32", "layernorm bf16", "attention by rows bf16"):
    one = case(title)
    function = tile_function(one.call(one.drawn(one.sizes[-1])))
    for name in chip_names():
        try:
            print(title, name, compile_for(function, chip(name)).sha256)
        except DureError as error:
            print(title, name, error.what)
"""


@pytest.fixture(scope="module")
def first() -> str:
    return compiled(1)


def compiled(seed: int) -> str:
    """What a process with this seed of string hashes compiles."""
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_a_kernel_compiles_to_the_same_program_in_every_process(first: str, seed: int) -> None:
    assert first.count("\n") > 16
    assert compiled(seed) == first
