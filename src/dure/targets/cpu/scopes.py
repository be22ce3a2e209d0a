"""Where a pure instruction is written: once, and in front of the loops that don't change it.

A function's code is a tree of scopes: loops, and the two sides of branches.  An instruction that
only computes belongs to the innermost scope in which one of its operands is defined; what a loop
inside of that scope asks for is written in front of the loop, and what was written before in a
scope around is used again.  LLVM's passes that find this out afterwards (common subexpressions,
loop-invariant code motion) take most of the time of a compilation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TypeAlias

#: Lines, and among them those that are still written in front of loops.
Lines: TypeAlias = "list[str | Lines]"

#: Instructions without effects that cannot trap, whatever their operands are.
_PURE = frozenset(
    (
        *("add", "sub", "mul", "and", "or", "xor", "shl", "lshr", "ashr", "icmp", "getelementptr"),
        *("fadd", "fsub", "fmul", "fdiv", "fneg", "fcmp", "select", "bitcast"),
        *("sext", "zext", "trunc", "fptrunc", "fpext", "sitofp", "uitofp", "fptosi", "fptoui"),
        *("insertelement", "extractelement", "shufflevector"),
    )
)
_PURE_OTHERS = re.compile(
    r"call \S+(?: x \S+)? @llvm\.(?:smin|smax|umin|umax|abs|fma|fabs|sqrt|rint|floor|ceil|trunc"
    r"|minnum|maxnum|minimum|maximum|copysign|ctpop)\."
    # By a positive constant, which traps for no number.
    r"|[su](?:div|rem) (?:<\d+ x )?i\d+>? \S+, (?:splat \(i\d+ )?[1-9]\d*\)?$"
)
_NAME = re.compile(r"%[\w.]+")


@dataclass(eq=False)
class Scope:
    """A loop, a side of a branch, or the whole function: ``front`` is where a loop's scope puts
    what doesn't change in it; a list among the lines of the scope around.
    """

    around: Scope | None = None
    front: Lines | None = None
    #: The text of what is computed here -> its name.
    known: dict[str, str] = field(default_factory=dict[str, str])


def is_pure(text: str) -> bool:
    """Whether an instruction may run earlier, more often, or once for all."""
    return text.split(" ", 1)[0] in _PURE or _PURE_OTHERS.match(text) is not None


class Scopes:
    """The scopes of a function under construction; names from outside belong to the function."""

    def __init__(self) -> None:
        self.now = Scope()
        self._whole = self.now
        self._defined: dict[str, Scope] = {}

    def enter(self, front: Lines | None = None) -> None:
        """What comes now is in a scope of its own: a loop's, if it has a ``front``."""
        self.now = Scope(self.now, front)

    def leave(self) -> None:
        """Back in the scope around."""
        assert self.now.around is not None
        self.now = self.now.around

    def define(self, name: str) -> None:
        """A name that an instruction with effects, or a loop, gives."""
        self._defined[name] = self.now

    def find(self, text: str) -> str | None:
        """The name of what computes the same, if one can be used here."""
        scope: Scope | None = self.now
        while scope is not None:
            if text in scope.known:
                return scope.known[text]
            scope = scope.around
        return None

    def place(self, text: str, name: str) -> Lines | None:
        """Define ``name`` as what a pure instruction computes: the lines in front of a loop that it
        is to be written to, or None for here.
        """
        homes = {id(self._defined.get(n, self._whole)) for n in _NAME.findall(text)}
        front: Lines | None = None
        home = scope = self.now
        while id(scope) not in homes and scope.around is not None:
            if scope.front is not None:
                front, home = scope.front, scope.around
            scope = scope.around
        home.known[text] = name
        self._defined[name] = home
        return front
