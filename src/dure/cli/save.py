"""``dure save``: an operator, a kernel or a model's step as a file that later releases run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dure.cli import options
from dure.cli.chip_options import Set
from dure.cli.output import print_json, say, show
from dure.cli.sim import asked
from dure.cli.sim_model import KV, Activations, Batch, Chunk, Context, Phase, StepOptions, Weights
from dure.cli.subject import Algorithm, Arg, Const, Dims, Dtype, Subject, targets_of
from dure.errors import UsageError

Output = Annotated[
    Path, typer.Option("-o", "--output", help="The file to write: .dure.", show_default=False)
]
Targets = Annotated[
    str,
    typer.Option(
        "--target",
        help="The chips whose best tile sizes are stored, beside small to large ones for any other "
        "chip: names with commas, or all.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    epilog = "Example: dure save softmax 64x1000 -o softmax.dure; then dure sim softmax.dure"
    app.command("save", epilog=epilog)(save)


def save(
    subject: Subject,
    output: Output,
    dims: Dims = None,
    target: Targets = "all",
    dtype: Dtype = "bf16",
    algorithm: Algorithm = "dure",
    arg: Arg = None,
    const: Const = None,
    batch: Batch = None,
    context: Context = None,
    phase: Phase = None,
    chunk: Chunk = None,
    weights: Weights = None,
    kv: KV = None,
    activations: Activations = None,
    settings: Set = None,
    as_json: options.Json = False,
) -> None:
    """Write an operator, a kernel or a model's step as portable text, for later releases and chips.

    The file is then what sim, check, compile, sanitize and report are asked about.
    """
    from dure.library.artefact.container import read
    from dure.models.artefact import SUFFIX, launches, packed, unpacked, write

    if output.suffix != SUFFIX:
        raise UsageError(
            f"an artefact called {output}",
            rule=f"the name of an artefact ends in {SUFFIX}",
            fix=f"-o {output.stem or 'kernel'}{SUFFIX}",
        )
    chips = targets_of(target, settings)
    step = StepOptions(batch, context, phase, chunk, weights, kv, activations)
    what = asked(subject, dims, dtype, algorithm, arg, const, step)
    if not as_json:
        say(f"choosing tile sizes for {', '.join(chip.name for chip in chips)}")
    data = packed(what, chips)
    write(output, data)
    found = read(data, str(output))
    calls = launches(unpacked(data, str(output)))
    if as_json:
        kernels = [
            {"name": call.kernel.__name__, "tiles": [dict(sizes) for sizes in call.variants]}
            for call in calls
        ]
        print_json(
            {
                "file": str(output),
                "name": found.name,
                "release": found.release,
                "bytes": len(data),
                "sha256": found.sha256,
                "kernels": kernels,
            }
        )
        return
    functions = sum(len(call.variants) or 1 for call in calls)
    show(
        f"{output}: {found.name}: {len(calls)} kernels, {functions} tile functions, "
        f"{len(data) / 1000:,.0f} kB, sha256 {found.sha256}\n"
    )
