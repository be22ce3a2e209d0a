"""The forms of a model that peers need: GGUF as it is, requantized Q4_0, ONNX int4.

Each is made once, in a folder named after the source file's size and time, under the cache folder.
As a script, run by the interpreter that has the tool for the step::

    python -m peers.prepare q4_0 SOURCE.gguf TARGET.gguf      # llama-cpp-python
    python -m peers.prepare folder SOURCE.gguf FOLDER         # transformers, accelerate
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from peers.client import BENCHMARKS, PeerError
from peers.engines import Interpreters

Q4_0_FILE_TYPE = 2
"""llama.cpp's ``LLAMA_FTYPE_MOSTLY_Q4_0``."""


def form_of(model: Path, form: str, cache: Path, interpreters: Interpreters) -> Path:
    """The path of ``model`` in ``form``, made first when missing.  Raises :class:`PeerError`."""
    if form == "gguf":
        return model
    stat = model.stat()
    folder = cache / f"{model.stem}-{stat.st_size}-{int(stat.st_mtime)}"
    folder.mkdir(parents=True, exist_ok=True)
    if form == "q4_0":
        target = folder / f"{model.stem}-q4_0.gguf"
        if not target.exists():
            partial = target.with_suffix(".partial")
            _run(interpreters.peers, "peers.prepare", "q4_0", str(model), str(partial))
            partial.replace(target)
        return target
    return _onnx(model, folder, interpreters)


def _onnx(model: Path, folder: Path, interpreters: Interpreters) -> Path:
    """ONNX Runtime GenAI's own builder on the weights dequantized to a Hugging Face folder."""
    target, plain = folder / "onnx-int4", folder / "dequantized"
    if (target / "genai_config.json").exists():
        return target
    if not (plain / "config.json").exists():
        _run(interpreters.reference, "peers.prepare", "folder", str(model), str(plain))
    builder = ["-i", str(plain), "-o", str(target), "-p", "int4", "-e", "cpu"]
    builder += ["-c", str(folder / "builder"), "--extra_options", "hf_token=false"]
    _run(interpreters.reference, "onnxruntime_genai.models.builder", *builder)
    return target


def _run(interpreter: str, module: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "HF_HUB_OFFLINE": "1"}
    command = [interpreter, "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        absent = any("ModuleNotFoundError" in line for line in lines[-3:])
        raise PeerError(f"{module} {arguments[0]}: " + " | ".join(lines[-3:]), absent=absent)


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


if __name__ == "__main__":
    {"q4_0": requantize, "folder": dequantize}[sys.argv[1]](sys.argv[2], sys.argv[3])
