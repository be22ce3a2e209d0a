"""Where in a program cores can differ, and in what.

A *site* is a number that the streams hang on: how often a loop turns, which branch is taken, how
many elements of a transfer's axis exist.  It is a function of the symbols in it; only sites that
hang on the core's coordinates, directly or by way of loop variables and index reads, are watched.
A site's table is its value for every turn of just those loops around it that it hangs on, so the
tables are short where the program is long.  Branches are no part of that: a table may hold more
than is executed, and so tell apart cores that execute the same; never the other way.  Only index
reads stay in their branches, for they may be out of bounds elsewhere.  Cores with equal tables at
all sites execute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from dure.ir.expr import Expr
from dure.ir.expr_code import Evaluator, compile_expr, names_of

Env: TypeAlias = dict[str, int]
#: Sets a symbol in the environment; once for each of its values there.
Turns: TypeAlias = Callable[[Env], Iterator[None]]
#: What tells a site from others.
SiteKey: TypeAlias = tuple[object, ...]


@dataclass(frozen=True, eq=False, slots=True)
class _Step:
    """Something around a site: a loop, an index read (``binds`` a symbol), or a branch."""

    binds: str
    needs: frozenset[str]
    turns: Turns
    reads: bool = False


class Sites:
    """The sites of a program; ``cores`` are the names of the program's ids."""

    def __init__(self, cores: frozenset[str]) -> None:
        self._cores = cores
        self._around: list[_Step] = []
        self._sites: dict[SiteKey, tuple[tuple[_Step, ...], Evaluator]] = {}
        #: Sites in the order of the program, which may come to one several times.
        self.watched: list[SiteKey] = []

    def __bool__(self) -> bool:
        return bool(self._sites)

    # --- finding them ----------------------------------------------------------------------------

    @contextmanager
    def loop(self, name: str, start: Expr, stop: Expr, step: int) -> Generator[None]:
        """The sites inside a loop."""
        first, last = compile_expr(start), compile_expr(stop)

        def turns(env: Env) -> Iterator[None]:
            for counter in range(first(env), last(env), step):
                env[name] = counter
                yield

        def count(env: Mapping[str, int]) -> int:
            return len(range(first(env), last(env), step))

        self.watch((start, stop), count, step)
        with self._inside(_Step(name, names_of(start) | names_of(stop), turns)):
            yield

    @contextmanager
    def branch(self, condition: Expr, taken: bool) -> Generator[None]:
        """The sites inside a branch, which is run where the condition is ``taken``."""
        holds = compile_expr(condition)

        def turns(env: Env) -> Iterator[None]:
            if bool(holds(env)) == taken:
                yield

        self.watch((condition,), holds)
        with self._inside(_Step("", names_of(condition), turns)):
            yield

    def read(self, name: str, exprs: Sequence[Expr], bind: Callable[[Env], None]) -> None:
        """An index read, for the rest of the body that it stands in."""

        def turns(env: Env) -> Iterator[None]:
            bind(env)
            yield

        needs = frozenset[str]().union(*map(names_of, exprs))
        self._around.append(_Step(name, needs, turns, True))

    def watch(self, exprs: Sequence[Expr], value: Evaluator, *more: object) -> None:
        """A site whose ``value`` is made of these expressions (and ``more``, constants)."""
        names = frozenset[str]().union(*map(names_of, exprs))
        if not self._varies(names):
            return
        steps: list[_Step] = []
        reads = False
        for step in reversed(self._around):
            if step.binds in names or (reads and not step.binds):
                steps.append(step)
                names |= step.needs
                reads |= step.reads
        steps.reverse()
        key = (*map(id, steps), *exprs, *more)
        self._sites.setdefault(key, (tuple(steps), value))
        self.watched.append(key)

    def _varies(self, names: frozenset[str]) -> bool:
        """Whether cores can differ in what hangs on these symbols."""
        for step in reversed(self._around):
            if step.binds in names:
                names |= step.needs
        return bool(names & self._cores)

    @contextmanager
    def _inside(self, step: _Step) -> Generator[None]:
        size = len(self._around)
        self._around.append(step)
        yield
        del self._around[size:]

    # --- asking them -----------------------------------------------------------------------------

    def tables(
        self, core: Mapping[str, int], watched: Iterable[SiteKey] | None = None
    ) -> tuple[int, ...]:
        """All sites' tables, or these ones', for one core, one after another with their lengths."""
        found: list[int] = []
        for key in self._sites if watched is None else watched:
            steps, value = self._sites[key]
            table: list[int] = []
            _fill(steps, 0, value, dict(core), table)
            found.append(len(table))
            found += table
        return tuple(found)


def _fill(steps: Sequence[_Step], at: int, value: Evaluator, env: Env, table: list[int]) -> None:
    if at == len(steps):
        table.append(value(env))
        return
    for _ in steps[at].turns(env):
        _fill(steps, at + 1, value, env, table)
