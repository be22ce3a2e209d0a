"""Language models by name, with no weights: the ``config.json`` of each is in the package.

:func:`names` lists them; :func:`model_config` reads one, or anybody's ``config.json`` by its path.
"""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path

from dure.errors import UsageError
from dure.models.catalogue import printable
from dure.models.config import ModelConfig
from dure.models.hf_config import read_hf_config

_FOLDER = Path(__file__).with_name("configs")


@cache
def names() -> tuple[str, ...]:
    """The models that dure knows by name."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def model_config(model: str) -> ModelConfig:
    """The configuration of a model: a name of :func:`names`, or the path of a ``config.json``.

    Raises :class:`UsageError` for a name that isn't known, and
    :class:`~dure.errors.ModelFileError` for a file that is no configuration.
    """
    if model in names():
        return read_hf_config(_FOLDER / f"{model}.json")
    if model.endswith(".json"):
        return read_hf_config(model)
    near = difflib.get_close_matches(model, names(), n=3, cutoff=0.4) or names()
    raise UsageError(
        f"no model is called '{printable(model[:80])}'",
        rule="a model is one that dure knows by name, or the path of its config.json",
        fix=f"one of {', '.join(near)}",
    )
