"""The targets of this installation: one folder each, with a ``machine.toml``.

A folder whose machine is the one that dure runs on has a module ``machine`` with ``describe()``,
which fills in what is detected.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from dure.machine import Machine, load_machine


def target_names() -> tuple[str, ...]:
    """The names of all targets, sorted; a target's name is its folder's, with ``-`` for ``_``."""
    files = Path(__file__).parent.glob("*/machine.toml")
    return tuple(sorted(file.parent.name.replace("_", "-") for file in files))


def describe(name: str) -> Machine:
    """The machine of a target, with what can be detected without measuring.

    Raises :class:`~dure.errors.TargetError` for a machine file that breaks the schema.
    """
    folder = Path(__file__).parent / name.replace("-", "_")
    if (folder / "machine.py").is_file():
        module = importlib.import_module(f"{__name__}.{folder.name}.machine")
        return module.describe()
    return load_machine(folder / "machine.toml")


def machines() -> tuple[Machine, ...]:
    """Every target's machine, by name."""
    return tuple(describe(name) for name in target_names())
