"""Faults in machine programs, drawn by seed: what a compiler, or a person, may get wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dure.errors import IRError
from dure.ir.core import Function, Op, Region, Value
from dure.ir.verifier import verify

#: Operation indices and region indices by turns, from the function's body to an op.
Path = tuple[int, ...]


@dataclass(frozen=True)
class Mutant:
    """A program with one fault."""

    kind: str
    detail: str
    function: Function


def ops_of(region: Region, above: Path = ()) -> Iterator[tuple[Path, Op]]:
    """Every op outside of computes, with its path."""
    for place, op in enumerate(region.ops):
        yield (*above, place), op
        if op.name in ("for", "if"):
            for number, inner in enumerate(op.regions):
                yield from ops_of(inner, (*above, place, number))


def rewritten(region: Region, path: Path, change: Callable[[Op], Sequence[Op]]) -> Region:
    """The region with the op at a path replaced."""
    place, *rest = path
    ops = list(region.ops)
    if not rest:
        ops[place : place + 1] = change(ops[place])
    else:
        number, inner = rest[0], tuple(rest[1:])
        regions = list(ops[place].regions)
        regions[number] = rewritten(regions[number], inner, change)
        ops[place] = replace(ops[place], regions=tuple(regions))
    return replace(region, ops=tuple(ops))


def _attr(op: Op, **attrs: object) -> Op:
    return replace(op, attrs={**op.attrs, **attrs})  # type: ignore[dict-item]


class _Mutations:
    def __init__(self, function: Function, rng: random.Random) -> None:
        self.function = function
        self.rng = rng
        self.ops = list(ops_of(function.body))

    def pick(self, *names: str) -> tuple[Path, Op] | None:
        found = [(p, op) for p, op in self.ops if op.name in names]
        return self.rng.choice(found) if found else None

    def apply(self, path: Path, change: Callable[[Op], Sequence[Op]]) -> Function:
        return self.function.with_body(rewritten(self.function.body, path, change))

    def drop_wait(self) -> tuple[str, Function] | None:
        return self._drop("wait")

    def drop_signal(self) -> tuple[str, Function] | None:
        return self._drop("signal")

    def drop_rotate(self) -> tuple[str, Function] | None:
        return self._drop("rotate")

    def _drop(self, name: str) -> tuple[str, Function] | None:
        found = self.pick(name)
        if found is None:
            return None
        return f"{found[1].operands[0].name} at {found[0]}", self.apply(found[0], lambda _: [])

    def wrong_count(self) -> tuple[str, Function] | None:
        found = self.pick("wait", "signal", "semaphore")
        if found is None:
            return None
        path, op = found
        key = "initial" if op.name == "semaphore" else "count"
        value = int(op.attr(key)) + self.rng.choice((-1, 1))
        low = 0 if key == "initial" else 1
        if value < low or (key == "initial" and value > op.attr("maximum")):
            return None
        return f"{op.name} {key}={value} at {path}", self.apply(
            path, lambda o: [_attr(o, **{key: value})]
        )

    def swap_buffer(self) -> tuple[str, Function] | None:
        """Another buffer of the same type and memory in an operand's place."""
        found = self.pick("dma_load", "dma_store", "compute")
        if found is None:
            return None
        path, op = found
        buffers = {o.result: o.attr("memory") for _, o in self.ops if o.name == "buffer"}
        place = self.rng.randrange(len(op.operands)) if op.name == "compute" else 1
        old = op.operands[place]
        others = [
            b
            for b, memory in buffers.items()
            if b is not old and b.type == old.type and memory == buffers[old]
        ]
        if not others:
            return None
        new = self.rng.choice(others)
        operands = tuple(new if n == place else v for n, v in enumerate(op.operands))
        detail = f"{new.name} for {old.name} in {op.name} at {path}"
        return detail, self.apply(path, lambda o: [replace(o, operands=operands)])

    def shift_address(self) -> tuple[str, Function] | None:
        found = self.pick("buffer")
        if found is None:
            return None
        path, op = found
        offset, size = int(op.attr("offset")), max(8, int(op.attr("pitch")) or 8)
        by = self.rng.choice((-size, -size // 2, -4, 4, size // 2, size))
        if offset + by < 0:
            return None
        detail = f"{op.result.name} by {by}"
        return detail, self.apply(path, lambda o: [_attr(o, offset=offset + by)])

    def shrink_buffer(self) -> tuple[str, Function] | None:
        """A slot less, or slots closer to each other than a tile is large."""
        found = self.pick("buffer")
        if found is None:
            return None
        path, op = found
        stages, pitch = int(op.attr("stages")), int(op.attr("pitch"))
        if stages == 1:
            return None
        if self.rng.random() < 0.6:
            change = {"stages": stages - 1}
        else:
            change = {"pitch": pitch // 2}
        return f"{op.result.name} {change}", self.apply(path, lambda o: [_attr(o, **change)])

    def reorder(self) -> tuple[str, Function] | None:
        """Two neighbours of a queue change places."""
        bodies: dict[Path, list[tuple[int, Op]]] = {}
        for path, op in self.ops:
            bodies.setdefault(path[:-1], []).append((path[-1], op))
        pairs: list[tuple[Path, int, int]] = []
        for above, entries in bodies.items():
            queued = [(n, o) for n, o in entries if "queue" in o.attrs]
            for queue in sorted({str(o.attrs["queue"]) for _, o in queued}):
                own = [n for n, o in queued if o.attrs["queue"] == queue]
                pairs += [(above, a, b) for a, b in pairwise(own)]
        if not pairs:
            return None
        above, a, b = self.rng.choice(pairs)
        nodes = dict(bodies[above])
        first, second = nodes[a], nodes[b]
        body = rewritten(self.function.body, (*above, a), lambda _: [second])
        body = rewritten(body, (*above, b), lambda _: [first])
        return f"{first.name} and {second.name} at {above}", self.function.with_body(body)


KINDS = (
    "drop_wait",
    "drop_signal",
    "drop_rotate",
    "wrong_count",
    "swap_buffer",
    "shift_address",
    "shrink_buffer",
    "reorder",
)


def mutant(function: Function, rng: random.Random, kind: str = "") -> Mutant | None:
    """One fault of a kind (any, if not given), or None where the draw doesn't fit the program."""
    kind = kind or rng.choice(KINDS)
    made = getattr(_Mutations(function, rng), kind)()
    if made is None:
        return None
    detail, broken = made
    try:
        verify(broken)
    except IRError:
        return None
    return Mutant(kind, detail, broken)


def mutants(function: Function, seed: int, count: int) -> list[Mutant]:
    """``count`` faults by seed, kinds by turns."""
    rng = random.Random(seed)
    found: list[Mutant] = []
    for draw in range(count * 20):
        if len(found) == count:
            break
        made = mutant(function, rng, KINDS[draw % len(KINDS)])
        if made is not None:
            found.append(made)
    return found


__all__ = ["KINDS", "Mutant", "Value", "mutant", "mutants"]
