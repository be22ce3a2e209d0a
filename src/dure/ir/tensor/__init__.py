"""The tensor level: what a whole program computes.  Importing this package declares its ops."""

from dure.ir.tensor import (
    attention,
    elementwise,
    experts,
    matrix,
    norms,
    program,
    rows,
    run,
)

__all__ = ["attention", "elementwise", "experts", "matrix", "norms", "program", "rows", "run"]
