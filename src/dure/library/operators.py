"""Operators by name and sizes, as measurements name them: ``gemm 4096x4096x4096`` in ``bf16``.

:func:`operator` gives the kernel launches that an operator is, its floating-point operations and
its compulsory bytes.  The names of public measurements:

- ``gemm MxKxN``: (M, K) @ (K, N).
  ``gemm_bias``, ``gemm_gelu``, ``gemm_silu`` and ``gemm_residual`` are that with an epilogue.
- ``ffn_gated MxDxF``: ``down(silu(x @ gate) * (x @ up))``; gate and up are one (D, 2 F) weight.
- ``ffn_gelu MxDxF``: two matmuls with bias, the GELU of the error function between them.
- ``attn HqxHkvxSqxSkvxD``: causal attention of the last Sq of Skv positions over a paged cache.
  The batch is multiplied into the heads: a sequence has 8 KV heads, so that ``2048x512x...`` is 64
  sequences of 32 and 8 heads; where Hkv is no multiple of 8 it is one sequence.
- ``attn_enc BHxSxD``: attention without a mask, with its scores in memory.

Every kernel of the library is an operator too, by its own name.  ``dtype`` is the type of all
operands and results, with these exceptions: results of int4 operands are int8, and mxfp4 is a
type of weights, with operands and results of bf16.  Integer products are multiplied by a number on
their way to the result, as quantized networks do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from dure.errors import UsageError
from dure.library import operators_kernels, operators_measured
from dure.library.call import KernelCall
from dure.library.operators_common import DTYPES, MOST_ELEMENTS, Plan, Shape

ALGORITHMS = ("dure", "as-measured")


@dataclass(frozen=True)
class Operator:
    """An operator of known sizes.

    ``calls`` run one after another.  ``flops`` counts what the definition needs, whatever the
    kernels do; ``bytes`` what must cross the memory's edge at least once: operands and results,
    but nothing that only passes from one launch to the next.
    """

    op: str
    dims: tuple[int, ...]
    dtype: str
    calls: tuple[KernelCall, ...]
    flops: int
    bytes: int


@dataclass(frozen=True)
class Form:
    """How an operator is asked for: the names of its extents, its dtypes, and who builds it."""

    dims: str
    dtypes: tuple[str, ...]
    plan: Callable[[Shape, str], Plan]


def forms(algorithm: str = "dure") -> dict[str, Form]:
    """Every operator by its name."""
    measured = operators_measured.MEASURED if algorithm == "as-measured" else {}
    tables = (operators_measured.TABLE, operators_kernels.TABLE, measured)
    return {
        name: Form(dims, dtypes, plan)
        for table in tables
        for name, (dims, dtypes, plan) in table.items()
    }


def operator(op: str, dims: str, dtype: str = "bf16", algorithm: str = "dure") -> Operator:
    """The operator of this name, sizes such as ``"128x4096x4096"``, and dtype.

    ``algorithm`` of ``"as-measured"`` takes the one that ran where the operator was measured,
    where that is known to be other than dure's own.  Raises :class:`UsageError` for an unknown name
    or dtype, for sizes that don't parse, and for sizes that no memory holds.
    """
    if algorithm not in ALGORITHMS:
        raise UsageError(
            f"no algorithm is called '{algorithm}'",
            rule=f"an algorithm is one of {', '.join(ALGORITHMS)}",
            fix="--algorithm dure",
        )
    form = forms(algorithm).get(op)
    if form is None:
        near = difflib.get_close_matches(op, forms(), n=3, cutoff=0.5)
        raise UsageError(
            f"no operator is called '{op}'",
            rule="an operator is one that the library has",
            fix=f"one of {', '.join(near or sorted(forms()))}",
        )
    extents = parse_dims(op, form.dims, dims)
    if dtype not in form.dtypes:
        known = dtype in DTYPES
        raise UsageError(
            f"{op} in {dtype}" if known else f"no dtype is called '{dtype}'",
            rule=f"{op} is computed in {', '.join(form.dtypes)}",
            fix=f"--dtype {'bf16' if 'bf16' in form.dtypes else form.dtypes[0]}",
        )
    plan = form.plan(extents, dtype)
    return Operator(op, extents, dtype, plan.calls, plan.flops, plan.bytes)


def parse_dims(op: str, form: str, dims: str) -> tuple[int, ...]:
    """The extents that ``dims`` names, as many as ``form`` (``MxKxN``) has."""
    names = form.split("x")
    example = "x".join("128" for _ in names)
    if not re.fullmatch(r"[0-9]+(x[0-9]+)*", dims, re.ASCII) or dims.count("x") + 1 != len(names):
        raise UsageError(
            f"'{dims[:80]}' are no dims of {op}",
            rule=f"the dims of {op} are {form}: {len(names)} positive whole numbers with x between",
            fix=f"{op} {example}",
        )
    # A number of more digits than any size needs is not even converted.
    extents = tuple(
        int(text) if len(text.lstrip("0")) <= 13 else MOST_ELEMENTS + 1 for text in dims.split("x")
    )
    for name, extent, text in zip(names, extents, dims.split("x"), strict=True):
        if extent == 0 or extent > MOST_ELEMENTS:
            raise UsageError(
                f"{name} of {op} is {text[:40]}",
                rule=f"an extent is at least 1 and at most 2^40 = {MOST_ELEMENTS}",
                fix=f"{op} {example}",
            )
    return extents
