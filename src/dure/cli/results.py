"""What ``dure sim`` says of any work: JSON, errors, confidence, numbers with their units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dure.cli.output import print_json, show
from dure.cli.subject import error_json
from dure.errors import DureError

if TYPE_CHECKING:
    from dure.library.answer import Confidence


class Result(Protocol):
    """Work on a chip."""

    def json(self) -> dict[str, object]:
        """Everything as one JSON object."""
        ...


def concluded(found: Sequence[tuple[str, Result | DureError]], as_json: bool) -> bool:
    """Print the results of targets as JSON, if that is asked for; False where they are yet to be
    shown.  Where nothing ran the first error is raised, but for JSON of several targets.
    """
    errors = [result for _, result in found if isinstance(result, DureError)]
    if len(errors) == len(found) and (len(found) == 1 or not as_json):
        raise errors[0]
    if as_json:
        entries = [_entry(name, result) for name, result in found]
        print_json(entries[0] if len(entries) == 1 else {"results": entries})
    return as_json


def _entry(name: str, result: Result | DureError) -> dict[str, object]:
    if isinstance(result, DureError):
        return {"target": name, **error_json(result)}
    return result.json()


def show_confidence(confidence: Confidence) -> None:
    """The numbers that a time rests on, a line a kind."""
    for title, paths in (
        ("rests on guesses", confidence.guesses),
        ("and may rest on guesses", confidence.untried),
        ("rests on --set", confidence.overridden),
    ):
        if paths:
            show(f"  {title}: {', '.join(paths)}\n")


def duration(ps: int) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("s", 10**12), ("ms", 10**9), ("us", 10**6)):
        if ps >= size:
            return f"{ps / size:.4g} {unit}"
    return f"{ps / 1000:.4g} ns"


def quantity(value: float) -> str:
    """A number with a decimal prefix."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g} "
