"""Random kernels of loops, ifs and assignments: compiled and plain Python agree to the bit."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import lang_modes
import numpy as np
import pytest

import dure.lang as dl

HEADER = """from __future__ import annotations
import dure
import dure.lang as dl


def mix(a, b, by=3):
    if by > 2:
        return a * by - b
    return a + b


@dure.kernel
def random_kernel(x: dl.Tensor, y: dl.Tensor, n: dl.const, flag: dl.const):
    i = dl.program_id(0)
    s0, s1 = i * 2 + 1, x.shape[0]
    t0 = dl.load(x, (i,), (n,))
    t1, t2 = dl.arange(n), dl.full((n,), i + 3, dl.int32)
"""
TILES, SCALARS = ("t0", "t1", "t2"), ("s0", "s1")


class Writer:
    """Writes the lines of one random kernel."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lines: list[str] = []
        self.loops = 0

    def scalar(self, loops: tuple[str, ...]) -> str:
        pick = self.random.choice
        simple = [*SCALARS, *loops, str(self.random.randint(0, 9)), "i"]
        return pick(
            [
                pick(simple),
                f"({pick(simple)} + {pick(simple)})",
                f"({pick(simple)} * {self.random.randint(1, 3)} - {pick(simple)})",
                f"({pick(simple)} // {self.random.randint(1, 5)})",
                f"({pick(simple)} % {self.random.randint(1, 5)})",
                f"min({pick(simple)}, {pick(simple)})",
                f"max({pick(simple)}, 2)",
                f"abs({pick(simple)} - {pick(simple)})",
                f"({pick(simple)} if {self.condition(loops)} else {pick(simple)})",
            ]
        )

    def condition(self, loops: tuple[str, ...]) -> str:
        pick = self.random.choice
        names = [*SCALARS, *loops, "i", "3"]
        relation = f"{pick(names)} {pick(['<', '<=', '==', '!=', '>', '>='])} {pick(names)}"
        other = f"{pick(names)} < {pick(names)}"
        return pick([relation, f"{relation} and {other}", f"not {relation} or {other}", "flag"])

    def tile(self, loops: tuple[str, ...]) -> str:
        pick = self.random.choice
        a, b = pick(TILES), pick(TILES)
        return pick(
            [
                f"{a} + {b}",
                f"{a} - {self.scalar(loops)}",
                f"({a} ^ {b}) * 3",
                f"dl.where({a} > {b}, {a}, {self.scalar(loops)})",
                f"dl.maximum({a}, {b} - 5)",
                f"mix({a}, {b}, {self.random.randint(1, 4)})",
                f"dl.cumsum({a}, 0) + dl.sum({b}, 0)",
                f"{a} if {self.condition(loops)} else {b} + 1",
                f"({a} & 1023) % {self.random.randint(2, 9)}",
            ]
        )

    def block(self, indent: int, depth: int, loops: tuple[str, ...]) -> None:
        pad = " " * indent
        for _ in range(self.random.randint(1, 4)):
            kind = self.random.random()
            if kind < 0.45 or depth == 0:
                self.lines.append(f"{pad}{self.random.choice(TILES)} = {self.tile(loops)}")
            elif kind < 0.55:
                a, b = self.random.sample(TILES, 2)
                self.lines.append(f"{pad}{a}, {b} = {b}, {self.tile(loops)}")
            elif kind < 0.62 and not loops:
                self.lines.append(f"{pad}{self.random.choice(SCALARS)} = {self.scalar(loops)}")
            elif kind < 0.82:
                self.lines.append(f"{pad}if {self.condition(loops)}:")
                self.block(indent + 4, depth - 1, loops)
                if self.random.random() < 0.6:
                    self.lines.append(f"{pad}else:")
                    self.block(indent + 4, depth - 1, loops)
            else:
                self.loop(indent, depth, loops)

    def loop(self, indent: int, depth: int, loops: tuple[str, ...]) -> None:
        name, pad = f"k{self.loops}", " " * indent
        self.loops += 1
        bound = self.random.choice(["3", "0", "i", "s1 // 5", "dl.cdiv(s1, 4)"])
        ranges = [f"dl.range({bound})", f"range(1, {bound}, 2)"]
        if bound in "30":
            ranges.append(f"dl.static_range({bound})")
        self.lines.append(f"{pad}for {name} in {self.random.choice(ranges)}:")
        self.block(indent + 4, depth - 1, (*loops, name))

    def source(self) -> str:
        self.block(4, 3, ())
        self.lines.append("    dl.store(y, (i,), t0 + t1 * 5 + t2 * 7 + s0 + s1)")
        return HEADER + "\n".join(self.lines) + "\n"


def imported(source: str, path: Path) -> Any:
    """The kernel of a source text, which Python must be able to find in a file."""
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.random_kernel


@pytest.mark.parametrize("seed", range(40))
def test_random_kernels_agree(seed: int, tmp_path: Path) -> None:
    source = Writer(seed).source()
    kernel = imported(source, tmp_path / f"random_kernel_{seed}.py")
    x = np.random.default_rng(seed).integers(-50, 50, 13).astype(np.int32)
    expected = np.zeros(13, np.int32)
    with np.errstate(over="ignore"):
        dl.interpret(kernel)[4](x, expected, n=4, flag=bool(seed % 2))
        for mode in ("reference", "cpu") if seed % 8 == 0 else ("reference",):
            y = np.zeros(13, np.int32)
            with lang_modes.mode(mode):
                kernel[4](x, y, n=4, flag=bool(seed % 2))
            np.testing.assert_array_equal(y, expected, err_msg=source)
