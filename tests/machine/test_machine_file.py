"""Machine files: what they say, and that each broken one is refused with a word about where."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.errors import TargetError
from dure.machine import load_machine, parse_machine
from dure.machine.quantity import STATUSES, UNITS

CHIP = """
schema = 1
name = "toy"
kind = "chip"
summary = "a chip for tests"
cores = { value = 8, unit = "1", status = "published", source = "data sheet" }
clock = { value = 1.5, unit = "GHz", status = "guessed", low = 1, high = 2, source = "peak" }
[engines.tensor]
operations = ["dot"]
memory = "local"
width = { value = 2048, unit = "bit", status = "published", source = "data sheet" }
registers = { value = 4, unit = "1", status = "derived", source = "registers of the data sheet" }
issue.dot = { value = 1, unit = "op/cycle", status = "published", source = "data sheet" }
[memories.local]
shared_by = "core"
backed_by = "hbm"
size = { value = 2, unit = "MiB", status = "published", source = "data sheet" }
bandwidth = { value = 128, unit = "B/cycle", status = "published", source = "data sheet" }
[memories.hbm]
shared_by = "machine"
size = { unit = "GB", status = "detected", source = "the driver" }
bandwidth = { value = 1.6, unit = "TB/s", status = "published", source = "data sheet" }
"""


def test_reads_numbers_in_base_units() -> None:
    machine = parse_machine(CHIP, "toy.toml")
    assert machine.clock.base == 1.5e9
    assert machine.memory("local").size.base == 2 * 2**20
    hbm = machine.memory("hbm")
    assert hbm.bandwidth is not None and hbm.bandwidth.base == 1.6e12
    assert {path for path, _ in machine.quantities()} == {
        *("cores", "clock", "engines.tensor.width", "engines.tensor.registers"),
        *("engines.tensor.issue.dot", "memories.local.size", "memories.local.bandwidth"),
        *("memories.hbm.size", "memories.hbm.bandwidth"),
    }


def test_detected_number() -> None:
    machine = parse_machine(CHIP, "toy.toml")
    with pytest.raises(TargetError, match="no value yet"):
        _ = machine.memory("hbm").size.base
    filled = machine.with_detected({"memories.hbm.size": 32e9}, ("driver 7",))
    assert filled.memory("hbm").size.value == 32
    assert filled.features == ("driver 7",)
    for path, value, message in (
        ("memories.l9.size", 1, "has no number"),
        ("cores", 4, "not detected"),
        ("memories.hbm.size", 0, "not a number of a machine"),
        ("memories.hbm.size", float("nan"), "not a number of a machine"),
    ):
        with pytest.raises(TargetError, match=message):
            machine.with_detected({path: value})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema = 1", "schema = 2", "schema of the machine file is 2"),
        ("schema = 1", "", "schema of the machine file is None"),
        ("schema = 1", "schema = true", "schema of the machine file is True"),
        ("cores = ", "kores = ", "no 'kores' here"),
        ('clock = { value = 1.5, unit = "GHz"', 'clock = { value = 1.5, unit = "GB"', "'GB'"),
        ('unit = "1", status = "published", source = "data sheet"', 'unit = "1"', "no status"),
        ("value = 8, ", "", "published number has no value"),
        ("value = 8", "value = 0", "not a number of a machine"),
        ("value = 8", "value = -8", "not a number of a machine"),
        ("value = 8", "value = inf", "not a number of a machine"),
        ("value = 8", 'value = "8"', "value is not a number"),
        ("value = 8", "value = true", "value is not a number"),
        ("value = 8", "worth = 8", "no field 'worth'"),
        ("low = 1, ", "", "low and its high"),
        ("low = 1, ", "low = 1.6, ", "low and its high"),
        ('source = "peak"', 'source = " "', "no source"),
        ('status = "derived"', 'status = "rumoured"', "not a status"),
        ('unit = "GB", status', 'value = 3, unit = "GB", status', "detected number has a value"),
        ('memory = "local"', 'memory = "lokal"', "no memory named 'lokal'"),
        ('shared_by = "machine"', 'shared_by = "machine"\nbacked_by = "local"', "behind itself"),
        ('shared_by = "core"', 'shared_by = "nobody"', "'shared_by' is 'nobody'"),
        ('operations = ["dot"]', "operations = []", "list of names"),
        ("issue.dot", "issue.sing", "no 'sing' here"),
        ("value = 2048, ", "value = , ", "isn't TOML"),
        ('cores = { value = 8, unit = "1", status = "published", source = "data sheet" }', "", "c"),
        (
            'cores = { value = 8, unit = "1", status = "published", source = "data sheet" }',
            "cores = 8",
            "alone",
        ),
    ],
)
def test_broken_file(old: str, new: str, message: str) -> None:
    assert old in CHIP
    with pytest.raises(TargetError, match=message) as caught:
        parse_machine(CHIP.replace(old, new, 1), "toy.toml")
    assert "toy.toml" in str(caught.value)


def test_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="can't be read"):
        load_machine(tmp_path / "none.toml")
    file = tmp_path / "machine.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(TargetError, match="can't be read"):
        load_machine(file)


@given(st.data())
def test_damaged_file_is_read_or_refused(data: st.DataObject) -> None:
    text = CHIP
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 20))
        text = text[:at] + data.draw(st.text(max_size=4)) + text[at + length :]
    try:
        machine = parse_machine(text, "toy.toml")
    except TargetError:
        return
    for _, quantity in machine.quantities():
        assert quantity.unit in UNITS and quantity.status in STATUSES and quantity.source
