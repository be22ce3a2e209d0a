"""What devices do together: all-reduce, all-gather, reduce-scatter, all-to-all, as launches.

A collective takes a matrix (M, H) on each of N devices:

- ``all_reduce``: the sum of all, on each (and a residual, where each adds the same one);
- ``all_gather``: all side by side, (M, N H), or one below another, (N M, H);
- ``reduce_scatter``: the sum of all, of which device d gets the d-th part of the columns,
  (M, H / N), or of the rows, (M / N, H);
- ``all_to_all``: device d gets the d-th part of the rows of each, in the order of the devices.

There are several ways to an all-reduce, and simulation chooses.  From one launch to the next stands
a signal over all devices.  It follows the data on its way, behind the last byte, so that the
latency of the link, which is part of each transfer, is paid once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from dure.errors import UsageError
from dure.ir.dtypes import DType, int32
from dure.ir.types import TensorType
from dure.library import collective_kernels as kernels
from dure.library.call import KernelCall, TileKernel, tensor
from dure.library.operators_common import power_of_two, tile
from dure.machine.group import Group

Kind: TypeAlias = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")

#: Columns of a matrix that is only bytes, at most.
_COLUMNS = 1024


@dataclass(frozen=True)
class Stage:
    """A launch over the devices, and the names of its arguments: ``x``, ``residual`` and ``y`` are
    the collective's, others lie between two launches.  An argument is its bytes, seen in the shape
    that the launch wants.  Where rows are cut in pieces, ``piece`` says which of how many the
    launch sees: this one of ``x``, and the one before it of ``residual`` and ``y``.
    """

    call: KernelCall
    arguments: tuple[str, ...]
    piece: tuple[int, int] = (0, 1)

    def seen(self, name: str) -> tuple[int, int] | None:
        """The piece of an argument that the launch sees, of how many; None: all."""
        place, pieces = self.piece
        if pieces == 1 or name not in ("x", "residual", "y"):
            return None
        return place - (name != "x"), pieces


#: Launches one after another.
Way: TypeAlias = tuple[Stage, ...]


@dataclass(frozen=True)
class Collective:
    """A collective on ``rows`` x ``columns`` of each device; ``axis`` is the one along which there
    are parts to gather or scatter, 0 or 1.
    """

    kind: Kind
    rows: int
    columns: int
    dtype: DType
    axis: int = 1
    residual: bool = False

    def result(self, devices: int) -> tuple[int, int]:
        """Rows and columns that a device gets.  Raises :class:`UsageError` where what is scattered
        can't be cut into so many parts.
        """
        shape = [self.rows, self.columns]
        axis = 0 if self.kind == "all_to_all" else self.axis
        if self.kind == "all_gather":
            shape[axis] *= devices
        elif self.kind != "all_reduce" and shape[axis] % devices:
            what = ("rows", "columns")[axis]
            raise UsageError(
                f"{self.kind} of {self.rows}x{self.columns} over {devices} devices",
                rule=f"each device gets as many {what}",
                fix=f"give a multiple of {devices} {what}",
            )
        elif self.kind == "reduce_scatter":
            shape[axis] //= devices
        return shape[0], shape[1]

    def ways(self, group: Group) -> tuple[Way, ...]:
        """The ways to do it."""
        self.result(group.count)
        return _WAYS[self.kind](_Devices(self, group))


@dataclass(frozen=True)
class _Devices:
    """A collective on known devices."""

    what: Collective
    group: Group
    count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", self.group.count)

    @property
    def elements(self) -> int:
        return self.what.rows * self.what.columns

    def type(self, *shape: int) -> TensorType:
        return tensor(self.what.dtype, self.count, *shape)

    def stage(self, kernel: TileKernel, **arguments: TensorType | None) -> Stage:
        """A launch of a kernel on named arguments; the last two axes are tiled."""
        types = tuple(arguments.values())
        first = next(t for t in types if t is not None)
        m, n = (int(str(extent)) for extent in (first.shape[-2], first.shape[-1]))
        if kernel is kernels.give_column_parts:
            m = int(str(first.shape[1]))
        consts: dict[str, object] = {}
        if kernel is kernels.add_at_once:
            consts["bd"] = power_of_two(self.count)
        elif kernel is not kernels.add_parts:
            consts["shape"] = self.group.shape
        if kernel in _ADDING and not self.what.dtype.is_float:
            consts["accumulator"] = int32
        tiles = {"bm": tile(m, 16), "bn": tile(n, 256)}
        call = KernelCall(kernel, types, consts, tiles, devices=self.count)
        return Stage(call, tuple(arguments))


_ADDING = (kernels.add_parts, kernels.add_at_once, kernels.add_and_give)


def whole_bytes(elements: int) -> tuple[int, int]:
    """Elements in any order, as rows and columns."""
    columns = max(d for d in range(1, min(elements, _COLUMNS) + 1) if elements % d == 0)
    return elements // columns, columns


def _all_reduce(on: _Devices) -> tuple[Way, ...]:
    n = on.count
    whole = whole_bytes(on.elements)
    one, all_of_them = on.type(*whole), on.type(n, *whole)
    residual = one if on.what.residual else None
    given = on.stage(kernels.give_all, x=one, parts=all_of_them)
    found: list[Way] = [
        (given, on.stage(kernels.add_parts, parts=all_of_them, residual=residual, y=one)),
        (given, on.stage(kernels.add_at_once, parts=all_of_them, residual=residual, y=one)),
    ]
    if on.elements % n == 0:
        part = on.type(n, *whole_bytes(on.elements // n))
        residual = part if on.what.residual else None
        found.append(
            (
                on.stage(kernels.give_parts, x=part, parts=part),
                on.stage(kernels.add_and_give, parts=part, residual=residual, y=part),
            )
        )
    return tuple(found)


def _all_gather(on: _Devices) -> tuple[Way, ...]:
    n, rows, columns = on.count, on.what.rows, on.what.columns
    if on.what.axis == 0 or rows == 1:
        whole = whole_bytes(on.elements)
        return ((on.stage(kernels.give_all, x=on.type(*whole), y=on.type(n, *whole)),),)
    x, y = on.type(rows, columns), on.type(rows, n, columns)
    return ((on.stage(kernels.give_columns, x=x, y=y),),)


def _reduce_scatter(on: _Devices) -> tuple[Way, ...]:
    n, rows, columns = on.count, on.what.rows, on.what.columns
    if on.what.axis == 0 or rows == 1:
        part = whole_bytes(on.elements // n)
        given = on.type(n, *part)
        first = on.stage(kernels.give_parts, x=given, parts=given)
    else:
        part = (rows, columns // n)
        given = on.type(n, *part)
        first = on.stage(kernels.give_column_parts, x=on.type(rows, n, part[1]), parts=given)
    return ((first, on.stage(kernels.add_parts, parts=given, residual=None, y=on.type(*part))),)


def _all_to_all(on: _Devices) -> tuple[Way, ...]:
    part = on.type(on.count, *whole_bytes(on.elements // on.count))
    return ((on.stage(kernels.give_parts, x=part, y=part),),)


_WAYS = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
}


def buffers(way: Sequence[Stage]) -> dict[str, TensorType]:
    """The arguments of launches by name, each as it is first seen."""
    found: dict[str, TensorType] = {}
    for stage in way:
        for name, kind in zip(stage.arguments, stage.call.types, strict=True):
            if kind is not None:
                found.setdefault(name, kind)
    return found
