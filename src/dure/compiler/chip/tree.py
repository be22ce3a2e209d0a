"""The program while it is being scheduled: instructions on queues, in loops, between buffers.

Mutable on purpose: lowering builds it, synchronisation adds waits and signals, allocation fills in
addresses, and emission writes it down as machine IR.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from dure.ir.core import Op, Region, Span, Value
from dure.ir.expr import Expr, Symbol
from dure.ir.types import TileType

Kind: TypeAlias = Literal["dma_load", "dma_store", "compute"]


@dataclass(eq=False, slots=True)
class Buffer:
    """Storage of a tile.  ``block`` is where it turns; an alias shares another buffer's bytes.

    ``slots`` fixes how many slots it has; ``turned`` says that the tree turns it itself; ``ahead``,
    that it is loaded before its program's turn comes.
    """

    type: TileType
    memory: str
    name: str
    block: Block
    span: Span | None = None
    stages: int = 1
    alias_of: Buffer | None = None
    offset: int = 0
    pitch: int = 0
    slots: int | None = None
    turned: bool = False
    ahead: bool = False

    @property
    def root(self) -> Buffer:
        """The buffer whose bytes these are."""
        return self if self.alias_of is None else self.alias_of.root


@dataclass(eq=False, slots=True)
class Step:
    """One instruction of a queue.  ``lists`` are index lists that a DMA reads."""

    kind: Kind
    queue: str
    reads: list[Buffer]
    writes: list[Buffer]
    attrs: dict[str, Any]
    tensor: Value | None = None
    lists: list[Buffer] = field(default_factory=list["Buffer"])
    region: Region | None = None
    span: Span | None = None


@dataclass(eq=False, slots=True)
class Structure:
    """A view or an index read, which every queue follows."""

    op: Op


@dataclass(eq=False, slots=True)
class Sync:
    """A wait or a signal."""

    kind: Literal["wait", "signal"]
    queue: str
    semaphore: Semaphore
    span: Span | None = None


@dataclass(eq=False, slots=True)
class Semaphore:
    """A counter from one queue to another."""

    signals: str
    waits: str
    initial: int
    why: str


@dataclass(eq=False, slots=True)
class Rotate:
    """Turns buffers."""

    buffers: list[Buffer]


@dataclass(eq=False, slots=True)
class Loop:
    """A counted loop."""

    symbol: Symbol
    start: Expr
    stop: Expr
    step: int
    body: Block
    attrs: Mapping[str, Any]
    span: Span | None = None


@dataclass(eq=False, slots=True)
class Branch:
    """A uniform condition.

    ``last`` is given where the branch is taken at the first turn of a loop, for tiles that stay
    over it: it holds at the loop's last turn, when they are used up.
    """

    condition: Expr
    then: Block
    otherwise: Block
    span: Span | None = None
    last: Expr | None = None


Item: TypeAlias = "Step | Structure | Sync | Rotate | Loop | Branch"


@dataclass(eq=False, slots=True)
class Block:
    """Items in order.  ``repeated``: it may run more than once; ``loop``: it is a loop's body, and
    ``instances`` a loop over grid instances.
    """

    items: list[Item] = field(default_factory=list["Item"])
    parent: Block | None = None
    repeated: bool = False
    loop: bool = False
    instances: bool = False


@dataclass(eq=False, slots=True)
class Tree:
    """A whole program: its body and every buffer."""

    body: Block
    buffers: list[Buffer]
    #: Loops whose trips are a buffer's slots, which are chosen later.
    over_slots: list[tuple[Loop, Buffer]] = field(default_factory=list["tuple[Loop, Buffer]"])
    semaphores: list[Semaphore] = field(default_factory=list["Semaphore"])


def copied(tree: Tree) -> Tree:
    """The same program, of which nothing that scheduling changes is shared with this one."""
    return _Copy().tree(tree)


class _Copy:
    def __init__(self) -> None:
        self.blocks: dict[Block, Block] = {}
        self.buffers: dict[Buffer, Buffer] = {}
        self.loops: dict[Loop, Loop] = {}
        self.semaphores: dict[Semaphore, Semaphore] = {}

    def tree(self, tree: Tree) -> Tree:
        body = self.block(tree.body)
        buffers = self.every(tree.buffers)
        for buffer in self.buffers.values():
            buffer.block = self.blocks[buffer.block]
        over = [(self.loops[loop], self.buffer(buffer)) for loop, buffer in tree.over_slots]
        return Tree(body, buffers, over, [self.semaphore(s) for s in tree.semaphores])

    def block(self, block: Block) -> Block:
        found = self.blocks[block] = replace(block, items=[])
        if block.parent is not None:
            found.parent = self.blocks[block.parent]
        found.items = [self.item(item) for item in block.items]
        return found

    def item(self, item: Item) -> Item:
        match item:
            case Step():
                reads, writes, lists = map(self.every, (item.reads, item.writes, item.lists))
                return replace(item, reads=reads, writes=writes, lists=lists, attrs={**item.attrs})
            case Structure():
                return item
            case Sync():
                return replace(item, semaphore=self.semaphore(item.semaphore))
            case Rotate():
                return Rotate(self.every(item.buffers))
            case Loop():
                found = self.loops[item] = replace(item, body=self.block(item.body))
                return found
            case Branch():
                then, otherwise = self.block(item.then), self.block(item.otherwise)
                return replace(item, then=then, otherwise=otherwise)

    def every(self, buffers: list[Buffer]) -> list[Buffer]:
        return [self.buffer(buffer) for buffer in buffers]

    def buffer(self, buffer: Buffer) -> Buffer:
        # A buffer's block may come after what uses it: blocks are filled in when all are known.
        if buffer not in self.buffers:
            self.buffers[buffer] = replace(buffer)
            alias = buffer.alias_of
            self.buffers[buffer].alias_of = None if alias is None else self.buffer(alias)
        return self.buffers[buffer]

    def semaphore(self, semaphore: Semaphore) -> Semaphore:
        return self.semaphores.setdefault(semaphore, replace(semaphore))


def inner_blocks(item: Item) -> tuple[Block, ...]:
    """The blocks inside an item."""
    if isinstance(item, Loop):
        return (item.body,)
    if isinstance(item, Branch):
        return (item.then, item.otherwise)
    return ()


def steps(block: Block) -> Iterator[Step]:
    """Every instruction in a block, in text order."""
    for item in block.items:
        if isinstance(item, Step):
            yield item
        for inner in inner_blocks(item):
            yield from steps(inner)


def blocks(block: Block) -> Iterator[Block]:
    """A block and all blocks inside it."""
    yield block
    for item in block.items:
        for inner in inner_blocks(item):
            yield from blocks(inner)


def common(one: Block, other: Block) -> Block:
    """The innermost block that has both inside."""
    found: set[int] = set()
    block: Block | None = one
    while block is not None:
        found.add(id(block))
        block = block.parent
    block = other
    while id(block) not in found:
        assert block.parent is not None, "blocks of one tree"
        block = block.parent
    return block
