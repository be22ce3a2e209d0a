"""Accumulators that are only stored: what is computed of them and the store, written with the dot.

Behind a dot's last step its sums are in registers or in the nearest cache.  Where elementwise ops
and one store are all that uses them, they go on from there: a whole tile of accumulators needn't be
written and read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING

from dure.ir.core import Op, Value
from dure.ir.rewrite import has_effects
from dure.targets.cpu.bounds import Access, Bounds
from dure.targets.cpu.copies import lies_along
from dure.targets.cpu.memory import Extent
from dure.targets.cpu.rows import Row
from dure.targets.cpu.values import TOGETHER, Held, Tile
from dure.targets.cpu.writer import Reg, integer

if TYPE_CHECKING:
    from dure.targets.cpu.body import BodyEmitter

#: The axes of a tile of sums: vectors run along the last one.
_ROWS, _COLUMNS = 0, 1
_ALWAYS = Reg("i1", "true")


class Ending:
    """What is left to do with a tile of rows and columns when its elements are summed up.

    The ops up to the store are written by its making, but for the store itself, which
    :meth:`write` does for some of the rows and columns.  Rows may be stored as several axes.
    """

    def __init__(self, body: BodyEmitter, sums: Value, ops: Sequence[Op]) -> None:
        self.e, self.w, self.store = body.e, body.w, ops[-1]
        #: Whether the dot that is being written is the first of those that add up, and the last.
        self.begins = self.ends = _ALWAYS
        self.held = Held(sums.tile, Reg("", ""))
        body.tiles[sums] = self.held
        computed, last = {sums}, sums
        for op in ops[:-1]:
            if computed.isdisjoint(op.operands):
                body.op(op)
            elif op.definition.elementwise:
                with body.inlining():
                    body.op(op)
                computed.add(last := op.result)
        self.tile = body.tile(last)
        extents, self.place = body.stored_to(self.store)
        self.shape = self.store.operands[1].tile.shape
        if self._lies(TOGETHER * self.e.lanes):
            self.place.far = body.distant.is_far(body.root(self.store).tensor)
        self.limits = [self.w.index(extent.bound) for extent in extents]

    @property
    def fits(self) -> bool:
        """Whether all that is loaded for a row lies along it, where rows are several axes."""
        own = self.tile.accesses((_ROWS, _COLUMNS))
        return len(self.shape) == 2 or not any(_ROWS in access.axes for access in own)

    def write(
        self,
        sums: Tile,
        at: tuple[Reg, Reg],
        rows: tuple[Reg, Reg],
        columns: tuple[int, Reg],
        lanes: int,
    ) -> None:
        """Store what becomes of some rows of sums, which have the tile's elements from ``at`` on.

        ``columns`` are how many they have at most, and where the tile's end that are used; vectors
        of so many ``lanes`` end where the tile ends.
        """
        w, (above, column), (static, stop) = self.w, at, columns
        bounds, limit = self._bounds(lanes), None
        if bounds.open:
            ends = [w.add(above, rows[1])] if len(self.shape) == 2 else self.limits[:-1]
            limit = bounds.limit([*ends, stop])
        several = TOGETHER if self._lies(TOGETHER * lanes) else 1

        def one(near: Reg, _: list[Reg]) -> list[Reg]:
            position = w.add(above, near)

            def body(place: Reg, lanes: int) -> None:
                index = [near, w.sub(place, column)]
                self.held.value = sums.vector(self.e, index, _COLUMNS, lanes)
                self._put(position, place, lanes)

            row = Row(w, lanes, static, stop, bounds, limit, body, several, column)

            def write() -> None:
                if row.can_align():
                    first = self.place.address([*self._outer(position), column])
                    row.write_aligned(self.place, first)
                else:
                    row.write()

            w.when(self._stored(position), write, lambda: None)
            return []

        with w.at(self.store.span):
            w.loop(*rows, 1, one)

    def write_all(self, sums: Tile, rows: Extent, columns: Extent) -> None:
        """Store what becomes of all sums."""
        none = integer(0)
        end, stop = (self.w.index(extent.bound) for extent in (rows, columns))
        lanes = gcd(self.e.lanes, columns.static)
        self.write(sums, (none, none), (none, end), (columns.static, stop), lanes)

    def _bounds(self, lanes: int) -> Bounds:
        walked = tuple(range(len(self.shape)))
        own = self.tile.accesses((_ROWS, walked[-1]))
        return Bounds(self.w, [*own, Access(self.place, walked)], walked[-1], lanes)

    def _lies(self, lanes: int) -> bool:
        """Whether vectors of so many lanes are plain loads and stores."""
        axis = len(self.shape) - 1
        return lies_along(self.tile, _COLUMNS, lanes) and self.place.contiguous(axis, lanes)

    def _outer(self, row: Reg) -> list[Reg]:
        """Where a row is stored along all axes but the last one."""
        w, found = self.w, list[Reg]()
        for extent in reversed(self.shape[1:-1]):
            found.append(w.mod(row, extent))
            row = w.floordiv(row, integer(extent))
        return [row, *reversed(found)]

    def _stored(self, row: Reg) -> Reg:
        """Whether a row is stored at all: not where rows are several axes and it is behind one."""
        w, stored = self.w, _ALWAYS
        if len(self.shape) > 2:
            for place, limit in zip(self._outer(row), self.limits[:-1], strict=True):
                inside = w.compare("icmp slt", place, limit)
                stored = w.both(stored, inside)
        return stored

    def _put(self, row: Reg, column: Reg, lanes: int) -> None:
        value = self.tile.vector(self.e, [row, column], _COLUMNS, lanes)
        index, axis = [*self._outer(row), column], len(self.shape) - 1
        mask = self.place.masks(index, axis, lanes)
        self.place.store(self.e.convert.exact(value, self.tile.dtype), index, axis, mask)


def ending_of(body: BodyEmitter, op: Op, reads: Sequence[Op]) -> Ending | None:
    """What becomes of the only result of ``op``, a tile of rows and columns, if that is one store
    in the same region, to another tensor than those that are loaded by ``reads``.
    """
    if len(op.results) != 1 or op.result.tile.rank != 2 or op not in body.now.ops:
        return None
    ops = _up_to_store(op.result, body.now.ops[body.now.ops.index(op) + 1 :])
    if not ops or not _is_all(body, op.result, ops):
        return None
    if body.root(ops[-1]) in {body.root(read) for read in reads}:
        return None
    ending = Ending(body, op.result, ops)
    if not ending.fits:
        return None
    body.written.update(ops)
    return ending


def _up_to_store(sums: Value, following: Sequence[Op]) -> list[Op]:
    """The ops up to the store of what is computed of ``sums``, element by element, and stored as
    several axes at most; none where something else happens.
    """
    ops: list[Op] = []
    computed, reshaped = {sums}, False
    for op in following:
        ops.append(op)
        uses = not computed.isdisjoint(op.operands)
        if op.name == "store":
            return ops if uses and not op.attr("combine") and len(op.operands) == 2 else []
        if op.regions or has_effects(op) or (uses and reshaped):
            return []
        if uses:
            reshaped = op.name == "reshape" and _keeps_columns(op)
            if not reshaped and not op.definition.elementwise:
                return []
            computed.add(op.result)
    return []


def _keeps_columns(reshape: Op) -> bool:
    before, after = reshape.operands[0].tile, reshape.result.tile
    return after.rank > 1 and after.shape[-1] == before.shape[-1]


def _is_all(body: BodyEmitter, sums: Value, ops: Sequence[Op]) -> bool:
    """Whether these ops are all that uses what they compute of ``sums``."""
    computed = [sums]
    for op in ops:
        if not set(computed).isdisjoint(op.operands):
            computed.extend(op.results)
    for value in computed:
        users = sum(value in op.operands for op in ops)
        if value in body.inner_uses or body.uses.get(value, 0) != users:
            return False
    return True
