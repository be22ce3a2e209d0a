"""Tile sizes that were left open: remembered, measured by :func:`tune`, or estimated.

Choices are kept in memory and in ``tiles.json`` in dure's cache folder, under a key of the
kernel's source, its consts, the arguments' forms, their sizes up to the next power of two, and
the machine.  A file that is damaged or can't be written only costs the choice.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dure import settings
from dure.compiler.tiles import TileMachine, ranked
from dure.errors import DureError, KernelError
from dure.ir.core import Function
from dure.ir.expr import Symbol
from dure.ir.types import TensorType
from dure.lang.binding import Arguments, Form, form_of, match, type_of
from dure.lang.launch import adopt_all, array_of

if TYPE_CHECKING:
    from dure.lang.kernel import Kernel

_FILE = "tiles.json"
_MEMORY: dict[str, dict[str, int]] = {}
#: Candidates of the cost model that tune measures, and seconds that it spends by default.
_MEASURED = 8
_BUDGET = 5.0
#: Products that tile registers (AMX) add up while vectors add one.
_TILES = 16


def choose_consts(
    kernel: Kernel,
    arguments: Arguments,
    forms: Sequence[Form | None],
    shapes: Sequence[tuple[int, ...] | None],
) -> dict[str, int]:
    """The compiler's choice for a launch's open consts."""
    key = _key(kernel, arguments, [repr(f) for f in forms], shapes)
    found = _remembered(key)
    if found is not None and set(found) == set(arguments.open):
        return found
    types, sizes = _types(arguments, forms, shapes)
    ranking = ranked(_specializer(kernel, types, arguments), arguments.open, sizes, cpu_machine())
    _remember(key, ranking[0][1])
    return ranking[0][1]


def choose_for_types(
    kernel: Kernel,
    types: Sequence[TensorType | None],
    consts: Mapping[str, object],
    names: tuple[str, ...],
) -> dict[str, int]:
    """The cost model's choice for constant shapes (nothing is remembered)."""
    arguments = Arguments((), (), dict(consts), names)
    return ranked(_specializer(kernel, types, arguments), names, {}, cpu_machine())[0][1]


def tune(
    kernel: Kernel, *args: object, grid: object = None, budget: float = _BUDGET, **consts: object
) -> dict[str, int]:
    """Measure the open consts of a kernel on these arguments, and remember the fastest.

    The cost model's best candidates run on copies of the arrays for at most ``budget`` seconds
    altogether.  Later launches with arguments of these forms and of like sizes use what was found,
    which is also returned.  Raises KernelError for bad arguments, and where no const is open.
    """
    arguments = match(kernel.signature, args, consts)
    if not arguments.open:
        raise KernelError(
            f"kernel '{kernel.__name__}' has no open const to tune",
            rule="dure.tune measures consts that have neither value nor default",
            fix="leave the tile sizes out of the call",
        )
    views = adopt_all(kernel.__name__, arguments)
    forms = [
        None if v is None else form_of(n, v) for n, v in zip(arguments.names, views, strict=True)
    ]
    shapes = [None if v is None else v.shape for v in views]
    types, sizes = _types(arguments, forms, shapes)
    ranking = ranked(_specializer(kernel, types, arguments), arguments.open, sizes, cpu_machine())
    copies = tuple(None if v is None else np.array(array_of(v)) for v in views)
    ended = time.perf_counter() + budget
    best, fastest = ranking[0][1], math.inf
    for _, candidate in ranking[:_MEASURED]:
        chosen = {**arguments.consts, **candidate}
        trial = Arguments(arguments.names, copies, chosen, ())
        seconds = _measure(lambda t=trial: kernel.launcher.launch(grid, t), ended)
        if seconds < fastest:
            best, fastest = candidate, seconds
        if time.perf_counter() > ended:
            break
    _remember(_key(kernel, arguments, [repr(f) for f in forms], shapes), best)
    kernel.forget()
    return best


def _measure(run: Callable[[], object], ended: float) -> float:
    """The least seconds of a few runs, the first of which compiles."""
    try:
        run()
    except DureError:
        return math.inf
    fastest = math.inf
    for _ in range(7):
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
        if time.perf_counter() > ended:
            break
    return fastest


def _types(
    arguments: Arguments,
    forms: Sequence[Form | None],
    shapes: Sequence[tuple[int, ...] | None],
) -> tuple[list[TensorType | None], dict[str, int]]:
    types = [
        None if f is None else type_of(n, f) for n, f in zip(arguments.names, forms, strict=True)
    ]
    sizes: dict[str, int] = {}
    for type, shape in zip(types, shapes, strict=True):
        if type is not None and shape is not None:
            for extent, number in zip(type.shape, shape, strict=True):
                assert isinstance(extent, Symbol)
                sizes[extent.name] = number
    return types, sizes


def _specializer(
    kernel: Kernel, types: Sequence[TensorType | None], arguments: Arguments
) -> Callable[[Mapping[str, int]], Function]:
    def specialize(values: Mapping[str, int]) -> Function:
        return kernel.specialize(types, {**arguments.consts, **values})

    return specialize


@functools.cache
def cpu_machine() -> TileMachine:
    """The host as the cost model sees it, from the CPU's machine file and what it detects.

    The memory's bandwidth is not measured for a choice of tiles: a worker is taken to get half of
    what it gets from the last cache.
    """
    from dure.runtime.host import default_workers, host_features
    from dure.targets.cpu.machine import describe

    machine = describe()
    vector, clock = machine.engine("vector"), machine.clock.base
    issue = {name: quantity.base for name, quantity in vector.issue}
    lanes = int(vector.width.base) // 32
    levels: list[tuple[int, float]] = []
    for name in ("l1d", "l2", "l3"):
        cache = machine.memory(name)
        assert cache.bandwidth is not None
        levels.append((int(cache.size.base), cache.bandwidth.base * clock))
    dot_flops = clock * issue["dot"] * 2 * lanes
    tiles = host_features().has("amx-bf16")
    return TileMachine(
        workers=default_workers(),
        lanes=lanes,
        # A fused multiply-add is two operations.
        dot_flops=dot_flops,
        vector_flops=clock * issue["elementwise"] * lanes,
        levels=tuple(levels),
        memory_bandwidth=levels[-1][1] / 2,
        dot_rows=6 if vector.registers.base <= 16 else 12,
        tile_flops=_TILES * dot_flops if tiles else 0.0,
    )


# --- what is remembered -------------------------------------------------------------------------


def _key(
    kernel: Kernel,
    arguments: Arguments,
    forms: Sequence[str],
    shapes: Sequence[tuple[int, ...] | None],
) -> str:
    source = kernel.source
    node = source.node
    text = "".join(source.lines[node.lineno - 1 : node.end_lineno])
    consts = {name: _stable(value) for name, value in sorted(arguments.consts.items())}
    like = [None if s is None else [e.bit_length() for e in s] for s in shapes]
    parts = [text, repr(consts), repr(list(forms)), repr(like), repr(cpu_machine())]
    return hashlib.sha256("\0".join([*parts, *arguments.open]).encode()).hexdigest()[:32]


def _stable(value: object) -> str:
    """A const's text that is the same in every process."""
    if callable(value):
        code = getattr(value, "__code__", None)
        body = hashlib.sha256(code.co_code).hexdigest()[:16] if code is not None else ""
        return f"{getattr(value, '__qualname__', type(value).__name__)} {body}"
    return repr(value)


def _remembered(key: str) -> dict[str, int] | None:
    found = _MEMORY.get(key)
    if found is None:
        found = _MEMORY[key] = _stored().get(key, {})
    return found or None


def _stored() -> dict[str, dict[str, int]]:
    """What the file holds; nothing if it is missing or damaged."""
    try:
        loaded: Any = json.loads((settings.cache_dir() / _FILE).read_text(encoding="utf-8"))
        return {
            str(key): {str(n): int(v) for n, v in cast("dict[str, Any]", entry).items()}
            for key, entry in cast("dict[str, Any]", loaded).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(key: str, chosen: dict[str, int]) -> None:
    _MEMORY[key] = chosen
    if settings.cache_limit_bytes() == 0:
        return
    folder = settings.cache_dir()
    entries = {**_stored(), key: chosen}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=_FILE)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(entries, file, indent=1, sort_keys=True)
        Path(name).replace(folder / _FILE)
    except OSError:
        return
