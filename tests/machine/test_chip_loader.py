"""Broken machine files of chips: each is refused with a word about where, which rule, and a fix."""

from __future__ import annotations

import copy
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dure.targets
from dure.errors import TargetError
from dure.machine import chip_loader
from dure.machine.chip import Chip
from dure.machine.chip_loader import load_chip, parse_chip, with_overrides
from dure.machine.law import VARIABLES, Law, check_law

#: A small chip that has one of everything.
CHIP = """
schema = 2
name = "toy"
kind = "chip"
summary = "a chip for tests"
home = "hbm"
scratchpad = "local"
lists = "hbm"
storage = ["float32", "bfloat16", "int32"]
cores = { value = 8, unit = "1", status = "published", source = "data sheet" }
clock = { value = 1.5, unit = "GHz", status = "guessed", low = 1, high = 2, source = "peak" }
launch = { value = 5, unit = "us", status = "derived", source = "measured" }
[memories.hbm]
scope = "chip"
size = { value = 32, unit = "GB", status = "published", source = "data sheet" }
alignment = { value = 64, unit = "B", status = "published", source = "data sheet" }
bandwidth = { value = 1.6, unit = "TB/s", status = "published", source = "data sheet" }
cached_by = "cache"
[memories.cache]
scope = "chip"
size = { value = 64, unit = "MiB", status = "published", source = "data sheet" }
alignment = { value = 64, unit = "B", status = "published", source = "data sheet" }
[memories.local]
scope = "core"
size = { value = 2, unit = "MiB", status = "published", source = "data sheet" }
partitions = { value = 128, unit = "1", status = "published", source = "data sheet" }
alignment = { value = 32, unit = "B", status = "published", source = "data sheet" }
padding = { "32" = [8, 128] }
padding_source = "published: manual"
[engines.tensor]
queue = "tensor"
reads = ["local"]
writes = ["local"]
types = ["bfloat16"]
issue = { value = 10, unit = "cycle", status = "published", source = "manual" }
numbers.side = { value = 128, unit = "1", status = "published", source = "data sheet" }
rates.bfloat16 = { value = 1, unit = "1", status = "published", source = "data sheet" }
[engines.tensor.laws.dot]
law = "batch * m * n * k / (side * side * rate)"
unit = "cycle"
status = "derived"
source = "peak"

[engines.tensor.dot]
accumulators = ["local"]
types = ["bfloat16"]
[engines.vector]
queue = "vector"
reads = ["local"]
writes = ["local"]
types = ["float32", "int32"]
issue = { value = 10, unit = "cycle", status = "published", source = "manual" }
numbers.lanes = { value = 64, unit = "1", status = "published", source = "data sheet" }
[engines.vector.laws.elementwise]
law = "elements / lanes"
unit = "cycle"
status = "derived"
source = "data sheet"
[dma.load]
queue = "dma_load"
moves = [["hbm", "local"]]
bandwidth = { value = 64, unit = "B/cycle", status = "published", source = "data sheet" }
latency = { value = 500, unit = "ns", status = "published", source = "data sheet" }
issue = { value = 10, unit = "cycle", status = "published", source = "manual" }
outstanding = { value = 4, unit = "1", status = "published", source = "manual" }
efficiency = { law = "min(1, run / full)", unit = "1", status = "derived", source = "measured" }
numbers.full = { value = 512, unit = "1", status = "derived", source = "measured" }
route = ["noc", "hbm"]
[dma.store]
queue = "dma_store"
moves = [["local", "hbm"]]
bandwidth = { value = 64, unit = "B/cycle", status = "published", source = "data sheet" }
latency = { value = 500, unit = "ns", status = "published", source = "data sheet" }
issue = { value = 10, unit = "cycle", status = "published", source = "manual" }
outstanding = { value = 4, unit = "1", status = "published", source = "manual" }
route = ["noc", "hbm"]
[fabrics.noc]
scope = "chip"
bandwidth = { value = 2, unit = "TB/s", status = "published", source = "data sheet" }
[sync]
semaphores = { value = 32, unit = "1", status = "published", source = "manual" }
maximum = { value = 255, unit = "1", status = "published", source = "manual" }
latency = { value = 10, unit = "cycle", status = "published", source = "manual" }
[conversions]
bfloat16 = "float32"
float16 = "float32"
[formats.float16]
exponent = { value = 6, unit = "1", status = "derived", source = "manual" }
mantissa = { value = 9, unit = "bit", status = "derived", source = "manual" }
[peaks]
bandwidth = { value = 1.6, unit = "TB/s", status = "published", source = "data sheet" }
compute.bfloat16 = { value = 393, unit = "TFLOP/s", status = "published", source = "data sheet" }
[power]
chip = { value = 300, unit = "W", status = "published", source = "data sheet" }
"""

PUBLISHED = 'status = "published", source = "data sheet"'


def test_reads_a_chip() -> None:
    chip = parse_chip(CHIP, "toy.toml")
    assert chip.cores.base == 8 and chip.clock.base == 1.5e9
    assert chip.memories["local"].size.base == 2 * 2**20
    assert chip.seconds(chip.engines["tensor"].issue) == pytest.approx(10 / 1.5e9)
    assert chip.bytes_a_second(chip.dma["load"].bandwidth) == 96e9
    assert chip.engine_of("tensor") == ("tensor",)
    paths = dict(chip.quantities())
    assert {"cores", "engines.tensor.rates.bfloat16", "formats.float16.exponent"} <= paths.keys()
    assert {path for path, _ in chip.laws()} == {
        *("engines.tensor.laws.dot", "engines.vector.laws.elementwise", "dma.load.efficiency")
    }


@pytest.mark.parametrize(
    ("old", "new", "what", "where"),
    [
        # The file as a whole.
        ("schema = 2", "schema = 3", "the schema of the machine file is 3", ""),
        ("schema = 2", "", "the schema of the machine file is None", ""),
        ("schema = 2", "schema = true", "the schema of the machine file is True", ""),
        ("schema = 2", 'schema = "2"', "the schema of the machine file is '2'", ""),
        ("schema = 2", "schema = ", "isn't TOML", ""),
        ('kind = "chip"', 'kind = "host"', "'kind' doesn't fit", "kind"),
        ('summary = "', 'sumary = "', "'summary' is missing", "summary"),
        ("[power]", "[powers]", "no 'powers' here", "powers"),
        # Numbers.
        ("cores = { value = 8", "kores = { value = 8", "'cores' is missing", "cores"),
        ("size = { value = 32,", "sise = { value = 32,", "'size' is missing", "memories.hbm.size"),
        ("value = 32, ", "", "published number has no value", "memories.hbm.size"),
        (f'"GB", {PUBLISHED}', '"GB", status = "published"', "no source", "memories.hbm.size"),
        (f'"GB", {PUBLISHED}', '"GB", source = "data sheet"', "no status", "memories.hbm.size"),
        (f'"GB", {PUBLISHED}', f'"GHz", {PUBLISHED}', "'GHz' doesn't fit", "memories.hbm.size"),
        (
            'size = { value = 32, unit = "GB"',
            'size = { value = 32, unit = "XB"',
            "'XB'",
            "hbm.size",
        ),
        ("value = 32, ", "value = 0, ", "0 is not a number of a machine", "memories.hbm.size"),
        ("value = 32, ", "value = -32, ", "-32 is not a number", "memories.hbm.size"),
        ("value = 32, ", "value = nan, ", "nan is not a number", "memories.hbm.size"),
        ("value = 32, ", "value = inf, ", "inf is not a number", "memories.hbm.size"),
        ("value = 32, ", 'value = "32", ', "the value is not a number", "memories.hbm.size"),
        (
            "size = { value = 32, unit = ",
            "size = 32 #",
            "a number stands alone",
            "memories.hbm.size",
        ),
        ("low = 1, ", "", "doesn't lie between", "clock"),
        ("low = 1, ", "low = 1.7, ", "doesn't lie between", "clock"),
        ("{ value = 8, unit", "{ value = 8, low = 1, unit", "has a low or a high", "cores"),
        ("value = 8, ", "value = 8.5, ", "8.5 is not a whole number", "cores"),
        (
            'cores = { value = 8, unit = "1", status = "published"',
            'cores = { unit = "1", status = "detected"',
            "a chip's number is detected",
            "cores",
        ),
        # Memories, and the ways between them.
        ('home = "hbm"', 'home = "dram"', "no memory named 'dram'", "home"),
        ('home = "hbm"', 'home = "local"', "belongs to a core", "home"),
        ('reads = ["local"]', 'reads = ["vmem"]', "no memory named 'vmem'", "engines.tensor.reads"),
        ('writes = ["local"]', 'writes = ["x"]', "no memory named 'x'", "engines.tensor.writes"),
        ('accumulators = ["local"]', 'accumulators = ["psum"]', "named 'psum'", "dot.accumulators"),
        ('accumulators = ["local"]', 'accumulators = ["hbm"]', "lies in 'hbm'", "dot.accumulators"),
        ('accumulators = ["local"]', "accumulators = []", "accumulator lies in ''", "accumulators"),
        ('cached_by = "cache"', 'cached_by = "l3"', "no memory named 'l3'", "hbm.cached_by"),
        (
            'cached_by = "cache"',
            'cached_by = "hbm"',
            "cached by itself: hbm -> hbm",
            "hbm.cached_by",
        ),
        (
            '[memories.cache]\nscope = "chip"',
            '[memories.cache]\nscope = "chip"\ncached_by = "hbm"',
            "cached by itself: hbm -> cache -> hbm",
            "memories.hbm.cached_by",
        ),
        (
            '[memories.cache]\nscope = "chip"',
            '[memories.cache]\nscope = "core"',
            "the cache 'cache' belongs to a core",
            "memories.hbm.cached_by",
        ),
        ('moves = [["hbm", "local"]]', 'moves = [["hbm", "hbm"]]', "to itself", "dma.load.moves"),
        ('moves = [["hbm", "local"]]', "moves = []", "moves nothing", "dma.load"),
        (
            'moves = [["hbm", "local"]]',
            'moves = [["hbm"]]',
            "'moves' is missing an entry",
            "dma.load",
        ),
        (
            'moves = [["hbm", "local"]]',
            'moves = [["hbm", "cache"]]',
            "nothing brings bytes from 'hbm' to 'local'",
            "scratchpad",
        ),
        (
            'moves = [["local", "hbm"]]',
            'moves = [["local", "cache"]]',
            "from 'local' back to 'hbm'",
            "dma",
        ),
        ('lists = "hbm"', 'lists = "cache"', "from 'hbm' to 'cache'", "lists"),
        ('route = ["noc", "hbm"]', 'route = ["bus"]', "fabric named 'bus'", "dma.load.route"),
        ("[fabrics.noc]", "[fabrics.hbm]", "'hbm' is both", "fabrics.hbm"),
        (
            'value = 64, unit = "MiB"',
            'value = 63, unit = "B"',
            "nothing fits in 'cache'",
            "memories.cache",
        ),
        ("value = 2, unit", "value = 0.99999, unit", "a broken number of bytes", "memories.local"),
        ('padding_source = "published: manual"', "", "the padding has no source", "local.padding"),
        ('"32" = [8, 128]', '"32" = [0, 128]', "isn't two multiples", "local.padding"),
        ('"32" = [8, 128]', '"wide" = [8, 128]', "isn't two multiples", "local.padding"),
        ('scope = "core"', 'scope = "die"', "'scope' doesn't fit", "memories.local.scope"),
        # Engines and their laws.
        ("laws.elementwise]", "laws.elementwize]", "operation named 'elementwize'", "vector.laws"),
        ("elements / lanes", "elements / lames", "unknown name 'lames'", "laws.elementwise"),
        ("elements / lanes", "elements / (lanes - 64)", "has no value", "laws.elementwise"),
        ("elements / lanes", "-elements", "gives -65536", "laws.elementwise"),
        ("elements / lanes", "elements ** lanes", "can't stand in a law", "laws.elementwise"),
        ("elements / lanes", "elements +", "isn't a formula", "laws.elementwise"),
        ("elements / lanes", "__import__(1)", "can't stand in a law", "laws.elementwise"),
        ("elements / lanes", "ceil(elements, lanes)", "can't stand in a law", "laws.elementwise"),
        ('/ lanes"\nunit = "cycle"', '/ lanes"\nunit = "ns"', "'ns' doesn't fit", "elementwise"),
        (
            'unit = "cycle"\nstatus = "derived"\nsource = "data',
            'unit = "cycle"\nsource = "data',
            "a law isn't",
            "elementwise",
        ),
        (
            '"derived"\nsource = "peak"',
            '"known"\nsource = "peak"',
            "'known' is not a status",
            "dot",
        ),
        (
            '"derived"\nsource = "peak"',
            '"derived"\nsource = " "',
            "a law has no source",
            "laws.dot",
        ),
        ("numbers.lanes", "numbers.elements", "can't be named 'elements'", "laws.elementwise"),
        ("rates.bfloat16", "rates.int8", "no rate for bfloat16", "tensor.laws.dot"),
        ("rates.bfloat16", "rates.bf16", "no type named 'bf16'", "engines.tensor.rates"),
        (
            'types = ["bfloat16"]\nissue',
            'types = ["fp16"]\nissue',
            "no type named 'fp16'",
            "tensor.types",
        ),
        (
            's = ["local"]\ntypes = ["bfloat16"]\n[',
            's = ["local"]\ntypes = []\n[',
            "takes no type",
            "dot.types",
        ),
        ("[engines.tensor.dot]", "[engines.tensor.dots]", "no 'dots' here", "engines.tensor.dots"),
        (
            "laws.dot]",
            "laws.copy]",
            "a law for dot or a table of dot, but not both",
            "engines.tensor",
        ),
        ("min(1, run / full)", "run / full", "the efficiency is 2", "dma.load.efficiency"),
        ("min(1, run / full)", "min(1, m / side)", "unknown name 'side'", "dma.load.efficiency"),
        ('queue = "dma_load"', 'queue = "vector"', "has another engine", "dma.load.queue"),
        ('queue = "dma_load"', 'queue = "dma_store"', "has another engine", "dma.load.queue"),
        ('queue = "tensor"', 'queue = "a b"', "'a b' is not a name", ""),
        ("[fabrics.noc]", '[fabrics."n c"]', "'n c' is not a name", "fabrics"),
        # Types.
        ('storage = ["float32"', 'storage = ["f32"', "no type named 'f32'", "storage"),
        ('float16 = "float32"', 'float16 = "double"', "no type named 'double'", "conversions"),
        (
            'bfloat16 = "float32"\nfloat16 = "float32"',
            'bfloat16 = "float16"\nfloat16 = "bfloat16"',
            "in a circle: bfloat16 -> float16 -> bfloat16",
            "conversions.bfloat16",
        ),
        ("exponent = { value = 6", "exponent = { value = 9", "of 19 bits can't", "formats.float16"),
        ("compute.bfloat16", "compute.bf16", "no type named 'bf16'", "peaks.compute"),
    ],
)
def test_broken_files(old: str, new: str, what: str, where: str) -> None:
    assert old in CHIP
    with pytest.raises(TargetError) as caught:
        parse_chip(CHIP.replace(old, new, 1), "toy.toml")
    assert what in caught.value.what
    assert caught.value.where.startswith("toy.toml")
    assert where in caught.value.where
    assert caught.value.fix or caught.value.rule


def test_tables_that_are_missing() -> None:
    for table in ("memories", "engines", "dma", "sync", "peaks"):
        lines, keep = [], True
        for line in CHIP.splitlines():
            if line.startswith("["):
                keep = not line.startswith((f"[{table}.", f"[{table}]"))
            lines += [line] if keep else []
        with pytest.raises(TargetError, match=f"'{table}' is missing"):
            parse_chip("\n".join(lines), "toy.toml")
        if table in ("memories", "engines", "dma"):
            with pytest.raises(TargetError, match=f"a chip has no {table}|no memory named"):
                parse_chip("\n".join([*lines, f"[{table}]"]), "toy.toml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="can't be read"):
        load_chip(tmp_path / "none.toml")
    with pytest.raises(TargetError, match="can't be read"):
        load_chip(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TargetError, match="can't be read"):
        load_chip(tmp_path / "binary.toml")


# --- overrides ------------------------------------------------------------------------------------


@pytest.fixture
def chip() -> Chip:
    return parse_chip(CHIP, "toy.toml")


def test_overrides_are_recorded(chip: Chip) -> None:
    changed = with_overrides(
        chip,
        {
            "memory.hbm.bandwidth": "2TB/s",
            "clock": " 1.2 GHz ",
            "cores": "4",
            "dma.load.latency": "1e3cycle",
        },
    )
    bandwidth = changed.memories["hbm"].bandwidth
    assert bandwidth is not None and bandwidth.base == 2e12
    assert bandwidth.status == changed.clock.status == "overridden"
    assert "1.6 TB/s (published: data sheet)" in bandwidth.source
    assert changed.cores.base == 4
    assert changed.seconds(changed.dma["load"].latency) == pytest.approx(1000 / 1.2e9)
    same = {path for path, q in changed.quantities() if q.status != "overridden"}
    assert len(same) == len(dict(chip.quantities())) - 4
    assert with_overrides(chip, {}) is chip
    assert with_overrides(changed, {"cores": "2"}).cores.base == 2


@pytest.mark.parametrize("path", [path for path, _ in parse_chip(CHIP, "toy.toml").quantities()])
def test_every_number_can_be_overridden(chip: Chip, path: str) -> None:
    old = dict(chip.quantities())[path]
    changed = with_overrides(
        chip, {path: f"{old.value:.17g} {'' if old.unit == '1' else old.unit}"}
    )
    assert dict(changed.quantities())[path].base == old.base


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("memories.hbm.bandwith", "2TB/s", "no number memories.hbm.bandwith"),
        ("", "2", "no number"),
        ("memories", "2", "no number memories"),
        ("memories.hbm.bandwidth", "2", "isn't a number with its unit"),
        ("memories.hbm.bandwidth", "fast", "isn't a number with its unit"),
        ("memories.hbm.bandwidth", "2TB", "'TB' doesn't fit"),
        ("memories.hbm.bandwidth", "2 parsecs", "isn't a number with its unit"),
        ("memories.hbm.bandwidth", "1.2.3TB/s", "isn't a number with its unit"),
        ("memories.hbm.bandwidth", "-2TB/s", "isn't a number with its unit"),
        ("memories.hbm.bandwidth", "0TB/s", "is not a number of a machine"),
        ("memories.hbm.bandwidth", "1e999TB/s", "is not a number of a machine"),
        ("cores", "2.5", "is not a whole number"),
        ("memories.local.size", "1kB", "nothing fits in 'local'"),
        ("dma.load.numbers.full", "1", None),
    ],
)
def test_overrides_that_are_refused(chip: Chip, path: str, value: str, what: str | None) -> None:
    if what is None:
        assert with_overrides(chip, {path: value}).dma["load"].numbers["full"].base == 1
        return
    with pytest.raises(TargetError, match=what) as caught:
        with_overrides(chip, {path: value})
    assert caught.value.where.startswith(f"--set {path}={value}")


# --- fuzz -----------------------------------------------------------------------------------------

_FILES = [Path(dure.targets.__file__).parent / n / "machine.toml" for n in ("h100", "trainium2")]
_TEXTS = [CHIP, *(file.read_text("utf-8") for file in _FILES)]
_DATA = [tomllib.loads(text) for text in _TEXTS]
_JUNK = st.one_of(
    st.sampled_from(
        ["0", "-1", "nan", "inf", "[]", "{}", '""', "true", "1e400", "9" * 5000, "[[["]
    ),
    st.text(max_size=12),
    st.from_regex(r'"[a-z_]{1,8}"', fullmatch=True),
)


def _loads_or_refuses(text: str) -> None:
    try:
        parse_chip(text, "fuzz.toml")
    except TargetError as error:
        assert error.what and error.where.startswith("fuzz.toml")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(_TEXTS), st.randoms(use_true_random=False), _JUNK)
def test_any_line_may_be_broken(text: str, chance: random.Random, junk: str) -> None:
    lines = text.splitlines()
    at = chance.randrange(len(lines))
    match chance.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[chance.randrange(len(lines))])
        case 2:
            cut = chance.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + junk + lines[at][cut:]
        case 3:
            lines[at] = lines[at].partition("=")[0] + "= " + junk
        case _:
            words = lines[at].split(" ")
            words[chance.randrange(len(words))] = junk
            lines[at] = " ".join(words)
    _loads_or_refuses("\n".join(lines))


def _tables(node: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every place in a nested table, as (container, key)."""
    places: list[Any] = list(node) if isinstance(node, dict) else []
    places = list(range(len(node))) if isinstance(node, list) else places
    for key in places:
        found.append((node, key))
        _tables(node[key], found)
    return found


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(_DATA) - 1), st.integers(0), _VALUES)
def test_any_value_may_be_anything(file: int, chosen: int, value: Any) -> None:
    data = copy.deepcopy(_DATA[file])
    places = _tables(data, [])
    node, key = places[chosen % len(places)]
    node[key] = value
    try:
        chip_loader._build(data, "fuzz.toml")
    except TargetError as error:
        assert error.what and error.where.startswith("fuzz.toml")


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_any_text_may_be_a_file(text: str) -> None:
    _loads_or_refuses(text)
    _loads_or_refuses("schema = 2\n" + text)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["cores", "memory.hbm.size", "dma.load.efficiency", "notes"]),
    st.text(max_size=12),
)
def test_any_text_may_be_an_override(path: str, value: str) -> None:
    toy = parse_chip(CHIP, "toy.toml")
    try:
        with_overrides(toy, {path: value})
    except TargetError as error:
        assert error.what and error.where.startswith("--set")


# --- laws -----------------------------------------------------------------------------------------

_NAMES = st.sampled_from(["m", "n", "k", "rate", "side"])
_FORMULAS = st.recursive(
    _NAMES | st.integers(0, 999).map(str) | st.floats(0, 9, width=16).map(repr),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//"]), inner).map(
            lambda parts: "({} {} {})".format(*parts)
        ),
        inner.map(lambda a: f"ceil({a})"),
        inner.map(lambda a: f"-{a}"),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(
            lambda parts: "{}({}, {})".format(*parts)
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(_FORMULAS)
def test_a_law_is_what_python_makes_of_it(text: str) -> None:
    import math

    values = {"m": 3.0, "n": 5.0, "k": 7.0, "rate": 2.0, "side": 128.0}
    law = Law(text, "cycle", "derived", "test")
    assert law.names <= values.keys()
    try:
        expected = eval(text, {"ceil": math.ceil, "min": min, "max": max}, dict(values))
    except (ZeroDivisionError, OverflowError, ValueError):
        with pytest.raises(TargetError, match="has no value"):
            law(values)
    else:
        found = law(values)
        assert found == expected or (math.isnan(found) and math.isnan(expected))


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=30)
    | st.lists(
        st.sampled_from(
            [*VARIABLES, "(", ")", "+", "*", "**", "if", "lambda:", "1", ",", "ceil", "."]
        ),
        max_size=12,
    ).map(" ".join)
)
def test_any_text_may_be_a_law(text: str) -> None:
    try:
        check_law(text, "law")
        Law(text, "cycle", "derived", "law")(dict.fromkeys(VARIABLES, 2.0))
    except TargetError as error:
        assert error.what


def test_laws_that_are_too_much() -> None:
    for text in ("1 +" * 400 + "1", "(" * 300 + "1" + ")" * 300, "-" * 499 + "1", "1" * 600):
        with pytest.raises(TargetError):
            check_law(text, "law")
            raise TargetError("it is a law after all")
    assert Law("+".join("1" * 200), "cycle", "derived", "law")({}) == 200
