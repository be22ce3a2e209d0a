"""One step of a model's conversion, run by the interpreter that has the tool for it::

python -m peers.convert q4_0 SOURCE.gguf TARGET.gguf      # llama-cpp-python
python -m peers.convert folder SOURCE.gguf FOLDER         # transformers, accelerate
python -m peers.convert onnx FOLDER TARGET                # onnxruntime-genai, onnx_ir
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

Q4_0_FILE_TYPE = 2
"""llama.cpp's ``LLAMA_FTYPE_MOSTLY_Q4_0``."""


def requantize(source: str, target: str) -> None:
    """llama.cpp's own quantizer, from whatever the file has to Q4_0."""
    import ctypes

    import llama_cpp as api

    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = Q4_0_FILE_TYPE
    parameters.allow_requantize = True
    parameters.nthread = 2
    status = api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    if status != 0:
        raise SystemExit(f"llama_model_quantize returned {status}")


def dequantize(source: str, target: str) -> None:
    """Save the GGUF's weights in float32 as a Hugging Face folder with its tokenizer."""
    import torch
    import transformers

    folder, name = str(Path(source).parent), Path(source).name
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    configuration = loaded.config
    if hasattr(configuration, "quantization_config"):
        del configuration.quantization_config
    plain = auto.from_config(configuration, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)


def build_onnx(source: str, target: str) -> None:
    """ONNX Runtime GenAI's builder with int4 weights for the CPU, on a Hugging Face folder.

    The builder reads one rope for the whole model and Gemma 3's local base under the name that
    configurations had before ``transformers`` 5, so it is handed them in that form.
    """
    import runpy

    import transformers

    read = transformers.AutoConfig.from_pretrained

    def read_flat(*arguments: Any, **options: Any) -> Any:
        configuration = read(*arguments, **options)
        ropes = getattr(configuration, "rope_parameters", None)
        if isinstance(ropes, dict) and "full_attention" in ropes:
            configuration.rope_local_base_freq = ropes["sliding_attention"]["rope_theta"]
            configuration.rope_parameters = ropes["full_attention"]
        return configuration

    with tempfile.TemporaryDirectory() as cache:
        transformers.AutoConfig.from_pretrained = read_flat
        sys.argv = ["builder", "-i", source, "-o", target, "-p", "int4", "-e", "cpu"]
        sys.argv += ["-c", cache, "--extra_options", "hf_token=false"]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


if __name__ == "__main__":
    steps = {"q4_0": requantize, "folder": dequantize, "onnx": build_onnx}
    steps[sys.argv[1]](sys.argv[2], sys.argv[3])
