"""How element types live in memory and in registers, and the conversions between them.

Floats narrower than 32 bits are computed in float32: a register holds their exact value.  Where the
host lacks an instruction for a conversion, integer arithmetic does it, to the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from dure.ir import dtypes
from dure.ir.dtypes import DType
from dure.runtime.host import HostFeatures
from dure.targets.cpu.instructions import Operation, has, intrinsic
from dure.targets.cpu.writer import Reg, Writer, integer, lanes_of, vector_type


def register_type(dtype: DType) -> str:
    """The LLVM element type that a value of ``dtype`` is computed in."""
    if dtype.is_float:
        return "double" if dtype.bits == 64 else "float"
    return "i1" if dtype.kind == "bool" else f"i{max(8, dtype.bits)}"


def memory_type(dtype: DType) -> str:
    """The LLVM element type that a value of ``dtype`` is stored as."""
    if dtype in (dtypes.float32, dtypes.float64):
        return register_type(dtype)
    return f"i{max(8, dtype.bits)}"


@dataclass(frozen=True)
class _SmallFloat:
    """A float of fewer than 32 bits; without infinities, the largest code is NaN."""

    exponent: int
    mantissa: int
    infinite: bool

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1


_SMALL = {
    dtypes.float16: _SmallFloat(5, 10, True),
    dtypes.float8_e5m2: _SmallFloat(5, 2, True),
    dtypes.float8_e4m3fn: _SmallFloat(4, 3, False),
}


#: The class of subnormal numbers, as an instruction's bits.
_SUBNORMAL = 0x20


class Converter:
    """Writes conversions for one host."""

    def __init__(self, writer: Writer, host: HostFeatures) -> None:
        self.w = writer
        self.host = host

    def widen(self, stored: Reg, dtype: DType) -> Reg:
        """A value as memory holds it, as a register."""
        w, lanes = self.w, lanes_of(stored.type)
        if dtype.kind == "bool":
            zero = w.constant(f"i{dtype.bits}", 0, lanes)
            return w.compare("icmp ne", stored, zero)
        if dtype is dtypes.bfloat16:
            wide = w.cast("zext", stored, vector_type("i32", lanes))
            high = w.binary("shl", wide, w.constant("i32", 16, lanes))
            return w.cast("bitcast", high, vector_type("float", lanes))
        if dtype is dtypes.float16 and has(self.host, Operation.HALF):
            half = w.cast("bitcast", stored, vector_type("half", lanes))
            return w.cast("fpext", half, vector_type("float", lanes))
        if dtype in _SMALL:
            return self._widen_small(stored, _SMALL[dtype])
        return stored

    def narrow(self, value: Reg, dtype: DType) -> Reg:
        """A register as memory will hold it."""
        w, lanes = self.w, lanes_of(value.type)
        if dtype.kind == "bool":
            return w.cast("zext", value, vector_type("i8", lanes))
        if dtype is dtypes.bfloat16:
            return self._narrow_bfloat(value)
        if dtype is dtypes.float16 and has(self.host, Operation.HALF):
            half = w.cast("fptrunc", value, vector_type("half", lanes))
            return w.cast("bitcast", half, vector_type("i16", lanes))
        if dtype in _SMALL:
            return self._narrow_small(value, _SMALL[dtype], max(8, dtype.bits))
        return value

    def exact(self, value: Reg, dtype: DType) -> Reg:
        """What :meth:`narrow` gives of a register that holds a value of ``dtype``."""
        if dtype is not dtypes.bfloat16:
            return self.narrow(value, dtype)
        w, lanes = self.w, lanes_of(value.type)
        bits = w.cast("bitcast", value, self._ints(lanes))
        high = w.binary("lshr", bits, w.constant("i32", 16, lanes))
        return w.cast("trunc", high, vector_type("i16", lanes))

    def rounded(self, value: Reg, dtype: DType) -> Reg:
        """A float register rounded to what ``dtype`` can hold."""
        if dtype in (dtypes.float32, dtypes.float64) or not dtype.is_float:
            return value
        return self.widen(self.narrow(value, dtype), dtype)

    def convert(self, value: Reg, source: DType, target: DType) -> Reg:
        """``cast`` of :mod:`dure.ir.tile.elementwise`, on registers."""
        w, lanes = self.w, lanes_of(value.type)
        if source == target:
            return value
        wanted = vector_type(register_type(target), lanes)
        if target.kind == "bool":
            zero = w.constant(register_type(source), 0 if not source.is_float else 0.0, lanes)
            return w.compare("fcmp une" if source.is_float else "icmp ne", value, zero)
        if source.is_float and target.is_float:
            if source.bits == 64:
                return self.rounded(w.cast("fptrunc", value, wanted), target)
            if target.bits == 64:
                return w.cast("fpext", value, wanted)
            return self.rounded(value, target)
        if source.is_float:
            signed = "fptosi" if target.kind == "int" else "fptoui"
            element = register_type(source)
            suffix = f"v{lanes}" if lanes > 1 else ""
            short = {"float": "f32", "double": "f64"}[element]
            name = f"llvm.{signed}.sat.{suffix}i{target.bits}.{suffix}{short}"
            return w.call(wanted, name, value)
        unsigned = source.kind in ("uint", "bool")
        if target.is_float:
            element = vector_type(register_type(target), lanes)
            return self.rounded(w.cast("uitofp" if unsigned else "sitofp", value, element), target)
        if source.kind == "bool" or source.bits < target.bits:
            return w.cast("zext" if unsigned else "sext", value, wanted)
        return value if source.bits == target.bits else w.cast("trunc", value, wanted)

    # -- small floats by integer arithmetic --------------------------------------------------------

    def _ints(self, lanes: int) -> str:
        return vector_type("i32", lanes)

    def _widen_small(self, stored: Reg, kind: _SmallFloat) -> Reg:
        w, lanes = self.w, lanes_of(stored.type)
        bits = 1 + kind.exponent + kind.mantissa

        def c(value: int) -> Reg:
            return w.constant("i32", value, lanes)

        wide = w.cast("zext", stored, self._ints(lanes))
        magnitude = w.binary("and", wide, c((1 << (bits - 1)) - 1))
        sign = w.binary("shl", w.binary("sub", wide, magnitude), c(32 - bits))
        shifted = w.binary("shl", magnitude, c(23 - kind.mantissa))
        floats = vector_type("float", lanes)
        # Multiplying by 2**(127 - bias) moves the exponent and normalises subnormals exactly.
        scale = w.constant("float", 2.0 ** (127 - kind.bias), lanes)
        value = w.binary("fmul", w.cast("bitcast", shifted, floats), scale)
        raw = w.cast("bitcast", value, self._ints(lanes))
        if kind.infinite:
            top = c(((1 << kind.exponent) - 1) << kind.mantissa)
            special = w.compare("icmp uge", magnitude, top)
            raw = w.select(special, w.binary("or", shifted, c(0x7F800000)), raw)
        else:
            special = w.compare("icmp eq", magnitude, c((1 << (bits - 1)) - 1))
            raw = w.select(special, c(0x7FC00000), raw)
        return w.cast("bitcast", w.binary("or", raw, sign), floats)

    def _narrow_bfloat(self, value: Reg) -> Reg:
        w, lanes = self.w, lanes_of(value.type)
        if lanes % (self.host.vector_bits // 32) or not has(self.host, Operation.BFLOAT16):
            return self._round_to_bfloat(value)
        short = w.cast("fptrunc", value, vector_type("bfloat", lanes))
        short = w.cast("bitcast", short, vector_type("i16", lanes))
        # The instruction takes subnormal numbers for zero: vectors that have one, which are few,
        # take a turn of the other way.
        turns = w.cast("zext", self._any_subnormal(value), "i64")

        def round_again(_: Reg, held: list[Reg]) -> list[Reg]:
            return [self._round_to_bfloat(held[1]), held[1]]

        return w.loop(integer(0), turns, 1, round_again, [short, value])[0]

    def _any_subnormal(self, value: Reg) -> Reg:
        """Whether a vector of whole registers has a subnormal number."""
        w, width = self.w, self.host.vector_bits // 32
        found: Reg | None = None
        for first in range(0, lanes_of(value.type), width):
            part = w.shuffle(value, range(first, first + width))
            which = w.call(
                vector_type("i1", width),
                intrinsic(self.host, Operation.CLASSES),
                part,
                Reg("i32", str(_SUBNORMAL)),
            )
            found = which if found is None else w.binary("or", found, which)
        assert found is not None
        bits = w.cast("bitcast", found, f"i{width}")
        return w.compare("icmp ne", bits, Reg(bits.type, "0"))

    def _round_to_bfloat(self, value: Reg) -> Reg:
        w, lanes = self.w, lanes_of(value.type)

        def c(number: int) -> Reg:
            return w.constant("i32", number, lanes)

        raw = w.cast("bitcast", value, self._ints(lanes))
        odd = w.binary("and", w.binary("lshr", raw, c(16)), c(1))
        up = w.binary("add", w.binary("add", raw, c(0x7FFF)), odd)
        nan = w.compare("fcmp uno", value, value)
        kept = w.select(nan, w.binary("or", raw, c(0x400000)), up)
        return w.cast("trunc", w.binary("lshr", kept, c(16)), vector_type("i16", lanes))

    def _narrow_small(self, value: Reg, kind: _SmallFloat, bits: int) -> Reg:
        """Round to nearest even (after F. Giesen, "Float->half variants", public domain)."""
        w, lanes = self.w, lanes_of(value.type)

        def c(number: int) -> Reg:
            return w.constant("i32", number & 0xFFFFFFFF, lanes)

        ints, floats = self._ints(lanes), vector_type("float", lanes)
        width = 1 + kind.exponent + kind.mantissa
        cut = 23 - kind.mantissa
        raw = w.cast("bitcast", value, ints)
        magnitude = w.binary("and", raw, c(0x7FFFFFFF))
        sign = w.binary("lshr", w.binary("and", raw, c(0x80000000)), c(32 - width))
        # Below the smallest normal: adding a power of two makes the FPU round at the last bit.
        magic = (127 - kind.bias + cut + 1) << 23
        low = w.binary(
            "fadd", w.cast("bitcast", magnitude, floats), w.cast("bitcast", c(magic), floats)
        )
        tiny = w.binary("sub", w.cast("bitcast", low, ints), c(magic))
        odd = w.binary("and", w.binary("lshr", magnitude, c(cut)), c(1))
        rebias = ((kind.bias - 127) << 23) + (1 << (cut - 1)) - 1
        normal = w.binary(
            "lshr", w.binary("add", w.binary("add", magnitude, c(rebias)), odd), c(cut)
        )
        smallest = w.compare("icmp ult", magnitude, c((127 - kind.bias + 1) << 23))
        found = w.select(smallest, tiny, normal)
        if kind.infinite:
            top = ((1 << kind.exponent) - 1) << kind.mantissa
            over = w.compare("icmp ugt", found, c(top))
            found = w.select(over, c(top), found)
            huge = w.compare("icmp uge", magnitude, c((127 + kind.bias + 1) << 23))
            found = w.select(huge, c(top), found)
            quiet = top | (1 << (kind.mantissa - 1))
        else:
            quiet = (1 << (width - 1)) - 1
            over = w.compare("icmp ugt", found, c(quiet - 1))
            found = w.select(over, c(quiet), found)
            huge = w.compare("icmp uge", magnitude, c((127 + kind.bias + 2) << 23))
            found = w.select(huge, c(quiet), found)
        found = w.select(w.compare("fcmp uno", value, value), c(quiet), found)
        return w.cast("trunc", w.binary("or", found, sign), vector_type(f"i{bits}", lanes))
