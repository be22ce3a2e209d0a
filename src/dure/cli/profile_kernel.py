"""``dure profile`` of a kernel: what each worker of this machine does in its launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options
from dure.cli.output import print_json, say, show, table
from dure.cli.results import duration, quantity
from dure.cli.session import workers
from dure.cli.subject import Arg, Const, Dims, Dtype, work_of
from dure.errors import UsageError

if TYPE_CHECKING:
    from dure.serve.launches import LaunchUse, WorkUse

Subject = Annotated[
    str,
    typer.Argument(
        metavar="OP|FILE.py:KERNEL|FILE.dure",
        help="An operator (gemm, softmax, any library kernel), a kernel of a file, or what `dure "
        "save` wrote.",
        show_default=False,
    ),
]
Launches = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Launches to watch; medians count.  [default: about a second of them]",
        show_default=False,
    ),
]


def kernel(
    subject: Subject,
    dims: Dims = None,
    dtype: Dtype = "f32",
    arg: Arg = None,
    const: Const = None,
    launches: Launches = None,
    threads: options.Threads = None,
    output: options.ProfileOutput = None,
    as_json: options.Json = False,
) -> None:
    """Watch a kernel's launches: time, bandwidth, arithmetic, and each worker's busy and idle time.

    Its arrays are random numbers, and stay in the caches where a launch leaves them.
    """
    from dure.prof.output import check_path
    from dure.serve.launches import profile_work
    from dure.serve.profile_records import SUFFIXES, write_profile

    if output is not None:
        check_path(output, SUFFIXES)
    _refuse_models(subject)
    work = work_of(subject, dims, dtype, "dure", arg, const)
    found = profile_work(work, workers=workers(threads), launches=launches)
    if output is not None:
        write_profile(found, output)
        say(f"wrote {output}")
    if as_json:
        print_json(_json(found))
    else:
        _show(found)


def _refuse_models(subject: str) -> None:
    """Say how a model is profiled, rather than that no operator is called so."""
    from dure.models.catalogue import catalogue

    if subject in catalogue() or subject.endswith(".gguf"):
        raise UsageError(
            f"{subject[:80]} is a model",
            rule="a model's steps are profiled by a command of their own",
            fix=f"dure profile llm {subject[:80]}",
        )


# --- for people ----------------------------------------------------------------------------------


def _show(found: WorkUse) -> None:
    show("\n".join([*_headline(found), "", ""]))
    head = ("KERNEL", "TILES", "INSTANCES", "LAUNCH", "OUTSIDE", "SLOWEST", "FASTEST", "IMBALANCE")
    table([head, *map(_row, found.parts)], right=range(2, len(head)))
    show("\n")
    rows = [("KERNEL", "WORKER", "BUSY", "IDLE")]
    for part in found.parts:
        pairs = enumerate(zip(part.busy, part.idle, strict=True))
        rows += [(part.kernel, str(n), _time(busy), _time(idle)) for n, (busy, idle) in pairs]
    table(rows, right=(1, 2, 3))


def _headline(found: WorkUse) -> list[str]:
    many = "s" if found.workers > 1 else ""
    rate, peak = found.bytes / found.ns * 1e9, found.peaks[found.peak]
    least = {name: f"{ns / found.ns:.0%}" for name, ns in found.least.items()}
    lines = [
        f"{found.name} {found.dims} {found.dtype} on {found.workers} worker{many}; medians of "
        f"{found.launches} launches, with arrays where the last launch left them",
        f"a launch {_time(found.ns)}, {_time(found.least['latency'])} of it outside of the workers"
        + _checks(found),
        f"{quantity(found.bytes)}B needed, {rate / 1e9:.1f} GB/s: {rate / found.near:.0%} of "
        f"{found.near / 1e9:.1f} GB/s in reads of so many bytes ({found.read / 1e9:.1f} GB/s from "
        "memory) in the same run",
    ]
    if not found.flops:
        lines.append(
            "it needs no operations" if found.flops == 0 else "operations depend on values"
        )
    else:
        work = found.flops / found.ns * 1e9
        lines.append(
            f"{quantity(found.flops)}op needed, {quantity(work)}op/s: {work / peak:.0%} of "
            f"{quantity(peak)}op/s in products of {found.peak} in the caches"
        )
    lines.append(
        f"bound by {found.bound}: of a launch, reading its bytes would take {least['memory']}, "
        f"its operations at the products' rate {least['compute']}, and outside of the workers are "
        f"{least['latency']}"
    )
    lines.append(f"recording takes {found.cost:+.1%} of a launch")
    return lines


def _checks(found: WorkUse) -> str:
    times = [part.checks_ns for part in found.parts]
    known = [ns for ns in times if ns is not None]
    if len(known) < len(times):
        return ""
    return f"; a call from Python checks its arguments in {_time(sum(known))} more"


def _row(part: LaunchUse) -> tuple[str, ...]:
    return (
        part.kernel,
        " ".join(f"{name}={size}" for name, size in part.tiles.items()) or "-",
        str(part.instances),
        _time(part.ns),
        _time(part.outside_ns),
        _time(part.slowest_ns),
        _time(part.fastest_ns),
        f"{part.imbalance:.1%}",
    )


def _time(ns: float) -> str:
    return duration(round(ns * 1e3))


def _json(found: WorkUse) -> dict[str, object]:
    return {
        "op": found.name,
        "dims": found.dims,
        "dtype": found.dtype,
        "workers": found.workers,
        "launches": found.launches,
        "ns": found.ns,
        "flops": found.flops,
        "bytes": found.bytes,
        "read_gb_s": found.read / 1e9,
        "near_gb_s": found.near / 1e9,
        "peaks": found.peaks,
        "peak": found.peak,
        "bound": found.bound,
        "least_ns": found.least,
        "cost_of_recording": found.cost,
        "kernels": [
            {
                "name": part.kernel,
                "tiles": dict(part.tiles),
                "instances": part.instances,
                "ns": part.ns,
                "recorded_ns": part.recorded_ns,
                "cost_ns": part.cost_ns,
                "outside_ns": part.outside_ns,
                "checks_ns": part.checks_ns,
                "span_ns": part.span_ns,
                "slowest_ns": part.slowest_ns,
                "fastest_ns": part.fastest_ns,
                "busy_ns": part.busy,
                "idle_ns": part.idle,
                "imbalance": part.imbalance,
            }
            for part in found.parts
        ],
    }
