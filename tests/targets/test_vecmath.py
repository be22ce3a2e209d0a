"""The elementary functions' errors over dense sweeps, in units in the last place of float32."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import numpy as np
import pytest

from dure.runtime.host import host_features, host_levels
from dure.runtime.llvm import OptLevel, compile_module, load_object
from dure.targets.cpu.vecmath import VectorMath, unary_functions
from dure.targets.cpu.writer import Reg, Writer, integer


def native(name: str) -> Callable[..., np.ndarray]:
    """A function of float32 arrays (whole vectors of them) as the target computes it."""
    host = host_features()
    lanes, w = host.vector_bits // 32, Writer()
    math_ = VectorMath(w, host)
    inputs = ("%x", "%z") if name == "pow" else ("%x",)

    def body(at: Reg, _: list[Reg]) -> list[Reg]:
        byte = w.mul(at, integer(4))
        type = f"<{lanes} x float>"
        values = [w.load(type, w.offset(Reg("ptr", p), byte)) for p in inputs]
        result = math_.pow(*values) if name == "pow" else unary_functions(math_)[name](values[0])
        w.store(result, w.offset(Reg("ptr", "%y"), byte))
        return []

    w.loop(integer(0), Reg("i64", "%n"), lanes, body)
    text = "\n".join([*w.declarations.values(), "define void @f(ptr %x, ptr %z, ptr %y, i64 %n)"])
    text += f" {host.function_attributes} {{\nentry:\n" + w.text + "\n ret void\n}\n"
    module = load_object(compile_module(text, host, OptLevel.O1))
    pointer = ctypes.c_void_p
    function = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, ctypes.c_int64)(
        module.address("f")
    )

    def run(x: np.ndarray, z: np.ndarray | None = None) -> np.ndarray:
        assert x.size % lanes == 0, module
        y = np.empty_like(x)
        function(x.ctypes.data, (x if z is None else z).ctypes.data, y.ctypes.data, x.size)
        return y

    return run


def ulps(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest distance in units in the last place of the exact value."""
    with np.errstate(all="ignore"):
        nearest = exact.astype(np.float32)
        unit = np.spacing(np.abs(nearest)).astype(np.float64)
        finite = np.isfinite(nearest) & np.isfinite(found)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(nearest))
        distance = np.abs(found.astype(np.float64) - exact) / unit
    return float(distance[finite].max(initial=0))


REFERENCES: dict[str, tuple[Callable[..., np.ndarray], float, float, float]] = {
    "exp": (np.exp, -104, 88.7, 2),
    "exp2": (np.exp2, -149, 127.9, 2),
    "log": (np.log, 1e-44, 3e38, 2),
    "log2": (np.log2, 1e-44, 3e38, 2),
    "tanh": (np.tanh, -10, 10, 4),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), -80, 80, 4),
    "erf": (np.vectorize(math.erf), -5, 5, 4),
    "sin": (np.sin, -1000, 1000, 4),
    "cos": (np.cos, -1000, 1000, 4),
    "sqrt": (np.sqrt, 0, 3e38, 0.51),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1e-30, 3e38, 2),
}


def sweep(low: float, high: float) -> np.ndarray:
    """Evenly spaced numbers, and numbers whose magnitudes are evenly spaced."""
    line = np.linspace(low, high, 1 << 15, dtype=np.float64)
    top, bottom = math.log(max(abs(low), abs(high))), math.log(max(low, 1e-38))
    spread = np.exp(np.linspace(bottom, top, 1 << 15)).clip(max(low, 0), high)
    return np.concatenate([line, spread]).astype(np.float32)


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("name", REFERENCES)
def test_error_bounds(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    reference, low, high, bound = REFERENCES[name]
    x = sweep(low, high)
    with np.errstate(all="ignore"):
        assert ulps(native(name)(x), reference(x.astype(np.float64))) <= bound


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_large_angles(name: str) -> None:
    x = np.linspace(-(2.0**20), 2.0**20, 1 << 16).astype(np.float32)
    exact = getattr(np, name)(x.astype(np.float64))
    assert np.abs(native(name)(x) - exact).max() < 5e-7


@pytest.mark.parametrize("level", host_levels())
def test_rounding_at_the_edges(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    edges = [0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 8388607.5, 8388609.0, 3e9, -3e9, np.inf, -0.0]
    x = np.array([*edges, np.nan, -np.inf, 1e-45, -1e-45], np.float32)
    for name, reference in (("floor", np.floor), ("ceil", np.ceil), ("round", np.rint)):
        np.testing.assert_array_equal(native(name)(x), reference(x))


def test_power() -> None:
    rng = np.random.default_rng(3)
    x = np.exp(rng.uniform(-40, 40, 1 << 16)).astype(np.float32)
    y = rng.uniform(-3, 3, 1 << 16).astype(np.float32)
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.float64), y.astype(np.float64))
        normal = (exact > 1e-37) & (exact < 3e38)
        found = native("pow")(x, y)
    assert ulps(found[normal], exact[normal]) <= 16
    bases = [0, 0, 0, -2, -2, -2, 1, np.inf, np.inf, np.nan, -8, 2, 2, 0, 1, 4]
    powers = [0, 2, -2, 3, 2, 0.5, np.nan, 2, -1, 0, -1, 200, -200, 3, 5, 0.5]
    x, y = np.array(bases, np.float32), np.array(powers, np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(native("pow")(x, y), np.power(x, y), rtol=1e-6)


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("name", ["exp", "exp2"])
def test_powers_that_vanish(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subnormal powers are exact to half a unit, and what is lower is zero."""
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    far = [-104.1, -126.5, -151.0, -182.0, -200.0, -699.0, -701.0, -1011.0, -2e9, -3e38, -np.inf]
    x = np.array([*far, 3e38, np.inf, np.nan, 0.0, 1.0], np.float32)
    low = np.linspace(-103, -87, 1 << 10).astype(np.float32)
    reference = np.exp if name == "exp" else np.exp2
    with np.errstate(all="ignore"):
        wanted = reference(x.astype(np.float64)).astype(np.float32)
        np.testing.assert_allclose(native(name)(x), wanted, rtol=3e-7, atol=0)
        assert ulps(native(name)(low), reference(low.astype(np.float64))) <= 2
