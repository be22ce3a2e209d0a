"""What the commands about chips share: the work they are asked about, and the chips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli.artefact import is_artefact, stored_work
from dure.cli.chip_options import overrides_of
from dure.cli.text import argument
from dure.errors import UsageError

if TYPE_CHECKING:
    from dure.library.work import Work
    from dure.machine.chip import Chip

Subject = Annotated[
    str,
    typer.Argument(
        metavar="OP|FILE.py:KERNEL|MODEL|FILE.dure",
        help="An operator (gemm, ffn_gated, attn, any library kernel), a kernel of a file, (for "
        "sim and save) a model: its name or a config.json, or what `dure save` wrote.",
        show_default=False,
    ),
]
Dims = Annotated[
    str | None,
    typer.Argument(help="The operator's sizes, as 4096x4096x4096.", show_default=False),
]
Targets = Annotated[
    str,
    typer.Option(
        "--target",
        help="A chip from `dure targets`, a machine file NAME.toml, all, or several with commas.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="The operator's dtype: f32, f16, bf16, fp8, int8, int4, mxfp4."),
]
Algorithm = Annotated[
    str,
    typer.Option(
        "--algorithm", help="dure, or as-measured: what ran where the operator was measured."
    ),
]
Arg = Annotated[
    list[str] | None,
    typer.Option(
        "--arg",
        help="A tensor of FILE.py:KERNEL, as x=bf16[512x512], ids=int32[64]:0..4095 for indices, "
        "or bias=none; once for each.",
        show_default=False,
    ),
]
Const = Annotated[
    list[str] | None,
    typer.Option(
        "--const",
        help="A const of FILE.py:KERNEL, as bm=64; the compiler chooses what is left open.",
        show_default=False,
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse to convert types for a chip.")]


def work_of(
    subject: str,
    dims: str | None,
    dtype: str,
    algorithm: str,
    arg: Sequence[str] | None,
    const: Sequence[str] | None,
) -> Work:
    """The work that the arguments of a command name."""
    if is_artefact(subject):
        return stored_work(subject, {"dims": dims, "--arg": arg, "--const": const}, dtype)
    from dure.library import work  # the library takes longer to import than `--help` may

    argument(subject, "the operator")
    for text in (dims or "", dtype, *(arg or ()), *(const or ())):
        argument(text, "an argument")
    if not work.is_kernel(subject):
        return _operator(subject, dims, dtype, algorithm, [*(arg or ()), *(const or ())])
    if dims is not None:
        raise UsageError(
            f"{subject} {dims}",
            rule="the sizes of a kernel of a file are those of its tensors",
            fix="give each tensor with --arg, as --arg x=bf16[512x512]",
        )
    return work.kernel_work(subject, arg or (), const or ())


def _operator(op: str, dims: str | None, dtype: str, algorithm: str, given: Sequence[str]) -> Work:
    from dure.library.operators import forms
    from dure.library.work import operator_work

    if given:
        raise UsageError(
            f"{op} with {given[0]}",
            rule="--arg and --const are for FILE.py:KERNEL",
            fix="give the operator's sizes and --dtype",
        )
    known = forms(algorithm)
    if dims is None and op in known:
        raise UsageError(
            f"{op} without dims",
            rule=f"the dims of {op} are {known[op].dims}",
            fix=f"{op} {'x'.join('128' for _ in known[op].dims.split('x'))}",
        )
    return operator_work(op, dims or "", dtype, algorithm)


def targets_of(target: str, settings: Sequence[str] | None) -> list[Chip]:
    """The chips that ``--target`` and ``--set`` name."""
    from dure.library.answer import targets

    return targets(argument(target, "--target"), overrides_of(settings))


def error_json(error: Exception) -> dict[str, object]:
    """An error as JSON: what, where, rule and fix."""
    return {
        "error": {
            name: str(getattr(error, name, "") or (error if name == "what" else ""))
            for name in ("what", "where", "rule", "fix")
        }
    }
