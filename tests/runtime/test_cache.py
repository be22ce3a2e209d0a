from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dure.runtime import cache, llvm
from dure.runtime.cache import ObjectCache
from dure.runtime.host import host_features, host_levels

IR = "define i32 @f() { ret i32 42 }"
KEY = "ab" + "0" * 62


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DURE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DURE_CACHE_LIMIT", raising=False)
    return tmp_path / "cache"


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.dureobj"))


def test_the_second_compilation_is_a_look_up(folder: Path) -> None:
    times = llvm.CompileTimes()
    first = cache.compile_cached(IR, host_features(), times=times)
    second = cache.compile_cached(IR, host_features(), times=times)
    assert first == second
    assert times.modules == 1
    found = cache.object_cache()
    assert found is not None
    statistics = found.statistics()
    assert (statistics.hits, statistics.misses, statistics.entries) == (1, 1, 1)
    assert statistics.total_bytes == entries(folder)[0].stat().st_size
    assert llvm.load_object(second).address("f")


def test_the_key_depends_on_everything_that_decides_the_code() -> None:
    features = host_features()
    keys = {
        cache.object_key(IR, features),
        cache.object_key(IR + "\n", features),
        cache.object_key(IR, dataclasses.replace(features, features=("sse2",))),
        cache.object_key(IR, dataclasses.replace(features, triple="x")),
        cache.object_key(IR, features, llvm.OptLevel.O3),
        cache.object_key(IR, features, llvm.CompileOptions(vectorize=True)),
        cache.object_key(IR, features, llvm.CompileOptions(codegen=llvm.OptLevel.O0)),
    }
    assert len(keys) == 7
    assert cache.object_key(IR, dataclasses.replace(features, l2_bytes=1)) in keys


@pytest.mark.parametrize("damage", ["empty", "cut", "flip", "magic", "longer", "text"])
def test_a_damaged_entry_is_built_again(folder: Path, damage: str) -> None:
    good = cache.compile_cached(IR, host_features())
    path = entries(folder)[0]
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-7] ^= 1
    path.write_bytes(
        {
            "empty": b"",
            "cut": data[:-1],
            "flip": bytes(flipped),
            "magic": b"X" + data[1:],
            "longer": data + b"\0",
            "text": b"not an entry",
        }[damage]
    )
    assert cache.compile_cached(IR, host_features()) == good
    assert path.read_bytes() == data


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_damage_is_ever_taken_for_code(tmp_path: Path, data: st.DataObject) -> None:
    store = ObjectCache(tmp_path, 10**6)
    store.put(KEY, b"object code" * 10)
    path = entries(tmp_path)[0]
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255))
    damaged = whole[:place] + bytes([byte]) + whole[place + 1 :]
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))] + data.draw(st.binary(max_size=3))
    path.write_bytes(damaged)
    assert store.get(KEY) in ((b"object code" * 10,) if damaged == whole else (None,))


def test_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    store = ObjectCache(tmp_path, 10_000)
    keys = [f"{i:02x}" + "0" * 62 for i in range(9)]
    for age, key in enumerate(keys):
        store.put(key, bytes(1000))
        os.utime(store._path(key), (1000 + age, 1000 + age))
    assert store.get(keys[0]) == bytes(1000)
    store.put("ff" + "0" * 62, bytes(1000))
    assert store.statistics().total_bytes <= 10_000
    assert store.get(keys[1]) is None
    assert store.get(keys[0]) == bytes(1000)
    assert store.get("ff" + "0" * 62) == bytes(1000)


def test_the_limit_holds_over_many_writes(tmp_path: Path) -> None:
    store = ObjectCache(tmp_path, 20_000)
    for i in range(100):
        store.put(f"{i:064x}", bytes(700))
        assert sum(path.stat().st_size for path in entries(tmp_path)) <= 20_000
    assert len(entries(tmp_path)) > 15


def test_an_object_above_the_limit_is_not_kept(tmp_path: Path) -> None:
    store = ObjectCache(tmp_path, 100)
    store.put(KEY, bytes(1000))
    assert store.get(KEY) is None


def test_a_limit_of_zero_means_no_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURE_CACHE_LIMIT", "0")
    assert cache.object_cache() is None
    assert cache.compile_cached(IR, host_features())
    assert not folder.exists()


def test_clear_removes_entries_and_leftovers(tmp_path: Path) -> None:
    store = ObjectCache(tmp_path, 10**6)
    store.put(KEY, bytes(100))
    leftover = tmp_path / "ab" / ".killed.tmp"
    leftover.write_bytes(bytes(50))
    foreign = tmp_path / "ab" / "notes.txt"
    foreign.write_text("mine")
    assert store.clear() >= 150
    assert store.get(KEY) is None
    assert not leftover.exists()
    assert foreign.exists()


def test_a_folder_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("DURE_CACHE_DIR", str(blocked / "cache"))
    for _ in range(3):
        assert cache.compile_cached(IR, host_features())
    assert capsys.readouterr().err.count("DURE_CACHE_DIR") == 1


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ObjectCache(tmp_path, 10**6)

    def full(self: Path, target: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    store.put(KEY, b"code")
    store.put(KEY, b"code")
    assert "No space left" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_read_only_folder_still_gives_what_it_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on an image's read-only file system: neither young again, nor removed, nor written."""
    good = cache.compile_cached(IR, host_features())
    (path,) = entries(folder)
    kept = path.read_bytes()

    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for module, name in ((os, "utime"), (Path, "unlink"), (cache.tempfile, "mkstemp")):
        monkeypatch.setattr(module, name, refused)
    times = llvm.CompileTimes()
    assert cache.compile_cached(IR, host_features(), times=times) == good
    assert times.modules == 0
    path.write_bytes(b"damaged")
    assert cache.compile_cached(IR, host_features(), times=times) == good
    assert cache.compile_cached(IR + " ", host_features(), times=times)
    assert times.modules == 2
    assert capsys.readouterr().err.count("Read-only file system") == 1
    path.write_bytes(kept)
    assert cache.compile_cached(IR, host_features(), times=times) == good and times.modules == 2


def test_a_disk_that_is_full_while_an_entry_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(data[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", lambda handle, mode: Full(handle, mode))
    for _ in range(2):
        assert cache.compile_cached(IR, host_features())
    assert capsys.readouterr().err.count("No space left") == 1
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_hosts_of_several_levels_share_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code of another host is never loaded, whichever host wrote it."""
    times = llvm.CompileTimes()
    levels = host_levels()
    for turn in range(2):
        for number, level in enumerate(levels):
            monkeypatch.setenv("DURE_CPU_LEVEL", level)
            assert cache.compile_cached(IR, host_features(), times=times)
            assert times.modules == (number + 1 if turn == 0 else len(levels))
    assert len(entries(folder)) == len(levels)
    # One feature less is another host, though it has the same level.
    lacking = dataclasses.replace(host_features(), features=host_features().features[:-1])
    store = cache.object_cache()
    assert store is not None
    assert store.get(cache.object_key(IR, lacking)) is None


def test_threads_share_a_cache(tmp_path: Path) -> None:
    store = ObjectCache(tmp_path, 50_000)

    def work(seed: int) -> None:
        for i in range(40):
            key = f"{(seed + i) % 60:064x}"
            found = store.get(key)
            assert found is None or found == key.encode() * 20
            store.put(key, key.encode() * 20)

    threads = [threading.Thread(target=work, args=(i * 7,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.statistics().damaged == 0


def test_an_entry_that_is_cleared_while_it_is_written_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, other = ObjectCache(tmp_path, 60_000), ObjectCache(tmp_path, 60_000)
    replace = Path.replace

    def cleared_first(self: Path, target: Path) -> Path:
        other.clear()
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cleared_first)
        store.put("a" * 64, b"code")
    assert store.get("a" * 64) is None
    store.put("a" * 64, b"code")
    assert store.get("a" * 64) == b"code"
    assert capsys.readouterr().err == ""


def test_processes_share_a_cache(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dure.runtime.cache import ObjectCache\n"
        "store = ObjectCache(Path(sys.argv[1]), 60_000)\n"
        "for i in range(300):\n"
        "    key = f'{i % 70:064x}'\n"
        "    found = store.get(key)\n"
        "    assert found is None or found == key.encode() * 20\n"
        "    store.put(key, key.encode() * 20)\n"
        "print(store.statistics().damaged)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    for child in children:
        out, err = child.communicate(timeout=60)
        assert (child.returncode, out.strip(), err) == (0, b"0", b"")
    assert not list(tmp_path.rglob("*.tmp"))
