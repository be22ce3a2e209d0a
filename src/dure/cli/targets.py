"""``dure targets``: the machines that dure knows."""

from __future__ import annotations

import typer

from dure.cli import options
from dure.cli.output import print_json, table
from dure.machine import Machine


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog="Example: dure targets --json")(targets)


def targets(as_json: options.Json = False) -> None:
    """List the machines that programs can be compiled for."""
    from dure.targets import machines  # detecting the host takes longer than `dure --help` may

    found = machines()
    if as_json:
        print_json({"targets": [_entry(machine) for machine in found]})
        return
    rows = [(m.name, m.kind, f"{m.cores.base:g}", _memory(m), m.summary) for m in found]
    table([("NAME", "KIND", "CORES", "MEMORY", "SUMMARY"), *rows], right=(2, 3))


def _entry(machine: Machine) -> dict[str, object]:
    """Everything a machine file says; a number that isn't known is null."""
    return {
        "name": machine.name,
        "kind": machine.kind,
        "summary": machine.summary,
        "features": list(machine.features),
        "numbers": {
            path: {"value": q.value, "unit": q.unit, "status": q.status, "source": q.source}
            for path, q in machine.quantities()
        },
    }


def _memory(machine: Machine) -> str:
    """The largest memory's size."""
    sizes = [memory.size.base for memory in machine.memories if memory.size.known]
    return f"{max(sizes) / 2**30:.3g} GiB" if sizes else ""
