"""``dure models``: what the catalogue has."""

from __future__ import annotations

import typer

from dure.cli import options
from dure.cli.output import print_json, table


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog="Example: dure models --json")(models)


def models(as_json: options.Json = False) -> None:
    """List the models that have a name, and which are on this machine."""
    from dure.models.catalogue import catalogue
    from dure.models.storage import readable_bytes

    entries = catalogue().values()
    if as_json:
        print_json(
            {
                "models": [
                    {
                        "name": entry.name,
                        "title": entry.title,
                        "licence": entry.licence,
                        "bytes": entry.size,
                        "sha256": entry.sha256,
                        "downloaded": entry.is_downloaded,
                        "path": str(entry.path),
                    }
                    for entry in entries
                ]
            }
        )
        return
    rows = [("NAME", "SIZE", "HERE", "LICENCE", "MODEL")]
    for entry in entries:
        here = "yes" if entry.is_downloaded else "no"
        rows.append((entry.name, readable_bytes(entry.size), here, entry.licence, entry.title))
    table(rows, right=(1,))
