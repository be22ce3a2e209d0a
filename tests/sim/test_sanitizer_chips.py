"""Faults drawn by seed in compiled programs of every chip, labelled by the explorer."""

from __future__ import annotations

from collections import Counter

import pytest
from explorer import TooLarge, explore
from mutation import mutants

from dure.compiler.chip.pipeline import compile_for
from dure.library.suite import case
from dure.sim.sanitizer import sanitize
from dure.targets import chip, chip_names

#: Cases whose small programs the explorer can go through, and how many faults of each are drawn.
CASES = ("matmul f32", "softmax f32", "rmsnorm f32")
FAULTS = 24


@pytest.mark.parametrize("target", chip_names())
def test_drawn_faults_in_compiled_programs(target: str) -> None:
    machine = chip(target)
    score = Counter[str]()
    for name in CASES:
        found = case(name)
        drawn = found.drawn(found.sizes[1])
        program = compile_for(found.call(drawn).specialize(), machine).function
        assert sanitize(program, machine).ok, name
        for fault in mutants(program, 1, FAULTS):
            try:
                labels = explore(fault.function, machine, limit=6000)
            except TooLarge:
                continue
            verdict = sanitize(fault.function, machine)
            where = (name, fault.kind, fault.detail)
            assert verdict.ok == (not labels), (where, labels, verdict.render())
            score["harmful" if labels else "harmless"] += 1
    print(f"{target}: {score['harmful']} harmful faults, all found; {score['harmless']} harmless")
    # Eight chips have 500 together.
    assert score.total() >= 63
