from __future__ import annotations

import os
import sys

import pytest

from dure.errors import TargetError
from dure.runtime import host, llvm

WIDTHS = {"x86-64": 128, "avx2": 256, "avx2-vnni": 256, "avx512": 512}
WIDTHS |= {"avx512-vnni": 512, "amx": 512}


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DURE_CPU_LEVEL", raising=False)


def test_the_highest_level_is_chosen() -> None:
    assert host.host_features().level == host.host_levels()[-1]


@pytest.mark.parametrize("level", host.host_levels())
def test_every_level_of_this_host_can_be_forced(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    features = host.host_features()
    assert features.level == level
    assert features.vector_bits == WIDTHS.get(level, 128)
    assert features.has("fma") == (level in WIDTHS and level != "x86-64")
    assert all(f"+{name}" in features.feature_string.split(",") for name in features.features)
    if level == "x86-64":
        assert not any(name.startswith(("avx", "sse3", "sse4")) for name in features.features)
    if features.vector_bits < 512:
        assert not any(name.startswith("avx512") for name in features.features)


@pytest.mark.parametrize("level", host.host_levels())
def test_a_level_decides_the_registers(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    features = host.host_features()
    code = llvm.assembly(
        f"""define void @f(ptr %p) #0 {{
          %a = load <16 x float>, ptr %p, align 4
          %b = fadd <16 x float> %a, %a
          store <16 x float> %b, ptr %p, align 4
          ret void
        }}
        attributes #0 = {{ {features.function_attributes} }}""",
        features,
    )
    assert ("%zmm" in code) == (features.vector_bits == 512)
    assert ("%ymm" in code) == (features.vector_bits == 256)


def test_a_level_that_the_host_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_detected_features", lambda: frozenset({"sse2", "avx2"}))
    host._features_at.cache_clear()
    try:
        monkeypatch.setenv("DURE_CPU_LEVEL", "avx512")
        with pytest.raises(TargetError, match="lacks the level 'avx512'"):
            host.host_features()
        monkeypatch.delenv("DURE_CPU_LEVEL")
        # AVX2 without FMA and F16C is not the level that kernels are written for.
        assert host.host_features().level == "x86-64"
    finally:
        host._features_at.cache_clear()


def test_an_unknown_word_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURE_CPU_LEVEL", "zen9")
    with pytest.raises(TargetError, match="'zen9' is not a level") as caught:
        host.host_features()
    assert host.host_levels()[-1] in caught.value.fix


def test_other_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert host.architecture_name() == "aarch64"
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    with pytest.raises(TargetError, match="s390x"):
        host.architecture_name()


def test_arm_code_can_be_generated() -> None:
    features = host.features_of("neon")
    text = "define <4 x float> @f(<4 x float> %a) { ret <4 x float> %a }"
    assert "ret" in llvm.assembly(text, features)


@pytest.mark.parametrize(
    ("capabilities", "levels"),
    [(0, ("neon",)), (0x3, ("neon",)), (1 << 20 | 1 << 8 | 0x3, ("neon", "neon-dotprod"))],
)
def test_levels_of_an_arm_system(
    monkeypatch: pytest.MonkeyPatch, capabilities: int, levels: tuple[str, ...]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(llvm, "detected_features", dict[str, bool])
    monkeypatch.setattr(host, "_hardware_capabilities", lambda: capabilities)
    host._detected_features.cache_clear()
    host._features_at.cache_clear()
    try:
        assert host.host_levels() == levels
        features = host.host_features()
        assert features.level == levels[-1]
        assert features.has("dotprod") == features.has("lse") == (levels[-1] == "neon-dotprod")
        assert (features.vector_bits, features.vector_registers) == (128, 32)
    finally:
        host._detected_features.cache_clear()
        host._features_at.cache_clear()


def test_caches_are_plausible() -> None:
    features = host.host_features()
    assert 8 * 1024 <= features.l1d_bytes <= 1 << 20
    assert features.l1d_bytes <= features.l2_bytes <= 1 << 28
    assert features.line_bytes in (32, 64, 128, 256)
    assert features.page_bytes >= 4096


def test_caches_without_sysfs_and_sysconf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_read", lambda path: "")
    monkeypatch.setattr(os, "sysconf_names", {})
    host._features_at.cache_clear()
    try:
        features = host.host_features()
        assert (features.l1d_bytes, features.l2_bytes) == (32 * 1024, 256 * 1024)
    finally:
        host._features_at.cache_clear()


def test_cores_follow_affinity() -> None:
    found = host.cores()
    assert found.workers >= 1
    if hasattr(os, "sched_getaffinity"):
        assert set(found.allowed) == os.sched_getaffinity(0)
        assert sorted(found.physical) == sorted(found.allowed)


def test_cores_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(host, "_read", lambda path: "")
    found = host.cores()
    assert found.allowed == ()
    assert found.workers == 6


def test_hardware_threads_come_after_physical_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}

    def read(path: object) -> str:
        text = str(path)
        if text.endswith("thread_siblings_list"):
            return siblings[int(text.split("/cpu/cpu")[1].split("/")[0])]
        return ""

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(host, "_read", read)
    assert host.cores() == host.Cores((0, 1, 2, 3), (0, 1, 2, 3), 2)
    # Without core 0, its sibling stands for the physical core.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3}, raising=False)
    assert host.cores() == host.Cores((1, 2, 3), (1, 2, 3), 2)


def test_a_containers_quota_limits_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(
        host, "_read", lambda path: "150000 100000" if str(path).endswith("cpu.max") else ""
    )
    assert host.cores().workers == 2


@pytest.mark.parametrize(
    ("files", "workers"),
    [
        ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "max 100000"}, 64),
        ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "1 100000"}, 1),
        ({"/proc/self/cgroup": "0::/../other", "/sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        # A service of the system's: its own limit, or that of the slice around it.
        (
            {
                "/proc/self/cgroup": "0::/system.slice/dure.service",
                "/sys/fs/cgroup/system.slice/dure.service/cpu.max": "250000 100000",
                "/sys/fs/cgroup/system.slice/cpu.max": "max 100000",
            },
            3,
        ),
        (
            {
                "/proc/self/cgroup": "0::/a/b",
                "/sys/fs/cgroup/a/b/cpu.max": "800000 100000",
                "/sys/fs/cgroup/a/cpu.max": "400000 100000",
            },
            4,
        ),
        # The older hierarchy, as the root of a container and below it; -1 is no limit.
        (
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "500000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            5,
        ),
        (
            {
                "/proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/docker/x\n0::/",
                "/sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "600000",
                "/sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            6,
        ),
        ({"/proc/self/cgroup": "what\nis:this\n", "/sys/fs/cgroup/cpu.max": "text 0"}, 64),
    ],
)
def test_every_control_group_may_limit_the_workers(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(host, "_read", lambda path: files.get(str(path), ""))
    monkeypatch.delenv("DURE_THREADS", raising=False)
    assert host.cores().workers == workers == host.default_workers()


def test_a_single_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5}, raising=False)
    monkeypatch.setattr(host, "_read", lambda path: "")
    assert host.cores() == host.Cores((5,), (5,), 1)


TILES = {"amx-tile", "amx-int8", "amx-bf16"}


@pytest.mark.parametrize("granted", [True, False])
def test_tile_registers_are_used_where_they_work(
    granted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor may report AMX though the system grants no process its registers."""
    from dure.runtime import llvm

    level = next(level for level in host.LEVELS if level.name == "amx")
    reported = dict.fromkeys(level.allowed | TILES | {"amx-fp16"}, True)
    monkeypatch.setattr(llvm, "detected_features", lambda: reported)
    monkeypatch.setattr(host, "architecture_name", lambda: "x86-64")
    monkeypatch.setattr(host, "tiles_work", lambda: granted)
    host._detected_features.cache_clear()
    host._features_at.cache_clear()
    monkeypatch.delenv("DURE_CPU_LEVEL", raising=False)
    try:
        found = host.host_features()
    finally:
        host._detected_features.cache_clear()
        host._features_at.cache_clear()
    assert found.level == ("amx" if granted else "avx512-vnni")
    assert {name for name in found.features if "amx" in name} == (TILES if granted else set())


def test_import_is_cheap() -> None:
    import subprocess

    code = "import sys, dure.runtime.llvm, dure.runtime.host; print('llvmlite' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.strip() == b"False"
