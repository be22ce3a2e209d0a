"""Runs a tile function on the CPU target and in the reference interpreter, on the same arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from guarded import guarded

from dure.ir.core import Function
from dure.ir.dtypes import DTYPES
from dure.ir.expr import evaluate, symbol
from dure.ir.interpret import bind_sizes, run
from dure.ir.layout import Layout
from dure.ir.types import TensorType
from dure.runtime.host import HostFeatures
from dure.runtime.pool import Pool
from dure.targets.cpu.launch import compile_kernel

POOL = Pool(2)


def symbolic(array: np.ndarray, name: str, **more: Any) -> TensorType:
    """The type of an array with a symbol for every extent."""
    shape = tuple(symbol(f"{name}_{a}", "size", 0, 1 << 20) for a in range(array.ndim))
    dtype = next(d for d in DTYPES.values() if d.numpy == array.dtype)
    return TensorType(shape, dtype, **more)


def run_cpu(
    function: Function, arrays: Sequence[np.ndarray], host: HostFeatures | None = None
) -> None:
    """Run a kernel natively on contiguous arrays, writing its outputs in place."""
    bound = bind_sizes(function, arrays)
    sizes = [evaluate(s, bound) for s in function.symbols]
    assert all(a.flags.c_contiguous for a in arrays)
    assert all(not isinstance(p.value.tensor.layout, Layout) for p in function.params)
    kernel = compile_kernel(function, host, POOL)
    kernel.run([a.ctypes.data for a in arrays], sizes)


def check(
    kernel: Any,
    arrays: Sequence[np.ndarray],
    consts: Mapping[str, object],
    *,
    tolerance: float = 0.0,
    types: Sequence[TensorType] | None = None,
    host: HostFeatures | None = None,
    reference: Callable[..., Any] | None = None,
) -> list[np.ndarray]:
    """Compare every array after a native run with the interpreter's; return the native ones."""
    names = [f"t{i}" for i in range(len(arrays))]
    kinds = types or [symbolic(a, n) for a, n in zip(arrays, names, strict=True)]
    function = kernel.specialize(kinds, consts)
    expected = [a.copy() for a in arrays]
    found = [guarded(a) for a in arrays]
    run(function, expected)
    run_cpu(function, found, host)
    for want, have in zip(expected, found, strict=True):
        if tolerance:
            np.testing.assert_allclose(
                have.astype(np.float64), want.astype(np.float64), rtol=tolerance, atol=tolerance
            )
        else:
            np.testing.assert_array_equal(have, want)
    return found
