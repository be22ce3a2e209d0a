"""llama.cpp through llama-cpp-python's C bindings, fed token by token as ``llama-bench`` does.

Decoding feeds random tokens and draws no sample, so that the engine is charged for its forward pass
and the copy of the logits alone.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np

from peers.protocol import Unsupported, Worker, serve

PHYSICAL_BATCH = 512


class LlamaCppWorker(Worker):
    """One llama.cpp context; sequences share its KV cache."""

    def load(self, model: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        import llama_cpp as api

        self.api = api
        self.threads = threads
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(model.encode(), parameters)
        if not self.model:
            raise Unsupported(f"llama.cpp does not load {model}")
        self.vocabulary_handle = api.llama_model_get_vocab(self.model)
        self.vocabulary = api.llama_vocab_n_tokens(self.vocabulary_handle)
        settings = api.llama_context_default_params()
        settings.n_ctx = sequences * context
        settings.n_batch = max(PHYSICAL_BATCH, sequences * context)
        settings.n_ubatch = PHYSICAL_BATCH
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise Unsupported("llama.cpp does not make a context of that size")
        self.batch = api.llama_batch_init(settings.n_batch, 0, 1)
        return {
            "llama-cpp-python": api.__version__,
            "build": api.llama_print_system_info().decode().strip(),
        }

    def prefill(self, tokens: int) -> float:
        self._clear()
        ids = self.random_ids(tokens)
        start = time.perf_counter()
        self._run([(0, position, token) for position, token in enumerate(ids)], last_only=True)
        return time.perf_counter() - start

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        self._clear()
        for sequence in range(sequences):
            ids = self.random_ids(context)
            entries = [(sequence, position, token) for position, token in enumerate(ids)]
            self._run(entries, last_only=True)
        steps = [self.random_ids(sequences) for _ in range(tokens)]
        start = time.perf_counter()
        for offset, ids in enumerate(steps):
            self._run([(sequence, context + offset, token) for sequence, token in enumerate(ids)])
        return time.perf_counter() - start

    def logits(self, ids: list[int]) -> np.ndarray:
        self._clear()
        self._run([(0, position, token) for position, token in enumerate(ids)])
        rows = np.empty((len(ids), self.vocabulary), np.float32)
        for row in range(len(ids)):
            pointer = self.api.llama_get_logits_ith(self.context, row)
            rows[row] = np.ctypeslib.as_array(pointer, (self.vocabulary,))
        return rows

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = self.api.llama_tokenize(
            self.vocabulary_handle, data, len(data), room, len(room), False, False
        )
        return list(room[:count])

    def _clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def _run(self, entries: list[tuple[int, int, int]], *, last_only: bool = False) -> None:
        """One call of the engine on ``(sequence, position, token)`` entries, waiting for it."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for row, (sequence, position, token) in enumerate(entries):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = not last_only or row == len(entries) - 1
        status = self.api.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self.api.llama_synchronize(self.context)


if __name__ == "__main__":
    serve(LlamaCppWorker())
