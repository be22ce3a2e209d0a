"""A compiled program in memory: its weights, states and arena, and the call that runs a step.

Python's part of a step is to check the inputs, store their addresses in the context, and call the
pool once.  Inputs are read where they are; outputs are views of the arena, valid until the next
step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dure.errors import TargetError, UsageError
from dure.ir.core import Function
from dure.ir.dtypes import DType
from dure.ir.expr import bounds, evaluate
from dure.ir.sizes import tensor_bytes
from dure.ir.tensor.program import labels
from dure.ir.types import TensorType
from dure.runtime import llvm
from dure.runtime.forks import StepLock
from dure.runtime.memory import Buffer, available_bytes
from dure.runtime.pool import Pool, shared_pool
from dure.targets.cpu.artifact import Artifact, link
from dure.targets.cpu.context import CHECK, LOAD, STEP, Arena, Event, Param
from dure.targets.cpu.inputs import Array, inputs_of, outside
from dure.targets.cpu.load import LoadPlan


class CompiledProgram:
    """A program ready to run; made by :func:`dure.compiler.compile_program`.

    ``stored`` is the program as written (weights as a file stores them), ``step`` the one over
    laid-out parameters, ``load`` the plan of what is laid out anew.
    """

    def __init__(
        self,
        stored: Function,
        step: Function,
        load: LoadPlan,
        artifact: Artifact,
        workers: int | None = None,
    ) -> None:
        self.name = step.name
        self.step = step
        self.report = artifact.report
        self._artifact = artifact
        self._plan = load
        self._pool: Pool = shared_pool(workers)
        self._types = [p.value.tensor for p in step.params]
        self._stored = [p.value.tensor for p in stored.params]
        self._names = list(labels(step, "names"))
        self._roles = list(labels(step, "roles"))
        self._outputs = list(labels(step, "outputs"))
        self._output_types = [v.tensor for v in step.body.yields]
        self._bounds = {s.name: (bounds(s)[0] or 0, bounds(s)[1]) for s in step.symbols}
        self._link()
        self._kept: dict[str, object] = {}
        self._context = np.zeros(artifact.layout.words, np.int64)
        self._context_address = _address(self._context)
        self._running = StepLock()
        self._arena = Buffer(max(1, artifact.arena_bytes), alignment=128)
        self._scratch = Buffer(max(1, artifact.scratch_bytes * self._pool.workers), alignment=128)
        self._context[0] = self._arena.address
        self._context[1] = self._scratch.address
        self._stamps = self._recording()
        words = artifact.layout.params
        self._inputs = inputs_of(self._names, self._roles, self._types, words)
        self._bound: Mapping[str, int] | None = None
        self._views: dict[tuple[int, tuple[int, ...]], Array] = {}
        self._missing = {n for n, r in zip(self._names, self._roles, strict=True) if r != "input"}
        self._fixed: dict[str, int] = {}
        self.states: dict[str, Buffer] = {}

    def _recording(self) -> npt.NDArray[np.int64] | None:
        """Memory for the times of a step that records."""
        layout = self._artifact.layout
        if not layout.stamp_count:
            return None
        shape = self._pool.workers, layout.stamp_count
        memory = Buffer(8 * shape[0] * shape[1], alignment=128)
        self._kept["stamps"] = memory
        self._context[layout.stamps] = memory.address
        return memory.view(shape, np.int64)

    def _link(self) -> None:
        found = link(self._artifact)
        self._modules: list[llvm.LoadedModule] = [module for module, _ in found.values()]
        self._step = found[STEP][1]
        self._load_function = found[LOAD][1] if LOAD in found else 0
        check = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
        self._check = check(found[CHECK][1])

    @property
    def workers(self) -> int:
        """The workers of a step."""
        return self._pool.workers

    @property
    def arena_bytes(self) -> int:
        """Bytes of the buffers of a step."""
        return self._artifact.arena_bytes

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights that are laid out anew."""
        return self._plan.total_bytes

    @property
    def weight_types(self) -> dict[str, TensorType]:
        """The stored type of each weight by name: what :meth:`load` takes."""
        entries = zip(self._names, self._roles, self._stored, strict=True)
        return {name: kind for name, role, kind in entries if role == "weight"}

    # Weights and states -------------------------------------------------------------------------

    def load(self, weights: Mapping[str, Array | memoryview | bytes]) -> None:
        """Lays the weights out, in parallel; called once before the first step.

        Each is its stored bytes (any dtype, contiguous), as :attr:`weight_types` describes.  Those
        that are used as they are stay where they are; the program keeps them alive.
        """
        given = {name: self._stored_bytes(name, weights) for name in self.weight_types}
        moved = {weight.name for weight in self._plan.weights}
        for position, name in enumerate(self._names):
            if self._roles[position] == "weight" and name not in moved:
                self._kept[name] = given[name]
                self._point(position, _address(given[name]))
                self._missing.discard(name)
        if moved:
            self._relayout(given)
        self._fill_tables()

    def _stored_bytes(self, name: str, weights: Mapping[str, Any]) -> Array:
        if name not in weights:
            raise UsageError(
                f"weight '{name}' is missing",
                rule=f"'{self.name}' takes {len(self.weight_types)} weights",
                fix="load every weight at once",
            )
        value: Any = weights[name]
        array: Array = value if _is_array(value) else np.frombuffer(value, np.uint8)
        kind = self.weight_types[name]
        needed = tensor_bytes(kind)
        if array.nbytes != needed or not array.flags.c_contiguous:
            raise UsageError(
                f"weight '{name}' has {array.nbytes} bytes",
                rule=f"it is {kind}: {needed} contiguous bytes",
                fix="pass the tensor's bytes as the file stores them",
            )
        return array

    def _relayout(self, given: Mapping[str, Array]) -> None:
        self._require_memory(self._plan.total_bytes, "its weights")
        packed = Buffer(self._plan.total_bytes, alignment=128)
        self._kept["packed weights"] = packed
        context = np.empty(2 * len(self._plan.weights), np.int64)
        positions = {name: i for i, name in enumerate(self._names)}
        for number, weight in enumerate(self._plan.weights):
            address = packed.address + weight.offset
            context[2 * number] = _address(given[weight.name])
            context[2 * number + 1] = address
            self._point(positions[weight.name], address)
            self._missing.discard(weight.name)
        self._pool.run(self._load_function, _address(context))

    def allocate_states(self, sizes: Mapping[str, int] | None = None) -> dict[str, Buffer]:
        """Zeroed memory for every state; ``sizes`` gives the symbols in their shapes, for good."""
        self._fixed.update(sizes or {})
        kinds = [k for k, r in zip(self._types, self._roles, strict=True) if r == "state"]
        self._require_memory(sum(tensor_bytes(k, self._fixed) for k in kinds), "its states")
        for position, name in enumerate(self._names):
            if self._roles[position] != "state":
                continue
            kind = self._types[position]
            buffer = Buffer(max(1, tensor_bytes(kind, self._fixed)), alignment=128)
            self.states[name] = buffer
            self._point(position, buffer.address)
            self._missing.discard(name)
        self._fill_tables()
        return self.states

    def _require_memory(self, needed: int, what: str) -> None:
        """Says before taking memory that there isn't enough; the system would kill us later."""
        free = available_bytes()
        if free and needed > free:
            raise TargetError(
                f"'{self.name}' needs {needed:,} bytes for {what}",
                rule=f"the system has {free:,} bytes to give",
                fix="use a smaller model, context or batch, or end other programs",
            )

    def _point(self, position: int, address: int) -> None:
        self._context[self._artifact.layout.params[position]] = address

    def _fill_tables(self) -> None:
        layout = self._artifact.layout
        for first, places in layout.tables:
            for number, place in enumerate(places):
                if isinstance(place, Param):
                    self._context[first + number] = self._context[layout.params[place.position]]
                else:
                    self._context[first + number] = self._arena.address + place.offset

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the last step by name."""
        symbols = self._artifact.layout.symbols
        return {name: int(self._context[word]) for name, word in symbols.items()}

    @property
    def events(self) -> list[Event]:
        """What a step executes that stamps its times; empty unless compiled with ``recorded``."""
        return self._artifact.layout.events

    def stamps(self) -> npt.NDArray[np.int64]:
        """Cycles of the processor's counter, (workers, :attr:`events`' places): when each worker
        of the last step began (place 0) and ended what.  Raises :class:`UsageError` unless the
        program was compiled with ``recorded=True``.
        """
        if self._stamps is None:
            raise UsageError(
                f"'{self.name}' keeps no times",
                rule="a step that records is compiled so",
                fix="compile it with recorded=True",
            )
        return self._stamps.copy()

    # A step -------------------------------------------------------------------------------------

    def run(
        self, inputs: Mapping[str, Array], sizes: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        """Runs one step; gives the named outputs, which the next step overwrites.

        ``sizes`` gives the symbols that no input's shape tells.  Raises :class:`UsageError` for
        inputs of another dtype or shape, sizes outside their bounds and indices outside their
        declared range.
        """
        if self._missing:
            raise UsageError(
                f"'{self.name}' has no {sorted(self._missing)[0]}",
                rule="weights are loaded and states allocated before the first step",
                fix="call load() and allocate_states()",
            )
        with self._running:
            arrays = self._inputs.arrays(inputs)
            values = self._inputs.sizes(arrays, {**self._fixed, **(sizes or {})})
            if values is not self._bound:
                self._bind_sizes(values)
            kept = self._inputs.place(arrays, self._context)
            failed = self._check(self._context_address)
            if failed:
                wrong = next(i for i in self._inputs.entries if i.position == failed - 1)
                raise outside(wrong, inputs[wrong.name])
            self._pool.run(self._step, self._context_address)
        del kept
        return {name: self._output(i, values) for i, name in enumerate(self._outputs)}

    def _bind_sizes(self, values: Mapping[str, int]) -> None:
        self._bound = None
        for name, word in self._artifact.layout.symbols.items():
            value = values.get(name)
            low, high = self._bounds[name]
            if value is None or value < low or (high is not None and value > high):
                raise UsageError(
                    f"size {name} is {value}",
                    rule=f"{name} lies in [{low}, {high}] for '{self.name}'",
                    fix=f"pass inputs, or sizes={{'{name}': ...}}, inside that range",
                )
            self._context[word] = value
        self._bound = values

    def _output(self, number: int, values: Mapping[str, int]) -> Array:
        kind, place = self._output_types[number], self._artifact.outputs[number]
        assert isinstance(kind.dtype, DType), f"output {self._outputs[number]} is {kind}"
        shape = tuple(evaluate(extent, values) for extent in kind.shape)
        view = self._views.get((number, shape))
        if view is not None:
            return view
        if isinstance(place, Arena):
            if len(self._views) > 256:
                self._views.clear()
            view = self._arena.view(shape, kind.dtype.numpy, place.offset)
            self._views[number, shape] = view
            return view
        raise UsageError(
            f"output '{self._outputs[number]}' is the input '{self._names[place.position]}' itself",
            rule="an output is computed by the program",
            fix="leave it out of the outputs",
        )


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray)


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])
