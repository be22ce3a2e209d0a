"""The builder that records ops: what the language's functions do while a kernel is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dure.errors import KernelError
from dure.ir.core import Op, Region, Span, Value, infer
from dure.ir.expr import Compare, Expr, Symbol, as_expr, maximum, symbol
from dure.ir.types import TileType
from dure.lang.frontend.proofs import Guard, impossible
from dure.lang.frontend.source import Captured
from dure.lang.tensor import Tensor
from dure.lang.tile import Tile
from dure.lang.values import Attrs, Index, TensorBase, TileBase, describe, is_sequence, plain


@dataclass(frozen=True, slots=True)
class Touch:
    """A load, store or scalar read: which elements of which argument, for inference of grid and
    ranges.
    """

    tensor: TensorBase
    index: tuple[Index | None, ...]
    step: tuple[int, ...]
    lists: tuple[TileBase | None, ...]
    stores: bool


@dataclass(eq=False)
class Block:
    """A region under construction, with the index arguments' elements that were read in it."""

    ops: list[Op] = field(default_factory=list[Op])
    elements: dict[object, Symbol] = field(default_factory=dict[object, Symbol])


class Recorder:
    """Records the ops of one kernel.

    ``grid`` holds the known grid extents; an axis beyond it gets a symbol of its own.  ``settled``
    is False in the first pass over a kernel, whose only results are the touches.
    """

    def __init__(self, grid: Sequence[Expr] = (), *, settled: bool) -> None:
        self.grid: list[Expr] = list(grid)
        self.grid_symbols: list[Symbol] = []
        self.program_ids: list[Symbol] = [self._program_id(a) for a in range(len(self.grid))]
        self.settled = settled
        self.blocks: list[Block] = [Block()]
        self.span: Span | None = None
        self.touches: list[Touch] = []
        self.guards: dict[tuple[Expr, tuple[Expr, ...]], Guard] = {}
        self.assumptions: list[Expr] = []
        self.sources: dict[Symbol, tuple[TensorBase, tuple[Index, ...]]] = {}
        self.asked_axes: set[int] = set()
        self.accesses: list[tuple[str, bool]] = []
        self.captured: dict[tuple[int, str], Captured] = {}
        self._names: set[str] = set()

    # --- ops ------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        operands: Sequence[Value],
        attrs: Attrs,
        regions: Sequence[Region] = (),
        symbols: tuple[Symbol, ...] = (),
    ) -> Op:
        """Add an op to the region under construction."""
        op = infer(name, operands, attrs, regions, span=self.span, symbols=symbols)
        self.blocks[-1].ops.append(op)
        return op

    def emit(self, name: str, operands: Sequence[TileBase], attrs: Attrs) -> Tile:
        """One op on tiles, with one result."""
        value = self.add(name, [o.value for o in operands], attrs).result
        return Tile(value.tile, value)

    def load(self, source: TensorBase, lists: Sequence[TileBase], attrs: Attrs) -> Tile:
        """A tile of a tensor."""
        self._touch(source, lists, attrs, stores=False)
        self.accesses.append((source.name, False))
        value = self.add("load", [source.value, *(t.value for t in lists)], attrs).result
        return Tile(value.tile, value)

    def store(
        self, target: TensorBase, tile: TileBase, lists: Sequence[TileBase], attrs: Attrs
    ) -> None:
        """Write a tile."""
        self._touch(target, lists, attrs, stores=True)
        self.accesses.append((target.name, True))
        if attrs["combine"]:
            self.accesses.append((target.name, False))
        self.add("store", [target.value, tile.value, *(t.value for t in lists)], attrs)

    def _touch(
        self, tensor: TensorBase, lists: Sequence[TileBase], attrs: Attrs, *, stores: bool
    ) -> None:
        by_axis = dict(zip(attrs["list_axes"], lists, strict=True))
        index = tuple(None if i is None else plain(i) for i in attrs["index"])
        ordered = tuple(by_axis.get(axis) for axis in range(tensor.rank))
        self.touches.append(Touch(tensor, index, attrs["step"], ordered, stores))

    def view(self, source: TensorBase, axis: int, start: Index, stop: Index) -> Tensor:
        """``source[start:stop]`` along an axis."""
        self.touches.append(
            Touch(
                source,
                tuple(start if a == axis else None for a in range(source.rank)),
                (0,) * source.rank,
                (None,) * source.rank,
                stores=False,
            )
        )
        attrs = {"axis": axis, "start": as_expr(start), "stop": as_expr(stop)}
        value = self.add("view", [source.value], attrs).result
        view = Tensor(source.name, value.tensor, value, [plain(e) for e in value.tensor.shape])
        view.start = (source, axis, start)
        return view

    def index_load(self, source: TensorBase, index: Sequence[Index]) -> Index:
        """An element of an index argument; read once where it is read twice."""
        entries = tuple(as_expr(i) for i in index)
        key = (source.value, entries)
        for block in self.blocks:
            if key in block.elements:
                return block.elements[key]
        assert source.type.index is not None
        low, high = source.type.index
        found = symbol(self.unique(f"{source.name}_at"), "index", low, high)
        self.add("index_load", [source.value], {"index": entries}, symbols=(found,))
        self.blocks[-1].elements[key] = found
        self.sources[found] = (source, tuple(index))
        self._touch_element(source, index)
        return found

    def _touch_element(self, source: TensorBase, index: Sequence[Index]) -> None:
        """An element that is read lies inside, and so does the start of the view that it is in."""
        rank = source.rank
        self.touches.append(Touch(source, tuple(index), (1,) * rank, (None,) * rank, stores=False))
        if source.start is not None:
            whole, axis, start = source.start
            place = [None if a != axis else start for a in range(rank)]
            self.touches.append(Touch(whole, tuple(place), (1,) * rank, (None,) * rank, False))

    def reduce_with(
        self, source: TileBase, axis: int, combine: Callable[..., object], identity: float
    ) -> Tile:
        """A reduction with a combine function of two tiles of one element."""
        element = TileType((1,), source.dtype)
        args = (Value(element, "a"), Value(element, "b"))
        self.blocks.append(Block())
        result = combine(*(Tile(element, a) for a in args))
        block = self.blocks.pop()
        if not isinstance(result, TileBase) or result.type != element:
            raise KernelError(
                f"a combine function that gives {describe(result)} from two of {source.dtype}",
                rule="a combine function keeps shape and dtype",
                fix="convert its result with .to(a.dtype)",
            )
        region = Region(args, tuple(block.ops), (result.value,))
        attrs = {"axis": axis, "identity": identity}
        value = self.add("reduce_with", [source.value], attrs, [region]).result
        return Tile(value.tile, value)

    # --- scalars --------------------------------------------------------------------------------

    def unique(self, name: str) -> str:
        """A symbol name that this kernel doesn't have yet."""
        candidate, count = name, 1
        while candidate in self._names:
            candidate, count = f"{name}_{count}", count + 1
        self._names.add(candidate)
        return candidate

    def program_id(self, axis: int) -> Index:
        """The instance's position along a grid axis."""
        self._need_axis(axis)
        return self.program_ids[axis]

    def num_programs(self, axis: int) -> Index:
        """The grid's extent along an axis: at least 1 where an instance runs."""
        self._need_axis(axis)
        return plain(maximum(1, self.grid[axis]))

    def marks(self, index: Index) -> bool:
        """Every index is an expression of its own, so that equal ones mean equal places."""
        return True

    def _need_axis(self, axis: int) -> None:
        self.asked_axes.add(axis)
        while len(self.grid) <= axis:
            extent = symbol(f"grid.{len(self.grid)}", "size", 0)
            self.grid_symbols.append(extent)
            self.grid.append(extent)
            self.program_ids.append(self._program_id(len(self.grid) - 1))

    def _program_id(self, axis: int) -> Symbol:
        return symbol(f"program_id_{axis}", "grid", 0, self.grid[axis] - 1)

    def require(self, condition: Index | bool, error: KernelError) -> None:
        """Raise now if the condition is false, remember it where it depends on sizes."""
        if not self.settled or condition is True:
            return
        if self.span is not None and not error.where:
            error.where = self.span.render()
        assumptions = tuple(self.assumptions)
        if not (isinstance(condition, Compare) and condition.relation == "=="):
            # Nothing is read or written where no instance runs; extents agree even then.
            assumptions += tuple(as_expr(0) < extent for extent in self.grid)
        if not isinstance(condition, Expr):
            if not condition and not impossible(assumptions):
                raise error
            return
        # Proofs wait for the launch: with numbers for the sizes they are quick and complete.
        key = (condition, assumptions)
        if key not in self.guards:
            self.guards[key] = Guard(condition, assumptions, error)


def region_of(block: Block, yields: Sequence[Value], **rest: tuple[Symbol, ...]) -> Region:
    """The finished region of a block."""
    return Region((), tuple(block.ops), tuple(yields), **rest)


def flatten(value: object) -> list[TileBase]:
    """The tiles in a value: one, or those of a tuple of tiles."""
    if isinstance(value, TileBase):
        return [value]
    if is_sequence(value):
        return [tile for part in value for tile in flatten(part)]
    return []


def rebuild(template: object, tiles: list[Tile]) -> object:
    """``template`` with its tiles replaced, in the order of :func:`flatten`; consumes ``tiles``."""
    if isinstance(template, TileBase):
        return tiles.pop(0)
    if is_sequence(template):
        return tuple(rebuild(part, tiles) for part in template)
    return template
