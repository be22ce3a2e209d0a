"""Compile a kernel's source to a tile function: two walks, the first of which finds grid and
ranges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dure.errors import IRError, KernelError
from dure.ir import dtypes
from dure.ir.core import Function, Param, Region, Value
from dure.ir.expr import Expr, Symbol, as_expr, symbols
from dure.ir.layout import AnyLayout, Layout
from dure.ir.types import Access, TensorType
from dure.lang.frontend.calls import call, run_function
from dure.lang.frontend.frame import Frame
from dure.lang.frontend.guesses import guesses_of
from dure.lang.frontend.inference import Facts, infer_grid, infer_ranges
from dure.lang.frontend.proofs import Guard
from dure.lang.frontend.recorder import Recorder
from dure.lang.frontend.source import Captured, Source
from dure.lang.signature import Signature
from dure.lang.tensor import Tensor
from dure.lang.values import building, plain

#: The range of an index argument that addresses nothing with a known size.
LARGEST_INDEX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Specialization:
    """A compiled kernel: the function, what a launch checks, and whether the grid is known."""

    function: Function
    guards: tuple[Guard, ...]
    grid_follows: bool
    captured: tuple[Captured, ...] = ()

    def is_stale(self) -> bool:
        """Whether a global or closure variable that the kernel used has another value now."""
        return not all(name.is_same() for name in self.captured)


def compile_kernel(
    signature: Signature,
    source: Source,
    types: Sequence[TensorType | None],
    consts: Mapping[str, object],
    *,
    explicit_grid: bool = False,
) -> Specialization:
    """Specialise a kernel to its arguments' types and consts.

    The grid follows from the stores unless ``explicit_grid``; where it doesn't follow its extents
    are symbols (``grid.0``, ...) that the launch gives.
    """
    names = signature.tensor_names(len(types))
    typed = [_declared(signature, n, t) for n, t in zip(names, types, strict=True)]
    try:
        params, recorder = _Walks(signature, source, names, typed, consts, explicit_grid).settled()
    except IRError as error:
        raise KernelError(error.what, where=error.where, rule=error.rule, fix=error.fix) from error
    return Specialization(
        _function(source.name, params, recorder),
        # Extents that disagree explain best why an index leaves its tensor: they come first.
        tuple(sorted(recorder.guards.values(), key=lambda g: not g.is_equality)),
        grid_follows=not recorder.grid_symbols and not explicit_grid,
        captured=tuple(recorder.captured.values()),
    )


@dataclass(frozen=True)
class _Walks:
    """Walks over a kernel: what a first one touches says what the grid is and what index arguments
    may hold, and with that a second one settles what lies inside of what.
    """

    signature: Signature
    source: Source
    names: Sequence[str]
    types: Sequence[TensorType | None]
    consts: Mapping[str, object]
    explicit_grid: bool

    def settled(self) -> tuple[list[Value], Recorder]:
        """The kernel's parameters and its recorded body.

        Where the kernel was specialised before with other consts, what was found then is tried: if
        the walk that starts from it finds the same, no other is needed.
        """
        guesses = guesses_of(self.source, (*self.types, self.explicit_grid))
        guess = guesses.facts(self.consts)
        if guess is not None:
            found = self._tried(guess)
            if found is not None:
                return found
        first = Recorder(settled=False)
        self.over(self.types, first)
        facts = self.facts(first)
        guesses.learn(facts, self.consts, wrong=guess is not None and not facts.same(guess))
        return self.knowing(facts)

    def _tried(self, guess: Facts) -> tuple[list[Value], Recorder] | None:
        try:
            params, recorder = self.knowing(guess)
        except (KernelError, IRError):
            return None  # it may be the guess that is wrong
        return (params, recorder) if self.facts(recorder).same(guess) else None

    def facts(self, recorder: Recorder) -> Facts:
        """What follows from what a walk has touched."""
        types = {n: t for n, t in zip(self.names, self.types, strict=True) if t}
        counted = None if self.explicit_grid else infer_grid(recorder)
        return Facts(counted, infer_ranges(recorder, types))

    def knowing(self, facts: Facts) -> tuple[list[Value], Recorder]:
        """The walk that knows what follows."""
        pairs = zip(self.names, self.types, strict=True)
        recorder = Recorder(facts.grid, settled=True)
        return self.over([_ranged(n, t, facts.ranges) for n, t in pairs], recorder), recorder

    def over(self, types: Sequence[TensorType | None], recorder: Recorder) -> list[Value]:
        """A walk with arguments of these types."""
        return _walk(self.signature, self.source, self.names, types, self.consts, recorder)


def _declared(signature: Signature, name: str, type: TensorType | None) -> TensorType | None:
    """The type with the parameter's declared index range; an open one ends at LARGEST_INDEX."""
    index = signature.index_of(name)
    if type is None:
        return None
    if index is None:
        return replace(type, index=None, unique=False)
    if type.dtype is not dtypes.int32:
        raise KernelError(
            f"the index argument '{name}' has elements of {type.dtype}",
            rule="a dl.Index argument is int32",
            fix='convert it, as in x.astype("int32")',
        )
    if type.index is not None:
        return replace(type, unique=type.unique or index.unique)
    high = LARGEST_INDEX if index.high is None else index.high
    return replace(type, index=(as_expr(index.low), as_expr(high)), unique=index.unique)


def _ranged(name: str, type: TensorType | None, ranges: Mapping[str, Expr]) -> TensorType | None:
    if type is None or type.index is None or name not in ranges:
        return type
    low, high = type.index
    if high is not as_expr(LARGEST_INDEX):
        return type
    return replace(type, index=(low, ranges[name]))


def _walk(
    signature: Signature,
    source: Source,
    names: Sequence[str],
    types: Sequence[TensorType | None],
    consts: Mapping[str, object],
    recorder: Recorder,
) -> list[Value]:
    handles: list[Tensor | None] = []
    params: list[Value] = []
    for name, type in zip(names, types, strict=True):
        if type is None:
            handles.append(None)
            continue
        value = Value(type, name)
        params.append(value)
        handles.append(Tensor(name, type, value, [plain(e) for e in type.shape]))
    arguments = signature.arguments(handles, consts)
    frame = Frame(source, recorder, call, arguments)
    with building(recorder):
        result = run_function(frame, source.node)
    if result is not None:
        raise KernelError(
            f"the kernel '{source.name}' returns a value",
            where=frame.span(source.node).render(),
            rule="a kernel gives its results by storing them",
            fix="store the tile into a tensor parameter",
        )
    return params


def _function(name: str, params: Sequence[Value], recorder: Recorder) -> Function:
    access = _accesses(recorder)
    return Function(
        name,
        "tile",
        tuple(Param(v, access.get(v.name, "in")) for v in params),
        Region((), tuple(recorder.blocks[0].ops)),
        (*argument_symbols([v.tensor for v in params]), *recorder.grid_symbols),
        tuple(recorder.grid),
        tuple(recorder.program_ids),
    )


def _accesses(recorder: Recorder) -> dict[str, Access]:
    found: dict[str, Access] = {}
    for name, stores in recorder.accesses:
        before = found.get(name)
        now: Access = "out" if stores else "in"
        found[name] = now if before in (None, now) else "inout"
    return found


def argument_symbols(types: Sequence[TensorType]) -> tuple[Symbol, ...]:
    """The size and stride symbols of argument types, in the order in which they first occur."""
    found: dict[Symbol, None] = {}
    for type in types:
        for expr in [*type.shape, *_layout_exprs(type.layout), *(type.index or ())]:
            for one in sorted(symbols(expr), key=lambda s: s.name):
                found[one] = None
    return tuple(found)


def _layout_exprs(layout: AnyLayout | None) -> list[Expr]:
    if layout is None:
        return []
    if not isinstance(layout, Layout):
        return [e for _, plane in layout.planes for e in _layout_exprs(plane)]
    strides = [digit.stride for digits in layout.axes for digit in digits]
    return [as_expr(s) for s in (*strides, layout.offset)]
