"""The sanitizer: proves that a machine program can't race, hang, or read what nobody wrote.

:func:`sanitize` goes over every interleaving of a core's queues, every trip count and every value
of run-time indices at once: it runs the program on its own happens-before order (``state``), which
is one partial order for all interleavings, until the abstract states repeat (``proof``).  What it
can't prove is a finding of the kind ``not-proved``, and counts as a failure.
"""

from __future__ import annotations

from collections.abc import Mapping

from dure.ir.core import Function
from dure.ir.dtypes import Array
from dure.machine.chip import Chip
from dure.sim.sanitizer.checks import malformed, outside
from dure.sim.sanitizer.findings import Finding, Kind, NotProved, Place, Report, Stop, Verdict
from dure.sim.sanitizer.home import HomeRules
from dure.sim.sanitizer.model import Model
from dure.sim.sanitizer.phases import phased, prove_phases
from dure.sim.sanitizer.proof import Proof, core_environments
from dure.sim.sanitizer.state import States, Work

__all__ = ["Finding", "Kind", "Place", "Verdict", "sanitize"]


def sanitize(
    function: Function,
    chip: Chip,
    *,
    indices: Mapping[str, Array] | None = None,
    limit: int = 20,
    states: int = 20000,
) -> Verdict:
    """Whether a machine program is right on a chip, whatever the timing.

    Without ``indices`` the program is proved for every value of its index arguments; with them, for
    these.  The search ends at ``limit`` findings, and gives up (``not-proved``) at ``states``
    abstract states.
    """
    if phased(function):
        return prove_phases(
            function,
            chip,
            lambda phase: sanitize(phase, chip, indices=indices, limit=limit, states=states),
            limit,
        )
    report = Report(limit)
    try:
        for finding in malformed(function, chip):
            report.add(finding)
        if report.found:
            raise Stop
        for finding in outside(function, chip):
            report.add(finding)
        model = Model(function, chip, indices is not None)
    except Stop:
        return Verdict(False, tuple(report.found.values()), 0, 0)
    except NotProved as reason:
        report.found[reason] = Finding("not-proved", reason.message, (), reason.op)
        return Verdict(False, tuple(report.found.values()), 0, 0)
    quick = Report(1)
    verdict = _prove(model, quick, indices, states, forgetful=True) if model.instances else None
    if verdict is not None and all(f.kind == "not-proved" for f in verdict.findings):
        # Proved; or too many states, of which the other run has no fewer.
        return verdict
    return _prove(model, report, indices, states)


def _prove(
    model: Model,
    report: Report,
    indices: Mapping[str, Array] | None,
    limit: int,
    *,
    forgetful: bool = False,
) -> Verdict:
    while True:
        found = Report(report.limit, model)
        verdict = _run(model, found, indices, limit, forgetful)
        if not model.stale:
            report.found.update(found.found)
            return Verdict(
                not report.found,
                tuple(report.found.values()),
                verdict.iterations,
                verdict.states,
            )


def _run(
    model: Model,
    report: Report,
    indices: Mapping[str, Array] | None,
    limit: int,
    forgetful: bool,
) -> Verdict:
    model.build()
    known = States(limit)
    work = Work(model, HomeRules(model), report, forgetful)
    proof = Proof(model, work, known, indices)
    try:
        start = proof.start()
        ends = {
            end
            for environment in core_environments(model)
            for end in proof.block(model.body, start, environment)
        }
        for end in ends:
            work.thaw(end.body)
            work.finish()
    except Stop:
        pass
    except NotProved as reason:
        report.found[reason] = Finding("not-proved", reason.message, (), reason.op)
    found = tuple(report.found.values())
    return Verdict(not found, found, proof.iterations, len(known.table))
