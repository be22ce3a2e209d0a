"""The example of docs/adding-a-chip.md runs, and the document shows the file's own lines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dure.targets import chip

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "tpu_v4.toml"


def test_the_example_runs() -> None:
    script = ROOT / "examples" / "adding_a_chip.py"
    done = subprocess.run(
        [sys.executable, str(script)], check=True, capture_output=True, text=True, timeout=120
    )
    assert "bfloat16: 275.3 TFLOP/s, 100.1%" in done.stdout
    assert "memories.hbm.bandwidth = 2 TB/s (overridden" in done.stdout
    assert "the unit 'TB' doesn't fit" in done.stdout


def test_every_number_of_the_example_has_a_source() -> None:
    for path, number in chip(FILE).quantities():
        assert number.source.strip() and number.status in ("published", "derived", "guessed"), path
        if number.status == "guessed":
            assert number.low is not None and number.high is not None and number.low < number.high


def test_what_the_document_shows_is_in_the_file() -> None:
    text = (ROOT / "docs" / "adding-a-chip.md").read_text("utf-8")
    lines = set(FILE.read_text("utf-8").splitlines())
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 5
    for line in "".join(blocks).splitlines():
        assert not line or line in lines, line


@pytest.mark.parametrize("heading", ["fields", "units", "laws"])
def test_the_reference_names_everything(heading: str) -> None:
    """Every field, unit and variable of a law is in docs/machine-file.md."""
    from dure.machine import chip as schema
    from dure.machine.chip_checks import OPERATIONS
    from dure.machine.law import VARIABLES
    from dure.machine.quantity import UNITS

    text = (ROOT / "docs" / "machine-file.md").read_text("utf-8")
    models = (
        *(schema.Chip, schema.Memory, schema.Engine, schema.Dot, schema.Dma, schema.Fabric),
        *(schema.Link, schema.Sync, schema.Peaks, schema.Ceiling, schema.NumberFormat),
    )
    names = {
        "fields": [f.alias or n for model in models for n, f in model.model_fields.items()],
        "units": list(UNITS),
        "laws": [*VARIABLES, *OPERATIONS],
    }[heading]
    missing = [name for name in names if f"`{name}`" not in text]
    assert not missing
