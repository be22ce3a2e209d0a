"""``dure targets``: the machines that dure knows, and every number of one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options
from dure.cli.chip_options import Set, overrides_of
from dure.cli.output import print_json, show, table
from dure.errors import UsageError
from dure.machine import Machine
from dure.machine.quantity import Quantity

if TYPE_CHECKING:
    from dure.machine.chip import Chip
    from dure.machine.law import Law

Name = Annotated[str, typer.Argument(help="A name from `dure targets`, or a file NAME.toml.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(
        help="List the machines that programs can be compiled for, or show one.",
        epilog="Example: dure targets --json",
        rich_markup_mode=None,
        invoke_without_command=True,
    )
    group.callback()(targets)
    group.command("show", epilog="Example: dure targets show tpu-v6e")(show_target)
    app.add_typer(group, name="targets")


def targets(context: typer.Context, as_json: options.Json = False) -> None:
    """List the machines that programs can be compiled for, or show one."""
    if context.invoked_subcommand is not None:
        return
    from dure.targets import chips, machines  # detecting the host takes longer than `--help` may

    found: list[Machine | Chip] = sorted((*machines(), *chips()), key=lambda machine: machine.name)
    if as_json:
        print_json({"targets": [_entry(machine) for machine in found]})
        return
    rows = [(m.name, m.kind, f"{m.cores.base:g}", _memory(m), m.summary) for m in found]
    table([("NAME", "KIND", "CORES", "MEMORY", "SUMMARY"), *rows], right=(2, 3))


def show_target(target: Name, as_json: options.Json = False, settings: Set = None) -> None:
    """Show every number of a machine: its status, its source, and how far a guess may be off."""
    from dure import targets as known

    overrides = overrides_of(settings)
    if target in known.host_names():
        if overrides:
            raise UsageError(
                f"the numbers of {target} are those of this machine",
                rule="--set is for chips",
                fix="leave it out",
            )
        machine = known.describe(target)
        if as_json:
            print_json(_entry(machine))
        else:
            _show(machine, machine.quantities(), (), ("found: " + ", ".join(machine.features),))
        return
    chip = known.chip(target, overrides)
    if as_json:
        print_json({**_entry(chip), **_chip_entry(chip)})
    else:
        _show(chip, chip.quantities(), chip.laws(), chip.notes)


def _show(
    machine: Machine | Chip,
    numbers: Iterable[tuple[str, Quantity]],
    laws: Iterable[tuple[str, Law]],
    notes: Sequence[str],
) -> None:
    """The numbers and the laws as two tables, a source under each."""
    show(f"{machine.name}: {machine.summary}\n")
    for note in notes:
        show(textwrap.fill(note, 98, initial_indent="  ", subsequent_indent="    ") + "\n")
    show("\n")
    found = list(numbers)
    rows = [(path, *_cells(q), q.source) for path, q in found]
    table([("NUMBER", "VALUE", "STATUS", "RANGE", "SOURCE"), *rows], right=(1,))
    formulas = [(path, law.unit, law.status, law.text, law.source) for path, law in laws]
    if formulas:
        show("\n")
        table([("LAW", "UNIT", "STATUS", "FORMULA", "SOURCE"), *formulas])
    counts = {s: sum(q.status == s for _, q in found) for s in {q.status for _, q in found}}
    show("\n" + ", ".join(f"{counts[s]} {s}" for s in sorted(counts)) + "\n")


def _cells(quantity: Quantity) -> tuple[str, str, str]:
    unit = "" if quantity.unit == "1" else f" {quantity.unit}"
    value = "-" if quantity.value is None else f"{quantity.value:.10g}{unit}"
    if quantity.low is None or quantity.high is None:
        return value, quantity.status, ""
    return value, quantity.status, f"{quantity.low:.10g} to {quantity.high:.10g}"


def _entry(machine: Machine | Chip) -> dict[str, object]:
    """Everything a machine file says in numbers; a number that isn't known is null."""
    return {
        "name": machine.name,
        "kind": machine.kind,
        "summary": machine.summary,
        "features": list(machine.features) if isinstance(machine, Machine) else [],
        "numbers": {path: _number(quantity) for path, quantity in machine.quantities()},
    }


def _number(quantity: Quantity) -> dict[str, object]:
    found: dict[str, object] = {
        "value": quantity.value,
        "unit": quantity.unit,
        "status": quantity.status,
        "source": quantity.source,
    }
    if quantity.low is not None:
        found |= {"low": quantity.low, "high": quantity.high}
    return found


def _chip_entry(chip: Chip) -> dict[str, object]:
    """What a chip's file says beside its numbers."""
    return {
        "home": chip.home,
        "scratchpad": chip.scratchpad,
        "storage": list(chip.storage),
        "dot_types": sorted({t for e in chip.engines.values() if e.dot for t in e.dot.types}),
        "conversions": dict(chip.conversions),
        "queues": {
            **{e.queue: list(chip.engine_of(e.queue)) for e in chip.engines.values()},
            **{queue: [name] for name, d in chip.dma.items() for queue in d.queues},
        },
        "laws": {
            path: {"law": law.text, "unit": law.unit, "status": law.status, "source": law.source}
            for path, law in chip.laws()
        },
        "notes": list(chip.notes),
    }


def _memory(machine: Machine | Chip) -> str:
    """The largest memory's size."""
    memories = machine.memories if isinstance(machine, Machine) else machine.memories.values()
    sizes = [memory.size.base for memory in memories if memory.size.known]
    return f"{max(sizes) / 2**30:.3g} GiB" if sizes else ""
