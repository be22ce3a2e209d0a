"""What a time rests on is asked of the launches that take it."""

from __future__ import annotations

import pytest

from dure.ir.core import Function
from dure.library import answer
from dure.library.build import Built, build
from dure.library.work import operator_work
from dure.sim.sensitivity import Moved
from dure.targets import chip


def built(name: str, dims: str) -> Built:
    (call,) = operator_work(name, dims, "bf16").calls
    return build(call, chip("rngd"))


def test_launches_that_take_next_to_nothing_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = built("gemm", "256x256x256"), built("softmax", "8x64")
    asked: list[Function] = []

    def noted(function: Function, *_: object, **__: object) -> tuple[Moved, ...]:
        asked.append(function)
        return (Moved("clock", "guessed", 1e12),)

    monkeypatch.setattr(answer, "sensitivity", noted)
    total = 1000 * (small.timing.ps + large.timing.ps)
    found = answer.confidence([small, large], chip("rngd"), [1, 1000], total)
    assert set(asked) == {large.compiled.function}
    assert found.status == "guessed" and found.guesses == ("clock",)
    asked.clear()
    answer.confidence([small, large], chip("rngd"), [1000, 1000], total)
    assert set(asked) == {large.compiled.function, small.compiled.function}
