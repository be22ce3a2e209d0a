"""``FILE.dure`` as the subject of a command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dure.cli.text import argument
from dure.errors import UsageError

if TYPE_CHECKING:
    from dure.library.work import Work
    from dure.models.chip_step import ChipStep

#: The default of ``--dtype``.
DTYPE = "bf16"


def is_artefact(subject: str) -> bool:
    """Whether a subject is a file of ``dure save``."""
    return subject.endswith(".dure")


def stored(subject: str, given: Mapping[str, object], dtype: str) -> Work | ChipStep:
    """What an artefact holds; ``given`` are the values of options that it takes the place of, as
    it does of ``dtype``.
    """
    from dure.models.artefact import load

    for name, value in {**given, "--dtype": dtype != DTYPE}.items():
        if value:
            raise UsageError(
                f"{argument(subject, 'the file')} with {name}",
                rule="an artefact holds its sizes, types and batch",
                fix=f"leave out {name}, or save another artefact with it",
            )
    return load(argument(subject, "the file"))


def stored_work(subject: str, given: Mapping[str, object], dtype: str) -> Work:
    """What an artefact holds as launches; each kernel of a step once."""
    from dure.library.work import Work
    from dure.models.artefact import launches

    found = stored(subject, given, dtype)
    if isinstance(found, Work):
        return found
    return Work(found.name, "", found.dtype, launches(found), found.flops, found.bytes)
