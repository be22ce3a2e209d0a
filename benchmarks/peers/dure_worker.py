"""dure itself: its engine in process, by the same protocol as its peers.

Decoding draws greedily from every step's logits, so that dure is charged for its sampling.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from peers.protocol import Worker, serve

if TYPE_CHECKING:
    from dure.serve.kv import Sequence


class DureWorker(Worker):
    """One engine of :mod:`dure.serve.engine`."""

    def load(self, model: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        import dure
        from dure.serve.engine import Engine

        self.threads = threads
        self.engine = Engine.load(model, threads, context, sequences=sequences)
        self.vocabulary = self.engine.vocabulary
        return {"dure": dure.__version__}

    def prefill(self, tokens: int) -> float:
        sequence = self.engine.sequence()
        try:
            ids = np.array(self.random_ids(tokens), np.int32)
            start = time.perf_counter()
            self.engine.prefill(sequence, ids).argmax()
            return time.perf_counter() - start
        finally:
            self.engine.release(sequence)

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        from dure.serve.work import BatchEntry

        live: list[Sequence] = []
        try:
            heads: list[int] = []
            for _ in range(sequences):
                live.append(self.engine.sequence())
                ids = np.array(self.random_ids(context), np.int32)
                heads.append(int(self.engine.prefill(live[-1], ids).argmax()))
            start = time.perf_counter()
            for _ in range(tokens):
                entries = [
                    BatchEntry(sequence, np.array([token], np.int32), (0,))
                    for sequence, token in zip(live, heads, strict=True)
                ]
                heads = self.engine.step(entries).argmax(axis=-1).tolist()
            return time.perf_counter() - start
        finally:
            for sequence in live:
                self.engine.release(sequence)

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.engine.logits(ids)

    def tokenize(self, text: str) -> list[int]:
        return self.engine.tokenizer.encode(text, add_special=False, parse_special=False)


if __name__ == "__main__":
    serve(DureWorker())
