"""What the machine that we run on can do, found out at run time.

Code is generated for a *level*: a set of instruction features that belong together.  A level is
derived from the features that the processor and the operating system report, never from the
processor's name: names are wrong on new and on virtual machines.  ``DURE_CPU_LEVEL`` forces a
lower level.

Nothing here needs Linux.  Where caches, affinity or huge pages cannot be read, the fallbacks are
small sizes that are safe on every machine made in the last ten years.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dure import settings
from dure.errors import TargetError
from dure.runtime.tile_registers import tiles_work

_BASELINE = frozenset({"64bit", "cmov", "cx8", "fxsr", "mmx", "sse", "sse2"})
_AVX2 = _BASELINE | {
    *("cx16", "sahf", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2", "crc32", "xsave"),
    *("avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe", "prfchw"),
}
_AVX2_VNNI = _AVX2 | {"avxvnni", "avxvnniint8", "avxvnniint16"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
_AVX512_VNNI = (
    _AVX512
    | _AVX2_VNNI
    | {"avx512vnni", "avx512bf16", "avx512fp16", "avx512vbmi", "avx512vbmi2", "avx512ifma"}
    | {"avx512bitalg", "avx512vpopcntdq", "gfni"}
)
#: Tile registers, which the system has to grant: see :mod:`dure.runtime.tile_registers`.
_TILES = frozenset({"amx-tile", "amx-int8", "amx-bf16"})
_VNNI_REQUIRED = frozenset(
    {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "fma", "f16c"}
)
_AMX_REQUIRED = _VNNI_REQUIRED | {"amx-tile", "amx-int8"}


@dataclass(frozen=True)
class Level:
    """A set of instruction features that code may rely on.

    ``required`` must all be present, ``allowed`` are used where present, ``tuning`` are LLVM's
    tuning flags.  ``vector_bits`` is the width of the registers that code should be written for.
    """

    name: str
    architecture: str
    required: frozenset[str]
    allowed: frozenset[str]
    vector_bits: int
    vector_registers: int
    tuning: tuple[str, ...] = ()


_NEON = frozenset({"neon", "fp-armv8"})

_FAST_SHUFFLES = ("fast-variable-crosslane-shuffle", "fast-variable-perlane-shuffle")
#: Sums of products stay one instruction, which LLVM would take apart for its latency.
_FAST_SUMS = (*_FAST_SHUFFLES, "fast-dpwssd")

LEVELS = (
    Level("x86-64", "x86-64", frozenset({"sse2"}), _BASELINE, 128, 16),
    Level("avx2", "x86-64", frozenset({"avx2", "fma", "f16c"}), _AVX2, 256, 16, _FAST_SHUFFLES),
    Level(
        *("avx2-vnni", "x86-64", frozenset({"avx2", "fma", "f16c", "avxvnni"})),
        *(_AVX2_VNNI, 256, 16, _FAST_SUMS),
    ),
    Level(
        *(
            "avx512",
            "x86-64",
            frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"}),
        ),
        *(_AVX512, 512, 32, _FAST_SHUFFLES),
    ),
    Level(
        *("avx512-vnni", "x86-64", _VNNI_REQUIRED),
        *(_AVX512_VNNI, 512, 32, _FAST_SUMS),
    ),
    Level("amx", "x86-64", _AMX_REQUIRED, _AVX512_VNNI | _TILES, 512, 32, _FAST_SUMS),
    Level("neon", "aarch64", _NEON, _NEON | {"lse"}, 128, 32),
    Level("neon-dotprod", "aarch64", _NEON | {"dotprod"}, _NEON | {"lse", "dotprod"}, 128, 32),
)
"""From the lowest to the highest, within an architecture."""


@dataclass(frozen=True)
class HostFeatures:
    """What generated code may rely on; frozen and hashable, so that a cache's key can hold it.

    Sizes are in bytes.  ``features`` are LLVM's names of what is enabled at ``level``, sorted.
    """

    architecture: str
    level: str
    features: tuple[str, ...]
    tuning: tuple[str, ...]
    vector_bits: int
    vector_registers: int
    triple: str
    l1d_bytes: int = 32 * 1024
    l2_bytes: int = 256 * 1024
    l3_bytes: int = 4 * 1024 * 1024
    line_bytes: int = 64
    page_bytes: int = 4096
    huge_page_bytes: int = 0
    operating_system: str = sys.platform

    def has(self, feature: str) -> bool:
        """Whether LLVM's ``feature`` is enabled at this level."""
        return feature in self.features

    @property
    def feature_string(self) -> str:
        """What LLVM's target machine is given: every feature and tuning flag by name."""
        return ",".join(f"+{name}" for name in (*self.features, *self.tuning))

    @property
    def function_attributes(self) -> str:
        """Text for an LLVM ``attributes`` group that makes vectors of ``vector_bits`` legal.

        LLVM splits 512-bit vectors in two where a function does not say that it wants them whole.
        """
        width = self.vector_bits
        return f'"prefer-vector-width"="{width}" "min-legal-vector-width"="{width}"'


@dataclass(frozen=True)
class Cores:
    """The logical processors this process may run on.

    ``allowed`` are the operating system's numbers of them, empty where it tells none (macOS,
    Windows). ``physical`` has the first hardware thread of every physical core first, then the
    siblings. ``workers`` is how many workers pay off: physical cores, less where a container's
    quota is smaller.
    """

    allowed: tuple[int, ...]
    physical: tuple[int, ...]
    workers: int


def host_features() -> HostFeatures:
    """The host's features at the level that ``DURE_CPU_LEVEL`` asks for, else at its highest.

    Raises :class:`~dure.errors.TargetError` when the word is unknown or the host lacks the level.
    """
    return _features_at(settings.cpu_level())


def host_levels() -> tuple[str, ...]:
    """The names of the levels that this host has, lowest first."""
    present = _detected_features()
    architecture = architecture_name()
    return tuple(
        level.name
        for level in LEVELS
        if level.architecture == architecture and level.required <= present
    )


def features_of(name: str) -> HostFeatures:
    """A machine that has all that a level allows, with small caches: for code that runs elsewhere,
    or has to be the same wherever it is generated.
    """
    level = next(one for one in LEVELS if one.name == name)
    machine = level.architecture.replace("-", "_")
    return HostFeatures(
        architecture=level.architecture,
        level=level.name,
        features=tuple(sorted(level.allowed)),
        tuning=level.tuning,
        vector_bits=level.vector_bits,
        vector_registers=level.vector_registers,
        triple=f"{machine}-unknown-linux-gnu",
        operating_system="linux",
    )


def architecture_name() -> str:
    """``"x86-64"`` or ``"aarch64"``.  Another architecture raises :class:`TargetError`."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64", "x86-64"):
        return "x86-64"
    if machine in ("aarch64", "arm64"):
        return "aarch64"
    raise TargetError(
        f"dure generates no native code for the architecture '{machine}'",
        rule="the cpu target needs x86-64 or AArch64",
        fix="run on a 64-bit x86 or Arm machine, with a 64-bit Python",
    )


def cores() -> Cores:
    """The processors that this process may use at this moment."""
    if hasattr(os, "sched_getaffinity"):
        allowed = tuple(sorted(os.sched_getaffinity(0)))
    else:
        allowed = ()
    count = len(allowed) or os.cpu_count() or 1
    first = [core for core in allowed if _first_sibling(core, allowed) == core]
    siblings = [core for core in allowed if core not in set(first)]
    workers = min(len(first) or count, _quota_cores() or count)
    return Cores(allowed, (*first, *siblings), max(1, workers))


def default_workers() -> int:
    """How many workers a step has: ``DURE_THREADS``, else :attr:`Cores.workers`."""
    return settings.threads() or cores().workers


@functools.cache
def _detected_features() -> frozenset[str]:
    from dure.runtime import llvm

    found = {name for name, present in llvm.detected_features().items() if present}
    if architecture_name() == "aarch64":
        return frozenset(found | _NEON | _arm_features())
    if found & _TILES and not tiles_work():
        found -= _TILES
    return frozenset(found | _BASELINE)


def _arm_features() -> set[str]:
    """LLVM's names of what an Arm system says of its processors; LLVM itself asks few systems."""
    if sys.platform == "darwin":
        return {"lse", "dotprod"}  # every 64-bit Arm processor that macOS runs on has them
    given = _hardware_capabilities()
    return {name for name, bit in _CAPABILITY_BITS.items() if given >> bit & 1}


#: LLVM's names of Arm's features, and Linux's bits for what all of a system's processors have.
_CAPABILITY_BITS = {"lse": 8, "dotprod": 20}


def _hardware_capabilities() -> int:
    """Linux's word of capabilities (``AT_HWCAP``), which it hands every process; else 0."""
    import ctypes

    if sys.platform != "linux":
        return 0
    ask = ctypes.CDLL(None).getauxval
    ask.restype, ask.argtypes = ctypes.c_ulong, (ctypes.c_ulong,)
    return int(ask(16))


@functools.cache
def _features_at(wanted: str | None) -> HostFeatures:
    from dure.runtime import llvm

    names = host_levels()
    if wanted is not None and wanted not in names:
        _raise_unavailable(wanted, names)
    name = wanted or names[-1]
    architecture = architecture_name()
    level = next(one for one in LEVELS if one.name == name and one.architecture == architecture)
    caches = _cache_sizes()
    return HostFeatures(
        architecture=architecture,
        level=name,
        features=tuple(sorted(_detected_features() & level.allowed)),
        tuning=level.tuning,
        vector_bits=level.vector_bits,
        vector_registers=level.vector_registers,
        triple=llvm.process_triple(),
        l1d_bytes=caches.get(1, 32 * 1024),
        l2_bytes=caches.get(2, 256 * 1024),
        l3_bytes=caches.get(3, 4 * 1024 * 1024),
        line_bytes=caches.get(0, 64),
        page_bytes=mmap.PAGESIZE,
        huge_page_bytes=huge_page_bytes(),
        operating_system=sys.platform,
    )


def _raise_unavailable(wanted: str, names: tuple[str, ...]) -> None:
    known = wanted in {level.name for level in LEVELS}
    raise TargetError(
        f"this CPU lacks the level '{wanted}'" if known else f"'{wanted}' is not a level of a CPU",
        where=f"{settings.CPU_LEVEL.name}={wanted}",
        rule="only a level that the host has can be forced: " + ", ".join(names),
        fix=f"unset {settings.CPU_LEVEL.name}, or set it to {names[-1]}",
    )


@functools.cache
def huge_page_bytes() -> int:
    """The size of a transparent huge page, in bytes; 0 where the system gives none."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    enabled = _read(folder / "enabled")
    if not enabled or "[never]" in enabled:
        return 0
    size = _read(folder / "hpage_pmd_size")
    return int(size) if size.isdigit() else 2 * 1024 * 1024


def _cache_sizes() -> dict[int, int]:
    """Cache level -> bytes, of data or unified caches of one core; key 0 is the line's size."""
    return _sysfs_caches() or _sysctl_caches() or _sysconf_caches()


def _sysfs_caches() -> dict[int, int]:
    sizes: dict[int, int] = {}
    for core in cores().allowed[:1]:
        for index in sorted(Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*")):
            level, size = _read(index / "level"), _read(index / "size")
            if _read(index / "type") == "Instruction" or not level.isdigit():
                continue
            if size.endswith("K") and size[:-1].isdigit():
                sizes[int(level)] = int(size[:-1]) * 1024
            line = _read(index / "coherency_line_size")
            if line.isdigit() and int(line) > 0:
                sizes[0] = int(line)
    return sizes


def _sysconf_caches() -> dict[int, int]:
    if not hasattr(os, "sysconf"):
        return {}
    names = {
        0: "SC_LEVEL1_DCACHE_LINESIZE",
        1: "SC_LEVEL1_DCACHE_SIZE",
        2: "SC_LEVEL2_CACHE_SIZE",
        3: "SC_LEVEL3_CACHE_SIZE",
    }
    sizes: dict[int, int] = {}
    for level, name in names.items():
        if name in os.sysconf_names:
            try:
                value = os.sysconf(name)
            except OSError:
                continue
            if value > 0:
                sizes[level] = value
    return sizes


def _sysctl_caches() -> dict[int, int]:
    """macOS: the performance cores' caches, by ``sysctlbyname``."""
    if sys.platform != "darwin":
        return {}
    import ctypes

    libc = ctypes.CDLL(None)
    names = {
        0: ("hw.cachelinesize",),
        1: ("hw.perflevel0.l1dcachesize", "hw.l1dcachesize"),
        2: ("hw.perflevel0.l2cachesize", "hw.l2cachesize"),
        3: ("hw.l3cachesize",),
    }
    sizes: dict[int, int] = {}
    for level, candidates in names.items():
        for name in candidates:
            value, length = ctypes.c_uint64(0), ctypes.c_size_t(8)
            failed = libc.sysctlbyname(
                name.encode(), ctypes.byref(value), ctypes.byref(length), None, ctypes.c_size_t(0)
            )
            if not failed and value.value > 0:
                sizes[level] = int(value.value)
                break
    return sizes


def _first_sibling(core: int, allowed: tuple[int, ...]) -> int:
    """The lowest allowed hardware thread of the physical core that ``core`` belongs to."""
    text = _read(Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"))
    siblings = set(_number_list(text)) & set(allowed)
    return min(siblings, default=core)


def _number_list(text: str) -> Iterable[int]:
    """The numbers of a kernel list such as ``"0-3,8"``; nothing where the text is not one."""
    for part in text.split(","):
        low, _, high = part.partition("-")
        if low.isdigit() and (not high or high.isdigit()):
            yield from range(int(low), int(high or low) + 1)


def control_groups(controller: str) -> list[Path]:
    """Folders of the control groups that may limit this process, its own before those around it.

    Both of the unified hierarchy and of the older one, which has a tree for each ``controller``.  A
    container sees its own group as the root; a service of the system is in one below it.
    """
    root = Path("/sys/fs/cgroup")
    found: dict[Path, None] = {}
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        names, _, place = line.partition(":")[2].partition(":")
        if ".." in place or (names and controller not in names.split(",")):
            continue
        base = root / controller if names else root
        folder = base / place.strip("/")
        found.update(dict.fromkeys(f for f in (folder, *folder.parents) if f.is_relative_to(base)))
    return [*found, *(f for f in (root, root / controller) if f not in found)]


def _quota_cores() -> int:
    """How many processors' time control groups grant, rounded up; 0 where nothing limits it."""
    granted: list[int] = []
    for folder in control_groups("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota = _read(folder / "cpu.cfs_quota_us")
            period = _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0 and int(quota) > 0:
            granted.append(math.ceil(int(quota) / int(period)))
    return min(granted, default=0)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
