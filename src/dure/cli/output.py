"""Printing: one JSON object or text on standard output; everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dure.errors import DureError


def print_json(result: Mapping[str, object]) -> None:
    """Print ``result`` as one object on a line of its own."""
    # Escapes where the terminal's encoding has no letters for it.
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    show(json.dumps(result, ensure_ascii=not is_unicode, allow_nan=False) + "\n")


def show(text: str) -> None:
    """Write ``text`` to standard output at once."""
    with _named_output_errors():
        sys.stdout.write(text)
        sys.stdout.flush()


def say(text: str) -> None:
    """Tell the user something that is not the result, on standard error."""
    print(text, file=sys.stderr, flush=True)


def write_document(path: Path, text: str) -> None:
    """Write a page and say so.  Raises :class:`DureError` where it can't be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DureError(
            f"the page can't be written: {error.strerror}",
            where=str(path),
            fix="give the path of a file in a folder that is there",
        ) from error
    say(f"wrote {path}")


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print rows in columns as wide as they need; those in ``right`` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        show("  ".join(cells).rstrip() + "\n")


@contextmanager
def _named_output_errors() -> Generator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        # The same text would fail once more when the interpreter closes the stream.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        raise DureError(
            f"the result can't be written to standard output: {error.strerror}",
            fix="send it somewhere with room and permission to write",
        ) from error
