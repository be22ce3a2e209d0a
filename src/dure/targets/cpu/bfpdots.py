"""Dots of block floating point and weights of four bits, which are rounded to it as they are read.

What a weight is rounded to is :func:`dure.ir.blocks.rounded`'s: its code times a step, to the
nearest whole number, plus where the block's codes start.  Both follow from the file's scales and
offsets, for all lanes of a panel (:mod:`dure.targets.cpu.packing`) at once.  Products of two 16-bit
numbers are added in 32 bits, so that a block's sum is exact, and its product with both powers of
two, too; adding it rounds once.  That is what a machine's tile registers give
(:mod:`dure.targets.cpu.bfptiles`), whose sums of a block are exact in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dure.ir import dtypes
from dure.ir.blocks import BFP_MARGIN, BFP_SMALLEST_WEIGHT, BFP_STEP_BITS
from dure.ir.dtypes import Plane
from dure.targets.cpu.blockdots import ActivationRows, Panels
from dure.targets.cpu.exactdots import sums_of_pairs
from dure.targets.cpu.instructions import Operation, has, intrinsic
from dure.targets.cpu.memory import Extent, fetch
from dure.targets.cpu.packing import CHUNK
from dure.targets.cpu.values import BlockTile, Emitter
from dure.targets.cpu.writer import Reg, integer, lanes_of, vector_type

#: Neighbouring k that a lane multiplies at once, and how many such pairs a chunk has.
PAIR = 2
PAIRS = CHUNK // PAIR
#: Sums that are under way at a time, at least.
_CHAINS = 4
#: Where a code stands when it is multiplied: a product's upper half is rounded.
_CODE_AT = 8
#: Bits of float32's exponent, and where they begin.
_EXPONENT, _EXPONENT_AT = 0x7F800000, 23


@dataclass(frozen=True)
class Rounding:
    """How a chunk's codes become whole numbers, for each lane of a panel.

    ``step`` is twice the same i16 number in each lane, or None where the codes are whole numbers
    already; ``start`` is i32, ``power`` float32.
    """

    power: Reg
    step: Reg | None = None
    start: Reg | None = None


class RoundedWeights(Protocol):
    """Panels of weights, a chunk of which is read as whole numbers times a power of two."""

    @property
    def length(self) -> int:
        """The K of a whole row."""
        ...

    def panel(self, e: Emitter, column: Reg) -> Reg:
        """The address of the panel of this column."""
        ...

    def chunk(self, e: Emitter, panel: Reg, chunk: Reg) -> Reg:
        """The address of a chunk of 32 k, or of the block that holds it."""
        ...

    @property
    def chunk_bytes(self) -> int:
        """Bytes from a chunk to the next, on average."""
        ...

    def rounding(self, e: Emitter, at: Reg, chunk: Reg) -> Rounding:
        """What all codes of the chunk at an address have in common."""
        ...

    def pairs(self, e: Emitter, at: Reg, chunk: Reg, rounding: Rounding, number: int) -> Reg:
        """Two neighbouring k of each lane, as i16 numbers without the start."""
        ...


class PackedWeights:
    """Panels as a weight lies in memory."""

    def __init__(self, panels: Panels) -> None:
        self._panels = panels
        self._plane: Plane = panels.format.groups["code"][0]

    @property
    def length(self) -> int:
        """See :class:`RoundedWeights`."""
        return self._panels.length

    @property
    def chunk_bytes(self) -> int:
        """See :class:`RoundedWeights`."""
        return self._panels.block_bytes // self._panels.chunks

    def panel(self, e: Emitter, column: Reg) -> Reg:
        """See :class:`RoundedWeights`."""
        return self._panels.panel(e, column)

    def chunk(self, e: Emitter, panel: Reg, chunk: Reg) -> Reg:
        """See :class:`RoundedWeights`."""
        return self._panels.block(e, panel, e.w.floordiv(chunk, integer(self._panels.chunks)))

    def rounding(self, e: Emitter, at: Reg, chunk: Reg) -> Rounding:
        """See :class:`RoundedWeights`."""
        panels, inside = self._panels, e.w.mod(chunk, self._panels.chunks)
        scale = panels.factor(e, "scale", at, inside, 0)
        assert scale is not None
        offset = panels.factor(e, "offset", at, inside, 0)
        return rounding(e, scale, lowest(e, panels.format, scale, offset))

    def pairs(self, e: Emitter, at: Reg, chunk: Reg, rounding: Rounding, number: int) -> Reg:
        """See :class:`RoundedWeights`."""
        w, bits = e.w, self._plane.dtype.bits
        vector, position = divmod(number, 16 // bits)
        start = self._panels.bytes_at(e, self._plane, at, w.mod(chunk, self._panels.chunks))
        kind = vector_type("i16", PAIR * e.lanes)
        shift = _CODE_AT - position * bits
        # A byte in front of it, words hold their lower bytes as the upper ones.
        back, shift = (1, 0) if shift == 8 else (0, shift)
        words = w.load(kind, w.offset(start, integer(vector * e.lanes * 4 - back)))
        if shift:
            by = w.constant("i16", abs(shift), PAIR * e.lanes)
            words = w.binary("shl" if shift > 0 else "lshr", words, by)
        mask = ((1 << bits) - 1) << _CODE_AT
        codes = w.binary("and", words, w.constant("i16", mask, PAIR * e.lanes))
        assert rounding.step is not None
        return _rounded_product(e, codes, rounding.step)


class CopiedWeights:
    """Panels of whole numbers in the arena, a chunk's powers of two in front of them."""

    def __init__(self, e: Emitter, columns: int, length: int) -> None:
        self.length, self._lanes = length, e.lanes
        self._panel_bytes = length // CHUNK * self.chunk_bytes
        self.base = e.allocate(-(-columns // e.lanes) * self._panel_bytes)

    @property
    def chunk_bytes(self) -> int:
        """See :class:`RoundedWeights`."""
        return self._lanes * 4 * (1 + PAIRS)

    def panel(self, e: Emitter, column: Reg) -> Reg:
        """See :class:`RoundedWeights`."""
        number = e.w.floordiv(column, integer(e.lanes))
        return e.w.offset(self.base, e.w.mul(number, integer(self._panel_bytes)))

    def chunk(self, e: Emitter, panel: Reg, chunk: Reg) -> Reg:
        """See :class:`RoundedWeights`."""
        return e.w.offset(panel, e.w.mul(chunk, integer(self.chunk_bytes)))

    def rounding(self, e: Emitter, at: Reg, chunk: Reg) -> Rounding:
        """See :class:`RoundedWeights`."""
        return Rounding(e.w.load(vector_type("float", e.lanes), at))

    def pairs(self, e: Emitter, at: Reg, chunk: Reg, rounding: Rounding, number: int) -> Reg:
        """See :class:`RoundedWeights`."""
        place = e.w.offset(at, integer((1 + number) * e.lanes * 4))
        return e.w.load(vector_type("i16", PAIR * e.lanes), place)


def copy_rounded(e: Emitter, tile: BlockTile, columns: Extent, length: int) -> CopiedWeights:
    """Copy the used columns of a (K, N) tile of any layout, rounded; what lies behind them is
    undefined.
    """
    w, codes, found = e.w, tile.format.groups["code"], CopiedWeights(e, columns.static, length)

    def column(n: Reg, _: list[Reg]) -> list[Reg]:
        panel = found.panel(e, n)
        lane = w.mul(w.mod(n, e.lanes), integer(4))

        def chunk(place: Reg, _: list[Reg]) -> list[Reg]:
            first = w.mul(place, integer(CHUNK))
            scale = tile.product(e, "scale", [first, n], 0, 1)
            assert scale is not None
            offset = tile.product(e, "offset", [first, n], 0, 1)
            common = rounding(e, scale, lowest(e, tile.format, scale, offset))
            assert common.step is not None and common.start is not None
            step, start = w.lane(common.step, 0), w.cast("trunc", common.start, "i16")
            at = w.offset(found.chunk(e, panel, place), lane)
            w.store(common.power, at, 4)

            def code(k: Reg, _: list[Reg]) -> list[Reg]:
                number = w.cast("trunc", tile.number(e, codes, [w.add(first, k), n], 0, 1), "i16")
                moved = w.binary("shl", number, Reg("i16", str(_CODE_AT)))
                whole = w.binary("add", _rounded_product(e, moved, step), start)
                pair, side = w.floordiv(k, integer(PAIR)), w.mod(k, PAIR)
                row = w.mul(w.add(pair, integer(1)), integer(e.lanes * 4))
                w.store(whole, w.offset(at, w.add(row, w.mul(side, integer(2)))), 2)
                return []

            return w.loop(integer(0), integer(CHUNK), 1, code)

        return w.loop(integer(0), integer(length // CHUNK), 1, chunk)

    w.loop(integer(0), w.index(columns.bound), 1, column)
    return found


def lowest(e: Emitter, format: dtypes.BlockFormat, scale: Reg, offset: Reg | None) -> Reg:
    """The weight whose code is 0."""
    if offset is None:
        return e.math.mul(scale, e.math.constant(scale, float(-format.zero)))
    assert not format.zero, f"{format} has a zero and offsets"
    return offset if format.offset_sign > 0 else e.w.emit(offset.type, f"fneg {offset}")


def rounding(e: Emitter, scale: Reg, low: Reg) -> Rounding:
    """From the scale of each lane's chunk, and the weight whose code is 0; one lane or many."""
    w, math = e.w, e.math
    lanes = lanes_of(scale.type)
    # The product is exact, so that fused or not is the same.
    high = math.fma(scale, math.constant(scale, 15.0), low)
    # Magnitudes are in the order of their bits.
    ends = [math.bits(math.absolute(end)) for end in (low, high)]
    largest = w.select(w.compare("icmp sgt", *ends), *ends)
    raised = w.binary("add", largest, w.constant("i32", BFP_MARGIN, lanes))
    exponent = w.binary("and", raised, w.constant("i32", _EXPONENT, lanes))
    least = math.bits(math.constant(scale, BFP_SMALLEST_WEIGHT))
    exponent = w.select(w.compare("icmp sgt", exponent, least), exponent, least)
    seven = w.constant("i32", 7 << _EXPONENT_AT, lanes)
    bits = w.binary("sub", exponent, seven)
    inverse = w.binary("sub", w.constant("i32", 254 << _EXPONENT_AT, lanes), bits)
    raised = w.binary("add", inverse, w.constant("i32", BFP_STEP_BITS << _EXPONENT_AT, lanes))
    step = math.nearest(math.mul(scale, w.cast("bitcast", raised, scale.type)))
    start = math.nearest(math.mul(low, w.cast("bitcast", inverse, scale.type)))
    # Infinity and NaN make NaN of every sum; one of the scale or the offset is one of the highest.
    power = math.fma(high, math.constant(scale, 0.0), w.cast("bitcast", bits, scale.type))
    return Rounding(power, _twice(e, step), start)


def add_chunks(
    e: Emitter,
    a: ActivationRows,
    rows: Sequence[Reg],
    weights: RoundedWeights,
    panel: Reg,
    chunks: tuple[Reg, Reg],
    totals: Sequence[Reg],
    ahead: int = 0,
) -> list[Reg]:
    """Add chunks of a panel to ``totals``, one of each row, in order.

    ``ahead``: how many bytes ahead of its use the panel is asked for.
    """
    w = e.w

    def step(chunk: Reg, running: list[Reg]) -> list[Reg]:
        if ahead:
            bytes_ = weights.chunk_bytes
            fetch(w, w.offset(panel, w.mul(chunk, integer(bytes_))), ahead, bytes_)
        at = weights.chunk(e, panel, chunk)
        found = weights.rounding(e, at, chunk)
        exact = _exact(e, a, rows, weights, at, chunk, found)
        scales = [w.load("float", a.address(e, "d", row, chunk), 4) for row in rows]
        for i, (value, scale) in enumerate(zip(exact, scales, strict=True)):
            power = w.binary("fmul", found.power, w.splat(scale, e.lanes))
            number = w.cast("sitofp", value, power.type)
            running[i] = e.math.fma(number, power, running[i])
        return running

    return w.loop(*chunks, 1, step, totals)


def _exact(
    e: Emitter,
    a: ActivationRows,
    rows: Sequence[Reg],
    weights: RoundedWeights,
    at: Reg,
    chunk: Reg,
    found: Rounding,
) -> list[Reg]:
    """The sums of a chunk's products in int32, of each row."""
    w = e.w
    # A row's sums wait for each other: few rows have several chains of them.
    chains = max(1, _CHAINS // len(rows))
    nothing = Reg(vector_type("i32", e.lanes), "zeroinitializer")
    totals = [w.load("i32", a.address(e, "sum", row, chunk), 4) for row in rows]
    sums = [[_starts(e, found, total), *[nothing] * (chains - 1)] for total in totals]
    for number in range(PAIRS):
        pair = weights.pairs(e, at, chunk, found, number)
        for row, parts in zip(rows, sums, strict=True):
            k = w.add(w.mul(chunk, integer(CHUNK)), integer(number * PAIR))
            spread = w.splat(w.load("i32", a.address(e, "code", row, k), 4), e.lanes)
            parts[number % chains] = add_pairs(e, parts[number % chains], pair, spread)
    return [functools.reduce(functools.partial(w.binary, "add"), parts) for parts in sums]


def _starts(e: Emitter, found: Rounding, total: Reg) -> Reg:
    """What the starts of a chunk's weights add: each times the sum of a row's codes."""
    nothing = Reg(vector_type("i32", e.lanes), "zeroinitializer")
    if found.start is None:
        return nothing
    lower = e.w.binary("and", found.start, e.w.constant("i32", 0xFFFF, e.lanes))
    halves = e.w.cast("bitcast", lower, vector_type("i16", PAIR * e.lanes))
    return add_pairs(e, nothing, halves, e.w.splat(total, e.lanes))


def add_pairs(e: Emitter, total: Reg, words: Reg, spread: Reg) -> Reg:
    """``total`` plus, in each i32 lane, the sum of its two products of 16-bit numbers."""
    w, kind, halves = e.w, total.type, e.w.cast("bitcast", spread, words.type)
    if has(e.host, Operation.ADDED_PAIRS_OF_SHORTS):
        name = intrinsic(e.host, Operation.ADDED_PAIRS_OF_SHORTS)
        return w.call(kind, name, total, words, halves)
    if has(e.host, Operation.PAIRS_OF_SHORTS):
        return w.binary("add", total, sums_of_pairs(e, words, halves))
    half = w.constant("i32", 16, e.lanes)
    sides = [w.cast("bitcast", side, kind) for side in (words, spread)]
    low = [w.binary("ashr", w.binary("shl", side, half), half) for side in sides]
    high = [w.binary("ashr", side, half) for side in sides]
    products = w.binary("add", w.binary("mul", *low), w.binary("mul", *high))
    return w.binary("add", total, products)


def _twice(e: Emitter, numbers: Reg) -> Reg:
    """The lower half of each i32 lane, in both halves."""
    lanes = lanes_of(numbers.type)
    halves = e.w.cast("bitcast", numbers, vector_type("i16", PAIR * lanes))
    return e.w.shuffle(halves, [lane // PAIR * PAIR for lane in range(PAIR * lanes)])


def _rounded_product(e: Emitter, a: Reg, b: Reg) -> Reg:
    """The upper 17 bits of each product of i16 numbers, rounded to 16: ties go up."""
    w = e.w
    if lanes_of(a.type) == PAIR * e.lanes and has(e.host, Operation.ROUNDED_PRODUCTS):
        return w.call(a.type, intrinsic(e.host, Operation.ROUNDED_PRODUCTS), a, b)
    lanes = lanes_of(a.type)
    wide = vector_type("i32", lanes)
    product = w.binary("mul", w.cast("sext", a, wide), w.cast("sext", b, wide))
    half = w.binary("add", product, w.constant("i32", 1 << 14, lanes))
    return w.cast("trunc", w.binary("ashr", half, w.constant("i32", 15, lanes)), a.type)
