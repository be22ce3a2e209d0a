"""The tensor level: what a whole program computes.  Importing this package declares its ops."""

from dure.ir.tensor import (
    attention,
    collectives,
    elementwise,
    experts,
    matrix,
    norms,
    program,
    rows,
    run,
    shards,
)

__all__ = [
    "attention",
    "collectives",
    "elementwise",
    "experts",
    "matrix",
    "norms",
    "program",
    "rows",
    "run",
    "shards",
]
