"""Predictions beside public measurements of operators, and how far apart they are.

:mod:`measurements` reads them, :mod:`prediction` predicts each, :mod:`summary` sums up the errors
and writes them down.
"""

from dure.library.validation.measurements import (
    Measured,
    Measurement,
    Published,
    other_devices,
    packaged,
    read_measured,
)
from dure.library.validation.prediction import Prediction, predict
from dure.library.validation.summary import Result, markdown, results_json, validate

__all__ = [
    "Measured",
    "Measurement",
    "Prediction",
    "Published",
    "Result",
    "markdown",
    "other_devices",
    "packaged",
    "predict",
    "read_measured",
    "results_json",
    "validate",
]
