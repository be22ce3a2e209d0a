"""What must hold between the parts of a chip: names that are there, ways that lead somewhere, laws
that have a value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from dure.errors import TargetError
from dure.ir.dtypes import DTYPES
from dure.machine.chip import Chip, Dma, Engine
from dure.machine.law import VARIABLES, Law
from dure.machine.quantity import STATUSES, Quantity

OPERATIONS = (
    *("dot", "elementwise", "transcendental", "reduce", "scan"),
    *("transpose", "convert", "copy", "scale", "shift", "square", "sum"),
)
"""Classes of work that an engine may have a law for."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WHOLE = (
    "cores",
    "partitions",
    "banks",
    "outstanding",
    "semaphores",
    "maximum",
    "chain",
    "readers",
)
#: A tile op and a transfer to try every law with.
_SAMPLE = {
    **dict.fromkeys(VARIABLES, 256.0),
    "elements": 65536.0,
    "bytes": 131072.0,
    "bits": 16.0,
    "run": 1024.0,
    "batch": 1.0,
    "rate": 1.0,
}


def check_chip(chip: Chip, where: str) -> None:
    """Raise :class:`~dure.errors.TargetError` for the first rule that the chip breaks."""
    _check_names(chip, where)
    _check_numbers(chip, where)
    _check_memories(chip, where)
    _check_types(chip, where)
    for name, engine in chip.engines.items():
        _check_engine(name, engine, f"{where}: engines.{name}")
    for name, dma in chip.dma.items():
        _check_dma(dma, f"{where}: dma.{name}")
    _check_queues(chip, where)
    _check_ways(chip, where)
    _check_conversions(chip, where)


def _check_names(chip: Chip, where: str) -> None:
    tables: Mapping[str, Mapping[str, object]] = {
        "memories": chip.memories,
        "engines": chip.engines,
        "dma": chip.dma,
        "fabrics": chip.fabrics,
        "links": chip.links,
    }
    for table, entries in tables.items():
        if not entries and table in ("memories", "engines", "dma"):
            raise TargetError(
                f"a chip has no {table}", where=where, fix=f"add a table [{table}.NAME] for each"
            )
        for name in entries:
            if not _NAME.fullmatch(name):
                raise TargetError(
                    f"'{name}' is not a name",
                    where=f"{where}: {table}",
                    rule="names are letters, digits and underscores, and stand in programs",
                    fix="rename it",
                )
    for name in chip.fabrics.keys() & chip.memories.keys():
        raise TargetError(
            f"'{name}' is both a memory and a fabric",
            where=f"{where}: fabrics.{name}",
            rule="a route names memories and fabrics alike",
            fix="rename one of them",
        )


def _check_numbers(chip: Chip, where: str) -> None:
    for path, quantity in chip.quantities():
        place = f"{where}: {path}"
        if quantity.value is None:
            raise TargetError(
                "a chip's number is detected",
                where=place,
                rule="only the machine that dure runs on is detected",
                fix="give it a value, and say published, derived or guessed",
            )
        if path.rsplit(".", 1)[-1] in _WHOLE and not float(quantity.base).is_integer():
            raise TargetError(
                f"{quantity.base:g} is not a whole number", where=place, fix="write a whole number"
            )
    for path, law in chip.laws():
        _check_law_words(path, law, where)
    for name, memory in chip.memories.items():
        if memory.padding and not memory.padding_source.strip():
            raise TargetError(
                "the padding has no source",
                where=f"{where}: memories.{name}.padding",
                rule="every number says where it comes from",
                fix='add padding_source = "published: ..."',
            )
        if any(not bits.isdigit() or min(pair) < 1 for bits, pair in memory.padding.items()):
            raise TargetError(
                "a padding isn't two multiples by the bits of an element",
                where=f"{where}: memories.{name}.padding",
                fix='write padding = { "32" = [8, 128] }',
            )


def _check_law_words(path: str, law: Law, where: str) -> None:
    efficiency = path.endswith(".efficiency")
    if law.status not in STATUSES or law.status == "detected":
        raise TargetError(
            f"'{law.status}' is not a status of a law",
            where=f"{where}: {path}",
            fix="write one of published, derived, guessed",
        )
    if not law.source.strip():
        raise TargetError(
            "a law has no source",
            where=f"{where}: {path}",
            rule="a formula says its unit, its status and its source, as every number does",
            fix='add source = "..."',
        )
    if law.unit != ("1" if efficiency else "cycle"):
        raise TargetError(
            f"the unit '{law.unit}' doesn't fit",
            where=f"{where}: {path}",
            rule="an engine's law gives cycles, an efficiency is a fraction",
            fix=f'write unit = "{"1" if efficiency else "cycle"}"',
        )


def _check_memories(chip: Chip, where: str) -> None:
    for place, name in _named_memories(chip):
        if name not in chip.memories:
            raise TargetError(
                f"there is no memory named '{name}'",
                where=f"{where}: {place}",
                rule="the memories are: " + ", ".join(chip.memories),
                fix=f"write one of them, or add [memories.{name}]",
            )
    for name, dma in chip.dma.items():
        for part in dma.route:
            if part not in chip.memories and part not in chip.fabrics:
                raise TargetError(
                    f"there is no memory or fabric named '{part}'",
                    where=f"{where}: dma.{name}.route",
                    rule="there are: " + ", ".join([*chip.memories, *chip.fabrics]),
                    fix=f"write one of them, or add [fabrics.{part}]",
                )
    for name, memory in chip.memories.items():
        place = f"{where}: memories.{name}"
        size = memory.size.base
        partitions = memory.partitions.base if memory.partitions is not None else 1
        reserved = memory.reserved.base if memory.reserved is not None else 0
        if memory.alignment.base * partitions > size or reserved >= size:
            raise TargetError(
                f"nothing fits in '{name}'",
                where=place,
                rule="the size exceeds the alignment in each partition, and what is reserved",
                fix="check the units of size, alignment and reserved",
            )
        if memory.contention is not None and memory.contention.base >= 1:
            raise TargetError(
                f"instructions lose {memory.contention.base:g} of their speed in '{name}'",
                where=f"{place}.contention",
                rule="the contention is the part that is lost while a DMA is active: below 1",
                fix="write a fraction",
            )
        if size % partitions or not float(memory.alignment.base).is_integer():
            raise TargetError(
                f"'{name}' has partitions or buffers of a broken number of bytes",
                where=place,
                rule="partitions divide the size; an alignment is whole bytes",
                fix="write KiB or MiB where powers of two are meant",
            )
        _check_caches(chip, name, place)
    if chip.memories[chip.home].scope != "chip":
        raise TargetError(
            f"the home memory '{chip.home}' belongs to a core",
            where=f"{where}: home",
            rule="tensors lie where all cores reach them",
            fix=f'give memories.{chip.home} the scope "chip"',
        )


def _check_caches(chip: Chip, start: str, where: str) -> None:
    seen = [start]
    while cache := chip.memories[seen[-1]].cached_by:
        if cache in seen:
            raise TargetError(
                "a memory is cached by itself: " + " -> ".join([*seen, cache]),
                where=f"{where}.cached_by",
                rule="each cache is nearer to the engines than what it keeps",
                fix="leave out the cached_by that closes the circle",
            )
        if chip.memories[cache].scope != "chip":
            raise TargetError(
                f"the cache '{cache}' belongs to a core",
                where=f"{where}.cached_by",
                rule="a memory that keeps another's bytes is shared by all cores",
                fix=f'give memories.{cache} the scope "chip"',
            )
        seen.append(cache)


def _named_memories(chip: Chip) -> Iterator[tuple[str, str]]:
    yield from (("home", chip.home), ("scratchpad", chip.scratchpad), ("lists", chip.lists))
    for name, memory in chip.memories.items():
        if memory.cached_by:
            yield f"memories.{name}.cached_by", memory.cached_by
    for name, engine in chip.engines.items():
        for field, names in (("reads", engine.reads), ("writes", engine.writes)):
            yield from ((f"engines.{name}.{field}", memory) for memory in names)
        if engine.dot is not None:
            yield from ((f"engines.{name}.dot.accumulators", m) for m in engine.dot.accumulators)
    for name, dma in chip.dma.items():
        for pair in dma.moves:
            yield from ((f"dma.{name}.moves", memory) for memory in pair)


def _check_types(chip: Chip, where: str) -> None:
    places: list[tuple[str, Iterable[str]]] = [
        ("storage", chip.storage),
        ("conversions", (*chip.conversions, *chip.conversions.values())),
        ("formats", chip.formats),
        ("peaks.compute", chip.peaks.compute),
    ]
    for name, engine in chip.engines.items():
        places += [(f"engines.{name}.types", engine.types), (f"engines.{name}.rates", engine.rates)]
        if engine.dot is not None:
            results = engine.dot.results
            places.append((f"engines.{name}.dot.types", engine.dot.types))
            places.append((f"engines.{name}.dot.results", (*results, *results.values())))
    for place, names in places:
        for name in names:
            if name not in DTYPES:
                raise TargetError(
                    f"there is no type named '{name}'",
                    where=f"{where}: {place}",
                    rule="the types are: " + ", ".join(DTYPES),
                    fix="write one of them",
                )
    for name, form in chip.formats.items():
        bits = 1 + form.exponent.base + form.mantissa.base
        inside = 2 <= form.exponent.base <= 8 and 1 <= form.mantissa.base <= 23
        if not DTYPES[name].is_float or bits != DTYPES[name].bits or not inside:
            raise TargetError(
                f"a format of {bits:g} bits can't stand for {name}",
                where=f"{where}: formats.{name}",
                rule="a chip's own format is a float with the bits of the type that it stands for: "
                "2 to 8 of exponent, 1 to 23 of mantissa",
                fix="check its exponent and mantissa (one more bit is the sign)",
            )


def _check_engine(name: str, engine: Engine, where: str) -> None:
    if not engine.laws or not engine.reads or not engine.writes:
        raise TargetError(
            f"the engine '{name}' does nothing",
            where=where,
            rule="an engine has laws for what it does, and memories that it reads and writes",
            fix='add [engines.NAME.laws] with, say, elementwise = { law = "...", ... }',
        )
    for operation in engine.laws:
        if operation not in OPERATIONS:
            raise TargetError(
                f"there is no operation named '{operation}'",
                where=f"{where}.laws",
                rule="the operations are: " + ", ".join(OPERATIONS),
                fix="write one of them",
            )
    for operation in (o for stage in engine.passes for o in stage):
        if operation not in engine.laws:
            raise TargetError(
                f"a pass of the engine '{name}' has a stage of {operation}, which has no law",
                where=f"{where}.passes",
                rule="each stage of a pass is work that the engine has a law for: "
                + ", ".join(engine.laws),
                fix="add the law, or leave it out of the stages",
            )
    if ("dot" in engine.laws) != (engine.dot is not None):
        raise TargetError(
            f"the engine '{name}' has a law for dot or a table of dot, but not both",
            where=where,
            rule="a matrix engine says what it takes ([...dot]) and what it costs (laws.dot)",
            fix="add the other one",
        )
    if engine.dot is not None:
        _check_dot(engine, where)
    for operation, law in engine.laws.items():
        types = engine.dot.types if operation == "dot" and engine.dot is not None else engine.types
        _check_law(law, engine.numbers, engine.rates, types, f"{where}.laws.{operation}")


def _check_dot(engine: Engine, where: str) -> None:
    assert engine.dot is not None
    if not engine.dot.types:
        raise TargetError(
            "a matrix engine takes no type", where=f"{where}.dot.types", fix='add "bfloat16"'
        )
    for memory in engine.dot.accumulators or ("",):
        if memory not in engine.writes:
            raise TargetError(
                f"an accumulator lies in '{memory}', which the engine doesn't write",
                where=f"{where}.dot.accumulators",
                rule="accumulators are in memories that the engine writes: "
                + ", ".join(engine.writes),
                fix="write one of them",
            )


def _check_law(
    law: Law,
    numbers: Mapping[str, Quantity],
    rates: Mapping[str, Quantity],
    types: Iterable[str],
    where: str,
) -> None:
    """Its names are known, and it has a positive value for every type."""
    for name in numbers:
        if name in VARIABLES or not _NAME.fullmatch(name):
            raise TargetError(
                f"a number can't be named '{name}'",
                where=where,
                rule="a law's own numbers are names that the simulator doesn't give: it gives "
                + ", ".join(VARIABLES),
                fix="rename it",
            )
    for name in sorted(law.names - VARIABLES.keys() - numbers.keys()):
        raise TargetError(
            f"the law '{law.text}' has an unknown name '{name}'",
            where=where,
            rule="a law uses its engine's numbers"
            + (f" ({', '.join(numbers)})" if numbers else "")
            + " and "
            + ", ".join(VARIABLES),
            fix=f"add it to the numbers, as {name} = {{ value = ..., ... }}",
        )
    values = {**_SAMPLE, **{name: number.base for name, number in numbers.items()}}
    tried = [1.0]
    if "rate" in law.names:
        for name in types:
            if name not in rates:
                raise TargetError(
                    f"there is no rate for {name}",
                    where=where,
                    rule="where a law says `rate`, rates has an entry for each of the types",
                    fix=f"add {name} to the engine's rates, or take it out of its types",
                )
        tried = [rates[name].base for name in types]
    for rate in tried:
        _check_value(law, {**values, "rate": rate}, where)


def _check_value(law: Law, values: Mapping[str, float], where: str) -> None:
    try:
        value = law(values)
    except TargetError as error:
        raise TargetError(error.what, where=where, rule=error.rule, fix=error.fix) from error
    if not 0 <= value < 1e30:
        raise TargetError(
            f"the law '{law.text}' gives {value:g} for a tile of 256 x 256",
            where=where,
            rule="a cost is a number that isn't negative",
            fix="mend the formula or its numbers",
        )


def _check_dma(dma: Dma, where: str) -> None:
    if not dma.moves:
        raise TargetError(
            "a DMA engine moves nothing", where=where, fix='write moves = [["a", "b"]]'
        )
    for source, target in dma.moves:
        if source == target:
            raise TargetError(
                f"a DMA engine moves from '{source}' to itself",
                where=f"{where}.moves",
                rule="a move is from one memory to another",
                fix="leave it out",
            )
    if dma.efficiency is not None:
        _check_law(dma.efficiency, dma.numbers, {}, (), f"{where}.efficiency")
        fraction = dma.efficiency({**_SAMPLE, **{n: q.base for n, q in dma.numbers.items()}})
        if not 0 < fraction <= 1:
            raise TargetError(
                f"the efficiency is {fraction:g} for runs of 1 KiB",
                where=f"{where}.efficiency",
                rule="an efficiency is above 0 and at most 1",
                fix="wrap it in min(1, ...)",
            )


def _check_queues(chip: Chip, where: str) -> None:
    engines = {engine.queue for engine in chip.engines.values()}
    for name, dma in chip.dma.items():
        others = {q for n, d in chip.dma.items() if n != name for q in d.queues}
        for key, queue in (("queue", dma.queue), ("ahead", dma.ahead)):
            if queue in engines | others or (key == "ahead" and queue == dma.queue):
                raise TargetError(
                    f"the queue '{queue}' has another engine, or another use",
                    where=f"{where}: dma.{name}.{key}",
                    rule="a DMA engine has queues of its own",
                    fix="rename the queue",
                )
    for queue in chip.bundles:
        if queue not in engines:
            raise TargetError(
                f"'{queue}' is no queue of an engine",
                where=f"{where}: bundles",
                rule="bundles are instructions of compute queues",
                fix="name one of " + ", ".join(sorted(engines)),
            )
    for queue in {*engines, *chip.transfer_queues}:
        if not _NAME.fullmatch(queue):
            raise TargetError(
                f"'{queue}' is not a name of a queue",
                where=where,
                rule="names are letters, digits and underscores, and stand in programs",
                fix="rename it",
            )


def _check_ways(chip: Chip, where: str) -> None:
    """From the home memory to what engines read, and back from the scratchpad."""
    moves = [move for dma in chip.dma.values() for move in dma.moves]
    works = [(a, b) for e in chip.engines.values() for a in e.reads for b in e.writes]
    inward = _reached(chip.home, moves, works)
    wanted = [("scratchpad", chip.scratchpad), ("lists", chip.lists)]
    wanted += [(f"engines.{n}.reads", m) for n, e in chip.engines.items() for m in e.reads]
    for place, name in wanted:
        if name not in inward:
            raise TargetError(
                f"nothing brings bytes from '{chip.home}' to '{name}'",
                where=f"{where}: {place}",
                rule="DMA moves and engines lead from the home memory to what engines read",
                fix=f'add ["{chip.home}", "{name}"] to the moves of a DMA engine',
            )
    if chip.home not in _reached(chip.scratchpad, moves, works):
        raise TargetError(
            f"nothing brings bytes from '{chip.scratchpad}' back to '{chip.home}'",
            where=f"{where}: dma",
            rule="results go from the scratchpad to the home memory",
            fix=f'add ["{chip.scratchpad}", "{chip.home}"] to the moves of a DMA engine',
        )


def _reached(start: str, *ways: list[tuple[str, str]]) -> set[str]:
    found, edges = {start}, [edge for way in ways for edge in way]
    while new := {b for a, b in edges if a in found} - found:
        found |= new
    return found


def _check_conversions(chip: Chip, where: str) -> None:
    """Whatever is stored becomes a type that elementwise work is done in, where there is any."""
    able = {t for e in chip.engines.values() if "elementwise" in e.laws for t in e.types}
    for start in chip.conversions if able else ():
        seen = [start]
        while seen[-1] not in able and seen[-1] in chip.conversions:
            seen.append(chip.conversions[seen[-1]])
            if seen[-1] in seen[:-1]:
                raise TargetError(
                    "conversions go in a circle: " + " -> ".join(seen),
                    where=f"{where}: conversions.{start}",
                    rule="conversions lead to a type that an engine computes in: "
                    + ", ".join(sorted(able)),
                    fix="convert one of them to such a type",
                )
