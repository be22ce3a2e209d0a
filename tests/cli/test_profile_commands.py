"""``dure profile`` of a model's steps and of a kernel's launches: tables, JSON, pages, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Tiny, write_model

from dure.cli.main import run

KERNEL = """
import dure
import dure.lang as dl

@dure.kernel
def double(x: dl.Tensor, y: dl.Tensor, n: dl.const):
    i = dl.program_id(0)
    dl.store(y, (i,), dl.load(x, (i,), (n,)) * 2.0)
"""


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)


Command = Callable[..., Ended]


@pytest.fixture
def dure(capsys: pytest.CaptureFixture[str]) -> Command:
    def command(*arguments: str) -> Ended:
        code = run(["profile", *arguments])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_model(Tiny("llama", layers=3, weight_type="Q4_1"), path)
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kernels.py"
    path.write_text(KERNEL)
    return path


# --- a model's steps -----------------------------------------------------------------------------


def test_a_models_step_as_a_table(dure: Command, model: str) -> None:
    ended = dure("llm", model, "--steps", "2", "--context", "16", "--threads", "2")
    assert ended.code == 0, ended.err
    head, step, *_ = ended.out.splitlines()
    assert head == f"{model}: decode of 1 x 16 tokens on 2 workers; medians of 2 steps"
    assert step.startswith("a step ") and "GB/s read in the same run" in step
    assert "a step that isn't recorded" in ended.out
    for word in (
        "OPERATOR",
        "gated_linear gate+up",
        "linear down",
        "attention",
        "BARRIER, BECAUSE",
    ):
        assert word in ended.out
    assert ended.out.splitlines()[-1].startswith("workers wait for ")


@pytest.mark.parametrize(("phase", "batch"), [("decode", 3), ("prefill", 1)])
def test_a_models_step_as_json(dure: Command, model: str, phase: str, batch: int) -> None:
    options = ["--phase", phase, "--batch", str(batch), "--context", "16", "--steps", "2"]
    found = dure("llm", model, "--threads", "1", "--json", *options).json
    assert (found["model"], found["phase"], found["batch"]) == (model, phase, batch)
    assert (found["context"], found["workers"], found["steps"]) == (16, 1, 2)
    assert min(found["ns"], found["plain_ns"], found["tok_s"], found["read_gb_s"]) > 0
    assert set(found["peaks"]) == {"float32", "int8"} and len(found["waiting"]) == 1
    counts = {entry["name"]: entry["count"] for entry in found["operators"]}
    assert counts["gated_linear gate+up"] == counts["attention"] == 3
    assert all(entry["ns"] > 0 for entry in found["operators"])


def test_a_models_step_as_a_page_and_a_trace(dure: Command, model: str, tmp_path: Path) -> None:
    for name in ("step.html", "step.json"):
        output = str(tmp_path / name)
        ended = dure("llm", model, "--steps", "1", "--context", "8", "-o", output)
        assert ended.code == 0 and f"wrote {output}" in ended.err
    assert "gated_linear gate+up" in (tmp_path / "step.html").read_text()
    assert json.loads((tmp_path / "step.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--phase", "sleep"], "a step is decode or prefill"),
        (["-o", "step.svg"], "-o step.svg isn't the name of a .html or .json or .json.gz file"),
        (["-o", "no/such/step.html"], "its folder isn't there"),
        (["--phase", "prefill", "--batch", "2"], "a prefill step is of one sequence"),
        (["--context", "1000000"], "take fewer or shorter sequences"),
        (["--steps", "0"], "--steps"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_steps_that_cannot_be_watched(
    dure: Command, model: str, options: list[str], said: str
) -> None:
    ended = dure("llm", model, *options)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err


def test_no_such_model(dure: Command, tmp_path: Path) -> None:
    ended = dure("llm", str(tmp_path / "missing.gguf"))
    assert ended.code == 2 and "missing.gguf" in ended.err and "fix:" in ended.err


# --- a kernel's launches -------------------------------------------------------------------------


def test_an_operators_launches_as_a_table(dure: Command) -> None:
    ended = dure("softmax", "64x100", "--launches", "2", "--threads", "2")
    assert ended.code == 0, ended.err
    head, launch, *_ = ended.out.splitlines()
    assert head.startswith("softmax 64x100 f32 on 2 workers; medians of 2 launches")
    assert launch.startswith("a launch ") and "a call from Python checks" in launch
    for word in ("51.2 kB needed", "in the same run", "bound by ", "recording takes ", "IMBALANCE"):
        assert word in ended.out
    rows = [line.split() for line in ended.out.splitlines()[-2:]]
    assert [row[:2] for row in rows] == [["softmax", "0"], ["softmax", "1"]]


@pytest.mark.parametrize("spelling", [[], ["kernel"]])
def test_a_kernel_of_a_file_as_json(dure: Command, file: Path, spelling: list[str]) -> None:
    arrays = ["--arg", "x=f32[1000]", "--arg", "y=f32[1000]", "--const", "n=128"]
    options = ["--launches", "3", "--threads", "1", "--json"]
    found = dure(*spelling, f"{file}:double", *arrays, *options).json
    assert (found["op"], found["dtype"], found["workers"]) == ("double", "float32", 1)
    assert (found["bytes"], found["flops"], found["launches"]) == (8000, 8 * 128, 3)
    assert found["bound"] in found["least_ns"] and found["ns"] > 0
    (kernel,) = found["kernels"]
    assert (kernel["name"], kernel["instances"], kernel["tiles"]) == ("double", 8, {})
    assert len(kernel["busy_ns"]) == 1 and kernel["idle_ns"] == [pytest.approx(0, abs=1)]
    assert min(kernel["ns"], kernel["recorded_ns"], kernel["slowest_ns"], kernel["checks_ns"]) > 0


def test_a_kernel_without_operations(dure: Command) -> None:
    ended = dure("transpose", "32x32", "--launches", "1")
    assert ended.code == 0 and "it needs no operations" in ended.out


def test_options_may_come_first(dure: Command) -> None:
    found = dure("--launches", "1", "--json", "softmax", "8x8").json
    assert (found["op"], found["launches"]) == ("softmax", 1)


def test_launches_as_a_page_and_a_trace(dure: Command, tmp_path: Path) -> None:
    for name in ("launch.html", "launch.json"):
        output = str(tmp_path / name)
        ended = dure("softmax", "8x64", "--launches", "1", "-o", output)
        assert ended.code == 0 and f"wrote {output}" in ended.err
    assert "tile function softmax" in (tmp_path / "launch.html").read_text()
    events = json.loads((tmp_path / "launch.json").read_text())["traceEvents"]
    assert "softmax" in {event["name"] for event in events}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nothing"], "nothing"),
        (["softmax"], "dims"),
        (["softmax", "64"], "64"),
        (["softmax", "8x8", "--dtype", "f3"], "f3"),
        (
            ["gemm", "8x8x8", "--dtype", "int4"],
            "'x' of kernel 'matmul_kn' is a plain tensor of int4",
        ),
        (["softmax", "8x8", "--arg", "x=f32[8]"], "--arg and --const are for FILE.py:KERNEL"),
        (["softmax", "8x8", "--launches", "0"], "--launches"),
        (["softmax", "8x8", "-o", "launch.txt"], "-o launch.txt isn't the name of a"),
        (["softmax", "1000000x1000000"], "the system has"),
        (["smollm2"], "dure profile llm smollm2"),
        (["some/tiny.gguf"], "dure profile llm some/tiny.gguf"),
        (["none.py:double", "--arg", "x=f32[8]"], "there is no file none.py"),
    ],
)
def test_launches_that_cannot_be_watched(dure: Command, given: list[str], said: str) -> None:
    ended = dure(*given)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err


def test_the_compiler_chooses_tiles(dure: Command, file: Path) -> None:
    arrays = ["--arg", "x=f32[300]", "--arg", "y=f32[300]"]
    (kernel,) = dure(f"{file}:double", *arrays, "--launches", "1", "--json").json["kernels"]
    assert kernel["tiles"]["n"] * kernel["instances"] >= 300


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the kernel 'double' is missing x, y"),
        (["--arg", "x=f32[8]", "--arg", "y=q4[8]"], "no dtype is called 'q4'"),
        (["--arg", "x=f32[8]", "--arg", "y=f32[0]"], "an extent is at least 1"),
        (["64x64"], "the sizes of a kernel of a file are those of its tensors"),
        (["--const", "m=8"], "has no const 'm'"),
    ],
)
def test_kernels_of_a_file_that_cannot_be_launched(
    dure: Command, file: Path, arguments: list[str], said: str
) -> None:
    tensors = [] if not arguments or "--arg" in arguments else ["--arg", "x=f32[8]"]
    tensors += ["--arg", "y=f32[8]"] if tensors else []
    ended = dure(f"{file}:double", *arguments, *tensors, "--launches", "1")
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err and "fix:" in ended.err


def test_help(dure: Command) -> None:
    assert dure("--help").code == 0
    for command in ("llm", "kernel"):
        ended = dure(command, "--help")
        assert ended.code == 0 and "Example: dure profile" in ended.out
    ended = dure()
    assert ended.code == 2 and "Usage: dure profile" in ended.err
