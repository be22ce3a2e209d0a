"""Machine programs and chips drawn at random, for the timing simulator: they need not make sense,
but they run to their end."""

from __future__ import annotations

import random
from typing import Any

from programs import Program, law, number, toy_chip, toy_tables

from dure.ir.core import Function, Value
from dure.ir.expr import Expr, as_expr
from dure.ir.types import TensorType
from dure.machine.chip import Chip

QUEUES = ("in", "near", "out", "mxu", "vec")


def random_chip(rng: random.Random) -> Chip:
    """The toy chip with other numbers, a second loader, and a shared fabric on some routes."""
    tables = toy_tables(8)
    tables["fabrics"]["ring"] = {
        "scope": "chip",
        "bandwidth": number(rng.choice([60, 200]), "GB/s"),
    }
    tables["dma"]["second"] = {**tables["dma"]["loader"], "queue": "near"}
    tables["memories"]["hbm"]["bandwidth"] = number(rng.choice([40, 120, 1000]), "GB/s")
    for dma in tables["dma"].values():
        dma["outstanding"] = number(rng.choice([1, 2, 3, 8]))
        dma["bandwidth"] = number(rng.choice([33, 90, 400]), "GB/s")
        dma["latency"] = number(rng.choice([50, 300, 777]), rng.choice(["ns", "cycle"]))
        dma["issue"] = number(rng.choice([1, 7, 40]), rng.choice(["ns", "cycle"]))
        dma["serial"] = rng.random() < 0.3
        dma["route"] = rng.sample(["hbm", "bus", "ring"], rng.randint(0, 3))
        dma["efficiency"] = {
            **law(rng.choice(["1", "min(1, run / (run + overhead))"])),
            "unit": "1",
        }
        for optional in ("stream", "granule", "descriptor", "efficiency"):
            if rng.random() < 0.3:
                del dma[optional]
    for memory in tables["memories"].values():
        if rng.random() < 0.5:
            memory["contention"] = number(rng.choice([0.22, 0.5, 0.9]))
    tables["sync"]["latency"] = number(rng.choice([1, 11, 90]), "ns")
    tables["clock"] = number(rng.choice([0.7, 0.9, 1.3]), "GHz")
    return Chip.model_validate(tables)


class RandomProgram:
    """One random program; ``cores`` is its grid."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.grid = rng.choice([(1,), (3,), (2, 2), (5,)])
        self.p = Program("random", grid=self.grid)
        rows, columns = rng.randint(5, 40), rng.choice([32, 48, 64])
        self.tensors = [
            self.p.tensor("x", (rows, columns)),
            self.p.tensor("h", (rows, columns), "bfloat16"),
            self.p.tensor("q", (rows, 64), rng.choice(["q8_0", "q4_1"])),
        ]
        self.y = self.p.tensor("y", (rows, columns), access="out")
        self.buffers = [self._buffer(t) for t in (*self.tensors, self.y)]
        self.square = self.p.buffer("square", (16, 16), stages=2)
        self.semaphores: dict[Value, tuple[str, str]] = {}
        self.level: dict[Value, int] = {}
        for number_ in range(rng.randint(2, 7)):
            initial = rng.randint(0, 2)
            made = self.p.semaphore(f"s{number_}", initial, 1000)
            self.semaphores[made] = (rng.choice(QUEUES), rng.choice(QUEUES))
            self.level[made] = initial
        self.loops = 0

    def _buffer(self, tensor: Value) -> Value:
        kind: TensorType = tensor.tensor
        columns = 64 if kind.block else self.rng.choice([16, 32])
        axis = 1 if kind.block else -1
        shape = (self.rng.randint(1, 9), 32 if kind.block and self.rng.random() < 0.5 else columns)
        return self.p.buffer(
            f"b_{tensor.name}", shape, kind.dtype.name, stages=2, quantized_axis=axis
        )

    def build(self) -> Function:
        self.body(list(self.p.ids), self.level, self.rng.randint(5, 12), 0)
        return self.p.build()

    def body(self, symbols: list[Expr], level: dict[Value, int], length: int, depth: int) -> None:
        """Random instructions.  ``level``: what may be waited for here, whatever came before."""
        rng = self.rng
        for _ in range(length):
            kind = rng.random()
            if kind < 0.12 and depth < 2:
                self._loop(symbols, depth)
            elif kind < 0.2 and depth < 2:
                condition = rng.choice(symbols) < rng.randint(0, 3)
                with self.p.when(condition):
                    self.body(
                        symbols, dict.fromkeys(self.semaphores, 0), rng.randint(1, 4), depth + 1
                    )
            elif kind < 0.5:
                self._move(symbols)
            elif kind < 0.65:
                self._compute()
            elif kind < 0.85:
                semaphore = rng.choice(list(self.semaphores))
                count = rng.randint(1, 2)
                self.p.signal(self.semaphores[semaphore][0], semaphore, count)
                level[semaphore] += count
            else:
                for semaphore, (_, waiter) in self.semaphores.items():
                    if level[semaphore] and rng.random() < 0.6:
                        count = rng.randint(1, level[semaphore])
                        self.p.wait(waiter, semaphore, count)
                        level[semaphore] -= count

    def _loop(self, symbols: list[Expr], depth: int) -> None:
        rng = self.rng
        self.loops += 1
        start = rng.choice([0, 0, rng.choice(symbols)])
        stop = as_expr(start) + rng.choice([rng.randint(0, 4), rng.choice(symbols) + 1])
        with self.p.loop(stop, start=start, step=rng.choice([1, 1, 2]), name=f"i{self.loops}") as i:
            level = dict.fromkeys(self.semaphores, 0)
            self.body([*symbols, i], level, rng.randint(1, 6), depth + 1)

    def _index(self, symbols: list[Expr]) -> Expr:
        rng = self.rng
        return rng.choice(symbols) * rng.randint(0, 2) + rng.choice(symbols) + rng.randint(-1, 1)

    def _move(self, symbols: list[Expr]) -> None:
        rng, p = self.rng, self.p
        share = (1, rng.choice([1, 1, 2, 3]))
        if rng.random() < 0.3:
            p.store("out", self.y, self.buffers[-1], (self._index(symbols), 0), share=share)
            return
        which = rng.randrange(3)
        tensor, buffer, queue = self.tensors[which], self.buffers[which], rng.choice(["in", "near"])
        more: dict[str, Any] = {"share": share}
        if which < 2:
            more["stride"] = rng.choice([(1, 1), (2, 1), (1, 2)])
            more["offset"] = (rng.randint(-2, 2), rng.randint(-2, 5))
        elif rng.random() < 0.5:
            rows = as_expr(tensor.tensor.shape[0])
            tensor = p.view(tensor, 0, rng.choice([0, 1]), rows - rng.randint(0, 2))
        column = 0 if rng.random() < 0.6 else self._index(symbols)
        p.load(queue, tensor, buffer, (self._index(symbols), column), **more)

    def _compute(self) -> None:
        rng, x = self.rng, self.square
        if rng.random() < 0.4:
            self.p.compute("mxu", ["mxu"], [x], [x], lambda t, a: t("dot", a, a, a))
        else:
            names = rng.choices(["exp", "neg", "sqrt", "abs"], k=rng.randint(1, 3))

            def work(t: Any, a: Value) -> Value:
                for name in names:
                    a = t(name, a)
                row = t("reduce", a, axis=1, combiner="sum")
                return t("add", a, t("broadcast", row, shape=(16, 16)))

            self.p.compute("vec", ["vec"], [x], [x], work)


def random_case(seed: int) -> tuple[Function, Chip]:
    rng = random.Random(seed)
    return RandomProgram(rng).build(), random_chip(rng)


def unshared_chip() -> Chip:
    """The toy chip where no transfer takes bandwidth from another."""
    plenty = number(1000, "TB/s")
    return toy_chip(
        8,
        memories__hbm__bandwidth=plenty,
        fabrics__bus__bandwidth=plenty,
        dma__loader__bandwidth=plenty,
        dma__storer__bandwidth=plenty,
        dma__second={**toy_tables()["dma"]["loader"], "queue": "near", "bandwidth": plenty},
    )
