"""Executions as one page for a browser: nothing on it is fetched from anywhere.

The page is data (JSON) and the scripts that draw it (``page/*.js``).  It has for each chip the
headline, the roofline, the critical path, a timeline that zooms, the scratchpad by buffer, tables
of what takes the time, and the programs.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dure.prof import analysis
from dure.prof.condense import CLASSES, Names, curve, lives, resolution, tracks
from dure.prof.output import check_path, write
from dure.prof.records import Buffer, Operator, Profile, Source
from dure.prof.records import Counter as Curve

SUFFIXES = (".html",)
_SCRIPTS = ("format.js", "charts.js", "timeline.js", "step.js", "report.js")
#: The most lines of a program's text that the page shows.
_LINES = 3_000


def page(profiles: Sequence[Profile], errors: Sequence[tuple[str, str]] = ()) -> str:
    """The page of executions of the same work, one a chip; ``errors`` are chips that can't."""
    title = profiles[0].title
    data = {
        "title": title,
        "chips": [_chip(profile) for profile in profiles],
        "errors": [{"target": target, "text": text} for target, text in errors],
    }
    # A text in a script ends at the first "</script", whatever it is part of.
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    files = resources.files("dure.prof") / "page"
    scripts = "\n".join((files / name).read_text("utf-8") for name in _SCRIPTS)
    style = (files / "report.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        '<main id="page"></main>\n'
        f'<script type="application/json" id="data">{text}</script>\n'
        f"<script>\n{scripts}</script>\n</body>\n</html>\n"
    )


def write_page(
    profiles: Sequence[Profile], path: Path, errors: Sequence[tuple[str, str]] = ()
) -> int:
    """Write the page to an ``.html`` file; gives its bytes."""
    check_path(path, SUFFIXES)
    data = page(profiles, errors).encode("utf-8", "replace")
    write(path, data)
    return len(data)


def _chip(profile: Profile) -> dict[str, Any]:
    names, sources = Names(), Names()
    path = analysis.critical_path(profile)
    found: dict[str, Any] = {
        "target": profile.target,
        "total": profile.total,
        "whole": profile.whole,
        "window": profile.window,
        "turns": profile.turns,
        "overview": _counters(profile.overview, profile.whole),
        "operators": [_operator(entry, profile) for entry in profile.operators],
        "bound": profile.bound,
        "facts": dict(profile.facts),
        "notes": list(profile.notes),
        "launches": profile.launches,
        "classes": [entry.name for entry in profile.classes],
        "shown": CLASSES,
        "critical": _critical(profile, path),
        "queues": [
            {"name": q.name, "kind": q.kind, "engines": list(q.engines)} for q in profile.queues
        ],
        "count": len(profile.instructions),
        "resolution": resolution(profile),
        "tracks": tracks(profile, names, sources),
        "path": _path(profile, path),
        "steps": _steps(profile, path),
        "uses": _uses(profile),
        "stalls": _stalls(profile),
        "lines": _lines(profile, path),
        "counters": _counters(profile.counters, profile.total),
        "memories": _memories(profile),
        "buffers": [_buffer(entry, profile, sources) for entry in profile.buffers],
        "resources": [
            {"name": r.name, "capacity": r.capacity, "bytes": r.bytes, "busy": r.busy}
            for r in profile.resources
        ],
        "roofline": _roofline(profile),
        "programs": [
            {"name": p.name, "text": _text(p.text), "facts": dict(p.facts)}
            for p in profile.programs
        ],
    }
    found["names"] = names.all()
    found["sources"] = [_source(entry) for entry in sources.all()]
    return found


def _operator(entry: Operator, profile: Profile) -> dict[str, object]:
    together = entry.count * entry.ps
    return {
        "name": entry.name,
        "kernel": entry.kernel,
        "count": entry.count,
        "ps": entry.ps,
        "alone": entry.alone,
        "together": together,
        "share": together / profile.whole if profile.whole else 0.0,
        "bound": entry.bound,
        "flops": entry.flops,
        "bytes": entry.bytes,
        "moved": entry.moved,
        "fraction": entry.fraction,
    }


def _critical(profile: Profile, path: Sequence[analysis.Step]) -> int:
    """The core class that ends last: the critical path is its."""
    last = next((s.instruction for s in reversed(path) if s.instruction is not None), None)
    return 0 if last is None else profile.instructions[last].core_class


def _source(source: Source) -> dict[str, object]:
    return {
        "place": source.place,
        "file": f"{source.file}:{source.line}",
        "text": source.text.strip(),
    }


def _text(text: str) -> str:
    lines = text.splitlines()
    if len(lines) <= _LINES:
        return text
    rest = len(lines) - _LINES
    return "\n".join([*lines[:_LINES], f"... and {rest} lines more (`dure compile` has them all)"])


def _path(profile: Profile, path: Sequence[analysis.Step]) -> list[dict[str, object]]:
    """What the critical path spends its time on, most first."""
    times: Counter[tuple[str, str, str]] = Counter()
    for step in path:
        name, place = "", ""
        if step.instruction is not None:
            entry = profile.instructions[step.instruction]
            name = entry.name
            place = entry.source.place if entry.source is not None else ""
        times[step.what, name, place] += step.end - step.start
    return [
        {"what": what, "name": name, "place": place, "time": time}
        for (what, name, place), time in times.most_common()
    ]


def _steps(profile: Profile, path: Sequence[analysis.Step]) -> list[tuple[str, int, int]]:
    """The path as (what, start, end), neighbours of the same kind together.

    Where a reader can't tell the steps apart, equal times are what most of them is.
    """
    fine = resolution(profile)
    steps = [(step.what, step.start, step.end) for step in path]
    if fine:
        steps = _binned(steps, profile.total, fine)
    found: list[tuple[str, int, int]] = []
    for what, start, end in steps:
        if found and found[-1][0] == what and found[-1][2] == start:
            found[-1] = what, found[-1][1], end
        else:
            found.append((what, start, end))
    return found


def _binned(
    steps: Sequence[tuple[str, int, int]], total: int, width: int
) -> list[tuple[str, int, int]]:
    """For each piece of ``width``, what most of it is."""
    shares: dict[int, Counter[str]] = {}
    for what, start, end in steps:
        for part in range(start // width, -(-end // width)):
            inside = min(end, (part + 1) * width) - max(start, part * width)
            shares.setdefault(part, Counter())[what] += inside
    return [
        (share.most_common(1)[0][0], part * width, min(total, (part + 1) * width))
        for part, share in sorted(shares.items())
    ]


def _uses(profile: Profile) -> list[dict[str, object]]:
    return [
        {
            "class": use.core_class,
            "queue": use.queue,
            "instructions": use.instructions,
            "busy": use.busy,
            "waiting": use.waiting,
            "bytes": use.bytes,
            "flops": use.flops,
            "stalls": [
                {"semaphore": semaphore, "queue": queue, "time": time}
                for (semaphore, queue), time in list(use.stalls.items())[:3]
            ],
        }
        for use in analysis.queue_uses(profile)
        if use.core_class < CLASSES
    ]


def _stalls(profile: Profile) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for stall in analysis.longest_stalls(profile):
        entry = profile.instructions[stall.instruction]
        found.append(
            {
                "class": entry.core_class,
                "queue": entry.queue,
                "before": entry.name,
                "place": "" if entry.source is None else entry.source.place,
                "semaphore": stall.semaphore,
                "by": stall.queue,
                "start": stall.start,
                "end": stall.end,
            }
        )
    return found


def _lines(profile: Profile, path: Sequence[analysis.Step]) -> list[dict[str, object]]:
    return [
        {
            "queue": line.queue,
            "name": line.name,
            "place": line.place,
            "text": line.text,
            "count": line.count,
            "time": line.time,
            "critical": line.critical,
        }
        for line in analysis.by_line(profile, path)[:20]
    ]


def _counters(counters: Sequence[Curve], total: int) -> list[dict[str, object]]:
    return [
        {
            "name": counter.name,
            "unit": counter.unit,
            "capacity": counter.capacity,
            "points": [(at, float(f"{value:.6g}")) for at, value in curve(counter.points, total)],
        }
        for counter in counters
    ]


def _memories(profile: Profile) -> list[dict[str, object]]:
    return [
        {
            "name": memory.name,
            "capacity": memory.capacity,
            "used": memory.used,
            "partitions": memory.partitions,
            "points": curve(
                analysis.occupancy(b for b in profile.buffers if b.memory == memory.name),
                profile.total,
                highest=True,
            ),
        }
        for memory in profile.memories
    ]


def _buffer(buffer: Buffer, profile: Profile, sources: Names) -> dict[str, object]:
    held = sum(life.end - life.start for life in buffer.lives)
    return {
        "name": buffer.name,
        "memory": buffer.memory,
        "type": buffer.type,
        "slots": buffer.slots,
        "bytes": buffer.slot_bytes,
        "offset": buffer.offset,
        "source": sources.of(buffer.source),
        "held": held / (profile.total * buffer.slots) if profile.total else 0.0,
        "count": len(buffer.lives),
        "lives": lives(buffer.lives, resolution(profile)),
    }


def _roofline(profile: Profile) -> dict[str, object]:
    roof = profile.roofline
    return {
        "peaks": dict(roof.peaks),
        "peak": roof.peak,
        "memory": roof.memory,
        "bandwidth": roof.bandwidth,
        "attainable": roof.attainable,
        "flops": roof.flops,
        "bytes": roof.bytes,
        "moved": roof.moved,
        "seconds": roof.seconds,
        "fraction": roof.fraction,
    }
