"""Validation: files of measurements, errors and their sums, and how far predictions may be off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dure.errors import UsageError
from dure.library.toolchain import Product, candidates, room, staged_operand
from dure.library.validation import (
    Measured,
    Measurement,
    Prediction,
    markdown,
    packaged,
    predict,
    read_measured,
    results_json,
    validate,
)
from dure.library.validation.summary import error, summary
from dure.machine.chip import Chip
from dure.targets import chip, chips


@pytest.fixture(scope="module")
def v6e() -> Chip:
    return chip("tpu-v6e")


def written(folder: Path, text: str) -> Path:
    file = folder / "measured.csv"
    file.write_text(text, encoding="utf-8")
    return file


# --- files ---------------------------------------------------------------------------------------


def test_a_file_of_measurements(tmp_path: Path, v6e: Chip) -> None:
    text = """# From a bench.
# Second line.
op,dims,cycles,dtype,relation,set
gemm,8x16x32,1750,f32,<=,cores=1;clock=2GHz

 softmax , 4x8 ,3500
"""
    found = read_measured(written(tmp_path, text), v6e)
    first, second = found.rows
    assert found.source == "From a bench. Second line."
    assert (first.op, first.dims, first.dtype, first.ns) == ("gemm", "8x16x32", "f32", 1000.0)
    assert first.at_most and first.settings == {"cores": "1", "clock": "2GHz"}
    assert (second.op, second.dims, second.dtype, second.ns) == ("softmax", "4x8", "bf16", 2000.0)
    assert second.where.endswith("measured.csv:6") and not second.at_most


def test_an_unknown_operator_is_not_modelled(tmp_path: Path, v6e: Chip) -> None:
    found = read_measured(written(tmp_path, "op,dims,device_ns\nlstm,4x8,100\n"), v6e)
    assert not found.rows
    [unknown] = found.unknown
    assert unknown.work == "lstm 4x8" and "no operator" in unknown.reason


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "holds no measurements"),
        ("# nothing\n\n", "holds no measurements"),
        ("op,dims,device_ns\n", "a header and no measurements"),
        ("op,device_ns\ngemm,5\n", "no column 'dims'"),
        ("dims,device_ns\n8x8x8,5\n", "no column 'op'"),
        ("op,dims\ngemm,8x8x8\n", "no column 'device_ns' or cycles"),
        ("op,dims,dims,cycles\n", "two columns are called 'dims'"),
        ("op,dims,device_ns\ngemm,8x8,5\n", "'8x8' are no dims of gemm"),
        ("op,dims,device_ns\ngemm,axbxc,5\n", "'axbxc' are no dims of gemm"),
        ("op,dims,device_ns\ngemm,0x8x8,5\n", "M of gemm is 0"),
        ("op,dims,device_ns\ngemm,8x8x8,\n", "device_ns is ''"),
        ("op,dims,device_ns\ngemm,8x8x8,fast\n", "device_ns is 'fast'"),
        ("op,dims,device_ns\ngemm,8x8x8,-3\n", "device_ns is '-3'"),
        ("op,dims,cycles\ngemm,8x8x8,nan\n", "cycles is 'nan'"),
        ("op,dims,device_ns\ngemm,8x8x8,1e300\n", "device_ns is '1e300'"),
        ("op,dims,device_ns\ngemm,8x8x8,5,6,7\n", "5 values under 3 columns"),
        ('op,dims,device_ns\ngemm,"8x8x8,5\n', "isn't comma-separated values"),
        ("op,dims,device_ns,dtype\ngemm,8x8x8,5,f12\n", "no dtype is called 'f12'"),
        ("op,dims,device_ns,relation\ngemm,8x8x8,5,>\n", "'>' is no relation"),
        ("op,dims,device_ns,kernel\ngemm,8x8x8,5,mine\n", "no kernel is called 'mine'"),
        ("op,dims,device_ns,set\ngemm,8x8x8,5,cores\n", "'cores' sets nothing"),
    ],
)
def test_bad_files(tmp_path: Path, v6e: Chip, text: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_measured(written(tmp_path, text), v6e)
    assert what in str(caught.value)
    assert "measured.csv" in caught.value.where


def test_files_that_cannot_be_read(tmp_path: Path, v6e: Chip) -> None:
    with pytest.raises(UsageError, match="can't be read: No such file"):
        read_measured(tmp_path / "none.csv", v6e)
    with pytest.raises(UsageError, match="can't be read"):
        read_measured(tmp_path, v6e)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UsageError, match="isn't text"):
        read_measured(binary, v6e)


def test_every_packaged_file_is_read() -> None:
    counts = {c.name: packaged(c) for c in chips()}
    assert len(counts["tpu-v6e"].rows) == 60 and not counts["tpu-v6e"].rows[0].at_most
    assert len(counts["trainium2"].rows) == 3 and len(counts["mtia-v2"].rows) == 2
    for measured in counts.values():
        assert all(u.reason and u.source for u in measured.unknown)
        assert not measured.rows or measured.source


# --- errors --------------------------------------------------------------------------------------


def test_errors_and_their_sums() -> None:
    row = Measurement("gemm", "8x8x8", "bf16", 100.0, "", False, (), {}, "")
    above, below = Prediction(110.0, "dure", ()), Prediction(80.0, "dure", ())
    assert error(row, above) == pytest.approx(0.1) and error(row, below) == pytest.approx(-0.2)
    most = Measurement("gemm", "8x8x8", "bf16", 100.0, "", True, (), {}, "")
    assert error(most, above) == pytest.approx(0.1) and error(most, below) == 0.0
    found = summary([-0.4, 0.1, 0.2, -0.3])
    assert (found.count, found.median, found.mean) == (4, pytest.approx(0.25), pytest.approx(0.25))
    assert found.p90 == 0.4
    assert summary([k / 10 for k in range(1, 11)]).p90 == 0.9


def test_a_result_as_json_and_as_a_page(v6e: Chip) -> None:
    rows = (
        Measurement("gemm", "128x2048x2048", "bf16", 10108.0, "", False, (), {}, "a:1"),
        Measurement("softmax", "64x256", "bf16", 5000.0, "", True, (), {}, "a:2"),
        # No chip of the package holds this.
        Measurement("gemm", f"{1 << 20}x{1 << 20}x8", "bf16", 1.0, "", False, (), {}, "a:3"),
    )
    seen: list[int] = []
    result = validate(v6e, Measured(rows[:2], (), "a bench"), done=seen.append)
    assert seen == [0, 1, 2]
    found = json.loads(json.dumps(results_json([result])))
    assert [row["op"] for row in found["rows"]] == ["gemm", "softmax"]
    assert set(found["summary"]) == {"gemm", "softmax", "all"}
    first = found["rows"][0]
    assert first["error"] == pytest.approx(first["predicted_ns"] / first["measured_ns"] - 1)
    assert first["algorithm"] == "matmul_staged" and first["own_ns"] > 0
    assert found["rows"][1]["relation"] == "<="
    page = markdown([result])
    assert "## tpu-v6e" in page and "| gemm | 128x2048x2048 | bf16 | 10.11 |" in page
    own = validate(v6e, Measured(rows[:1], (), ""), "dure")
    assert own.rows[0].chosen == own.rows[0].own


def test_what_a_chip_cannot_run_is_listed() -> None:
    row = Measurement("gemm", "64x64x64", "mxfp4", 1.0, "matmul_blocked", False, (), {}, "a:1")
    result = validate(chip("trainium2"), Measured((row,), (), ""))
    assert not result.rows and result.unknown[0].work == "gemm 64x64x64 mxfp4"


# --- the toolchain -------------------------------------------------------------------------------


def test_what_is_staged(v6e: Chip) -> None:
    assert room(v6e) == 96 << 20
    assert staged_operand(v6e, Product(1, 4096, 4096)) == ""
    assert staged_operand(v6e, Product(128, 4096, 4096)) == "w"
    assert staged_operand(v6e, Product(4096, 4096, 4096)) == "x"
    assert staged_operand(v6e, Product(2048, 4096, 28672)) == "x"
    assert staged_operand(v6e, Product(8192, 14336, 4096)) == ""
    found = list(candidates(v6e, Product(2048, 4096, 4096), "w"))
    assert found and all(not (t.n < 4096 and t.k < 4096) for t in found)


# --- accuracy ------------------------------------------------------------------------------------


def off(name: str, algorithm: str, op: str, dims: str) -> float:
    found = chip(name)
    row = next(r for r in packaged(found).rows if (r.op, r.dims) == (op, dims))
    return abs(error(row, predict(row, found, algorithm)))


@pytest.mark.parametrize(
    ("op", "dims", "most"),
    [
        ("gemm", "1x4096x4096", 0.04),
        ("gemm", "128x4096x4096", 0.04),
        ("gemm", "2048x4096x4096", 0.04),
        ("gemm", "4096x4096x4096", 0.04),
        ("gemm", "8192x14336x4096", 0.10),
        ("ffn_gated", "128x4096x14336", 0.05),
        ("attn", "32x8x1x32768x128", 0.2),
        ("attn_enc", "192x328x64", 0.2),
    ],
)
def test_measured_rows_of_the_v6e(op: str, dims: str, most: float) -> None:
    assert off("tpu-v6e", "as-measured", op, dims) <= most


def test_published_inequalities_of_the_mtia() -> None:
    for dims in ("2048x2048x2048", "512x26592x2048"):
        assert off("mtia-v2", "as-measured", "gemm", dims) <= 0.05


@pytest.mark.long
def test_all_rows_of_the_v6e(v6e: Chip) -> None:
    result = validate(v6e, packaged(v6e))
    assert len(result.rows) == 60
    dense = summary([r.error for r in result.rows if not r.measurement.op.startswith("attn")])
    assert dense.median <= 0.055 and dense.mean <= 0.08 and dense.p90 <= 0.15
    attention = summary([r.error for r in result.rows if r.measurement.op.startswith("attn")])
    assert attention.median <= 0.30


@pytest.mark.long
def test_the_matmuls_of_the_trainium() -> None:
    found = chip("trainium2")
    result = validate(found, packaged(found))
    assert len(result.rows) == 3
    assert all(abs(row.error) <= 0.10 for row in result.rows)
