"""The worker's side of the conversation between a benchmark and one inference engine.

A worker is a process that holds one model in one engine with a fixed number of threads.  It reads
requests from standard input and answers on standard output, one JSON object a line; everything that
the engine prints itself goes to standard error.  Only the standard library and NumPy are used here,
so that a worker runs in any virtual environment that has its engine.

Requests are ``{"op": NAME, ...arguments}``; answers ``{"ok": true, ...}`` or
``{"ok": false, "error": TEXT, "absent": BOOL}``.  The operations of an LLM's engine are
:class:`Worker`'s methods.  Every prompt is made of fresh random token ids, so that no engine can
answer from a prefix cache.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PROMPT_FLOOR = 300
"""Random prompts avoid the ids below this one, where vocabularies keep their control tokens."""


class Unsupported(Exception):
    """The engine has no way to do what was asked."""


class Service(ABC):
    """What a worker process offers.  NumPy is imported after ``load``, with threads pinned."""

    @abstractmethod
    def answer(self, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request; the first one is ``load``."""


class Worker(Service):
    """One model in one engine.  Times are wall-clock seconds, rates are left to the benchmark."""

    threads: int
    vocabulary: int

    def __init__(self) -> None:
        self._random = random.Random(os.urandom(16))

    @abstractmethod
    def load(self, model: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        """Load ``model`` for up to ``sequences`` streams of ``context`` tokens; return versions."""

    @abstractmethod
    def prefill(self, tokens: int) -> float:
        """Seconds to read one fresh prompt of ``tokens`` tokens up to its last token's logits."""

    @abstractmethod
    def decode(self, sequences: int, context: int, tokens: int) -> float:
        """Seconds for ``tokens`` steps of ``sequences`` streams, each ``context`` long before."""

    def first_token(self, tokens: int) -> float:
        """Seconds from a fresh prompt of ``tokens`` tokens to the first new token."""
        return self.prefill(tokens)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits ``[len(ids), vocabulary]`` float32 after each token of a sequence read afresh."""
        raise Unsupported("this engine does not return the logits of every position")

    def tokenize(self, text: str) -> list[int]:
        """The text's tokens, without any that the engine would add around it."""
        raise Unsupported("this engine's tokenizer is not wired up")

    def greedy(self, messages: list[dict[str, str]], tokens: int) -> dict[str, Any]:
        """Up to ``tokens`` greedy tokens of a chat: keys prompt, prompt_ids, ids, text."""
        raise Unsupported("greedy generation is not wired up for this engine")

    def bandwidth(self, size: int) -> float:
        """Read bandwidth in bytes/s over a buffer of ``size`` bytes with this worker's threads."""
        raise Unsupported("this engine does not measure bandwidth")

    def random_ids(self, count: int) -> list[int]:
        """``count`` fresh token ids that are no control tokens."""
        floor = min(PROMPT_FLOOR, self.vocabulary // 2)
        return [self._random.randrange(floor, self.vocabulary) for _ in range(count)]

    def answer(self, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if op == "load":
            start = time.perf_counter()
            versions = self.load(**arguments)
            seconds = time.perf_counter() - start
            return {"seconds": seconds, "versions": versions, "vocabulary": self.vocabulary}
        if op in ("prefill", "decode", "first_token"):
            return {"seconds": getattr(self, op)(**arguments)}
        if op == "bandwidth":
            return {"bytes_per_second": self.bandwidth(**arguments)}
        if op == "logits":
            import numpy as np

            path = arguments.pop("path")
            np.save(path, self.logits(**arguments))
            return {"path": path}
        if op == "tokenize":
            return {"ids": self.tokenize(**arguments)}
        if op == "greedy":
            return self.greedy(**arguments)
        raise Unsupported(f"no operation named {op!r}")


def serve(service: Service) -> None:
    """Answer requests until standard input closes."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"ok": True, **_answer(service, request)}
        except ImportError as error:
            answer = {"ok": False, "absent": True, "error": str(error)}
        except Exception as error:
            answer = {"ok": False, "absent": False, "error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def _answer(service: Service, request: dict[str, Any]) -> dict[str, Any]:
    op = request.pop("op")
    if op == "memory":
        return {"peak_bytes": _peak_bytes()}
    if op == "load":
        _pin(request.pop("processors"), request.pop("realtime"))
    return service.answer(op, request)


def _pin(processors: list[int], realtime: bool) -> None:
    """Keep this process on ``processors``, and before all ordinary ones when ``realtime``.

    Called before the engine is imported, so that its threads inherit both.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, processors)
        if realtime:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def _peak_bytes() -> int:
    """The largest resident set so far, from the kernel's account of this process."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
