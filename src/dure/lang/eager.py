"""The builder that computes at once on NumPy: what the language's functions do under
``dl.interpret``.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dure.errors import IRError, KernelError
from dure.ir.blocks import Blocks
from dure.ir.core import Span, op_definition
from dure.ir.dtypes import Array, DType
from dure.ir.expr import as_expr
from dure.ir.types import TensorType, TileType, Type
from dure.lang.frontend.source import shown_path
from dure.lang.tensor import Tensor
from dure.lang.tile import Tile
from dure.lang.values import Attrs, Counter, Index, TensorBase, TileBase, describe

Positions = npt.NDArray[np.int64]
_HERE = str(Path(__file__).parent)


class Eager:
    """Runs one grid instance; ``grid`` and ``instance`` say which.

    ``before_store`` is called with the name of an argument before it is written, and may refuse.
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        instance: tuple[int, ...],
        before_store: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.before_store = before_store
        self.grid = grid
        self.instance = tuple(Counter(position) for position in instance)

    def emit(self, name: str, operands: Sequence[TileBase], attrs: Attrs) -> Tile:
        """Compute one op by its declared semantics."""
        definition = op_definition(name)
        full = {**definition.defaults, **attrs}
        (kind,) = _typed(name, [o.type for o in operands], full)
        assert isinstance(kind, TileType)
        if name == "full":
            assert isinstance(kind.dtype, DType)
            return Tile(kind, np.full(kind.shape, full["value"]).astype(kind.dtype.numpy))
        assert definition.semantics is not None
        return Tile(kind, definition.semantics(full, *(o.data for o in operands)))

    def load(self, source: TensorBase, lists: Sequence[TileBase], attrs: Attrs) -> Tile:
        """A tile of a tensor; outside of it, ``fill``."""
        (kind,) = _typed("load", [source.type, *(t.type for t in lists)], attrs)
        assert isinstance(kind, TileType)
        places = _positions(attrs, kind.shape, lists)
        memory = _memory(source)
        if isinstance(memory, Blocks):
            planes = {
                n: _gather(p, _plane_places(memory, n, places), 0) for n, p in memory.planes.items()
            }
            return Tile(kind, Blocks(memory.format, memory.axis, kind.shape, planes))
        return Tile(kind, _gather(memory, places, attrs["fill"]))

    def store(
        self, target: TensorBase, tile: TileBase, lists: Sequence[TileBase], attrs: Attrs
    ) -> None:
        """Write a tile; outside of the tensor nothing happens."""
        _typed("store", [target.type, tile.type, *(t.type for t in lists)], attrs)
        self.before_store(target.name)
        places = _positions(attrs, tile.shape, lists)
        memory, data = _memory(target), tile.data
        if isinstance(memory, Blocks):
            assert isinstance(data, Blocks)
            for name, plane in memory.planes.items():
                _scatter(plane, _plane_places(memory, name, places), data.planes[name], "")
            return
        assert not isinstance(data, Blocks)
        _scatter(memory, places, data, attrs["combine"])

    def view(self, source: TensorBase, axis: int, start: Index, stop: Index) -> Tensor:
        """``source[start:stop]`` along an axis."""
        assert isinstance(start, int) and isinstance(stop, int)
        stop = max(start, stop)
        memory = _memory(source)
        cut = (*((slice(None),) * axis), slice(start, stop))
        part: Array | Blocks
        if isinstance(memory, Blocks):
            planes = {n: p[cut] for n, p in memory.planes.items()}
            shape = (*memory.shape[:axis], stop - start, *memory.shape[axis + 1 :])
            part = Blocks(memory.format, memory.axis, shape, planes)
        else:
            part = memory[cut]
        return handle(source.name, source.type, part)

    def index_load(self, source: TensorBase, index: Sequence[Index]) -> Index:
        """An element of an index argument."""
        memory = _memory(source)
        assert not isinstance(memory, Blocks)
        return int(cast("Any", memory)[tuple(cast("Sequence[int]", index))])

    def reduce_with(
        self, source: TileBase, axis: int, combine: Callable[..., object], identity: float
    ) -> Tile:
        """A reduction with a combine function of two tiles of one element, one after another."""
        data = np.moveaxis(cast("Array", source.data), axis, 0)
        element = TileType((1,), source.dtype)
        result = np.empty((1, *data.shape[1:]), data.dtype)
        for place in np.ndindex(*data.shape[1:]):
            total = Tile(element, np.full((1,), identity).astype(data.dtype))
            for number in data[(slice(None), *place)]:
                found = combine(total, Tile(element, np.array([number], data.dtype)))
                if not isinstance(found, Tile) or found.type != element:
                    raise KernelError(
                        f"a combine function that gives {describe(found)} from two of "
                        f"{source.dtype}",
                        rule="a combine function keeps shape and dtype",
                        fix="convert its result with .to(a.dtype)",
                    )
                total = found
            result[(0, *place)] = cast("Array", total.data)[0]
        shape = tuple(1 if a == axis else e for a, e in enumerate(source.shape))
        return Tile(TileType(shape, source.dtype), np.moveaxis(result, 0, axis))

    def program_id(self, axis: int) -> Index:
        """The instance's position along a grid axis."""
        self._need(axis)
        return self.instance[axis]

    def num_programs(self, axis: int) -> Index:
        """The grid's extent along an axis."""
        self._need(axis)
        return self.grid[axis]

    def _need(self, axis: int) -> None:
        if axis >= len(self.grid):
            raise KernelError(
                f"axis {axis} of a grid of {len(self.grid)} axes",
                where=author_line(),
                rule="the launch's grid has every axis that the kernel asks for",
                fix=f"launch with a grid of {axis + 1} extents",
            )

    def marks(self, index: Index) -> bool:
        """Two ints may be equal by chance: only program ids and loop variables mark a place."""
        return isinstance(index, Counter)

    def require(self, condition: Index | bool, error: KernelError) -> None:
        """Raise ``error`` unless the condition holds."""
        if not condition:
            error.where = error.where or author_line()
            raise error


def handle(name: str, type: TensorType, memory: Array | Blocks) -> Tensor:
    """A tensor over this memory; ``type`` gives what isn't its shape."""
    shape = tuple(int(e) for e in memory.shape)
    kind = replace(type, shape=tuple(as_expr(e) for e in shape), layout=None)
    return Tensor(name, kind, memory, shape)


def place_of(error: BaseException) -> str:
    """The last line of the author's that an exception came through."""
    entry, found = error.__traceback__, None
    while entry is not None:
        if not _is_ours(entry.tb_frame):
            found = entry
        entry = entry.tb_next
    return "" if found is None else _rendered(found.tb_frame, found.tb_lineno, found.tb_lasti)


def _is_ours(frame: FrameType) -> bool:
    return str(Path(frame.f_code.co_filename).parent).startswith(_HERE)


def author_line() -> str:
    """The line of the kernel that is running, with what Python knows of its columns."""
    frame = inspect.currentframe()
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    return "" if frame is None else _rendered(frame, frame.f_lineno, frame.f_lasti)


def _rendered(frame: FrameType, line: int, instruction: int) -> str:
    file = frame.f_code.co_filename
    text = linecache.getline(file, line).rstrip("\n")
    positions = list(frame.f_code.co_positions())[instruction // 2]
    start, end = positions[2] or 0, positions[3] or len(text)
    if positions[0] != positions[1]:
        end = len(text)
    return Span(shown_path(file), line, start, max(end, start + 1), text).render()


def _typed(name: str, operands: Sequence[Type], attrs: Mapping[str, Any]) -> Sequence[Type]:
    full = {**op_definition(name).defaults, **attrs}
    try:
        return op_definition(name).typing(operands, full, ())
    except IRError as error:
        raise KernelError(
            error.what, where=author_line(), rule=error.rule, fix=error.fix
        ) from error


def _memory(tensor: TensorBase) -> Array | Blocks:
    return cast("Array | Blocks", tensor.payload)


def _positions(
    attrs: Attrs, shape: Sequence[int], lists: Sequence[TileBase]
) -> tuple[Positions, ...]:
    """For each axis, the tensor's element for each of the tile's; absent ones far outside."""
    by_axis = dict(zip(attrs["list_axes"], lists, strict=True))
    found: list[Positions] = []
    for axis, extent in enumerate(shape):
        step, offset = attrs["step"][axis], int(str(attrs["offset"][axis]))
        counter = np.arange(extent, dtype=np.int64)
        if axis in by_axis:
            entry = cast("Array", by_axis[axis].data).astype(np.int64)[counter // step]
            place = entry * step + counter % step + offset
            found.append(np.where(entry < 0, -1, place))
        else:
            start = int(str(attrs["index"][axis])) * step + offset
            found.append(start + counter * attrs["stride"][axis])
    return tuple(found)


def _plane_places(
    memory: Blocks, name: str, places: tuple[Positions, ...]
) -> tuple[Positions, ...]:
    per = memory.format.plane(name).per
    return tuple(p[::per] // per if a == memory.axis else p for a, p in enumerate(places))


def _inside(memory: Array, places: Sequence[Positions]) -> tuple[list[Positions], Any]:
    """Positions that are safe to use, and a mask of the elements that lie inside."""
    masks = [(p >= 0) & (p < extent) for p, extent in zip(places, memory.shape, strict=True)]
    safe = [np.where(mask, p, 0) for mask, p in zip(masks, places, strict=True)]
    mask = np.ones((1,) * len(places), np.bool_)
    for axis, one in enumerate(masks):
        mask = mask & one.reshape([-1 if a == axis else 1 for a in range(len(places))])
    return safe, mask


def _gather(memory: Array, places: Sequence[Positions], fill: float) -> Array:
    safe, mask = _inside(memory, places)
    shape = tuple(len(p) for p in places)
    number = np.full(shape, fill).astype(memory.dtype)
    if 0 in memory.shape:
        return number
    return np.where(np.broadcast_to(mask, shape), memory[np.ix_(*safe)], number)


_COMBINE: dict[str, Any] = {"add": np.add, "max": np.maximum, "min": np.minimum}


def _scatter(memory: Array, places: Sequence[Positions], data: Array, combine: str) -> None:
    if not places:
        memory[...] = _COMBINE[combine](memory, data) if combine else data
        return
    safe, mask = _inside(memory, places)
    shape = tuple(len(p) for p in places)
    chosen = np.broadcast_to(mask, shape)
    grids = np.meshgrid(*safe, indexing="ij")
    target = tuple(g[chosen] for g in grids)
    if combine:
        _COMBINE[combine].at(memory, target, data[chosen])
    else:
        memory[target] = data[chosen]
