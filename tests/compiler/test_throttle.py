"""Loads ahead that leave room for others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dure.compiler.chip.pipeline import Options, compile_for
from dure.ir.core import Op
from dure.ir.dtypes import bfloat16
from dure.ir.machine.compute import ops_of
from dure.library.build import tile_function
from dure.library.call import KernelCall, tensor
from dure.library.matmul import matmul_kn
from dure.machine.chip import Chip
from dure.sim.sanitizer import sanitize
from dure.targets import chip

SHAPES = ((8, 4096), (4096, 2048), (8, 2048))


def own_waits(target: Chip, bk: int) -> list[Op]:
    """The waits of the queue for loads ahead on what it signals itself."""
    types = tuple(tensor(bfloat16, *shape) for shape in SHAPES)
    call = KernelCall(matmul_kn, types, {}, {"bm": 8, "bn": 512, "bk": bk})
    options = Options(oriented=False, ahead=frozenset({"w"}), slots=6)
    function = compile_for(tile_function(call), target, options).function
    assert sanitize(function, target).ok
    queues = {dma.ahead for dma in target.dma.values()}
    ops = [op for op in ops_of(function.body) if op.attrs.get("queue") in queues]
    signalled = {op.operands[0] for op in ops if op.name == "signal"}
    return [op for op in ops if op.name == "wait" and op.operands[0] in signalled]


def serial(target: Chip, *, whether: bool) -> Chip:
    dma = {name: d.model_copy(update={"serial": whether}) for name, d in target.dma.items()}
    return target.model_copy(update={"dma": dma})


@pytest.mark.parametrize("name", ["tpu-v6e", "rngd"])
def test_where_bytes_flow_one_after_another(name: str) -> None:
    target = chip(name)
    waits = own_waits(serial(target, whether=True), 1024)
    assert waits
    plain = own_waits(serial(target, whether=False), 1024)
    assert len(plain) < len(waits)


def test_small_loads_are_not_held() -> None:
    target = chip("tpu-v6e")
    latency = replace(target.dma["load"].latency, value=1.0, unit="ms")
    load = target.dma["load"].model_copy(update={"latency": latency})
    slow = target.model_copy(update={"dma": {**target.dma, "load": load}})
    assert len(own_waits(slow, 1024)) < len(own_waits(target, 1024))
