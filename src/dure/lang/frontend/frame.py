"""A function that is being walked: its names, where they come from, and errors at its lines."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from dure.errors import DureError, KernelError
from dure.ir.core import Span
from dure.lang.frontend.liveness import Names, needed_names, own_names
from dure.lang.frontend.recorder import Recorder
from dure.lang.frontend.source import Captured, Empty, Source, cell_value


class Call(Protocol):
    """Call a value of the kernel; injected, since calls and statements need each other."""

    def __call__(
        self,
        frame: Frame,
        function: object,
        args: Sequence[object],
        keywords: Mapping[str, object],
        span: Span,
    ) -> object: ...


@dataclass(frozen=True, slots=True)
class Unbound:
    """What a name stands for where it may have no value, and why."""

    reason: str
    fix: str


@dataclass(frozen=True, eq=False, slots=True)
class InnerFunction:
    """A function or lambda that is defined inside of a kernel."""

    source: Source
    frame: Frame


@dataclass(eq=False)
class Frame:
    """One call of a function: ``parent`` is the frame in which it was defined, if inside of a
    kernel.

    ``conditional`` counts the run-time ifs and loops around the current statement.
    """

    source: Source
    recorder: Recorder
    call: Call
    locals: dict[str, object] = field(default_factory=dict[str, object])
    caller: Span | None = None
    parent: Frame | None = None
    depth: int = 0
    conditional: int = 0

    @cached_property
    def needed(self) -> dict[ast.stmt, Names]:
        """See :func:`needed_names`."""
        return needed_names(self.source.node)

    @cached_property
    def own_names(self) -> Names:
        """Names that this function binds somewhere."""
        return own_names(self.source.node)

    def span(self, node: ast.AST) -> Span:
        """Where ``node`` stands, with the calls that led here."""
        return self.source.span(node, self.caller)

    def lookup(self, name: str) -> object:
        """What a name stands for."""
        frame: Frame | None = self
        while frame is not None:
            if name in frame.locals:
                found = frame.locals[name]
                if isinstance(found, Unbound):
                    raise KernelError(f"'{name}' {found.reason}", rule=_BEFORE, fix=found.fix)
                return found
            if name in frame.own_names:
                raise KernelError(
                    f"'{name}' is read before it is written",
                    rule=_BEFORE,
                    fix=f"assign '{name}' above this line, on every way that leads here",
                )
            if frame.parent is None:
                found = self._outside(frame.source, name)
                if found is not Empty:
                    return found
            frame = frame.parent
        if hasattr(builtins, name):
            return getattr(builtins, name)
        raise KernelError(
            f"the name '{name}' is not defined",
            rule="a kernel's names are its parameters, its variables, and what its module can see",
            fix="define or import it, or correct the spelling",
        )

    def _outside(self, source: Source, name: str) -> object:
        """A name of the closure or the module; the kernel is stale if it changes."""
        place = source.cells.get(name, source.globals)
        value: object = place.get(name, Empty) if isinstance(place, dict) else cell_value(place)
        if value is not Empty:
            self.recorder.captured[id(place), name] = Captured(place, name, value)
        return value

    @contextmanager
    def located(self, node: ast.AST) -> Generator[Span]:
        """Ops recorded inside carry this place, and so do errors."""
        span = self.span(node)
        before, self.recorder.span = self.recorder.span, span
        try:
            yield span
        except DureError as error:
            if not error.where:
                error.where = span.render()
            raise
        except _STATIC_ERRORS as error:
            raise KernelError(
                f"{type(error).__name__}: {error}",
                where=span.render(),
                rule="this is computed when the kernel is compiled, by Python's rules",
                fix="correct the values that it is computed from",
            ) from error
        finally:
            self.recorder.span = before


_BEFORE = "a name has a value before it is read"
_STATIC_ERRORS = (
    *(TypeError, ValueError, ZeroDivisionError, OverflowError, IndexError, KeyError),
    *(AttributeError,),
)
Handler = Callable[[Frame, ast.AST], object]
