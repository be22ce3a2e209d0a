"""Programs that several devices run together.

A function whose attributes hold ``devices`` = N is run by N equal devices at once: its first grid
axis counts them, and so does axis 0 of each of its tensors, which lies over their memories, one
entry a device (a symmetric allocation).  A device loads from its own entries only; a store to
another one's goes over the links.
"""

from __future__ import annotations

from dataclasses import replace

from dure.ir.core import Function
from dure.ir.expr import Symbol

_ATTRIBUTE = "devices"


def over_devices(function: Function, devices: int) -> Function:
    """The function as one that so many devices run together."""
    if devices == 1:
        return function
    return replace(function, attrs={**function.attrs, _ATTRIBUTE: devices})


def devices_of(function: Function) -> int:
    """How many devices run the function together."""
    found = function.attrs.get(_ATTRIBUTE, 1)
    assert isinstance(found, int)
    return found


def device_id(function: Function) -> Symbol | None:
    """The program id that is the device's own number, or None where one device runs it alone."""
    return function.program_ids[0] if devices_of(function) > 1 else None
