"""What a program is made of, as the sanitizer runs it: pieces of blocks, instructions, accesses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dure.ir.core import Op, Value
from dure.ir.expr import Expr, Symbol, logic
from dure.sim.sanitizer.cells import Box
from dure.sim.sanitizer.control import names
from dure.sim.sanitizer.findings import Place

#: More slots than any buffer has.
SLOTS = 1 << 20
#: Existing elements of a transfer along each axis, None where that isn't known; "" if all exist.
Cut: TypeAlias = "Box | str | None"


@dataclass(eq=False, slots=True)
class Access:
    """One operand of an instruction at one slot: the cells it touches, and those it surely fills.

    ``key`` numbers the buffer and slot; ``queue`` the queue.  ``slots`` has the same operand at
    other slots.
    """

    place: Place
    queue: int
    key: int
    cells: tuple[int, ...]
    defines: frozenset[int]
    accumulates: bool
    buffer: Value
    slots: dict[int, Access]


@dataclass(eq=False, slots=True)
class Instruction:
    """An op of a queue at the slots of its buffers: what a queue executes."""

    op: Op
    slots: tuple[int, ...]
    cut: Cut
    queue: int
    compute: bool
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    semaphore: int = -1
    count: int = 0
    home: int = -1


@dataclass(eq=False, slots=True)
class Straight:
    """Ops without control, rotations among them; ``loop`` is the one whose iteration ends here."""

    ops: tuple[Op, ...]
    needs: frozenset[str]
    loop: int = -1


@dataclass(eq=False, slots=True)
class Partial:
    """A load that may reach over its tensor's edge, and leaves what is outside as it was.

    ``axes`` are those along which it may, each with the condition that it doesn't.
    """

    op: Op
    axes: tuple[tuple[int, Expr], ...]
    needs: frozenset[str]


@dataclass(eq=False, slots=True)
class Scalar:
    """A read of an index argument."""

    op: Op
    needs: frozenset[str]


@dataclass(eq=False, slots=True)
class Loop:
    """``trips`` runs of the body with ``start + n * step``; ``iteration`` is any n, for those who
    look at the loop from outside.
    """

    op: Op
    number: int
    symbol: str
    iteration: Symbol
    start: Expr
    trips: Expr
    step: int
    body: Block
    needs: frozenset[str]


@dataclass(eq=False, slots=True)
class Branch:
    """Two blocks and what decides between them."""

    op: Op
    condition: Expr
    then: Block
    otherwise: Block
    needs: frozenset[str]


Piece: TypeAlias = Straight | Partial | Scalar | Loop | Branch


@dataclass(eq=False, slots=True)
class Control:
    """An expression that decides what happens in a block.

    By ``kind``: only its ``truth`` matters; its value does (``trips``, ``exact``); or it says that
    a transfer of ``span`` elements along an axis lies inside its tensor (``cut``).
    """

    expr: Expr
    kind: str
    span: int = 0


@dataclass(eq=False, slots=True)
class Block:
    """Pieces in order, and (``controls``) all that decides how they run, inner blocks included.

    ``over`` has, for each piece, the block's own symbols that no later piece needs.
    """

    pieces: tuple[Piece, ...]
    needs: frozenset[str]
    defines: frozenset[str]
    controls: tuple[Control, ...]
    over: tuple[frozenset[str], ...]


def blocks(piece: Piece) -> tuple[Block, ...]:
    """The blocks of a piece."""
    if isinstance(piece, Loop):
        return (piece.body,)
    return (piece.then, piece.otherwise) if isinstance(piece, Branch) else ()


@dataclass(eq=False, slots=True)
class Transfer:
    """A DMA's descriptor in its home tensor, views resolved.

    ``starts`` has None for an axis that a list rules; ``loops`` are those around it, outermost
    first; ``inside`` says along which axes it provably never reaches over the tensor's edge.
    ``spans`` are the elements from a tile's first to its last, ``reach`` those of them that may
    exist.
    """

    op: Op
    number: int
    root: Value
    starts: tuple[Expr | None, ...]
    spans: tuple[int, ...]
    strides: tuple[int, ...]
    extents: tuple[Expr, ...]
    store: bool
    loops: tuple[Op, ...]
    inside: tuple[bool, ...]
    views: tuple[Expr, ...]
    reach: tuple[int, ...]

    @property
    def partial(self) -> bool:
        """Whether it may leave a part of the buffer as it was."""
        return not self.store and not self.op.attr("filling") and not all(self.inside)

    def edges(self) -> tuple[tuple[int, Expr], ...]:
        """Axes along which it may reach over the edge, with the condition that it doesn't."""
        return tuple(
            (axis, logic("and", view <= start, start + span <= extent))
            for axis, (start, span, view, extent, inside) in enumerate(
                zip(self.starts, self.spans, self.views, self.extents, self.inside, strict=True)
            )
            if start is not None and not inside
        )

    def needs(self) -> frozenset[str]:
        """Symbols that decide how much of the tile exists."""
        if not self.store and not self.partial:
            return frozenset()
        return frozenset(n for _, condition in self.edges() for n in names(condition))
