"""What the far memory itself delivers, where its bytes are read more than once.

Cores that differ only in coordinates that a load doesn't depend on read the same tiles in the same
order.  Where the memory says that such reads reach it once (a broadcast, a shared cache), each
transfer counts as its part of one.  A shared memory in between keeps whole tensors as far as they
fit, those first that save the most: their bytes leave the far memory once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dure.compiler.chip.counts import Counts, number
from dure.compiler.chip.tree import Step, Tree
from dure.ir.core import Function, Value
from dure.ir.devices import devices_of
from dure.ir.dtypes import Array
from dure.ir.types import TensorType, static_extent
from dure.machine.chip import Chip


@dataclass(slots=True)
class _Reads:
    """All loads of one tensor, over all cores: bytes moved, and bytes that the memory delivers."""

    size: int
    moved: int
    delivered: float
    steps: list[tuple[Step, int]]


def share_reads(
    tree: Tree,
    function: Function,
    chip: Chip,
    near: frozenset[int] = frozenset(),
    reserved: int = 0,
    indices: Mapping[str, Array] | None = None,
) -> None:
    """Set the ``share`` of each load from home.

    The arguments in ``near`` lie in the memory in between, which keeps ``reserved`` bytes for such;
    ``indices`` are values of index arguments, by name, that the length of loops depends on.
    """
    home = chip.memories[chip.home]
    if not home.shared_reads and not home.cached_by:
        return
    readers = None if home.readers is None else int(home.readers.base)
    counts = Counts.of(function, indices)
    apart = {function.params[n].value for n in near}
    reads: dict[Value, _Reads] = {}
    for step, times, known in counts.steps(tree.body, 1, counts.start()):
        if step.kind != "dma_load" or step.tensor is None:
            continue
        sharers = counts.sharers(step) if home.shared_reads else 1
        sharers = sharers if readers is None else min(sharers, readers)
        root = counts.root(step.tensor)
        if root in apart:
            continue
        size = _bytes(root.tensor) // devices_of(function)
        found = reads.setdefault(root, _Reads(size, 0, 0.0, []))
        there = _there(step, known)
        moved = round(times * counts.total * step.writes[0].type.bytes * there)
        found.moved += moved
        found.delivered += moved / sharers
        found.steps.append((step, sharers))
    kept = _kept(reads, chip, reserved)
    for root, found in reads.items():
        for step, sharers in found.steps:
            if root in kept and found.size < found.delivered:
                step.attrs["share"] = (max(1, found.size), max(1, found.moved))
            elif sharers > 1:
                step.attrs["share"] = (1, sharers)


def _there(step: Step, known: Mapping[str, int]) -> float:
    """The part of a load's tiles that exists, where they cover the tensor: edge tiles are cut."""
    assert step.tensor is not None
    part = 1.0
    for axis, extent in enumerate(step.writes[0].type.shape):
        whole = number(step.tensor.tensor.shape[axis], known, least=0)
        covers = step.attrs["step"][axis] == extent and step.attrs["stride"][axis] == 1
        if whole and covers and axis not in step.attrs["list_axes"]:
            part *= whole / (-(-whole // extent) * extent)
    return part


def _kept(reads: dict[Value, _Reads], chip: Chip, reserved: int) -> set[Value]:
    """The tensors that the memory in between keeps."""
    name = chip.memories[chip.home].cached_by
    if not name:
        return set()
    room = int(chip.memories[name].size.base) - reserved
    kept: set[Value] = set()
    for root, found in sorted(reads.items(), key=lambda e: e[1].size - e[1].delivered):
        if found.size <= room:
            room -= found.size
            kept.add(root)
    return kept


def _bytes(kind: TensorType) -> int:
    elements = 1
    for extent in kind.shape:
        elements *= static_extent(extent) or 1
    return int(-(-(elements * kind.dtype.bits) // 8))
