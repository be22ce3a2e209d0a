"""Random valid tile kernels with arguments, for tests of whatever reads, changes or runs the IR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from tile_builder import Body, Kernel

from dure.ir import dtypes
from dure.ir.blocks import Blocks, quantize
from dure.ir.core import Function, Region, Value, infer
from dure.ir.dtypes import Array, DType
from dure.ir.expr import Expr, Symbol, cdiv, compare, logic, minimum
from dure.ir.types import TileType


@dataclass(frozen=True)
class Program:
    """A kernel over x (m, n), ids (m), w (n, 32) and z (m, n) giving y (m, n) and row (m, 1)."""

    function: Function
    m: int
    n: int
    exact: bool

    def arguments(self, seed: int = 0) -> list[Array | Blocks]:
        """Fresh arguments; outputs hold a pattern that isn't any result."""
        rng = np.random.default_rng(seed)
        m, n = self.m, self.n
        weights = rng.standard_normal((n, 32), np.float32)
        return [
            rng.integers(-4, 5, (m, n)).astype(np.float32),
            rng.permutation(np.arange(-1, m - 1)).astype(np.int32),
            quantize(weights, dtypes.q8_0),
            rng.integers(-3, 4, (m, n)).astype(np.int32),
            np.full((m, n), 777, np.float32),
            np.full((m, 1), 777, np.int32),
        ]


class _Generator:
    """Grows a kernel; every tile in its pool has the shape (rows, columns)."""

    def __init__(self, draw: st.DrawFn, rows: int, columns: int, exact: bool) -> None:
        self.draw, self.exact = draw, exact
        self.shape = (rows, columns)
        self.kernel = k = Kernel("random")
        m, n = k.size("m"), k.size("n")
        self.m, self.n = m, n
        self.x = k.tensor("x", (m, n))
        self.ids = k.index("ids", (m,), -1, m - 1)
        self.w = k.tensor("w", (n, 32), dtypes.q8_0, quantized_axis=1)
        self.z = k.tensor("z", (m, n), dtypes.int32)
        self.y = k.tensor("y", (m, n), access="out")
        self.row = k.tensor("row", (m, 1), dtypes.int32, access="out")
        self.i = k.program_id(cdiv(m, rows))
        self.j = k.program_id(cdiv(n, columns))
        self.symbols: list[Symbol] = [m, n, self.i, self.j]
        self.loops = 0

    def pick(self, pool: Sequence[Value], dtype: DType) -> Value | None:
        fitting = [v for v in pool if v.tile.dtype is dtype]
        return self.draw(st.sampled_from(fitting)) if fitting else None

    def expression(self) -> Expr:
        a, b = (self.draw(st.sampled_from(self.symbols)) for _ in range(2))
        k = self.draw(st.integers(1, 5))
        return self.draw(
            st.sampled_from([a + k, a * k - b, (a + b) // k, minimum(a, b * k), a % k, -a + 2])
        )

    def condition(self) -> Expr:
        relation = self.draw(st.sampled_from(["<", "<=", "==", "!="]))
        first = compare(relation, self.expression(), self.expression())
        second = self.expression() < self.draw(st.integers(-3, 9))
        return self.draw(st.sampled_from([first, logic("and", first, second), second]))

    def step(self, body: Body, pool: list[Value], depth: int) -> None:
        """Add something to ``pool``."""
        makers: list[Callable[[Body, list[Value]], Value | None]] = [
            self.load,
            self.listed,
            self.constant,
            self.unary,
            self.binary,
            self.choice,
            self.cast,
            self.reduced,
            self.reshaped,
            self.combined,
        ]
        if depth < 2:
            makers += [self.loop(depth), self.branch(depth)]
        if not self.exact:
            makers += [self.transcendental, self.product]
        made = self.draw(st.sampled_from(makers))(body, pool)
        if made is not None:
            pool.append(made)

    def steps(self, body: Body, pool: list[Value], depth: int, most: int = 5) -> None:
        for _ in range(self.draw(st.integers(1, most))):
            self.step(body, pool, depth)

    def load(self, body: Body, pool: list[Value]) -> Value | None:
        source = self.draw(st.sampled_from([self.x, self.z]))
        fill = float(self.draw(st.integers(-2, 2)))
        offset = self.draw(st.sampled_from([(0, 0), (1, 0), (0, 3)]))
        stride = self.draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
        return body.load(source, (self.i, self.j), self.shape, fill, offset=offset, stride=stride)

    def listed(self, body: Body, pool: list[Value]) -> Value | None:
        rows, _ = self.shape
        entries = body.load(self.ids, (self.i,), (rows,), -1.0)
        return body.load(self.x, (entries, self.j), self.shape, 2.0)

    def constant(self, body: Body, pool: list[Value]) -> Value | None:
        if self.draw(st.booleans()):
            return body.full(self.shape, self.expression(), dtypes.int32)
        return body.full(self.shape, float(self.draw(st.integers(-3, 3))), dtypes.float32)

    def unary(self, body: Body, pool: list[Value]) -> Value | None:
        name = self.draw(st.sampled_from(["neg", "abs", "floor"]))
        x = self.pick(pool, dtypes.float32)
        return None if x is None else body.emit(name, x)

    def transcendental(self, body: Body, pool: list[Value]) -> Value | None:
        name = self.draw(st.sampled_from(["exp", "tanh", "sigmoid", "sin", "erf"]))
        x = self.pick(pool, dtypes.float32)
        return None if x is None else body.emit(name, x)

    def binary(self, body: Body, pool: list[Value]) -> Value | None:
        dtype = self.draw(st.sampled_from([dtypes.float32, dtypes.int32]))
        a, b = self.pick(pool, dtype), self.pick(pool, dtype)
        if a is None or b is None:
            return None
        return body.emit(self.draw(st.sampled_from(["add", "sub", "mul", "min", "max"])), a, b)

    def choice(self, body: Body, pool: list[Value]) -> Value | None:
        a, b = self.pick(pool, dtypes.float32), self.pick(pool, dtypes.float32)
        if a is None or b is None:
            return None
        condition = body.emit(self.draw(st.sampled_from(["lt", "ge", "eq"])), a, b)
        return body.emit("where", condition, b, a)

    def cast(self, body: Body, pool: list[Value]) -> Value | None:
        x = self.pick(pool, dtypes.float32) or self.pick(pool, dtypes.int32)
        if x is None:
            return None
        target = dtypes.int32 if x.tile.dtype is dtypes.float32 else dtypes.float32
        return body.emit("cast", x, dtype=target)

    def reduced(self, body: Body, pool: list[Value]) -> Value | None:
        x = self.pick(pool, dtypes.int32)
        if x is None:
            return None
        combiner = self.draw(st.sampled_from(["sum", "max", "min", "argmax"]))
        axis = self.draw(st.integers(0, 1))
        small = body.emit("reduce", x, axis=axis, combiner=combiner)
        return body.emit("broadcast", small, shape=self.shape)

    def combined(self, body: Body, pool: list[Value]) -> Value | None:
        x = self.pick(pool, dtypes.int32)
        if x is None:
            return None
        args = (Value(TileType((1,), dtypes.int32)), Value(TileType((1,), dtypes.int32)))
        op = infer(self.draw(st.sampled_from(["add", "max"])), args)
        region = Region(args, (op,), (op.result,))
        identity = 0.0 if op.name == "add" else -(2.0**31)
        attrs = {"axis": self.draw(st.integers(0, 1)), "identity": identity}
        small = body.add("reduce_with", [x], attrs, [region]).result
        return body.emit("broadcast", small, shape=self.shape)

    def reshaped(self, body: Body, pool: list[Value]) -> Value | None:
        rows, columns = self.shape
        x = self.draw(st.sampled_from(pool))
        flat = body.emit("reshape", x, shape=(columns, rows))
        return body.emit("transpose", flat, order=(1, 0))

    def product(self, body: Body, pool: list[Value]) -> Value | None:
        """A dot with a dequantized or quantized weight, cut back to the pool's shape."""
        rows, columns = self.shape
        x = self.pick(pool, dtypes.float32)
        if x is None:
            return None
        one = body.emit("reduce", x, axis=1, combiner="max")
        wide = body.emit("broadcast", one, shape=(rows, 32))
        left = wide
        if self.draw(st.booleans()):
            left = body.emit("quantize", wide, format="int8_block32")
        weights = body.load(self.w, (self.j, 0), (columns, 32))
        right = body.emit("transpose", weights, order=(1, 0))
        zero = body.full(self.shape, 0.0, dtypes.float32)
        return body.emit("dot", left, right, zero)

    def loop(self, depth: int) -> Callable[[Body, list[Value]], Value | None]:
        def make(body: Body, pool: list[Value]) -> Value | None:
            start = self.draw(st.sampled_from([pool[0], pool[-1]]))
            if start.tile.dtype not in (dtypes.float32, dtypes.int32):
                return None
            self.loops += 1

            def inside(inner: Body, counter: Symbol, carried: Sequence[Value]) -> Sequence[Value]:
                self.symbols.append(counter)
                mine = [*pool, carried[0]]
                self.steps(inner, mine, depth + 1, 3)
                self.symbols.remove(counter)
                last = self.pick(mine, start.tile.dtype)
                assert last is not None
                return [inner.emit("max", carried[0], last)]

            limit = minimum(self.n, self.draw(st.integers(0, 3)))
            step = self.draw(st.integers(1, 2))
            return body.loop(limit, [start], inside, step=step, name=f"k{self.loops}")[0]

        return make

    def branch(self, depth: int) -> Callable[[Body, list[Value]], Value | None]:
        def make(body: Body, pool: list[Value]) -> Value | None:
            dtype = self.draw(st.sampled_from([dtypes.float32, dtypes.int32]))
            fallback = self.pick(pool, dtype)
            if fallback is None:
                return None

            def side(inner: Body) -> Sequence[Value]:
                mine = list(pool)
                self.steps(inner, mine, depth + 1, 3)
                return [self.pick(mine, dtype) or fallback]

            return body.choose(self.condition(), side, lambda inner: [fallback])[0]

        return make


@st.composite
def programs(draw: st.DrawFn, exact: bool = False) -> Program:
    """A random kernel.  With ``exact``, every evaluation order gives the same bits."""
    rows, columns = draw(st.sampled_from([(2, 4), (4, 4), (1, 8), (8, 2)]))
    made = _Generator(draw, rows, columns, exact)
    kernel = made.kernel
    pool = [kernel.load(made.x, (made.i, made.j), (rows, columns))]
    made.steps(kernel, pool, 0, 8)
    result = made.pick(pool, dtypes.float32)
    assert result is not None
    kernel.store(made.y, (made.i, made.j), result)
    counts = made.pick(pool, dtypes.int32)
    if counts is None:
        counts = kernel.full((rows, columns), made.i, dtypes.int32)
    largest = kernel.emit("reduce", counts, axis=1, combiner="max")
    first = kernel.full((rows, 1), 1.0, dtypes.int32)

    def stored(inner: Body) -> Sequence[Value]:
        inner.store(made.row, (made.i, 0), inner.emit("add", largest, first))
        return []

    kernel.choose(made.j < 1, stored, lambda inner: [])
    sizes = st.integers(0, 9)
    return Program(kernel.function(), draw(sizes), draw(sizes), exact)
