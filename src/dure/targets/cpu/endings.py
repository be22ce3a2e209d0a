"""Accumulators that are only stored: what is computed of them and the store, written with the dot.

Behind a dot's last step its sums are in registers or in the nearest cache.  Where elementwise ops
and one store are all that uses them, they go on from there: a whole tile of accumulators needn't be
written and read again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dure.ir.core import Op, Value
from dure.ir.dtypes import DType
from dure.ir.rewrite import has_effects
from dure.targets.cpu.bounds import Access, Bounds
from dure.targets.cpu.copies import lies_along
from dure.targets.cpu.values import TOGETHER, Buffer, Held
from dure.targets.cpu.writer import Reg

if TYPE_CHECKING:
    from dure.targets.cpu.body import BodyEmitter

#: The axis of a tile of rows and columns that vectors run along.
_AXIS = 1


class Ending:
    """What is left to do with a tile of rows and columns when its elements are summed up.

    The ops up to the store are written by its making, but for the store itself, which
    :meth:`write` does for some of the rows and columns.
    """

    def __init__(self, body: BodyEmitter, sums: Value, ops: Sequence[Op]) -> None:
        self.body, self.e, self.w = body, body.e, body.e.w
        kind, self.store = sums.tile, ops[-1]
        self.held = Held(kind, Reg("", ""))
        body.tiles[sums] = self.held
        computed = {sums}
        for op in ops[:-1]:
            if computed.isdisjoint(op.operands):
                body.op(op)
                continue
            with body.inlining():
                body.op(op)
            computed.update(op.results)
        body.written.update(ops)
        self.tile = body.tile(self.store.operands[1])
        self.place = body.stored_to(self.store)[1]

    def write(
        self, sums: Buffer, at: tuple[Reg, Reg], rows: tuple[Reg, Reg], stop: Reg, lanes: int
    ) -> None:
        """Store what becomes of some rows of sums up to the column ``stop`` of the tile.

        The first element of ``sums`` is the tile's ``at``; vectors of so many ``lanes`` end where
        the tile ends.
        """
        w, (above, column) = self.w, at
        bounds = Bounds(w, self._accesses(), _AXIS, lanes)
        row, end = (w.add(above, edge) for edge in rows)
        inside = w.minimum(bounds.limit([end, stop]), stop) if bounds.open else stop
        several = TOGETHER * lanes
        if not (lies_along(self.tile, _AXIS, several) and self.place.contiguous(_AXIS, several)):
            several = lanes
        whole = w.maximum(w.sub(inside, w.mod(w.sub(inside, column), several)), column)

        def one(position: Reg, _: list[Reg]) -> list[Reg]:
            def vectors(lanes: int) -> Callable[[Reg, list[Reg]], list[Reg]]:
                def vector(place: Reg, _: list[Reg]) -> list[Reg]:
                    near = [w.sub(position, above), w.sub(place, column)]
                    self.held.value = sums.vector(self.e, near, _AXIS, lanes)
                    self._put([position, place], lanes)
                    return []

                return vector

            with bounds.kept():
                w.loop(column, whole, several, vectors(several))
            w.loop(whole, stop, lanes, vectors(lanes))
            return []

        with w.at(self.store.span):
            w.loop(row, end, 1, one)

    def _accesses(self) -> list[Access]:
        axes = (0, _AXIS)
        return [*self.tile.accesses(axes), Access(self.place, axes)]

    def _put(self, index: Sequence[Reg], lanes: int) -> None:
        value = self.tile.vector(self.e, index, _AXIS, lanes)
        mask = self.place.masks(index, _AXIS, lanes)
        stored = self.e.convert.exact(value, self.tile.dtype)
        self.place.store(stored, index, _AXIS, mask)


def ending_of(body: BodyEmitter, op: Op, reads: Sequence[Op]) -> Ending | None:
    """What becomes of the only result of ``op``, a tile of rows and columns, if that is one store
    in the same region, to another tensor than those that are loaded by ``reads``.
    """
    if len(op.results) != 1 or op.result.tile.rank != _AXIS + 1 or op not in body.now.ops:
        return None
    ops: list[Op] = []
    computed = {op.result}
    for found in body.now.ops[body.now.ops.index(op) + 1 :]:
        ops.append(found)
        uses = not computed.isdisjoint(found.operands)
        if found.name == "store":
            tensors = {body.root(read) for read in reads}
            ends = uses and _is_plain(found) and body.root(found) not in tensors
            return Ending(body, op.result, ops) if ends and _ends(body, computed, ops) else None
        if found.regions or has_effects(found) or (uses and not found.definition.elementwise):
            return None
        if uses:
            computed.update(found.results)
    return None


def _is_plain(store: Op) -> bool:
    """Whether each element of a tile goes to its own place, and nothing else happens to it."""
    plain = not store.attr("combine") and len(store.operands) == 2
    return plain and isinstance(store.operands[1].tile.dtype, DType)


def _ends(body: BodyEmitter, computed: set[Value], ops: Sequence[Op]) -> bool:
    """Whether these ops are all that uses these values."""
    for value in computed:
        users = sum(value in op.operands for op in ops)
        if value in body.inner_uses or body.uses.get(value, 0) != users:
            return False
    return True
