"""The shapes of published models by name: what ``config.json`` says, without any weights.

Each ``NAME.json`` beside this file has the keys of the model's published ``config.json`` that say
how large it is and what it computes, and ``source``, where that is published.
"""

from __future__ import annotations

import difflib
import os
from functools import cache
from pathlib import Path

from dure.errors import ModelFileError, UsageError
from dure.models.catalogue import printable
from dure.models.config import ModelConfig
from dure.models.encoder_config import ENCODER_TYPES, EncoderConfig, encoder_from_hf
from dure.models.hf_config import config_from_hf, read_json

_FOLDER = Path(__file__).parent


@cache
def names() -> tuple[str, ...]:
    """The names that the package knows, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def any_config(name_or_path: str | os.PathLike[str]) -> ModelConfig | EncoderConfig:
    """What a model is, decoder or encoder.

    ``name_or_path`` is one of :func:`names`, or the path of a ``config.json`` or of the folder that
    holds one.  Raises :class:`UsageError` for what is neither, with the names that come closest,
    and :class:`ModelFileError` for a file that describes no model which dure knows.
    """
    path = _path(name_or_path)
    values = read_json(path)
    if values.get("model_type") in ENCODER_TYPES:
        return encoder_from_hf(values, os.fspath(path))
    return config_from_hf(values, os.fspath(path))


def model_config(name_or_path: str | os.PathLike[str]) -> ModelConfig:
    """Like :func:`any_config`, of a decoder; an encoder is a :class:`ModelFileError`."""
    found = any_config(name_or_path)
    if isinstance(found, EncoderConfig):
        raise _not(found.where, "an encoder", "a decoder-only language model")
    return found


def encoder_config(name_or_path: str | os.PathLike[str]) -> EncoderConfig:
    """Like :func:`any_config`, of an encoder; a decoder is a :class:`ModelFileError`."""
    found = any_config(name_or_path)
    if isinstance(found, ModelConfig):
        raise _not(found.where, "a decoder", "an encoder")
    return found


def source(name: str) -> str:
    """Where the numbers of a name of :func:`names` are published."""
    return str(read_json(_path(name))["source"])


def _not(where: str, found: str, wanted: str) -> ModelFileError:
    return ModelFileError(
        f"the model is {found}",
        where=where,
        rule=f"{wanted} is asked for here",
        fix=f"give {wanted}",
    )


def _path(name_or_path: str | os.PathLike[str]) -> Path:
    if isinstance(name_or_path, str) and name_or_path in names():
        return _FOLDER / f"{name_or_path}.json"
    path = Path(name_or_path)
    try:
        if path.is_dir():
            return path / "config.json"
        if path.is_file():
            return path
    except (OSError, ValueError):
        # A name that no file system takes is no path.
        pass
    given = os.fspath(name_or_path)
    # Only what is written like a path is treated as one; the rest was meant as a name.
    if path.suffix == ".json" or len(path.parts) > 1:
        return path
    closest = difflib.get_close_matches(given.lower(), names(), n=3, cutoff=0.5)
    raise UsageError(
        f"there is no model named '{printable(given)}'",
        rule=f"dure knows the shapes of {', '.join(names())}; the path of a config.json is one too",
        fix=f"did you mean {' or '.join(closest)}?" if closest else "give one of these, or a path",
    )
