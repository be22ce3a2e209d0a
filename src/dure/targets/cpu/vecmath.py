"""Elementary functions on vectors of float32, as polynomials written in LLVM IR.

Largest errors measured over a dense sweep (tests/targets/test_vecmath.py asserts the bounds that
:mod:`dure.ir.tile.elementwise` declares): exp, exp2, log, log2 2 ulp; tanh, sigmoid, erf, sin, cos
4 ulp (sin and cos for |x| <= 2**20, absolute 1e-6 up to 2**30); pow 16 ulp.  Coefficients: Cephes
(S. Moshier, public domain) for log, tanh, sin, cos; N. Juffa's minimax polynomial for erf (public
domain); exp's is 1 + r + r**2 * q(r) with the least relative error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dure.runtime.host import HostFeatures
from dure.targets.cpu.instructions import Operation, has, intrinsic
from dure.targets.cpu.writer import Reg, Writer, element_of, float_literal, lanes_of, vector_type

_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds a float32 below 2**22 to an integer
_ROUND_DOUBLE = 6755399441055744.0  # 1.5 * 2**52


class VectorMath:
    """Writes elementary functions for one host."""

    def __init__(self, writer: Writer, host: HostFeatures) -> None:
        self.w = writer
        self.host = host
        self.fused = has(host, Operation.FUSED)
        self.rounding = has(host, Operation.ROUNDING)

    def constant(self, like: Reg, value: float) -> Reg:
        """A float literal in every lane of a register like this one."""
        element = element_of(like.type)
        if element == "double":
            import struct

            text = "0x" + struct.pack(">d", value).hex().upper()
        else:
            text = float_literal(value)
        return self.w.constant(element, text, lanes_of(like.type))

    def integers(self, like: Reg) -> str:
        """The integer vector type of the same width."""
        return vector_type(
            "i64" if element_of(like.type) == "double" else "i32", lanes_of(like.type)
        )

    def intrinsic(self, name: str, value: Reg, *more: Reg) -> Reg:
        """An overloaded LLVM intrinsic on vectors like ``value``."""
        lanes = lanes_of(value.type)
        short = {"float": "f32", "double": "f64"}[element_of(value.type)]
        suffix = f"v{lanes}{short}" if lanes > 1 else short
        return self.w.call(value.type, f"llvm.{name}.{suffix}", value, *more)

    def add(self, a: Reg, b: Reg) -> Reg:
        return self.w.binary("fadd", a, b)

    def sub(self, a: Reg, b: Reg) -> Reg:
        return self.w.binary("fsub", a, b)

    def mul(self, a: Reg, b: Reg) -> Reg:
        return self.w.binary("fmul", a, b)

    def fma(self, a: Reg, b: Reg, c: Reg) -> Reg:
        """``a * b + c``: fused where the host can, else rounded twice."""
        if self.fused:
            return self.intrinsic("fma", a, b, c)
        return self.add(self.mul(a, b), c)

    def polynomial(self, x: Reg, coefficients: Sequence[float]) -> Reg:
        """Horner's rule, the highest power first."""
        total = self.constant(x, coefficients[0])
        for coefficient in coefficients[1:]:
            total = self.fma(total, x, self.constant(x, coefficient))
        return total

    def clamp(self, x: Reg, low: float, high: float) -> Reg:
        """``x`` inside [low, high]; NaN stays NaN."""
        w = self.w
        floor, ceiling = self.constant(x, low), self.constant(x, high)
        x = w.select(w.compare("fcmp olt", x, floor), floor, x)
        return w.select(w.compare("fcmp ogt", x, ceiling), ceiling, x)

    def bits(self, x: Reg) -> Reg:
        return self.w.cast("bitcast", x, self.integers(x))

    def floats(self, bits: Reg, like: Reg) -> Reg:
        return self.w.cast("bitcast", bits, like.type)

    def integer(self, like: Reg, value: int) -> Reg:
        """An integer literal in every lane, as wide as ``like``'s lanes."""
        return self.w.constant(element_of(self.integers(like)), value, lanes_of(like.type))

    def absolute(self, x: Reg) -> Reg:
        """|x|."""
        mask = (1 << (63 if element_of(x.type) == "double" else 31)) - 1
        return self.floats(self.w.binary("and", self.bits(x), self.integer(x, mask)), x)

    def sign_of(self, x: Reg) -> Reg:
        """The sign bit of ``x``, alone."""
        top = 63 if element_of(x.type) == "double" else 31
        return self.w.binary("and", self.bits(x), self.integer(x, -(1 << top)))

    def with_sign(self, magnitude: Reg, sign: Reg) -> Reg:
        """``magnitude`` with a sign bit put on."""
        return self.floats(self.w.binary("or", self.bits(magnitude), sign), magnitude)

    # -- rounding ---------------------------------------------------------------------------------

    def rint(self, x: Reg) -> Reg:
        """To the nearest integer, ties to even."""
        if self.rounding:
            return self.intrinsic("nearbyint", x)
        w = self.w
        double = element_of(x.type) == "double"
        magic = self.constant(x, 2.0**52 if double else 2.0**23)
        size = self.absolute(x)
        rounded = self.sub(self.add(size, magic), magic)
        small = w.compare("fcmp olt", size, magic)
        return w.select(small, self.with_sign(rounded, self.sign_of(x)), x)

    def nearest(self, x: Reg) -> Reg:
        """The nearest 32-bit integer, ties to even, of a float32 number that has one."""
        kind = vector_type("i32", lanes_of(x.type))
        if not self.rounding:
            return self.w.cast("fptosi", self.rint(x), kind)
        suffix = "i32.f32" if kind == "i32" else f"v{lanes_of(x.type)}i32.v{lanes_of(x.type)}f32"
        return self.w.call(kind, f"llvm.lrint.{suffix}", x)

    def floor(self, x: Reg) -> Reg:
        """The largest integer not above ``x``."""
        if self.rounding:
            return self.intrinsic("floor", x)
        near = self.rint(x)
        above = self.w.compare("fcmp ogt", near, x)
        return self.w.select(above, self.sub(near, self.constant(x, 1.0)), near)

    def ceil(self, x: Reg) -> Reg:
        """The smallest integer not below ``x``."""
        if self.rounding:
            return self.intrinsic("ceil", x)
        near = self.rint(x)
        below = self.w.compare("fcmp olt", near, x)
        return self.w.select(below, self.add(near, self.constant(x, 1.0)), near)

    def sqrt(self, x: Reg) -> Reg:
        return self.intrinsic("sqrt", x)

    def rsqrt(self, x: Reg) -> Reg:
        return self.w.binary("fdiv", self.constant(x, 1.0), self.sqrt(x))

    # -- exponentials and logarithms --------------------------------------------------------------

    def _scale_by_power(self, value: Reg, exponent: tuple[Reg, Reg]) -> Reg:
        """``value * 2**exponent``, rounded once, for a float and an int32 that are equal."""
        if self._scales(value):
            lanes = self.host.vector_bits // 32
            return self._in_registers(self._scaled, lanes, value, exponent[0])
        return self._scale_in_two(value, exponent[1])

    def _scales(self, value: Reg) -> bool:
        """Whether the host has an instruction that scales vectors like this one."""
        whole = lanes_of(value.type) % (self.host.vector_bits // 32) == 0
        return whole and has(self.host, Operation.SCALE_BY_POWER)

    def _lowest(self, value: Reg) -> float:
        """An exponent of 2 so low that zero comes out at once: what may be subnormal takes a
        processor a hundred times as long, and what is masked is -inf.
        """
        return -1010.0 if self._scales(value) else -182.0

    def _scaled(self, value: Reg, exponent: Reg) -> Reg:
        """One register's values by the host's own instruction."""
        lanes = lanes_of(value.type)
        mask, rounding = Reg(f"i{lanes}", "-1"), Reg("i32", "4")
        function = intrinsic(self.host, Operation.SCALE_BY_POWER)
        return self.w.call(value.type, function, value, exponent, value, mask, rounding)

    def _in_registers(self, function: Callable[..., Reg], lanes: int, *values: Reg) -> Reg:
        """``function`` of each ``lanes`` of vectors that span one or several registers."""
        count = lanes_of(values[0].type)
        parts = [
            function(*(self.w.shuffle(v, range(at, at + lanes)) for v in values))
            if count > lanes
            else function(*values)
            for at in range(0, count, lanes)
        ]
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            wide = 2 * lanes_of(parts[0].type)
            parts = [self.w.merge(a, b, range(wide)) for a, b in pairs]
        return parts[0]

    def _scale_in_two(self, value: Reg, exponent: Reg) -> Reg:
        """In two steps, so that subnormals and infinity come out right."""
        w = self.w
        half = w.binary("ashr", exponent, self.integer(value, 1))
        rest = w.binary("sub", exponent, half)
        for part in (half, rest):
            biased = w.binary("add", part, self.integer(value, 127))
            power = w.binary("shl", biased, self.integer(value, 23))
            value = self.mul(value, self.floats(power, value))
        return value

    def _exp_reduced(self, r: Reg) -> Reg:
        """exp(r) for |r| <= ln(2) / 2."""
        return self.polynomial(
            r,
            (
                *(1.3814540579915047e-3, 8.36874544620514e-3, 4.166838899254799e-2),
                *(1.666652113199234e-1, 4.999999403953552e-1, 1.0, 1.0),
            ),
        )

    def _split(self, x: Reg, scale: float) -> tuple[Reg, Reg]:
        """``x * scale`` rounded to an integer, as a float and as an int32."""
        magic = self.constant(x, _ROUND)
        shifted = self.fma(x, self.constant(x, scale), magic)
        return self.sub(shifted, magic), self.w.binary("sub", self.bits(shifted), self.bits(magic))

    def exp(self, x: Reg) -> Reg:
        x = self.clamp(x, self._lowest(x) * 0.6931471805599453, 89.0)
        exponent = self._split(x, 1.44269504088896341)
        r = self.fma(exponent[0], self.constant(x, -0.693359375), x)
        r = self.fma(exponent[0], self.constant(x, 2.12194440e-4), r)
        return self._scale_by_power(self._exp_reduced(r), exponent)

    def exp2(self, x: Reg) -> Reg:
        x = self.clamp(x, self._lowest(x), 129.0)
        exponent = self._split(x, 1.0)
        r = self.mul(self.sub(x, exponent[0]), self.constant(x, 0.69314718055994531))
        return self._scale_by_power(self._exp_reduced(r), exponent)

    def _mantissa(self, x: Reg) -> tuple[Reg, Reg]:
        """``x = m * 2**e`` with m in [sqrt(1/2), sqrt(2)); gives m - 1 and e, both as floats."""
        w = self.w
        tiny = w.compare("fcmp olt", x, self.constant(x, 2.0**-126))
        x = w.select(tiny, self.mul(x, self.constant(x, 2.0**23)), x)
        raw = w.binary("sub", self.bits(x), self.integer(x, 0x3F3504F3))
        exponent = w.binary("ashr", raw, self.integer(x, 23))
        bits = w.binary("and", raw, self.integer(x, 0x7FFFFF))
        mantissa = self.floats(w.binary("add", bits, self.integer(x, 0x3F3504F3)), x)
        e = w.cast("sitofp", exponent, x.type)
        shift = w.select(tiny, self.constant(x, -23.0), self.constant(x, 0.0))
        return self.sub(mantissa, self.constant(x, 1.0)), self.add(e, shift)

    def _log_edges(self, x: Reg, value: Reg) -> Reg:
        w, zero = self.w, self.constant(x, 0.0)
        infinity = self.constant(x, float("inf"))
        value = w.select(w.compare("fcmp oeq", x, infinity), infinity, value)
        lowest = self.constant(x, float("-inf"))
        value = w.select(w.compare("fcmp oeq", x, zero), lowest, value)
        nan = self.constant(x, float("nan"))
        return w.select(w.compare("fcmp ult", x, zero), nan, value)

    def _log_tail(self, m: Reg) -> Reg:
        """log(1 + m) - m."""
        z = self.mul(m, m)
        p = self.polynomial(
            m,
            (
                *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1),
                *(1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1),
                3.3333331174e-1,
            ),
        )
        return self.fma(z, self.constant(m, -0.5), self.mul(self.mul(p, m), z))

    def log(self, x: Reg) -> Reg:
        m, e = self._mantissa(x)
        tail = self.fma(e, self.constant(x, -2.12194440e-4), self._log_tail(m))
        value = self.fma(e, self.constant(x, 0.693359375), self.add(m, tail))
        return self._log_edges(x, value)

    def log2(self, x: Reg) -> Reg:
        m, e = self._mantissa(x)
        tail = self._log_tail(m)
        # log2(e) = 1 + 0.4427: the leading part of the product stays exact.
        extra = self.mul(self.add(m, tail), self.constant(x, 0.44269504088896341))
        value = self.add(self.add(self.add(extra, tail), m), e)
        return self._log_edges(x, value)

    # -- hyperbolic and error functions -----------------------------------------------------------

    def sigmoid(self, x: Reg) -> Reg:
        one = self.constant(x, 1.0)
        negated = self.mul(x, self.constant(x, -1.0))
        return self.w.binary("fdiv", one, self.add(one, self.exp(negated)))

    def tanh(self, x: Reg) -> Reg:
        w, size, one = self.w, self.absolute(x), self.constant(x, 1.0)
        grown = self.exp(self.add(size, size))
        big = self.sub(one, w.binary("fdiv", self.constant(x, 2.0), self.add(grown, one)))
        z = self.mul(x, x)
        p = self.polynomial(
            z,
            (
                *(-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2),
                *(1.33314422036e-1, -3.33332819422e-1),
            ),
        )
        small = self.fma(self.mul(p, z), x, x)
        near = w.compare("fcmp olt", size, self.constant(x, 0.625))
        return w.select(near, small, self.with_sign(big, self.sign_of(x)))

    def erf(self, x: Reg) -> Reg:
        w = self.w
        t = self.clamp(self.absolute(x), 0.0, 4.0)
        s = self.mul(x, x)
        bounded = self.mul(t, t)
        r = self.fma(self.constant(x, -1.72853470e-5), t, self.constant(x, 3.83197126e-4))
        u = self.fma(self.constant(x, -3.88396438e-3), t, self.constant(x, 2.42546219e-2))
        r = self.fma(r, bounded, u)
        for coefficient in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
            r = self.fma(r, t, self.constant(x, coefficient))
        r = self.fma(r, t, self.mul(t, self.constant(x, -1.0)))
        far = self.with_sign(self.sub(self.constant(x, 1.0), self.exp(r)), self.sign_of(x))
        p = self.polynomial(
            s,
            (
                *(-5.96761703e-4, 4.99119423e-3, -2.67681349e-2),
                *(1.12819925e-1, -3.76125336e-1, 1.28379166e-1),
            ),
        )
        near = self.fma(p, x, x)
        is_far = w.compare("fcmp ogt", t, self.constant(x, 0.927734375))
        return w.select(is_far, far, near)

    # -- trigonometric ----------------------------------------------------------------------------

    def sin(self, x: Reg) -> Reg:
        return self._trigonometric(x, 0)

    def cos(self, x: Reg) -> Reg:
        return self._trigonometric(x, 1)

    def _trigonometric(self, x: Reg, turn: int) -> Reg:
        """sin(x + turn * pi / 2): the quarter turns are taken off in float64."""
        w, lanes = self.w, lanes_of(x.type)
        wide = w.cast("fpext", x, vector_type("double", lanes))
        magic = self.constant(wide, _ROUND_DOUBLE)
        shifted = self.add(self.mul(wide, self.constant(wide, 0.63661977236758134)), magic)
        n = self.sub(shifted, magic)
        r = wide
        for part in (
            1.57079632673412561417,
            6.07710050630396597660e-11,
            2.02226624879595063154e-21,
        ):
            r = self.fma(n, self.constant(wide, -part), r)
        quarter = w.cast("trunc", self.bits(shifted), vector_type("i32", lanes))
        quarter = w.binary("add", quarter, self.integer(x, turn))
        reduced = w.cast("fptrunc", r, x.type)
        z = self.mul(reduced, reduced)
        p = self.polynomial(z, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1))
        sine = self.fma(self.mul(p, z), reduced, reduced)
        p = self.polynomial(z, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))
        half = self.fma(z, self.constant(x, -0.5), self.constant(x, 1.0))
        cosine = self.fma(self.mul(p, z), z, half)
        odd = w.binary("and", quarter, self.integer(x, 1))
        value = w.select(w.compare("icmp ne", odd, self.integer(x, 0)), cosine, sine)
        flip = w.binary("shl", w.binary("and", quarter, self.integer(x, 2)), self.integer(x, 30))
        return self.floats(w.binary("xor", self.bits(value), flip), x)

    # -- power, in float64 ------------------------------------------------------------------------

    def pow(self, x: Reg, y: Reg) -> Reg:
        w, lanes = self.w, lanes_of(x.type)
        double = vector_type("double", lanes)
        power = self.mul(self._log2_double(self.absolute(x)), w.cast("fpext", y, double))
        value = w.cast("fptrunc", self._exp2_double(power), x.type)
        zero, one = self.constant(x, 0.0), self.constant(x, 1.0)
        whole = w.compare("fcmp oeq", self.rint(y), y)
        half = self.mul(y, self.constant(x, 0.5))
        odd = w.binary("and", whole, w.compare("fcmp une", self.rint(half), half))
        signed = self.with_sign(value, self.sign_of(x))
        value = w.select(odd, signed, value)
        finite = w.compare("fcmp one", self.absolute(x), self.constant(x, float("inf")))
        negative = w.binary("and", w.compare("fcmp olt", x, zero), finite)
        fraction = w.binary("and", negative, w.compare("fcmp one", self.rint(y), y))
        value = w.select(fraction, self.constant(x, float("nan")), value)
        trivial = w.binary("or", w.compare("fcmp oeq", y, zero), w.compare("fcmp oeq", x, one))
        return w.select(trivial, one, value)

    def _log2_double(self, x: Reg) -> Reg:
        w, lanes = self.w, lanes_of(x.type)
        m, e = self._mantissa(x)
        double = vector_type("double", lanes)
        m, e = w.cast("fpext", m, double), w.cast("fpext", e, double)
        s = w.binary("fdiv", m, self.add(m, self.constant(m, 2.0)))
        z = self.mul(s, s)
        series = self.polynomial(z, [1 / k for k in range(19, 0, -2)])
        value = self.fma(self.mul(s, series), self.constant(m, 2.8853900817779268), e)
        infinity = self.constant(x, float("inf"))
        wide_infinity = self.constant(m, float("inf"))
        value = w.select(w.compare("fcmp oeq", x, infinity), wide_infinity, value)
        lowest = self.constant(m, float("-inf"))
        value = w.select(w.compare("fcmp oeq", x, self.constant(x, 0.0)), lowest, value)
        nan = self.constant(m, float("nan"))
        return w.select(w.compare("fcmp uno", x, x), nan, value)

    def _exp2_double(self, x: Reg) -> Reg:
        x = self.clamp(x, -200.0, 200.0)
        magic = self.constant(x, _ROUND_DOUBLE)
        shifted = self.add(x, magic)
        whole = self.w.binary("sub", self.bits(shifted), self.bits(magic))
        r = self.mul(self.sub(x, self.sub(shifted, magic)), self.constant(x, 0.69314718055994531))
        coefficients, factorial = list[float](), 1.0
        for k in range(13):
            factorial *= max(1, k)
            coefficients.append(1 / factorial)
        value = self.polynomial(r, coefficients[::-1])
        biased = self.w.binary("add", whole, self.integer(x, 1023))
        return self.mul(value, self.floats(self.w.binary("shl", biased, self.integer(x, 52)), x))


def unary_functions(math: VectorMath) -> dict[str, Callable[[Reg], Reg]]:
    """The elementwise ops of one float operand by name."""
    return {
        "exp": math.exp,
        "exp2": math.exp2,
        "log": math.log,
        "log2": math.log2,
        "sqrt": math.sqrt,
        "rsqrt": math.rsqrt,
        "tanh": math.tanh,
        "sigmoid": math.sigmoid,
        "erf": math.erf,
        "sin": math.sin,
        "cos": math.cos,
        "floor": math.floor,
        "ceil": math.ceil,
        "round": math.rint,
        "abs": math.absolute,
    }
