"""Code to read: machine code beside the author's lines, and that looking changes nothing."""

from __future__ import annotations

import json
import re

import pytest

from dure.cli.app import dispatch
from dure.ir.core import Span
from dure.library.build import tile_function
from dure.library.validation_cpu import host_tiles
from dure.library.work import operator_work
from dure.runtime.host import host_features, host_levels
from dure.runtime.llvm import assembly
from dure.targets.cpu.codegen import emit_kernel
from dure.targets.cpu.listing import Listing, listing
from dure.targets.cpu.locations import Locations


def listed(name: str, dims: str) -> tuple[Listing, str]:
    """A listing of an operator's kernel, and the assembly of what runs."""
    (call,) = operator_work(name, dims, "f32").calls
    function = tile_function(call, host_tiles(call))
    host = host_features()
    return listing(function, host), assembly(emit_kernel(function, host).llvm_ir, host)


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize(
    ("name", "dims"), [("softmax", "16x300"), ("gemm", "33x64x65"), ("transpose", "17x40")]
)
def test_the_code_is_what_runs(
    name: str, dims: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    found, plain = listed(name, dims)
    kept = [line.strip() for line in plain.splitlines() if re.match(r"\t[a-z]", line)]
    shown = [line.strip() for run in found.machine for line in run.lines if line[0] == " "]
    names = [line.split("\t")[0].split(" ")[0] for line in kept]
    assert [line.split(" ")[0] for line in shown] == names
    assert found.instructions == len(names) > 20
    assert "define void @k_" in found.llvm and found.tile.startswith("tile function")


def test_instructions_stand_beside_the_lines_that_they_come_from() -> None:
    found, _ = listed("softmax", "16x300")
    texts = {run.span.text.strip() for run in found.machine if run.span is not None}
    assert any("dl.max(" in text for text in texts)
    assert any("dl.store(" in text for text in texts)
    assert all(run.lines for run in found.machine)


def test_names_of_files_are_escaped() -> None:
    locations = Locations()
    strange = 'a "b" \\ 두레.py'
    assert locations.of(Span(strange, 3, 0, 1, "x")) == locations.of(Span(strange, 3, 5, 6, "x"))
    text = locations.metadata("k")
    assert '"b"' not in text and "\\22b\\22" in text and text.isascii()


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["asm", "softmax", "16x300", "--json", "--stage", "machine,tile"]) == 0
    (kernel,) = json.loads(capsys.readouterr().out)["kernels"]
    assert kernel["name"] == "softmax" and "llvm" not in kernel
    lines = {run["line"] for run in kernel["machine"]}
    assert len(lines) > 3 and sum(len(run["code"]) for run in kernel["machine"]) > 20
    assert dispatch(["asm", "softmax", "16x300"]) == 0
    shown = capsys.readouterr().out
    assert all(f"== {stage}" in shown for stage in ("tile", "llvm", "machine"))
    assert dispatch(["asm", "softmax", "16x300", "--stage", "ptx"]) == 2
    assert "a stage is one of" in capsys.readouterr().err
