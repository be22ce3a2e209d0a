"""What devices may do to one another's memories: store into them, and nothing else.

Every link can carry a store (a posted write); not every one can fetch.  So each tensor of a program
of several devices has an entry a device, and is loaded from the device's own.
"""

from __future__ import annotations

from dure.errors import TargetError
from dure.ir.core import Function, Op, walk
from dure.ir.devices import device_id, devices_of
from dure.ir.expr import as_expr, const


def check_pushes(function: Function) -> None:
    """Raise :class:`TargetError` for a program of several devices in which one loads from another,
    or a tensor doesn't lie over the devices.
    """
    device = device_id(function)
    if device is None:
        return
    count = devices_of(function)
    for param in function.params:
        kind = param.value.tensor
        if not kind.shape or kind.shape[0] is not const(count):
            raise TargetError(
                f"'{param.value.name}' of '{function.name}' is {kind}, on {count} devices",
                rule="axis 0 of each tensor of a program of several devices is the device",
                fix=f"give it {count} entries along axis 0",
            )
    for op in walk(function.body):
        if op.name == "load" and not _own(op, device):
            raise _error(op, "a load from another device's memory",
                         "a device loads from its own memory, and stores into any",
                         "let the device that has the values store them")  # fmt: skip
        if op.name == "view" and op.attr("axis") == 0:
            raise _error(op, "a view along the axis of devices", "axis 0 is the device, whole",
                         "index axis 0 by the device's number")  # fmt: skip


def _own(op: Op, device: object) -> bool:
    start = as_expr(op.attr("index")[0]) * op.attr("step")[0] + op.attr("offset")[0]
    return start is device and 0 not in op.attr("list_axes")


def _error(op: Op, what: str, rule: str, fix: str) -> TargetError:
    where = op.span.render() if op.span is not None else ""
    return TargetError(what, where=where, rule=rule, fix=fix)
