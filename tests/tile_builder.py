"""Builds tile kernels op by op, for tests of everything that reads the IR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dure.ir.tile
from dure.ir import dtypes
from dure.ir.core import Function, Op, Param, Region, Span, Value, infer
from dure.ir.dtypes import ElementType
from dure.ir.expr import Expr, IntLike, Symbol, as_expr, symbol
from dure.ir.types import Access, TensorType

assert dure.ir.tile


class Body:
    """A region under construction."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.ops: list[Op] = []

    def emit(self, name: str, *operands: Value, **attrs: Any) -> Value:
        """Add an op with one result and give the result."""
        op = self.add(name, operands, attrs)
        return op.result

    def add(
        self,
        name: str,
        operands: Sequence[Value] = (),
        attrs: dict[str, Any] | None = None,
        regions: Sequence[Region] = (),
        symbols: tuple[Symbol, ...] = (),
    ) -> Op:
        """Add any op."""
        op = infer(name, operands, attrs, regions, symbols=symbols, span=self.kernel.span, hint="")
        self.ops.append(op)
        return op

    def load(
        self,
        tensor: Value,
        index: Sequence[IntLike | Value],
        shape: Sequence[int],
        fill: float = 0.0,
        **descriptor: Sequence[IntLike],
    ) -> Value:
        """Load a tile; a Value among the indices is an index list."""
        attrs, lists = _descriptor(index, shape, descriptor)
        return self.emit("load", tensor, *lists, shape=tuple(shape), fill=fill, **attrs)

    def store(
        self,
        tensor: Value,
        index: Sequence[IntLike | Value],
        tile: Value,
        combine: str = "",
        **descriptor: Sequence[IntLike],
    ) -> None:
        """Store a tile; a Value among the indices is an index list."""
        attrs, lists = _descriptor(index, tile.tile.shape, descriptor)
        self.add("store", [tensor, tile, *lists], {**attrs, "combine": combine})

    def full(self, shape: Sequence[int], value: float | Expr, dtype: dtypes.DType) -> Value:
        """A constant tile."""
        return self.emit("full", shape=tuple(shape), value=value, dtype=dtype)

    def index_load(self, tensor: Value, index: Sequence[IntLike], name: str) -> Symbol:
        """Read an element of an index argument."""
        limits = tensor.tensor.index
        assert limits is not None
        found = symbol(name, "index", *limits)
        self.add("index_load", [tensor], {"index": _exprs(index)}, symbols=(found,))
        return found

    def loop(
        self,
        stop: IntLike,
        initial: Sequence[Value],
        body: Callable[[Body, Symbol, Sequence[Value]], Sequence[Value]],
        *,
        start: IntLike = 0,
        step: int = 1,
        name: str = "k",
    ) -> Sequence[Value]:
        """A loop that carries values."""
        counter = symbol(name, "loop", start, as_expr(stop) - 1)
        inner, args = Body(self.kernel), tuple(Value(v.type) for v in initial)
        yields = tuple(body(inner, counter, args))
        region = Region(args, tuple(inner.ops), yields, (counter,))
        attrs = {"start": as_expr(start), "stop": as_expr(stop), "step": step}
        return self.add("for", initial, attrs, [region]).results

    def choose(
        self,
        condition: Expr,
        then: Callable[[Body], Sequence[Value]],
        otherwise: Callable[[Body], Sequence[Value]],
    ) -> Sequence[Value]:
        """A run-time if."""
        regions: list[Region] = []
        for branch in (then, otherwise):
            inner = Body(self.kernel)
            yields = tuple(branch(inner))
            regions.append(Region((), tuple(inner.ops), yields))
        return self.add("if", (), {"condition": condition}, regions).results


class Kernel(Body):
    """A kernel under construction: parameters, grid, body."""

    def __init__(self, name: str = "kernel") -> None:
        super().__init__(self)
        self.name = name
        self.params: list[Param] = []
        self.symbols: list[Symbol] = []
        self.grid: list[Expr] = []
        self.ids: list[Symbol] = []
        self.span: Span | None = None

    def size(self, name: str, high: int = 4096) -> Symbol:
        """A size symbol."""
        found = symbol(name, "size", 0, high)
        self.symbols.append(found)
        return found

    def tensor(
        self,
        name: str,
        shape: Sequence[IntLike],
        dtype: ElementType = dtypes.float32,
        access: Access = "in",
        **more: Any,
    ) -> Value:
        """A parameter."""
        value = Value(TensorType(_exprs(shape), dtype, **more), name)
        self.params.append(Param(value, access))
        return value

    def index(
        self,
        name: str,
        shape: Sequence[IntLike],
        low: IntLike,
        high: IntLike,
        unique: bool = False,
    ) -> Value:
        """A dl.Index parameter."""
        limits = (as_expr(low), as_expr(high))
        return self.tensor(name, shape, dtypes.int32, index=limits, unique=unique)

    def program_id(self, extent: IntLike) -> Symbol:
        """The next axis of the grid."""
        found = symbol(f"pid{len(self.ids)}", "grid", 0, as_expr(extent) - 1)
        self.ids.append(found)
        self.grid.append(as_expr(extent))
        return found

    def function(self) -> Function:
        """The finished kernel."""
        return Function(
            self.name,
            "tile",
            tuple(self.params),
            Region((), tuple(self.ops)),
            tuple(self.symbols),
            tuple(self.grid),
            tuple(self.ids),
        )


def _exprs(values: Sequence[IntLike]) -> tuple[Expr, ...]:
    return tuple(as_expr(v) for v in values)


def _descriptor(
    index: Sequence[IntLike | Value], shape: Sequence[int], given: dict[str, Sequence[IntLike]]
) -> tuple[dict[str, Any], list[Value]]:
    axes = tuple(a for a, entry in enumerate(index) if isinstance(entry, Value))
    lists = [entry for entry in index if isinstance(entry, Value)]
    step = [
        extent // entry.tile.shape[0] if isinstance(entry, Value) else extent
        for entry, extent in zip(index, shape, strict=True)
    ]
    attrs = {
        "index": tuple(None if isinstance(e, Value) else as_expr(e) for e in index),
        "step": tuple(given.get("step", step)),
        "offset": tuple(given.get("offset", [0] * len(shape))),
        "stride": tuple(given.get("stride", [1] * len(shape))),
        "list_axes": axes,
    }
    return attrs, lists
