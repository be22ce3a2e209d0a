"""What a chip does with some work: how long it takes, what bounds it, and how far to trust that.

:func:`answer` builds each launch (:mod:`dure.library.build`), adds them up, and asks which numbers
of the chip's file the sum rests on (:mod:`dure.sim.sensitivity`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from dure.errors import TargetError, UsageError
from dure.ir.expr import evaluate
from dure.library.build import Built, build, index_values, total_ps
from dure.library.call import KernelCall, stored_bytes
from dure.library.operators_common import DTYPES
from dure.library.work import Work
from dure.machine.chip import Chip
from dure.sim.sensitivity import sensitivity
from dure.targets import chip, chip_names

#: A result rests on a number whose change by a tenth moves it by more than this.
RESTS = 0.01
#: Launches that together take no more than this part of the time aren't asked what they rest on: a
#: number's tenth could move the whole by a tenth of it.
SLIGHT = 0.01


@dataclass(frozen=True)
class Confidence:
    """The worst status among the numbers that the time rests on; and which of them are guesses,
    and which were set by the user.  ``untried`` are guesses that may be among them: of a program
    that takes long to simulate not all are tried, and what wasn't counts as one.
    """

    status: str
    guesses: tuple[str, ...]
    overridden: tuple[str, ...]
    untried: tuple[str, ...] = ()

    def json(self) -> dict[str, object]:
        """What is said of it in JSON."""
        return {
            "confidence": self.status,
            "guesses": list(self.guesses),
            "untried": list(self.untried),
            "overridden": list(self.overridden),
        }


@dataclass(frozen=True)
class Answer:
    """Work on a chip, its launches one after another."""

    work: Work
    chip: Chip
    parts: tuple[Built, ...]
    confidence: Confidence

    @property
    def ps(self) -> int:
        """Picoseconds."""
        return total_ps(self.parts)

    @property
    def cycles(self) -> int:
        """Cycles of the chip's clock, rounded up."""
        return ceil(self.ps * self.chip.clock.base / 1e12)

    @property
    def bound(self) -> str:
        """What bounds most of the time."""
        return bound_of((part, part.timing.ps) for part in self.parts)

    @property
    def flops(self) -> int:
        """Operations: the definition's, or those of the instructions where there is none."""
        if self.work.flops is not None:
            return self.work.flops
        return sum(part.timing.flops for part in self.parts)

    @property
    def fraction_of_roofline(self) -> float:
        """The least time that the published peaks allow, as a part of the time."""
        return (
            roofline_seconds(self.chip, self.work.dtype, self.flops, self.work.bytes)
            * 1e12
            / (self.ps)
        )

    @property
    def sha256(self) -> str:
        """The program's hash; of several, the hash of theirs."""
        found = [part.compiled.sha256 for part in self.parts]
        if len(found) == 1:
            return found[0]
        return hashlib.sha256("\n".join(found).encode()).hexdigest()

    def json(self) -> dict[str, object]:
        """Everything as one JSON object."""
        found: dict[str, object] = {
            "target": self.chip.name,
            "op": self.work.name,
            "dims": self.work.dims,
            "dtype": self.work.dtype,
            "ns": self.ps / 1000,
            "cycles": self.cycles,
            "bound": self.bound,
            "flops": self.flops,
            "bytes": self.work.bytes,
            "fraction_of_roofline": self.fraction_of_roofline,
            **self.confidence.json(),
            "compile_s": sum(part.compile_s for part in self.parts),
            "sim_s": sum(part.sim_s for part in self.parts),
            "program_sha256": self.sha256,
            "instructions": sum(part.timing.instructions for part in self.parts),
            "events": sum(part.timing.events for part in self.parts),
            "classes": max(len(part.timing.classes) for part in self.parts),
            "parts": [_part(part) for part in self.parts],
        }
        return found


def bound_of(parts: Iterable[tuple[Built, int]]) -> str:
    """What bounds most of the time of parts, each with the picoseconds that it takes."""
    times: Counter[str] = Counter()
    for part, ps in parts:
        times[part.timing.bound] += ps
    return times.most_common(1)[0][0]


def answer(work: Work, chip: Chip, *, strict: bool = False) -> Answer:
    """What the chip does with the work.

    Raises :class:`~dure.errors.DureError` for what it can't run.
    """
    check_fits(work, chip)
    parts = tuple(build(call, chip, strict=strict) for call in work.calls)
    return Answer(work, chip, parts, confidence(parts, chip))


def targets(name: str, overrides: Mapping[str, str]) -> list[Chip]:
    """The chips that ``--target`` names: one, several with commas, or ``all`` of this
    installation.
    """
    names = [part.strip() for part in name.split(",")]
    if overrides and (len(names) > 1 or name == "all"):
        raise UsageError(
            f"--set with --target {name}",
            rule="a number is that of one chip",
            fix="name the chip with --target",
        )
    found: dict[str, None] = {}
    for part in names:
        found.update(dict.fromkeys(chip_names() if part == "all" else [part]))
    return [chip(part, overrides) for part in found]


def roofline_seconds(chip: Chip, dtype: str, flops: int, moved: int) -> float:
    """The least time by the published peaks, never derated; 0 operations need no peak."""
    compute = flops / peak(chip, dtype) if flops else 0.0
    return max(compute, moved / chip.peaks.bandwidth.base)


def peak(chip: Chip, dtype: str) -> float:
    """The published operations a second for a dtype.

    A dtype without a peak of its own has that of the one it is converted to on the chip, or else
    the least of the chip's.
    """
    peaks = chip.peaks.compute
    name = DTYPES[dtype].name if dtype in DTYPES else dtype
    seen: set[str] = set()
    while name not in peaks and name not in seen:
        seen.add(name)
        name = chip.conversions.get(name, name)
    return peaks[name].base if name in peaks else min(p.base for p in peaks.values())


def confidence(
    parts: Sequence[Built],
    chip: Chip,
    turns: Sequence[int] | None = None,
    total: int | None = None,
) -> Confidence:
    """How far the time of launches one after another is to be trusted.

    ``turns`` says how often each part runs (once), ``total`` is the time of all (their sum).
    Guesses are tried first: where the time rests on one, no other number can be worse.
    """
    often = [1] * len(parts) if turns is None else turns
    rest = _Rest(parts, chip, often, total_ps(parts) if total is None else total)
    guesses, untried = rest.resting("guessed")
    overridden, _ = rest.resting("overridden")
    status = "guessed"
    if not guesses and not untried:
        derived, others = rest.resting("derived")
        status = "derived" if derived or others else "published"
    return Confidence(status, guesses, overridden, untried)


@dataclass(frozen=True)
class _Rest:
    parts: Sequence[Built]
    chip: Chip
    turns: Sequence[int]
    total: int

    def resting(self, status: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The numbers of a status that the time rests on, those that move it most first; and those
        that weren't tried.
        """
        moved: Counter[str] = Counter()
        untried: dict[str, None] = {}
        for part, times in self._weighty():
            function = part.compiled.function
            lists = index_values(part.call, function)
            for found in sensitivity(
                function, self.chip, part.timing, indices=lists, statuses=(status,)
            ):
                if found.ps is None:
                    untried[found.path] = None
                else:
                    moved[found.path] += ceil(times * found.ps)
        resting = tuple(path for path, ps in moved.most_common() if ps > RESTS * self.total)
        return resting, tuple(path for path in untried if path not in resting)

    def _weighty(self) -> list[tuple[Built, int]]:
        """The launches that take the time, and how often each runs: the least are left out."""
        found = sorted(
            zip(self.parts, self.turns, strict=True),
            key=lambda entry: entry[0].timing.ps * entry[1],
        )
        spent = accumulate(part.timing.ps * times for part, times in found)
        slight = sum(ps <= SLIGHT * self.total for ps in spent)
        return found[slight:]


def check_fits(work: Work, chip: Chip) -> None:
    """Raise :class:`TargetError` where a launch's tensors don't fit the chip's far memory."""
    size = chip.memories[chip.home].size.base
    for call in work.calls:
        needed = call_bytes(call) // call.devices
        if needed > size:
            raise TargetError(
                f"{work.name} {work.dims} needs {needed / 2**30:.4g} GiB of {chip.home}",
                where=f"{chip.name}: {chip.home} holds {size / 2**30:.4g} GiB",
                rule="the tensors of a launch lie in the chip's far memory together",
                fix="give smaller dims, or spread the work over chips",
            )


def call_bytes(call: KernelCall) -> int:
    """The bytes of all of a launch's tensors."""
    return sum(stored_bytes(kind) for kind in call.types if kind is not None)


def split_of(part: Built) -> tuple[int, ...]:
    """The cores along each axis of the grid."""
    return tuple(evaluate(extent, {}) for extent in part.compiled.function.grid)


def _part(part: Built) -> dict[str, object]:
    timing, compiled = part.timing, part.compiled
    return {
        "kernel": part.call.kernel.__name__,
        "ns": timing.ns,
        "bound": timing.bound,
        "tiles": dict(part.consts),
        "cores": list(split_of(part)),
        "stages": compiled.options.stages,
        "conversions": [
            {"what": c.what, "from": c.found, "to": c.becomes, "where": c.where}
            for c in compiled.conversions
        ],
        "scratchpad": dict(compiled.used),
        "instruction_flops": timing.flops,
        "home_bytes": timing.bytes,
        "instructions": timing.instructions,
        "events": timing.events,
        "classes": len(timing.classes),
        "program_sha256": compiled.sha256,
    }
