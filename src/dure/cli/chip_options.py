"""What names a chip on a command line: ``--target`` and ``--set``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dure.errors import UsageError

if TYPE_CHECKING:
    from dure.machine.chip import Chip

Target = Annotated[
    str, typer.Option("--target", help="A name from `dure targets`, or a machine file NAME.toml.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Another number for the chip, as memory.hbm.bandwidth=2TB/s; may be repeated.",
        show_default=False,
    ),
]


def overrides_of(settings: Sequence[str] | None) -> dict[str, str]:
    """The ``--set`` options by path.  Raises :class:`UsageError` for one that is no PATH=VALUE."""
    found: dict[str, str] = {}
    for text in settings or ():
        path, equals, value = text.partition("=")
        if not equals or not path.strip() or not value.strip():
            raise UsageError(
                f"--set {text} sets nothing",
                rule="a number is set by its path and its value with its unit",
                fix="write --set memory.hbm.bandwidth=2TB/s",
            )
        found[path.strip()] = value.strip()
    return found


def chosen_chip(target: str, settings: Sequence[str] | None) -> Chip:
    """The chip that ``--target`` and ``--set`` name."""
    from dure import targets  # a chip is read by pydantic, which takes a while to import

    return targets.chip(target, overrides_of(settings))
