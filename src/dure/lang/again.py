"""Launches like earlier ones, without the way through Python.

After a launch on NumPy's arrays whose grid follows from the stores, what was checked is kept as
a pattern (:mod:`dure.runtime.direct`), by the consts that were given.  A later launch whose arrays
fit a pattern needs no other check: nothing of it depends on values.  What has index arguments,
whose values are checked, or consts that aren't simple, is launched the longer way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from dure.ir.dtypes import BlockFormat, DType
from dure.lang.binding import plain_key
from dure.lang.frontend.source import Captured, cell_value
from dure.lang.interpreter import INTERPRETING
from dure.lang.launch import EXECUTOR, CpuRunner, Launched, cpu_executor
from dure.lang.values import BUILDER
from dure.runtime.direct import Direct

#: Consts by name, as ``plain_key`` tells them apart.
_Consts: TypeAlias = tuple[tuple[str, tuple[type, object]], ...]
#: Consts, and which arguments are None.
_Key: TypeAlias = tuple[_Consts, tuple[int, ...]]

_SIMPLE = frozenset({int, float, bool, str, type(None), DType, BlockFormat})
#: Sets of consts that are kept.
_MOST = 64


@dataclass(frozen=True, slots=True)
class _Entry:
    """Patterns, and the names from outside that the kernel used: how to look each up, and what it
    was.  ``places`` says where they are.
    """

    direct: Direct
    watched: list[tuple[Callable[[str], object], str, object]]
    places: dict[tuple[int, str], object]

    def watch(self, name: Captured) -> bool:
        """Watch a name, too; False where it was something else before."""
        place = id(name.place), name.name
        if place not in self.places:
            self.places[place] = name.value
            self.watched.append((_look_up(name), name.name, name.value))
        return self.places[place] is name.value


class Again:
    """The patterns of one kernel."""

    def __init__(self) -> None:
        self._known: dict[_Key, _Entry] = {}
        #: Whether a launch that is kept had arguments that are None.
        self._absent = False

    def __call__(self, args: Sequence[object], keywords: Mapping[str, object]) -> bool:
        """Launch if a pattern fits; whether one did."""
        consts, absent = _consts(keywords) if keywords else (), ()
        if consts is None:
            return False
        if self._absent:
            args, absent = _present(args)
        entry = self._known.get((consts, absent))
        if entry is None or BUILDER.get() is not None or INTERPRETING.get():
            return False
        if EXECUTOR.get() is not cpu_executor:
            return False
        for get, name, value in entry.watched:
            if get(name) is not value:
                self._known.clear()
                return False
        direct = entry.direct
        return direct.pool.call(direct.function, args, direct.helpers)

    def remember(
        self, args: Sequence[object], keywords: Mapping[str, object], launched: Launched
    ) -> None:
        """Keep a launch that was made the longer way, if a pattern can stand for it."""
        ready, runner = launched.ready, launched.ready.runner
        consts = _consts(keywords)
        args, absent = _present(args)
        if consts is None or not isinstance(runner, CpuRunner) or len(args) != len(launched.views):
            return
        params = ready.specialization.function.params
        if any(type(a) is not np.ndarray for a in args):
            return
        if any(p.value.tensor.index is not None for p in params):
            return
        key, compiled = (consts, absent), runner.compiled
        entry = self._known.get(key)
        if entry is None or entry.direct.helpers is not compiled.pool.helpers:
            direct = Direct.on(compiled.pool)
            if direct is None or len(self._known) >= _MOST:
                return
            entry = self._known[key] = _Entry(direct, [], {})
        if not all(entry.watch(name) for name in ready.specialization.captured):
            self._known.clear()  # earlier launches were made with what a name meant then
            return
        entry.direct.remember(
            cast("Sequence[Any]", args),
            launched.views,
            ready.stored,
            compiled.step,
            compiled.arena.address,
            launched.sizes,
            launched.instances,
        )
        entry.direct.kept.append(ready)
        self._absent |= bool(absent)

    def forget(self) -> None:
        """Take the longer way again: other tile sizes may be better now."""
        self._known.clear()


def _look_up(name: Captured) -> Callable[[str], object]:
    """What gives the object that a name stands for."""
    if isinstance(name.place, dict):
        return name.place.get
    cell = name.place
    return lambda _: cell_value(cell)


def _present(args: Sequence[object]) -> tuple[Sequence[object], tuple[int, ...]]:
    """The arguments that aren't None, and where the others are."""
    absent = tuple([place for place, value in enumerate(args) if value is None])
    return ([value for value in args if value is not None], absent) if absent else (args, ())


def _consts(keywords: Mapping[str, object]) -> _Consts | None:
    """The consts of a call; None where one of them isn't simple."""
    if not _SIMPLE.issuperset(map(type, keywords.values())):
        return None
    return tuple([(name, plain_key(value)) for name, value in keywords.items()])
