"""What devices do with a collective by itself: ``all_reduce 4096x4096`` over so many of them."""

from __future__ import annotations

from dataclasses import dataclass

from dure.errors import UsageError
from dure.library.answer import Answer, check_fits, confidence
from dure.library.build import Built, build
from dure.library.call import stored_bytes, tensor
from dure.library.collectives import KINDS, Collective, Kind, Way
from dure.library.operators import parse_dims
from dure.library.operators_common import DTYPES, check_size
from dure.library.work import Work
from dure.machine.chip import Chip
from dure.machine.group import Group, group_of
from dure.sim.cost import duration

#: The types of what devices exchange.
TYPES = ("f32", "f16", "bf16", "int8")


@dataclass(frozen=True)
class CollectiveAnswer(Answer):
    """A collective over a group of devices, which is launched once."""

    collective: Collective
    group: Group

    @property
    def ps(self) -> int:
        """Picoseconds: one launch, and a signal between two kernels."""
        launch = duration(self.chip, self.chip.launch)
        signal = duration(self.chip, self.chip.sync.latency)
        return launch - signal + sum(p.timing.ps - launch + signal for p in self.parts)

    @property
    def least_bytes(self) -> int:
        """What each device must send at least, whichever way."""
        n, what = self.group.count, self.collective
        own = stored_bytes(tensor(what.dtype, what.rows, what.columns))
        if what.kind == "all_gather":
            return own * (n - 1)
        parts = own * (n - 1) // n
        return 2 * parts if what.kind == "all_reduce" else parts

    @property
    def fraction_of_roofline(self) -> float:
        """The least time in which a device's links send that much, as a part of the time."""
        return self.least_bytes / self.group.out_bandwidth * 1e12 / self.ps

    def json(self) -> dict[str, object]:
        """Everything as one JSON object."""
        return {
            **super().json(),
            "chips": self.group.count,
            "link": self.group.name,
            "arrangement": [extent for extent in self.group.shape if extent > 1],
            "sent_bytes": self.least_bytes,
        }


def collective_answer(
    kind: str, dims: str, dtype: str, chip: Chip, devices: int, *, strict: bool = False
) -> CollectiveAnswer:
    """The fastest way to a collective on an MxH matrix of each of so many devices.

    Raises :class:`~dure.errors.DureError` for what they can't run.
    """
    found: Kind = next(k for k in KINDS if k == kind)
    rows, columns = parse_dims(kind, "MxH", dims)
    if dtype not in TYPES:
        raise UsageError(
            f"{kind} in {dtype}"[:80],
            rule=f"devices exchange {', '.join(TYPES)}",
            fix="--dtype bf16",
        )
    if devices < 2:
        raise UsageError(
            f"{kind} over {devices} devices",
            rule="two devices or more exchange something",
            fix="--chips 2",
        )
    group = group_of(chip, devices)
    what = Collective(found, rows, columns, DTYPES[dtype])
    check_size(tensor(what.dtype, devices, devices, *what.result(devices)))
    answers = [_answer(found, dims, dtype, what, group, way, strict) for way in what.ways(group)]
    best = min(answers, key=lambda answer: answer.ps)
    trust = confidence(best.parts, chip, total=best.ps)
    return CollectiveAnswer(best.work, chip, best.parts, trust, what, group)


def _answer(
    kind: Kind, dims: str, dtype: str, what: Collective, group: Group, way: Way, strict: bool
) -> CollectiveAnswer:
    calls = tuple(stage.call for stage in way)
    moved = sum(
        stored_bytes(tensor(what.dtype, *shape))
        for shape in ((what.rows, what.columns), what.result(group.count))
    )
    added = what.rows * what.columns if kind in ("all_reduce", "reduce_scatter") else 0
    work = Work(kind, dims, dtype, calls, added, moved)
    check_fits(work, group.chip)
    parts: tuple[Built, ...] = tuple(build(call, group.chip, strict=strict) for call in calls)
    trust = confidence((), group.chip)
    return CollectiveAnswer(work, group.chip, parts, trust, what, group)
