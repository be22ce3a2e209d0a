"""Each pass keeps a program's values; fusion, layouts, barriers and the arena do what they say."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_programs import SIZES, decoder, values_of

import dure.library
from dure.compiler.arena import Buffer, _place
from dure.compiler.barriers import count_barriers
from dure.compiler.fuse import fuse
from dure.compiler.pipeline import prepare
from dure.compiler.plan import plan
from dure.compiler.quantize import quantize_activations
from dure.compiler.rebuild import rebuild
from dure.errors import IRError, UsageError
from dure.ir.builder import ProgramBuilder
from dure.ir.core import walk
from dure.ir.interpret import execute
from dure.ir.layout import PlaneLayouts
from dure.ir.verifier import verify
from dure.runtime.host import host_features
from dure.targets.cpu.target import CpuTarget

assert dure.library
TARGET = CpuTarget(host_features())


def names(program):
    return [op.name for op in walk(program.body)]


def run(program, values):
    return execute(program, values, SIZES)


def close(found, expected, tolerance=1e-4):
    for one, other in zip(found, expected, strict=True):
        one, other = one.astype(np.float64), other.astype(np.float64)
        scale = max(1.0, np.abs(other).max(initial=0))
        assert np.abs(one - other).max(initial=0) <= tolerance * scale


@pytest.mark.parametrize("order", ["neox", "llama"])
def test_fusion_keeps_the_values_and_leaves_few_ops(order):
    program = quantize_activations(decoder(["q4_1", "q4_1", "q8_0"], order=order))
    fused = fuse(program)
    verify(fused)
    values = values_of(program)
    close(run(fused, values), run(program, values))
    body = next(op for op in fused.body.ops if op.name == "repeat").regions[0]
    kinds = [op.name for op in body.ops if op.name != "reshape_tensor"]
    assert kinds == [
        *("rms_norm", "linear", "linear", "linear", "rope", "kv_write", "kv_write", "attention"),
        *("linear", "rms_norm", "gated_linear", "linear"),
    ]
    assert "quantize_rows" not in names(fused)


def test_the_policy_quantizes_only_in_front_of_blocks():
    b = ProgramBuilder("mixed")
    x = b.input("x", (b.symbol("T", 1, 4), 64))
    plain = b.linear(x, b.weight("a", (64, 64), "float16"))
    blocks = b.linear(x, b.weight("b", (64, 64), "q8_0"))
    again = b.linear(x, b.weight("c", (64, 64), "q8_0"))
    b.output("y", b.add(b.add(plain, blocks), again))
    program = b.build()
    assert names(quantize_activations(program)).count("quantize_rows") == 1
    assert quantize_activations(program, "float") is program
    with pytest.raises(UsageError, match="policy"):
        quantize_activations(program, cast(Any, "int4"))


def test_a_value_that_others_use_is_not_fused_away():
    b = ProgramBuilder("shared")
    x = b.input("x", (b.symbol("T", 1, 4), 64))
    y = b.linear(x, b.weight("w", (64, 64), "float32"))
    b.output("sum", b.add(x, y))
    b.output("y", y)
    fused = fuse(b.build())
    assert names(fused) == ["linear", "elementwise"]


def test_a_tied_head_and_its_embedding_share_a_layout():
    prepared = prepare(decoder(["q4_1", "q4_1"]), TARGET)
    step, load = prepared.laid_out.step, prepared.laid_out.load
    types = {p.value.name: p.value.tensor for p in step.params}
    assert isinstance(types["embedding"].layout, PlaneLayouts)
    assert load.attrs["names"].count("embedding") == 1
    assert "final" not in load.attrs["names"]
    tables = [types[f"layer.{i}.q"].layout for i in range(2)]
    assert tables[0] == tables[1]
    verify(step)
    verify(load)


def test_a_weight_that_is_only_looked_up_stays_as_it_is():
    b = ProgramBuilder("lookup")
    tokens = b.input("tokens", (b.symbol("T", 1, 4),), "int32", index=(0, 9))
    b.output("x", b.embedding(b.weight("table", (10, 64), "q8_0"), tokens))
    assert not prepare(b.build(), TARGET).load.weights


@pytest.mark.parametrize("formats", [["q4_1", "q4_1"], ["q8_0", "q4_0", "q8_0", "q4_0"]])
def test_the_planned_program_computes_the_same(formats):
    program = decoder(formats)
    prepared = prepare(program, TARGET)
    planned = plan(prepared.laid_out.step, TARGET)
    verify(planned.function)
    values = values_of(program)
    expected = run(fuse(quantize_activations(program, TARGET.activations)), values)
    close(run(planned.function, values), expected)


def products(policy, *weights):
    """What activations of one operand become in front of ``(format, columns, bits)`` products."""
    b = ProgramBuilder("products")
    x = b.input("x", (b.symbol("T", 1, 4), 64))
    for place, (format, columns, bits) in enumerate(weights):
        weight = b.weight(f"w{place}", (columns, 64), format)
        b.output(f"y{place}", b.linear(x, weight, activation_bits=bits))
    function = quantize_activations(b.build(), policy)
    return [str(o.operands[0].tensor.dtype) for o in function.body.ops if o.name == "linear"]


def test_block_floating_point_is_for_few_bits_and_many_columns():
    bfp, int8, int16 = "bfp9_block32", "int8_block32", "int16_block32"
    assert products("bfp", ("q4_0", 64, 8)) == [bfp]
    assert products("bfp", ("q4_0", 32, 8)) == [int8]
    assert products("bfp", ("q4_0", 32, 9)) == [bfp]
    assert products("bfp", ("q4_0", 128, 16)) == [int16]
    assert products("bfp", ("q8_0", 128, 8)) == [int8]
    assert products("bfp", ("q4_0", 64, 8), ("q4_1", 128, 8)) == [bfp, bfp]
    assert products("bfp", ("q4_0", 64, 8), ("q4_1", 32, 8)) == [int8, int8]
    assert products("bfp", ("q4_0", 64, 8), ("q4_1", 64, 16)) == [bfp, int16]
    assert products("int8", ("q4_0", 64, 8), ("q4_1", 64, 9)) == [int8, int16]


def test_a_layer_takes_nine_barriers():
    def barriers(layers):
        step = prepare(decoder(["q4_1"] * layers), TARGET).laid_out.step
        return count_barriers(plan(step, TARGET).function)

    assert barriers(5) - barriers(4) == 9


def test_an_op_without_a_kernel_is_named():
    b = ProgramBuilder("unknown")
    x = b.input("x", (b.symbol("T", 1, 4), 8))
    b.output("y", b.op("relayout", x, layout=None)[0])
    with pytest.raises(IRError, match="no kernel computes") as caught:
        plan(b.build(), TARGET)
    assert "relayout" in str(caught.value)


def carried_program(body, count=3):
    """A repeat that carries two values through ``body(builder, layer, x, y)``."""
    b = ProgramBuilder("carried")
    rows = b.symbol("T", 1, 64)
    x, y = b.input("x", (rows, 8)), b.input("y", (rows, 8))
    x, y = b.scale(x, 2.0), b.scale(y, 3.0)
    values = b.layers(["same"] * count, lambda layer, x, y: body(b, layer, x, y), x, y)
    for name, value in zip("xy", values, strict=True):
        b.output(name, value)
    return b.build()


BODIES = {
    "in turn": lambda b, _, x, y: (b.silu(x), b.add(x, y)),
    "exchanged": lambda b, _, x, y: (y, x),
    "one for both": lambda b, _, x, y: (y, y),
    "untouched": lambda b, _, x, y: (x, b.silu(y)),
    "used after": lambda b, _, x, y: (b.scale(x, 0.5), b.add(b.scale(x, 0.25), b.mul(x, y))),
}


@pytest.mark.parametrize("name", BODIES)
def test_whatever_a_repeat_carries_keeps_its_value_in_memory(name):
    """The planned program runs on real memory: on the CPU."""
    from dure.compiler.pipeline import compile_program

    program = carried_program(BODIES[name])
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal((5, 8)).astype(np.float32) for n in "xy"}
    expected = execute(program, list(inputs.values()), {"T": 5})
    compiled = compile_program(program, workers=2)
    for _ in range(2):
        found = compiled.run(inputs)
        for output, value in zip(("x", "y"), expected, strict=True):
            np.testing.assert_allclose(found[output], value, rtol=1e-5, atol=1e-6)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 900), st.integers(0, 9), st.integers(0, 9)),
        max_size=12,
    )
)
def test_buffers_that_live_together_lie_apart(entries):
    buffers = [Buffer(size, min(a, b), max(a, b)) for size, a, b in entries]
    _place(buffers)
    for place, one in enumerate(buffers):
        for other in buffers[:place]:
            if one.overlaps(other) and one.bytes and other.bytes:
                apart = one.offset + one.bytes <= other.offset
                assert apart or other.offset + other.bytes <= one.offset


@pytest.mark.parametrize("formats", [["q4_1", "q4_1"], ["q8_0"]])
def test_checked_compiling_runs_after_every_pass(formats, monkeypatch, tmp_path, recwarn):
    monkeypatch.setenv("DURE_CHECK", "1")
    monkeypatch.setenv("DURE_DUMP", str(tmp_path))
    step = prepare(decoder(formats), TARGET).laid_out.step
    plan(step, TARGET)
    assert not recwarn.list, "the sampler draws steps that every program runs on"
    written = {path.name.split(".", 2)[2] for path in tmp_path.iterdir()}
    assert {"fuse.txt", "choose-layouts.txt", "lower.txt", "plan-arena.txt"} <= written


def test_a_pass_that_changes_a_result_is_named(monkeypatch):
    from dure.compiler.sample import draw_step
    from dure.ir.passes import Pass, run_passes

    def broken(program):
        def visit(builder, op):
            if op.name != "rope":
                return False
            attrs = {**op.attrs, "order": "llama"}
            builder.replace(op, builder.make("rope", builder.operands(op), attrs, op))
            return True

        return rebuild(program, visit)

    monkeypatch.setenv("DURE_CHECK", "1")
    program = quantize_activations(decoder(["q8_0"]))
    passes = [Pass("fuse", fuse), Pass("turn-heads", broken)]
    with pytest.raises(IRError, match="turn-heads"):
        run_passes(program, passes, sampler=draw_step)


@given(st.integers(0, 1000))
def test_drawn_steps_fit_together(seed):
    from dure.compiler.sample import draw_step

    program = decoder(["q8_0"])
    sample = draw_step(program, seed)
    by_name = dict(zip(program.attrs["names"], sample.arguments, strict=True))
    assert by_name["work_rows"].sum() == len(by_name["tokens"]) == sample.sizes["T"]
    for item, sequence in enumerate(by_name["work_sequence"]):
        start, rows = by_name["work_start"][item], by_name["work_rows"][item]
        positions = by_name["positions"][start : start + rows]
        assert positions[-1] + 1 == by_name["context"][sequence]
        pages = by_name["block_table"][sequence]
        assert (
            by_name["slots"][start : start + rows] == pages[positions // 16] * 16 + positions % 16
        ).all()
