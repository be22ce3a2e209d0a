"""The load program on the CPU: every weight's relayout in one native function.

    void dure_load(ptr context, i64 worker, i64 workers, ptr pool_state)

``context`` holds, for each weight in the order of the plan, the address of its stored bytes and
that of its place in the packed buffer.  Weights of equal types share one inner function; workers
take equal shares of every weight's panels.
"""

from __future__ import annotations

from dure.ir.types import TensorType
from dure.runtime.host import HostFeatures
from dure.targets.cpu.context import LOAD
from dure.targets.cpu.load import LoadPlan
from dure.targets.cpu.relayout import Relayout, emit_relayout
from dure.targets.cpu.writer import Reg, Writer, integer


def emit_load(plan: LoadPlan, host: HostFeatures) -> str:
    """The load module's LLVM IR."""
    kinds: dict[tuple[TensorType, TensorType], Relayout] = {}
    counts: dict[tuple[TensorType, TensorType], int] = {}
    for weight in plan.weights:
        kind = (weight.source, weight.target)
        counts[kind] = counts.get(kind, 0) + 1
        if kind not in kinds:
            symbol = f"relayout_{len(kinds)}"
            kinds[kind] = emit_relayout(symbol, *kind, host.function_attributes)
    w = Writer()
    first = 0
    for kind, relayout in kinds.items():
        _emit_kind(w, relayout, first, counts[kind])
        first += 2 * counts[kind]
    w.do("ret void")
    body = w.text
    definitions = [
        r.definition.replace("define void", "define internal void", 1) for r in kinds.values()
    ]
    lines = "\n".join(definitions).split("\n")
    declared = dict.fromkeys(line for line in lines if line.startswith("declare "))
    rest = "\n".join(line for line in lines if not line.startswith("declare "))
    head = f"define void @{LOAD}(ptr %context, i64 %worker, i64 %workers, ptr %pool) nounwind"
    return "\n".join([*declared, rest, f"{head} {{\nentry:\n{body}\n}}\n"])


def _emit_kind(w: Writer, relayout: Relayout, first: int, count: int) -> None:
    worker, workers, panels = Reg("i64", "%worker"), Reg("i64", "%workers"), relayout.panels
    begin = w.binary("udiv", w.mul(integer(panels), worker), workers)
    end = w.binary("udiv", w.mul(integer(panels), w.add(worker, integer(1))), workers)

    def weight(number: Reg, _: list[Reg]) -> list[Reg]:
        slot = w.offset(
            Reg("ptr", "%context"), w.add(w.mul(number, integer(16)), integer(8 * first))
        )
        source = w.load("ptr", slot, 8)
        target = w.load("ptr", w.offset(slot, integer(8)), 8)
        w.do(f"call void @{relayout.symbol}({source}, {target}, {begin}, {end})")
        return []

    w.loop(integer(0), integer(count), 1, weight)
