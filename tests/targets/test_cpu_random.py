"""Random tile kernels: the CPU target against the reference interpreter."""

from __future__ import annotations

import numpy as np
from cpu_kernels import POOL
from guarded import guarded, guarded_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tile_programs import Program, programs

from dure.ir.blocks import Blocks
from dure.ir.dtypes import Array
from dure.ir.expr import evaluate
from dure.ir.interpret import bind_sizes, run
from dure.ir.layout import PlaneLayouts
from dure.ir.pack import pack, packed_bytes
from dure.ir.types import default_layout
from dure.runtime.llvm import OptLevel
from dure.targets.cpu.launch import compile_kernel


def native(program: Program, arguments: list[Array | Blocks]) -> list[Array | Blocks]:
    """The arguments after a run on the CPU."""
    function = program.function
    bound = bind_sizes(function, arguments)
    sizes = [evaluate(s, bound) for s in function.symbols]
    keep: list[Array] = []
    for argument, param in zip(arguments, function.params, strict=True):
        if isinstance(argument, Blocks):
            layout = default_layout(param.value.tensor)
            assert isinstance(layout, PlaneLayouts)
            shape, axis = argument.shape, argument.axis
            size = packed_bytes(layout, argument.format, shape, axis, bound)
            keep.append(pack(argument, layout, argument.format, guarded_bytes(size), bound))
        else:
            keep.append(guarded(argument))
    kernel = compile_kernel(function, None, POOL, opt=OptLevel.O0)
    kernel.run([k.ctypes.data for k in keep], sizes)
    return [a if isinstance(a, Blocks) else k for a, k in zip(arguments, keep, strict=True)]


def compare(program: Program, seed: int, tolerance: float) -> None:
    """Every array agrees after both ways of running it."""
    expected = program.arguments(seed)
    found = native(program, program.arguments(seed))
    with np.errstate(all="ignore"):
        run(program.function, expected)
    for want, have in zip(expected, found, strict=True):
        if isinstance(want, Blocks) or isinstance(have, Blocks):
            continue
        if tolerance and want.dtype.kind == "f":
            np.testing.assert_allclose(have, want, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(have, want)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(exact=True), st.integers(0, 3))
def test_exact_programs_give_the_same_bits(program: Program, seed: int) -> None:
    compare(program, seed, 0.0)
