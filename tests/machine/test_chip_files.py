"""The chips of the package: every number has a source, and the laws give what vendors publish."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dure.errors import TargetError
from dure.ir.dtypes import DTYPES
from dure.machine.chip import Chip, Engine
from dure.targets import chip, chip_names, host_names, target_names

NAMES = ("atom", "atom-max", "h100", "maia-100", "mtia-v2", "rngd", "tpu-v6e", "trainium2")
#: Peaks that the laws can't give, each for a reason that its file states in the notes.
ELSEWHERE = {
    ("h100", "float32"): 0.923,
    ("trainium2", "bfloat16"): 0.936,
    ("trainium2", "float16"): 0.936,
    ("trainium2", "float32"): 0.863,
}


@pytest.fixture(params=NAMES)
def packaged(request: pytest.FixtureRequest) -> Chip:
    return chip(request.param)


def test_nine_targets() -> None:
    assert set(NAMES) <= set(chip_names())
    assert host_names() == ("cpu",)
    assert set(target_names()) == {*chip_names(), "cpu"}


def test_every_number_has_a_source_and_guesses_a_range(packaged: Chip) -> None:
    found = dict(packaged.quantities())
    assert len(found) > 40
    for path, quantity in found.items():
        assert quantity.source.strip(), path
        assert quantity.status in ("published", "derived", "guessed"), path
        if quantity.status == "guessed":
            assert quantity.low is not None and quantity.high is not None, path
            assert quantity.value is not None, path
            assert quantity.low <= quantity.value <= quantity.high, path
            assert quantity.low < quantity.high, path
    for path, law in packaged.laws():
        assert law.source.strip() and law.status in ("published", "derived", "guessed"), path


def test_no_number_stands_outside_a_quantity(packaged: Chip) -> None:
    """What pydantic holds as bare numbers are the schema's version and the paddings alone."""
    for memory in packaged.memories.values():
        assert bool(memory.padding) == bool(memory.padding_source)
    bare = [
        value
        for table in (packaged.engines, packaged.dma, packaged.fabrics, packaged.links)
        for entry in table.values()
        for value in dict(entry).values()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    assert not bare


def _engine_for(found: Chip, dtype: str) -> Engine:
    engines = [e for e in found.engines.values() if e.dot is not None and dtype in e.dot.types]
    assert engines, f"no engine multiplies {dtype}, whose peak is published"
    return engines[0]


def _implied_peak(found: Chip, dtype: str) -> float:
    """Operations a second of a large dot, by the law alone."""
    engine = _engine_for(found, dtype)
    values = {name: number.base for name, number in engine.numbers.items()}
    if dtype in engine.rates:
        values["rate"] = engine.rates[dtype].base
    extents = {"m": 4096, "n": 4096, "k": 8192, "batch": 1}
    cycles = engine.laws["dot"]({**values, **extents})
    seconds = cycles / (engine.clock or found.clock).base
    return 2 * 4096 * 4096 * 8192 / seconds * found.cores.base


def test_dot_laws_give_the_published_peaks(packaged: Chip) -> None:
    for dtype, peak in packaged.peaks.compute.items():
        fraction = _implied_peak(packaged, dtype) / peak.base
        expected = ELSEWHERE.get((packaged.name, dtype))
        if expected is None:
            assert fraction == pytest.approx(1, abs=0.04), (dtype, fraction)
        else:
            assert fraction == pytest.approx(expected, abs=0.002), dtype
            assert any("peak" in note.lower() for note in packaged.notes)


def test_every_dot_type_has_a_peak_and_every_peak_a_dot(packaged: Chip) -> None:
    types = {t for e in packaged.engines.values() if e.dot is not None for t in e.dot.types}
    assert types == set(packaged.peaks.compute)


def test_kernels_find_the_operations_that_they_need(packaged: Chip) -> None:
    has = {o for engine in packaged.engines.values() for o in engine.laws}
    assert {
        *("dot", "elementwise", "transcendental", "reduce", "transpose", "convert", "copy")
    } <= has
    vector = {t for e in packaged.engines.values() if "elementwise" in e.laws for t in e.types}
    assert {"float32", "int32", "bool"} <= vector
    assert {"bfloat16", "int32", "int8", "uint8", "uint4"} <= set(packaged.storage)


def test_every_type_can_be_stored_or_converted(packaged: Chip) -> None:
    vector = {t for e in packaged.engines.values() if "elementwise" in e.laws for t in e.types}
    for name in DTYPES:
        if name in ("float64", "int64"):
            continue
        seen = [name]
        while seen[-1] not in packaged.storage and seen[-1] in packaged.conversions:
            seen.append(packaged.conversions[seen[-1]])
        assert seen[-1] in packaged.storage, seen
        while seen[-1] not in vector:
            seen.append(packaged.conversions[seen[-1]])
        assert len(seen) < 6


def test_memory_bandwidth_is_at_most_what_is_published(packaged: Chip) -> None:
    home = packaged.memories[packaged.home]
    assert home.bandwidth is not None
    fraction = home.bandwidth.base / packaged.peaks.bandwidth.base
    assert 0.75 <= fraction <= 1
    if packaged.ceiling.bandwidth is not None:
        assert fraction == pytest.approx(packaged.ceiling.bandwidth.base, abs=0.005)


def test_all_cores_together_can_use_the_home_memory(packaged: Chip) -> None:
    home = packaged.memories[packaged.home].bandwidth
    assert home is not None
    for name in ("load", "store"):
        engine = packaged.dma[name]
        rates = [packaged.bytes_a_second(engine.bandwidth)]
        rates += [
            packaged.bytes_a_second(packaged.fabrics[part].bandwidth)
            for part in engine.route
            if part in packaged.fabrics and packaged.fabrics[part].scope == "core"
        ]
        assert min(rates) * packaged.cores.base >= home.base


def test_measured_ceilings() -> None:
    for name, fraction in (("tpu-v6e", 0.894), ("atom-max", 0.83)):
        ceiling = chip(name).ceiling.bandwidth
        assert ceiling is not None and ceiling.base == fraction


def test_efficiency_of_trainium_dma_follows_the_published_table() -> None:
    dma = chip("trainium2").dma["load"]
    assert dma.efficiency is not None
    numbers = {name: number.base for name, number in dma.numbers.items()}
    for run, published in ((256, 0.10), (512, 0.21), (1024, 0.42), (2048, 0.81), (4096, 0.97)):
        assert dma.efficiency({**numbers, "run": run}) == pytest.approx(published, abs=0.03)


def test_atom_max_is_four_atoms() -> None:
    one, four = chip("atom"), chip("atom-max")
    assert four.cores.base == 4 * one.cores.base
    assert four.peaks.bandwidth.base == 4 * one.peaks.bandwidth.base
    for dtype, peak in one.peaks.compute.items():
        assert four.peaks.compute[dtype].base == 4 * peak.base
    assert four.memories["sram"] == one.memories["sram"]
    readers = four.memories["dram"].readers
    assert readers is not None and readers.base == one.cores.base


def test_a_chip_by_name_path_and_text(tmp_path: Path) -> None:
    import dure.targets

    packaged = Path(dure.targets.__file__).parent / "rngd" / "machine.toml"
    mine = tmp_path / "mine.toml"
    mine.write_text(packaged.read_text("utf-8").replace('name = "rngd"', 'name = "mine"'), "utf-8")
    assert chip(str(mine)).name == chip(mine).name == "mine"
    with pytest.raises(TargetError, match="can't be read"):
        chip("nowhere/chip.toml")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tpu-v6", ("no target named 'tpu-v6'", "did you mean tpu-v6e?", "atom-max")),
        ("zzzzzzzz", ("no target named 'zzzzzzzz'", "PATH/NAME.toml")),
        ("", ("no target named ''",)),
        ("../rngd", ("no target named '../rngd'",)),
        ("cpu", ("the machine that dure runs on", "rngd")),
    ],
)
def test_unknown_names(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(TargetError) as caught:
        chip(name)
    for word in words:
        assert word in str(caught.value)


class _Point:
    """An entry point of another package."""

    value = "other.package:MACHINE"

    def __init__(self, name: str, loaded: object) -> None:
        self.name, self.loaded = name, loaded

    def load(self) -> object:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def test_entry_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import dure.targets

    text = (Path(dure.targets.__file__).parent / "atom" / "machine.toml").read_text("utf-8")
    text = text.replace('name = "atom"', 'name = "theirs"')
    file = tmp_path / "machine.toml"
    file.write_text(text, "utf-8")
    points = [
        *(_Point("as-path", file), _Point("as-str", str(file)), _Point("as-text", text)),
        *(_Point("broken", ImportError("no module")), _Point("number", 7)),
        _Point("gone", tmp_path / "gone.toml"),
    ]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    for name in ("as-path", "as-str", "as-text"):
        assert name in chip_names()
        assert chip(name, {"memories.dram.bandwidth": "1TB/s"}).name == "theirs"
    for name, message in (("broken", "no module"), ("number", "is int"), ("gone", "No such file")):
        with pytest.raises(TargetError, match=message) as caught:
            chip(name)
        assert f"entry point {name} = other.package:MACHINE" in str(caught.value)


def test_pydantic_is_imported_with_the_first_chip_only() -> None:
    script = (
        "import sys, dure, dure.targets, dure.machine; assert 'pydantic' not in sys.modules;"
        "dure.targets.chip('rngd'); assert 'pydantic' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
