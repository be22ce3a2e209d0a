"""From a ``machine.toml`` to a :class:`~dure.machine.schema.Machine`, or an error that says where.

schema = 1
name = "..."
kind = "chip"                            # or "host"
summary = "..."
cores = { value = 8, unit = "1", status = "published", source = "..." }
clock = { ... }
[engines.NAME]                           # operations, memory, width, registers
rates.float32 = { ... }                  # multiply-adds a cycle of a core, by dtype
[memories.NAME]                          # size; line, bandwidth, shared_by, backed_by
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from dure.errors import TargetError
from dure.machine.document import parse_document, read_text
from dure.machine.quantity import Quantity, read_quantity
from dure.machine.schema import KINDS, SCHEMA, SHARED_BY, Engine, Machine, Memory

_TOP = frozenset({"schema", "name", "kind", "summary", "cores", "clock", "engines", "memories"})
_ENGINE = frozenset({"operations", "memory", "width", "registers", "issue"})
_MEMORY = frozenset({"size", "line", "bandwidth", "shared_by", "backed_by"})
_BANDWIDTH = ("bandwidth", "bytes a cycle")


def load_machine(path: Path) -> Machine:
    """The machine that a file describes.

    Raises :class:`~dure.errors.TargetError` for a file that can't be read, isn't TOML or breaks the
    schema.
    """
    return parse_machine(read_text(path), str(path))


def parse_machine(text: str, where: str) -> Machine:
    """The machine that a text describes; ``where`` names it in errors."""
    data = parse_document(text, where, SCHEMA, "schema")
    _check_keys(data, _TOP, where)
    memories = tuple(
        _memory(n, t, f"{where}: memories.{n}") for n, t in _tables(data, "memories", where)
    )
    engines = tuple(
        _engine(n, t, f"{where}: engines.{n}") for n, t in _tables(data, "engines", where)
    )
    _check_memories(memories, engines, where)
    return Machine(
        name=_text(data, "name", where),
        kind=_choice(data, "kind", KINDS, where),
        summary=_text(data, "summary", where),
        cores=_quantity(data, "cores", ("count",), where),
        clock=_quantity(data, "clock", ("frequency",), where),
        engines=engines,
        memories=memories,
    )


def _engine(name: str, table: Mapping[str, object], where: str) -> Engine:
    _check_keys(table, _ENGINE, where)
    issue = table.get("issue", {})
    if not isinstance(issue, dict):
        raise TargetError("'issue' isn't a table", where=where, fix="write issue.dot = { ... }")
    operations = _names(table, "operations", where)
    _check_keys(cast(dict[str, object], issue), frozenset(operations), f"{where}.issue")
    return Engine(
        name=name,
        operations=operations,
        memory=_text(table, "memory", where),
        width=_quantity(table, "width", ("bits",), where),
        registers=_quantity(table, "registers", ("count",), where),
        issue=tuple(
            (name, read_quantity(entry, ("operations a cycle",), f"{where}.issue.{name}"))
            for name, entry in cast(dict[str, object], issue).items()
        ),
    )


def _memory(name: str, table: Mapping[str, object], where: str) -> Memory:
    _check_keys(table, _MEMORY, where)
    has = table.keys()
    return Memory(
        name=name,
        shared_by=_choice(table, "shared_by", SHARED_BY, where),
        backed_by=_text(table, "backed_by", where) if "backed_by" in has else "",
        size=_quantity(table, "size", ("bytes",), where),
        line=_quantity(table, "line", ("bytes",), where) if "line" in has else None,
        bandwidth=_quantity(table, "bandwidth", _BANDWIDTH, where) if "bandwidth" in has else None,
    )


def _check_memories(memories: tuple[Memory, ...], engines: tuple[Engine, ...], where: str) -> None:
    """Every memory that is named is there, and no memory is behind itself."""
    backing = {memory.name: memory.backed_by for memory in memories}
    named = [(f"engines.{e.name}.memory", e.memory) for e in engines]
    named += [(f"memories.{m.name}.backed_by", m.backed_by) for m in memories if m.backed_by]
    for place, name in named:
        if name not in backing:
            raise TargetError(
                f"there is no memory named '{name}'",
                where=f"{where}: {place}",
                rule="the memories are: " + ", ".join(backing),
            )
    for start in backing:
        seen: list[str] = []
        name = start
        while name:
            if name in seen:
                raise TargetError(
                    "a memory is behind itself: " + " -> ".join([*seen, name]),
                    where=f"{where}: memories.{start}.backed_by",
                    rule="each memory is backed by one that is farther from the engines",
                )
            seen.append(name)
            name = backing[name]


def _tables(
    data: Mapping[str, object], key: str, where: str
) -> Iterable[tuple[str, Mapping[str, object]]]:
    found = data.get(key)
    if not isinstance(found, dict) or not found:
        raise TargetError(
            f"a machine has no {key}", where=where, fix=f"add a table [{key}.NAME] for each"
        )
    for name, table in cast(dict[str, object], found).items():
        if not isinstance(table, dict):
            raise TargetError(
                f"{key}.{name} isn't a table", where=where, fix=f"write [{key}.{name}]"
            )
        yield name, cast(dict[str, object], table)


def _quantity(
    table: Mapping[str, object], key: str, kinds: tuple[str, ...], where: str
) -> Quantity:
    if key not in table:
        raise TargetError(
            f"the number '{key}' is missing",
            where=where,
            fix=f'add {key} = {{ value = ..., unit = "...", status = "...", source = "..." }}',
        )
    return read_quantity(table[key], kinds, f"{where}: {key}")


def _check_keys(table: Mapping[str, object], known: frozenset[str], where: str) -> None:
    unknown = sorted(table.keys() - known)
    if unknown:
        raise TargetError(
            f"the schema has no '{unknown[0]}' here",
            where=where,
            rule="there are: " + ", ".join(sorted(known)),
            fix="leave it out, or check how it is spelt",
        )


def _text(table: Mapping[str, object], key: str, where: str) -> str:
    value = table.get(key)
    if isinstance(value, str) and value.strip():
        return value
    raise TargetError(f"'{key}' isn't a text", where=where, fix=f'add {key} = "..."')


def _choice(table: Mapping[str, object], key: str, choices: tuple[str, ...], where: str) -> str:
    value = table.get(key)
    if isinstance(value, str) and value in choices:
        return value
    raise TargetError(
        f"'{key}' is {value!r}", where=where, fix=f"write one of {', '.join(choices)}"
    )


def _names(table: Mapping[str, object], key: str, where: str) -> tuple[str, ...]:
    value = table.get(key)
    items = cast(list[object], value) if isinstance(value, list) else []
    names = tuple(item for item in items if isinstance(item, str) and item)
    if not names or len(names) != len(items):
        raise TargetError(
            f"'{key}' isn't a list of names", where=where, fix=f'write {key} = ["..."]'
        )
    return names
