"""Addresses, bounds and vector accesses of one load or store, whatever the tensor's layout.

A :class:`Place` is made once, where the op stands; it then gives vectors of neighbouring elements.
A vector whose lanes lie side by side in memory is one (masked) load or store; any other is a gather
or scatter, so that every layout works and the usual ones are fast.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from dure.ir.dtypes import DType
from dure.ir.expr import Const, Expr, IntLike, Sum, as_expr, proves, symbols
from dure.ir.layout import Digit, Layout
from dure.runtime.memory import LINE_BYTES
from dure.targets.cpu.numbers import memory_type
from dure.targets.cpu.writer import Reg, Writer, integer, lanes_of, vector_type


@dataclass(frozen=True)
class Extent:
    """How far a tile reaches along an axis, and how much of that is used."""

    static: int
    used: Expr | None = None

    @property
    def bound(self) -> Expr:
        """The used extent as an expression (never above ``static``)."""
        return as_expr(self.static) if self.used is None else self.used

    @property
    def most(self) -> int:
        """The largest number of elements that may be used."""
        bound = self.bound
        return min(self.static, bound.value) if isinstance(bound, Const) else self.static


@dataclass(frozen=True)
class Axis:
    """One axis of an access: element t lies at ``start + t * stride`` of ``size``.

    With ``entries`` (a function from a position in the list to an i64 entry) it lies at
    ``entries(t // step) * step + t % step + start``; a negative entry is absent.  ``known`` are the
    least and the largest entry, where the list declares them.
    """

    start: Expr
    stride: int
    size: Expr
    step: int = 1
    entries: EntryReader | None = None
    known: tuple[Expr, Expr] | None = None

    @property
    def listed_inside(self) -> bool:
        """Whether every element that a list may name lies in the tensor."""
        if self.known is None:
            return False
        low, high = self.known
        first = low * self.step + self.start
        last = (high + 1) * self.step - 1 + self.start
        return all(proves(c) for c in (as_expr(0) <= low, as_expr(0) <= first, last < self.size))


class EntryReader(Protocol):
    """Reads entries of an index list as i64, for one position or a vector of them."""

    def read(self, position: Reg) -> Reg: ...


class Place:
    """Where one load or store lies."""

    def __init__(
        self,
        writer: Writer,
        base: Reg,
        layout: Layout,
        axes: Sequence[Axis],
        extents: Sequence[Extent],
        dtype: DType,
        trusted: frozenset[int] = frozenset(),
    ) -> None:
        """``trusted`` axes are never walked past the tensor's edge: their loops see to it."""
        self.w = writer
        self.trusted = trusted
        self.layout = layout
        self.axes = tuple(axes)
        self.extents = tuple(extents)
        self.dtype = dtype
        self.unit = 8 if _in_bytes(layout) else 1
        #: The first position and the end of what is accessed along the vectors' axis, if not all.
        self._window: tuple[Reg, Reg] | None = None
        #: Whether what is stored is read again only when no cache holds it, where that may be.
        self.far: Reg | None = None
        self._streamed: int | None = None
        self.starts: list[Reg | None] = []
        # Where addresses count bits, a plane may start inside a byte.
        whole = as_expr(layout.offset) // 8
        self.first = integer(0)
        if self.unit == 1:
            self.first = writer.index(as_expr(layout.offset) - whole * 8)
        self.base = writer.offset(base, writer.index(whole))
        for axis, digits in zip(self.axes, layout.axes, strict=True):
            start = None if axis.entries else writer.index(axis.start)
            if start is not None and len(digits) == 1 and self.unit == 8:
                by = writer.mul(start, self._constant(digits[0].stride))
                self.base = writer.offset(self.base, by)
                start = integer(0)
            self.starts.append(start)

    def _constant(self, stride: IntLike) -> Reg:
        """A stride or offset in units of the address (bytes or bits)."""
        return self.w.index(as_expr(stride) // self.unit)

    # -- bounds -----------------------------------------------------------------------------------

    def inside(self, axis: int, lanes: int) -> bool:
        """Whether every element that is used along this axis is proved to lie in the tensor.

        A vector axis is used up to whole vectors of ``lanes``.
        """
        place, extent = self.axes[axis], self.extents[axis]
        if axis in self.trusted:
            return True
        if place.entries is not None:
            return place.listed_inside
        if not proves(as_expr(0) <= place.start):
            return False
        last = extent.bound - 1 if lanes == 1 else as_expr(extent.static - 1)
        return proves(place.start + last * place.stride < place.size)

    @contextmanager
    def only(self, first: Reg, end: Reg) -> Generator[None]:
        """Inside, vectors access no position in front of ``first``, and none from ``end`` on."""
        self._window = first, end
        yield
        self._window = None

    @contextmanager
    def streamed(self, alignment: int) -> Generator[None]:
        """Inside, what is stored without a mask goes past the caches; it is aligned so."""
        self._streamed = alignment
        yield
        self._streamed = None

    def masks(self, index: Sequence[Reg], lane_axis: int, lanes: int) -> Reg | None:
        """The lanes whose element lies in the tensor; None where all do."""
        mask: Reg | None = None
        if self._window is not None and lanes > 1:
            first, end = (self.w.sub(edge, index[lane_axis]) for edge in self._window)
            mask = self.w.binary("and", self._below(end, lanes), self._from(first, lanes))
        for axis, place in enumerate(self.axes):
            wide = lanes if axis == lane_axis else 1
            if self.inside(axis, wide):
                continue
            if wide > 1 and place.entries is None and place.stride == 1:
                found = self._side_by_side(axis, index[axis], lanes)
                mask = found if mask is None else self.w.binary("and", mask, found)
                continue
            position = self._positions(index[axis], wide)
            element = self._element(axis, position)
            limit = self.w.splat(self.w.index(place.size), wide)
            found = self.w.compare("icmp ult", element, limit)
            if place.entries is not None:
                entry = self._entries(place, position)
                present = self.w.compare("icmp sge", entry, self.w.constant("i64", 0, wide))
                found = self.w.binary("and", found, present)
            found = self.w.splat(found, lanes) if wide == 1 else found
            mask = found if mask is None else self.w.binary("and", mask, found)
        return mask

    def _side_by_side(self, axis: int, position: Reg, lanes: int) -> Reg:
        """The lanes inside of an axis that they walk: those between two that are counted once."""
        w, place = self.w, self.axes[axis]
        element = w.add(w.index(place.start), position)

        mask = self._below(w.sub(w.index(place.size), element), lanes)
        if proves(as_expr(0) <= place.start):
            return mask
        return w.binary("and", mask, self._from(w.sub(integer(0), element), lanes))

    def _below(self, end: Reg, lanes: int) -> Reg:
        """The lanes in front of ``end``, which may be any number."""
        return self.w.compare("icmp slt", self.w.iota("i32", lanes), self._counted(end, lanes))

    def _from(self, first: Reg, lanes: int) -> Reg:
        """The lanes from ``first`` on, which may be any number."""
        return self.w.compare("icmp sge", self.w.iota("i32", lanes), self._counted(first, lanes))

    def _counted(self, number: Reg, lanes: int) -> Reg:
        w = self.w
        inside = w.minimum(w.maximum(number, integer(0)), integer(lanes))
        return w.splat(w.cast("trunc", inside, "i32"), lanes)

    def _positions(self, first: Reg, lanes: int) -> Reg:
        if lanes == 1:
            return first
        return self.w.binary("add", self.w.splat(first, lanes), self.w.iota("i64", lanes))

    def _entries(self, place: Axis, position: Reg) -> Reg:
        assert place.entries is not None
        lanes = lanes_of(position.type)
        if lanes == 1:
            return place.entries.read(self.w.floordiv(position, integer(place.step)))
        step = self.w.constant("i64", place.step, lanes)
        return place.entries.read(self.w.binary("udiv", position, step))

    def _element(self, axis: int, position: Reg) -> Reg:
        """The tensor's element along ``axis`` for a position (or a vector of them) in the tile."""
        w, place, lanes = self.w, self.axes[axis], lanes_of(position.type)
        start = w.splat(w.index(place.start), lanes)
        if place.entries is None:
            if lanes == 1:
                return w.add(start, w.mul(position, integer(place.stride)))
            scaled = w.binary("mul", position, w.constant("i64", place.stride, lanes))
            return w.binary("add", scaled, start)
        entry = self._entries(place, position)
        if lanes == 1:
            whole = w.mul(entry, integer(place.step))
            return w.add(w.add(whole, w.mod(position, place.step)), start)
        step = w.constant("i64", place.step, lanes)
        rest = w.binary("urem", position, step)
        return w.binary("add", w.binary("add", w.binary("mul", entry, step), rest), start)

    # -- addresses --------------------------------------------------------------------------------

    def contiguous(self, axis: int, lanes: int) -> bool:
        """Whether ``lanes`` elements from a multiple of ``lanes`` lie side by side."""
        return self._apart(axis, lanes, self.dtype.bits)

    def paired(self, axis: int, lanes: int) -> bool:
        """Whether ``lanes`` elements of 16 bits from a multiple of ``lanes`` lie in words side by
        side, each beside its neighbour along another axis.
        """
        return self.dtype.bits == 16 and self._apart(axis, lanes, 32) and self._pairs is not None

    def _apart(self, axis: int, lanes: int, bits: int) -> bool:
        place, digits = self.axes[axis], self.layout.axes[axis]
        inner = digits[-1]
        if self.unit != 8 or as_expr(inner.stride) is not as_expr(bits) or place.stride != 1:
            return False
        aligned = place.start % lanes is as_expr(0)
        if place.entries is not None and (place.step % lanes or not aligned):
            return False
        return len(digits) == 1 or (
            inner.extent is not None and inner.extent % lanes == 0 and aligned
        )

    @property
    def _pairs(self) -> int | None:
        """The axis whose elements lie side by side by twos, in words."""
        for axis, digits in enumerate(self.layout.axes):
            inner = digits[-1]
            if inner.extent == 2 and as_expr(inner.stride) is as_expr(self.dtype.bits):
                return axis
        return None

    def pair_pitch(self, along: int, across: int, steps: int, lanes: int) -> Reg | None:
        """Bytes from a pair of neighbours along an axis to the next, if each ``steps`` elements
        along it, from a multiple of ``steps`` on, are pairs as far apart, each in a word beside the
        words of ``lanes`` elements across; all that the access may read lies in the tensor.
        """
        place, digits = self.axes[along], self.layout.axes[along]
        if self._pairs != along or not self.paired(across, lanes) or len(digits) < 2:
            return None
        whole = [self.extents[along].static, place.step if place.entries else steps]
        around = digits[-2].extent
        whole.append(steps if around is None else 2 * around)
        aligned = place.start % steps is as_expr(0) and place.stride == 1
        if not aligned or any(count % steps for count in whole):
            return None
        wide = {along: steps, across: lanes}
        if self.extents[across].static % lanes:
            return None
        if not all(self.inside(axis, wide.get(axis, 1)) for axis in range(len(self.axes))):
            return None
        return self._constant(digits[-2].stride)

    def pitch(self, axis: int) -> Reg | None:
        """Bytes from one element along an axis to the next, where they are as many everywhere."""
        place, digits = self.axes[axis], self.layout.axes[axis]
        if self.unit != 8 or place.entries is not None or len(digits) != 1:
            return None
        return self.w.mul(self._constant(digits[0].stride), integer(place.stride))

    def _offset(self, axis: int, position: Reg) -> Reg:
        """What a position along ``axis`` adds to the address, in units; vectors where it is one."""
        w, digits, lanes = self.w, self.layout.axes[axis], lanes_of(position.type)
        stride = self.pitch(axis)
        if stride is not None:
            if lanes == 1:
                return w.mul(position, stride)
            return w.binary("mul", position, w.splat(stride, lanes))
        element = self._element(axis, position)
        return self._digits(element, digits)

    def _digits(self, element: Reg, digits: Sequence[Digit]) -> Reg:
        w, lanes = self.w, lanes_of(element.type)
        total: Reg | None = None
        for place, digit in enumerate(digits):
            below = 1
            for inner in digits[place + 1 :]:
                assert inner.extent is not None
                below *= inner.extent
            stride = self._constant(digit.stride)
            if lanes == 1:
                value = w.floordiv(element, integer(below))
                if place:
                    assert digit.extent is not None
                    value = w.mod(value, digit.extent)
                part = w.mul(value, stride)
                total = part if total is None else w.add(total, part)
                continue
            value = element
            if below > 1:
                value = w.binary("udiv", value, w.constant("i64", below, lanes))
            if place:
                assert digit.extent is not None
                value = w.binary("urem", value, w.constant("i64", digit.extent, lanes))
            part = w.binary("mul", value, w.splat(stride, lanes))
            total = part if total is None else w.binary("add", total, part)
        assert total is not None
        return total

    def address(self, index: Sequence[Reg]) -> Reg:
        """The byte address of one element."""
        total = self.base
        bits = self.first
        for axis, position in enumerate(index):
            by = self._offset(axis, position)
            if self.unit == 8:
                total = self.w.offset(total, by)
            else:
                bits = self.w.add(bits, by)
        return self.w.offset(total, self.w.floordiv(bits, integer(8)))

    def bit_offsets(self, index: Sequence[Reg], lane_axis: int, lanes: int) -> Reg:
        """Offsets of ``lanes`` elements along ``lane_axis``, in units, as a vector."""
        w = self.w
        scalar = self.first
        vector = w.constant("i64", 0, lanes)
        for axis, position in enumerate(index):
            if axis == lane_axis and lanes > 1:
                vector = self._offset(axis, self._positions(position, lanes))
            else:
                scalar = w.add(scalar, self._offset(axis, position))
        spread = w.splat(scalar, lanes)
        return spread if lanes == 1 else w.binary("add", vector, spread)

    # -- accesses ---------------------------------------------------------------------------------

    def load(self, index: Sequence[Reg], lane_axis: int, lanes: int, mask: Reg | None) -> Reg:
        """``lanes`` elements as memory holds them; lanes outside ``mask`` are zero."""
        w = self.w
        element = memory_type(self.dtype)
        type = vector_type(element, lanes)
        if lanes == 1 or self.contiguous(lane_axis, lanes):
            address = self.address(index)
            if mask is None:
                return w.load(type, address)
            return masked_load(w, type, address, mask)
        if self.paired(lane_axis, lanes):
            return self._load_paired(index, lanes, mask)
        addresses = self._addresses(index, lane_axis, lanes)
        return gather(w, element, addresses, lanes, mask)

    def store(self, value: Reg, index: Sequence[Reg], lane_axis: int, mask: Reg | None) -> None:
        """Store a vector of elements as memory holds them, where ``mask`` says so."""
        w, lanes = self.w, lanes_of(value.type)
        if lanes == 1 or self.contiguous(lane_axis, lanes):
            address = self.address(index)
            if mask is None and self._streamed is not None:
                w.stream(value, address, self._streamed)
            elif mask is None:
                w.store(value, address)
            else:
                masked_store(w, value, address, mask)
            return
        if self.paired(lane_axis, lanes):
            self._store_paired(value, self.address(index), mask)
            return
        addresses = self._addresses(index, lane_axis, lanes)
        scatter(w, value, addresses, mask)

    def _load_paired(self, index: Sequence[Reg], lanes: int, mask: Reg | None) -> Reg:
        """Elements that lie in words side by side: all words, and of each its half."""
        w, axis = self.w, self._pairs
        assert axis is not None
        place = w.mod(self._element(axis, index[axis]), 2)
        address = w.offset(self.address(index), w.sub(integer(0), w.mul(place, integer(2))))
        words = vector_type("i32", lanes)
        found = w.load(words, address) if mask is None else masked_load(w, words, address, mask)
        shift = w.cast("trunc", w.mul(place, integer(16)), "i32")
        return w.cast(
            "trunc", w.binary("lshr", found, w.splat(shift, lanes)), vector_type("i16", lanes)
        )

    def _store_paired(self, value: Reg, address: Reg, mask: Reg | None) -> None:
        """Elements that lie in words side by side: what is beside them stays."""
        w, lanes = self.w, lanes_of(value.type)
        words = w.cast("zext", value, vector_type("i32", lanes))
        wide = w.cast("bitcast", words, vector_type("i16", 2 * lanes))
        some = mask if mask is not None else w.constant("i1", 1, lanes)
        order = [lane // 2 if lane % 2 == 0 else lanes for lane in range(2 * lanes)]
        masked_store(w, wide, address, w.merge(some, w.constant("i1", 0, lanes), order))

    def _addresses(self, index: Sequence[Reg], lane_axis: int, lanes: int) -> Reg:
        offsets = self.bit_offsets(index, lane_axis, lanes)
        assert self.unit == 8, "elements of fewer than 8 bits are read by their planes"
        type = f"<{lanes} x ptr>"
        return self.w.emit(type, f"getelementptr i8, {self.base}, {offsets}")


def _in_bytes(layout: Layout) -> bool:
    strides = [d.stride for digits in layout.axes for d in digits]
    return all(_whole_bytes(as_expr(s)) for s in (*strides, layout.offset))


def _whole_bytes(expr: Expr) -> bool:
    match expr:
        case Const():
            return expr.value % 8 == 0
        case Sum():
            return expr.constant % 8 == 0 and all(c % 8 == 0 for _, c in expr.terms)
        case _:
            return False


def in_scope(expr: Expr, writer: Writer) -> bool:
    """Whether every symbol of ``expr`` already has a register."""
    return all(s in writer.symbols for s in symbols(expr))


def _suffix(element: str, lanes: int) -> str:
    short = {"float": "f32", "double": "f64"}.get(element, element)
    return f"v{lanes}{short}"


def _as_vector(w: Writer, value: Reg) -> Reg:
    if value.type.startswith("<"):
        return value
    type = f"<1 x {value.type}>"
    return w.emit(type, f"insertelement {type} poison, {value}, i64 0")


def masked_load(w: Writer, type: str, address: Reg, mask: Reg) -> Reg:
    """Load the lanes in ``mask``; the others are zero and not touched."""
    lanes = lanes_of(type)
    element = type if lanes == 1 else type[1:-1].split(" x ", 1)[1]
    wide = f"<{lanes} x {element}>"
    zero = Reg(wide, "zeroinitializer")
    name = f"llvm.masked.load.{_suffix(element, lanes)}.p0"
    found = w.call(wide, name, address, Reg("i32", "1"), _as_vector(w, mask), zero)
    return w.emit(element, f"extractelement {found}, i64 0") if lanes == 1 else found


def masked_store(w: Writer, value: Reg, address: Reg, mask: Reg) -> None:
    """Store the lanes in ``mask``."""
    wide = _as_vector(w, value)
    lanes, element = lanes_of(wide.type), wide.type[1:-1].split(" x ", 1)[1]
    name = f"llvm.masked.store.{_suffix(element, lanes)}.p0"
    w.call("void", name, wide, address, Reg("i32", "1"), _as_vector(w, mask))


def gather(w: Writer, element: str, addresses: Reg, lanes: int, mask: Reg | None) -> Reg:
    """Load a lane from each address in ``mask``; the others are zero."""
    type = f"<{lanes} x {element}>"
    where = mask if mask is not None else Reg(f"<{lanes} x i1>", "splat (i1 true)")
    name = f"llvm.masked.gather.{_suffix(element, lanes)}.v{lanes}p0"
    return w.call(type, name, addresses, Reg("i32", "1"), where, Reg(type, "zeroinitializer"))


def fetch(w: Writer, address: Reg, first: int, count: int, cache: int = 1) -> None:
    """Ask for ``count`` bytes from ``first`` bytes behind an address on, which need not exist.

    They come to the nearest ``cache`` or to the second: that takes more requests at a time, and a
    load that misses waits for none of them.
    """
    read, place, data = (Reg("i32", value) for value in ("0", str(4 - cache), "1"))
    for line in range(first, first + count, LINE_BYTES):
        w.call("void", "llvm.prefetch.p0", w.offset(address, integer(line)), read, place, data)


def scatter(w: Writer, value: Reg, addresses: Reg, mask: Reg | None) -> None:
    """Store each lane in ``mask`` to its address, lowest lane first."""
    lanes, element = lanes_of(value.type), value.type[1:-1].split(" x ", 1)[1]
    where = mask if mask is not None else Reg(f"<{lanes} x i1>", "splat (i1 true)")
    name = f"llvm.masked.scatter.{_suffix(element, lanes)}.v{lanes}p0"
    w.call("void", name, value, addresses, Reg("i32", "1"), where)
