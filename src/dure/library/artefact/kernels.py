"""Kernel calls as sections of an artefact, and back.

A kernel is stored as the text of its tile functions, one for each choice of its tile sizes
(:mod:`dure.library.artefact.variants`).  What is read back is a
:class:`~dure.library.call.KernelCall` like any other, whose ``kernel`` is a :class:`StoredKernel`:
it is compiled, proved, timed and run by the same passes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dure.errors import ArtefactError, DureError, KernelError
from dure.ir.core import Function, declared_ops, walk
from dure.ir.interpret import check_index_values
from dure.ir.parser import parse_function
from dure.ir.printer import print_function
from dure.ir.type_parser import TypeParser
from dure.ir.types import TensorType, TileType, static_extent
from dure.ir.verifier import functions_in, verify
from dure.library.artefact import lists
from dure.library.artefact.container import Container, damaged
from dure.library.artefact.schema import KernelEntry, Manifest
from dure.library.artefact.variants import Best, stored_sizes
from dure.library.build import tile_function
from dure.library.call import IndexArray, KernelCall
from dure.library.operators_common import check_size

_VARIANT = re.compile(r"^--((?: [^\W\d]\w*=[0-9]{1,9})*)$", re.MULTILINE)
_MOST_RANK = 16
_MOST_TILE = 1 << 31


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StoredKernel:
    """A kernel that was read from a file: tile functions by the values of their sizes.

    ``texts`` has an entry for each choice of sizes, in the order of ``open``.
    """

    name: str
    types: tuple[TensorType | None, ...]
    open: tuple[str, ...]
    texts: Mapping[tuple[int, ...], str]
    where: str
    release: str
    _functions: dict[tuple[int, ...], Function] = field(
        default_factory=dict[tuple[int, ...], Function]
    )

    @property
    def __name__(self) -> str:  # what a kernel of the language has as a function
        return self.name

    def specialize(
        self, types: Sequence[TensorType | None], consts: Mapping[str, object]
    ) -> Function:
        """The tile function of these sizes; raises :class:`KernelError` where there is none."""
        wanted = tuple(consts.get(name) for name in self.open)
        sizes = next((key for key in self.texts if key == wanted), None)
        if sizes is None or tuple(types) != self.types:
            raise self._no_such(consts)
        if sizes not in self._functions:
            self._functions[sizes] = self._read(self.texts[sizes], sizes)
        return self._functions[sizes]

    def _no_such(self, consts: Mapping[str, object]) -> KernelError:
        known = [
            " ".join(f"{n}={v}" for n, v in zip(self.open, k, strict=True)) for k in self.texts
        ]
        return KernelError(
            f"the stored kernel '{self.name}' with {dict(consts)}",
            where=self.where,
            rule="a stored kernel has the argument types and the tile sizes that it was saved with",
            fix=f"one of {'; '.join(known[:20])}" if self.open else "pass no consts",
        )

    def _read(self, text: str, sizes: tuple[int, ...]) -> Function:
        place = " ".join([self.name, *(f"{n}={v}" for n, v in zip(self.open, sizes, strict=True))])
        where = f"{self.where}: {place}"
        try:
            function = parse_function(text, where)
            self._check(function, where)
            verify(function)
        except ArtefactError:
            raise
        except DureError as error:
            raise ArtefactError(
                f"this release can't read the kernel '{self.name}': {error.what}",
                where=error.where or where,
                rule=f"an artefact runs on the release that wrote it, {self.release}, and on later "
                "ones",
                fix=f"install dure {self.release} or later, or save it again",
            ) from error
        return function

    def _check(self, function: Function, where: str) -> None:
        """Whatever text this is, it is a tile function of these arguments, of a sane size."""
        found = [str(p.value.type) for p in function.params]
        if function.level != "tile" or found != [str(t) for t in self.types if t is not None]:
            raise damaged("a kernel has other arguments than the manifest says", where)
        bodies = [function.body, *(inner.body for inner in functions_in(function))]
        results = [r.type for body in bodies for op in walk(body) for r in op.results]
        if any(isinstance(kind, TileType) and kind.elements > _MOST_TILE for kind in results):
            raise damaged(f"a tile of more than {_MOST_TILE} elements", where)


def read_lists(container: Container, manifest: Manifest, where: str) -> list[IndexArray]:
    """The index values of an artefact, by their numbers."""
    return [
        lists.decode(_section(container, f"list.{n}", where), shape, where)
        for n, shape in enumerate(manifest.lists)
    ]


def read_calls(
    container: Container, manifest: Manifest, values: Sequence[IndexArray], where: str
) -> list[KernelCall]:
    """The kernel calls of an artefact, by their numbers; ``values`` are its lists.

    Raises :class:`ArtefactError` for ops that this release doesn't know and for what can't be.
    """
    _check_ops(manifest.ops, container.release, where)
    return [
        _call(container, entry, _section(container, f"kernel.{n}", where), values, where)
        for n, entry in enumerate(manifest.kernels)
    ]


def _section(container: Container, name: str, where: str) -> str:
    if name not in container.sections:
        raise damaged(f"it has no section '{name}'", where)
    return container.sections[name]


def _check_ops(ops: Sequence[str], release: str, where: str) -> None:
    unknown = [name for name in ops if name not in declared_ops()]
    if unknown:
        raise ArtefactError(
            f"the artefact uses the op '{unknown[0][:40]}', which this release doesn't know",
            where=where,
            rule=f"an artefact runs on the release that wrote it, {release}, and on later ones",
            fix=f"install dure {release} or later",
        )


def _call(
    container: Container, entry: KernelEntry, text: str, values: Sequence[IndexArray], where: str
) -> KernelCall:
    where = f"{where}: kernel '{entry.name}'"
    types = tuple(None if a is None else read_type(a, where) for a in entry.arguments)
    indices: dict[int, IndexArray] = {}
    for place, number in entry.lists:
        if place >= len(types) or number >= len(values):
            raise damaged("an index argument that there isn't", where)
        indices[place] = values[number]
    for place, kind in enumerate(types):
        if kind is not None and (kind.index is not None) != (place in indices):
            raise damaged(f"argument {place} without its index values, or with such", where)
        if kind is not None and kind.index is not None:
            _check_values(kind, indices[place], where)
    texts = _variants(text, entry.open, where)
    kernel = StoredKernel(entry.name, types, tuple(entry.open), texts, where, container.release)
    sizes = tuple(dict(zip(entry.open, key, strict=True)) for key in texts)
    return KernelCall(kernel, types, {}, sizes[0], indices, variants=sizes if entry.open else ())


def read_type(text: str, where: str) -> TensorType:
    """The type of a tensor of constant extents."""
    try:
        parser = TypeParser(text, where)
        found = parser.type()
        if parser.next.kind != "end" or not isinstance(found, TensorType):
            raise damaged(f"'{text[:80]}' is no tensor's type", where)
        if len(found.shape) > _MOST_RANK or any(static_extent(e) is None for e in found.shape):
            raise damaged(f"'{text[:80]}' has no constant extents", where)
        if any((static_extent(e) or 0) < 1 for e in found.shape):
            raise damaged(f"'{text[:80]}' has an extent below 1", where)
        return check_size(found)
    except ArtefactError:
        raise
    except DureError as error:
        raise ArtefactError(
            f"this release can't read the type '{text[:80]}': {error.what}",
            where=where,
            rule=error.rule,
            fix="install the release that wrote it (its second line), or a later one",
        ) from error


def _check_values(kind: TensorType, values: IndexArray, where: str) -> None:
    if tuple(static_extent(e) for e in kind.shape) != values.shape:
        raise damaged(f"index values of shape {values.shape} for {kind}", where)
    try:
        check_index_values("values", kind, values, {})
    except DureError as error:
        raise damaged(error.what, where) from error


def _variants(text: str, names: Sequence[str], where: str) -> dict[tuple[int, ...], str]:
    """The texts of a kernel's section by their sizes."""
    before, *parts = _VARIANT.split(text)
    found: dict[tuple[int, ...], str] = {}
    for sizes, body in zip(parts[::2], parts[1::2], strict=True):
        pairs = [part.partition("=") for part in sizes.split()]
        key = tuple(int(value) for _, _, value in pairs)
        if [name for name, _, _ in pairs] != list(names) or key in found:
            raise damaged(f"the sizes '{sizes[:80]}'", where)
        found[key] = body
    if before or not found:
        raise damaged("a kernel without its tile functions", where)
    return found


# --- writing -------------------------------------------------------------------------------------


class Writer:
    """Gathers kernels, each once, and index values, each once; ``best`` are chips and options for
    which the best tile sizes are stored.
    """

    def __init__(self, best: Best) -> None:
        self.best = best
        self.kernels: list[dict[str, object]] = []
        self.texts: list[str] = []
        self.shapes: list[list[int]] = []
        self.lists: dict[tuple[tuple[int, ...], str], int] = {}
        self.ops: set[str] = set()
        self._known: dict[object, int] = {}

    def add(self, call: KernelCall) -> int:
        """The number of the call's kernel, which is stored if it is new."""
        indices = {place: self.numbered(values) for place, values in sorted(call.indices.items())}
        consts = frozenset(call.consts.items())
        key = (
            call.kernel, call.types, consts, tuple(call.tiles.items()), tuple(indices.items()),
            call.updates,
        )  # fmt: skip
        if key not in self._known:
            entry: dict[str, object] = {
                "name": call.kernel.__name__,
                "arguments": [None if kind is None else str(kind) for kind in call.types],
                "open": list(call.open),
                "lists": [list(pair) for pair in indices.items()],
            }
            self._known[key] = self._number(entry, self._text(call))
        return self._known[key]

    def _number(self, entry: dict[str, object], text: str) -> int:
        """The number of what may have been stored under other consts that mean the same."""
        for number, pair in enumerate(zip(self.kernels, self.texts, strict=True)):
            if pair == (entry, text):
                return number
        self.kernels.append(entry)
        self.texts.append(text)
        return len(self.kernels) - 1

    def sections(self) -> dict[str, str]:
        """Everything but the manifest."""
        texts = {f"kernel.{number}": text for number, text in enumerate(self.texts)}
        return texts | {f"list.{number}": text for (_, text), number in self.lists.items()}

    def manifest(self) -> dict[str, object]:
        """What the manifest says of the sections."""
        return {"ops": sorted(self.ops), "kernels": self.kernels, "lists": self.shapes}

    def numbered(self, values: IndexArray) -> int:
        """The number of a list of index values, which is stored if it is new."""
        key = values.shape, lists.encode(values)
        if key not in self.lists:
            self.lists[key] = len(self.shapes)
            self.shapes.append(list(values.shape))
        return self.lists[key]

    def _text(self, call: KernelCall) -> str:
        """The tile functions of all sizes, each under a line that says them."""
        found: list[str] = []
        for sizes in stored_sizes(call, self.best):
            function = tile_function(call, sizes)
            # Declared defaults are written too: those of a later release may be others.
            text = print_function(function, defaults=True)
            if print_function(parse_function(text), defaults=True) != text:
                raise KernelError(
                    f"the kernel '{call.kernel.__name__}' doesn't read back as it was written",
                    rule="what is stored is the text of tile functions",
                    fix="this is a defect of dure: please report the kernel and its sizes",
                )
            for part in (function, *functions_in(function)):
                self.ops.update(op.name for op in walk(part.body))
            head = " ".join(["--", *(f"{name}={size}" for name, size in sizes.items())])
            found.append(f"{head}\n{text}")
        return "".join(found)
