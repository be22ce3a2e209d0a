"""The reference interpreter for sharded programs: all devices at once, one thread each.

A device runs until it comes to a collective, waits for the others to come to the same one, and goes
on with its part of the result.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context

import numpy as np

from dure.errors import IRError
from dure.ir.core import Function, Op
from dure.ir.interpret import Frame, RuntimeValue, execute, handles
from dure.ir.tensor.checks import doubles
from dure.ir.tensor.collectives import COLLECTIVES, results


class _Meeting:
    """Where devices exchange values: each brings its own, and takes those of all."""

    def __init__(self, devices: int) -> None:
        self.barrier = threading.Barrier(devices)
        self.brought: list[tuple[Op, Sequence[RuntimeValue]] | None] = [None] * devices

    def exchange(self, device: int, op: Op, values: Sequence[RuntimeValue]) -> list[RuntimeValue]:
        """What each device gets from ``op``, of which this one brings its operands."""
        self.brought[device] = op, values
        self.barrier.wait()
        found = [entry for entry in self.brought if entry is not None]
        self.barrier.wait()
        if any(other is not op for other, _ in found) or len(found) != op.attr("devices"):
            raise IRError(
                f"'{op.name}' over {op.attr('devices')} devices, of which {len(found)} run",
                rule="all devices of a sharded program come to the same collective",
                fix="run it on as many devices as it was made for",
            )
        stacked = [np.stack([doubles(v) for v in row]) for row in zip(*(v for _, v in found),
                                                                      strict=True)]  # fmt: skip
        return results(op, stacked)


_meeting: ContextVar[tuple[_Meeting, int] | None] = ContextVar("meeting", default=None)


def run_shards(
    function: Function,
    shards: Sequence[Sequence[RuntimeValue]],
    sizes: Mapping[str, int] | None = None,
) -> list[tuple[RuntimeValue, ...]]:
    """Run a tensor program on all devices, each with its own arguments; gives what each yields.

    Raises the first error of a device.
    """
    meeting = _Meeting(len(shards))

    def run(device: int) -> tuple[RuntimeValue, ...]:
        _meeting.set((meeting, device))
        try:
            return execute(function, shards[device], sizes)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(len(shards)) as pool:
        running = [pool.submit(copy_context().run, run, device) for device in range(len(shards))]
    errors = [e for e in (r.exception() for r in running) if e is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [r.result() for r in running]


def _meet(frame: Frame, op: Op) -> Sequence[RuntimeValue]:
    found = _meeting.get()
    if found is None:
        raise IRError(
            f"'{op.name}' on one device",
            rule="a sharded program runs on all of its devices together",
            fix="interpret it with dure.ir.tensor.shards.run_shards",
        )
    meeting, device = found
    return [meeting.exchange(device, op, [frame.value(v) for v in op.operands])[device]]


for _name in COLLECTIVES:
    handles(_name)(_meet)
