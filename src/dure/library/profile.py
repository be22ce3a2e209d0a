"""Answers as profiles: what the simulator recorded, with sources, bytes, causes and lifetimes.

Each launch is simulated once more with its record; the program and its time are those of the
answer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dure.compiler.chip.allocate import bytes_of, capacity
from dure.errors import UsageError
from dure.ir.core import Function, Op, Span, Value
from dure.library.answer import Answer, peak, split_of
from dure.library.build import Built, index_values
from dure.library.call import IndexArray
from dure.machine.chip import Chip
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
    joined,
)
from dure.sim.cost import Costs
from dure.sim.expand import declared, expand
from dure.sim.items import BEGIN, COMPUTE, MOVE, SIGNAL, WAIT
from dure.sim.streams import Streams
from dure.sim.timing import Span as Executed
from dure.sim.timing import Timing, simulate

#: The most instructions that are recorded.
MOST = 400_000
#: Ops that only arrange what others compute.
_SHAPING = frozenset({"reshape", "broadcast"})


def profile(answer: Answer) -> Profile:
    """The launches of an answer as one execution.

    Raises :class:`UsageError` for more instructions than can be looked at.
    """
    count = sum(part.timing.instructions for part in answer.parts)
    if count > MOST:
        work = answer.work
        raise UsageError(
            f"{work.name} {work.dims} on {answer.chip.name} executes {count:,} instructions",
            rule=f"at most {MOST:,} are recorded",
            fix="give smaller dims, or ask for its time alone with `dure sim`",
        )
    made = joined([launch_profile(part) for part in answer.parts])
    roof = _roofline(answer)
    return replace(
        made,
        title=" ".join((answer.work.name, answer.work.dims, answer.work.dtype)).strip(),
        bound=answer.bound,
        roofline=roof,
        facts=_facts(answer),
        notes=tuple(_notes(answer, made)),
    )


def _roofline(answer: Answer) -> Roofline:
    chip = answer.chip
    home = chip.memories[chip.home].bandwidth
    published = chip.peaks.bandwidth.base
    return Roofline(
        peaks={name: flops.base for name, flops in chip.peaks.compute.items()},
        peak=peak(chip, answer.work.dtype),
        memory=chip.home,
        bandwidth=published,
        attainable=published if home is None else chip.bytes_a_second(home),
        flops=answer.flops,
        bytes=answer.work.bytes,
        moved=sum(part.timing.bytes for part in answer.parts),
        seconds=answer.ps / 1e12,
    )


def _facts(answer: Answer) -> dict[str, str]:
    """The lines under a chip's headline."""
    trust = answer.confidence
    found = {"cycles": f"{answer.cycles:,}", "confidence": trust.status}
    if trust.guesses:
        found["guesses"] = ", ".join(trust.guesses)
    if trust.overridden:
        found["set by you"] = ", ".join(trust.overridden)
    found["compiled in"] = f"{sum(part.compile_s for part in answer.parts):.2f} s"
    found["simulated in"] = f"{sum(part.sim_s for part in answer.parts) * 1000:.1f} ms"
    found["program"] = answer.sha256[:16]
    return found


def _notes(answer: Answer, made: Profile) -> Iterator[str]:
    if len(made.classes) > 1:
        yield "Cores that do the same are one class; the scratchpad is that of the first class."
    for part in answer.parts:
        for found in part.compiled.conversions:
            place = next((line.strip() for line in found.where.splitlines()), "")
            file, *numbers = place.rsplit(":", 2)
            at = f" at {':'.join([_shown(file), *numbers[:1]])}" if place else ""
            yield f"{found.what} is converted from {found.found} to {found.becomes}{at}."


@dataclass(frozen=True, slots=True)
class Turn:
    """A phase of a program as it was executed once: from the end of the one before to its own."""

    phase: Op
    start: int
    end: int


def launch_profile(part: Built) -> Profile:
    """One launch, recorded."""
    function, chip = part.compiled.function, part.chip
    lists = index_values(part.call, function)
    timing = simulate(function, chip, indices=lists, record=True)
    program = Program(part.call.kernel.__name__, part.compiled.text, _program_facts(part))
    made, _ = recorded(function, chip, lists, timing, program)
    return replace(made, memories=_memories(chip, part.compiled.used))


def recorded(
    function: Function,
    chip: Chip,
    lists: Mapping[str, IndexArray],
    timing: Timing,
    program: Program,
) -> tuple[Profile, list[Turn]]:
    """A simulation that was recorded, and the turns of the program's phases in their order."""
    streams = Streams(function, chip, Costs(chip), lists)
    places = _places(timing)
    extras, phases = _extras(streams, timing, places)
    buffers = _buffers(function, chip, timing, places, lists)
    used: dict[str, int] = {}
    for buffer in buffers:
        end = buffer.offset + buffer.slots * buffer.slot_bytes
        used[buffer.memory] = max(end, used.get(buffer.memory, 0))
    made = Profile(
        title=program.name,
        target=chip.name,
        total=timing.ps,
        launches=((0, timing.launch),),
        bound=timing.bound,
        classes=tuple(CoreClass(c.multiplicity, dict(c.core)) for c in timing.classes),
        queues=_queues(chip, timing),
        instructions=tuple(
            _instruction(span, extras[number], streams) for number, span in enumerate(timing.spans)
        ),
        buffers=buffers,
        memories=_memories(chip, used),
        counters=_counters(timing),
        resources=tuple(
            Resource(name, use.capacity, use.bytes, use.busy)
            for name, use in timing.resources.items()
        ),
        roofline=Roofline({}, 1.0, chip.home, 1.0, 1.0, timing.flops, 0, timing.bytes, 0.0),
        programs=(program,),
        busy=dict(timing.busy),
    )
    return made, list(_turns(timing, extras, phases))


def _turns(timing: Timing, extras: Sequence[_Extra], phases: Sequence[Op]) -> Iterator[Turn]:
    """When each phase ended: with the last instruction of any queue of any core."""
    ends = [0] * len(phases)
    for span, extra in zip(timing.spans, extras, strict=True):
        if extra.phase >= 0:
            ends[extra.phase] = max(ends[extra.phase], span.end)
    last = timing.launch
    for phase, end in zip(phases, ends, strict=True):
        yield Turn(phase, last, max(last, end))
        last = max(last, end)


def _program_facts(part: Built) -> dict[str, str]:
    tiles = " ".join(f"{name}={size}" for name, size in part.consts.items())
    return {
        "tiles": tiles or "no open sizes",
        "cores": " x ".join(map(str, split_of(part))) or "1",
        "slots a ring": str(part.compiled.options.stages),
        "instructions": f"{part.timing.instructions:,}",
        "events": f"{part.timing.events:,}",
        "classes of cores": str(len(part.timing.classes)),
    }


def _queues(chip: Chip, timing: Timing) -> tuple[Queue, ...]:
    used = dict.fromkeys(span.queue for span in timing.spans)
    computing = {e.queue for e in chip.engines.values()}
    found = [
        Queue(q, "compute", chip.engine_of(q))
        if q in computing
        else Queue(q, "dma", tuple(n for n, dma in chip.dma.items() if q in dma.queues))
        for q in used
    ]
    return tuple(sorted(found, key=lambda queue: (queue.kind, queue.name)))


def _memories(chip: Chip, used: Mapping[str, int]) -> tuple[Memory, ...]:
    return tuple(
        Memory(
            name,
            capacity(memory),
            used.get(name, 0),
            1 if memory.partitions is None else int(memory.partitions.base),
        )
        for name, memory in chip.memories.items()
        if name != chip.home and used.get(name, 0)
    )


def _counters(timing: Timing) -> tuple[Counter, ...]:
    return tuple(
        Counter(name, "B/s", timing.resources[name].capacity, tuple(points))
        for name, points in timing.rates.items()
        if name in timing.resources and len(points) > 1
    )


# --- instructions --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Extra:
    """What a span doesn't say: when a DMA's queue was free again, its bytes, an instruction's
    operations, the causes of its waits, and which phase it is of, as they are executed.
    """

    issue: int | None = None
    bytes: int = 0
    flops: int = 0
    causes: list[int | None] = field(default_factory=list[int | None])
    phase: int = -1


def _places(timing: Timing) -> dict[tuple[int, str], list[int]]:
    """The spans of each queue of each class, in the queue's order."""
    found: dict[tuple[int, str], list[int]] = {}
    for number, span in enumerate(timing.spans):
        found.setdefault((span.core_class, span.queue), []).append(number)
    return found


def _extras(
    streams: Streams, timing: Timing, places: Mapping[tuple[int, str], Sequence[int]]
) -> tuple[list[_Extra], list[Op]]:
    """What each span doesn't say, and the phases in the order of their execution."""
    found = [_Extra() for _ in timing.spans]
    phases: list[Op] = []
    for core, entry in enumerate(timing.classes):
        traced = [list(items) for items in streams.trace(entry.core)]
        waits: dict[int, list[tuple[_Extra, int, int]]] = {}
        signals: dict[int, deque[tuple[int | None, int]]] = {
            number: deque([(None, int(op.attr("initial")))])
            for number, op in enumerate(streams.semaphore_ops)
        }
        for queue, items in zip(streams.queues, traced, strict=True):
            numbers = iter(places.get((core, queue), ()))
            _queue(items, numbers, found, waits, signals)
            phases = phases or [op for kind, op, _ in items if kind == BEGIN]
        for number, waiting in waits.items():
            _causes(waiting, signals[number])
    _phase_causes(timing, found)
    return found, phases


def _queue(
    items: Sequence[tuple[int, Op, Any]],
    numbers: Iterator[int],
    found: Sequence[_Extra],
    waits: dict[int, list[tuple[_Extra, int, int]]],
    signals: Mapping[int, deque[tuple[int | None, int]]],
) -> None:
    """Match a queue's items with its spans; note what it waits for and signals."""
    last: int | None = None
    phase = -1
    # Of the end of a phase there is no semaphore.
    pending: list[tuple[int, int] | None] = []
    for kind, op, more in items:
        if kind == WAIT:
            pending.append(more)
        elif kind == BEGIN:
            phase += 1
            pending.append(None)
        elif kind == SIGNAL:
            signals[more[0]].append((last, more[1]))
        elif kind in (COMPUTE, MOVE):
            last = next(numbers)
            extra = found[last]
            extra.phase = phase
            if kind == MOVE:
                extra.issue, extra.bytes = more.issue, more.bytes
            else:
                extra.flops = op.definition.cost(op).flops
            for place, wait in enumerate(pending):
                extra.causes.append(None)
                if wait is not None:
                    waits.setdefault(wait[0], []).append((extra, place, wait[1]))
            pending = []


def _phase_causes(timing: Timing, found: Sequence[_Extra]) -> None:
    """What waits for a phase to end waits for the last instruction that ended until then."""
    order = sorted(range(len(timing.spans)), key=lambda n: timing.spans[n].end)
    ends = [timing.spans[n].end for n in order]
    for span, extra in zip(timing.spans, found, strict=True):
        for place, wait in enumerate(span.waits):
            if not wait.queue and wait.end > wait.start:
                # At the very end of the wait there may be an instruction that it let start.
                before = bisect_left(ends, wait.end) - 1
                extra.causes[place] = order[before] if before >= 0 else None


def _causes(
    waiting: Sequence[tuple[_Extra, int, int]], signals: deque[tuple[int | None, int]]
) -> None:
    """Which signal each wait took last: they are taken in order, the initial value first."""
    for extra, place, count in waiting:
        while count > 0 and signals:
            cause, there = signals.popleft()
            extra.causes[place] = cause
            if there > count:
                signals.appendleft((cause, there - count))
            count -= there


def _instruction(span: Executed, extra: _Extra, streams: Streams) -> Instruction:
    moving = extra.issue is not None
    return Instruction(
        core_class=span.core_class,
        queue=span.queue,
        name=_name(span, streams),
        source=_source(span.op.span),
        start=span.start,
        issued=span.start + extra.issue if extra.issue is not None else span.end,
        flow=span.flow,
        end=span.end,
        bytes=extra.bytes,
        flops=extra.flops,
        buffers=span.buffers[1:] if moving else span.buffers,
        waits=tuple(
            Wait(w.semaphore, w.queue, w.start, w.end, cause)
            for w, cause in zip(span.waits, extra.causes, strict=True)
        ),
    )


def _name(span: Executed, streams: Streams) -> str:
    """What an instruction does: a transfer's tensor, or the ops that it computes."""
    op = span.op
    if op.name != "compute":
        # A view of an argument is called as that is.
        tensor, _ = streams.place(op.operands[0])
        return f"{op.name.removeprefix('dma_')} {tensor.name}"
    found = list(dict.fromkeys(inner.name for inner in op.regions[0].ops))
    found = [name for name in found if name not in _SHAPING] or found or ["copy"]
    found.sort(key=lambda name: name != "dot")
    more = [f"{len(found) - 3} more"] if len(found) > 4 else found[3:]
    return " + ".join([*found[:3], *more])


def _source(span: Span | None) -> Source | None:
    if span is None:
        return None
    return Source(_shown(span.file), span.line, span.text)


def _shown(file: str) -> str:
    """A file's path from here, or from the package."""
    path = Path(file)
    if not path.is_absolute():
        return path.as_posix()
    for root in (Path.cwd(), Path(__file__).parents[2]):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return path.name


# --- scratchpad ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Held:
    """What a slot holds: since when, until when it is known to be read, and whether it was."""

    start: int
    end: int
    read: bool = False


def _buffers(
    function: Function,
    chip: Chip,
    timing: Timing,
    places: Mapping[tuple[int, str], Sequence[int]],
    lists: Mapping[str, IndexArray],
) -> tuple[Buffer, ...]:
    """Every buffer that isn't another one's bytes, with the lives of its slots."""
    ops = declared(function, "buffer")
    roots: dict[Value, Value] = {}
    for op in ops:
        roots[op.result] = roots[op.operands[0]] if op.operands else op.result
    lives: dict[Value, list[Life]] = {op.result: [] for op in ops}
    if timing.classes:
        queues = {queue: iter(n) for (core, queue), n in places.items() if core == 0}
        held: dict[tuple[Value, int], _Held] = {}
        for entry in expand(function, timing.classes[0].core, lists):
            if entry.op.name in ("wait", "signal", "phase"):
                continue
            span = timing.spans[next(queues[entry.queue])]
            reads, writes = _touched(entry.op, entry.slots, roots)
            for key in (*reads, *writes):
                _touch(held, lives, key, span, key in reads)
        for (root, slot), life in held.items():
            lives[root].append(Life(slot, life.start, life.end))
    return tuple(
        _buffer(op, chip, tuple(sorted(lives[op.result], key=lambda e: (e.slot, e.start))))
        for op in ops
        if not op.operands
    )


def _buffer(op: Op, chip: Chip, lives: tuple[Life, ...]) -> Buffer:
    kind = op.result.tile
    memory = str(op.attr("memory"))
    size = int(op.attr("pitch")) or bytes_of(kind, chip.memories[memory])
    shape = " x ".join(map(str, kind.shape))
    return Buffer(
        name=op.result.name or "unnamed",
        memory=memory,
        type=f"{shape} {kind.dtype.name}" if shape else kind.dtype.name,
        slots=int(op.attr("stages")),
        slot_bytes=size,
        offset=int(op.attr("offset")),
        source=_source(op.span),
        lives=lives,
    )


def _touched(
    op: Op, slots: Sequence[int | None], roots: Mapping[Value, Value]
) -> tuple[set[tuple[Value, int]], set[tuple[Value, int]]]:
    """The slots that an instruction reads, and those that it writes."""
    keys = [
        (roots[value], slot) if slot is not None else None
        for value, slot in zip(op.operands, slots, strict=True)
    ]
    if op.name == "compute":
        split = int(op.attr("reads"))
        reads, writes = keys[:split], keys[split:]
    elif op.name == "dma_load":
        reads, writes = keys[2:], keys[1:2]
    else:
        reads, writes = keys[1:], []
    return {k for k in reads if k is not None}, {k for k in writes if k is not None}


def _touch(
    held: dict[tuple[Value, int], _Held],
    lives: Mapping[Value, list[Life]],
    key: tuple[Value, int],
    span: Executed,
    reading: bool,
) -> None:
    """A slot is read or written: what is written after it was read is another life."""
    life = held.get(key)
    if life is None:
        held[key] = _Held(span.start, span.end, reading)
    elif not reading and life.read:
        lives[key[0]].append(Life(key[1], life.start, life.end))
        held[key] = _Held(span.start, span.end)
    else:
        life.end = max(life.end, span.end)
        life.read = life.read or reading
