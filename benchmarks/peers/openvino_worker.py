"""OpenVINO GenAI: its ``LLMPipeline`` on the CPU, reading a GGUF or a converted folder.

The pipeline times its own tokens; a decode's time is from the first new token to the last.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from peers.protocol import Worker, serve


class OpenVinoWorker(Worker):
    """One pipeline with a fixed number of inference threads."""

    def load(self, model: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        import openvino
        import openvino_genai

        self.openvino = openvino
        self.api = openvino_genai
        self.threads = threads
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.pipeline = openvino_genai.LLMPipeline(model, "CPU", properties)
        self.vocabulary = len(self.pipeline.get_tokenizer().get_vocab())
        return {
            "openvino": openvino.get_version(),
            "openvino-genai": openvino_genai.get_version(),
        }

    def prefill(self, tokens: int) -> float:
        inputs = self._inputs(1, tokens)
        start = time.perf_counter()
        self._generate(inputs, 1)
        return time.perf_counter() - start

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        metrics = self._generate(self._inputs(sequences, context), tokens + 1)
        stamps = metrics.raw_metrics.m_new_token_times
        if len(stamps) != tokens + 1:
            raise RuntimeError(f"{len(stamps)} new tokens instead of {tokens + 1}")
        return (stamps[-1] - stamps[0]) / 1000.0

    def _inputs(self, sequences: int, tokens: int) -> Any:
        ids = np.array([self.random_ids(tokens) for _ in range(sequences)], np.int64)
        tensor = self.openvino.Tensor
        return self.api.TokenizedInputs(tensor(ids), tensor(np.ones_like(ids)))

    def _generate(self, inputs: Any, tokens: int) -> Any:
        configuration = self.api.GenerationConfig()
        configuration.max_new_tokens = tokens
        configuration.min_new_tokens = tokens
        configuration.ignore_eos = True
        configuration.do_sample = False
        return self.pipeline.generate(inputs, configuration).perf_metrics


if __name__ == "__main__":
    serve(OpenVinoWorker())
