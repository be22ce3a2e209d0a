"""Experts, sinks and attention of encoders: their meaning, and compiled against the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tensor_programs import random_value

import dure.library
from dure.compiler.fuse import fuse
from dure.compiler.pipeline import compile_program
from dure.errors import IRError
from dure.ir.blocks import Blocks
from dure.ir.builder import ProgramBuilder
from dure.ir.core import Function, Value, op_definition
from dure.ir.interpret import execute
from dure.ir.pack import pack

assert dure.library
RNG = np.random.default_rng(0)
TOKENS = 40


def apply(name: str, attrs: dict[str, Any], *operands: Any) -> Any:
    definition = op_definition(name)
    assert definition.semantics is not None
    return definition.semantics({**definition.defaults, **attrs}, *operands)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_route_is_a_softmax_over_the_chosen() -> None:
    logits = floats(7, 6)
    weights, experts = apply("route", {"k": 3}, logits)
    for row, chosen, share in zip(logits, experts, weights, strict=True):
        assert list(chosen) == list(np.argsort(-row)[:3])
        odds = np.exp(row[chosen])
        np.testing.assert_allclose(share, odds / odds.sum(), rtol=1e-6)
    plain, _ = apply("route", {"k": 3, "normalized": False}, logits)
    assert (plain.sum(axis=1) < 1).all()


def test_dispatch_sorts_choices_by_expert() -> None:
    experts = np.array([[2, 0], [0, 2], [3, 2]], np.int32)
    places, starts, stops = apply("dispatch", {"experts": 4}, experts)
    assert places.tolist() == [[2, 0], [1, 3], [5, 4]]
    assert (starts.tolist(), stops.tolist()) == ([0, 2, 2, 5], [2, 2, 5, 6])


def test_grouped_products_are_those_of_each_tokens_experts() -> None:
    x, w, bias = floats(5, 8), floats(4, 3, 8), floats(4, 3)
    weights, experts = apply("route", {"k": 2}, floats(5, 4))
    places, starts, stops = apply("dispatch", {"experts": 4}, experts)
    rows = apply("expert_rows", {}, x, places)
    y = apply("grouped_linear", {"bias": True}, rows, w, starts, stops, bias)
    found = apply("expert_sum", {}, y, places, weights)
    for t in range(5):
        parts = zip(experts[t], weights[t], strict=True)
        expected = sum(share * (w[e] @ x[t] + bias[e]) for e, share in parts)
        np.testing.assert_allclose(found[t], expected, rtol=1e-5, atol=1e-5)


def test_a_sink_takes_a_share_and_an_encoder_sees_everything() -> None:
    q, k, v = floats(4, 2, 8), floats(16, 1, 8), floats(16, 1, 8)
    lists = ([0, 1, 2, 3], [[0]], [4], [0], [0], [4])
    arrays = [np.array(entry, np.int32) for entry in lists]
    sinks = np.array([0.5, -1e30], np.float32)
    attrs = {"scale": 1.0, "page_size": 16}
    found = apply("attention", {**attrs, "sinks": True}, q, k, v, *arrays, sinks)
    plain = apply("attention", attrs, q, k, v, *arrays)
    np.testing.assert_allclose(found[:, 8:], plain[:, 8:], rtol=1e-6)
    for t in range(4):
        odds = np.exp(k[: t + 1, 0] @ q[t, 0])
        expected = odds @ v[: t + 1, 0] / (odds.sum() + np.exp(0.5))
        np.testing.assert_allclose(found[t, :8], expected, rtol=1e-5, atol=1e-6)
    whole = apply("attention", {**attrs, "causal": False}, q, k, v, *arrays)
    odds = np.exp(k[:4, 0] @ q[0, 0])
    np.testing.assert_allclose(whole[0, :8], odds @ v[:4, 0] / odds.sum(), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    b = ProgramBuilder("wrong")
    x, logits = b.input("x", (6, 8)), b.input("logits", (6, 4))
    _, experts = b.route(logits, 2)
    places, starts, stops = b.dispatch(experts, 4)
    rows = b.expert_rows(x, places)
    table = b.input("table", (6, 2), "int32", index=(0, 11))
    w = b.weight("w", (4, 3, 8), "float32")
    for build, message in (
        (lambda: b.route(logits, 5), "5 of 4 experts"),
        (lambda: b.expert_rows(x, table), "places are a permutation"),
        (lambda: b.dispatch(logits, 4), "experts are int32"),
        (lambda: b.grouped_linear(x, b.weight("v", (4, 3, 9), "float32"), (starts, stops)), "K of"),
        (lambda: b.grouped_linear(rows, w, (starts, stops), b.input("b", (3, 4))), "a bias is"),
        (lambda: b.expert_sum(rows, places, logits), "extent 1"),
        (lambda: b.clamped_swiglu(x, logits, 7, 1), "both have one shape"),
        (lambda: b.clamped_swiglu(x, x, 0, 1), "the limit is positive"),
    ):
        with pytest.raises(IRError, match=message):
            build()


def compiled(program: Function, values: dict[str, Any], workers: int = 2) -> dict[str, np.ndarray]:
    step = compile_program(program, workers=workers)
    roles = dict(zip(program.attrs["names"], program.attrs["roles"], strict=True))
    types = {n: kind for n, kind in step.weight_types.items() if n in values}
    stored = {
        n: pack(v, types[n].layout, types[n].dtype) if isinstance(v, Blocks) else v
        for n, v in values.items()
    }
    step.load({n: v for n, v in stored.items() if roles[n] == "weight"})
    step.allocate_states()
    return step.run({n: v for n, v in values.items() if roles[n] == "input"})


def mixture(count: int, k: int, dtype: str, *, bias: bool, clamped: bool) -> Function:
    """One mixture of experts."""
    b = ProgramBuilder("mixture")
    tokens = b.symbol("T", 1, TOKENS)
    hidden, inner = (64, 96) if dtype.startswith("q") else (48, 40)
    x, logits = b.input("x", (tokens, hidden)), b.input("logits", (tokens, count))

    def product(x: Value, name: str, n: int, k: int) -> Value:
        added = b.weight(name + "_bias", (count, n), "float32") if bias else None
        return b.grouped_linear(x, b.weight(name, (count, n, k), dtype), ends, added)

    weights, experts = b.route(logits, k, normalized=not clamped)
    places, *bounds = b.dispatch(experts, count)
    ends = (bounds[0], bounds[1])
    rows = b.expert_rows(x, places)
    gate, up = (product(rows, name, inner, hidden) for name in ("gate", "up"))
    mixed = b.clamped_swiglu(gate, up, 0.5, 1.702) if clamped else b.mul(b.silu(gate), up)
    b.output("y", b.expert_sum(product(mixed, "down", hidden, inner), places, weights))
    b.output("experts", experts)
    return b.build()


@pytest.mark.parametrize(
    ("count", "k", "dtype", "bias", "clamped"),
    [
        (4, 2, "float32", False, False),
        (7, 3, "bfloat16", True, True),
        (32, 8, "float16", True, False),
        (6, 2, "q8_0", False, False),
        (6, 2, "q4_1", True, True),
        (6, 2, "q4_0", True, False),
    ],
)
def test_a_mixture_on_the_cpu(count: int, k: int, dtype: str, bias: bool, clamped: bool) -> None:
    program = mixture(count, k, dtype, bias=bias, clamped=clamped)
    kinds = {
        str(n): p.value.tensor for n, p in zip(program.attrs["names"], program.params, strict=True)
    }
    fixed = {
        n: random_value(RNG, kind.dtype, tuple(int(str(e)) for e in kind.shape))
        for n, kind in kinds.items()
        if n not in ("x", "logits")
    }
    for tokens in (1, 5, TOKENS):
        x = floats(tokens, int(str(kinds["x"].shape[1])))
        values = {"x": x, "logits": floats(tokens, count), **fixed}
        found = compiled(program, values)
        y, experts = execute(program, [values[n] for n in kinds])
        np.testing.assert_array_equal(found["experts"], experts)
        np.testing.assert_allclose(found["y"], y, atol=1e-5 * np.abs(y).max(), rtol=1e-4)


def test_logits_that_are_nan_stay_inside() -> None:
    program = mixture(4, 2, "float32", bias=False, clamped=False)
    values: dict[str, Any] = {"x": floats(6, 48), "logits": floats(6, 4)}
    values["logits"][2] = np.nan
    for name, shape in (("gate", (4, 40, 48)), ("up", (4, 40, 48)), ("down", (4, 48, 40))):
        values[name] = floats(*shape)
    found = compiled(program, values)["y"]
    assert np.isfinite(found[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [True, False])
def test_attention_on_the_cpu(causal: bool, sinks: bool) -> None:
    b = ProgramBuilder("attention")
    tokens, items = b.symbol("T", 1, TOKENS), b.symbol("W", 1, 8)

    def index(name: str, shape: Any, low: int, high: int) -> Value:
        return b.input(name, shape, "int32", index=(low, high))

    q = b.reshape(b.input("q", (tokens, 48)), -1, 6, 8)
    k, v = (b.input(n, (64, 2, 8)) for n in "kv")
    work = (index("ws", (items,), 0, 1), index("wt", (items,), 0, 39), index("wr", (items,), 1, 8))
    mixed = b.attention(
        *(q, k, v, index("at", (tokens,), 0, 31)),
        *(index("table", (2, 2), 0, 3), index("context", (2,), 0, 32), work),
        scale=0.4,
        page_size=16,
        query_rows=8,
        window=6 if causal else 0,
        causal=causal,
        sinks=b.weight("sinks", (6,), "float32") if sinks else None,
    )
    b.output("y", mixed)
    program = b.build()
    lists = {
        "ws": [0, 0, 1, 1],
        "wt": [0, 8, 11, 19],
        "wr": [8, 3, 8, 1],
        "at": [*range(2, 13), *range(9)],
        "table": [[3, 1], [0, 2]],
        "context": [13, 9],
    }
    values: dict[str, Any] = {n: np.array(entry, np.int32) for n, entry in lists.items()}
    values |= {"q": floats(20, 48) * 3, "k": floats(64, 2, 8), "v": floats(64, 2, 8)}
    values |= {"sinks": floats(6) * 4}
    names = [str(n) for n in program.attrs["names"]]
    (expected,) = execute(program, [values[n] for n in names])
    found = compiled(program, {n: values[n] for n in names})
    np.testing.assert_allclose(found["y"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("bias", "clamped"), [(False, False), (True, True)])
def test_both_products_and_the_gate_are_one_op(bias: bool, clamped: bool) -> None:
    program = mixture(6, 2, "float32", bias=bias, clamped=clamped)
    fused = fuse(program)
    names = [op.name for op in fused.body.ops]
    assert names.count("grouped_gated") == names.count("grouped_linear") == 1
    assert not {"clamped_swiglu", "elementwise"} & set(names)
    kinds = [p.value.tensor for p in program.params]
    shapes = [[9 if e is kinds[0].shape[0] else int(str(e)) for e in k.shape] for k in kinds]
    values = [random_value(RNG, k.dtype, tuple(s)) for k, s in zip(kinds, shapes, strict=True)]
    (wanted, _), (found, _) = (execute(each, values) for each in (program, fused))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
