"""Every kernel of the library, as the lowerings specialise it, passes :mod:`dure.ir.portable`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

import dure.library as library
from dure.ir.builder import ProgramBuilder
from dure.ir.core import Function, Value, walk
from dure.ir.expr import IntLike, Symbol
from dure.ir.lowering import LoweringContext, lowering_of
from dure.ir.portable import check_portable
from dure.ir.samples import Sample, draw

assert library.__all__


class Plain:
    """A target without wishes."""

    name = "plain"

    def weight_layout(self, weight: object, uses: object) -> None: ...
    def state_layout(self, state: object, uses: object) -> None: ...
    def buffer_layout(self, value: object) -> None: ...


class OneOp(ProgramBuilder):
    """A builder with a size for the rows of every tensor."""

    def __init__(self) -> None:
        super().__init__("one")
        self.rows = self.symbol("T", 1, 40)


def kernels(build: Callable[[ProgramBuilder], Value | tuple[Value, ...]]) -> list[Function]:
    """The kernels that the ops of a program are lowered to."""
    builder = OneOp()
    result = build(builder)
    for number, value in enumerate((result,) if isinstance(result, Value) else result):
        builder.output(f"y{number}", value)
    found: list[Function] = []
    for op in walk(builder.build().body):
        if op.name != "reshape_tensor":
            launches = lowering_of(op.name)(op, LoweringContext(Plain()))
            found += [v.kernel for launch in launches for v in launch.variants]
    assert found
    return found


def rows(b: ProgramBuilder, columns: int, name: str = "x", dtype: str = "float32") -> Value:
    return b.input(name, (size(b), columns), dtype)


def size(b: ProgramBuilder) -> Symbol:
    assert isinstance(b, OneOp)
    return b.rows


def linear(b: ProgramBuilder, dtype: str, quantized: bool) -> Value:
    x = rows(b, 512)
    if quantized:
        (x,) = b.op("quantize_rows", x, quantize="int8_block32")
    weight = b.weight("w", (48, 512), dtype)
    (y,) = b.op("linear", x, weight, b.input("bias", (48,)), bias=True, activation="gelu_tanh")
    return y


def gated(b: ProgramBuilder) -> Value:
    weights = [b.weight(n, (64, 96), "q4_0") for n in "gu"]
    (x,) = b.op("quantize_rows", rows(b, 96), quantize="int8_block32")
    return b.op("gated_linear", x, *weights, quantize="int8_block32")[0]


def rope(b: ProgramBuilder, order: str, heads: int, head: int, norm: bool) -> Value:
    positions = b.input("positions", (size(b),), "int32", index=(0, 63))
    tables = tuple(b.input(n, (64, head // 2)) for n in ("cos", "sin"))
    x = b.reshape(rows(b, heads * head), -1, heads, head)
    weight = b.input("norm", (head,)) if norm else None
    return b.rope(x, (tables[0], tables[1]), positions, order=order, norm=weight)


def kv_write(b: ProgramBuilder, order: str) -> Value:
    positions = b.input("positions", (size(b),), "int32", index=(0, 63))
    slots = b.input("slots", (size(b),), "int32", index=(-1, 127), unique=True)
    tables = [b.input(n, (64, 8)) for n in ("cos", "sin")]
    x = b.reshape(rows(b, 48), -1, 3, 16)
    pool = b.state("pool", (128, 3, 16), "float16")
    rest = [*tables, positions] if order else []
    return b.op("kv_write", pool.value, x, slots, *rest, order=order)[0]


def experts(b: ProgramBuilder) -> Value:
    weights, chosen = b.route(b.input("logits", (size(b), 6)), 3)
    places, starts, stops = b.dispatch(chosen, 6)
    y = b.expert_rows(rows(b, 70), places)
    bias = b.weight("bias", (6, 20), "float32")
    y = b.grouped_linear(y, b.weight("w", (6, 20, 70), "bfloat16"), (starts, stops), bias)
    return b.expert_sum(b.clamped_swiglu(y, y, 7.0, 1.702), places, weights)


CASES: dict[str, Callable[[ProgramBuilder], Value | tuple[Value, ...]]] = {
    "linear float": lambda b: linear(b, "float32", False),
    "linear bf16": lambda b: linear(b, "bfloat16", False),
    "linear q4_1": lambda b: linear(b, "q4_1", True),
    "linear q5_0 of floats": lambda b: linear(b, "q5_0", False),
    "linear q6_k": lambda b: linear(b, "q6_k", True),
    "gated linear": gated,
    "batched matmul": lambda b: b.batched_matmul(
        b.input("a", (3, size(b), 20)), b.input("b", (3, 20, 33))
    ),
    "conv2d": lambda b: b.conv2d(
        b.input("x", (2, 9, 11, 5)), b.input("w", (6, 3, 2, 5)), stride=(2, 1), padding=(1, 1)
    ),
    "rms norm": lambda b: b.rms_norm(rows(b, 96), b.input("w", (96,)), 1e-5),
    "layer norm": lambda b: b.layer_norm(
        rows(b, 70), b.input("w", (70,)), b.input("b", (70,)), 1e-5
    ),
    "softmax": lambda b: b.softmax(rows(b, 70)),
    "add": lambda b: b.add(rows(b, 70), b.input("row", (70,))),
    "silu": lambda b: b.silu(rows(b, 64)),
    "quantize": lambda b: b.op("quantize_rows", rows(b, 64), quantize="int8_block32")[0],
    "embedding": lambda b: b.embedding(
        b.weight("table", (50, 64), "q8_0"),
        b.input("ids", (size(b),), "int32", index=(0, 49)),
        scale=2.0,
    ),
    "gather rows": lambda b: b.gather_rows(
        rows(b, 70), b.input("ids", (b.symbol("L", 0, 9),), "int32", index=(0, 0))
    ),
    "argmax": lambda b: b.argmax(rows(b, 70)),
    "top k": lambda b: b.top_k(rows(b, 70), 3),
    "rope llama": lambda b: rope(b, "llama", 3, 16, False),
    "rope neox with a norm": lambda b: rope(b, "neox", 2, 32, True),
    "kv write": lambda b: kv_write(b, ""),
    "kv write with rope": lambda b: kv_write(b, "llama"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_of_an_op_are_portable(case: str) -> None:
    for kernel in kernels(CASES[case]):
        report = check_portable(kernel)
        assert report.live_tile_bytes > 0 and report.descriptors > 0


def attention(b: ProgramBuilder, sinks: Value | None = None) -> Value:
    tokens, work = size(b), b.symbol("W", 1, 40)

    def index(name: str, shape: Sequence[IntLike], low: int, high: int) -> Value:
        return b.input(name, shape, "int32", index=(low, high))

    pools = [b.state(n, (128, 2, 16), "float16") for n in ("k", "v")]
    names = ("work_sequence", "work_start", "work_rows")
    bounds = ((0, 1), (0, 39), (1, 8))
    lists = tuple(index(n, (work,), *ends) for n, ends in zip(names, bounds, strict=True))
    return b.attention(
        b.reshape(rows(b, 96), -1, 6, 16),
        pools[0],
        pools[1],
        index("positions", (tokens,), 0, 63),
        index("table", (2, 4), 0, 7),
        index("context", (2,), 0, 64),
        (lists[0], lists[1], lists[2]),
        scale=0.25,
        page_size=16,
        query_rows=8,
        window=20,
        sinks=sinks,
    )


def ragged(function: Function, seed: int) -> Sample:
    """A prefill chunk of one sequence and a single token of another."""
    rng = np.random.default_rng(seed)
    count, place = int(rng.integers(1, 8)), int(rng.integers(0, 40))
    lists = {
        "positions": [*range(place, place + count), 11],
        "block_table": [[0, 3, 5, 1], [2, 0, 0, 0]],
        "context": [place + count, 12],
        "work_sequence": [0, 1],
        "work_start": [0, count],
        "work_rows": [count, 1],
    }
    sample = draw(
        function,
        seed,
        {s.name: count + 1 for s in function.symbols if s.name == "T"}
        | {s.name: 2 for s in function.symbols if s.name == "W"},
    )
    arguments = [
        np.array(lists[p.value.name], np.int32) if p.value.name in lists else a
        for p, a in zip(function.params, sample.arguments, strict=True)
    ]
    return Sample(tuple(arguments), sample.sizes)


#: Pages of keys and of values, for one token and for more, in each loop: pieces that the window
#: cuts, those seen whole, and the last ones.
PAGE_LISTS = {"paged_attention": 2 * 2 * 3, "attention_runs": 2 * 3, "join_runs": 0}


def test_paged_attention_is_portable() -> None:
    found = kernels(attention)
    assert [kernel.name for kernel in found] == list(PAGE_LISTS)
    for kernel in found:
        assert check_portable(kernel, sampler=ragged).lists == PAGE_LISTS[kernel.name]


def sorted_rows(function: Function, seed: int) -> Sample:
    """Experts whose rows follow one another, one of them without any."""
    sample = draw(function, seed, {s.name: 9 for s in function.symbols})
    ends = {"starts": [0, 5, 5, 11, 20, 21], "stops": [5, 5, 11, 20, 21, 27]}
    arguments = [
        np.array(ends[p.value.name], np.int32) if p.value.name in ends and p.access == "in" else a
        for p, a in zip(function.params, sample.arguments, strict=True)
    ]
    return Sample(tuple(arguments), sample.sizes)


def test_a_mixture_of_experts_is_portable() -> None:
    found = kernels(experts)
    names = ["moe_route", "expert_places", "expert_ends", "expert_rows", "grouped_linear"]
    assert [k.name for k in found] == [*names, "elementwise_2d", "expert_sum"]
    for kernel in found:
        assert check_portable(kernel, sampler=sorted_rows).descriptors > 0


def test_attention_with_sinks_is_portable() -> None:
    for kernel in kernels(lambda b: attention(b, b.weight("sinks", (6,), "float32"))):
        assert check_portable(kernel, sampler=ragged).lists == PAGE_LISTS[kernel.name]
