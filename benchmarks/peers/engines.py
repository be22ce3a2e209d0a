"""The engines by name: the worker, the virtual environment and the form of model."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from dure.errors import DureError
from dure.models.download import resolve


@dataclass(frozen=True)
class EngineKind:
    """``module`` is the worker; ``form`` the model it reads: ``gguf``, ``q4_0`` or ``onnx``."""

    module: str
    environment: str
    form: str
    label: str


ENGINES: dict[str, EngineKind] = {
    "dure": EngineKind("dure_worker", "dure", "gguf", "dure"),
    "llama.cpp": EngineKind("llama_cpp_worker", "peers", "gguf", "llama.cpp, as shipped"),
    "llama.cpp-q4_0": EngineKind(
        "llama_cpp_worker", "peers", "q4_0", "llama.cpp, requantized Q4_0"
    ),
    "openvino": EngineKind("openvino_worker", "peers", "gguf", "OpenVINO GenAI, reads the GGUF"),
    "onnxruntime": EngineKind("onnxruntime_worker", "peers", "onnx", "ONNX Runtime GenAI, int4"),
    "bandwidth": EngineKind("bandwidth_worker", "dure", "gguf", "read bandwidth"),
    "transformers": EngineKind("transformers_worker", "reference", "gguf", "transformers, float32"),
}


@dataclass(frozen=True)
class Interpreters:
    """The Python of each virtual environment; dure's own is the one that runs the benchmark."""

    peers: str
    reference: str

    def of(self, engine: str) -> str:
        """The interpreter that runs the engine's worker."""
        environment = ENGINES[engine].environment
        return {"dure": sys.executable, "peers": self.peers, "reference": self.reference}[
            environment
        ]

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the two options that name the environments, with defaults from the environment."""
        parser.add_argument(
            "--peers-python",
            default=os.environ.get("DURE_BENCH_PEERS_PYTHON", sys.executable),
            help="the Python that has llama-cpp-python, openvino-genai and onnxruntime-genai",
        )
        parser.add_argument(
            "--reference-python",
            default=os.environ.get("DURE_BENCH_REFERENCE_PYTHON", sys.executable),
            help="the Python that has torch, transformers, accelerate and gguf",
        )


def resolve_model(name: str) -> Path:
    """The GGUF file of a path or of a name of dure's catalogue, pulled where it is missing.

    Raises ``SystemExit`` with dure's own sentence for what is neither.
    """
    try:
        return resolve(name).resolve()
    except DureError as error:
        raise SystemExit(str(error)) from error
