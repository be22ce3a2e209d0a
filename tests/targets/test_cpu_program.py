"""Compiled programs: the step function's values, its load program, its cache, and bad inputs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from tensor_programs import SIZES, decoder, values_of

import dure.library
from dure.compiler.fuse import fuse
from dure.compiler.pipeline import compile_program
from dure.compiler.quantize import quantize_activations
from dure.errors import UsageError
from dure.ir.blocks import Blocks
from dure.ir.interpret import execute
from dure.ir.pack import pack, unpack
from dure.ir.sizes import tensor_bytes
from dure.runtime.host import host_features, host_levels
from dure.runtime.llvm import CompileTimes
from dure.targets.cpu.artifact import Artifact, program_key
from dure.targets.cpu.target import CpuTarget

pytestmark = pytest.mark.usefixtures("guarded_buffers")

assert dure.library


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DURE_CACHE_DIR", str(folder))
        yield folder


class Ready:
    """A compiled program with random weights and states, and the values it was given."""

    def __init__(self, program, workers):
        self.program = program
        self.times = CompileTimes()
        self.compiled = compile_program(program, workers=workers, times=self.times)
        self.values = dict(zip(program.attrs["names"], values_of(program), strict=True))
        self.roles = dict(zip(program.attrs["names"], program.attrs["roles"], strict=True))
        types = self.compiled.weight_types
        self.weights = {}
        for name, kind in types.items():
            value = self.values[name]
            blocks = isinstance(value, Blocks)
            self.weights[name] = pack(value, kind.layout, kind.dtype) if blocks else value
        self.compiled.load(self.weights)
        self.state_types = {
            name: kind
            for name, kind in zip(self.compiled._names, self.compiled._types, strict=True)
            if self.roles[name] == "state"
        }
        self.compiled.allocate_states()
        self.set_states()

    def set_states(self):
        for name, kind in self.state_types.items():
            data = pack(self.values[name], kind.layout, kind.dtype)
            self.compiled.states[name].array[: len(data)] = data

    def inputs(self, **changes):
        given = {n: v for n, v in self.values.items() if self.roles[n] == "input"}
        return {**given, **changes}

    def expected(self):
        policy = CpuTarget(host_features()).activations
        fused = fuse(quantize_activations(self.program, policy))
        return execute(fused, list(self.values.values()), SIZES)


@pytest.fixture(scope="module")
def ready(cache):
    return Ready(decoder(["q4_1", "q4_1", "q8_0"]), workers=2)


def test_a_step_computes_what_the_program_means(ready):
    ready.set_states()
    found = ready.compiled.run(ready.inputs())
    logits, chosen, *states = ready.expected()
    scale = np.abs(logits).max()
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4 * scale)
    np.testing.assert_array_equal(found["next"], chosen)
    for (name, kind), expected in zip(ready.state_types.items(), states, strict=True):
        data = ready.compiled.states[name].array
        shape = expected.shape
        read = unpack(data, kind.layout, kind.dtype, shape)
        np.testing.assert_allclose(
            read.astype(np.float32), expected.astype(np.float32), atol=2e-3, rtol=2e-3
        )


def test_the_bits_do_not_depend_on_the_workers(ready, cache):
    ready.set_states()
    two = {n: v.copy() for n, v in ready.compiled.run(ready.inputs()).items()}
    alone = Ready(ready.program, workers=1)
    assert alone.times.modules == 0, "a second compilation comes from the cache"
    one = alone.compiled.run(alone.inputs())
    for name, value in two.items():
        np.testing.assert_array_equal(one[name], value)


def test_weights_take_little_more_than_the_file(ready):
    packed = {w.name for w in ready.compiled._plan.weights}
    stored = sum(w.nbytes for n, w in ready.weights.items() if n in packed)
    # 100 rows of the embedding are seven panels of sixteen; the rest divides.
    assert ready.compiled.packed_bytes <= 1.2 * stored + 128 * len(packed)
    assert packed == {n for n, v in ready.values.items() if isinstance(v, Blocks)}


def test_another_number_of_rows_runs_at_once(ready):
    ready.set_states()
    whole = ready.compiled.run(ready.inputs())["logits"].copy()
    ready.set_states()
    names = ("tokens", "positions", "slots")
    work = ("work_sequence", "work_start", "work_rows")
    first = {n: ready.values[n][:4] for n in names} | {n: ready.values[n][:2] for n in work}
    ready.compiled.run(ready.inputs(**first, out_rows=np.zeros(0, np.int32)))
    last = {n: ready.values[n][4:] for n in names} | {n: ready.values[n][2:] for n in work}
    last["work_start"] = np.zeros(1, np.int32)
    found = ready.compiled.run(ready.inputs(**last, out_rows=np.zeros(1, np.int32)))
    np.testing.assert_array_equal(found["logits"][0], whole[1])


def test_strided_inputs_are_read_right(ready):
    ready.set_states()
    expected = ready.compiled.run(ready.inputs())["logits"].copy()
    ready.set_states()
    spread = np.repeat(ready.values["tokens"], 2)[::2]
    np.testing.assert_array_equal(
        ready.compiled.run(ready.inputs(tokens=spread))["logits"], expected
    )


BAD = {
    "missing": (lambda v: {"tokens": None}, "tokens"),
    "dtype": (lambda v: {"tokens": v["tokens"].astype(np.int64)}, "int64"),
    "rank": (lambda v: {"tokens": v["tokens"][None]}, "shape"),
    "rows that disagree": (lambda v: {"positions": v["positions"][:3]}, "positions"),
    "fixed extent": (lambda v: {"context": v["context"][:2]}, "context"),
    "index too large": (lambda v: {"tokens": v["tokens"] + 60}, "indices"),
    "negative index": (lambda v: {"positions": v["positions"] - 1}, "indices"),
    "too many rows": (
        lambda v: {n: np.zeros(65, np.int32) for n in ("tokens", "positions", "slots")},
        "size T",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_named(ready, case):
    change, said = BAD[case]
    inputs = {k: v for k, v in ready.inputs(**change(ready.values)).items() if v is not None}
    for _ in range(2):  # what is remembered of shapes changes nothing
        with pytest.raises(UsageError) as caught:
            ready.compiled.run(inputs)
        assert said in str(caught.value)
        assert caught.value.rule


@pytest.mark.parametrize("wrong", [-(2**31), -1, 100, 2**31 - 1])
@pytest.mark.parametrize("rows", [1, 7, 8, 19, 33])
def test_an_index_outside_its_range_is_found_wherever_it_stands(ready, rows, wrong):
    inputs = ready.inputs(
        **{n: np.zeros(rows, np.int32) for n in ("tokens", "positions")},
        slots=np.full(rows, -1, np.int32),
        work_start=np.zeros(3, np.int32),
        out_rows=np.zeros(1, np.int32),
    )
    for place in range(rows):
        tokens = np.zeros(rows, np.int32)
        tokens[place] = wrong
        with pytest.raises(UsageError, match="tokens"):
            ready.compiled.run({**inputs, "tokens": tokens})


def test_weights_of_the_wrong_size_are_named(ready):
    with pytest.raises(UsageError, match="missing"):
        ready.compiled.load({})
    short = {**ready.weights, "layer.0.q": ready.weights["layer.0.q"][:-1]}
    with pytest.raises(UsageError, match=r"layer\.0\.q"):
        ready.compiled.load(short)


def test_a_step_before_loading_says_so(cache, ready):
    compiled = compile_program(ready.program, workers=1)
    with pytest.raises(UsageError, match="has no"):
        compiled.run(ready.inputs())


def test_artifacts_survive_bytes(ready):
    artifact = ready.compiled._artifact
    again = Artifact.from_bytes(artifact.to_bytes())
    assert again == artifact
    assert Artifact.from_bytes(b"something else") is None


def test_hosts_of_several_levels_share_a_cache(ready, tmp_path, monkeypatch):
    """Each has programs of its own there, and no code of another's."""
    monkeypatch.setenv("DURE_CACHE_DIR", str(tmp_path))
    for turn in range(2):
        for level in host_levels():
            monkeypatch.setenv("DURE_CPU_LEVEL", level)
            found = Ready(ready.program, workers=1)
            assert (found.times.modules == 0) == (turn == 1), level
            logits, (expected, *_) = found.compiled.run(found.inputs())["logits"], found.expected()
            np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_a_programs_key_tells_hosts_apart():
    host = host_features()
    others = [
        replace(host, features=host.features[:-1]),
        replace(host, tuning=(*host.tuning, "slow-3ops-lea")),
        replace(host, vector_bits=64),
        replace(host, vector_registers=8),
        replace(host, architecture="aarch64"),
        replace(host, triple="x86_64-pc-windows-msvc"),
        replace(host, l1d_bytes=1),
        replace(host, l2_bytes=1),
        replace(host, l3_bytes=1),
    ]
    keys = {program_key("a program", one) for one in (host, *others)}
    assert len(keys) == 1 + len(others)
    assert program_key("a program", replace(host)) in keys
    assert program_key("another", host) not in keys


def test_state_layouts_pack_pages_without_gaps(ready):
    for name, kind in ready.state_types.items():
        assert kind.layout is not None
        assert tensor_bytes(kind, SIZES) == ready.values[name].nbytes


@pytest.mark.parametrize("workers", [1, 2])
def test_a_program_that_records_stamps_all_that_it_executes(ready, cache, workers):
    recorded = compile_program(ready.program, workers=workers, recorded=True)
    report = recorded.report
    executed = [math.prod((count for count, _ in e.turns), start=1) for e in recorded.events]
    assert sum(executed) == report["launches"] + report["barriers"] + report.get("copies", 0)
    places = [0]
    for event in recorded.events:
        runs = itertools.product(*(range(0, count * each, each) for count, each in event.turns))
        places += [event.place + sum(run) for run in runs]
    assert sorted(places) == list(range(len(places)))
    recorded.load(ready.weights)
    recorded.allocate_states()
    for _ in range(2):
        result = recorded.run(ready.inputs())["logits"].copy()
        stamps = recorded.stamps()[:, : len(places)]
        assert (np.diff(stamps, axis=1) >= 0).all() and (stamps > 0).all()
    ready.set_states()
    for name, buffer in recorded.states.items():
        buffer.array[:] = 0
        ready.compiled.states[name].array[:] = 0
    result = recorded.run(ready.inputs())["logits"].copy()
    np.testing.assert_array_equal(result, ready.compiled.run(ready.inputs())["logits"])
    assert not ready.compiled.events
    with pytest.raises(UsageError, match="keeps no times"):
        ready.compiled.stamps()
