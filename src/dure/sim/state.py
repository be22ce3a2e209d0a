"""What is still to come in a replay, counted from now.

Where two states are equal, all that follows is the same, as long as the streams are.  A time that
has passed counts as now, since whatever may still ask for it happens later.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from dure.sim.contention import Computing
    from dure.sim.flows import Flows
    from dure.sim.replay import Flight, Queue, Replay

State: TypeAlias = tuple[object, ...]


def states_of(replay: Replay, classes: Iterable[int], now: int) -> dict[int, State]:
    """The states of core classes: where their queues stand but for their streams, what is in flight
    and how much of it is left, what their semaphores hold and what is on its way to them.
    """
    semaphores: dict[int, list[State]] = {}
    awake = replay.awake
    for semaphore in sorted(awake, key=_place):
        semaphore.take_in(now)
        if semaphore.rests:
            awake.remove(semaphore)
            continue
        arriving = tuple([(t - now, n) for t, n in semaphore.arriving])
        part = (semaphore.number, semaphore.level, semaphore.waiter is not None, arriving)
        semaphores.setdefault(semaphore.core, []).append(part)
    complete, flows = replay.phases.complete, replay.flows
    return {
        core: (
            tuple([_queue(q, complete, flows, now) for q in replay.queues[core]]),
            tuple(semaphores.get(core, ())),
        )
        for core in classes
    }


def busy_until(queue: Queue, now: int) -> int:
    """Picoseconds that a queue was busy until now."""
    return queue.busy + (now - queue.since if queue.flowing else 0)


def _queue(queue: Queue, complete: int, flows: Flows[Flight], now: int) -> State:
    return (
        max(queue.time - now, 0),
        max(queue.done - now, 0),
        queue.held,
        queue.flowing,
        queue.begun - complete,
        queue.ended - complete,
        None if queue.computing is None else _computing(queue.computing, now),
        tuple([_flight(flight, flows, now) for flight in queue.flying]),
    )


def _computing(computing: Computing, now: int) -> State:
    """What is still to come of an instruction under way."""
    return (max(computing.since - now, 0), computing.remaining(now))


def _flight(flight: Flight, flows: Flows[Flight], now: int) -> State:
    """What is still to come of a transfer in flight."""
    signals = tuple([(max(t - now, 0), s, n) for t, s, n in flight.signals])
    if flight.end is not None:
        return (-1, max(flight.end - now, 0), signals)
    transfer = flight.transfer
    if flight.group is None:
        # Its instruction lies behind: what is compared of the queues' streams doesn't tell it.
        return (-2, max(flight.start - now, 0), transfer, signals)
    left = flight.finish - flows.service(flight.group)
    # What makes its group, and what it contends with.
    flow = (transfer.dma, transfer.limit, transfer.weight, transfer.relation)
    return (left, flow, transfer.memory, transfer.contends, signals)


_place = attrgetter("core", "number")
