"""``dure bench``: how fast this machine is."""

from __future__ import annotations

from typing import Annotated

import typer

from dure.cli import options
from dure.cli.output import print_json, table
from dure.cli.session import opened
from dure.errors import UsageError

PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens to prefill.")]
GeneratedTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate after them.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences at a time.")]
Repeats = Annotated[int, typer.Option(min=1, help="Measurements; the median counts.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(
        help="Measure this machine.",
        epilog="Example: dure bench llm smollm2",
        rich_markup_mode=None,
        no_args_is_help=True,
    )
    group.callback()(_group)
    group.command(
        epilog="Example: dure bench llm smollm2 --prompt 512 --gen 64 --batch 1 --threads 2"
    )(llm)
    app.add_typer(group, name="bench")


def _group() -> None:
    """Measure this machine."""


def llm(
    model: options.Model,
    prompt: PromptTokens = 512,
    gen: GeneratedTokens = 64,
    batch: Batch = 1,
    repeats: Repeats = 3,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Measure an LLM's prefill and decode speed, and the memory's read bandwidth beside it."""
    with opened(model, threads, None, quiet=as_json) as engine:
        if prompt + gen > engine.context_length:
            raise UsageError(
                f"{prompt} + {gen} tokens don't fit the context of {engine.context_length}",
                fix="lower --prompt or --gen",
            )
        measured = engine.bench(prompt=prompt, gen=gen, batch=batch, repeats=repeats)
        result: dict[str, object] = {
            "model": model,
            "architecture": engine.architecture,
            "threads": engine.threads,
            "load_s": engine.load_s,
            "prompt": prompt,
            "gen": gen,
            "batch": batch,
            "repeats": repeats,
        } | measured
    if as_json:
        print_json(result)
    else:
        table([(key, _number(value)) for key, value in result.items()])


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
