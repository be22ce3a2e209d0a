"""Rings of slots that are all alike: turning one names its slots otherwise, and changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dure.ir.core import Value
from dure.sim.sanitizer.pieces import SLOTS, Access, Instruction

if TYPE_CHECKING:
    from dure.sim.sanitizer.model import Model


class Rings:
    """Buffers whose slots are all alike, so that a state in which they have turned is the state in
    which they haven't, with the slots named otherwise.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        groups: dict[object, list[Value]] = {}
        for value, op in model.buffers.items():
            if int(op.attr("stages")) > 1:
                place = tuple(op.attr(k) for k in ("memory", "offset", "pitch", "stages"))
                groups.setdefault(place, []).append(value)
        self.groups: list[list[Value]] = []
        #: By group, the cell of the next slot by cell.
        self.following: list[dict[int, int]] = []
        used: dict[int, set[object]] = {}
        for value, op in model.buffers.items():
            for slot in range(int(op.attr("stages"))):
                for cell in model.cells.of(model.rectangles(value, slot)):
                    place = tuple(op.attr(k) for k in ("memory", "offset", "pitch", "stages"))
                    used.setdefault(cell, set()).add((place, slot))
        for group in groups.values():
            self._enter(group, used)
        self.known: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
        self.group_of = {v: n for n, group in enumerate(self.groups) for v in group}

    def _enter(self, group: list[Value], used: dict[int, set[object]]) -> None:
        model, op = self.model, self.model.buffers[group[0]]
        stages, pitch = int(op.attr("stages")), int(op.attr("pitch"))
        slots = [
            {c for v in group for c in model.cells.of(model.rectangles(v, slot))}
            for slot in range(stages)
        ]
        if any(len(used[c]) != 1 for cells in slots for c in cells):
            return
        forward, back = model.cells.moved(pitch), model.cells.moved(-pitch * (stages - 1))
        following: dict[int, int] = {}
        for slot, cells in enumerate(slots):
            step = forward if slot + 1 < stages else back
            following.update({c: step[c] for c in cells if c in step})
        if len(following) == sum(map(len, slots)):
            self.groups.append(group)
            self.following.append(following)

    def turned(self, turns: dict[Value, int]) -> tuple[int, ...]:
        """How far each group has turned; 0 for one whose buffers have turned apart."""
        found: list[int] = []
        for group in self.groups:
            own = {turns[v] for v in group}
            found.append(own.pop() if len(own) == 1 else 0)
        return tuple(found)

    def order(self, turned: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """For each cell, the one whose state it takes when the groups turn back, and the one that
        takes its state.
        """
        found = self.known.get(turned)
        if found is None:
            order = list(range(self.model.cells.count))
            for turn, following in zip(turned, self.following, strict=True):
                for cell in following:
                    other = cell
                    for _ in range(turn):
                        other = following[other]
                    order[cell] = other
            place = [0] * len(order)
            for cell, other in enumerate(order):
                place[other] = cell
            found = self.known[turned] = order, place
        return found

    def _back(self, value: Value, slot: int, turned: tuple[int, ...]) -> int:
        group = self.group_of.get(value)
        if group is None:
            return slot
        return (slot - turned[group]) % int(self.model.buffers[value].attr("stages"))

    def access(self, access: Access, turned: tuple[int, ...]) -> Access:
        """An access when the groups turn back."""
        slot = access.place.slot
        return access.slots[self._back(access.buffer, slot, turned)]

    def instruction(self, instruction: Instruction, turned: tuple[int, ...]) -> Instruction:
        """An instruction when the groups turn back."""
        slots = tuple(
            slot if slot < 0 else self._back(value, slot, turned)
            for value, slot in zip(instruction.op.operands, instruction.slots, strict=True)
        )
        if slots == instruction.slots:
            return instruction
        return self.model.instruction(instruction.op, slots, instruction.cut)

    def key(self, key: int, turned: tuple[int, ...]) -> int:
        """The number of a buffer and slot when the groups turn back."""
        if key < 0:
            return key
        number, slot = divmod(key, SLOTS)
        return number * SLOTS + self._back(self.model.names[number], slot, turned)
