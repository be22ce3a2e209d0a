"""The inputs of a step: checked, and put where native code reads them.

Small inputs are copied into places of their own (cheaper than asking NumPy for an address, and a
strided array costs nothing more); large ones are read where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dure.errors import UsageError
from dure.ir.dtypes import DType
from dure.ir.expr import Const, Expr, Symbol, bounds, evaluate
from dure.ir.sizes import tensor_bytes
from dure.ir.types import TensorType
from dure.runtime.memory import Buffer

Array = npt.NDArray[Any]

#: Inputs of at most so many bytes are copied.
_COPIED_BYTES = 1 << 16
#: Views that are remembered for an input: one for each shape.
_VIEWS = 256


@dataclass
class Input:
    """What a step needs to know of an input, found once.

    ``symbols`` and ``numbers`` are (axis, name) and (axis, extent) of the shape's extents that are
    symbols or known, ``derived`` (axis, expression) of the rest.  ``word`` is the context's.
    """

    name: str
    position: int
    word: int
    type: TensorType
    dtype: np.dtype[Any]
    symbols: tuple[tuple[int, str], ...]
    numbers: tuple[tuple[int, int], ...]
    derived: tuple[tuple[int, Expr], ...]
    buffer: Buffer | None = None
    views: dict[tuple[int, ...], Array] = field(default_factory=dict[tuple[int, ...], Array])

    @staticmethod
    def of(name: str, position: int, word: int, kind: TensorType) -> Input:
        """The input of a program's parameter."""
        assert isinstance(kind.dtype, DType), f"input {name} is {kind}"
        extents = list(enumerate(kind.shape))
        bounded = all(bounds(extent)[1] is not None for extent in kind.shape)
        size = tensor_bytes(kind) if bounded else _COPIED_BYTES + 1
        return Input(
            name,
            position,
            word,
            kind,
            np.dtype(kind.dtype.numpy),
            tuple((axis, e.name) for axis, e in extents if isinstance(e, Symbol)),
            tuple((axis, e.value) for axis, e in extents if isinstance(e, Const)),
            tuple((axis, e) for axis, e in extents if not isinstance(e, Symbol | Const)),
            Buffer(max(1, size)) if size <= _COPIED_BYTES else None,
        )

    def check(self, array: Array, values: dict[str, int]) -> None:
        """Refuse another dtype or shape; extents are added to ``values`` or compared with them."""
        shape = array.shape
        right = array.dtype == self.dtype and len(shape) == len(self.type.shape)
        if right:
            for axis, name in self.symbols:
                right = right and values.setdefault(name, shape[axis]) == shape[axis]
            for axis, number in self.numbers:
                right = right and shape[axis] == number
        if not right:
            raise UsageError(
                f"input '{self.name}' is {array.dtype} of shape {shape}",
                rule=f"it is {self.type} (sizes so far: {values})",
                fix="pass an array of that dtype and shape",
            )

    def check_derived(self, array: Array, values: Mapping[str, int]) -> None:
        """Refuse a shape that the sizes contradict."""
        for axis, extent in self.derived:
            if array.shape[axis] != evaluate(extent, values):
                raise UsageError(
                    f"input '{self.name}' has shape {array.shape}",
                    rule=f"it is {self.type} for sizes {values}",
                    fix="pass an array of that shape",
                )

    def check_unique(self, array: Array) -> None:
        """Refuse an index that occurs twice."""
        present = array[array >= 0]
        if np.unique(present).size != present.size:
            raise UsageError(
                f"input '{self.name}' holds an index twice",
                rule="its elements are distinct (negative ones are absent and may repeat)",
                fix="pass distinct indices",
            )

    def place(self, array: Array, context: Array) -> Array:
        """Puts a checked array where the step reads it; gives what must stay alive till then."""
        if self.buffer is None:
            array = np.ascontiguousarray(array)
            context[self.word] = array.ctypes.data
            return array
        view = self.views.get(array.shape)
        if view is None:
            if len(self.views) >= _VIEWS:
                self.views.clear()
            view = self.views[array.shape] = self.buffer.view(array.shape, self.dtype)
            context[self.word] = self.buffer.address
        view[...] = array
        return view


class Inputs:
    """All inputs of a program.

    Steps whose inputs have the shapes of an earlier step's, as decoding has step after step, are
    not checked anew: the sizes are the same.
    """

    def __init__(self, entries: Sequence[Input]) -> None:
        self.entries = tuple(entries)
        self._distinct = [(i, entry) for i, entry in enumerate(self.entries) if entry.type.unique]
        self._known: dict[tuple[object, ...], dict[str, int]] = {}

    def arrays(self, inputs: Mapping[str, Array]) -> list[Array]:
        """The arrays in the program's order; raises :class:`UsageError` for one that's missing."""
        try:
            return [inputs[entry.name] for entry in self.entries]
        except KeyError as missing:
            wanted = next(e for e in self.entries if e.name == missing.args[0])
            raise UsageError(
                f"input '{wanted.name}' is missing",
                rule="a step takes a value for each of the program's inputs",
                fix=f"pass '{wanted.name}' as {wanted.type}",
            ) from None

    def sizes(self, arrays: Sequence[Array], given: Mapping[str, int]) -> dict[str, int]:
        """What the symbols are for these arrays, ``given`` ones among them.

        Raises :class:`UsageError` for arrays of another dtype or shape, and for an index that
        occurs twice where it may not.
        """
        key = (*((a.dtype, a.shape) for a in arrays), *given.items())
        values = self._known.get(key)
        if values is None:
            values = dict(given)
            for entry, array in zip(self.entries, arrays, strict=True):
                entry.check(array, values)
            for entry, array in zip(self.entries, arrays, strict=True):
                entry.check_derived(array, values)
            if len(self._known) >= _VIEWS:
                self._known.clear()
            self._known[key] = values
        for place, entry in self._distinct:
            if arrays[place].size > 1:
                entry.check_unique(arrays[place])
        return values

    def place(self, arrays: Sequence[Array], context: Array) -> list[Array]:
        """Puts checked arrays where the step reads them; gives what must stay alive till then."""
        return [e.place(array, context) for e, array in zip(self.entries, arrays, strict=True)]


def outside(given: Input, array: Array) -> UsageError:
    """The error for an index input with an element outside its declared range."""
    assert given.type.index is not None
    return UsageError(
        f"input '{given.name}' holds indices from {array.min()} to {array.max()}",
        rule=f"its elements are declared to lie in [{given.type.index[0]}, {given.type.index[1]}]",
        fix="pass indices inside the range",
    )


def inputs_of(
    names: Sequence[str], roles: Sequence[str], types: Sequence[TensorType], words: Sequence[int]
) -> Inputs:
    """The inputs among a program's parameters."""
    entries = enumerate(zip(names, roles, types, words, strict=True))
    return Inputs(
        [
            Input.of(name, position, word, kind)
            for position, (name, role, kind, word) in entries
            if role == "input"
        ]
    )
