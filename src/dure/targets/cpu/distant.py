"""What lies far from a core: asked for before it is needed, and stored past the caches.

An instance of a grid reads the rows behind those that the instance before it has read.  While that
one computes or stores, its loops ask for the same elements of the next instance's tiles, which need
not exist: they come to the second cache, so that memory is busy while arithmetic is.  A tensor many
times as large as that cache isn't found there by whoever reads it next.  Its whole lines are stored
past the caches, which then need not read them first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING

from dure.ir.core import Function, Op
from dure.ir.dtypes import DType
from dure.ir.expr import as_expr, symbols
from dure.ir.types import TensorType
from dure.targets.cpu.memory import Place, fetch
from dure.targets.cpu.rows import LONG
from dure.targets.cpu.values import TOGETHER, Emitter, Tile
from dure.targets.cpu.writer import Reg, integer

if TYPE_CHECKING:
    from dure.targets.cpu.body import BodyEmitter

#: A tensor of as many times a core's second cache is far: at half as many, past the caches takes
#: longer, at four times as many half as long.
_FAR = 16
#: Bits of elements whose vectors of a register's width fill whole lines.
_BITS = 32
#: (index, lanes) -> nothing
Ask = Callable[[Sequence[Reg], int], None]


def _stores(op: Op, shape: tuple[int, ...]) -> bool:
    plain = op.name == "store" and not op.attr("list_axes") and not op.attr("combine")
    kind = op.operands[1].tile if plain else None
    return kind is not None and kind.shape == shape and isinstance(kind.dtype, DType)


def _reduces(op: Op, shape: tuple[int, ...]) -> bool:
    return op.name in ("reduce", "reduce_with") and op.operands[0].tile.shape == shape


class Distant:
    """The transfers of one kernel that are made early, or past the caches."""

    def __init__(self, emitter: Emitter, function: Function) -> None:
        self.e, self.w = emitter, emitter.w
        #: The number that differs from an instance to the next.
        self.own = function.program_ids[-1] if function.program_ids else None
        self._far: dict[TensorType, None] = {}

    def ahead(self, op: Op, place: Callable[[], Place]) -> Callable[[], Place] | None:
        """Where a load lies in the instance that comes after this one, whose own is ``place``; None
        where that is the same.
        """
        if op.attr("list_axes"):
            return None
        starts = [as_expr(start) for start in (*op.attr("index"), *op.attr("offset"))]
        if not any(self.own in symbols(start) for start in starts):
            return None
        held = dict(self.w.symbols)

        def following() -> Place:
            assert self.own is not None
            now, more = self.w.symbols, self.w.add(held[self.own], integer(1))
            self.w.symbols = {**held, self.own: more}
            found = place()
            self.w.symbols = now
            return found

        return following

    def ask(self, tile: Tile, index: Sequence[Reg], lanes: int) -> None:
        """Ask for what the next instance loads for these elements, where they are several
        registers of a long row.
        """
        if lanes != TOGETHER * self.e.lanes or tile.type.shape[-1] < LONG:
            return
        for loaded, at in tile.loads(index):
            if loaded.ahead is not None:
                count = lanes * loaded.dtype.bits // 8
                fetch(self.w, loaded.ahead().address(at), 0, count, cache=2)

    def asked_by(self, body: BodyEmitter, op: Op) -> Ask | None:
        """What a reduction's loop asks for at an index: its part of what is stored of the tile's
        shape behind it.  Several reductions in front of a store share its lines.
        """
        shape, ops = op.operands[0].tile.shape, body.now.ops
        follows = ops[ops.index(op) :] if op in ops else ()
        store = next((o for o in follows if _stores(o, shape)), None)
        if store is None or not self._known(body, store):
            return None
        asking = [o for o in ops[: ops.index(store)] if _reduces(o, shape)]
        place = body.stored_to(store)[1]
        far = self.is_far(body.root(store).tensor)
        first, last = ((asking.index(op) + more) * TOGETHER // len(asking) for more in (0, 1))

        def ask(index: Sequence[Reg], lanes: int) -> None:
            if lanes == TOGETHER * self.e.lanes and shape[-1] >= LONG:
                size = self.e.lanes * place.dtype.bits // 8
                address = place.address(index)
                if far is not None:
                    address = self.w.select(far, self.e.arena, address)
                fetch(self.w, address, first * size, (last - first) * size, cache=2)

        return ask

    def _known(self, body: BodyEmitter, store: Op) -> bool:
        """Whether the instance's number and the sizes say where a store goes."""
        starts = [as_expr(start) for start in (*store.attr("index"), *store.attr("offset"))]
        known = {*body.function.symbols, *body.function.program_ids}
        places = all(known.issuperset(symbols(start)) for start in starts)
        return places and store.operands[0] not in body.roots

    def is_far(self, kind: TensorType) -> Reg | None:
        """Whether what is stored to a tensor of this type is in no cache when it is read; None
        where it is in one for certain.
        """
        assert isinstance(kind.dtype, DType)
        if kind.dtype.bits != _BITS:
            return None
        size = prod(kind.shape, start=as_expr(_BITS // 8))
        total, most = self.w.index(size), integer(_FAR * self.e.host.l2_bytes)
        if total.literal is not None and total.literal <= _FAR * self.e.host.l2_bytes:
            return None
        self._far[kind] = None
        return self.w.compare("icmp sgt", total, most)

    def finish(self) -> None:
        """Behind the last instance: others see what has gone past the caches."""
        for kind in list(self._far):
            far = self.is_far(kind)
            assert far is not None
            self.w.when(far, lambda: self.w.do("fence seq_cst"), lambda: None)
