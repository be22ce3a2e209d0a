"""The targets of this installation: one folder each, with a ``machine.toml``.

A folder whose machine is the one that dure runs on has a module ``machine`` with ``describe()``,
which fills in what is detected.  All others are chips: :func:`chip` reads those, somebody else's
file, and what another package offers as an entry point in the group ``dure.targets``, which loads
to the path or the text of a ``machine.toml``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dure.errors import TargetError
from dure.machine import Machine

if TYPE_CHECKING:
    from dure.machine.chip import Chip

GROUP = "dure.targets"
"""The group of entry points in which another package offers a chip."""

TARGETS = Path(__file__).parent
"""The folder of the package's own targets."""


def target_names() -> tuple[str, ...]:
    """The names of all targets, sorted; a target's name is its folder's, with ``-`` for ``_``."""
    return tuple(sorted(_packaged().keys() | _offered().keys()))


def host_names() -> tuple[str, ...]:
    """The names of the targets that are the machine that dure runs on."""
    found = _packaged().items()
    return tuple(sorted(name for name, folder in found if (folder / "machine.py").is_file()))


def chip_names() -> tuple[str, ...]:
    """The names of the targets that :func:`chip` reads."""
    hosts = host_names()
    return tuple(name for name in target_names() if name not in hosts)


def chip_folder(name: str) -> Path | None:
    """The folder of one of the package's own targets, in which its measurements lie too."""
    return _packaged().get(name)


def describe(name: str) -> Machine:
    """The machine of a target that dure runs on, with what can be detected without measuring.

    Raises :class:`~dure.errors.TargetError` for any other name.
    """
    if name not in host_names():
        raise TargetError(
            f"dure doesn't run on '{name}'",
            rule="it runs on: " + ", ".join(host_names()),
            fix="a chip is described by dure.targets.chip(name)",
        )
    return importlib.import_module(f"{__name__}.{_packaged()[name].name}.machine").describe()


def machines() -> tuple[Machine, ...]:
    """Every machine that dure runs on, by name."""
    return tuple(describe(name) for name in host_names())


def chip(name_or_path: str | Path, overrides: Mapping[str, str] | None = None) -> Chip:
    """The chip of this name, or of a file (``NAME.toml``, or a :class:`~pathlib.Path`).

    ``overrides`` are other numbers by dotted path, as ``{"memories.hbm.bandwidth": "2TB/s"}``.
    Raises :class:`~dure.errors.TargetError` for a name that isn't there and a file that breaks the
    schema.
    """
    from dure.machine.chip_loader import load_chip, parse_chip, with_overrides  # imports pydantic

    name = str(name_or_path)
    if isinstance(name_or_path, Path) or name.endswith(".toml"):
        found = load_chip(Path(name_or_path))
    elif name in _packaged() and name not in host_names():
        found = load_chip(_packaged()[name] / "machine.toml")
    elif name in _offered():
        found = parse_chip(*_text_of(name))
    else:
        raise _unknown(name)
    return with_overrides(found, overrides or {})


def chips() -> tuple[Chip, ...]:
    """Every chip of this installation, by name."""
    return tuple(chip(name) for name in chip_names())


def _packaged() -> dict[str, Path]:
    """The package's own targets, each with its folder."""
    files = TARGETS.glob("*/machine.toml")
    return {file.parent.name.replace("_", "-"): file.parent for file in files}


def _offered() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def _text_of(name: str) -> tuple[str, str]:
    """The text of the machine file that an entry point offers, and what to call it in errors."""
    point = _offered()[name]
    where = f"entry point {name} = {point.value}"
    try:
        loaded: object = point.load()
        if isinstance(loaded, str) and "\n" in loaded:
            return loaded, where
        if isinstance(loaded, str | Path):
            return Path(loaded).read_text(encoding="utf-8"), f"{where} ({loaded})"
    except Exception as error:  # another package's code may raise anything
        raise TargetError(
            f"the target '{name}' can't be loaded: {type(error).__name__}: {error}",
            where=where,
            fix="mend or remove the package that offers it",
        ) from error
    raise TargetError(
        f"the target '{name}' is {type(loaded).__name__}",
        where=where,
        rule=f"an entry point of the group {GROUP} is the path or the text of a machine.toml",
        fix="let it name a Path or a str",
    )


def _unknown(name: str) -> TargetError:
    names = chip_names()
    if name in host_names():
        return TargetError(
            f"'{name}' is the machine that dure runs on, not a chip with a file of its own",
            rule="the chips are: " + ", ".join(names),
            fix="name a chip",
        )
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return TargetError(
        f"there is no target named '{name}'",
        rule="the chips are: " + ", ".join(names),
        fix=(f"did you mean {near[0]}? " if near else "") + "A file is given as PATH/NAME.toml",
    )
