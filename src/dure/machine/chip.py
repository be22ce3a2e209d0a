"""The schema of a chip's ``machine.toml``, version 2: what makes chips differ is data.

A chip has ``cores`` equal cores.  What a core has to itself has the scope ``core``; what all of
them share has the scope ``chip``.  Every number is a :class:`~dure.machine.quantity.Quantity` with
its unit, source and status; every cost is a :class:`~dure.machine.law.Law`.  See
``docs/machine-file.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dure.errors import TargetError
from dure.machine.law import Law, check_law
from dure.machine.quantity import Quantity, read_quantity

SCHEMA = 2

#: Special cases of work, and what they are for an engine that doesn't tell them apart.
_GENERAL = {
    **dict.fromkeys(("scale", "shift", "square"), "elementwise"),
    "sum": "reduce",
}


def _carry(read: Callable[[object], object]) -> BeforeValidator:
    """A validator whose TargetError pydantic collects, so that the loader learns its place."""

    def carry(entry: object) -> object:
        try:
            return read(entry)
        except TargetError as error:
            raise ValueError(error.what) from error

    return BeforeValidator(carry)


def _number(*kinds: str) -> Any:
    """A quantity whose unit is one of these kinds."""

    def read(entry: object) -> object:
        return entry if isinstance(entry, Quantity) else read_quantity(entry, kinds, "")

    return _carry(read)


def _read_law(entry: object) -> object:
    if isinstance(entry, Law):
        return entry
    if not isinstance(entry, Mapping) or set(entry) != {"law", "unit", "status", "source"}:  # type: ignore[arg-type]
        raise TargetError(
            "a law isn't a table of law, unit, status and source",
            rule="a formula says its unit, its status and its source, as every number does",
            fix='write { law = "elements / lanes", unit = "cycle", status = ..., source = ... }',
        )
    table = {str(k): str(v) for k, v in entry.items()}  # type: ignore[misc]
    check_law(table["law"], "")
    return Law(table["law"], table["unit"], table["status"], table["source"])


Count: TypeAlias = Annotated[Quantity, _number("count")]
Bytes: TypeAlias = Annotated[Quantity, _number("bytes")]
Frequency: TypeAlias = Annotated[Quantity, _number("frequency")]
Rate: TypeAlias = Annotated[Quantity, _number("bandwidth", "bytes a cycle")]
Duration: TypeAlias = Annotated[Quantity, _number("time", "cycles")]
Flops: TypeAlias = Annotated[Quantity, _number("operations a second")]
Power: TypeAlias = Annotated[Quantity, _number("power")]
Formula: TypeAlias = Annotated[Law, _carry(_read_law)]
Scope: TypeAlias = Literal["core", "chip"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Memory(_Table):
    """A memory of each core, or of the chip.  ``size`` is one core's, or the chip's.

    A memory with ``partitions`` is addressed by partition: a tile's rows (its axis before the last)
    lie in the partitions, row r in partition r mod partitions, and ``size`` is all partitions
    together.  ``alignment``: of a buffer's offset, bytes (in each partition).  ``reserved`` bytes
    aren't the compiler's.  ``bandwidth`` makes it a resource that transfers share; where it is
    None the memory never limits.  ``contention``: the part of its speed that an instruction which
    reads or writes it loses while bytes of a DMA of the same core flow into or out of it.
    ``padding``: multiples that the last two extents of a tile are
    padded to, by bits of an element, with ``padding_source``.
    """

    scope: Scope
    size: Bytes
    partitions: Count | None = None
    banks: Count | None = None
    alignment: Bytes
    reserved: Bytes | None = None
    bandwidth: Rate | None = None
    contention: Count | None = None
    # Reads of the same bytes by several cores at once, or of what lies in a shared memory in
    # between, reach this memory once.
    shared_reads: bool = False
    # At most so many cores get the same bytes from one such read (None: all of the chip).
    readers: Count | None = None
    # The memory of scope chip that keeps what was read from this one, if there is any.
    cached_by: str = ""
    padding: dict[str, tuple[int, int]] = Field(default_factory=dict)
    padding_source: str = ""


class Dot(_Table):
    """What a matrix engine takes.

    ``accumulators``: memories that a result may accumulate in.  ``transposed``: operands ("a",
    "b") that may be given transposed; "a" is (m, k), "b" is (k, n).  ``stationary_k_first`` says
    that "a" must lie with K along its rows (partitions), as (k, m): a as (m, k) is the transposed
    form.  ``types`` are the operand types; both operands have the same one.
    """

    accumulators: tuple[str, ...]
    transposed: tuple[Literal["a", "b"], ...] = ()
    types: tuple[str, ...]
    stationary_k_first: bool = False
    # Result type by operand type; float32 for floats and int32 for integers where nothing is said.
    results: dict[str, str] = Field(default_factory=dict)


class Engine(_Table):
    """What computes.  Engines with the same ``queue`` share one in-order queue.

    ``laws`` give cycles of a whole tile op by operation (``dot``, ``elementwise``,
    ``transcendental``, ``reduce``, ``scan``, ``transpose``, ``convert``, ``copy``, and of those the
    special cases ``scale``, ``shift``, ``square`` and ``sum``); names in them
    are ``numbers``, and ``rate`` is ``rates[dtype]``.  ``issue`` is what each instruction costs
    beside.  ``passes``: the stages that elements pass in one go, one op each: ops that follow one
    another through them take as long as the slowest of them.
    ``chain``: ops that one instruction may hold (None: any number).  ``types`` are what it
    computes in; ``convert`` and ``copy`` take any type of the chip's ``storage``.  ``axes``: along
    which axes of a tile it reduces and scans, any or only the last.
    """

    queue: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    clock: Frequency | None = None
    numbers: dict[str, Count] = Field(default_factory=dict)
    rates: dict[str, Count] = Field(default_factory=dict)
    laws: dict[str, Formula]
    issue: Duration
    passes: tuple[tuple[str, ...], ...] = ()
    chain: Count | None = None
    types: tuple[str, ...] = ("float32", "bfloat16", "int32")
    axes: Literal["any", "last"] = "any"
    dot: Dot | None = None

    def law(self, operation: str) -> str:
        """The name of the law for an operation: its own, or that of its general class; empty where
        the engine can't do it.
        """
        if operation in self.laws:
            return operation
        general = _GENERAL.get(operation, "")
        return general if general in self.laws else ""


class Dma(_Table):
    """An engine that moves bytes between memories, with a queue of its own, and perhaps another
    one, ``ahead``, for loads that run ahead of what ``queue`` waits for.

    A transfer costs ``issue`` on the queue, then ``latency``, then its bytes flow at no more than
    ``stream`` times the ``efficiency`` law, sharing ``bandwidth`` (of a core) with the engine's
    other transfers and each resource of ``route``; ``outstanding`` transfers of a queue may be in
    flight.
    ``descriptor`` is added to the latency for each entry of an index list but the first.  Runs of
    bytes at the far end count there as whole ``granule`` s.  ``fills``: the engine writes a load's
    fill beyond a tensor's edge; ``lists``: it takes index lists.
    """

    queue: str
    ahead: str = ""
    moves: tuple[tuple[str, str], ...]
    bandwidth: Rate
    stream: Rate | None = None
    latency: Duration
    issue: Duration
    descriptor: Duration | None = None
    outstanding: Count
    efficiency: Formula | None = None
    numbers: dict[str, Count] = Field(default_factory=dict)
    granule: Bytes | None = None
    route: tuple[str, ...] = ()
    fills: bool = False
    lists: bool = True
    # Bytes of its transfers flow one after another, in the order of issue, not side by side.
    serial: bool = False

    @property
    def queues(self) -> tuple[str, ...]:
        """The queues that feed it."""
        return (self.queue, self.ahead) if self.ahead else (self.queue,)


class Fabric(_Table):
    """A shared way for bytes: a NoC, a bus."""

    scope: Scope
    bandwidth: Rate


class Link(_Table):
    """Links to other chips: ``count`` of them, each of ``bandwidth`` one way."""

    topology: str
    count: Count
    bandwidth: Rate
    latency: Duration


class Sync(_Table):
    """Semaphores of a core: how many, how high they count, and what a signal takes to arrive."""

    semaphores: Count
    maximum: Count
    latency: Duration


class Toolchain(_Table):
    """The vendor's compiler, as far as measurements show what it does.

    With a ``pipeline`` it stages one operand of a matmul whole, and streams the rest through so
    many bytes of the scratchpad.  ``slots``: how many of a tile it keeps in a loop.
    """

    name: str
    pipeline: Bytes | None = None
    slots: Count | None = None


class Peaks(_Table):
    """Published peaks: operations a second by type, and the far memory's bytes a second."""

    compute: dict[str, Flops]
    bandwidth: Rate


class NumberFormat(_Table):
    """A binary float's bits beside its sign, as in IEEE 754 with other widths."""

    exponent: Annotated[Quantity, _number("bits", "count")]
    mantissa: Annotated[Quantity, _number("bits", "count")]


class Ceiling(_Table):
    """The best fractions of the published bandwidth, and of the published peak of a 16-bit type,
    that were ever measured on the chip.
    """

    bandwidth: Count | None = None
    compute: Count | None = None


class Chip(_Table):
    """A chip, ready to be compiled for and simulated."""

    schema_version: Literal[2] = Field(alias="schema")
    name: str
    kind: Literal["chip"]
    summary: str
    cores: Count
    clock: Frequency
    # The memory that a program's tensors are in.
    home: str
    # The memory that tiles live in where nothing asks for another.
    scratchpad: str
    # The memory that index lists and scalars are read from.
    lists: str
    launch: Duration
    memories: dict[str, Memory]
    engines: dict[str, Engine]
    dma: dict[str, Dma]
    fabrics: dict[str, Fabric] = Field(default_factory=dict)
    links: dict[str, Link] = Field(default_factory=dict)
    sync: Sync
    # Compute queues whose instructions are bundles: one may hold work of different engines that has
    # nothing to do with each other.
    bundles: tuple[str, ...] = ()
    # What a type is converted to where the chip can't compute in it: type -> type.
    conversions: dict[str, str] = Field(default_factory=dict)
    # Groups of cores from the innermost, as a name and the cores that one group has.
    groups: dict[str, Count] = Field(default_factory=dict)
    # Types that tensors may be stored in and DMA may move.
    storage: tuple[str, ...]
    # Types whose bits the chip reads otherwise than IEEE 754: a custom 16-bit float for "float16".
    formats: dict[str, NumberFormat] = Field(default_factory=dict)
    peaks: Peaks
    ceiling: Ceiling = Field(default_factory=Ceiling)
    # What measurements of the chip were compiled with, for those that are compared with it.
    toolchain: Toolchain | None = None
    power: dict[str, Power] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def passes(self) -> bool:
        """Whether some engine does several ops on elements that pass it once."""
        return any(engine.passes for engine in self.engines.values())

    @property
    def near(self) -> str:
        """The memory in front of home that tensors of a program may lie in, as DMA moves between it
        and the scratchpad; empty where there is none.
        """
        name = self.memories[self.home].cached_by
        moves = {move for dma in self.dma.values() for move in dma.moves}
        ways = {(name, self.scratchpad), (self.scratchpad, name)}
        return name if name and ways <= moves else ""

    def quantities(self) -> Iterator[tuple[str, Quantity]]:
        """Every number with its dotted path, as in ``memories.hbm.bandwidth``."""
        yield from _quantities(self, "")

    def laws(self) -> Iterator[tuple[str, Law]]:
        """Every law with its dotted path."""
        for name, engine in self.engines.items():
            for operation, law in engine.laws.items():
                yield f"engines.{name}.laws.{operation}", law
        for name, dma in self.dma.items():
            if dma.efficiency is not None:
                yield f"dma.{name}.efficiency", dma.efficiency

    def seconds(self, duration: Quantity, clock: Quantity | None = None) -> float:
        """A duration in seconds; cycles are of ``clock``, or the chip's."""
        if duration.kind == "cycles":
            return duration.base / (clock or self.clock).base
        return duration.base

    def bytes_a_second(self, rate: Quantity, clock: Quantity | None = None) -> float:
        """A rate in bytes a second; cycles are of ``clock``, or the chip's."""
        if rate.kind == "bytes a cycle":
            return rate.base * (clock or self.clock).base
        return rate.base

    @property
    def transfer_queues(self) -> frozenset[str]:
        """The queues of all DMA engines."""
        return frozenset(queue for dma in self.dma.values() for queue in dma.queues)

    def engine_of(self, queue: str) -> tuple[str, ...]:
        """The engines of a queue."""
        return tuple(name for name, engine in self.engines.items() if engine.queue == queue)


def _quantities(value: object, path: str) -> Iterator[tuple[str, Quantity]]:
    if isinstance(value, Quantity):
        yield path, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _quantities(getattr(value, name), f"{path}.{name}" if path else name)
    elif isinstance(value, Mapping):
        for name, entry in cast("Mapping[str, object]", value).items():
            yield from _quantities(entry, f"{path}.{name}")
