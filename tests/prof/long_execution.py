"""Executions of as many instructions as asked for."""

from __future__ import annotations

from dataclasses import replace

from dure.prof.records import Instruction, Life, Profile


def many(profile: Profile, times: int) -> Profile:
    """The same instructions and lives, again and again."""
    total = profile.total
    entries: list[Instruction] = []
    lives: list[Life] = []
    for turn in range(times):
        by = turn * total
        for entry in profile.instructions:
            waits = tuple(
                replace(w, start=w.start + by, end=w.end + by, cause=(w.cause or 0) + turn * 4)
                for w in entry.waits
            )
            flow = None if entry.flow is None else entry.flow + by
            moved = replace(
                entry,
                start=entry.start + by,
                issued=entry.issued + by,
                flow=flow,
                end=entry.end + by,
                waits=waits,
            )
            entries.append(moved)
        lives += [Life(e.slot, e.start + by, e.end + by) for e in profile.buffers[0].lives]
    buffers = (replace(profile.buffers[0], lives=tuple(lives)),)
    return replace(profile, total=total * times, instructions=tuple(entries), buffers=buffers)
