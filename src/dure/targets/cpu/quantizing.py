"""Rows of float tiles to blocks of codes, as :func:`dure.ir.blocks.quantize` does."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from dure.ir import dtypes
from dure.ir.blocks import BFP_LARGEST, BFP_SMALLEST
from dure.targets.cpu.lanes import reduce_each
from dure.targets.cpu.values import BlockBuffer, Buffer, Emitter
from dure.targets.cpu.writer import Reg, integer, lanes_of, vector_type

#: Blocks whose maxima and sums are found together, at most.
_TOGETHER = 4


def quantize(e: Emitter, source: Buffer, target: BlockBuffer, rows: Reg) -> None:
    """The rows of a float tile to the blocks of ``target``, along the last axis."""
    length = source.type.shape[-1]
    blocks = length // target.format.block
    if not blocks:
        return
    count = source.type.elements // length
    # Rows that follow one another are one long row: their blocks are as many together.
    several = math.gcd(count, max(1, _TOGETHER // blocks)) if source.pitch == length else 1
    flat = source.reshaped((count // several, several * length))
    planes = {
        n: p.reshaped((count // several, several * p.type.shape[-1]))
        for n, p in target.planes.items()
    }
    rows = e.w.floordiv(e.w.add(rows, integer(several - 1)), integer(several))
    blocks *= several
    together = min(_TOGETHER, blocks & -blocks)

    def each(row: Reg, _: list[Reg]) -> list[Reg]:
        def some(first: Reg, _: list[Reg]) -> list[Reg]:
            _Blocks(e, target.format, planes, row, first).write(flat, together)
            return []

        return e.w.loop(integer(0), integer(blocks), together, some)

    e.w.loop(integer(0), rows, 1, each)


class _Blocks:
    """Blocks of a row, from the ``first`` on."""

    def __init__(
        self,
        e: Emitter,
        format: dtypes.BlockFormat,
        planes: dict[str, Buffer],
        row: Reg,
        first: Reg,
    ) -> None:
        self.e, self.w, self.format, self.planes = e, e.w, format, planes
        self.row, self.first = row, first
        self.lanes = min(e.lanes, 16)
        self.pieces = format.block // self.lanes

    def write(self, source: Buffer, count: int) -> None:
        """So many blocks of ``source``."""
        w, lanes = self.w, self.lanes
        start = w.mul(self.first, integer(self.format.block))
        places = [[self.row, w.add(start, integer(i * lanes))] for i in range(count * self.pieces)]
        values = [source.vector(self.e, place, 1, lanes) for place in places]
        usable, inverse, scales = self._scales(values, count)
        codes: list[Reg] = []
        for i, value in enumerate(values):
            block = i // self.pieces
            scaled = w.binary("fmul", value, w.splat(w.lane(inverse, block), lanes))
            nothing = self.e.math.constant(value, 0.0)
            sure = w.splat(w.lane(usable, block), lanes)
            codes.append(self.e.math.nearest(w.select(sure, scaled, nothing)))
            self._put(codes[-1], places[i])
            if "value" in self.planes:
                self._put_value(codes[-1], w.lane(scales, block), places[i])
        self._sums(codes)

    def _scales(self, values: Sequence[Reg], count: int) -> tuple[Reg, Reg, Reg]:
        """Write the scales; gives which blocks have codes, what makes codes of numbers, and the
        scales.
        """
        w, e = self.w, self.e
        ints = vector_type("i32", self.lanes)

        def larger(a: Reg, b: Reg) -> Reg:
            return w.select(w.compare("icmp sgt", a, b), a, b)

        # Magnitudes are in the order of their bits, in which NaN comes after infinity: a maximum of
        # floats would lose it.
        sizes = [w.cast("bitcast", e.math.absolute(value), ints) for value in values]
        pieces = (sizes[i : i + self.pieces] for i in range(0, len(sizes), self.pieces))
        largest = reduce_each(e, [functools.reduce(larger, block) for block in pieces], larger)
        if self.format is dtypes.bfp9_block32:
            found = self._powers(largest)
            self.planes["d"].put(e, found[2], [self.row, self.first], 1)
            return found
        top = w.cast("bitcast", largest, vector_type("float", count))
        code = e.math.constant(top, float(dtypes.ACTIVATION_FORMATS.get(self.format, 127)))
        scales = w.binary("fdiv", top, code)
        self.planes["d"].put(e, scales, [self.row, self.first], 1)
        inverse = w.binary("fdiv", code, top)
        # Magnitudes so small that they have no finite reciprocal are zeros; so are the codes of NaN
        # and infinity, whose scale says what they are.
        finite = w.compare("fcmp olt", inverse, e.math.constant(top, math.inf))
        some = w.compare("fcmp ogt", inverse, e.math.constant(top, 0.0))
        return w.binary("and", finite, some), inverse, scales

    def _powers(self, largest: Reg) -> tuple[Reg, Reg, Reg]:
        """Which blocks have codes, the power of two that makes them, and its reciprocal, the scale,
        from the bits of their largest magnitudes.
        """
        w, lanes = self.w, lanes_of(largest.type)
        floats = vector_type("float", lanes)

        def bits(value: float) -> Reg:
            return w.constant("i32", int(np.float32(value).view(np.int32)), lanes)

        some = w.compare("icmp sge", largest, bits(BFP_SMALLEST))
        finite = w.compare("icmp slt", largest, bits(BFP_LARGEST))
        exponent = w.binary("and", largest, w.constant("i32", 0x7F800000, lanes))
        power = w.binary("sub", exponent, w.constant("i32", 7 << 23, lanes))
        inverse = w.binary("sub", w.constant("i32", 254 << 23, lanes), power)
        scale = w.select(finite, w.select(some, power, bits(0.0)), bits(math.nan))
        usable = w.binary("and", some, finite)
        return usable, w.cast("bitcast", inverse, floats), w.cast("bitcast", scale, floats)

    def _put_value(self, codes: Reg, scale: Reg, place: Sequence[Reg]) -> None:
        """Write values, which are the upper halves of float32 numbers."""
        w, lanes = self.w, self.lanes
        numbers = w.cast("sitofp", codes, vector_type("float", lanes))
        values = w.binary("fmul", numbers, w.splat(scale, lanes))
        exact = self.e.convert.exact(values, dtypes.bfloat16)
        w.store(exact, self.planes["value"].at(self.e, place), 2)

    def _put(self, codes: Reg, place: Sequence[Reg]) -> None:
        """Write codes, 16-bit ones as two bytes where they have two planes."""
        w, e, bytes_ = self.w, self.e, vector_type("i8", self.lanes)
        stored = vector_type(f"i{self.format.plane('code').dtype.bits}", self.lanes)
        low = w.cast("trunc", codes, stored)
        self.planes["code"].put(e, low, place, 1)
        if "high" in self.planes:
            # The low byte is signed: what it lacks, the high byte has.
            rest = w.binary("sub", codes, w.cast("sext", low, codes.type))
            high = w.binary("ashr", rest, w.constant("i32", 8, self.lanes))
            self.planes["high"].put(e, w.cast("trunc", high, bytes_), place, 1)

    def _sums(self, codes: Sequence[Reg]) -> None:
        """Write sums of neighbouring codes, where the format has them."""
        w, e = self.w, self.e
        per = next((p.per for p in self.format.planes if p.role == "sum"), 0)
        if not per:
            return

        def add(a: Reg, b: Reg) -> Reg:
            return w.binary("add", a, b)

        pieces = per // self.lanes
        parts = [functools.reduce(add, codes[i : i + pieces]) for i in range(0, len(codes), pieces)]
        entry = w.mul(self.first, integer(self.format.block // per))
        for start in range(0, len(parts), self.lanes):
            sums = reduce_each(e, parts[start : start + self.lanes], add)
            place = [self.row, w.add(entry, integer(start))]
            self.planes["sum"].put(e, sums, place, 1)
