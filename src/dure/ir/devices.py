"""Programs that several devices run together.

A function whose attributes hold ``devices`` = N is run by N equal devices at once: its first grid
axis counts them, and each of its tensors lies over their memories, as many entries of axis 0 on
each (a symmetric allocation).  An access either sees the tensor with axis 0 as the device's number,
or has a view along axis 0 of what is the device's own.  A device loads from its own entries only; a
store to another one's goes over the links.
"""

from __future__ import annotations

from dataclasses import replace

from dure.ir.core import Function
from dure.ir.expr import Expr, Symbol, bounds, symbol
from dure.ir.types import TensorType, static_extent

_ATTRIBUTE = "devices"


def over_devices(function: Function, devices: int) -> Function:
    """The function as one that so many devices run together."""
    if devices == 1:
        return function
    return replace(function, attrs={**function.attrs, _ATTRIBUTE: devices})


def own_device(devices: int) -> Symbol:
    """The number of a device, of so many."""
    return symbol("device", "grid", 0, devices - 1)


def devices_of(function: Function) -> int:
    """How many devices run the function together."""
    found = function.attrs.get(_ATTRIBUTE, 1)
    assert isinstance(found, int)
    return found


def device_id(function: Function) -> Symbol | None:
    """The program id that is the device's own number, or None where one device runs it alone."""
    return function.program_ids[0] if devices_of(function) > 1 else None


def sees_devices(tensor: TensorType, start: Expr, function: Function) -> bool:
    """Whether an access of a tensor, by a view that begins there along axis 0, has the device's
    number along that axis; else it is of what is the device's own, where it may be of nothing and
    begin at the end.
    """
    device = device_id(function)
    if device is None:
        return False
    rows = (static_extent(tensor.shape[0]) or 0) // devices_of(function)
    low, high = bounds(start - device * rows)
    return not (low is not None and high is not None and 0 <= low < rows and high <= rows)
