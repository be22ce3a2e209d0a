"""Small machine programs for the sanitizer: pipelines that are right, at random or by hand, and
programs of ops drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from mutation import mutant
from programs import Program, copy_program, matmul_program

from dure.ir.core import Function, Value
from dure.ir.expr import Expr, IntLike, as_expr

SHAPE = (2, 2)
ROWS = 12


def _compute(p: Program, queue: str, reads: Sequence[Value], writes: Sequence[Value]) -> None:
    def work(tiles: object, *values: Value) -> list[Value]:
        assert callable(tiles)
        if values:
            return [values[0] for _ in writes]
        return [tiles("full", shape=SHAPE, value=0.0, dtype=w.tile.dtype) for w in writes]

    p.compute(queue, [queue], reads, writes, work)


class Pipeline:
    """load -> compute ... -> store over rings of slots, each guarded by a full and a free
    semaphore (or by neither, between computes of one queue)."""

    def __init__(self, p: Program, rng: random.Random, trips: IntLike) -> None:
        self.p, self.rng, self.trips = p, rng, trips
        self.x = p.tensor("x", (ROWS, 2))
        self.y = p.tensor("y", (ROWS, 2), access="out")
        actors = rng.choice((0, 1, 1, 2))
        self.queues = ["in", *(rng.choice(("mxu", "vec")) for _ in range(actors)), "out"]
        scale = rng.choice((1, 1, 1, 2))
        self.scale = scale
        self.rings: list[Value] = []
        self.full: list[Value | None] = []
        self.free: list[Value | None] = []
        for n in range(len(self.queues) - 1):
            stages = rng.randint(1, 3)
            self.rings.append(p.buffer(f"ring{n}", SHAPE, stages=stages, pitch=16))
            same = self.queues[n] == self.queues[n + 1]
            slack = rng.choice((0, 0, 1))
            full, free = f"full{n}", f"free{n}"
            most = (stages + slack) * scale
            self.full.append(None if same else p.semaphore(full, maximum=most))
            first = stages * scale
            self.free.append(None if same else p.semaphore(free, initial=first, maximum=most))

    def act(self, n: int, place: IntLike) -> None:
        """Actor ``n`` on element ``place``."""
        p, queue, last = self.p, self.queues[n], len(self.queues) - 1
        if n > 0:
            self._sync("wait", queue, self.full[n - 1])
        if n < last:
            self._sync("wait", queue, self.free[n])
        if n == 0:
            p.load(queue, self.x, self.rings[0], (place, 0))
        elif n == last:
            p.store(queue, self.y, self.rings[-1], (place, 0))
        else:
            _compute(p, queue, [self.rings[n - 1]], [self.rings[n]])
        if n > 0:
            self._sync("signal", queue, self.free[n - 1])
        if n < last:
            self._sync("signal", queue, self.full[n])

    def _sync(self, name: str, queue: str, semaphore: Value | None) -> None:
        if semaphore is not None:
            getattr(self.p, name)(queue, semaphore, self.scale)

    def body(self, place: IntLike) -> None:
        for n in range(len(self.queues)):
            self.act(n, place)
        self.p.rotate(*self.rings)

    def build(self) -> None:
        """The loop, plain or with the load of the next iteration before the rest of this one."""
        p = self.p
        ahead = p_stages(p, self.rings[0]) == 2 and self.rng.random() < 0.4
        if not ahead:
            with p.loop(self.trips, name="i") as i:
                self.body(i)
            return
        with p.when(as_expr(0) < self.trips):
            self.act(0, 0)
        with p.loop(self.trips, name="i") as i:
            p.rotate(self.rings[0])
            with p.when(i + 1 < self.trips):
                self.act(0, i + 1)
            p.rotate(self.rings[0])
            for n in range(1, len(self.queues)):
                self.act(n, i)
            p.rotate(*self.rings)


def p_stages(p: Program, buffer: Value) -> int:
    """The slots of a buffer."""
    return next(int(op.attr("stages")) for op in p.top if op.results == (buffer,))


def pipeline(seed: int, trips: int | None = None) -> Function:
    """A pipeline drawn by seed; it is right."""
    rng = random.Random(seed)
    p = Program(f"pipeline{seed}")
    Pipeline(p, rng, rng.randint(0, 4) if trips is None else trips).build()
    return p.build()


def unknown_pipeline(seed: int, low: int, high: int) -> Function:
    """The same, its trip count an element of an index argument."""
    rng = random.Random(seed)
    p = Program(f"unknown{seed}")
    lengths = p.tensor("lengths", (4,), "int32", index=(low, high))
    trips = p.scalar(lengths, (0,), "n")
    Pipeline(p, rng, trips).build()
    return p.build()


class Soup:
    """Ops at random."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.p = p = Program(f"soup{seed}")
        self.x = p.tensor("x", (ROWS, 2))
        self.y = p.tensor("y", (ROWS, 2), access="out")
        self.buffers = [
            p.buffer(
                f"b{n}",
                SHAPE,
                stages=rng.randint(1, 3),
                pitch=16,
                offset=rng.choice((None, None, None, 0, 8, 16)),
            )
            for n in range(rng.randint(1, 3))
        ]
        self.queues = rng.sample(["in", "out", "mxu", "vec"], rng.randint(2, 3))
        self.semaphores: list[tuple[Value, str, str]] = []
        for n in range(rng.randint(1, 3)):
            initial = rng.choice((0, 0, 1, 2))
            semaphore = p.semaphore(f"s{n}", initial=initial, maximum=initial + rng.randint(0, 2))
            self.semaphores.append((semaphore, rng.choice(self.queues), rng.choice(self.queues)))
        self.left = rng.randint(3, 9)

    def build(self) -> Function:
        self.some(0, 0)
        return self.p.build()

    def some(self, depth: int, place: IntLike) -> None:
        rng = self.rng
        while self.left > 0:
            self.left -= 1
            draw = rng.random()
            if draw < 0.12 and depth < 2:
                with self.p.loop(rng.randint(0, 3 - depth), name=f"i{depth}") as i:
                    self.some(depth + 1, i)
            elif draw < 0.18 and isinstance(place, Expr):
                with self.p.when(place < rng.randint(1, 2)):
                    self.one(place)
            elif draw < 0.26 and depth:
                return
            else:
                self.one(place)

    def one(self, place: IntLike) -> None:
        rng, p = self.rng, self.p
        draw = rng.random()
        semaphore, signals, waits = rng.choice(self.semaphores)
        if draw < 0.22:
            p.signal(signals, semaphore, rng.choice((1, 1, 2)))
        elif draw < 0.4:
            p.wait(waits, semaphore, rng.choice((1, 1, 2)))
        elif draw < 0.5:
            p.rotate(rng.choice(self.buffers))
        else:
            self.work(rng.choice(self.queues), place)

    def work(self, queue: str, place: IntLike) -> None:
        rng, p = self.rng, self.p
        buffer = rng.choice(self.buffers)
        row: IntLike = rng.choice((place, place, rng.randint(0, 2)))
        if queue == "in":
            p.load(queue, self.x, buffer, (row, 0))
        elif queue == "out":
            p.store(queue, self.y, buffer, (row, 0))
        else:
            reads = [] if rng.random() < 0.4 else [rng.choice(self.buffers)]
            _compute(p, queue, reads, [buffer])


def random_program(seed: int) -> Function:
    """A pipeline with up to two faults, or ops at random."""
    rng = random.Random(seed)
    if rng.random() < 0.35:
        return Soup(seed).build()
    function = pipeline(seed)
    for _ in range(rng.choice((0, 1, 1, 2))):
        made = mutant(function, rng)
        function = function if made is None else made.function
    return function


def epilogue(tiles: int = 3, depth: int = 2) -> Function:
    """A matmul's tiles: ``mxu`` accumulates in one of two slots while ``vec`` empties the other."""
    p = Program("epilogue")
    a, b = p.tensor("a", (ROWS, 8)), p.tensor("b", (8, 2))
    c = p.tensor("c", (ROWS, 2), access="out")
    left, right = (p.buffer(n, SHAPE, stages=2, pitch=16) for n in ("left", "right"))
    total, result = (p.buffer(n, SHAPE, stages=2, pitch=16) for n in ("total", "result"))
    loaded, used = p.semaphore("loaded", 0, 2), p.semaphore("used", 2, 2)
    summed, emptied = p.semaphore("summed", 0, 2), p.semaphore("emptied", 2, 2)
    ready, stored = p.semaphore("ready", 0, 2), p.semaphore("stored", 2, 2)
    with p.loop(tiles, name="i") as i:
        p.wait("mxu", emptied)
        p.compute("mxu", ["mxu"], [], [total], lambda t: t.full(SHAPE, 0.0))
        with p.loop(depth, name="k") as k:
            p.wait("in", used)
            p.load("in", a, left, (i, k))
            p.load("in", b, right, (k, 0))
            p.signal("in", loaded)
            p.wait("mxu", loaded)
            p.compute(
                "mxu",
                ["mxu"],
                [left, right, total],
                [total],
                lambda t, x, y, z: t("dot", x, y, z),
            )
            p.signal("mxu", used)
            p.rotate(left, right)
        p.signal("mxu", summed)
        p.wait("vec", summed)
        p.wait("vec", stored)
        _compute(p, "vec", [total], [result])
        p.signal("vec", emptied)
        p.signal("vec", ready)
        p.wait("out", ready)
        p.store("out", c, result, (i, 0))
        p.signal("out", stored)
        p.rotate(total, result)
    return p.build()


def online_softmax(blocks: int = 3) -> Function:
    """Attention over blocks of keys: ``mxu`` scores and accumulates, ``vec`` weighs in between."""
    p = Program("softmax")
    q, kv = p.tensor("q", (2, 2)), p.tensor("kv", (ROWS, 2))
    y = p.tensor("y", (2, 2), access="out")
    query = p.buffer("query", SHAPE, pitch=16)
    block = p.buffer("block", SHAPE, stages=2, pitch=16)
    scores, weights = p.buffer("scores", SHAPE, pitch=16), p.buffer("weights", SHAPE, pitch=16)
    total, best = p.buffer("total", SHAPE, pitch=16), p.buffer("best", SHAPE, pitch=16)
    asked, cleared = p.semaphore("asked", 0, 1), p.semaphore("cleared", 0, 1)
    loaded, used = p.semaphore("loaded", 0, 2), p.semaphore("used", 2, 2)
    scored, weighed = p.semaphore("scored", 0, 1), p.semaphore("weighed", 0, 1)
    summed, done = p.semaphore("summed", 0, 1), p.semaphore("done", 0, 1)

    def dot(t: Any, x: Value, y: Value, z: Value) -> Value:
        return t("dot", x, y, z)

    p.load("in", q, query, (0, 0))
    p.signal("in", asked)
    p.wait("mxu", asked)
    _compute(p, "vec", [], [total])
    _compute(p, "vec", [], [best])
    p.signal("vec", cleared)
    p.wait("mxu", cleared)
    with p.loop(blocks, name="b") as b:
        p.wait("in", used)
        p.load("in", kv, block, (b, 0))
        p.signal("in", loaded)
        p.wait("mxu", loaded)
        p.compute("mxu", ["mxu"], [query, block, query], [scores], dot)
        p.signal("mxu", scored)
        p.wait("vec", scored)
        _compute(p, "vec", [scores, best, total], [weights, best, total])
        p.signal("vec", weighed)
        p.wait("mxu", weighed)
        p.compute("mxu", ["mxu"], [weights, block, total], [total], dot)
        p.signal("mxu", used)
        p.signal("mxu", summed)
        p.wait("vec", summed)
        p.rotate(block)
    _compute(p, "vec", [total], [total])
    p.signal("vec", done)
    p.wait("out", done)
    p.store("out", y, total, (0, 0))
    return p.build()


def edge_copy(rows: int = 5, clear: bool = True) -> Function:
    """A copy whose last tile is cut, by an engine that doesn't fill; a compute clears it first."""
    p = Program("edge")
    x, y = p.tensor("x", (rows, 2)), p.tensor("y", (8, 2), access="out")
    tile = p.buffer("tile", SHAPE, stages=2, pitch=16)
    cleared, full = p.semaphore("cleared", 0, 2), p.semaphore("full", 0, 2)
    free = p.semaphore("free", 2, 2)
    with p.loop(-(-rows // 2), name="i") as i:
        p.wait("vec", free)
        if clear:
            with p.when(as_expr(rows) < i * 2 + 2):
                _compute(p, "vec", [], [tile])
        p.signal("vec", cleared)
        p.wait("in", cleared)
        p.load("in", x, tile, (i, 0), filling=False)
        p.signal("in", full)
        p.wait("out", full)
        p.store("out", y, tile, (i, 0))
        p.signal("out", free)
        p.rotate(tile)
    return p.build()


def correct_programs() -> list[Function]:
    """Programs without a fault, small enough for the explorer."""
    return [
        copy_program(40, 4, 8),
        copy_program(24, 4, 8, stages=3),
        matmul_program(16, 16, 32, (16, 16, 16)),
        epilogue(2, 2),
        epilogue(3, 1),
        online_softmax(2),
        edge_copy(),
        edge_copy(3),
        *(pipeline(seed, 3) for seed in range(12)),
    ]
