from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure import settings
from dure.errors import UsageError


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in settings.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def test_defaults() -> None:
    assert settings.cpu_level() is None
    assert settings.threads() is None
    assert settings.dump_dir() is None
    assert settings.check() is False
    assert settings.cache_limit_bytes() == 10**9
    assert settings.spin_microseconds() == 1000


def test_values_are_read_at_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DURE_THREADS", "3")
    assert settings.threads() == 3
    monkeypatch.setenv("DURE_THREADS", " 4 ")
    assert settings.threads() == 4
    monkeypatch.setenv("DURE_CACHE_DIR", str(tmp_path))
    assert settings.cache_dir() == tmp_path
    monkeypatch.setenv("DURE_CPU_LEVEL", "AVX2")
    assert settings.cpu_level() == "avx2"
    monkeypatch.setenv("DURE_CHECK", "on")
    assert settings.check() is True


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DURE_THREADS", "two"),
        ("DURE_THREADS", "0"),
        ("DURE_THREADS", "-1"),
        ("DURE_THREADS", "99999999"),
        ("DURE_SPIN_US", "1.5"),
        ("DURE_CHECK", "maybe"),
        ("DURE_CACHE_LIMIT", "lots"),
        ("DURE_CACHE_LIMIT", "-5MB"),
        ("DURE_CACHE_LIMIT", "5iB"),
    ],
)
def test_nonsense_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    readers = {
        "DURE_THREADS": settings.threads,
        "DURE_SPIN_US": settings.spin_microseconds,
        "DURE_CHECK": settings.check,
        "DURE_CACHE_LIMIT": settings.cache_limit_bytes,
    }
    with pytest.raises(UsageError, match=f"{name}|{value}"):
        readers[name]()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("4096", 4096), ("512MB", 512 * 10**6), ("2GiB", 2 << 30), ("1.5k", 1500)],
)
def test_sizes(text: str, expected: int) -> None:
    assert settings.parse_bytes(text) == expected


@given(st.text(max_size=12))
def test_any_size_text_is_a_number_or_a_named_error(text: str) -> None:
    try:
        assert settings.parse_bytes(text) >= 0
    except UsageError as error:
        assert "bytes" in str(error)


def test_cache_folder_of_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings.cache_dir() == tmp_path / "dure"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert settings.cache_dir() == Path("~/.cache/dure").expanduser()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert settings.cache_dir() == Path("~/Library/Caches/dure").expanduser()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert settings.cache_dir() == tmp_path / "dure" / "Cache"
