"""Many steps on many chips: each compiled, proved and timed in a process of its own, and kept.

A :class:`Cell` is the question, an :class:`Outcome` the few numbers of the answer that tables are
made of.  What was answered is kept in the object cache under everything that decides it: the chip,
the model, the batch and dure's own source.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from dure.errors import DureError
from dure.library.answer import roofline_seconds
from dure.machine.chip import Chip
from dure.models.attainable import attainable_fraction
from dure.models.batch import Batch
from dure.models.chip_devices import Devices, answer_on
from dure.models.chip_step import ChipStep, chip_step
from dure.models.config import ModelConfig
from dure.models.encoder_config import EncoderConfig
from dure.models.shapes import any_config
from dure.runtime.cache import object_cache
from dure.runtime.garbage import collect_rarely

#: Raised whenever the meaning of what is kept changes.
FORMAT = 3
#: Folders of dure's source that decide an answer, and those inside them that don't: tables only
#: ask, and no chip's answer takes anything of the host's.
_SOURCE = ("ir", "lang", "library", "compiler", "sim", "machine", "models", "targets")
_ELSEWHERE = ("models/tables", "targets/cpu")


@dataclass(frozen=True)
class Cell:
    """A step of a model (its name, or the path of a ``config.json``) on a chip.

    ``devices`` of 0 are the fewest that hold the weights and the KV cache; ``weights``, ``kv`` and
    the ``activations`` that meet weights are of other types than the values between ops, where they
    are given.
    """

    model: str
    chip: Chip
    batch: Batch
    dtype: str = "bf16"
    devices: int = 0
    weights: str = ""
    activations: str = ""
    kv: str = ""

    @property
    def name(self) -> str:
        """What is shown of it."""
        batch = self.batch
        stored = f" in {self.weights}" if self.weights else ""
        stored += f" by {self.activations}" if self.activations else ""
        stored += f" with {self.kv} kv" if self.kv else ""
        sizes = f"{batch.phase} {batch.sequences} x {batch.context}"
        return f"{self.model}{stored} {sizes} on {self.chip.name}"


@dataclass(frozen=True)
class Outcome:
    """The answer: the time, or why there is none.

    ``devices`` are those that hold weights and KV cache, or were asked for.  ``fraction`` is of the
    published roofline of that many, ``attainable`` what could be attained of it, and
    ``roofline_ps`` the least time that it allows.
    """

    devices: int
    roofline_ps: float
    attainable: float
    ps: int | None = None
    fraction: float | None = None
    bound: str = ""
    confidence: str = ""
    guesses: tuple[str, ...] = ()
    weight_bytes: int = 0
    kv_bytes: int = 0
    tokens: int = 0
    joules: float | None = None
    why: str = ""


def outcome(cell: Cell) -> Outcome:
    """What the chip does with a step; what it can't do is said in ``why``."""
    key = _key(cell)
    found = _kept(key)
    if found is None:
        found = _outcome(cell)
        cache = object_cache()
        if cache is not None:
            cache.put(key, json.dumps(dataclasses.asdict(found)).encode())
    return found


def outcomes(cells: Sequence[Cell], jobs: int = 1) -> Iterator[tuple[int, Outcome]]:
    """The places of the cells with their outcomes as they are done, ``jobs`` at once; equal cells
    are done once.
    """
    places: dict[str, list[int]] = {}
    for place, cell in enumerate(cells):
        places.setdefault(_key(cell), []).append(place)
    # What is kept needs no process.
    todo: dict[str, list[int]] = {}
    for key, mine in places.items():
        found = _kept(key) if jobs > 1 else outcome(cells[mine[0]])
        if found is None:
            todo[key] = mine
        else:
            yield from ((place, found) for place in mine)
    if not todo:
        return
    spawning = multiprocessing.get_context("spawn")  # forks don't go with threads
    with ProcessPoolExecutor(min(jobs, len(todo)), spawning, collect_rarely) as pool:
        tasks = {pool.submit(outcome, cells[mine[0]]): mine for mine in todo.values()}
        try:
            for task in as_completed(tasks):
                yield from ((place, task.result()) for place in tasks[task])
        finally:
            pool.shutdown(cancel_futures=True)


def step_of(cell: Cell) -> ChipStep:
    """The step of a cell.  Raises :class:`DureError` for one that there isn't."""
    config = any_config(cell.model)
    types = {"weights": cell.weights, "kv": cell.kv, "activations": cell.activations}
    return chip_step(config, cell.batch, cell.dtype, cell.model, **types)


def _outcome(cell: Cell) -> Outcome:
    try:
        step = step_of(cell)
    except DureError as error:
        return Outcome(0, 0.0, 0.0, why=_said(error))
    devices = Devices(cell.devices or None).count(step, cell.chip)
    multiplied = step.multiplied(cell.chip)
    made = Outcome(
        devices,
        roofline_seconds(cell.chip, multiplied, step.flops, step.bytes) * 1e12 / devices,
        attainable_fraction(cell.chip, multiplied, step.flops, step.bytes),
        weight_bytes=step.weight_bytes,
        kv_bytes=step.kv_bytes,
        tokens=step.batch.tokens,
    )
    try:
        answer = answer_on(step, cell.chip, Devices(devices))
    except DureError as error:
        return dataclasses.replace(made, why=_said(error))
    return dataclasses.replace(
        made,
        ps=answer.ps,
        fraction=answer.fraction_of_roofline,
        bound=answer.bound,
        confidence=answer.confidence.status,
        guesses=answer.confidence.guesses,
        joules=answer.joules,
    )


def _said(error: DureError) -> str:
    return f"{error.what}: {error.rule}" if error.rule else error.what


# --- what is kept --------------------------------------------------------------------------------


def _key(cell: Cell) -> str:
    try:
        config = _text(any_config(cell.model))
    except DureError as error:
        config = str(error)
    parts = (f"cell {FORMAT}", source_digest(), repr(cell.chip), config, repr(cell.batch))
    digest = hashlib.sha256()
    types = cell.dtype, cell.weights, cell.activations, cell.kv
    for part in (*parts, cell.model, str(cell.devices), *types):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _text(config: ModelConfig | EncoderConfig) -> str:
    """A config as the same text in every process: sets have no order of their own."""
    values: dict[str, object] = {
        f.name: getattr(config, f.name) for f in fields(config) if f.compare
    }
    for name, value in values.items():
        if isinstance(value, frozenset):
            values[name] = sorted(cast("frozenset[str]", value))
    return repr(values)


@functools.cache
def source_digest() -> str:
    """A digest of the source that an answer depends on."""
    root = Path(__file__).parents[2]
    elsewhere = [root / folder for folder in _ELSEWHERE]
    digest = hashlib.sha256()
    for folder in _SOURCE:
        for path in sorted((root / folder).rglob("*.py")):
            if any(path.is_relative_to(other) for other in elsewhere):
                continue
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _kept(key: str) -> Outcome | None:
    """What was answered before."""
    cache = object_cache()
    kept = None if cache is None else cache.get(key)
    if kept is None:
        return None
    found = cast("dict[str, object]", json.loads(kept))
    found["guesses"] = tuple(cast("list[str]", found["guesses"]))
    return Outcome(**found)  # type: ignore[arg-type]
