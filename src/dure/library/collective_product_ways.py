"""Ways to a product whose sums devices add up: what is launched, and which ways are worth building.

- *all*: each device's product goes to all of them, and each adds up everything: one latency;
- *parts*: the columns of the product go to the device that adds them up, which gives its sums to
  all: the fewest bytes of a device.  In ``pieces`` of rows, sums of one are given beside the
  product of the next;
- *lines*: in a square grid of devices, along one axis after the other: the fewest bytes of a link.

What a way takes at least follows from the chip's peaks and links; those that are far behind by that
aren't built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dure.compiler.chip.estimate import Links
from dure.ir.dtypes import DType
from dure.ir.types import TensorType
from dure.library import collective_kernels as sums
from dure.library import collective_lines as lines
from dure.library import collective_products as products
from dure.library.answer import peak
from dure.library.call import KernelCall, TileKernel, tensor
from dure.library.collectives import Stage, Way, whole_bytes
from dure.library.operators_common import power_of_two, tile
from dure.machine.group import Group
from dure.sim.cost import duration

#: Pieces that rows are cut in: more of them read the weights as often, and hide little more.
_PIECES = (2, 4)
#: What stands for the ways that aren't a number of pieces.
_ALL, _LINES = 0, -1
#: Elements of a piece's result that a core has at least: with smaller tiles it loads too much.
_TILE = 256 * 256
#: What pieces take longer, of the product: their tiles don't fit as well.
_EACH = 0.05
#: Rows from which on more than one way is tried.
_ROWS = 128
#: Depth of a tile of weights with which a search starts: at most this, and in multiples of these.
_DEPTH, _LANES = 3072, 128
#: Columns with which one starts that makes products of two halves in turn: rows load for each.
_WIDTH = 1280
#: By how much what a way takes at least may exceed what the best one does.
_WORSE = 1.08


def _part(depth: int, most: int = _DEPTH) -> int:
    """A large size that tiles so many rows of weights evenly, where there is one."""
    even = [size for size in range(_LANES, most + 1, _LANES) if depth % size == 0]
    return max(even, default=tile(depth, _LANES))


_LINE_KERNELS = (
    lines.matmul_give_lines,
    lines.add_and_give_across,
    lines.add_and_give_line,
    lines.give_lines,
)


@dataclass(frozen=True)
class SummedProduct:
    """A product of ``rows`` x ``depth`` with ``depth`` x ``columns``, plus a bias where there is a
    type of it; ``residual`` says that something is added to the sum of all devices' products.
    """

    rows: int
    depth: int
    columns: int
    dtype: DType
    weight: DType
    bias: DType | None = None
    residual: bool = False

    def ways(self, group: Group) -> tuple[Way, ...]:
        """The ways to it that may be the fastest, by the names ``x``, ``w``, ``bias``, ``residual``
        and ``y``.
        """
        made = _Stages(self, group)
        return tuple(way for pieces in self.worth(group) for way in made.ways(pieces))

    def worth(self, group: Group) -> tuple[int, ...]:
        """The numbers of pieces that may be the fastest; 0 stands for everything to all, -1 for
        one axis after the other.
        """
        law = _Law(self, group)
        takes = {_ALL: law.all_takes()}
        if self.columns % group.count == 0:
            takes[1] = law.parts_take(1)
        for pieces in _PIECES:
            if 1 in takes and self._goes_in_pieces(group, pieces):
                takes[pieces] = law.parts_take(pieces) + _EACH * law.product()
        if 2 in takes and _side(group):
            takes[_LINES] = law.lines_take() + _EACH * law.product()
        best = min(takes, key=takes.__getitem__)
        if self.rows < _ROWS:
            return (best,)
        if best == _LINES:
            # Twice as many launches, each of which fills its pipeline first: by how much, is seen.
            return (_LINES, 1)
        rivals = _PIECES if best in _PIECES else (_ALL, 1)
        return tuple(p for p in rivals if p in takes and takes[p] <= _WORSE * takes[best])

    def _goes_in_pieces(self, group: Group, pieces: int) -> bool:
        """Whether a piece is enough for all cores."""
        part = self.rows // pieces * (self.columns // group.count)
        return self.rows % pieces == 0 and part >= _TILE * group.chip.cores.base


def _side(group: Group) -> int:
    """Devices along each axis of a square grid; 0 where they aren't one."""
    depth, rows, columns = group.shape
    return rows if depth == 1 < rows == columns else 0


@dataclass(frozen=True)
class _Law:
    """What ways take at least, in seconds."""

    what: SummedProduct
    group: Group

    @property
    def bytes(self) -> float:
        """Of the product."""
        return self.what.rows * self.what.columns * self.what.dtype.bits / 8

    def product(self, pieces: int = 1) -> float:
        """The product, with its weights read for each piece."""
        what, chip = self.what, self.group.chip
        computed = 2 * what.rows * what.depth * what.columns / peak(chip, what.dtype.name)
        read = pieces * what.depth * what.columns * what.weight.bits / 8
        return max(computed, read / chip.peaks.bandwidth.base)

    def all_takes(self) -> float:
        """Everything to all."""
        links, count = Links(self.group), self.group.count
        sent = count * self.bytes * links.seconds_a_byte
        added = (count + 2) * self.bytes / self.group.chip.peaks.bandwidth.base
        return max(self.product(), sent) + added + links.latency / 1e12

    def parts_take(self, pieces: int) -> float:
        """To each its part, of so many pieces one after another."""
        links = Links(self.group)
        sent = self.bytes * links.seconds_a_byte / pieces
        own = self.product(pieces) / pieces
        taken = max(own, sent) + (pieces - 1) * max(own, 2 * sent) + sent
        signal = duration(self.group.chip, self.group.chip.sync.latency)
        return taken + (pieces + 1) * (links.latency + signal) / 1e12

    def lines_take(self) -> float:
        """Half along each axis of a square grid, then along the other, and back."""
        chip, side = self.group.chip, _side(self.group)
        line = Links(Group(chip, side, self.group.name, (1, 1, side)))
        first = self.bytes / 2 * line.seconds_a_byte
        signal = duration(chip, chip.sync.latency)
        taken = max(self.product(2), first) + 2 * first / side + first
        return taken + 4 * (line.latency + signal) / 1e12


@dataclass(frozen=True)
class _Stages:
    """The launches of a product on known devices."""

    what: SummedProduct
    group: Group

    def type(self, *shape: int, dtype: DType | None = None) -> TensorType:
        return tensor(dtype or self.what.dtype, self.group.count, *shape)

    def ways(self, pieces: int) -> tuple[Way, ...]:
        """In so many pieces, everything to all, or one axis after the other."""
        if pieces == _LINES:
            return (tuple(self.lines()),)
        return (tuple(self.parts(pieces)),) if pieces else self.all()

    def all(self) -> tuple[Way, ...]:
        """Everything to all of them, which add it up one by one, or at once."""
        what, count = self.what, self.group.count
        biases = None if what.bias is None else self.type(1, what.columns, dtype=what.bias)
        given = self.stage(
            products.matmul_give_all,
            x=self.type(1, what.rows, what.depth),
            w=self.type(1, what.depth, what.columns, dtype=what.weight),
            bias=biases,
            parts=self.type(count, what.rows, what.columns),
        )
        whole = whole_bytes(what.rows * what.columns)
        one, everything = self.type(*whole), self.type(count, *whole)
        residual = one if what.residual else None
        return tuple(
            (given, self.stage(kernel, parts=everything, residual=residual, y=one))
            for kernel in (sums.add_parts, sums.add_at_once)
        )

    def parts(self, pieces: int) -> Iterator[Stage]:
        """Each gets its part of the columns, of so many pieces of the rows one after another."""
        given: dict[str, TensorType | None] = {}
        for piece in range(pieces):
            made = self.product(pieces, f"parts{piece % 2}")
            kernel = products.matmul_give_parts_and_sums if given else products.matmul_give_parts
            yield self.stage(kernel, (piece, pieces), **made, **given)
            given = self.sums(pieces, f"parts{piece % 2}")
        yield self.stage(products.add_and_give_columns, (pieces, pieces), **given)

    def lines(self) -> Iterator[Stage]:
        """Along one axis of a square grid, then along the other; and back."""
        what, side = self.what, _side(self.group)
        rows, own = what.rows // 2, what.columns // side
        part = own // side
        bias = None if what.bias is None else self.type(1, side, own, dtype=what.bias)
        yield self.stage(
            lines.matmul_give_lines,
            x=self.type(2, rows, what.depth),
            w=self.type(1, what.depth, side, own, dtype=what.weight),
            bias=bias,
            parts=self.type(2, side, rows, own),
        )
        parts = self.type(2, side, rows, side, part)
        across = self.type(2, side, rows, part)
        yield self.stage(lines.add_and_give_across, parts=parts, across=across)
        whole = self.type(2, rows, side, side, part)
        yield self.stage(
            lines.add_and_give_line,
            across=across,
            residual=whole if what.residual else None,
            line=self.type(2, rows, side, part),
        )
        line = self.type(2, rows, own)
        yield self.stage(lines.give_lines, line=line, y=self.type(2, rows, side, own))

    def product(self, pieces: int, parts: str) -> dict[str, TensorType | None]:
        """What a piece of the product takes."""
        what, count = self.what, self.group.count
        rows, own = what.rows // pieces, what.columns // count
        return {
            "x": self.type(1, rows, what.depth),
            "w": self.type(1, what.depth, count, own, dtype=what.weight),
            "bias": None if what.bias is None else self.type(1, count, own, dtype=what.bias),
            parts: self.type(count, rows, own),
        }

    def sums(self, pieces: int, parts: str) -> dict[str, TensorType | None]:
        """What the sums of a piece take."""
        what, count = self.what, self.group.count
        rows, own = what.rows // pieces, what.columns // count
        piece = self.type(1, rows, count, own)
        residual = piece if what.residual else None
        return {parts: self.type(count, rows, own), "residual": residual, "y": piece}

    def stage(
        self, kernel: TileKernel, piece: tuple[int, int] = (0, 1), **arguments: TensorType | None
    ) -> Stage:
        """A launch on named arguments."""
        adds = kernel in (sums.add_parts, sums.add_at_once)
        between = [n for n in ("across", "line", "parts", "parts0", "parts1") if n in arguments]
        last = arguments["parts" if adds else between[0]]
        assert last is not None
        m, n = (int(str(extent)) for extent in last.shape[-2:])
        tiles = {"bm": tile(m, 16), "bn": tile(n, 256)}
        if "w" in arguments:
            tiles = {"bm": tile(m), "bn": tile(n), "bk": tile(self.what.depth)}
            if m >= _ROWS:
                # Tiles of the result that are on their way over a link for a short time.
                tiles = {"bm": tile(m, 2048), "bn": tile(n, 512), "bk": _part(self.what.depth)}
                if kernel is lines.matmul_give_lines:
                    tiles["bn"] = _part(n, _WIDTH)
        consts: dict[str, object] = {} if adds else {"shape": self.group.shape}
        if kernel in _LINE_KERNELS:
            consts = {"side": _side(self.group)}
        if kernel is sums.add_at_once:
            consts["bd"] = power_of_two(self.group.count)
        call = KernelCall(
            kernel, tuple(arguments.values()), consts, tiles, devices=self.group.count
        )
        return Stage(call, tuple(arguments), piece)
