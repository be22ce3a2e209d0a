"""A model's step in an artefact: its launches, and the tensors that they hand to one another.

A tensor is a *value*, by number: a name (none for what the step itself makes) and a type.  An
operand says which values an argument takes, side by side, in which form they lie, and which window
of them it sees; layers say for which tensors a value stands in each of their turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TypeVar

from dure.errors import DureError, UsageError
from dure.ir.core import Value
from dure.ir.dtypes import DTYPES
from dure.ir.expr import const, evaluate
from dure.ir.types import TensorType, static_extent
from dure.library.artefact.container import damaged
from dure.library.artefact.kernels import Writer, read_type
from dure.library.artefact.schema import LayersEntry, OperandEntry, SchemeEntry, StepEntry
from dure.library.call import IndexArray, KernelCall
from dure.library.chip_lowering import ChipCall
from dure.library.chip_tensors import Operand, Stored, Window
from dure.library.operators_common import DTYPES as NAMED
from dure.library.weight_types import WeightType
from dure.models.batch import Batch, phase_of
from dure.models.chip_step import ChipStep, Layers, StepCall

_T = TypeVar("_T")

# --- writing -------------------------------------------------------------------------------------


def step_manifest(step: ChipStep, writer: Writer) -> dict[str, object]:
    """What the manifest says of a step, whose kernels and index values go to the writer."""
    if step.chips > 1:
        raise UsageError(
            f"a step of {step.name} over {step.chips} devices",
            rule="a step is stored as one device makes it; what devices exchange hangs on the chip",
            fix="store the step of one device",
        )
    values = _Values(step.sizes)
    layers: dict[int, tuple[int, Layers]] = {}
    launches: list[dict[str, object]] = []
    for entry in step.calls:
        if entry.layers is not None:
            layers.setdefault(id(entry.layers), (len(layers), entry.layers))
        part = entry.part
        launches.append(
            {
                "name": part.name,
                "kernels": [writer.add(call) for call in part.calls],
                "operands": [[values.operand(o) for o in given] for given in part.operands],
                "layers": None if entry.layers is None else layers[id(entry.layers)][0],
                "flops": part.flops,
                "weight_bytes": part.weight_bytes,
                "kv_bytes": part.kv_bytes,
            }
        )
    inputs = [[name, writer.numbered(array)] for name, array in step.inputs.items()]
    made = [[values.number(v), writer.numbered(array)] for v, array in step.made.items()]
    return {
        "name": step.name,
        "dtype": step.dtype,
        "phase": step.batch.phase,
        "sequences": step.batch.sequences,
        "context": step.batch.context,
        "chunk": step.batch.chunk,
        "contexts": list(step.batch.contexts),
        "weight_bytes": step.weight_bytes,
        "kv_bytes": step.kv_bytes,
        "launches": launches,
        "layers": [values.layers(found) for _, found in layers.values()],
        "inputs": inputs,
        "made": made,
        "outputs": [[name, values.number(v)] for name, v in step.outputs.items()],
        "values": values.texts,
        "schemes": [_scheme(found) for found in values.schemes],
        "weights": step.weights,
        "kv": step.kv,
        "activations": step.activations,
    }


def _scheme(found: WeightType) -> dict[str, object]:
    return {
        "name": found.name,
        "code": str(found.code),
        "scale": str(found.scale),
        "group": found.group,
        "top": float(found.top),
    }


@dataclass
class _Values:
    """The values of a step whose symbols have these sizes, numbered as they come."""

    sizes: Mapping[str, int]
    numbers: dict[Value, int] = field(default_factory=dict[Value, int])
    texts: list[list[str]] = field(default_factory=list[list[str]])
    schemes: list[WeightType] = field(default_factory=list[WeightType])

    def number(self, value: Value) -> int:
        found = self.numbers.get(value)
        if found is None:
            found = self.numbers[value] = len(self.texts)
            kind = value.tensor
            shape = tuple(const(evaluate(extent, self.sizes)) for extent in kind.shape)
            plain = TensorType(shape, kind.dtype, quantized_axis=kind.quantized_axis)
            self.texts.append([value.name, str(plain)])
        return found

    def operand(self, operand: Operand | None) -> dict[str, object] | None:
        if operand is None:
            return None
        stored, window = operand.stored, operand.window
        found: dict[str, object] = {"values": [self.number(v) for v in stored.values]}
        if stored.form != "plain":
            found["form"] = stored.form
        if stored.weights is not None:
            if stored.weights not in self.schemes:
                self.schemes.append(stored.weights)
            found["weights"] = self.schemes.index(stored.weights)
        if window is not None:
            found["shape"] = list(window.shape)
            found["window"] = [window.axis, window.start, window.stop]
        return found

    def layers(self, layers: Layers) -> dict[str, object]:
        tables = [
            [self.number(value), [self.number(v) for v in turns]]
            for value, turns in layers.tables.items()
        ]
        return {"count": layers.count, "tables": tables}


# --- reading -------------------------------------------------------------------------------------


def read_step(
    entry: StepEntry, calls: Sequence[KernelCall], lists: Sequence[IndexArray], where: str
) -> ChipStep:
    """The step that the manifest tells of; raises :class:`~dure.errors.ArtefactError` for another.

    It has neither the model's config nor its tensor program.
    """
    if entry.dtype not in NAMED:
        raise damaged(f"a step in {entry.dtype[:40]}", where)
    try:
        batch = Batch(
            phase_of(entry.phase),
            entry.sequences,
            entry.context,
            entry.chunk,
            tuple(entry.contexts),
        )
    except DureError as error:
        raise damaged(error.what, where) from error
    reader = _Reader(entry, calls, lists, where)
    return ChipStep(
        name=entry.name,
        config=None,
        batch=batch,
        dtype=entry.dtype,
        calls=reader.calls(),
        weight_bytes=entry.weight_bytes,
        kv_bytes=entry.kv_bytes,
        program=None,
        sizes={},
        inputs={name: reader.indices(number) for name, number in entry.inputs},
        outputs={name: reader.value(number) for name, number in entry.outputs},
        made={reader.value(value): reader.indices(number) for value, number in entry.made},
        weights=entry.weights,
        kv=entry.kv,
        activations=entry.activations,
    )


class _Reader:
    """Values, layers and launches of a step by their numbers."""

    def __init__(
        self,
        entry: StepEntry,
        calls: Sequence[KernelCall],
        lists: Sequence[IndexArray],
        where: str,
    ) -> None:
        self.entry = entry
        self.known = calls
        self.lists = lists
        self.where = where
        # Most values have a type that others have too.
        types = {text: read_type(text, where) for text in {kind for _, kind in entry.values}}
        self.values = [Value(types[kind], name) for name, kind in entry.values]
        self.schemes = [self._scheme(found) for found in entry.schemes]
        self.layers = [self._layers(found) for found in entry.layers]

    def value(self, number: int) -> Value:
        return self._of(self.values, number, "value")

    def indices(self, number: int) -> IndexArray:
        return self._of(self.lists, number, "list")

    def calls(self) -> tuple[StepCall, ...]:
        """The launches."""
        found: list[StepCall] = []
        for launch in self.entry.launches:
            kernels = [self._of(self.known, number, "kernel") for number in launch.kernels]
            if len(launch.operands) != len(kernels):
                raise damaged(f"'{launch.name[:40]}' without operands of each kernel", self.where)
            operands = tuple(
                self._operands(call, given)
                for call, given in zip(kernels, launch.operands, strict=True)
            )
            part = ChipCall(
                launch.name,
                tuple(kernels),
                launch.flops,
                launch.weight_bytes,
                launch.kv_bytes,
                operands,
            )
            turns = None if launch.layers is None else self._of(self.layers, launch.layers, "layer")
            found.append(StepCall(part, turns))
        return tuple(found)

    def _of(self, found: Sequence[_T], number: int, what: str) -> _T:
        if number >= len(found):
            raise damaged(f"a {what} {number}, of {len(found)}", self.where)
        return found[number]

    def _scheme(self, entry: SchemeEntry) -> WeightType:
        if entry.code not in DTYPES or entry.scale not in DTYPES:
            raise damaged(f"weights in {entry.code[:40]} by {entry.scale[:40]}", self.where)
        code, scale = DTYPES[entry.code], DTYPES[entry.scale]
        return WeightType(entry.name, code, scale, entry.group, entry.top)

    def _layers(self, entry: LayersEntry) -> Layers:
        tables: dict[Value, tuple[Value, ...]] = {}
        for number, turns in entry.tables:
            value = self.value(number)
            tables[value] = tuple(self.value(turn) for turn in turns)
            kinds = {v.type for v in (value, *tables[value])}
            if len(turns) != entry.count or len(kinds) != 1:
                raise damaged(f"layers without a tensor of one type in each of {entry.count} turns",
                              self.where)  # fmt: skip
        return Layers(entry.count, tables)

    def _operands(
        self, call: KernelCall, given: Sequence[OperandEntry | None]
    ) -> tuple[Operand | None, ...]:
        if [o is None for o in given] != [kind is None for kind in call.types]:
            raise damaged(f"operands that '{call.kernel.__name__}' doesn't take", self.where)
        pairs = zip(given, call.types, strict=True)
        return tuple(None if o is None or k is None else self._operand(o, k) for o, k in pairs)

    def _operand(self, entry: OperandEntry, kind: TensorType) -> Operand:
        values = tuple(self.value(number) for number in entry.values)
        weights = None if entry.weights is None else self._of(self.schemes, entry.weights, "scheme")
        stored = Stored(values, entry.form, weights)
        shapes = [self._placed(stored, v) for v in values]
        elements = sum(map(prod, shapes))
        window = None
        if entry.window is not None:
            axis, start, stop = entry.window
            if axis >= len(entry.shape) or not start < stop <= entry.shape[axis]:
                raise damaged(f"a window of {entry.window} in {entry.shape}", self.where)
            window = Window(tuple(entry.shape), axis, start, stop)
            seen = replace(kind, shape=tuple(map(const, _put(entry.shape, axis, stop - start))))
        else:
            seen = kind
        whole = window.shape if window is not None else _shape(kind)
        fits = prod(whole) == elements and prod(_shape(seen)) == prod(_shape(kind))
        if not fits or any(s[:-1] != shapes[0][:-1] for s in shapes):
            raise damaged(f"an operand of {elements} elements for {kind}", self.where)
        return Operand(stored, window)

    def _placed(self, stored: Stored, value: Value) -> list[int]:
        """The extents of a value as it lies."""
        shape = list(_shape(value.tensor))
        if stored.form != "plain" and len(shape) < 2:
            raise damaged(f"{value.type} as {stored.form}", self.where)
        stored.turn(shape)
        return shape


def _shape(kind: TensorType) -> tuple[int, ...]:
    return tuple(static_extent(extent) or 0 for extent in kind.shape)


def _put(shape: Sequence[int], axis: int, extent: int) -> tuple[int, ...]:
    return (*shape[:axis], extent, *shape[axis + 1 :])
