"""Fixtures that several folders of tests share.

This file also puts ``tests/`` on the import path, for the helper modules that lie beside it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dure.runtime.garbage import collect_rarely

collect_rarely()
# A shell starts its background jobs with Ctrl-C ignored, which every process below inherits.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _model(name: str) -> Path:
    """A model's GGUF: from the folder in DURE_TEST_MODELS, else pulled from the catalogue."""
    folder = os.environ.get("DURE_TEST_MODELS")
    if folder:
        return Path(folder) / f"{name}.gguf"
    from dure.models.download import resolve

    return resolve(name)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return _model("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    return _model("gemma3-270m")
