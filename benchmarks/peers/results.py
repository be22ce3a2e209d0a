"""What every script's result file begins with, and how it is written."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import dure
from peers.machine import describe, kind

RESULTS = Path(__file__).resolve().parent.parent / "results"
"""Where results are committed."""


def stamp() -> dict[str, Any]:
    """dure's version, the date, this host and its load."""
    return {
        "schema": 1,
        "dure": dure.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe(),
        "load_average_at_start": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def place(script: str, document: dict[str, Any], asked: Path | None, smallest: bool) -> Path | None:
    """Where a script's result goes: where it is asked for, else to this host's among the committed
    ones; that of the smallest sizes nowhere.
    """
    if asked is not None or smallest:
        return asked
    return RESULTS / f"{script}-{kind(document['machine'])}.json"


def write(path: Path | None, document: dict[str, Any]) -> None:
    """Write a result file where there is a path, and its folder where it is missing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
