"""Makes what a repeat carries fit one buffer: its start, each turn's argument and its yield.

Where the start is used again later, or the yield is written while the argument is still needed, a
``copy`` goes between.  After this pass everything that a repeat carries may share its memory.
"""

from __future__ import annotations

from dataclasses import replace

from dure.compiler.rebuild import Rebuilder, rebuild, uses
from dure.compiler.storage import Storage, written
from dure.ir.core import Function, Op, Region, Value, infer


def separate_carried(function: Function) -> Function:
    """Inserts the copies that let every repeat carry its values in place."""
    storage = Storage(function, through_repeats=False)
    owners = _owners(function.body)
    groups: dict[Value, list[Value]] = {}
    for value in uses(function.body):
        groups.setdefault(storage.root(value), []).append(value)

    def visit(builder: Rebuilder, op: Op) -> bool:
        if op.name != "repeat":
            return False
        outer = owners.region_of(op)
        operands = list(op.operands)
        for place in range(op.attr("carried")):
            start = operands[place]
            if not _is_free(start, op, outer, storage, owners, groups, place):
                copied = builder.make("copy", [builder.value(start)], {}, op)[0]
                # A fresh old value stands for the copy, so that other uses keep the original.
                operands[place] = Value(copied.type, start.name)
                builder.values[operands[place]] = copied
        region = _separate_yields(op, storage, owners, groups)
        builder.copy(replace(op, operands=tuple(operands), regions=(region,)))
        return True

    return rebuild(function, visit)


class _Owners:
    """The region that each op is in, where in it, and the ops that write values."""

    def __init__(self) -> None:
        self.places: dict[Op, tuple[Region, int]] = {}
        self.writers: dict[Value, Op] = {}
        self.parents: dict[Region, Op] = {}
        self.users: dict[Value, list[Op | Region]] = {}

    def region_of(self, op: Op) -> Region:
        return self.places[op][0]

    def index_in(self, user: Op | Region, region: Region) -> int | None:
        """The position in ``region`` of the op that is, or holds, ``user``; None outside it."""
        if user is region:
            return len(region.ops)
        op = self.parents.get(user) if isinstance(user, Region) else user
        while op is not None:
            home, place = self.places[op]
            if home is region:
                return place
            op = self.parents.get(home)
        return None


def _owners(body: Region) -> _Owners:
    found = _Owners()

    def collect(region: Region) -> None:
        for place, op in enumerate(region.ops):
            found.places[op] = (region, place)
            for value in (*written(op), *(op.results if op.name == "repeat" else ())):
                found.writers[value] = op
            for operand in op.operands:
                found.users.setdefault(operand, []).append(op)
            for inner in op.regions:
                found.parents[inner] = op
                collect(inner)
        for value in region.yields:
            found.users.setdefault(value, []).append(region)

    collect(body)
    return found


def _is_free(
    start: Value,
    repeat: Op,
    outer: Region,
    storage: Storage,
    owners: _Owners,
    groups: dict[Value, list[Value]],
    place: int,
) -> bool:
    """Whether a repeat may overwrite ``start``: written in its region, and not needed again."""
    root = storage.root(start)
    writer = owners.writers.get(root)
    if writer is None or owners.region_of(writer) is not outer:
        return False
    if writer.name == "repeat" and root not in writer.results[: writer.attr("carried")]:
        return False
    position = owners.places[repeat][1]
    for value in groups.get(root, []):
        for user in owners.users.get(value, []):
            index = owners.index_in(user, outer)
            if user is repeat:
                if repeat.operands.count(value) > 1 or value is not start:
                    return False
            elif index is None or index >= position:
                return False
    return True


def _separate_yields(
    op: Op, storage: Storage, owners: _Owners, groups: dict[Value, list[Value]]
) -> Region:
    """The repeat's body, with copies at its end for yields that can't replace their argument."""
    body, carried = op.regions[0], int(op.attr("carried"))
    arguments = {storage.root(a) for a in body.args[:carried]}
    yields, ops = list(body.yields), list(body.ops)
    taken = set[Value]()
    late: list[int] = []
    for place in range(carried):
        value, argument = body.yields[place], body.args[place]
        root = storage.root(value)
        if root is storage.root(argument) and root not in taken:
            taken.add(root)
            continue
        if root in taken or not _may_replace(root, argument, body, storage, owners, groups):
            late.append(place)
        taken.add(root)
    # A yield that is another slot's argument is saved first: slots may be exchanged.
    for stage in range(2):
        for place in late:
            if stage or storage.root(body.yields[place]) in arguments:
                made = infer("copy", [yields[place]], {}, span=op.span)
                ops.append(made)
                yields[place] = made.results[0]
    return replace(body, ops=tuple(ops), yields=tuple(yields))


def _may_replace(
    root: Value,
    argument: Value,
    body: Region,
    storage: Storage,
    owners: _Owners,
    groups: dict[Value, list[Value]],
) -> bool:
    """Whether ``root`` may be written where ``argument`` lies: only after its last use."""
    writer = owners.writers.get(root)
    if writer is None or owners.region_of(writer) is not body or writer.name == "repeat":
        return False
    written_at = owners.places[writer][1]
    for value in groups.get(storage.root(argument), [argument]):
        for user in owners.users.get(value, []):
            index = owners.index_in(user, body)
            if index is None or index >= written_at:
                return False
    return True
