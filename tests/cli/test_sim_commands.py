"""``dure sim``, ``check``, ``compile``, ``sanitize``, ``kernels``: what they print and refuse."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dure.cli.app import dispatch
from dure.ir.parser import parse_function
from dure.ir.printer import print_function
from dure.library.suite import CASES
from dure.targets import chip, chip_names

GEMM = ("gemm", "64x64x64", "--target", "rngd")

KERNEL = """
import dure
import dure.lang as dl


@dure.kernel
def scaled(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, factor: dl.const = 2.0):
    i, j = dl.program_id(0), dl.program_id(1)
    dl.store(y, (i, j), (dl.load(x, (i, j), (bm, bn)) * factor).to(y.dtype))


@dure.kernel
def gathered(ids: dl.Index(0), table: dl.Tensor, y: dl.Tensor, bt: dl.const, bd: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    dl.store(y, (i, j), dl.load(table, (dl.load(ids, (i,), (bt,)), j), (bt, bd)))


@dure.kernel
def whole(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), dl.exp(dl.load(x, (0, 0), (2048, 4096))))


@dure.kernel
def whole_numbers(a: dl.Tensor, b: dl.Tensor, y: dl.Tensor, bm: dl.const):
    i = dl.program_id(0)
    acc = dl.dot(dl.load(a, (i, 0), (bm, 64)), dl.load(b, (0, 0), (64, 64)))
    dl.store(y, (i, 0), acc)


def plain(x):
    return x
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("kernels") / "mine.py"
    path.write_text(KERNEL)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = dispatch(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def arguments_of(file: str, *, kernel: str = "scaled", shape: str = "f32[40x70]") -> list[str]:
    return [f"{file}:{kernel}", "--arg", f"x={shape}", "--arg", f"y={shape}"]


# --- sim -----------------------------------------------------------------------------------------


def test_the_keys_of_a_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "sim", *GEMM)
    assert found["target"] == "rngd"
    assert found["flops"] == 2 * 64**3
    assert found["bytes"] == 3 * 64 * 64 * 2
    assert found["bound"] in ("compute", "memory", "link", "latency")
    assert found["confidence"] in ("published", "derived", "guessed")
    assert bool(found["guesses"]) == (found["confidence"] == "guessed") or found["untried"]
    assert re.fullmatch("[0-9a-f]{64}", found["program_sha256"])
    clock = chip("rngd").clock.base
    assert found["cycles"] == pytest.approx(found["ns"] * clock / 1e9, abs=1)
    peaks = chip("rngd").peaks
    least = max(
        found["flops"] / peaks.compute["bfloat16"].base, found["bytes"] / peaks.bandwidth.base
    )
    assert found["fraction_of_roofline"] == pytest.approx(least * 1e9 / found["ns"])
    for key in ("compile_s", "sim_s", "instructions", "events", "classes"):
        assert found[key] > 0
    (part,) = found["parts"]
    assert set(part["tiles"]) == {"bm", "bn", "bk"}
    assert part["program_sha256"] == found["program_sha256"]


def test_all_targets(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "sim", "transpose", "33x65", "--target", "all")["results"]
    assert [entry["target"] for entry in found] == list(chip_names())
    assert all("ns" in entry or entry["error"]["what"] for entry in found)


def test_launches_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "sim", "ffn_gelu", "16x64x128", "--target", "rngd")
    assert len(found["parts"]) == 2
    assert found["ns"] == pytest.approx(sum(part["ns"] for part in found["parts"]))
    assert found["instructions"] == sum(part["instructions"] for part in found["parts"])


def test_what_people_read(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "sim", *GEMM)
    assert code == 0
    assert "CONFIDENCE" in out and "bm=" in out and "cores " in out


def test_another_number(capsys: pytest.CaptureFixture[str]) -> None:
    base = result(capsys, "sim", "softmax", "512x4096", "--target", "rngd")
    slow = result(
        capsys, "sim", "softmax", "512x4096", "--target", "rngd", "--set",
        "memory.hbm.bandwidth=100GB/s",
    )  # fmt: skip
    assert slow["ns"] > 2 * base["ns"]
    assert slow["bound"] == "memory"
    assert "memories.hbm.bandwidth" in slow["overridden"]
    assert slow["fraction_of_roofline"] < base["fraction_of_roofline"]


def test_a_machine_file(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "examples" / "tpu_v4.toml"
    found = result(capsys, "sim", "gemm", "128x128x128", "--target", str(path))
    assert found["target"] == "tpu-v4"


def test_a_kernel_of_a_file(capsys: pytest.CaptureFixture[str], file: str) -> None:
    found = result(capsys, "sim", *arguments_of(file), "--target", "rngd", "--const", "bn=32")
    assert found["op"] == "scaled"
    assert found["bytes"] == 2 * 40 * 70 * 4
    assert found["flops"] >= 40 * 70
    assert set(found["parts"][0]["tiles"]) == {"bm"}


def test_indices_of_a_kernel_of_a_file(capsys: pytest.CaptureFixture[str], file: str) -> None:
    arguments = ["--arg", "ids=int32[20]:0..99", "--arg", "table=bf16[100x64]"]
    found = result(
        capsys, "sim", f"{file}:gathered", *arguments, "--arg", "y=bf16[20x64]",
        "--target", "tpu-v6e",
    )  # fmt: skip
    assert found["ns"] > 0


def test_conversions_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "sim", "gemm", "64x64x64", "--dtype", "f16", "--target", "tpu-v6e")
    conversions = found["parts"][0]["conversions"]
    assert {"float16"} == {c["from"] for c in conversions}
    code, out, _ = run(capsys, "sim", "gemm", "64x64x64", "--dtype", "f16", "--target", "tpu-v6e")
    assert code == 0 and "float16 -> float32" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gemm", "64x"), "are no dims of gemm"),
        (("gemm", "64x64"), "3 positive whole numbers"),
        (("gemm", "axbxc"), "are no dims of gemm"),
        (("gemm", "64x-1x64"), "are no dims of gemm"),
        (("gemm", "0x64x64"), "M of gemm is 0"),
        (("gemm", "64x64x1e3"), "are no dims"),
        (("gemm",), "gemm without dims"),
        (("gemm", "9" * 400 + "x1x1"), "an extent is at least 1 and at most"),
        (("gemm", "1000000x1000000x1000000"), "lie in the chip's far memory"),
        (("elementwise_1d", "1000000000000"), "needs"),
        (("gem", "64x64x64"), "no operator is called 'gem'"),
        (("gemm", "64x64x64", "--dtype", "bf17"), "no dtype is called 'bf17'"),
        (("softmax", "64x64", "--dtype", "int8"), "softmax in int8"),
        (("gemm", "64x64x64", "--algorithm", "best"), "no algorithm is called 'best'"),
        (("gemm", "64x64x64", "--target", "rngdd"), "did you mean rngd?"),
        (("gemm", "64x64x64", "--target", "none.toml"), "can't be read"),
        (("gemm", "64x64x64", "--set", "memory.hbm.bandwith=2TB/s"), "one of memories.hbm.band"),
        (("gemm", "64x64x64", "--set", "memory.hbm.bandwidth=2GHz"), "the unit 'GHz' doesn't fit"),
        (("gemm", "64x64x64", "--set", "clock"), "--set clock sets nothing"),
        (("gemm", "64x64x64", "--target", "all", "--set", "clock=1GHz"), "--set with --target all"),
        (("gemm", "64x64x64", "--arg", "x=f32[1]"), "--arg and --const are for FILE.py:KERNEL"),
        (("none.py:k",), "there is no file none.py"),
        (("gemm", "64x64x64", "--dtype", "f16", "--strict", "--target", "tpu-v6e"), "with strict"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    target = () if "--target" in arguments else ("--target", "rngd")
    code, out, err = run(capsys, "sim", *arguments, *target)
    assert code == 2 and not out
    assert words in err and "fix:" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--arg", "x=f32[4x4]"), "missing y"),
        (("--arg", "x=f32[4x4]", "--arg", "z=f32[4x4]"), "has no tensor 'z'"),
        (("--arg", "x"), "--arg x gives nothing"),
        (("--arg", "x=f32", "--arg", "y=f32[4x4]"), "is no type"),
        (("--arg", "x=f33[4x4]", "--arg", "y=f32[4x4]"), "no dtype is called 'f33'"),
        (("--arg", "x=f32[0x4]", "--arg", "y=f32[4x4]"), "an extent is at least 1"),
        (("--arg", f"x=f32[{10**13}x9]", "--arg", "y=f32[4x4]"), "at most 2^40 elements"),
        (("--arg", "x=f32[4x4]", "--arg", "y=f32[4x4]", "--const", "bx=4"), "no const 'bx'"),
        (("--arg", "x=f32[4x4]", "--arg", "y=f32[4x4]", "--const", "bm=p"), "bm=p is no value"),
        (("--arg", "x=f32[4]", "--arg", "y=f32[4x4]"), "one entry for each axis"),
    ],
)
def test_bad_arguments_of_a_kernel(
    capsys: pytest.CaptureFixture[str], file: str, arguments: tuple[str, ...], words: str
) -> None:
    code, out, err = run(capsys, "sim", f"{file}:scaled", *arguments, "--target", "rngd")
    assert code == 2 and not out
    assert words in err and "fix:" in err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scale", "one of gathered, scaled, whole, whole_numbers"),
        ("plain", "has no kernel 'plain'"),
    ],
)
def test_a_name_that_is_no_kernel(
    capsys: pytest.CaptureFixture[str], file: str, name: str, words: str
) -> None:
    code, _, err = run(capsys, "sim", f"{file}:{name}")
    assert code == 2 and words in err


def test_a_file_that_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0\n")
    code, _, err = run(capsys, "sim", f"{path}:k")
    assert code == 2 and "ZeroDivisionError" in err


# --- check ---------------------------------------------------------------------------------------


def test_legality_over_all_chips(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "check", "gemm", "256x256x256", "--dtype", "f16")
    assert found["ok"]
    by_target = {entry["target"]: entry for entry in found["targets"]}
    assert set(by_target) == set(chip_names())
    (kernel,) = by_target["tpu-v6e"]["kernels"]
    assert ("float16", "float32") in {(c["from"], c["to"]) for c in kernel["conversions"]}
    assert any("matmul.py" in c["where"] for c in kernel["conversions"])
    assert kernel["tiles"] and kernel["scratchpad"]


def test_strict_legality(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "check", "gemm", "256x256x256", "--dtype", "f16", "--strict", "--json"
    )
    assert code == 2 and "isn't legal on" in err
    found = {entry["target"]: entry for entry in json.loads(out)["targets"]}
    assert not found["tpu-v6e"]["ok"]
    error = found["tpu-v6e"]["kernels"][0]["error"]
    assert "which tpu-v6e lacks" in error["what"] and ".to(dl." in error["fix"]
    assert found["h100"]["ok"]


def test_a_kernel_that_does_not_fit_shows_the_map(
    capsys: pytest.CaptureFixture[str], file: str
) -> None:
    arguments = arguments_of(file, kernel="whole", shape="f32[2048x4096]")
    code, out, err = run(capsys, "check", *arguments, "--target", "h100")
    assert code == 2 and "isn't legal on h100" in err
    assert "which holds 227 KiB" in out
    assert re.search(r"32 MiB .*tile<2048 x 4096 x float32>.*mine.py:\d+", out)
    code, out, err = run(capsys, "sim", *arguments, "--target", "h100")
    assert code == 2 and not out
    assert "32 MiB" in err and "mine.py" in err and "fix: use smaller tiles" in err


def test_a_dtype_that_no_engine_multiplies(capsys: pytest.CaptureFixture[str], file: str) -> None:
    code, out, _ = run(
        capsys, "check", f"{file}:whole_numbers", "--target", "rngd", "--json",
        *(f for name in "aby" for f in ("--arg", f"{name}=int32[64x64]")),
    )  # fmt: skip
    assert code == 2
    error = json.loads(out)["targets"][0]["kernels"][0]["error"]
    assert error["rule"] and error["fix"] and "mine.py" in error["where"]


def test_a_chip_too_small_for_the_smallest_tile(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = Path(__file__).parents[2] / "examples" / "tpu_v4.toml"
    code, _, err = run(
        capsys, "sim", "gemm", "64x64x64", "--target", str(source), "--set",
        "memory.vmem.size=4096B",
    )  # fmt: skip
    assert code == 2
    assert "of vmem" in err and "4 KiB" in err


# --- compile and sanitize ------------------------------------------------------------------------


def test_programs_as_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = result(capsys, "compile", "softmax", "33x70", "--target", "rngd", "-o", str(tmp_path))
    (entry,) = found["programs"]
    text = Path(entry["file"]).read_text()
    assert hashlib.sha256(text.encode()).hexdigest() == entry["program_sha256"]
    program = parse_function(text)
    assert program.level == "machine"
    assert print_function(program) == text
    tile = parse_function(Path(entry["tile_file"]).read_text())
    assert tile.level == "tile"

    verdict = result(capsys, "sanitize", entry["file"], "--target", "rngd")
    assert verdict["ok"] and verdict["programs"][0]["program"] == program.name


def test_a_race_in_a_program_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = result(capsys, "compile", "softmax", "33x70", "--target", "rngd", "-o", str(tmp_path))
    path = Path(found["programs"][0]["file"])
    lines = path.read_text().splitlines(keepends=True)
    wait = next(n for n, line in enumerate(lines) if line.strip().startswith("wait("))
    broken = tmp_path / "broken.txt"
    broken.write_text("".join(lines[:wait] + lines[wait + 1 :]))
    code, out, err = run(capsys, "sanitize", str(broken), "--target", "rngd", "--json")
    assert code == 2 and "not proved" in err
    verdict = json.loads(out)
    assert not verdict["ok"]
    assert verdict["programs"][0]["findings"]


def test_sanitize_an_operator(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "sanitize", "gemm", "64x64x64", "--target", "rngd")
    assert found["ok"] and found["programs"][0]["states"] > 0
    code, out, _ = run(capsys, "sanitize", "gemm", "64x64x64", "--target", "rngd")
    assert code == 0 and "proved over all interleavings" in out


@pytest.mark.parametrize(
    ("content", "words"),
    [("nonsense", "expected a function"), ("", "expected"), (None, "can't be read")],
)
def test_a_text_that_is_no_program(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, words: str
) -> None:
    path = tmp_path / "program.txt"
    if content is not None:
        path.write_text(content)
    code, _, err = run(capsys, "sanitize", str(path), "--target", "rngd")
    assert code == 2 and words in err


def test_a_program_needs_its_target(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "sanitize", str(tmp_path / "p.txt"))
    assert code == 2 and "name it with --target" in err


# --- kernels -------------------------------------------------------------------------------------


def test_the_matrix(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "kernels.md"
    options = ("--case", "transpose", "--target", "rngd,cpu", "--short", "--jobs", "1")
    code, out, _ = run(capsys, "kernels", *options, "--markdown", str(file), "--json")
    assert code == 0
    cells = json.loads(out)["cells"]
    assert {(c["case"], c["target"]) for c in cells} == {
        (f"transpose {dtype}", target)
        for dtype in ("f32", "bf16", "int8")
        for target in ("rngd", "cpu")
    }
    assert all(c["ok"] for c in cells)
    assert all(c["ns"] > 0 for c in cells if c["target"] == "rngd")
    text = file.read_text()
    assert "| case | full size | rngd | cpu |" in text
    assert "| transpose f32 | transpose 4096x4096 f32 |" in text
    code, out, _ = run(capsys, "kernels", *options)
    assert code == 0 and "transpose int8" in out


def test_a_written_matrix_out_of_date(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "kernels.md"
    file.write_text(
        "| case | full size | rngd |\n|---|---|---|\n| gone | gemm 1x1x1 f32 | 1 us |\n"
    )
    options = ("--case", "transpose f32", "--short", "--check", str(file), "--jobs", "1")
    code, _, err = run(capsys, "kernels", *options, "--target", "rngd")
    assert code == 2 and "is out of date" in err and "its row gone is no case" in err
    code, _, err = run(capsys, "kernels", *options, "--target", "tpu-v6e")
    assert code == 2 and "its columns are" in err


def test_no_such_case(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "kernels", "--case", "fft")
    assert code == 2 and "no case has 'fft'" in err


def test_the_written_matrix_has_all_rows_and_columns() -> None:
    from dure.library.matrix_report import out_of_date

    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    assert out_of_date(text, CASES, [], [*chip_names(), "cpu"]) == []
