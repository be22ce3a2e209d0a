"""A short, seeded run of the fuzzer; `fuzz_gguf.py --minutes N` is the long one."""

from __future__ import annotations

from pathlib import Path

import fuzz_gguf
import pytest


@pytest.mark.parametrize("seed", [1, 2])
def test_only_named_errors_come_out(seed: int, tmp_path: Path) -> None:
    outcomes = fuzz_gguf.run(cases=1500, seconds=None, seed=seed, keep=tmp_path)
    assert sum(outcomes.values()) == 1500
    assert outcomes.get("refused", 0) > 300, "the mutations no longer reach the checks"
    assert sum(count for kind, count in outcomes.items() if kind != "refused") > 100


def test_the_seeds_are_whole_files_with_working_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "seed.gguf"
    outcomes: list[str] = []
    for content in fuzz_gguf.seeds():
        path.write_bytes(content)
        outcomes.append(fuzz_gguf.exercise(path))
    assert outcomes[0].startswith("read ") and outcomes[1].startswith("read ")
    assert outcomes[2] == "read, no tokenizer"
