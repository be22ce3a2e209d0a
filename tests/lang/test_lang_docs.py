"""The language's page and the examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ("matmul", "softmax", "fused_epilogue")


def run(script: Path, folder: Path) -> str:
    environment = {**os.environ, "DURE_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=script.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_agree_with_numpy(name: str, tmp_path: Path) -> None:
    assert "with NumPy" in run(ROOT / "examples" / f"{name}.py", tmp_path)


def test_snippets_of_the_language_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    snippets = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    script = tmp_path / "language.py"
    script.write_text("\n".join(snippets), encoding="utf-8")
    printed = run(script, tmp_path)
    shown = page.rsplit("```", 1)[1].strip("\n").split("\n")
    assert printed.rstrip().split("\n") == [line[4:] for line in shown]
