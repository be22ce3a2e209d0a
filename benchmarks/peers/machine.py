"""The machine that a benchmark ran on, as far as its numbers depend on it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_vbmi",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)
"""The instruction sets that decide how fast a CPU multiplies matrices."""


def describe() -> dict[str, Any]:
    """Model, cores, caches (bytes), instruction sets, memory (bytes) and kernel of this host."""
    processor = _processor()
    flags = set(processor.get("flags", processor.get("Features", "")).split())
    return {
        "cpu": _name(processor),
        "vendor": processor.get("vendor_id", ""),
        "family": _number(processor.get("cpu family")),
        "model": _number(processor.get("model")),
        "cores": _cores(),
        "caches": _caches(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_bytes": _memory(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def kind(machine: dict[str, Any]) -> str:
    """A short name of the host's kind for a file: vendor, family, model, vector extension."""
    flags = machine["flags"]
    best = "amx" if "amx_int8" in flags else "vnni" if "avx512_vnni" in flags else "avx2"
    if not any(flag.startswith(("avx", "amx")) for flag in flags):
        best = platform.machine()
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(machine["vendor"], "cpu")
    return f"{vendor}-{machine['family']:x}-{machine['model']:x}-{best}-{machine['cores']}c"


def _processor() -> dict[str, str]:
    """The first processor's entry in ``/proc/cpuinfo``."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {"model name": platform.processor()}
    pairs = [line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in pairs}


def _name(processor: dict[str, str]) -> str:
    """The model's name; virtual machines often hide it, so the microarchitecture is added."""
    name = processor.get("model name", platform.processor() or platform.machine())
    known = {("25", "17"): "Zen 4", ("26", "2"): "Zen 5", ("6", "143"): "Sapphire Rapids"}
    known |= {("6", "207"): "Emerald Rapids", ("6", "173"): "Granite Rapids"}
    architecture = known.get((processor.get("cpu family", ""), processor.get("model", "")))
    return f"{name} ({architecture})" if architecture else name


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _caches() -> dict[str, int]:
    """Bytes of each cache that the first core sees."""
    found: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level = (index / "level").read_text().strip()
        letter = {"Data": "d", "Instruction": "i"}.get((index / "type").read_text().strip(), "")
        size = (index / "size").read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
        found[f"L{level}{letter}"] = int(size.rstrip("KM")) * unit
    return found


def _memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
