"""``dure targets``: the machines that dure knows."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

import typer

from dure.cli import options
from dure.cli.output import print_json, table
from dure.errors import TargetError


@dataclass(frozen=True)
class Target:
    """One folder of ``dure.targets`` with a machine.toml."""

    name: str
    kind: str
    summary: str


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog="Example: dure targets --json")(targets)


def targets(as_json: options.Json = False) -> None:
    """List the machines that programs can be compiled for."""
    found = installed()
    if as_json:
        print_json({"targets": [vars(target) for target in found]})
        return
    table(
        [
            ("NAME", "KIND", "SUMMARY"),
            *((target.name, target.kind, target.summary) for target in found),
        ]
    )


def installed() -> list[Target]:
    """Every target of this installation, by name; TargetError for a file that can't be read."""
    found: list[Target] = []
    for folder in resources.files("dure.targets").iterdir():
        file = folder / "machine.toml"
        if not file.is_file():
            continue
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TargetError(
                f"the machine file of target {folder.name} can't be read: {error}", where=str(file)
            ) from error
        found.append(_target(folder.name, data))
    return sorted(found, key=lambda target: target.name)


def _target(folder: str, data: dict[str, Any]) -> Target:
    def text(key: str, default: str) -> str:
        value = data.get(key)
        return value if isinstance(value, str) else default

    return Target(text("name", folder), text("kind", ""), text("summary", ""))
