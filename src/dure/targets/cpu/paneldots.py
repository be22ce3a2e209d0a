"""Dots of many rows: both operands are copied to where the micro-kernel reads them in order.

K is cut so that a panel of columns stays in the nearest cache while the copied rows pass by, rows
so that what is copied of them is near too, and columns so that all panels of a cut stay in the
second cache.  Between the cuts accumulators return to their buffer: each output element is still
one chain of additions in the order of K, with the bits of
:func:`dure.targets.cpu.dots.plain_dot`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dure.ir.types import TileType
from dure.runtime.host import HostFeatures
from dure.targets.cpu.bounds import Bounds
from dure.targets.cpu.copies import lies_along, read_along, read_turned
from dure.targets.cpu.dots import KRange, last_vector, multiply_add, zero
from dure.targets.cpu.endings import Ending
from dure.targets.cpu.memory import Extent
from dure.targets.cpu.values import Buffer, Emitter, Mapped, Tile
from dure.targets.cpu.writer import Reg, integer, vector_type

#: Vectors of columns in a panel: each element of the left operand is spread over them.
_VECTORS = 2
#: Fewer rows than these don't repay the copy of a right operand that could be read in place.
_ROWS = 64
#: Bytes of an accumulator, and of what it is made from.
_SIZE = 4


@dataclass(frozen=True)
class Blocking:
    """How much of each axis is worked on at a time.

    ``heights`` are the register blocks' rows, the tallest first; ``rows``, ``depth`` and
    ``columns`` cut M, K and N, ``width`` is a panel's columns.
    """

    heights: tuple[int, ...]
    rows: int
    depth: int
    width: int
    columns: int


def blocking(host: HostFeatures, lanes: int) -> Blocking:
    """Blocks from the host's registers and caches.

    There is a register for each accumulator, for a panel's vectors and for the element that meets
    them.  A panel takes half of the nearest cache, the copied rows as much: the second one has the
    accumulators and all panels, which take half of it.
    """
    tallest = (host.vector_registers - _VECTORS - 1) // _VECTORS
    heights = (tallest, *(h for h in (8, 4, 2, 1) if h < tallest))
    width = _VECTORS * lanes
    depth = max(1, host.l1d_bytes // 2 // (_SIZE * width * lanes)) * lanes
    rows = max(1, host.l1d_bytes // 2 // (_SIZE * depth * tallest)) * tallest
    return Blocking(heights, rows, depth, width, most_columns(host, _SIZE * depth, width))


def most_columns(host: HostFeatures, bytes: int, width: int) -> int:
    """Columns of so many bytes, in panels of ``width``, that half of the second cache holds."""
    return max(1, host.l2_bytes // 2 // (bytes * width)) * width


def takes_panels(lanes: int, rows: int, columns: int, turned: bool) -> bool:
    """Whether a dot with so many rows and columns repays copies of its operands.

    ``turned`` says that the right one's rows don't lie side by side: they have to be copied anyway.
    """
    return columns % (_VECTORS * lanes) == 0 and (turned or rows >= _ROWS)


class PanelDot:
    """``c += a @ b`` like :func:`~dure.targets.cpu.dots.plain_dot`, where :func:`takes_panels`.

    Any tile can be an operand: an element of ``b`` is computed once, one of ``a`` once a dot.
    """

    #: Steps of K that are placed together: they fill a lane.
    together = 1
    #: Whether an ending is written for the copied rows of all panels, or of one after another, so
    #: that the next one's products go on while memory takes what is stored.
    whole_rows = False
    #: The left operand where it lies, if it is read there.
    placed: Buffer | None = None

    def __init__(
        self,
        e: Emitter,
        a: Tile,
        b: Tile,
        c: Buffer,
        extents: tuple[Extent, Extent],
        batch: Sequence[Reg] = (),
        ending: Ending | None = None,
    ) -> None:
        """``ending`` is what becomes of the sums, which ``c`` doesn't have then."""
        self.e, self.w = e, e.w
        self.ending = ending
        self.c = c
        self.a, self.b = (self._operand(tile) for tile in (a, b))
        self.batch = list(batch)
        #: Where the batch ends, for those who compare bounds.
        self.behind = [e.w.add(at, integer(1)) for at in batch]
        self.axis = len(batch) + 1
        self.static = (extents[0].static, extents[1].static)
        self.cuts = self._blocking()
        self.lanes = min(e.lanes, self.cuts.width)
        self.rows, self.used = (e.w.index(x.bound) for x in extents)
        self.last = last_vector(e, extents[1], self.cuts.width)

    def _operand(self, tile: Tile) -> Tile:
        """An operand in registers of the accumulator's type."""
        if tile.dtype.is_float and tile.dtype.bits <= 32:
            return tile
        e, accumulator = self.e, self.c.stored

        def converted(values: Sequence[Reg]) -> Reg:
            return e.convert.convert(values[0], tile.dtype, accumulator)

        return Mapped(TileType(tile.type.shape, accumulator), [tile], converted)

    def _blocking(self) -> Blocking:
        return blocking(self.e.host, self.e.lanes)

    def run(self, k: KRange, fresh: bool) -> None:
        """Write the dot over this part of K; ``fresh`` starts from zero and does not read ``c``."""
        w, e, cuts = self.w, self.e, self.cuts
        mark = e.mark()
        length = w.sub(k.stop, k.start).literal
        self.whole = length is not None and length <= cuts.depth
        self.depth = max(1, length) if length is not None and self.whole else cuts.depth
        self.k, self.fresh = k, fresh
        panels = self.static[1] // cuts.width
        most = -(-panels // -(-self.static[1] // cuts.columns))
        self._allocate(min(self.static[0], cuts.rows), most)
        if self.ending is not None:
            #: The accumulators of the copied rows behind their last step.
            shape = min(self.static[0], cuts.rows), (most if self.whole_rows else 1) * cuts.width
            self.sums = e.buffer(shape, self.c.stored, apart=True)

        def group(column: Reg, _: list[Reg]) -> list[Reg]:
            self._group(column, w.minimum(integer(most * cuts.width), w.sub(self.used, column)))
            return []

        stop = self.used if most < panels else integer(1)
        w.loop(integer(0), stop, most * cuts.width, group)
        e.release(mark)

    def _group(self, column: Reg, columns: Reg) -> None:
        """So many columns, whose panels of a cut are copied together."""
        w, k, cuts = self.w, self.k, self.cuts
        self.column, self.columns = column, columns
        self.panels = w.floordiv(w.add(columns, integer(cuts.width - 1)), integer(cuts.width))

        def cut(first: Reg, _: list[Reg]) -> list[Reg]:
            depth = w.minimum(integer(self.depth), w.sub(k.stop, first))
            self._edges(first)
            self._copy_columns(first, depth)

            def rows(row: Reg, _: list[Reg]) -> list[Reg]:
                count = w.minimum(integer(cuts.rows), w.sub(self.rows, row))
                if self.placed is None:
                    self._copy_rows(row, count, first, depth)
                else:
                    self.left = self.placed.at(self.e, [*self.batch, row, first])
                self._multiply(row, count, first, depth)
                return []

            stop = self.rows if self.static[0] > cuts.rows else integer(1)
            w.loop(integer(0), stop, cuts.rows, rows)
            return []

        # The accumulators of no steps at all are zeros, too.
        least = integer(1 if self.fresh or self.ending is not None else 0)
        w.loop(k.start, w.maximum(k.stop, w.add(k.start, least)), self.depth, cut)

    def _edges(self, first: Reg) -> None:
        """Whether a cut is the one that starts from zero, and whether it has an end to write."""
        w, never = self.w, Reg("i1", "false")
        begins = ends = Reg("i1", "true")
        if self.ending is not None:
            begins, ends = self.ending.begins, self.ending.ends
        if not self.whole:
            last = w.add(first, integer(self.depth))
            begins = w.both(begins, w.compare("icmp eq", first, self.k.start))
            ends = w.both(ends, w.compare("icmp sge", last, self.k.stop))
        self.begins = begins if self.fresh else never
        self.ends = ends if self.ending is not None else never

    def _end(self, at: tuple[Reg, Reg], rows: tuple[Reg, Reg], stop: Reg) -> None:
        """Write what becomes of some of the rows that are kept, which begin ``at`` a row and a
        column of the tile, up to the column ``stop``.
        """
        ending = self.ending
        if ending is not None:
            columns = self.sums.row, stop
            self.w.when(
                self.ends,
                lambda: ending.write(self.sums, at, rows, columns, self.lanes),
                lambda: None,
            )

    @property
    def _stop(self) -> Reg:
        """Where the columns end that are copied together."""
        return self.w.add(self.column, self.columns)

    def _column(self, panel: Reg, lane: int = 0) -> Reg:
        """The column of a lane of a panel."""
        w = self.w
        inside = w.add(w.mul(panel, integer(self.cuts.width)), integer(lane))
        return w.add(self.column, inside)

    def _allocate(self, rows: int, panels: int) -> None:
        """Make room for copies of so many rows and panels."""
        self.placed = self._in_place()
        if self.placed is None:
            self.pitch = self.depth
            self.left = self.e.allocate(_SIZE * rows * self.depth)
        else:
            self.pitch = self.placed.strides()[-2]
        self.right = self.e.allocate(_SIZE * panels * self._panel)

    def _in_place(self) -> Buffer | None:
        """The left operand, if rows of it lie in the arena as they are multiplied."""
        a = self.a
        if isinstance(a, Buffer) and a.strides()[-1] == 1 and a.stored.bits == 8 * _SIZE:
            return a
        return None

    @property
    def _panel(self) -> int:
        """Elements from one panel to the next: whole squares that were turned, and no power of two,
        lest all begin in one set of a cache.
        """
        return (-(-self.depth // self.e.lanes) * self.e.lanes + 1) * self.cuts.width

    # -- copies -----------------------------------------------------------------------------------

    def _copy_rows(self, row: Reg, count: Reg, first: Reg, depth: Reg) -> None:
        """Rows of the left operand, one after another."""
        w = self.w

        def one(i: Reg, _: list[Reg]) -> list[Reg]:
            index = [*self.batch, w.add(row, i), first]

            def put(k: Reg, vector: Reg) -> None:
                self._put_row(i, k, vector)

            read_along(self.e, self.a, index, self.axis, depth, put, self.together)
            return []

        bounds = self._bounds(self.a, self.axis)
        stop = [*self.behind, w.add(row, count), w.add(first, depth)]
        bounds.either(stop, lambda: w.loop(integer(0), count, 1, one))

    def _copy_columns(self, first: Reg, depth: Reg) -> None:
        """Panels of the right operand, in each the columns of one step of K side by side."""
        if lies_along(self.b, self.axis, self.lanes):
            self._copy_along(first, depth)
        else:
            self._copy_turned(first, depth)

    def _copy_along(self, first: Reg, depth: Reg) -> None:
        """Panels whose columns lie side by side."""
        w, e, width = self.w, self.e, self.cuts.width
        bounds = self._bounds(self.b, self.axis)
        last = None if bounds.open else self.last

        def steps(count: int) -> Callable[[Reg, list[Reg]], list[Reg]]:
            def step(k: Reg, _: list[Reg]) -> list[Reg]:
                def panel(p: Reg, _: list[Reg]) -> list[Reg]:
                    for lane in range(0, width, self.lanes):
                        column = self._column(p, lane)
                        if lane and last is not None:
                            column = w.minimum(column, last)
                        places = [w.add(w.add(first, k), integer(n)) for n in range(count)]
                        index = [[*self.batch, place, column] for place in places]
                        vectors = [self.b.vector(e, i, self.axis, self.lanes) for i in index]
                        self._put(p, k, integer(lane), self._joined(vectors))
                    return []

                w.loop(integer(0), self.panels, 1, panel)
                return []

            return step

        def copy() -> None:
            whole = w.sub(depth, w.mod(depth, self.together))
            w.loop(integer(0), whole, self.together, steps(self.together))
            w.loop(whole, depth, 1, steps(1))

        bounds.either([*self.behind, w.add(first, depth), self._column(self.panels)], copy)

    def _copy_turned(self, first: Reg, depth: Reg) -> None:
        """Panels whose columns lie apart, with steps of K side by side."""
        w, e, width = self.w, self.e, self.cuts.width
        bounds = self._bounds(self.b, self.axis - 1)
        stop = [*self.behind, w.add(first, depth), self._stop]

        def turned(number: Reg, _: list[Reg]) -> list[Reg]:
            column = w.mul(number, integer(e.lanes))
            panel, lane = w.floordiv(column, integer(width)), w.mod(column, width)
            index = [*self.batch, first, w.add(self.column, column)]
            read_turned(
                *(e, self.b, index, (self.axis, self.axis - 1)),
                *((w.sub(self.columns, column), depth), self.depth),
                lambda write: bounds.either(stop, write),
                lambda k, vector: self._put(panel, k, lane, vector),
                self.together,
            )
            return []

        parts = w.floordiv(w.add(self.columns, integer(e.lanes - 1)), integer(e.lanes))
        w.loop(integer(0), parts, 1, turned)

    def _joined(self, vectors: Sequence[Reg]) -> Reg:
        """The vector that is placed for so many steps of K as are placed together, or fewer."""
        return vectors[0]

    def _bounds(self, operand: Tile, axis: int) -> Bounds:
        return Bounds(self.w, operand.accesses(range(self.axis + 1)), axis, self.e.lanes)

    def _put_row(self, i: Reg, k: Reg, vector: Reg) -> None:
        """Place elements of a copied row, from step ``k`` on."""
        w = self.w
        start = w.offset(self.left, w.mul(i, integer(_SIZE * self.depth)))
        w.store(vector, w.offset(start, w.mul(k, integer(_SIZE))), _SIZE)

    def _put(self, panel: Reg, k: Reg, lane: Reg, vector: Reg) -> None:
        """Place a vector of a panel's columns, of step ``k``."""
        w = self.w
        at = w.add(w.mul(panel, integer(self._panel)), w.mul(k, integer(self.cuts.width)))
        at = w.mul(w.add(at, lane), integer(_SIZE))
        w.store(vector, w.offset(self.right, at), _SIZE)

    # -- products ---------------------------------------------------------------------------------

    def _multiply(self, row: Reg, count: Reg, first: Reg, depth: Reg) -> None:
        """All panels, one after another, times the copied rows in register blocks."""
        w = self.w

        def panel(p: Reg, _: list[Reg]) -> list[Reg]:
            start = integer(0)
            for height in self.cuts.heights:
                if height > self.static[0]:
                    continue
                stop = w.sub(count, w.mod(w.sub(count, start), height))

                def block(i: Reg, _: list[Reg], height: int = height) -> list[Reg]:
                    self._block(row, i, height, p, depth)
                    return []

                w.loop(start, stop, height, block)
                start = stop
            column = self._column(p)
            stop = w.minimum(w.add(column, integer(self.cuts.width)), self._stop)
            self._end((row, column), (integer(0), count), stop)
            return []

        w.loop(integer(0), self.panels, 1, panel)

    def _block(self, row: Reg, i: Reg, height: int, panel: Reg, depth: Reg) -> None:
        w, e, width = self.w, self.e, self.cuts.width
        left = w.offset(self.left, w.mul(i, integer(_SIZE * self.pitch)))
        right = w.offset(self.right, w.mul(panel, integer(_SIZE * self._panel)))
        places = [
            [*self.batch, w.add(w.add(row, i), integer(r)), self._column(panel, lane)]
            for r in range(height)
            for lane in range(0, width, e.lanes)
        ]
        nothing = zero(self.c.stored, e.lanes)
        initial = w.choose(
            self.begins,
            lambda: [nothing] * len(places),
            lambda: [self.c.vector(e, p, self.axis, e.lanes) for p in places],
        )
        element = "float" if self.c.stored.is_float else "i32"

        def step(k: Reg, totals: list[Reg]) -> list[Reg]:
            at = w.offset(right, w.mul(k, integer(_SIZE * width)))
            columns = [
                w.load(vector_type(element, e.lanes), w.offset(at, integer(_SIZE * lane)), _SIZE)
                for lane in range(0, width, e.lanes)
            ]
            near = w.offset(left, w.mul(k, integer(_SIZE)))
            found: list[Reg] = []
            for r in range(height):
                one = w.load(element, w.offset(near, integer(_SIZE * self.pitch * r)), _SIZE)
                spread = w.splat(one, e.lanes)
                for vector in columns:
                    found.append(multiply_add(e, spread, vector, totals[len(found)]))
            return found

        totals = w.loop(integer(0), depth, 1, step, initial)

        def ends() -> None:
            for number, total in enumerate(totals):
                r, part = divmod(number, width // e.lanes)
                place = [w.add(i, integer(r)), integer(part * e.lanes)]
                self.sums.put(e, total, place, 1)

        def goes_on() -> None:
            for place, total in zip(places, totals, strict=True):
                self.c.put(e, total, place, self.axis)

        w.when(self.ends, ends, goes_on)
