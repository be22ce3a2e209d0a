"""What the writer of LLVM IR writes once, and where."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest

from dure.runtime.host import host_features
from dure.runtime.llvm import OptLevel, compile_module, load_object
from dure.targets.cpu.scopes import is_pure
from dure.targets.cpu.writer import Reg, Writer, integer


def lines_of(w: Writer) -> list[str]:
    return [line.strip() for line in w.text.split("\n")]


def position(w: Writer, reg: Reg) -> int:
    return next(i for i, line in enumerate(lines_of(w)) if line.startswith(f"{reg.name} = "))


A, B = Reg("i64", "%a"), Reg("i64", "%b")


def test_what_was_computed_is_used_again() -> None:
    w = Writer()
    assert w.mul(A, B) == w.mul(A, B)
    assert w.mul(A, B) != w.mul(B, A)
    assert w.load("i64", Reg("ptr", "%p")) != w.load("i64", Reg("ptr", "%p"))


def test_what_is_kept_is_loaded_once() -> None:
    """In loops inside too; and again behind it, where it may be another."""
    w, p = Writer(), Reg("ptr", "%p")
    found: list[Reg] = []

    def read() -> None:
        found.append(w.load("i64", p))

    def body(i: Reg, _: list[Reg]) -> list[Reg]:
        read()
        found.append(w.load("i64", w.offset(p, i)))
        return []

    with w.kept(read):
        w.loop(integer(0), integer(9), 1, body)
        assert w.load("float", p) != w.load("float", p)
    read()
    first, again, other, behind = found
    assert first == again
    assert len({first, other, behind}) == 3


def test_what_follows_on_a_kept_loop_stays_behind_it() -> None:
    """In a loop around both: what is computed of the inner loop's results isn't moved before it."""
    w, found = Writer(), list[Reg]()

    def outer(i: Reg, _: list[Reg]) -> list[Reg]:
        with w.kept(lambda: w.load("i64", Reg("ptr", "%p"))):
            found.extend(w.loop(integer(0), B, 1, lambda j, c: [w.add(c[0], j)], [integer(0)]))
        found.append(w.mul(found[0], A))
        return []

    w.loop(integer(0), B, 1, outer)
    lines = lines_of(w)
    result, used = found
    phi = next(n for n, line in enumerate(lines) if line.startswith(f"{result.name} = phi"))
    assert phi < position(w, used)


@pytest.mark.parametrize(
    ("text", "pure"),
    [
        ("sdiv i64 %a, 12", True),
        ("urem <8 x i64> %a, splat (i64 12)", True),
        ("sdiv i64 %a, 0", False),
        ("sdiv i64 %a, %b", False),
        ("udiv i64 %a, -1", False),
        ("call i64 @llvm.smin.i64(i64 %a, i64 %b)", True),
        ("call <8 x float> @llvm.fma.v8f32(<8 x float> %a, <8 x float> %b, <8 x float> %c)", True),
        ("call <8 x float> @llvm.masked.load.v8f32.p0(ptr %p)", False),
        ("call i64 @llvm.readcyclecounter()", False),
        ("load i64, ptr %p, align 8", False),
        ("fdiv float %a, %b", True),
    ],
)
def test_what_may_move(text: str, pure: bool) -> None:
    assert is_pure(text) == pure


def test_loops_keep_only_what_changes_in_them() -> None:
    w = Writer()
    found: dict[str, Reg] = {}

    def outer(i: Reg, _: list[Reg]) -> list[Reg]:
        def inner(j: Reg, _: list[Reg]) -> list[Reg]:
            found["whole"] = w.mul(A, B)
            found["outer"] = w.mul(i, found["whole"])
            found["inner"] = w.add(found["outer"], j)
            w.store(found["inner"], Reg("ptr", "%p"))
            return []

        found["first"] = i
        w.loop(integer(0), A, 1, inner)
        return []

    w.loop(integer(0), B, 1, outer)
    heads = [i for i, line in enumerate(lines_of(w)) if line.startswith("head")]
    outside, between, inside = (position(w, found[name]) for name in ("whole", "outer", "inner"))
    assert outside < heads[0] < between < heads[1] < inside


@pytest.mark.parametrize("looping", [False, True])
def test_a_side_of_a_branch_is_not_used_behind_it(looping: bool) -> None:
    w = Writer()
    sides: list[Reg] = []

    def side() -> None:
        def turn(i: Reg, _: list[Reg]) -> list[Reg]:
            sides.append(w.mul(A, B))
            return []

        if looping:
            w.loop(integer(0), A, 1, turn)
        else:
            turn(A, [])

    w.when(w.compare("icmp slt", A, B), side, side)
    after = w.mul(A, B)
    assert len({after, *sides}) == 3
    places = [position(w, reg) for reg in sides]
    labels = [i for i, line in enumerate(lines_of(w)) if line[:4] in ("then", "else", "join")]
    assert labels[0] < places[0] < labels[1] < places[1] < labels[2] < position(w, after)


@pytest.mark.parametrize("opt", OptLevel)
def test_what_loops_and_branches_share_is_right(opt: OptLevel) -> None:
    """Sums over two loops with a branch in them, as Python computes them."""
    w = Writer()

    def outer(i: Reg, total: list[Reg]) -> list[Reg]:
        def inner(j: Reg, total: list[Reg]) -> list[Reg]:
            slot = w.offset(Reg("ptr", "%p"), w.mul(j, integer(8)))

            def write(value: Reg) -> None:
                w.store(w.add(w.mul(A, B), w.mul(value, i)), slot)

            w.when(w.compare("icmp slt", j, i), lambda: write(A), lambda: write(w.mul(A, B)))
            return [w.add(total[0], w.add(w.load("i64", slot), w.mul(A, B)))]

        return w.loop(integer(0), B, 1, inner, total)

    last = w.loop(integer(0), A, 2, outer, [integer(0)])
    w.do(f"ret {last[0]}")
    text = f"define i64 @f(i64 %a, i64 %b, ptr %p) {{\nentry:\n{w.text}\n}}\n"
    module = load_object(compile_module(text, host_features(), opt))
    number = ctypes.c_int64
    function = ctypes.CFUNCTYPE(number, number, number, ctypes.c_void_p)(module.address("f"))

    def wanted(a: int, b: int) -> int:
        turns: Sequence[tuple[int, int]] = [(i, j) for i in range(0, a, 2) for j in range(b)]
        return sum(a * b + (a if j < i else a * b) * i + a * b for i, j in turns)

    memory = np.zeros(16, np.int64)
    for a, b in ((0, 0), (1, 1), (5, 7), (9, 16), (3, 0)):
        assert function(a, b, memory.ctypes.data) == wanted(a, b)
