"""The manifest of an artefact: what its sections are.  Imports pydantic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dure.library.artefact.container import damaged
from dure.library.chip_tensors import Form

Count = Annotated[int, Field(ge=0, le=1 << 62)]
Number = Annotated[int, Field(ge=0, le=1 << 20)]
Size = Annotated[int, Field(ge=1, le=1 << 40)]
Text = Annotated[str, Field(max_length=10_000)]
_MOST_ENTRIES = 1 << 16


class Entry(BaseModel):
    """A part of the manifest.  Keys of later releases are ignored: what must not be ignored takes
    a new format.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class KernelEntry(Entry):
    """A kernel: the types of its arguments (None for an absent one), the names of its tile sizes,
    and its index arguments: place among the arguments and number of the list.
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    arguments: Annotated[list[Text | None], Field(max_length=256)]
    open: Annotated[list[Text], Field(max_length=16)]
    lists: Annotated[list[tuple[Number, Number]], Field(max_length=256)]


class WorkEntry(Entry):
    """An operator or a kernel: launches one after another, by number of the kernel."""

    name: Text
    dims: Text
    dtype: Text
    launches: Annotated[list[Number], Field(min_length=1, max_length=_MOST_ENTRIES)]
    flops: Count | None
    bytes: Count


class OperandEntry(Entry):
    """What an argument takes: values side by side, in a form, whose codes and scales are of the
    ``weights`` of this number; and of those, seen as ``shape``, the part from a start to a stop
    along an axis, where there is a ``window``.
    """

    values: Annotated[list[Number], Field(min_length=1, max_length=64)]
    form: Form = "plain"
    weights: Number | None = None
    shape: Annotated[list[Size], Field(max_length=16)] = []
    window: tuple[Number, Count, Count] | None = None


class SchemeEntry(Entry):
    """Codes of a dtype with scales of a dtype, one for ``group`` codes, or one for all where that
    is 0; ``top`` is the largest code of what is quantized.
    """

    name: Text
    code: Text
    scale: Text
    group: Number
    top: Annotated[float, Field(gt=0, le=1e30)]


class LaunchEntry(Entry):
    """A launch of a step: several kernels that compute the same, with the operands of each, and
    the number of the layers in each turn of which it is made, or None for once.
    """

    name: Text
    kernels: Annotated[list[Number], Field(min_length=1, max_length=64)]
    operands: Annotated[
        list[Annotated[list[OperandEntry | None], Field(max_length=256)]], Field(max_length=64)
    ]
    layers: Number | None
    flops: Count
    weight_bytes: Count
    kv_bytes: Count


class LayersEntry(Entry):
    """Equal layers: how many turns, and the values that a value stands for, one a turn."""

    count: Annotated[int, Field(ge=1, le=_MOST_ENTRIES)]
    tables: Annotated[list[tuple[Number, list[Number]]], Field(max_length=4096)]


class StepEntry(Entry):
    """A model's step.  ``inputs`` and ``made`` are index values, given by name and made by the step
    itself; ``values`` are names and types of tensors; ``weights``, ``kv`` and ``activations`` are
    what the types of weights, KV cache and quantized rows are called.
    """

    name: Text
    dtype: Text
    phase: Text
    sequences: Size
    context: Size
    chunk: Count = 0
    contexts: Annotated[list[Size], Field(max_length=_MOST_ENTRIES)] = []
    weight_bytes: Count
    kv_bytes: Count
    launches: Annotated[list[LaunchEntry], Field(min_length=1, max_length=_MOST_ENTRIES)]
    layers: Annotated[list[LayersEntry], Field(max_length=4096)]
    inputs: Annotated[list[tuple[Text, Number]], Field(max_length=4096)]
    made: Annotated[list[tuple[Number, Number]], Field(max_length=4096)]
    outputs: Annotated[list[tuple[Text, Number]], Field(max_length=4096)]
    values: Annotated[list[tuple[Text, Text]], Field(max_length=1 << 20)]
    schemes: Annotated[list[SchemeEntry], Field(max_length=64)]
    weights: Text
    kv: Text
    #: Artefacts of before there was a choice have none.
    activations: Text = ""


class Manifest(Entry):
    """What an artefact holds: ``ops`` are those of its kernels, ``lists`` the shapes of its index
    values; it is either an operator's or kernel's work, or a model's step.
    """

    ops: Annotated[list[Text], Field(max_length=4096)]
    kernels: Annotated[list[KernelEntry], Field(min_length=1, max_length=_MOST_ENTRIES)]
    lists: Annotated[list[Annotated[list[Size], Field(max_length=16)]], Field(max_length=1 << 16)]
    work: WorkEntry | None = None
    step: StepEntry | None = None


def manifest_text(found: Mapping[str, object]) -> str:
    """The JSON of a manifest, a line for each entry of its lists and of its parts' lists."""
    return _lines(found, 4, "") + "\n"


def _lines(value: Any, levels: int, indent: str) -> str:
    inner = indent + " "
    if levels and isinstance(value, dict) and value:
        named = cast("dict[str, Any]", value)
        parts = [f"{json.dumps(n)}: {_lines(v, levels - 1, inner)}" for n, v in named.items()]
        return f"{{\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}}}"
    if levels and isinstance(value, list) and value:
        parts = [json.dumps(v, ensure_ascii=False) for v in cast("list[Any]", value)]
        return f"[\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def read_manifest(text: str, where: str) -> Manifest:
    """The manifest that a text is; raises :class:`~dure.errors.ArtefactError` for another."""
    try:
        found = Manifest.model_validate_json(text)
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise damaged(f"its manifest: {place}: {first['msg']}", where) from None
    if (found.work is None) == (found.step is None):
        raise damaged("its manifest holds neither one work nor one step", where)
    return found
