"""How many iterations of a loop what decides them stays as it is."""

from __future__ import annotations

from dure.sim.sanitizer.control import holds
from dure.sim.sanitizer.pieces import Control

#: Longer than any loop.
FOREVER = 1 << 62


def _constant(relation: str, value: int, grows: int) -> int:
    """How many iterations a comparison with 0 stays as it is, this one counted, while its form
    grows by ``grows`` from ``value``.
    """
    if grows == 0:
        return FOREVER
    if relation in ("==", "!="):
        if value == 0:
            return 1
        away = (value > 0) == (grows > 0)
        return FOREVER if away or value % grows else -value // grows
    # f < 0 is f <= -1: compare with the largest value for which it holds.
    last = -1 if relation == "<" else 0
    if value <= last:
        return FOREVER if grows < 0 else (last - value) // grows + 1
    return FOREVER if grows > 0 else (value - last - 1) // -grows + 1


def lasts(control: Control, relation: str, value: int, grows: int) -> int:
    """How many iterations a control stays as it is, whose form grows from a value."""
    if control.kind != "cut" or holds(relation, value):
        return _constant(relation, value, grows)
    # Partly outside of its tensor a transfer moves more or less each time; wholly outside, nothing.
    outside = control.span - value
    return _constant("<=", outside, -grows) if outside <= 0 or grows == 0 else 1
