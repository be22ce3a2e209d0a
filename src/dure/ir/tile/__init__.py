"""The tile level: what one core computes.  Importing this package declares its ops."""

from dure.ir.tile import contraction, control, elementwise, memory, shape

__all__ = ["contraction", "control", "elementwise", "memory", "shape"]
