"""Kernels and steps as processes of their own: their objects, and the memory that they work on.

What runs in this process by :mod:`dure.targets.cpu.launch` and :mod:`~dure.targets.cpu.program`
runs here by :mod:`dure.runtime.standalone`, on any machine that code is generated for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dure.ir.core import Function
from dure.ir.expr import evaluate
from dure.ir.sizes import tensor_bytes
from dure.ir.tensor.program import labels
from dure.runtime.cache import compile_cached
from dure.runtime.host import HostFeatures
from dure.runtime.standalone import Executable, Memory, Toolchain
from dure.targets.cpu.artifact import Artifact
from dure.targets.cpu.codegen import emit_kernel
from dure.targets.cpu.context import ARENA_WORD, SCRATCH_WORD, Arena, Param
from dure.targets.cpu.launch import kernel_module
from dure.targets.cpu.load import LoadPlan

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Standalone:
    """Objects and memory, and where results lie: the kept block and the bytes in it, by name."""

    objects: tuple[bytes, ...]
    memory: Memory
    results: Mapping[str, tuple[int, slice]]

    def run(self, tools: Toolchain, *, workers: int = 1) -> dict[str, bytes]:
        """What one run leaves in its results.  Raises what :class:`Executable` raises."""
        kept, _ = Executable(self.objects, tools).run(self.memory, workers=workers)
        return {name: kept[block][place] for name, (block, place) in self.results.items()}


def of_kernel(
    function: Function,
    host: HostFeatures,
    tensors: Sequence[bytes],
    sizes: Sequence[int],
    workers: int = 1,
) -> Standalone:
    """A tile kernel on its tensors' bytes, for at most so many workers.

    ``sizes`` are the values of its symbols, in order.  The results are the tensors that it writes.
    """
    text, scratch = kernel_module(emit_kernel(function, host))
    memory, results = Memory(), dict[str, tuple[int, slice]]()
    context = memory.add(size=4 * 8)
    memory.add()
    arguments = memory.add(size=8 * max(1, len(tensors)))
    numbers = memory.add(np.array(sizes, np.int64).tobytes())
    arena = memory.add(size=scratch * workers)
    for word, block in enumerate((arguments, numbers, arena)):
        memory.point(context, word, block)
    for place, (param, given) in enumerate(zip(function.params, tensors, strict=True)):
        written = param.access != "in"
        memory.point(arguments, place, memory.add(given, kept=written))
        if written:
            results[param.value.name] = len(results), slice(0, len(given))
    return Standalone((compile_cached(text, host),), memory, results)


def of_step(
    step: Function,
    load: LoadPlan,
    artifact: Artifact,
    values: Mapping[str, Array],
    sizes: Mapping[str, int],
) -> Standalone:
    """A compiled program with one worker; the results are its outputs.

    ``values`` are its weights as they are stored, its inputs, and states, which are zeros where
    none are given; ``sizes`` are those of its symbols.
    """
    layout, memory = artifact.layout, Memory()
    words = np.zeros(layout.words, np.int64)
    for name, word in layout.symbols.items():
        words[word] = sizes[name]
    context = memory.add(words.tobytes())
    load_context = memory.add(size=16 * len(load.weights))
    arena = memory.add(size=artifact.arena_bytes, kept=True)
    memory.point(context, ARENA_WORD, arena)
    memory.point(context, SCRATCH_WORD, memory.add(size=artifact.scratch_bytes))
    places = _parameters(step, load, values, sizes, memory, load_context)
    for word, (block, offset) in zip(layout.params, places, strict=True):
        memory.point(context, word, block, offset)
    for first, row in layout.tables:
        for number, place in enumerate(row):
            found = places[place.position] if isinstance(place, Param) else (arena, place.offset)
            memory.point(context, first + number, *found)
    results: dict[str, tuple[int, slice]] = {}
    # What is yielded after the outputs are the states.
    for number, name in enumerate(labels(step, "outputs")):
        value, place = step.body.yields[number], artifact.outputs[number]
        assert isinstance(place, Arena), f"output {name} is an input itself"
        shape = [evaluate(extent, sizes) for extent in value.tensor.shape]
        size = int(np.prod(shape)) * value.tensor.dtype.bits // 8
        results[name] = 0, slice(place.offset, place.offset + size)
    return Standalone(artifact.objects, memory, results)


def _parameters(
    step: Function,
    load: LoadPlan,
    values: Mapping[str, Array],
    sizes: Mapping[str, int],
    memory: Memory,
    load_context: int,
) -> list[tuple[int, int]]:
    """The block of each parameter, and the offset: weights that are laid out anew share one."""
    packed = memory.add(size=load.total_bytes)
    offsets = {weight.name: weight.offset for weight in load.weights}
    for number, weight in enumerate(load.weights):
        stored = memory.add(values[weight.name].tobytes())
        memory.point(load_context, 2 * number, stored)
        memory.point(load_context, 2 * number + 1, packed, weight.offset)
    found: list[tuple[int, int]] = []
    labelled = zip(labels(step, "names"), labels(step, "roles"), step.params, strict=True)
    for name, role, param in labelled:
        if name in offsets:
            found.append((packed, offsets[name]))
        elif role == "state":
            given = values[name].tobytes() if name in values else b""
            found.append((memory.add(given, tensor_bytes(param.value.tensor, sizes)), 0))
        else:
            found.append((memory.add(values[name].tobytes()), 0))
    return found
