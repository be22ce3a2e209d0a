"""Every environment variable that dure reads, typed, in one place.

A variable is read each time it is used and never remembered, so that a test or a notebook may
change it at any time.  A value that makes no sense raises :class:`~dure.errors.UsageError` and
names the variable.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from dure.errors import UsageError


@dataclass(frozen=True)
class Variable:
    """An environment variable: its name, what it does, and what holds when it is unset."""

    name: str
    meaning: str
    default: str


CPU_LEVEL = Variable(
    "DURE_CPU_LEVEL",
    "generate code for a lower level of the CPU's vector instructions than the host has "
    "(x86-64, avx2, avx2-vnni, avx512, avx512-vnni, amx; neon, neon-dotprod)",
    "the host's highest level",
)
CACHE_DIR = Variable("DURE_CACHE_DIR", "folder of the object cache", "the platform's cache folder")
CACHE_LIMIT = Variable(
    "DURE_CACHE_LIMIT", "most bytes the object cache may hold, as in 512MB; 0 turns it off", "1GB"
)
CHECK = Variable("DURE_CHECK", "1 runs the program after every pass and compares the values", "0")
DUMP = Variable("DURE_DUMP", "folder that receives the program after every pass", "no dump")
THREADS = Variable("DURE_THREADS", "workers of a step", "the physical cores this process may use")
SPIN = Variable(
    "DURE_SPIN_US",
    "microseconds that an idle worker waits for the next step before it sleeps",
    "1000",
)

VARIABLES = (CPU_LEVEL, CACHE_DIR, CACHE_LIMIT, CHECK, DUMP, THREADS, SPIN)

MOST_THREADS = 1024
"""More workers than this are a mistake, not a machine."""

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY_UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def cpu_level() -> str | None:
    """The level asked for with ``DURE_CPU_LEVEL``, in lower case, unchecked; None when unset."""
    text = _text(CPU_LEVEL)
    return text.lower() if text else None


def cache_dir() -> Path:
    """The folder of the object cache; it may not exist yet."""
    text = _text(CACHE_DIR)
    return Path(text).expanduser() if text else platform_cache_dir()


def cache_limit_bytes() -> int:
    """The most bytes that the object cache may hold; 0 means that there is no cache."""
    text = _text(CACHE_LIMIT)
    return parse_bytes(text, where=f"{CACHE_LIMIT.name}={text}") if text else 1000**3


def check() -> bool:
    """Whether every pass is checked by running the program before and after it."""
    return _flag(CHECK)


def dump_dir() -> Path | None:
    """The folder that receives the program after every pass, or None."""
    text = _text(DUMP)
    return Path(text).expanduser() if text else None


def threads() -> int | None:
    """The number of workers asked for with ``DURE_THREADS``, or None."""
    return _integer(THREADS, lowest=1, highest=MOST_THREADS)


def spin_microseconds() -> int:
    """How long an idle worker stays awake, in microseconds."""
    value = _integer(SPIN, lowest=0, highest=10_000_000)
    return 1000 if value is None else value


def platform_cache_dir() -> Path:
    """Where this platform keeps what can be computed again, with ``dure`` appended."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path("~/AppData/Local").expanduser()) / "dure" / "Cache"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/dure").expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says that a relative path is to be ignored.
    base = Path(xdg) if xdg and Path(xdg).is_absolute() else Path("~/.cache").expanduser()
    return base / "dure"


def parse_bytes(text: str, *, where: str = "") -> int:
    """``"512MB"``, ``"2GiB"`` or ``"4096"`` as a number of bytes; MB is 1000^2, MiB 1024^2."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise UsageError(
            f"'{text}' is not a number of bytes",
            where=where,
            rule="a size is a number and a unit: B, KB, MB, GB, TB, KiB, MiB, GiB or TiB",
            fix="write it as in 512MB or 2GiB",
        )
    unit = match[2].upper()
    return int(float(match[1]) * (_BINARY_UNITS[unit] if match[3] else _UNITS[unit]))


def _text(variable: Variable) -> str:
    return os.environ.get(variable.name, "").strip()


def _flag(variable: Variable) -> bool:
    text = _text(variable).lower()
    if text in ("", "0", "no", "off", "false"):
        return False
    if text in ("1", "yes", "on", "true"):
        return True
    raise UsageError(
        f"{variable.name}={text} is neither on nor off",
        rule=f"{variable.name}: {variable.meaning}",
        fix=f"set {variable.name}=1 or {variable.name}=0",
    )


def _integer(variable: Variable, *, lowest: int, highest: int) -> int | None:
    text = _text(variable)
    if not text:
        return None
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if lowest <= value <= highest:
        return value
    raise UsageError(
        f"{variable.name}={text} is not a whole number from {lowest} to {highest}",
        rule=f"{variable.name}: {variable.meaning}",
        fix=f"unset {variable.name}, or give a number in that range",
    )
