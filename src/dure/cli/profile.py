"""``dure profile``: where the time of the steps that this machine runs goes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dure.cli import options
from dure.cli.output import print_json, say, show, table
from dure.cli.profile_kernel import kernel
from dure.cli.results import duration, quantity
from dure.cli.session import located, workers
from dure.errors import UsageError

if TYPE_CHECKING:
    from dure.serve.profile import OperatorUse, Phase, StepUse

Batch = Annotated[int, typer.Option(min=1, help="Sequences at a time.")]
Context = Annotated[
    int, typer.Option(min=1, help="Tokens that each sequence holds, or that a prefill step takes.")
]
PhaseOption = Annotated[str, typer.Option("--phase", help="decode or prefill.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps to watch; medians count.")]


class _Group(TyperGroup):
    """What is no command of the group is something to profile: ``dure profile softmax 64x1000``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, with the command that they leave out."""
        if args and args[0] != "--help" and args[0] not in self.commands:
            args = ["kernel", *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(
        help="Where the time of a step or a kernel on this machine goes.",
        epilog="Example: dure profile llm smollm2; dure profile softmax 64x1000",
        cls=_Group,
        rich_markup_mode=None,
        no_args_is_help=True,
    )
    group.callback()(_group)
    group.command(epilog="Example: dure profile softmax 64x1000 --threads 2 -o launch.html")(kernel)
    group.command(epilog="Example: dure profile llm smollm2 --batch 8 --context 512 -o step.html")(
        llm
    )
    app.add_typer(group, name="profile")


def _group() -> None:
    """Where the time of a step or a kernel on this machine goes."""


def llm(
    model: options.Model,
    phase: PhaseOption = "decode",
    batch: Batch = 1,
    context: Context = 256,
    steps: Steps = 40,
    threads: options.Threads = None,
    output: options.ProfileOutput = None,
    as_json: options.Json = False,
) -> None:
    """Watch an LLM's steps: operators, bandwidth, arithmetic, and waits of each worker."""
    from dure.prof.output import check_path
    from dure.serve.engine import Engine
    from dure.serve.profile import profile_steps
    from dure.serve.profile_records import SUFFIXES, write_profile

    if output is not None:
        check_path(output, SUFFIXES)
    chosen: Phase
    if phase in ("decode", "prefill"):
        chosen = "decode" if phase == "decode" else "prefill"
    else:
        raise UsageError(f"--phase {phase}", rule="a step is decode or prefill")
    path, threads = located(model, quiet=as_json), workers(threads)
    with ExitStack() as stack:
        engine = stack.enter_context(Engine.load(path, threads=threads, recorded=True))
        try:
            plain = stack.enter_context(Engine.load(path, threads=threads))
        except UsageError as error:
            say(f"note: what recording costs isn't measured: {error}")
            plain = None
        found = profile_steps(
            engine, model, phase=chosen, batch=batch, context=context, steps=steps, plain=plain
        )
    if output is not None:
        write_profile(found, output)
        say(f"wrote {output}")
    if as_json:
        print_json(_json(found))
    else:
        _show(found)


def _show(found: StepUse) -> None:
    _headline(found)
    whole = sum(o.total_ns for o in found.operators)
    whole += sum(b.count * sum(b.ns) / len(b.ns) for b in found.barriers)
    head = "OPERATOR", "TIMES", "EACH", "SLOWEST", "OF STEP", "GB/s", "OF READ", "op/s", "OF PEAK"
    table([head, *(_row(entry, found, whole) for entry in found.operators)], right=range(1, 9))
    show("\n")
    waits = [("BARRIER, BECAUSE", "TIMES", "WAIT OF EACH WORKER", "OF STEP")]
    for barrier in found.barriers:
        each = ", ".join(duration(int(ns * 1e3)) for ns in barrier.ns)
        part = barrier.count * sum(barrier.ns) / len(barrier.ns) / whole
        waits.append((barrier.because, str(barrier.count), each, f"{part:.1%}"))
    table(waits, right=(1, 2, 3))
    shares = ", ".join(f"{part:.1%}" for part in found.waiting)
    show(f"\nworkers wait for {shares} of the median step\n")


def _headline(found: StepUse) -> None:
    many = "s" if found.workers > 1 else ""
    rate, read = found.bytes_a_second, found.read
    peaks = ", ".join(f"{quantity(value)}op/s in {name}" for name, value in found.peaks.items())
    lines = [
        f"{found.model}: {found.phase} of {found.batch} x {found.context} tokens on "
        f"{found.workers} worker{many}; medians of {found.steps} steps",
        f"a step {duration(int(found.ns * 1e3))}, {found.tokens / found.ns * 1e9:,.4g} tokens/s; "
        f"{rate / 1e9:.1f} GB/s of weights, keys and values, "
        f"{rate / read:.0%} of {read / 1e9:.1f} GB/s read in the same run",
        f"products in the caches: {peaks}",
    ]
    if found.plain_ns is not None:
        cost = found.ns / found.plain_ns - 1
        lines.append(
            f"a step that isn't recorded {duration(int(found.plain_ns * 1e3))} ({cost:+.1%})"
        )
    show("\n".join([*lines, "", ""]))


def _row(entry: OperatorUse, found: StepUse, whole: float) -> tuple[str, ...]:
    read, work = entry.bytes / entry.slowest_ns * 1e9, entry.flops / entry.slowest_ns * 1e9
    peak = max(found.peaks.values())
    return (
        entry.name,
        str(entry.count),
        duration(int(entry.ns * 1e3)),
        duration(int(entry.slowest_ns * 1e3)),
        f"{entry.total_ns / whole:.1%}",
        f"{read / 1e9:.1f}",
        f"{read / found.read:.0%}",
        quantity(work),
        f"{work / peak:.0%}",
    )


def _json(found: StepUse) -> dict[str, object]:
    return {
        "model": found.model,
        "phase": found.phase,
        "batch": found.batch,
        "context": found.context,
        "workers": found.workers,
        "steps": found.steps,
        "ns": found.ns,
        "plain_ns": found.plain_ns,
        "tok_s": found.tokens / found.ns * 1e9,
        "weight_bytes": found.weight_bytes,
        "kv_bytes": found.kv_bytes,
        "read_gb_s": found.read / 1e9,
        "peaks": found.peaks,
        "waiting": found.waiting,
        "operators": [
            {
                "name": entry.name,
                "count": entry.count,
                "ns": entry.ns,
                "slowest_ns": entry.slowest_ns,
                "bytes": entry.bytes,
                "flops": entry.flops,
            }
            for entry in found.operators
        ],
        "barriers": [
            {"because": entry.because, "count": entry.count, "ns": entry.ns}
            for entry in found.barriers
        ],
    }
