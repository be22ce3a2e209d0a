"""Operands that stay: tiles that an outer loop would load again keep a slot each instead.

A load in inner loops that doesn't depend on a loop around them loads the same tiles at every turn
of that loop.  :func:`keep` gives the tiles one slot each and loads them at the loop's first turn
only, together with what is computed from them alone.  :func:`stage` loads them in loops of their
own before the loop, as a compiler does that copies a whole operand before it starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from dure.compiler.chip.tree import (
    Block,
    Branch,
    Buffer,
    Item,
    Loop,
    Rotate,
    Step,
    Structure,
    Tree,
    blocks,
    inner_blocks,
    steps,
)
from dure.errors import KernelError
from dure.ir.expr import Const, Expr, IntLike, Symbol, as_expr, compare, substitute, symbol, symbols
from dure.ir.rewrite import clone_region, expressions_in


@dataclass(frozen=True, slots=True)
class Reuse:
    """A tensor whose tiles a loop loads again: its name, and how many loops are around the loop."""

    tensor: str
    depth: int


@dataclass(slots=True)
class _Found:
    reuse: Reuse
    block: Block
    items: list[Item]
    kept: list[Buffer]
    loops: list[Loop]
    slots: int


def reuses(tree: Tree) -> list[Reuse]:
    """What could stay, in text order, the innermost loop of each first."""
    return [found.reuse for found in _candidates(tree)]


def keep(tree: Tree, wanted: tuple[Reuse, ...]) -> None:
    """Load what is wanted at the first turn of its loop only.

    Raises :class:`KernelError` for what the program doesn't load again.
    """
    for reuse in wanted:
        found = _one(tree, reuse)
        loop = found.loops[0]
        first = Block(found.items, found.block, repeated=True)
        condition = compare("==", loop.symbol, loop.start)
        place = found.block.items.index(found.items[0])
        own = set(map(id, found.items))
        rest = [item for item in found.block.items if id(item) not in own]
        ends = as_expr(loop.start) + (loop.stop - loop.start - 1) // loop.step * loop.step
        last = compare("==", loop.symbol, ends)
        branch = Branch(condition, first, Block(parent=found.block), loop.span, last)
        rest.insert(place, branch)
        found.block.items = rest
        _move(found, first)
        for buffer in found.kept:
            buffer.slots = found.slots


def stage(tree: Tree, wanted: Reuse) -> None:
    """Load all that is wanted before anything else is done."""
    if wanted.depth:
        raise KernelError(
            f"'{wanted.tensor}' can't be staged over the loop at depth {wanted.depth}",
            rule="what is staged is loaded before the outermost loop",
            fix="order the loops so that the outermost one loads the same tiles at every turn",
        )
    found = _one(tree, wanted)
    renamed: dict[Expr, IntLike] = {}
    inner = found.loops[1:]
    body = Block(list(found.items), None, True, True)
    block = body
    for loop in reversed(inner):
        counter = symbol(f"{loop.symbol.name}_ahead", "loop", loop.symbol.low, loop.symbol.high)
        renamed[loop.symbol] = counter
        outer = Block([], None, True, True)
        outer.items.append(Loop(counter, loop.start, loop.stop, loop.step, block, {}, loop.span))
        block.parent = outer
        block = outer
    place = found.block.items.index(found.items[0])
    own = set(map(id, found.items))
    rest = [item for item in found.block.items if id(item) not in own]
    rest.insert(place, Rotate(list(found.kept)))
    found.block.items = rest
    _move(found, body)
    body.items.insert(0, Rotate(list(found.kept)))
    _rename(body, renamed)
    for buffer in found.kept:
        buffer.slots, buffer.turned, buffer.block = found.slots, True, tree.body
    block.parent = tree.body
    for item in block.items:
        for nested in inner_blocks(item):
            nested.parent = tree.body
    tree.body.items[:0] = block.items


def _one(tree: Tree, reuse: Reuse) -> _Found:
    for found in _candidates(tree):
        if found.reuse == reuse:
            return found
    raise KernelError(
        f"'{reuse.tensor}' can't stay over the loop at depth {reuse.depth}",
        rule="a tensor stays over a loop that loads the same tiles of it at every turn, inside "
        "loops of known length",
        fix="one of " + (", ".join(f"{r.tensor} at {r.depth}" for r in reuses(tree)) or "nothing"),
    )


def _candidates(tree: Tree) -> Iterator[_Found]:
    yield from _in_block(tree, tree.body, [])


def _in_block(tree: Tree, block: Block, loops: list[Loop]) -> Iterator[_Found]:
    names = dict.fromkeys(
        s.tensor.name
        for item in block.items
        for s in _own_steps(item)
        # A view has no name: what is loaded through one doesn't stay.
        if s.kind == "dma_load" and s.tensor is not None and s.tensor.name
    )
    for name in names if len(loops) > 1 else ():
        yield from _of_tensor(tree, block, loops, name)
    for item in block.items:
        if isinstance(item, Loop):
            yield from _in_block(tree, item.body, [*loops, item])


def _of_tensor(tree: Tree, block: Block, loops: list[Loop], name: str) -> Iterator[_Found]:
    items, made = _chain(block, name)
    kept = [b for b in made if _read_elsewhere(b, block, items)]
    if not items or not kept or any(_touched_outside(tree, b, block) for b in made):
        return
    used = _symbols(items)
    for depth in range(len(loops) - 2, -1, -1):
        inner = loops[depth + 1 :]
        slots = _trips(inner)
        depends = {loop.symbol for loop in loops} & used
        if slots is None or loops[depth].symbol in depends or used & _read_in(loops[depth].body):
            continue
        if depends & {loop.symbol for loop in inner}:
            yield _Found(Reuse(name, depth), block, items, kept, loops[depth:], slots)


def _read_in(body: Block) -> set[Symbol]:
    """The scalars that are read from index arguments inside a loop, anew at every turn."""
    return {
        found
        for block in blocks(body)
        for item in block.items
        if isinstance(item, Structure)
        for found in item.op.symbols
    }


def _chain(block: Block, name: str) -> tuple[list[Item], list[Buffer]]:
    """The items of a block that load a tensor, and those that compute from it alone."""
    items: list[Item] = []
    made: list[Buffer] = []
    loaded = {
        b.root
        for item in block.items
        for s in _own_steps(item)
        if s.kind == "dma_load" and s.tensor is not None and s.tensor.name == name
        for b in s.writes
    }
    for item in block.items:
        own = list(_own_steps(item))
        if not own or isinstance(item, Loop):
            continue
        loads = [s for s in own if s.kind == "dma_load"]
        if loads and all(s.tensor is not None and s.tensor.name == name for s in loads):
            fits = not any(s.lists for s in loads)
        else:
            reads = {b.root for s in own for b in s.reads}
            # What a load doesn't reach of its tile is filled before.
            fills = not reads and {b.root for s in own for b in s.writes} <= loaded
            fits = (fills or bool(reads)) and reads <= set(made)
            fits = fits and all(s.kind == "compute" for s in own)
        if fits:
            items.append(item)
            made += [b.root for s in own for b in s.writes if b.root not in made]
    # What ends the chain must be computed from it, not merely use it: a dot reads others as well.
    return items, made


def _own_steps(item: Item) -> Iterator[Step]:
    if isinstance(item, Step):
        yield item
    elif isinstance(item, Branch):
        for inner in inner_blocks(item):
            yield from steps(inner)


def _read_elsewhere(buffer: Buffer, block: Block, items: list[Item]) -> bool:
    own = {id(s) for item in items for s in _own_steps(item)}
    return any(id(s) not in own and any(b.root is buffer for b in s.reads) for s in steps(block))


def _touched_outside(tree: Tree, buffer: Buffer, block: Block) -> bool:
    """Whether something outside a block touches a buffer (or it doesn't turn there)."""
    if buffer.block is not block:
        return True
    inside = {id(s) for s in steps(block)}
    return any(
        id(s) not in inside and any(b.root is buffer for b in (*s.reads, *s.writes))
        for s in steps(tree.body)
    )


def _symbols(items: list[Item]) -> set[Symbol]:
    found: set[Symbol] = set()
    for item in items:
        for step in _own_steps(item):
            for value in step.attrs.values():
                for expr in expressions_in(value):
                    found |= symbols(expr)
            for op in step.region.ops if step.region is not None else ():
                for value in op.attrs.values():
                    for expr in expressions_in(value):
                        found |= symbols(expr)
    return found


def _trips(loops: list[Loop]) -> int | None:
    """The turns of loops of known length, one inside the other."""
    total = 1
    for loop in loops:
        length = as_expr(loop.stop - loop.start)
        if not isinstance(length, Const):
            return None
        total *= -(-length.value // loop.step)
    return total if total > 0 else None


def _move(found: _Found, block: Block) -> None:
    """What only the chain itself uses turns where the chain is."""
    kept = set(found.kept)
    for item in found.items:
        for inner in inner_blocks(item):
            inner.parent = block
        for step in _own_steps(item):
            for buffer in step.writes:
                if buffer.root not in kept:
                    buffer.root.block = block
                    buffer.block = block


def _rename(block: Block, renamed: dict[Expr, IntLike]) -> None:
    """Put other symbols in the place of some."""
    for inner in blocks(block):
        for item in inner.items:
            if isinstance(item, Step):
                item.attrs = {k: _substituted(v, renamed) for k, v in item.attrs.items()}
                if item.region is not None:
                    item.region = clone_region(item.region, symbols=renamed)
            elif isinstance(item, Branch):
                item.condition = substitute(item.condition, renamed)


def _substituted(value: Any, renamed: dict[Expr, IntLike]) -> Any:
    if isinstance(value, Expr):
        return substitute(value, renamed)
    if isinstance(value, tuple):
        return tuple(_substituted(entry, renamed) for entry in cast("tuple[object, ...]", value))
    return value
