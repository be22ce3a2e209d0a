"""dure itself: its engine in process, by the same protocol as its peers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from peers.protocol import Worker, serve


class DureWorker(Worker):
    """One engine of :mod:`dure.serve.engine`."""

    def load(self, model: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        from dure.serve.engine import Engine

        import dure

        self.threads = threads
        self.engine = Engine.load(
            model, threads=threads, max_sequences=sequences, max_context=context
        )
        self.vocabulary = self.engine.vocabulary
        return {"dure": dure.__version__}

    def prefill(self, tokens: int) -> float:
        return tokens / self.engine.bench(prompt=tokens, gen=1, batch=1).prefill_tok_s

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        result = self.engine.bench(prompt=context, gen=tokens, batch=sequences)
        return sequences * tokens / result.decode_tok_s

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.engine.logits(np.array(ids, np.int32))

    def tokenize(self, text: str) -> list[int]:
        return list(self.engine.tokenizer.encode(text))

    def first_token(self, tokens: int) -> float:
        start = time.perf_counter()
        self.engine.bench(prompt=tokens, gen=1, batch=1)
        return time.perf_counter() - start


if __name__ == "__main__":
    serve(DureWorker())
