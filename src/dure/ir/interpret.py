"""The reference interpreter: what a program means, on NumPy arrays.

A tile kernel runs one grid instance after another, in an order drawn from a seed if one is given,
and writes its out and inout arguments in place.  A tensor program runs once and gives what it
yields.  Slow and plain on purpose: code generators, simulators and passes are compared with it.

It also judges what typing can't: ranges of index arguments, views, reads of outputs before they are
written, and instances that depend on one another; each is an :class:`~dure.errors.IRError` at the
author's line.  Ops without memory effects run their declared semantics; the others register a
handler here (:func:`handles`), as the tensor level's ``repeat`` and ``launch`` do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dure.errors import IRError
from dure.ir.blocks import Blocks
from dure.ir.core import Function, Op, Param, Region, Value
from dure.ir.dtypes import Array, BlockFormat, DType
from dure.ir.expr import Expr, IntLike, Symbol, as_expr, evaluate, symbols
from dure.ir.interpret_memory import Memory, Positions, View, positions
from dure.ir.layout import Layout
from dure.ir.types import TensorType, TileType

#: What a value is while a program runs: a tile or tensor of numbers, or a tensor in memory.
RuntimeValue: TypeAlias = "Array | Blocks | View"
Handler: TypeAlias = "Callable[[Frame, Op], Sequence[RuntimeValue]]"
#: ``(op, attributes, operands) -> results``, in place of an op's semantics.
Evaluator: TypeAlias = "Callable[[Op, Mapping[str, Any], Sequence[RuntimeValue]], Results]"
#: The results of an op: one, or several.
Results: TypeAlias = "RuntimeValue | tuple[RuntimeValue, ...]"

_HANDLERS: dict[str, Handler] = {}


def handles(name: str) -> Callable[[Handler], Handler]:
    """Register the decorated ``handler(frame, op) -> result values`` for the op of this name."""

    def register(handler: Handler) -> Handler:
        if name in _HANDLERS:
            raise IRError(
                f"op '{name}' has two interpreters",
                rule="an op means one thing",
                fix="register one handler",
            )
        _HANDLERS[name] = handler
        return handler

    return register


def run(
    function: Function,
    arrays: Sequence[RuntimeValue],
    sizes: Mapping[str, int] | None = None,
    *,
    seed: int | None = None,
) -> None:
    """Run ``function``, writing its out and inout ``arrays`` (or Blocks) in place.

    Sizes are bound from the arrays' shapes; ``sizes`` gives those that no shape tells.  ``seed``
    draws the order of the grid instances.  Raises IRError for arguments and programs that break a
    rule.
    """
    execute(function, arrays, sizes, seed=seed)


def execute(
    function: Function,
    values: Sequence[RuntimeValue],
    sizes: Mapping[str, int] | None = None,
    *,
    seed: int | None = None,
    evaluator: Evaluator | None = None,
) -> tuple[RuntimeValue, ...]:
    """Like :func:`run`, and gives what the body yields (nothing for a tile kernel).

    ``evaluator`` stands in for the declared semantics of ops without memory effects or regions.
    """
    bound = bind_sizes(function, values, sizes)
    if function.level == "tensor":
        frame = Frame(dict(zip((p.value for p in function.params), values, strict=True)), bound)
        frame.evaluator = evaluator
        return frame.run_body(function.body)
    return _run_grid(function, values, bound, seed, evaluator)


def _run_grid(
    function: Function,
    values: Sequence[RuntimeValue],
    bound: dict[str, int],
    seed: int | None,
    evaluator: Evaluator | None,
) -> tuple[RuntimeValue, ...]:
    views = [_argument(p, v, bound) for p, v in zip(function.params, values, strict=True)]
    grid = [evaluate(extent, bound) for extent in function.grid]
    if any(extent < 0 for extent in grid):
        raise IRError(f"a grid of {grid}", rule="a grid's extents are not negative")
    instances = list(itertools.product(*map(range, grid)))
    order = range(len(instances))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(instances)).tolist()
    for number in order:
        ids = {s.name: at for s, at in zip(function.program_ids, instances[number], strict=True)}
        arguments = dict(zip((p.value for p in function.params), views, strict=True))
        frame = Frame({**arguments}, {**bound, **ids}, number)
        frame.evaluator = evaluator
        frame.run_body(function.body)
    for view in views:
        view.memory.finish()
    return ()


class Frame:
    """The values and symbols in scope while a body runs.

    A handler reads operands with :meth:`value`, expressions with :meth:`integer`, and runs regions
    with :meth:`run_region`.
    """

    def __init__(
        self,
        values: dict[Value, RuntimeValue],
        sizes: Mapping[str, int],
        instance: int = 0,
        *,
        checked: bool = True,
    ) -> None:
        self.values = values
        self.sizes = dict(sizes)
        self.instance = instance
        self.checked = checked
        self.evaluator: Evaluator | None = None

    def value(self, value: Value) -> RuntimeValue:
        """What a value is now."""
        found = self.values.get(value)
        if found is None:
            raise IRError(
                f"value '%{value.name or '?'}' of {value.type} is used before it is defined",
                rule="a value is defined before it is used",
                fix="verify the program",
            )
        return found

    def numbers(self, value: Value) -> Array:
        """A value that is plain numbers."""
        found = self.value(value)
        assert isinstance(found, np.ndarray), f"{value.type} is not an array"
        return found

    def view(self, value: Value) -> View:
        """A value that is a tensor in memory."""
        found = self.value(value)
        assert isinstance(found, View), f"{value.type} is not in memory"
        return found

    def integer(self, expr: IntLike) -> int:
        """What an index expression is now."""
        return evaluate(expr, self.sizes)

    def run_region(
        self, region: Region, args: Sequence[RuntimeValue], symbols: Sequence[int] = ()
    ) -> tuple[RuntimeValue, ...]:
        """Run a region on these arguments and symbols; gives what it yields."""
        self.values.update(zip(region.args, args, strict=True))
        self.sizes.update({s.name: n for s, n in zip(region.symbols, symbols, strict=True)})
        return self.run_body(region)

    def run_body(self, region: Region) -> tuple[RuntimeValue, ...]:
        """Run a region whose arguments are bound already."""
        for op in region.ops:
            with _located(op):
                self._run_op(op)
        return tuple(self.value(y) for y in region.yields)

    def _run_op(self, op: Op) -> None:
        handler = _HANDLERS.get(op.name)
        if handler is not None:
            results = handler(self, op)
        else:
            semantics = op.definition.semantics
            if semantics is None:
                raise IRError(
                    f"op '{op.name}' has neither semantics nor an interpreter",
                    rule="every op runs on the reference interpreter",
                    fix="register one with dure.ir.interpret.handles",
                )
            attrs = {**op.definition.defaults, **op.attrs}
            operands = [self.value(o) for o in op.operands]
            given: Results
            if self.evaluator is not None:
                given = self.evaluator(op, attrs, operands)
            else:
                given = semantics(attrs, *operands)
            results = given if isinstance(given, tuple) else (given,)
        for declared, found in zip(op.results, results, strict=True):
            if self.checked:
                self._check(op, declared, found)
            self.values[declared] = found

    def _check(self, op: Op, declared: Value, found: RuntimeValue) -> None:
        kind = declared.type
        shape = tuple(self.integer(as_expr(extent)) for extent in kind.shape)
        same = tuple(found.shape) == shape
        if isinstance(found, np.ndarray):
            same = same and isinstance(kind.dtype, DType) and found.dtype == kind.dtype.numpy
        elif isinstance(found, Blocks):
            same = same and found.format == kind.dtype
        if not same:
            actual = found.dtype if isinstance(found, np.ndarray) else type(found).__name__
            raise IRError(
                f"{op.name} is declared to give {kind} and gave {actual} of {found.shape}",
                rule="an op's semantics agree with its typing",
                fix="mend the op's declaration",
            )


@contextmanager
def _located(op: Op) -> Generator[None]:
    """Errors from inside carry the author's line."""
    try:
        yield
    except IRError as error:
        if op.span is not None and not error.where:
            error.where = op.span.render()
        raise


# --- arguments ----------------------------------------------------------------------------------


def bind_sizes(
    function: Function, values: Sequence[RuntimeValue], sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The numbers that a function's size symbols are for these arguments.

    Raises IRError if the arguments' number, ranks, shapes or the symbols' declared bounds disagree.
    """
    if len(values) != len(function.params):
        raise IRError(
            f"{function.name} takes {len(function.params)} arguments, found {len(values)}",
            rule="one argument for each parameter",
        )
    bound = dict(sizes or {})
    for param, value in zip(function.params, values, strict=True):
        kind = param.value.type
        if len(value.shape) != kind.rank:
            raise _mismatch(param, value, f"has rank {len(value.shape)}")
        for extent, found in zip(kind.shape, value.shape, strict=True):
            if isinstance(extent, Symbol):
                bound.setdefault(extent.name, int(found))
        if isinstance(kind, TensorType):
            _bind_strides(kind, value, bound)
    for param, value in zip(function.params, values, strict=True):
        _check_argument(param, value, bound)
    for entry in function.symbols:
        _check_bounds(entry, bound)
    return bound


def _bind_strides(kind: TensorType, value: RuntimeValue, bound: dict[str, int]) -> None:
    if not isinstance(kind.layout, Layout) or not isinstance(value, np.ndarray):
        return
    for digits, stride in zip(kind.layout.axes, value.strides, strict=True):
        wanted = digits[0].stride
        if len(digits) == 1 and isinstance(wanted, Symbol):
            bound.setdefault(wanted.name, stride * 8)


def _check_argument(param: Param, value: RuntimeValue, bound: Mapping[str, int]) -> None:
    kind = param.value.type
    for axis, (extent, found) in enumerate(zip(kind.shape, value.shape, strict=True)):
        wanted = evaluate(extent, bound)
        if wanted != found:
            raise _mismatch(param, value, f"has {found} elements along axis {axis}, not {wanted}")
    if isinstance(value, np.ndarray):
        if not isinstance(kind.dtype, DType) or value.dtype != kind.dtype.numpy:
            raise _mismatch(param, value, f"has dtype {value.dtype}")
        if param.access != "in" and not value.flags.writeable:
            raise _mismatch(param, value, "is read-only, and the kernel stores into it")
    elif isinstance(value, Blocks):
        quantized = kind.quantized_axis % kind.rank if kind.rank else 0
        if value.format != kind.dtype or value.axis % len(value.shape) != quantized:
            raise _mismatch(param, value, f"is {value.format} along axis {value.axis}")


def _mismatch(param: Param, value: RuntimeValue, found: str) -> IRError:
    return IRError(
        f"argument '{param.value.name}' is {param.value.type}; what was passed {found}",
        rule="an argument has its parameter's rank, shape and dtype",
        fix="pass an array of that type",
    )


def _check_bounds(entry: Symbol, bound: Mapping[str, int]) -> None:
    value = bound.get(entry.name)
    if value is None:
        if entry.kind == "stride":
            return
        raise IRError(
            f"size '{entry.name}' is unknown",
            rule="a size follows from an argument's shape or is given",
            fix=f"pass sizes={{'{entry.name}': ...}}",
        )
    for end, limit in (("low", entry.low), ("high", entry.high)):
        if limit is None or not all(s.name in bound for s in symbols(limit)):
            continue
        number = evaluate(limit, bound)
        if (value < number) if end == "low" else (value > number):
            relation = "at least" if end == "low" else "at most"
            raise IRError(
                f"size '{entry.name}' is {value}",
                rule=f"'{entry.name}' is declared to be {relation} {number}",
                fix="pass an array inside the declared bound, or declare another bound",
            )


def _argument(param: Param, value: RuntimeValue, bound: Mapping[str, int]) -> View:
    if isinstance(value, View):
        return value
    kind = param.value.tensor
    if kind.index is not None:
        assert isinstance(value, np.ndarray)
        check_index_values(param.value.name, kind, value, bound)
    return View.of(Memory(param.value.name, kind, param.access, value))


def check_index_values(
    name: str, kind: TensorType, values: Array, bound: Mapping[str, int]
) -> None:
    """Raise IRError unless every element of an index argument is in its range (and unique)."""
    assert kind.index is not None
    low, high = (evaluate(end, bound) for end in kind.index)
    numbers = values.astype(np.int64)
    outside = np.argwhere((numbers < low) | (numbers > high))
    if len(outside):
        place = tuple(int(i) for i in outside[0])
        raise IRError(
            f"index argument '{name}' holds {numbers[place]} at {place}",
            rule=f"its elements are declared to lie in [{low}, {high}]",
            fix="pass indices inside the range, or declare a wider one",
        )
    if kind.unique:
        present = numbers[numbers >= 0]
        distinct, counts = np.unique(present, return_counts=True)
        if len(distinct) != len(present):
            raise IRError(
                f"index argument '{name}' holds {distinct[counts > 1][0]} more than once",
                rule="its elements are declared unique",
                fix="pass distinct indices (negative ones are absent and may repeat)",
            )


# --- ops that touch memory ----------------------------------------------------------------------


def _positions(
    frame: Frame, op: Op, shape: Sequence[int], lists: Sequence[Value]
) -> list[Positions]:
    return positions(op, shape, frame.sizes, [frame.numbers(entry) for entry in lists])


@handles("load")
def _load(frame: Frame, op: Op) -> Sequence[RuntimeValue]:
    source = frame.view(op.operands[0])
    shape: tuple[int, ...] = tuple(op.attr("shape"))
    selection = source.select(shape, _positions(frame, op, shape, op.operands[1:]))
    return [source.memory.load(selection, op.attr("fill"), frame.instance)]


@handles("store")
def _store(frame: Frame, op: Op) -> Sequence[RuntimeValue]:
    target, tile = frame.view(op.operands[0]), frame.value(op.operands[1])
    assert not isinstance(tile, View)
    places = _positions(frame, op, tile.shape, op.operands[2:])
    selection = target.select(tile.shape, places)
    target.memory.store(selection, tile, op.attr("combine"), frame.instance)
    return []


@handles("view")
def _view(frame: Frame, op: Op) -> Sequence[RuntimeValue]:
    start, stop = frame.integer(op.attr("start")), frame.integer(op.attr("stop"))
    return [frame.view(op.operands[0]).narrowed(op.attr("axis"), start, stop)]


@handles("index_load")
def _index_load(frame: Frame, op: Op) -> Sequence[RuntimeValue]:
    source = frame.view(op.operands[0])
    index = [frame.integer(entry) for entry in op.attr("index")]
    for axis, (at, extent) in enumerate(zip(index, source.shape, strict=True)):
        if not 0 <= at < extent:
            raise IRError(
                f"element {index} of '{source.memory.name}', which has {extent} along axis {axis}",
                rule="a scalar read of an index argument lies inside it",
                fix="bound the index by the argument's shape",
            )
    selection = source.select((1,) * len(index), [np.array([at]) for at in index])
    found = source.memory.load(selection, 0, frame.instance)
    assert isinstance(found, np.ndarray)
    frame.sizes[op.symbols[0].name] = int(found.astype(np.int64).reshape(()))
    return []


# --- values and control -------------------------------------------------------------------------


@handles("full")
def _full(frame: Frame, op: Op) -> Sequence[RuntimeValue]:
    value: Any = op.attr("value")
    dtype: DType = op.attr("dtype")
    if isinstance(op.result.type.dtype, BlockFormat):
        return [empty_value(op.result.tile, {})]
    number = frame.integer(value) if isinstance(value, Expr) else value
    wide: npt.DTypeLike = np.int64 if isinstance(number, int) else np.float64
    shape: tuple[int, ...] = tuple(op.attr("shape"))
    with np.errstate(all="ignore"):
        return [np.full(shape, np.asarray(number, wide).astype(dtype.numpy))]


@handles("for")
def _for(frame: Frame, op: Op) -> Sequence[RuntimeValue]:
    start, stop, step = (frame.integer(op.attr(key)) for key in ("start", "stop", "step"))
    carried: Sequence[RuntimeValue] = [frame.value(o) for o in op.operands]
    for counter in range(start, stop, step):
        carried = frame.run_region(op.regions[0], carried, [counter])
    return carried


@handles("if")
def _if(frame: Frame, op: Op) -> Sequence[RuntimeValue]:
    branch = op.regions[0] if frame.integer(op.attr("condition")) else op.regions[1]
    return frame.run_region(branch, ())


@handles("reduce_with")
def _reduce_with(frame: Frame, op: Op) -> Sequence[RuntimeValue]:
    """A left fold from the identity, all rows at once where the combiner is elementwise."""
    source, region = frame.numbers(op.operands[0]), op.regions[0]
    axis: int = op.attr("axis") % source.ndim
    rows = np.moveaxis(source, axis, 0).reshape(source.shape[axis], -1)
    dtype = op.operands[0].tile.dtype
    assert isinstance(dtype, DType)
    total = np.full(rows.shape[1], np.asarray(op.attr("identity"), np.float64).astype(source.dtype))
    together = all(inner.definition.elementwise for inner in region.ops)
    combine = _combine_rows if together else _combine_each
    for row in rows:
        total = combine(frame, region, total, row)
    shape = list(source.shape)
    shape[axis] = 1
    return [total.reshape(shape)]


def _combine_rows(frame: Frame, region: Region, left: Array, right: Array) -> Array:
    inner = Frame(dict(frame.values), frame.sizes, frame.instance, checked=False)
    inner.evaluator = frame.evaluator
    (found,) = inner.run_region(region, [left, right])
    assert isinstance(found, np.ndarray)
    return np.array(np.broadcast_to(found, left.shape))


def _combine_each(frame: Frame, region: Region, left: Array, right: Array) -> Array:
    total = np.empty_like(left)
    for place in range(len(left)):
        pair = [left[place : place + 1], right[place : place + 1]]
        (found,) = frame.run_region(region, pair)
        assert isinstance(found, np.ndarray)
        total[place] = found.reshape(())
    return total


def empty_value(kind: TensorType | TileType, sizes: Mapping[str, int]) -> Array | Blocks:
    """Uninitialised storage for a value of this type: zeros of its shape, as an array or Blocks."""
    shape = tuple(evaluate(as_expr(extent), sizes) for extent in kind.shape)
    if any(extent < 0 for extent in shape):
        raise IRError(f"{kind} of shape {shape}", rule="extents are not negative")
    if isinstance(kind.dtype, DType):
        return np.zeros(shape, kind.dtype.numpy)
    axis = kind.quantized_axis % kind.rank
    planes: dict[str, Array] = {}
    for plane in kind.dtype.planes:
        extents = tuple(e // plane.per if a == axis else e for a, e in enumerate(shape))
        planes[plane.name] = np.zeros(extents, plane.dtype.numpy)
    return Blocks(kind.dtype, axis, shape, planes)
