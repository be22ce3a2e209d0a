"""ONNX Runtime GenAI on a folder made by its own model builder (int4 weights, CPU provider)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from peers.protocol import Worker, serve


class OnnxRuntimeWorker(Worker):
    """One model; a generator is made anew for every measurement, outside the time taken."""

    def load(self, model: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        import onnxruntime_genai

        self.api = onnxruntime_genai
        self.threads = threads
        self.length = context
        description = json.loads((Path(model) / "genai_config.json").read_text())
        self.vocabulary = description["model"]["vocab_size"]
        configuration = onnxruntime_genai.Config(model)
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        overlay = {"model": {"decoder": {"session_options": options}}}
        configuration.overlay(json.dumps(overlay))
        self.model = onnxruntime_genai.Model(configuration)
        return {"onnxruntime-genai": onnxruntime_genai.__version__}

    def prefill(self, tokens: int) -> float:
        generator = self._generator(1)
        ids = self._ids(1, tokens)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        return time.perf_counter() - start

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        generator = self._generator(sequences)
        generator.append_tokens(self._ids(sequences, context))
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return time.perf_counter() - start

    def _ids(self, sequences: int, tokens: int) -> np.ndarray:
        return np.array([self.random_ids(tokens) for _ in range(sequences)], np.int32)

    def _generator(self, sequences: int) -> Any:
        """A generator of the context loaded for; a model with a window takes no shorter one."""
        parameters = self.api.GeneratorParams(self.model)
        parameters.set_search_options(
            max_length=self.length, min_length=self.length, batch_size=sequences, do_sample=False
        )
        return self.api.Generator(self.model, parameters)


if __name__ == "__main__":
    serve(OnnxRuntimeWorker())
