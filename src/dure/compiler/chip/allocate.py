"""Addresses: every buffer of every memory gets bytes of its own.

A program is pipelined over its loops, so that nearly everything it holds is alive at once: buffers
of a block that repeats share no bytes.  Buffers that only one compute queue touches, in one block,
are reused like registers once their last reader has run.  A memory that overflows is an error that
shows who holds what, by source line.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dure.compiler.chip.tree import Block, Buffer, Step, Tree, blocks, steps
from dure.errors import KernelError
from dure.ir.dtypes import BlockFormat
from dure.ir.types import TileType
from dure.machine.chip import Chip, Memory

#: Characters of a life in the map of a memory that overflows.
_BAR = 16


class ScratchpadError(KernelError):
    """A memory that is too small for a program's buffers."""

    def __init__(self, what: str, needed: int, size: int, where: str, rule: str, fix: str) -> None:
        super().__init__(what, where=where, rule=rule, fix=fix)
        self.needed = needed
        self.size = size


def bytes_of(kind: TileType, memory: Memory) -> int:
    """Bytes of a tile in a memory (in each partition, where it has partitions)."""
    if isinstance(kind.dtype, BlockFormat):
        planes = [
            -(-kind.elements // plane.per * plane.dtype.bits // 8) for plane in kind.dtype.planes
        ]
        total = sum(planes)
        if memory.partitions is None:
            return total
        columns = kind.shape[-1]
        row = sum(-(-columns // p.per * p.dtype.bits // 8) for p in kind.dtype.planes)
        return -(-_rows(kind) // int(memory.partitions.base)) * row
    bits = int(kind.dtype.bits)
    if memory.partitions is None:
        return -(-kind.elements * bits // 8)
    columns = kind.shape[-1] if kind.shape else 1
    return -(-_rows(kind) // int(memory.partitions.base)) * -(-columns * bits // 8)


def _rows(kind: TileType) -> int:
    total = 1
    for extent in kind.shape[:-1]:
        total *= extent
    return total


def capacity(memory: Memory) -> int:
    """Bytes that a program may use (of each partition, where the memory has partitions)."""
    size = int(memory.size.base)
    if memory.partitions is not None:
        size //= int(memory.partitions.base)
    return size - (int(memory.reserved.base) if memory.reserved is not None else 0)


def limit_of(name: str, chip: Chip, budget: int | None) -> int:
    """Bytes of a memory that a program may use, where it has a budget of the scratchpad."""
    whole = capacity(chip.memories[name])
    return whole if budget is None or name != chip.scratchpad else min(budget, whole)


@dataclass
class _Arena:
    """Bytes of one memory, and slots that may be used again."""

    memory: Memory
    end: int = 0
    free: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def take(self, size: int) -> int:
        """An offset of so many bytes."""
        for place, (offset, room) in enumerate(self.free):
            if room >= size:
                del self.free[place]
                if room > size:
                    self.free.append((offset + size, room - size))
                return offset
        offset, self.end = self.end, self.end + size
        return offset

    def give(self, offset: int, size: int) -> None:
        """Bytes that are free again."""
        self.free.append((offset, size))


def allocate(tree: Tree, chip: Chip, budget: int | None = None) -> dict[str, int]:
    """Give every buffer its offset and pitch; the bytes used of each memory.

    Raises :class:`ScratchpadError` with a map of the memory that is too small.
    """
    arenas = {name: _Arena(memory) for name, memory in chip.memories.items()}
    private = _private(tree, chip)
    shared = [b for b in tree.buffers if b.alias_of is None and b not in private]
    for buffer in shared:
        _size(buffer, chip)
        if not buffer.ahead:
            buffer.offset = arenas[buffer.memory].take(buffer.pitch * buffer.stages)
    shared_end = {name: arena.end for name, arena in arenas.items()}
    for block in blocks(tree.body):
        _registers(block, private, chip, arenas)
    # What is loaded ahead lies behind the rest, and can be moved by itself.
    for buffer in shared:
        if buffer.ahead:
            buffer.offset = arenas[buffer.memory].take(buffer.pitch * buffer.stages)
    for buffer in tree.buffers:
        if buffer.alias_of is not None:
            buffer.offset, buffer.pitch = buffer.root.offset, buffer.root.pitch
    used = {name: arena.end for name, arena in arenas.items()}
    for name, end in used.items():
        limit = limit_of(name, chip, budget)
        if end > limit:
            raise _overflow(name, tree, chip, end, limit, shared_end[name])
    return used


def storage_bytes(kind: TileType, memory: Memory) -> int:
    """Bytes that a slot of a tile takes, with what alignment adds."""
    alignment = int(memory.alignment.base)
    return -(-bytes_of(kind, memory) // alignment) * alignment


def _size(buffer: Buffer, chip: Chip) -> None:
    buffer.pitch = storage_bytes(buffer.type, chip.memories[buffer.memory])


def _private(tree: Tree, chip: Chip) -> set[Buffer]:
    """Buffers that one compute queue alone touches, all in the block where they turn."""
    compute = {engine.queue for engine in chip.engines.values()}
    touched: dict[Buffer, set[tuple[str, Block]]] = {}
    for block in blocks(tree.body):
        for item in block.items:
            if isinstance(item, Step):
                for buffer in (*item.reads, *item.writes):
                    touched.setdefault(buffer.root, set()).add((item.queue, block))
    found: set[Buffer] = set()
    for buffer, places in touched.items():
        ((queue, block), *rest) = places
        if not rest and queue in compute and block is buffer.block:
            found.add(buffer)
    return found


def _registers(block: Block, private: set[Buffer], chip: Chip, arenas: dict[str, _Arena]) -> None:
    """Offsets for the private buffers of a block: bytes are reused after the last reader.

    Only within one queue, whose instructions run one after another.
    """
    own = [item for item in block.items if isinstance(item, Step)]
    last: dict[Buffer, int] = {}
    for place, step in enumerate(own):
        for buffer in (*step.reads, *step.writes):
            if buffer.root in private:
                last[buffer.root] = place
    placed: dict[str, list[tuple[Buffer, int]]] = {}
    live: set[Buffer] = set()
    for place, step in enumerate(own):
        for buffer in step.writes:
            root = buffer.root
            if root not in private or root in live:
                continue
            live.add(root)
            _size(root, chip)
            key = f"{step.queue} {root.memory}"
            free = placed.setdefault(key, [])
            reuse = next(
                (
                    n
                    for n, (other, until) in enumerate(free)
                    if until < place and other.pitch >= root.pitch
                ),
                None,
            )
            if reuse is not None:
                other, _ = free.pop(reuse)
                root.offset = other.offset
            else:
                root.offset = arenas[root.memory].take(root.pitch)
            free.append((root, last[root]))


def _overflow(
    name: str, tree: Tree, chip: Chip, needed: int, limit: int, shared: int
) -> ScratchpadError:
    holders = sorted(
        (b for b in tree.buffers if b.memory == name and b.alias_of is None),
        key=lambda b: -b.pitch * b.stages,
    )
    spans, count = _lives(tree)
    lines = [
        f"  {name} of {chip.name}: {_bytes(needed)} asked, {_bytes(limit)} there; "
        "from the program's first instruction to its last:"
    ]
    lines += [_holder(b, _bar(spans.get(b), count)) for b in holders[:12]]
    if len(holders) > 12:
        rest = sum(b.pitch * b.stages for b in holders[12:])
        lines.append(f"  {_bytes(rest):>10}  {len(holders) - 12} smaller buffers")
    each = "in each partition " if chip.memories[name].partitions is not None else ""
    return ScratchpadError(
        f"the kernel's tiles need {_bytes(needed)} {each}of {name}, which holds {_bytes(limit)}",
        needed,
        limit,
        "\n".join(lines),
        f"every tile that is alive has bytes of its own in {name}, one slot for each stage",
        "use smaller tiles, or fewer stages",
    )


def _lives(tree: Tree) -> tuple[dict[Buffer, tuple[int, int]], int]:
    """The first and the last instruction, in text order, that touches each buffer."""
    found: dict[Buffer, tuple[int, int]] = {}
    count = 0
    for step in steps(tree.body):
        for buffer in (*step.reads, *step.writes):
            first = found.get(buffer.root, (count, count))[0]
            found[buffer.root] = first, count
        count += 1
    return found, count


def _bar(span: tuple[int, int] | None, count: int) -> str:
    """A life as a bar of a fixed width."""
    if span is None or not count:
        return "." * _BAR
    first, last = (place * _BAR // count for place in span)
    return "." * first + "#" * (last - first + 1) + "." * (_BAR - last - 1)


def _holder(buffer: Buffer, bar: str) -> str:
    where = f"{buffer.span.file}:{buffer.span.line}" if buffer.span is not None else ""
    text = buffer.span.text.strip() if buffer.span is not None else ""
    slots = f" x {buffer.stages}" if buffer.stages > 1 else ""
    size = _bytes(buffer.pitch * buffer.stages)
    name = buffer.name or "a copy"
    return f"  {size:>10} |{bar}| {name} {buffer.type}{slots}  {where}  {text}"


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"
