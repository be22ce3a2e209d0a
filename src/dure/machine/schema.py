"""What a machine file says, as frozen objects: cores, engines, memories, and their numbers.

Version 1 of the schema.  Nothing here names a machine: what makes machines differ is data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from dure.errors import TargetError
from dure.machine.quantity import Quantity

SCHEMA = 1
"""The version of the schema that this package reads."""

KINDS = ("host", "chip")
"""``host``: the processor that dure itself runs on.  ``chip``: an accelerator."""

SHARED_BY = ("core", "machine")
"""Who has a memory to itself."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What computes: ``operations`` it does, and the memory that feeds it.

    ``width`` (bits) and ``registers`` are those of its register file; ``issue`` is how many whole
    registers a core works on in a cycle, by operation.
    """

    name: str
    operations: tuple[str, ...]
    memory: str
    width: Quantity
    registers: Quantity
    issue: tuple[tuple[str, Quantity], ...] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory: ``size`` and ``line`` (the least that moves) in bytes.

    ``bandwidth`` is that of one core where the memory is a core's own, else of all of them.
    ``backed_by`` names the memory whose bytes it holds, or is empty.
    """

    name: str
    shared_by: str
    backed_by: str
    size: Quantity
    line: Quantity | None = None
    bandwidth: Quantity | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine.  ``features`` are names of what was found on it, for people to read."""

    name: str
    kind: str
    summary: str
    cores: Quantity
    clock: Quantity
    engines: tuple[Engine, ...]
    memories: tuple[Memory, ...]
    schema: int = SCHEMA
    features: tuple[str, ...] = ()

    def memory(self, name: str) -> Memory:
        """The memory with this name; :class:`~dure.errors.TargetError` where there is none."""
        return _named(self.memories, name, f"memory of {self.name}")

    def engine(self, name: str) -> Engine:
        """The engine with this name; :class:`~dure.errors.TargetError` where there is none."""
        return _named(self.engines, name, f"engine of {self.name}")

    def quantities(self) -> Iterator[tuple[str, Quantity]]:
        """Every number with its dotted path, as in ``memories.l2.size``."""
        yield "cores", self.cores
        yield "clock", self.clock
        for engine in self.engines:
            path = f"engines.{engine.name}"
            yield f"{path}.width", engine.width
            yield f"{path}.registers", engine.registers
            for operation, rate in engine.issue:
                yield f"{path}.issue.{operation}", rate
        for memory in self.memories:
            path = f"memories.{memory.name}"
            yield f"{path}.size", memory.size
            if memory.line is not None:
                yield f"{path}.line", memory.line
            if memory.bandwidth is not None:
                yield f"{path}.bandwidth", memory.bandwidth

    def with_detected(self, values: Mapping[str, float], features: tuple[str, ...] = ()) -> Machine:
        """This machine with detected values by dotted path, in base units (1, bit, B, Hz, B/s).

        Raises :class:`~dure.errors.TargetError` for a path that isn't there, a number that isn't to
        be detected, and a value that isn't positive and finite.
        """
        paths = dict(self.quantities())
        for path in values:
            _named_path(paths, path, self.name)

        def fill(path: str, quantity: Quantity) -> Quantity:
            return quantity.with_base(values[path], path) if path in values else quantity

        return dataclasses.replace(
            self,
            cores=fill("cores", self.cores),
            clock=fill("clock", self.clock),
            engines=tuple(
                dataclasses.replace(
                    e,
                    width=fill(f"engines.{e.name}.width", e.width),
                    registers=fill(f"engines.{e.name}.registers", e.registers),
                    issue=tuple((o, fill(f"engines.{e.name}.issue.{o}", q)) for o, q in e.issue),
                )
                for e in self.engines
            ),
            memories=tuple(
                dataclasses.replace(
                    m,
                    size=fill(f"memories.{m.name}.size", m.size),
                    line=m.line and fill(f"memories.{m.name}.line", m.line),
                    bandwidth=m.bandwidth and fill(f"memories.{m.name}.bandwidth", m.bandwidth),
                )
                for m in self.memories
            ),
            features=features or self.features,
        )


_Named = TypeVar("_Named", Engine, Memory)


def _named(things: tuple[_Named, ...], name: str, what: str) -> _Named:
    for thing in things:
        if thing.name == name:
            return thing
    raise TargetError(
        f"there is no {what} named '{name}'",
        rule="there are: " + ", ".join(thing.name for thing in things),
    )


def _named_path(paths: Mapping[str, Quantity], path: str, machine: str) -> None:
    if path not in paths:
        raise TargetError(
            f"{machine} has no number {path}", rule="its numbers are: " + ", ".join(paths)
        )
