"""The options that several commands share, as typer reads them."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dure import settings

if TYPE_CHECKING:
    from dure.serve.sampler import SamplingParams

Model = Annotated[str, typer.Argument(help="A name from `dure models`, or a path of a GGUF file.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=settings.MOST_THREADS,
        help="Worker threads.  [default: DURE_THREADS, or the physical cores]",
        show_default=False,
    ),
]
ProfileOutput = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="Write the median run: .json or .json.gz for Perfetto, .html for a page.",
        show_default=False,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of context to keep room for.  [default: the model decides]",
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int, typer.Option("-n", "--max-tokens", min=1, help="Most tokens to generate.")
]
Temperature = Annotated[float, typer.Option(help="0 always takes the most likely token.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this part of the likeliest one's.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages repetition.")]
PresencePenalty = Annotated[float, typer.Option(help="Above 0 discourages tokens used before.")]
Seed = Annotated[
    int | None,
    typer.Option(
        help="The same seed gives the same text.  [default: a new one]", show_default=False
    ),
]

TEMPERATURE = 0.2
"""Low, as SmolLM2's model card has it: at 0.7 models of this size make up facts."""
TOP_K = 40
TOP_P = 0.9
MIN_P = 0.05


def sampling(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    seed: int | None,
) -> SamplingParams:
    """The parameters checked, and with a seed in any case, so that a run can be repeated."""
    # NumPy comes with it, which `dure --help` need not wait for.
    from dure.serve.sampler import SamplingParams

    return SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        seed=secrets.randbits(32) if seed is None else seed,
    )
