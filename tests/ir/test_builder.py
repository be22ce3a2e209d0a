"""The program builder: layers as repeats, states, and errors at the author's line."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensor_programs import SIZES, decoder, values_of

from dure.errors import IRError
from dure.ir.builder import ProgramBuilder
from dure.ir.core import walk
from dure.ir.interpret import execute
from dure.ir.layers import group
from dure.ir.pack import addresses
from dure.ir.stored import STORED_FORMATS, stored_layout
from dure.ir.verifier import verify


@given(st.lists(st.sampled_from("ab"), max_size=24))
def test_runs_cover_the_layers_in_order(signatures):
    covered = []
    for run in group(signatures):
        kinds = signatures[run.start : run.start + run.period]
        covered += kinds * run.count
        assert len(covered) == run.start + run.period * run.count
    assert covered == list(signatures)


def test_periods_become_one_body():
    pattern = ["local"] * 5 + ["global"]
    bodies = sum(run.period for run in group(pattern * 4))
    assert bodies <= 6
    assert [(r.period, r.count) for r in group(["x"] * 30)] == [(1, 30)]
    assert group([]) == []


def test_a_repeat_computes_what_separate_layers_do():
    equal = decoder(["q4_1"] * 3)
    repeats = [op for op in equal.body.ops if op.name == "repeat"]
    assert [op.attr("count") for op in repeats] == [3]
    # A signature of their own keeps layers apart.
    apart = decoder(["q4_1", "q8_0", "q4_0"])
    assert not [op for op in apart.body.ops if op.name == "repeat"]
    verify(equal)
    values = values_of(equal)
    results = execute(equal, values, SIZES)
    by_name = dict(zip(equal.attrs["names"], values, strict=True))
    flat = _unrolled(equal, by_name)
    for found, expected in zip(results, flat, strict=True):
        np.testing.assert_array_equal(found, expected)


def _unrolled(program, values):
    """Runs the repeat's body by hand, one layer after another."""
    from dure.ir.interpret import Frame

    start = dict(zip((p.value for p in program.params), values.values(), strict=True))
    frame = Frame(start, SIZES)
    for op in program.body.ops:
        if op.name != "repeat":
            frame._run_op(op)
            continue
        count, body = op.attr("count"), op.regions[0]
        x, updated = frame.value(op.operands[0]), []
        for i in range(count):
            row = [frame.value(v) for v in op.operands[1 + i :: count]]
            x, *new = frame.run_region(body, [x, *row])
            updated.append(new)
        rest = [updated[i][t] for t in range(len(updated[0])) for i in range(count)]
        frame.values.update(zip(op.results, [x, *rest], strict=True))
    return [frame.value(v) for v in program.body.yields]


def test_the_program_says_what_its_parameters_are():
    program = decoder(["q4_1", "q4_1"])
    roles = dict(zip(program.attrs["names"], program.attrs["roles"], strict=True))
    assert roles["tokens"] == "input"
    assert roles["layer.1.q"] == "weight"
    assert roles["layer.0.keys"] == "state"
    assert program.attrs["outputs"] == ("logits", "next")
    access = {p.value.name: p.access for p in program.params}
    assert access["layer.0.keys"] == "inout"
    assert access["layer.0.q"] == "in"
    assert len(program.body.yields) == 2 + 4


def test_errors_name_the_line_that_called():
    b = ProgramBuilder("broken")
    x = b.input("x", (b.symbol("T", 1, 4), 8))
    with pytest.raises(IRError) as caught:
        b.linear(x, b.weight("w", (4, 9), "float32"))
    assert "test_builder.py" in caught.value.where
    assert 'b.weight("w", (4, 9), "float32")' in caught.value.where


def test_what_the_builder_refuses():
    b = ProgramBuilder("broken")
    rows = b.symbol("T", 1, 4)
    x = b.input("x", (rows, 8))
    with pytest.raises(IRError, match="two symbols"):
        b.symbol("T", 1, 5)
    with pytest.raises(IRError, match="without an output"):
        b.build()
    with pytest.raises(IRError, match="declared as"):
        b.weight("x", (3, 8), "float32")
    with pytest.raises(IRError, match="unknown element type"):
        b.weight("w", (3, 8), "q9_9")
    with pytest.raises(IRError, match=r"takes .* and gives"):
        b.layers(["a", "a"], lambda layer, x: b.reshape(x, -1, 4, 2), x)
    b.output("y", x)
    with pytest.raises(IRError, match="two outputs"):
        b.output("y", x)


@pytest.mark.parametrize("format", STORED_FORMATS, ids=str)
def test_stored_layouts_are_those_of_the_file_format(format):
    from dure.frontends.gguf import GGMLType
    from dure.frontends.gguf.layouts import layout_of

    shape = (3, 2 * format.block)
    mine, other = stored_layout(shape, format), layout_of(GGMLType[format.name.upper()], shape)
    for plane in format.planes:
        entries = (shape[0], shape[1] // plane.per)
        np.testing.assert_array_equal(
            addresses(mine[plane.name], entries), addresses(other[plane.name], entries)
        )


def test_layers_only_reuse_what_has_one_type():
    b = ProgramBuilder("mixed")
    rows = b.symbol("T", 1, 4)

    def layer(layer, x):
        # A signature that hides a difference is caught where the weights' types differ.
        width = 8 if layer.numbers[0] == 0 else 16
        return b.linear(x, layer.weight("w.{}", (8, width), "float32"))

    with pytest.raises(IRError):
        b.layers(["a", "b"], layer, b.input("x", (rows, 8)))


def test_walk_reaches_the_bodies():
    assert any(op.name == "attention" for op in walk(decoder(["q8_0"] * 4).body))
