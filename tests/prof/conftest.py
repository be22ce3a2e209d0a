"""Profiles to look at: one made by hand, and those of compiled and simulated operators."""

from __future__ import annotations

from functools import cache

import pytest

from dure import targets
from dure.library.answer import Answer, answer
from dure.library.profile import profile
from dure.library.work import operator_work
from dure.prof.records import (
    Buffer,
    CoreClass,
    Counter,
    Instruction,
    Life,
    Memory,
    Profile,
    Program,
    Queue,
    Resource,
    Roofline,
    Source,
    Wait,
)

#: Several queues, several launches, and cores that differ.
WORK = (
    ("gemm", "512x512x512", "rngd"),
    ("ffn_gelu", "128x256x256", "tpu-v6e"),
    ("gemm", "200x300x136", "h100"),
)


@cache
def answered(op: str, dims: str, target: str) -> Answer:
    """What a chip does with an operator."""
    return answer(operator_work(op, dims, "bf16"), targets.chip(target))


@pytest.fixture(params=WORK, ids=lambda work: f"{work[0]}-{work[2]}")
def simulated(request: pytest.FixtureRequest) -> tuple[Answer, Profile]:
    """An answer and its profile."""
    found = answered(*request.param)
    return found, profile(found)


def _load(start: int, flow: int, end: int, wait: Wait | None = None) -> Instruction:
    source = Source("kernel.py", 3, "    x = dl.load(a, (i, k), (bm, bk))")
    waits = () if wait is None else (wait,)
    return Instruction(
        0, "in", "load a", source, start, start + 10, flow, end, 4096, 0, ("x",), waits
    )


def _dot(start: int, end: int, wait: Wait) -> Instruction:
    source = Source("kernel.py", 4, "    acc = dl.dot(x, y, acc)  # </script> & <b>")
    return Instruction(
        0, "matrix", "dot", source, start, end, None, end, 0, 10**6, ("x", "acc"), (wait,)
    )


@pytest.fixture
def by_hand() -> Profile:
    """Two loads into one slot, and two dots that wait for them.

    Launched at 0, ready at 100; load 100-110-150-300, dot 320-520, load (waits for the dot)
    540-550-600-700, dot 720-1000.
    """
    instructions = (
        _load(100, 150, 300),
        _dot(320, 520, Wait("full", "in", 100, 320, 0)),
        _load(540, 600, 700, Wait("empty", "matrix", 110, 540, 1)),
        _dot(720, 1000, Wait("full", "in", 520, 720, 2)),
    )
    lives = (Life(0, 100, 520), Life(0, 540, 1000))
    return Profile(
        title="gemm by hand",
        target="toy",
        total=1000,
        launches=((0, 100),),
        bound="compute",
        classes=(CoreClass(4, {"core0": 0}),),
        queues=(Queue("matrix", "compute", ("mxu",)), Queue("in", "dma", ("load",))),
        instructions=instructions,
        buffers=(Buffer("x", "sram", "8 x 8 float32", 1, 256, 0, instructions[0].source, lives),),
        memories=(Memory("sram", 1024, 256),),
        counters=(Counter("memories.hbm", "B/s", 4e13, ((0, 0.0), (150, 2.7e13), (300, 0.0))),),
        resources=(Resource("memories.hbm", 4e13, 8192, 205),),
        roofline=Roofline({"float32": 1e16}, 1e16, "hbm", 4e13, 3e13, 2 * 10**6, 8192, 8192, 1e-9),
        programs=(Program("by_hand", "machine function by_hand", {"tiles": "bm=8"}),),
        busy={"matrix": 480, "in": 250},
        facts={"confidence": "published"},
    )
