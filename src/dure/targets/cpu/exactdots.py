"""The exact sum of one chunk's products, by what the machine multiplies at once.

Codes come as i32 lanes of four consecutive k (a group), activations as bytes along K: 8-bit codes,
or the low and the high bytes of 16-bit ones.  Whatever the way, the sum is that of whole numbers
in int32, so that all give the same bits.

* :class:`Bytes`: four products of bytes and their sum are one instruction (``vpdpbusd`` of
  unsigned and signed ones, ``sdot`` of signed ones).
* :class:`Shorts`: products of bytes are added in 16 bits, as many as can't overflow there, before
  their sum goes to 32 bits: two at once (``pmaddubsw``, for codes of up to seven bits) in
  :class:`Pairs`, one (``smull``) in :class:`Singles`.
* :class:`Words`: two products of 16-bit numbers are added in 32 (``pmaddwd``).  The activations are
  widened once for all columns, the even and the odd k of a group apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from dure.ir.dtypes import BlockFormat
from dure.targets.cpu.instructions import Operation, has, intrinsic
from dure.targets.cpu.packing import CHUNK, GROUP
from dure.targets.cpu.values import Emitter
from dure.targets.cpu.writer import Reg, integer, vector_type

if TYPE_CHECKING:
    from dure.targets.cpu.blockdots import ActivationRows

#: The codes of a group of a panel, by the numbers of both.
Codes: TypeAlias = Callable[[int, int], Reg]

#: The largest magnitude of a signed byte, and of what 16 bits hold.
_BYTE, _SHORT = 128, 32767
#: Bytes of a chunk's widened activations: even k, then odd k.
_WIDENED = 2 * CHUNK
#: Groups that are widened at once.
_GROUPS = CHUNK // GROUP


@dataclass(frozen=True)
class Products:
    """The groups of a chunk whose codes and activations are multiplied, for some rows."""

    codes: Codes
    rows: Sequence[Reg]
    chunk: Reg
    groups: range


class ExactDot(Protocol):
    """A way to add the products of some groups."""

    #: Whether it takes signed codes as they are; else they are moved up to unsigned ones.
    signed: bool

    def add(self, e: Emitter, totals: Sequence[Reg], products: Products) -> list[Reg]:
        """``totals`` (row-major over rows and panels) with the products added."""
        ...


def exact_dot(
    e: Emitter,
    a: ActivationRows,
    weights: BlockFormat,
    rows: tuple[Reg, int],
    chunks: tuple[Reg, int],
) -> ExactDot:
    """The fastest way for these activations and weights.

    ``rows`` and ``chunks`` are how many are used, and at most; what is prepared for all columns is
    written here.
    """
    for operation, signed in ((Operation.FOUR_BYTES, False), (Operation.FOUR_SIGNED_BYTES, True)):
        if has(e.host, operation):
            return Bytes(a, signed, intrinsic(e.host, operation))
    planes = weights.groups["code"]
    unsigned = planes[0].dtype.kind != "int"
    highest = (1 << sum(plane.dtype.bits for plane in planes)) - 1 if unsigned else _BYTE
    if has(e.host, Operation.NEIGHBOURING_SHORTS):
        return Singles(a, _SHORT // (_BYTE * highest))
    if unsigned and has(e.host, Operation.PAIRS_OF_BYTES) and 2 * _BYTE * highest <= _SHORT:
        return Pairs(a, _SHORT // (2 * _BYTE * highest))
    return Words(e, a, not unsigned, rows, chunks)


class Bytes:
    """Four products of bytes at once; all are ``signed``, or the codes are unsigned."""

    def __init__(self, a: ActivationRows, signed: bool, instruction: str) -> None:
        self._a, self.signed, self._instruction = a, signed, instruction

    def add(self, e: Emitter, totals: Sequence[Reg], products: Products) -> list[Reg]:
        """See :class:`ExactDot`."""
        w, panels, chunk = e.w, len(totals) // len(products.rows), products.chunk
        lows = list(totals)
        highs = [Reg(t.type, "zeroinitializer") for t in totals]
        for group in products.groups:
            for i, row in enumerate(products.rows):
                spread = self._a.spread(e, "code", row, chunk, group)
                upper = self._a.high and self._a.spread(e, self._a.high, row, chunk, group)
                for j in range(panels):
                    slot, code = i * panels + j, products.codes(j, group)
                    lows[slot] = self._four(e, lows[slot], code, spread)
                    if upper:
                        highs[slot] = self._four(e, highs[slot], code, upper)
        if self._a.high is None:
            return lows
        eight = w.constant("i32", 8, e.lanes)
        return [
            w.binary("add", low, w.binary("shl", high, eight))
            for low, high in zip(lows, highs, strict=True)
        ]

    def _four(self, e: Emitter, total: Reg, codes: Reg, activations: Reg) -> Reg:
        """``total`` plus, in each i32 lane, the four products of bytes."""
        left, right = _bytes(e, codes), _bytes(e, activations)
        return e.w.call(total.type, self._instruction, total, left, right)


class Shorts(ABC):
    """Products of bytes in 16 bits, of ``together`` groups before they go to 32."""

    signed: bool

    def __init__(self, a: ActivationRows, together: int) -> None:
        self._a, self._together = a, together

    @abstractmethod
    def _products(self, e: Emitter, codes: Reg, activations: Reg) -> Reg:
        """The products of a group, as i16 lanes."""

    @abstractmethod
    def _plus(self, e: Emitter, total: Reg, sums: Reg, factor: int) -> Reg:
        """``total`` plus ``factor`` times the i16 lanes that belong to each of its lanes."""

    def add(self, e: Emitter, totals: Sequence[Reg], products: Products) -> list[Reg]:
        """See :class:`ExactDot`."""
        found, groups = list(totals), products.groups
        panels = len(totals) // len(products.rows)
        for first in range(groups.start, groups.stop, self._together):
            some = replace(products, groups=range(first, min(groups.stop, first + self._together)))
            for i, row in enumerate(products.rows):
                for j in range(panels):
                    slot = i * panels + j
                    for plane, factor in (("code", 1), (self._a.high, 256)):
                        if plane is not None:
                            sums = self._sums(e, some, j, plane, row)
                            found[slot] = self._plus(e, found[slot], sums, factor)
        return found

    def _sums(self, e: Emitter, products: Products, panel: int, plane: str, row: Reg) -> Reg:
        total: Reg | None = None
        for group in products.groups:
            activations = self._a.spread(e, plane, row, products.chunk, group)
            one = self._products(e, products.codes(panel, group), activations)
            total = one if total is None else e.w.binary("add", total, one)
        assert total is not None
        return total


class Pairs(Shorts):
    """Two products at once, of unsigned codes."""

    signed = False

    def _products(self, e: Emitter, codes: Reg, activations: Reg) -> Reg:
        name = intrinsic(e.host, Operation.PAIRS_OF_BYTES)
        kind = vector_type("i16", 2 * e.lanes)
        return e.w.call(kind, name, _bytes(e, codes), _bytes(e, activations))

    def _plus(self, e: Emitter, total: Reg, sums: Reg, factor: int) -> Reg:
        factors = e.w.constant("i16", factor, 2 * e.lanes)
        return e.w.binary("add", total, sums_of_pairs(e, sums, factors))


class Singles(Shorts):
    """One product a lane, of codes that are signed, or have at most seven bits."""

    signed = True

    def _products(self, e: Emitter, codes: Reg, activations: Reg) -> Reg:
        kind = vector_type("i16", 4 * e.lanes)
        wide = [e.w.cast("sext", _bytes(e, value), kind) for value in (codes, activations)]
        return e.w.binary("mul", *wide)

    def _plus(self, e: Emitter, total: Reg, sums: Reg, factor: int) -> Reg:
        w, count = e.w, 2 * e.lanes
        name = intrinsic(e.host, Operation.NEIGHBOURING_SHORTS)
        halves = [w.shuffle(sums, range(first, first + count)) for first in (0, count)]
        pairs = [w.call(total.type, name, half) for half in halves]
        fours = w.call(total.type, intrinsic(e.host, Operation.NEIGHBOURING_WORDS), *pairs)
        return w.binary("add", total, w.binary("mul", fours, w.constant("i32", factor, e.lanes)))


class Words:
    """Two products of 16-bit numbers at once."""

    def __init__(
        self,
        e: Emitter,
        a: ActivationRows,
        signed: bool,
        rows: tuple[Reg, int],
        chunks: tuple[Reg, int],
    ) -> None:
        self.signed = signed
        self._stride = chunks[1] * _WIDENED
        self._base = e.allocate(rows[1] * self._stride)
        self._widen(e, a, rows[0], chunks[0])

    def _widen(self, e: Emitter, a: ActivationRows, rows: Reg, chunks: Reg) -> None:
        w, shorts = e.w, vector_type("i16", 2 * _GROUPS)
        eight = w.constant("i16", 8, 2 * _GROUPS)

        def loaded(plane: str, row: Reg, chunk: Reg) -> Reg:
            return w.load(shorts, a.address(e, plane, row, w.mul(chunk, integer(CHUNK))))

        def chunk(row: Reg, number: Reg) -> None:
            low = loaded("code", row, number)
            even = w.binary("ashr", w.binary("shl", low, eight), eight)
            odd = w.binary("ashr", low, eight)
            if a.high is not None:
                high = loaded(a.high, row, number)
                even = w.binary("add", even, w.binary("shl", high, eight))
                top = w.constant("i16", -256, 2 * _GROUPS)
                odd = w.binary("add", odd, w.binary("and", high, top))
            at = self._at(e, row, number)
            w.store(even, at)
            w.store(odd, w.offset(at, integer(CHUNK)))

        def each(row: Reg, _: list[Reg]) -> list[Reg]:
            def inner(number: Reg, _: list[Reg]) -> list[Reg]:
                chunk(row, number)
                return []

            w.loop(integer(0), chunks, 1, inner)
            return []

        w.loop(integer(0), rows, 1, each)

    def _at(self, e: Emitter, row: Reg, chunk: Reg) -> Reg:
        w = e.w
        place = w.add(w.mul(row, integer(self._stride)), w.mul(chunk, integer(_WIDENED)))
        return w.offset(self._base, place)

    def add(self, e: Emitter, totals: Sequence[Reg], products: Products) -> list[Reg]:
        """See :class:`ExactDot`."""
        w, shorts = e.w, vector_type("i16", 2 * e.lanes)
        found, panels = list(totals), len(totals) // len(products.rows)
        bases = [self._at(e, row, products.chunk) for row in products.rows]
        for group in products.groups:
            halves = [self._halves(e, products.codes(j, group)) for j in range(panels)]
            for i, base in enumerate(bases):
                for half in range(2):
                    place = w.offset(base, integer(half * CHUNK + group * GROUP))
                    spread = w.cast("bitcast", w.splat(w.load("i32", place, 4), e.lanes), shorts)
                    for j in range(panels):
                        slot = i * panels + j
                        pairs = sums_of_pairs(e, halves[j][half], spread)
                        found[slot] = w.binary("add", found[slot], pairs)
        return found

    def _halves(self, e: Emitter, codes: Reg) -> tuple[Reg, Reg]:
        """The even and the odd codes of each lane, in 16 bits."""
        w = e.w
        shorts = w.cast("bitcast", codes, vector_type("i16", 2 * e.lanes))
        eight = w.constant("i16", 8, 2 * e.lanes)
        if self.signed:
            return (
                w.binary("ashr", w.binary("shl", shorts, eight), eight),
                w.binary("ashr", shorts, eight),
            )
        low = w.constant("i16", 255, 2 * e.lanes)
        return w.binary("and", shorts, low), w.binary("lshr", shorts, eight)


def _bytes(e: Emitter, words: Reg) -> Reg:
    """The bytes of i32 lanes."""
    return e.w.cast("bitcast", words, vector_type("i8", 4 * e.lanes))


def sums_of_pairs(e: Emitter, left: Reg, right: Reg) -> Reg:
    """In each i32 lane the sum of two products of i16 lanes."""
    kind = vector_type("i32", e.lanes)
    return e.w.call(kind, intrinsic(e.host, Operation.PAIRS_OF_SHORTS), left, right)
