"""Stamps of the processor's counter as times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Times: TypeAlias = npt.NDArray[np.float64]


def nanoseconds(stamps: npt.NDArray[np.int64], walls: Sequence[tuple[int, int]]) -> Times:
    """(run, worker, event) nanoseconds since each run began, of the counter's ``stamps``.

    The counter runs at a constant rate, which the calls' own clock gives over all runs: ``walls``
    are the nanoseconds at which each call began and ended.
    """
    if len(walls) > 1:
        cycles = stamps[-1, 0, 0] - stamps[0, 0, 0]
        rate = (walls[-1][0] - walls[0][0]) / int(cycles)
    else:
        rate = (walls[0][1] - walls[0][0]) / int(stamps[0, 0, -1] - stamps[0, 0, 0])
    begin = stamps[:, :, :1].min(axis=1, keepdims=True)
    return (stamps - begin) * rate
