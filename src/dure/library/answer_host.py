"""What the machine that dure runs on does with some work, as :mod:`dure.library.answer` for chips.

The program is the one that is predicted for the host: replayed with caches as memories, at rates
that microbenchmarks measured.  There is no verdict of the sanitizer, because the threads of the CPU
don't run it: they run what the CPU's own code generator makes.
"""

from __future__ import annotations

import time

from dure.library.answer import Answer, Confidence
from dure.library.build import Built
from dure.library.call import KernelCall
from dure.library.validation_cpu import predict
from dure.library.work import Work
from dure.targets.cpu.microbench import HostRates


def host_answer(work: Work, rates: HostRates) -> Answer:
    """What the host does with the work.

    Raises :class:`~dure.errors.DureError` for what doesn't compile.
    """
    parts = tuple(_built(call, rates) for call in work.calls)
    statuses = {number.status for _, number in parts[0].chip.quantities()}
    status = next(s for s in ("guessed", "derived", "published") if s in statuses)
    return Answer(work, parts[0].chip, parts, Confidence(status, (), ()))


def _built(call: KernelCall, rates: HostRates) -> Built:
    started = time.perf_counter()
    found = predict(call, rates)
    spent = time.perf_counter() - started
    return Built(call, found.chip, found.consts, found.compiled, None, found.timing, spent, spent)
