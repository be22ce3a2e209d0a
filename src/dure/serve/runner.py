"""What runs a step: the program's inputs in, logits out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dure.serve.kv import Int32s


class StepRunner(Protocol):
    """A step program that is loaded and ready."""

    @property
    def threads(self) -> int:
        """Workers of a step."""
        ...

    def run(self, inputs: Mapping[str, Int32s]) -> npt.NDArray[np.float32]:
        """One step; gives the logits (rows, vocabulary), a view that the next step overwrites."""
        ...

    def close(self) -> None:
        """Free weights, pools and code."""
        ...
