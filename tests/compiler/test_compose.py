"""Kernels as phases of one program: values, time, and what the sanitizer finds where they meet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

import dure
import dure.lang as dl
from dure.compiler.chip.allocate import capacity
from dure.compiler.chip.compose import Binding, Kernel, Repeat, View, compose
from dure.compiler.chip.pipeline import Options, compile_for
from dure.errors import IRError
from dure.ir.core import Function, Op, Region
from dure.ir.dtypes import bfloat16, int32
from dure.ir.expr import symbol
from dure.ir.machine.compute import ops_of
from dure.ir.machine.phase import phases_of
from dure.ir.parser import parse_function
from dure.ir.printer import print_function
from dure.ir.verifier import verify
from dure.library.build import tile_function
from dure.library.call import KernelCall, index_tensor, tensor
from dure.library.embedding import embedding
from dure.library.matmul import matmul_kn
from dure.machine.chip import Chip
from dure.sim.sanitizer import sanitize
from dure.sim.timing import simulate
from dure.sim.values import run_values
from dure.targets import chip, chip_names

CHIPS = chip_names()
M, D, F, LAYERS = 3, 64, 96, 5


def product(k: int, n: int, target: Chip) -> Function:
    """x (M, k) @ w (k, n), with w on the queue for loads ahead."""
    types = tuple(tensor(bfloat16, *shape) for shape in ((M, k), (k, n), (M, n)))
    call = KernelCall(matmul_kn, types, {}, {"bm": 4, "bn": 32, "bk": 32})
    options = Options(oriented=False, ahead=frozenset({"w"}), slots=3)
    return compile_for(tile_function(call), target, options).function


def chain(target: Chip, *, prefetch: bool = True) -> Function:
    """LAYERS times x := (x @ up) @ down."""
    layer = symbol("layer", "loop", 0, LAYERS - 1)
    up, down = product(D, F, target), product(F, D, target)

    def weight(name: str, rows: int, columns: int) -> Binding:
        view = View(0, layer * rows, layer * rows + rows)
        return Binding(name, (LAYERS * rows, columns), (view,))

    x, h = Binding("x", (M, D)), Binding("h", (M, F))
    body = (
        Kernel("up", up, (x, weight("up", D, F), h)),
        Kernel("down", down, (h, weight("down", F, D), x)),
    )
    # The hidden tensor is a row of all: each kernel sees it in its own shape.
    tensors = {
        "x": tensor(bfloat16, M, D),
        "up": tensor(bfloat16, LAYERS * D, F),
        "down": tensor(bfloat16, LAYERS * F, D),
        "h": tensor(bfloat16, M * F),
    }
    return compose("chain", tensors, [Repeat(LAYERS, layer, body)], target, prefetch=prefetch)


def arrays(seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (M, D), "up": (LAYERS * D, F), "down": (LAYERS * F, D)}
    return {n: rng.standard_normal(s).astype(np.float32) * s[-1] ** -0.5 for n, s in shapes.items()}


def expected(given: dict[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    def rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return values.astype(bfloat16.numpy).astype(np.float32)

    x, up, down = (rounded(given[n]) for n in ("x", "up", "down"))
    for n in range(LAYERS):
        h = rounded(x @ up[n * D : (n + 1) * D])
        x = rounded(h @ down[n * F : (n + 1) * F])
    return x


@pytest.mark.parametrize("name", CHIPS)
def test_a_chain_of_kernels_on_bytes(name: str) -> None:
    target = chip(name)
    program = chain(target)
    verify(program)
    assert sanitize(program, target).ok
    assert parse_function(print_function(program)) is not None
    given = arrays()
    for seed in range(2):
        passed = [given[n].astype(bfloat16.numpy) for n in ("x", "up", "down")]
        passed.append(np.full(M * F, np.nan, bfloat16.numpy))
        run_values(program, target, passed, seed=seed)
        found = passed[0].astype(np.float32)
        want = expected(given)
        np.testing.assert_allclose(found, want, atol=0.05 * np.abs(want).max())


@pytest.mark.parametrize("name", CHIPS)
def test_time_is_the_same_however_it_is_found(name: str) -> None:
    target = chip(name)
    for prefetch in (True, False):
        program = chain(target, prefetch=prefetch)
        found = simulate(program, target)
        # Recording replays every turn, and `full` every core.
        assert simulate(program, target, record=True).ps == found.ps
        assert simulate(program, target, full=True).ps == found.ps
        launch = found.launch
        assert sum(found.phases.values()) == found.ps - launch
        assert all(phase.attr("lag") == 0 for phase in phases_of(program.body)) != prefetch


def test_loads_ahead_overlap_what_runs_before() -> None:
    target = chip("rngd")
    spans = simulate(chain(target), target, record=True).spans
    ends = {phase.attr("name"): 0 for phase in phases_of(chain(target).body)}
    assert set(ends) == {"up", "down"}
    first = next(s for s in spans if s.queue == "dma_store")
    ahead = [s for s in spans if s.queue == "dma_ahead" and s.start < first.start]
    assert len({id(s.op) for s in ahead}) == 2, (
        "weights of the second kernel, before the first ends"
    )


def changed(program: Function, **attrs: object) -> Function:
    """The program with attributes of its last phase changed."""

    def region(found: Region) -> Region:
        ops = list(found.ops)
        place = max(n for n, op in enumerate(ops) if op.name in ("phase", "for"))
        op = ops[place]
        ops[place] = (
            replace(op, attrs={**op.attrs, **attrs})
            if op.name == "phase"
            else replace(op, regions=(region(op.regions[0]),))
        )
        return replace(found, ops=tuple(ops))

    return program.with_body(region(program.body))


def test_what_runs_too_far_ahead_is_found() -> None:
    target = chip("rngd")
    program = chain(target)
    lag = [phase.attr("lag") for phase in phases_of(program.body)][-1]
    # A phase that may run beside its own last turn.
    verdict = sanitize(changed(program, lag=lag + 2), target)
    assert not verdict.ok and verdict.findings[0].kind == "not-proved"
    # Tiles of both kernels in the same bytes.
    body = program.body.ops[0].regions[0]
    offsets = [
        min(op.attr("offset") for op in ops_of(p.regions[0]) if op.name == "buffer" and "w" in
            op.result.name) for p in body.ops if p.name == "phase"
    ]  # fmt: skip
    assert offsets[0] != offsets[1]

    def moved(op: Op) -> Op:
        if op.name == "buffer" and op.attr("offset") == offsets[1]:
            return replace(op, attrs={**op.attrs, "offset": offsets[0]})
        return op

    last = body.ops[-1]
    inside = replace(last.regions[0], ops=tuple(map(moved, last.regions[0].ops)))
    loop = program.body.ops[0]
    bad = replace(body, ops=(*body.ops[:-1], replace(last, regions=(inside,))))
    verdict = sanitize(program.with_body(Region((), (replace(loop, regions=(bad,)),))), target)
    assert {f.kind for f in verdict.findings} == {"overlap"}


def test_only_what_nobody_stores_is_loaded_ahead() -> None:
    target = chip("rngd")
    program = changed(chain(target), ahead=("dma_load",), lag=1)
    verdict = sanitize(program, target)
    assert [f.kind for f in verdict.findings][:1] == ["race"]
    assert "the program stores to it" in verdict.findings[0].message


@dure.kernel
def copy(x: dl.Tensor, y: dl.Tensor, bm: dl.const):
    """``y = x``."""
    dl.store(y, (dl.program_id(0),), dl.load(x, (dl.program_id(0),), (bm,)))


def test_what_a_program_decides_by_it_does_not_read_ahead() -> None:
    target, count = chip("rngd"), 4
    rows = index_tensor(np.zeros(count, np.int32), 0, 7)
    types = (tensor(bfloat16, 8, 64), rows, tensor(bfloat16, count, 64))
    gather = KernelCall(embedding, types, {}, {"bd": 64})
    first = KernelCall(copy, (tensor(int32, count), tensor(int32, count)), {}, {"bm": count})
    made, read = (
        compile_for(tile_function(c), target, Options(oriented=False)).function
        for c in (first, gather)
    )
    bound = {n: Binding(n, s) for n, s in (("x", (4,)), ("rows", (4,)), ("table", (8, 64)))}
    kernels = [
        Kernel("copy", made, (bound["x"], bound["rows"])),
        Kernel("gather", read, (bound["table"], bound["rows"], Binding("y", (4, 64))), late=True),
    ]
    tensors = {"x": tensor(int32, 4), "rows": rows, "table": types[0], "y": types[2]}
    program = compose("gather", tensors, kernels, target)
    assert sanitize(program, target).ok
    verdict = sanitize(changed(program, ahead=("dma_ahead",), lag=1), target)
    assert "read ahead of its phase" in verdict.findings[0].message


def test_phases_are_the_same_on_all_cores() -> None:
    target = chip("rngd")
    program = chain(target)
    core = program.program_ids[0]
    loop = program.body.ops[0]
    ragged = replace(loop, attrs={**loop.attrs, "stop": core})
    verdict = sanitize(program.with_body(Region((), (ragged,))), target)
    assert "trips" in verdict.findings[0].message
    phase = loop.regions[0].ops[0]
    outside = next(op for op in ops_of(phase.regions[0]) if op.name == "dma_load")
    verdict = sanitize(program.with_body(Region((), (loop, outside))), target)
    assert "outside the phases" in verdict.findings[0].message


def test_too_many_semaphores_at_once() -> None:
    target = chip("rngd", {"sync.semaphores": "6"})
    verdict = sanitize(chain(chip("rngd")), target)
    assert "semaphores in use at once" in verdict.findings[0].message
    # The composer keeps to what there is.
    assert sanitize(chain(target), target).ok


def test_a_tensor_of_another_type() -> None:
    target = chip("rngd")
    function = product(D, F, target)
    bindings = (Binding("x", (M, D)), Binding("w", (D, F)), Binding("y", (M, D)))
    tensors = {n: tensor(bfloat16, *s) for n, s in (("x", (M, D)), ("w", (D, F)), ("y", (M, D)))}
    with pytest.raises(IRError, match="argument 'y'"):
        compose("bad", tensors, [Kernel("up", function, bindings)], target)


def test_kernels_outside_of_loops_share_a_phase_where_none_needs_another() -> None:
    target, count = chip("rngd"), 4
    kind = tensor(int32, count)
    call = KernelCall(copy, (kind, kind), {}, {"bm": count})
    made = compile_for(tile_function(call), target, Options(oriented=False)).function
    pairs = (("a", "b"), ("c", "d"), ("d", "e"))
    kernels = [
        Kernel(f"{x} to {y}", made, (Binding(x, (count,)), Binding(y, (count,)))) for x, y in pairs
    ]
    program = compose("copies", dict.fromkeys("abcde", kind), kernels, target)
    names = [phase.attr("name") for phase in phases_of(program.body)]
    assert names == ["a to b | c to d", "d to e"]
    assert sanitize(program, target).ok
    given = {name: np.full(count, n, np.int32) for n, name in enumerate("abcde")}
    run_values(program, target, list(given.values()))
    assert [int(array[0]) for array in given.values()] == [0, 0, 2, 2, 2]


def test_kernels_side_by_side_leave_room_for_what_is_loaded_ahead() -> None:
    """Two copies of nearly half the scratchpad each would fit, but for the weights' ring."""
    target = chip("rngd")
    count = (capacity(target.memories[target.scratchpad]) // 2 - 512) // 4
    kind = tensor(int32, count)
    call = KernelCall(copy, (kind, kind), {}, {"bm": count})
    made = compile_for(tile_function(call), target, Options(oriented=False)).function
    kernels = [
        Kernel(f"{x} to {y}", made, (Binding(x, (count,)), Binding(y, (count,))))
        for x, y in (("a", "b"), ("c", "d"))
    ]
    up = product(D, F, target)
    shapes = {"x": (M, D), "w": (D, F), "y": (M, F)}
    kernels.append(Kernel("up", up, tuple(Binding(n, s) for n, s in shapes.items())))
    types = dict.fromkeys("abcd", kind) | {n: tensor(bfloat16, *s) for n, s in shapes.items()}
    program = compose("room", types, kernels, target)
    names = [phase.attr("name") for phase in phases_of(program.body)]
    assert names == ["a to b", "c to d", "up"]
    assert sanitize(program, target).ok


def test_what_is_proved_of_one_phase_need_not_fit_as_another() -> None:
    """The second of two phases that are alike, but beyond the scratchpad's end."""
    target = chip("rngd")
    kind = tensor(int32, 4)
    call = KernelCall(copy, (kind, kind), {}, {"bm": 4})
    made = compile_for(tile_function(call), target, Options(oriented=False)).function
    kernels = [
        Kernel(f"{x} to {y}", made, (Binding(x, (4,)), Binding(y, (4,))))
        for x, y in (("a", "b"), ("b", "c"))
    ]
    program = compose("copies", dict.fromkeys("abc", kind), kernels, target)
    assert sanitize(program, target).ok
    room, alike = capacity(target.memories[target.scratchpad]), list(program.body.ops)
    last = max(n for n, op in enumerate(alike) if op.name == "phase")
    (region,) = alike[last].regions
    moved = tuple(
        replace(op, attrs={**op.attrs, "offset": int(op.attr("offset")) + room})
        if op.name == "buffer"
        else op
        for op in region.ops
    )
    alike[last] = replace(alike[last], regions=(replace(region, ops=moved),))
    verdict = sanitize(program.with_body(replace(program.body, ops=tuple(alike))), target)
    assert {f.kind for f in verdict.findings} == {"out-of-bounds"}
