"""Whether a tile kernel can go to every NPU: what is checked in CI over every library kernel.

The rules (:data:`RULES`) are those that compiling for five vendors' languages taught.  What
no chip can mend is an error at the author's line.  What a legaliser mends at a cost is a
:class:`Note` in the report, with the rule's number.  Then the kernel is run as chips of 64 and of
128 partitions would run it, and its values are compared with the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dure.errors import IRError
from dure.ir.accesses import Accesses, TensorAccess, accesses_of
from dure.ir.core import Function, Op, Region, Span, Value, walk
from dure.ir.dtypes import DType
from dure.ir.expr import Range, as_expr, bounds, evaluate, symbols
from dure.ir.interpret import bind_sizes
from dure.ir.passes import Sampler, allowed_error, difference, results_on
from dure.ir.portable_split import split_evaluator
from dure.ir.samples import Sample, draw
from dure.ir.types import TileType
from dure.ir.verifier import Obligation, broken, verify

#: What the numbers of rules stand for.
RULES: dict[int, str] = {
    1: "tile extents are powers of two; the target pads, masks or splits",
    2: "outside of a tensor a load is undefined until masked: fill is part of the load",
    3: "a run-time index addresses an axis before the last two",
    4: "layout belongs to the buffer",
    5: "index arrays are one-dimensional int32",
    6: "a reduction is a loop in the kernel, never an axis of the grid",
    7: "loops carry values of fixed type, and run-time bounds have declared maxima",
    8: "a run-time if takes a scalar and yields typed results or stores",
    9: "a dot states its accumulator; its operands are float32, bfloat16, fp8 or int8",
    10: "float16, int64 and fp4 are storage; arithmetic on 8-bit values goes through int32",
    11: "quantized weights are packed with N minor, nibbles never interleaved along it",
    12: "a reduction has one axis and keeps it; argmax gives int32, the lowest index",
    13: "values of tiles are not sliced or indexed",
    14: "a reshape merges or splits leading axes, or whole minor 128s; iota is int32",
    15: "a scatter into shared pages is ordered",
}
#: Partitions of a scratchpad: a slice of RNGD, and Trainium's.
PARTITIONS = (64, 128)
#: Sizes in the values' check: beyond the larger partition dimension where a tile is.
_LARGEST_SIZE = 70
_DRAWS = 8
#: Types that are stored and converted but not computed with on every chip (rule 10).
_STORAGE_ONLY = frozenset({"float16", "float64", "int64"})
#: What may be done with 8-bit values without going through int32 (rule 10).
_MOVES = frozenset({"cast", "where", "and", "or", "xor", "not", "eq", "ne"})
_LANES = 128


@dataclass(frozen=True, slots=True)
class Note:
    """What a legaliser has to mend, by the rule of the language page that asks for it."""

    rule: int
    what: str
    span: Span | None


@dataclass(frozen=True, slots=True)
class PortableReport:
    """What is known about a kernel that passed.

    ``live_tile_bytes`` is the most that its tiles take at once, if none shares memory with another;
    ``descriptors`` counts loads and stores, ``lists`` those by index list.  ``partitions`` are the
    partition dimensions at which its values were checked.
    """

    name: str
    live_tile_bytes: int
    descriptors: int
    lists: int
    notes: tuple[Note, ...]
    obligations: tuple[Obligation, ...]
    partitions: tuple[int, ...]


def check_portable(
    function: Function,
    *,
    sampler: Sampler | None = None,
    partitions: Sequence[int] = PARTITIONS,
) -> PortableReport:
    """Check a kernel against the rules, and its values split at each partition dimension.

    ``sampler`` gives arguments where the types alone don't (ragged work lists).  Raises
    :class:`IRError` at the author's line for a broken rule, and for values that differ.
    """
    if function.level != "tile":
        raise broken(f"'{function.name}' is a {function.level} function", "a kernel is tile level")
    obligations = verify(function)
    accesses = accesses_of(function)
    notes = (*_ops(function), *_descriptors(accesses), *_arguments(function))
    touching = [a for a in accesses.all if a.kind != "index_load"]
    _check_values(function, sampler or _drawn, partitions)
    return PortableReport(
        function.name,
        live_tile_bytes(function),
        len(touching),
        sum(any(axis.entries is not None for axis in a.axes) for a in touching),
        tuple(dict.fromkeys(notes)),
        obligations,
        tuple(partitions),
    )


def _drawn(function: Function, seed: int) -> Sample:
    return draw(function, seed, largest=_LARGEST_SIZE)


# --- ops ----------------------------------------------------------------------------------------


def _ops(function: Function) -> Iterator[Note]:
    for op in walk(function.body):
        if op.definition.level not in ("tile", "any"):
            raise broken(f"{op.name} is an op of level {op.definition.level}", "no target's op", op)
        for value in (*op.results, *(a for r in op.regions for a in r.args)):
            _check_shape(op, value)
        _check_arithmetic(op)
        _check_loop(op)
        yield from _notes(op)


def _check_shape(op: Op, value: Value) -> None:
    kind = value.type
    if isinstance(kind, TileType) and any(e & (e - 1) for e in kind.shape):
        raise broken(
            f"{op.name} gives a tile of shape {kind.shape}",
            "tile extents are powers of two (rule 1): chips pad, mask or split them",
            op,
            "cover the extent with the next power of two; what lies outside is cut",
        )


def _check_arithmetic(op: Op) -> None:
    computes = op.definition.elementwise or op.name in ("reduce", "reduce_with", "cumsum")
    if not computes or op.name in ("cast", "where", "full"):
        return
    for operand in op.operands:
        dtype = operand.type.dtype
        if not isinstance(dtype, DType):
            continue
        if dtype.name in _STORAGE_ONLY:
            raise broken(
                f"{op.name} of {dtype}",
                f"{', '.join(sorted(_STORAGE_ONLY))} are storage, not compute types (rule 10)",
                op,
                "convert with .to(dl.float32) or .to(dl.int32) first",
            )
        if dtype.bits <= 8 and dtype.kind != "bool" and op.name not in _MOVES:
            raise broken(
                f"{op.name} of {dtype}",
                "arithmetic on 8-bit values goes through int32 or float32 (rule 10)",
                op,
                "convert with .to(dl.int32) first",
            )


def _check_loop(op: Op) -> None:
    if op.name == "iota" and op.attr("dtype").name != "int32":
        raise broken(
            f"iota of {op.attr('dtype')}", "iota is int32 (rule 14)", op, "use dl.arange, then .to"
        )
    if op.name == "dot":
        for operand in op.operands[:2]:
            dtype = operand.type.dtype
            if isinstance(dtype, DType) and (dtype.kind == "uint" or dtype.name == "float64"):
                raise broken(
                    f"dot with an operand of {dtype}",
                    "a dot takes float32, bfloat16, fp8 or int8 (rule 9)",
                    op,
                    "convert the operand with .to",
                )
    if op.name != "for":
        return
    trips = Range(as_expr(op.attr("start")), as_expr(op.attr("stop")), op.attr("step")).trips
    if bounds(trips)[1] is None:
        unbounded = sorted(str(s) for s in symbols(trips) if bounds(s)[1] is None)
        raise broken(
            f"a loop of up to {trips} turns, which has no bound",
            "run-time bounds have declared maxima (rule 7)",
            op,
            f"declare an upper bound for {', '.join(unbounded)}",
        )


def _notes(op: Op) -> Iterator[Note]:
    if op.name == "dot":
        for operand in op.operands[:2]:
            dtype = operand.type.dtype
            if isinstance(dtype, DType) and dtype.name == "float16":
                yield Note(9, f"a dot with an operand of {dtype} is widened first", op.span)
    elif op.name == "reshape" and not _easy_reshape(op):
        source, target = op.operands[0].tile.shape, op.result.tile.shape
        yield Note(14, f"reshape of {source} to {target} goes through memory", op.span)
    elif op.name == "cumsum" or (op.name == "reduce" and op.attr("combiner") == "prod"):
        name = op.name if op.name == "cumsum" else "prod"
        yield Note(12, f"{name} is decomposed", op.span)
    elif op.name == "reduce_with":
        yield Note(12, "a combine function is decomposed into steps over halves", op.span)
    elif op.name == "reduce" and op.attr("combiner").startswith("arg"):
        dtype = op.operands[0].type.dtype
        if isinstance(dtype, DType) and dtype.name != "float32":
            yield Note(12, f"argmax of {dtype} is a maximum and an iota", op.span)


def _easy_reshape(op: Op) -> bool:
    """Leading axes merge or split, extents of 1 come and go, the minor axis moves by 128s."""
    source, target = op.operands[0].tile.shape, op.result.tile.shape
    if not source or not target or source[-1] == target[-1]:
        return True
    if [e for e in source if e != 1] == [e for e in target if e != 1]:
        return True
    return source[-1] % _LANES == 0 and target[-1] % _LANES == 0


# --- memory -------------------------------------------------------------------------------------


def _descriptors(accesses: Accesses) -> Iterator[Note]:
    for access in accesses.all:
        if access.kind == "index_load":
            continue
        rank = len(access.axes)
        name, span = access.param.value.name, access.op.span
        for axis, entry in enumerate(access.axes):
            chosen = entry.entries is not None or any(
                s in accesses.symbols for s in symbols(entry.start)
            )
            if not chosen or rank == 1:
                continue
            if axis == rank - 1:
                raise broken(
                    f"a {access.kind} of '{name}' at a run-time index along its last axis",
                    "a run-time index addresses an axis before the last (rule 3)",
                    access.op,
                    "put the indexed axis first",
                )
            if axis == rank - 2 and access.tensor.tensor.index is None:
                yield Note(3, f"the rows of '{name}' are laid out (rows, columns / 128, 128)", span)
        yield from _store_notes(access)


def _store_notes(access: TensorAccess) -> Iterator[Note]:
    if access.kind != "store":
        return
    name, span = access.param.value.name, access.op.span
    if access.op.attr("combine"):
        yield Note(6, f"combining stores into '{name}' take two passes", span)
    if any(axis.entries is not None for axis in access.axes):
        yield Note(15, f"rows of '{name}' that share a page are stored in order", span)


def _arguments(function: Function) -> Iterator[Note]:
    for param in function.params:
        kind = param.value.tensor
        if kind.index is not None and kind.rank > 1:
            yield Note(5, f"index argument '{param.value.name}' is passed as one axis", None)


# --- live tiles ---------------------------------------------------------------------------------


def live_tile_bytes(function: Function) -> int:
    """The most bytes that a kernel's tiles take at once, each in memory of its own."""
    return _peak(function.body, frozenset())


def _peak(region: Region, outer: frozenset[Value]) -> int:
    """The peak inside of a region, with ``outer`` tiles live throughout."""
    last: dict[Value, int] = {}
    for place, op in enumerate(region.ops):
        for value in _touched(op):
            last[value] = place
    for value in region.yields:
        last[value] = len(region.ops)
    live = set(outer) | {a for a in region.args if _is_tile(a)}
    most = _bytes(live)
    for place, op in enumerate(region.ops):
        results = {r for r in op.results if _is_tile(r)}
        inner = [_peak(r, frozenset(live)) for r in op.regions]
        most = max(most, _bytes(live | results), *inner, 0)
        live |= results
        live = {v for v in live if v in outer or last.get(v, -1) > place}
    return most


def _touched(op: Op) -> Iterator[Value]:
    yield from op.operands
    for region in op.regions:
        yield from region.yields
        for inner in region.ops:
            yield from _touched(inner)


def _is_tile(value: Value) -> bool:
    return isinstance(value.type, TileType)


def _bytes(values: set[Value]) -> int:
    return sum(v.type.bytes for v in values if isinstance(v.type, TileType))


# --- values -------------------------------------------------------------------------------------


def _check_values(function: Function, sampler: Sampler, partitions: Sequence[int]) -> None:
    sample = _runnable(function, sampler)
    reference = results_on(function, sample)
    allowed = allowed_error(function)
    for count in partitions:
        found = results_on(function, sample, evaluator=split_evaluator(count))
        for want, got in zip(reference, found, strict=True):
            problem = difference(want, got, allowed)
            if problem:
                raise IRError(
                    f"'{function.name}' split over {count} partitions gives other values: "
                    f"{problem}",
                    rule="a kernel computes the same on chips of any partition dimension",
                    fix="see which of its ops depends on how a tile is cut",
                )


def _runnable(function: Function, sampler: Sampler) -> Sample:
    problem = ""
    for seed in range(_DRAWS):
        try:
            sample = sampler(function, seed)
            results_on(function, sample)
        except IRError as error:
            problem = error.what
            continue
        sizes = bind_sizes(function, sample.arguments, sample.sizes)
        if all(evaluate(extent, sizes) > 0 for extent in function.grid):
            return sample
        problem = problem or "their grid is empty"
    raise IRError(
        f"'{function.name}' runs on no generated arguments: {problem}",
        rule="the values of a portable kernel are checked",
        fix="pass sampler=, which gives arguments that fit together",
    )
