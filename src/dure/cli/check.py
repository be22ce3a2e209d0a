"""``dure check``: on which chips a kernel is legal, before any machine program is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

from dure.cli import options
from dure.cli.chip_options import Set
from dure.cli.output import print_json, show
from dure.cli.subject import (
    Algorithm,
    Arg,
    Const,
    Dims,
    Dtype,
    Strict,
    Subject,
    Targets,
    error_json,
    targets_of,
    work_of,
)
from dure.errors import KernelError

if TYPE_CHECKING:
    from dure.library.legality import Legality
    from dure.machine.chip import Chip


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("check", epilog="Example: dure check matmul_q4_k 1x4096x4096 --target all")(check)


def check(
    subject: Subject,
    dims: Dims = None,
    target: Targets = "all",
    dtype: Dtype = "bf16",
    algorithm: Algorithm = "dure",
    arg: Arg = None,
    const: Const = None,
    settings: Set = None,
    strict: Strict = False,
    as_json: options.Json = False,
) -> None:
    """Say for each chip whether a kernel is legal, what is converted, and which tiles fit."""
    from dure.library.legality import legality

    chips = targets_of(target, settings)
    work = work_of(subject, dims, dtype, algorithm, arg, const)
    found = [(chip, legality(work, chip, strict=strict)) for chip in chips]
    if as_json:
        print_json(
            {
                "ok": all(part.ok for _, parts in found for part in parts),
                "targets": [
                    {
                        "target": chip.name,
                        "ok": all(part.ok for part in parts),
                        "kernels": [_entry(part) for part in parts],
                    }
                    for chip, parts in found
                ],
            }
        )
    else:
        for chip, parts in found:
            for part in parts:
                _show(chip, part)
    illegal = [chip.name for chip, parts in found if not all(part.ok for part in parts)]
    if illegal:
        raise KernelError(
            f"{work.name} isn't legal on {', '.join(illegal)}",
            rule="the report says which rule of the chip it breaks, and where",
            fix="see the report",
        )


def _entry(part: Legality) -> dict[str, object]:
    found: dict[str, object] = {
        "kernel": part.kernel,
        "ok": part.ok,
        "conversions": [
            {"what": c.what, "from": c.found, "to": c.becomes, "where": c.where}
            for c in part.conversions
        ],
    }
    if part.error is not None:
        return {**found, **error_json(part.error)}
    return {
        **found,
        "tiles": dict(part.tiles or {}),
        "stages": part.stages,
        "scratchpad": dict(part.used),
    }


def _show(chip: Chip, part: Legality) -> None:
    show(f"{chip.name}: {part.kernel}: {'ok' if part.ok else 'illegal'}\n")
    for c in part.conversions:
        lines = c.where.splitlines()
        place = f" at {lines[0].strip()}" if lines else ""
        show(f"  converts {c.what}: {c.found} -> {c.becomes}{place}\n")
        for line in lines[1:]:
            show(f"    {line}\n")
    if part.error is not None:
        for line in str(part.error).splitlines():
            show(f"  {line}\n")
        return
    tiles = " ".join(f"{n}={size}" for n, size in (part.tiles or {}).items())
    fits = f"{tiles} fits" if tiles else "fits"
    show(f"  {fits} with {part.stages} slots a ring: {_memories(part.used, part.room)}\n")


def _memories(used: Mapping[str, int], room: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {used[n] / room[n]:.0%}" for n in used) or "no scratchpad"
