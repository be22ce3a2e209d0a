"""``dure perplexity``: how well a model predicts a text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options, text
from dure.cli.output import print_json, say, show
from dure.cli.session import Engine, opened
from dure.errors import DureError, UsageError
from dure.models.catalogue import printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TextFile = Annotated[Path, typer.Argument(help="A UTF-8 text file.")]
Window = Annotated[int, typer.Option(min=2, help="Text tokens in a window.")]

_ROWS = 16
"""Rows of logits that are turned into float64 at a time; a vocabulary may have 262,144 entries."""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog="Example: dure perplexity smollm2 prose.txt --window 512")(perplexity)


def perplexity(
    model: options.Model,
    file: TextFile,
    window: Window = 512,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Measure a model's perplexity on a text.

    The text is tokenized once, without special tokens, and cut into windows that each start afresh,
    with BOS in front where the model wants one.  Every token but a window's first is scored.
    """
    words = text.not_empty(text.file(file), printable(str(file)))
    started = time.monotonic()
    with opened(model, threads, None, quiet=as_json) as engine:
        ids = engine.tokenizer.encode(words, add_special=False, parse_special=False)
        if len(ids) < 2:
            raise UsageError(
                f"{printable(str(file))} has {len(ids)} token, and nothing to predict it from",
                fix="give a longer text",
            )
        count = -(-len(ids) // window)
        losses: list[float] = []
        scored = 0
        for number, (loss, tokens) in enumerate(window_losses(engine, ids, window), 1):
            losses.append(loss)
            scored += tokens
            if not as_json:
                so_far = math.exp(math.fsum(losses) / scored)
                say(f"window {number} of {count}: perplexity so far {so_far:.4f}")
    mean = math.fsum(losses) / scored
    result = {
        "model": model,
        "file": str(file),
        "perplexity": math.exp(mean),
        "nll": mean,
        "tokens": len(ids),
        "tokens_scored": scored,
        "window": window,
        "windows": count,
        "seconds": time.monotonic() - started,
    }
    if as_json:
        print_json(result)
    else:
        show(f"perplexity {math.exp(mean):.4f} over {scored} of {len(ids)} tokens\n")


def window_losses(engine: Engine, ids: list[int], window: int) -> Iterator[tuple[float, int]]:
    """For each window, the sum of the scored tokens' negative log-probabilities, and their number.

    A last window of one token has nothing to score and is left out.  Raises UsageError for a window
    that is longer than the context.
    """
    tokenizer = engine.tokenizer
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    longest = min(window, len(ids)) + len(bos)
    if longest > engine.context_length:
        raise UsageError(
            f"a window of {longest} tokens doesn't fit the context of {engine.context_length}",
            fix=f"use --window {engine.context_length - len(bos)} or less",
        )
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        if len(part) > 1:
            logits = engine.logits(bos + part)
            yield negative_log_likelihood(logits[len(bos) : -1], part[1:]), len(part) - 1


def negative_log_likelihood(logits: NDArray[np.float32], targets: list[int]) -> float:
    """The sum over rows of -log softmax(row)[target], in float64; ``logits``: [n, vocabulary]."""
    import numpy as np

    total = 0.0
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float64)
        largest = rows.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(rows - largest).sum(axis=1)) + largest[:, 0]
        wanted = rows[np.arange(len(rows)), targets[start : start + _ROWS]]
        total += float((log_sums - wanted).sum())
    if not math.isfinite(total):
        raise DureError(
            "the model gives a token of the text no probability, or logits that aren't numbers",
            fix="look for a damaged model file",
        )
    return total
