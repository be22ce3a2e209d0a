"""What every command with a model does: find it, load the engine, generate text."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dure import settings
from dure.cli.output import say
from dure.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dure.serve.sampler import SamplingParams
    from dure.serve.tokenizer import Tokenizer


class Stats(Protocol):
    """The counts and times (seconds) of the last generation."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def prefill_s(self) -> float: ...
    @property
    def decode_s(self) -> float: ...
    @property
    def first_token_s(self) -> float: ...


class Engine(Protocol):
    """What the commands need of :class:`dure.serve.engine.Engine`."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def architecture(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    @property
    def load_s(self) -> float: ...
    @property
    def threads(self) -> int: ...
    @property
    def stats(self) -> Stats: ...
    def generate(
        self, prompt_ids: list[int], params: SamplingParams, max_tokens: int
    ) -> Iterator[int]: ...
    def logits(self, ids: list[int]) -> NDArray[np.float32]: ...
    def bench(self, *, prompt: int, gen: int, batch: int, repeats: int) -> dict[str, object]: ...
    def close(self) -> None: ...


Loader = Callable[[Path, int | None, int | None], Engine]


def load_engine(path: Path, threads: int | None, context: int | None) -> Engine:
    """The real engine for a GGUF file.  Tests put another loader in this function's place."""
    from dure.serve.engine import Engine as RealEngine

    return RealEngine.load(path, threads=threads, context=context)


@contextmanager
def opened(
    model: str, threads: int | None, context: int | None, *, quiet: bool
) -> Generator[Engine]:
    """The engine for MODEL, pulled where it is missing and closed at the end, whatever happens.

    ``quiet`` leaves the progress bar away; sentences still go to standard error.
    """
    path = located(model, quiet=quiet)
    engine = load_engine(path, workers(threads), context)
    try:
        yield engine
    finally:
        engine.close()


def located(model: str, *, quiet: bool) -> Path:
    """The file of MODEL, pulled where it is missing."""
    from dure.models.download import resolve
    from dure.models.progress import Terminal

    with Terminal(bar=not quiet) as progress:
        return resolve(model, progress)


def workers(threads: int | None) -> int | None:
    """The threads that were asked for, here or in the environment; says where they take turns."""
    threads = settings.threads() if threads is None else threads
    if threads is not None and threads > available_cores():
        say(f"note: {threads} threads share {available_cores()} cores and will take turns")
    return threads


def available_cores() -> int:
    """The logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Completion:
    """A finished generation; ``stop`` is "end" (the model's own), "length" (-n) or "context"."""

    text: str
    token_ids: list[int]
    stop: str


def complete(
    engine: Engine,
    prompt_ids: list[int],
    params: SamplingParams,
    max_tokens: int,
    show: Callable[[str], None],
) -> Completion:
    """Generate after ``prompt_ids``, which fit the context; ``show`` gets the text as it comes."""
    from dure.serve.tokenizer import Detokenizer

    room = engine.context_length - len(prompt_ids)
    limit = min(max_tokens, room)
    detokenizer = Detokenizer(engine.tokenizer)
    token_ids: list[int] = []
    pieces: list[str] = []
    stop = "length" if limit == max_tokens else "context"
    for token in engine.generate(prompt_ids, params, limit):
        if token in engine.tokenizer.eos_ids:
            stop = "end"
            break
        token_ids.append(token)
        pieces.append(detokenizer.push(token))
        show(pieces[-1])
    else:
        if len(token_ids) < limit:
            stop = "end"
    pieces.append(detokenizer.flush())
    show(pieces[-1])
    return Completion("".join(pieces), token_ids, stop)


def rate(tokens: int, seconds: float) -> float | None:
    """Tokens per second; None where nothing was measured."""
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def too_long(tokens: int, context: int) -> UsageError:
    """The error for a prompt that leaves no room for an answer."""
    return UsageError(
        f"the prompt has {tokens} tokens, and the context holds {context} including the answer",
        rule="a prompt has to be shorter than the context",
        fix="shorten it, let --truncate cut its beginning off, or raise --context",
    )
