"""Every test of a kernel's values runs in all three modes."""

from __future__ import annotations

from collections.abc import Iterator

import lang_modes
import pytest


@pytest.fixture(params=lang_modes.MODES)
def anyhow(request: pytest.FixtureRequest) -> Iterator[str]:
    """Launches run as plain Python, on the reference interpreter, and natively."""
    with lang_modes.mode(request.param):
        yield request.param
