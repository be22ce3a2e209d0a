"""The forms of a model that peers need: GGUF as it is, requantized Q4_0, ONNX int4.

Each is made once by :mod:`peers.convert`, in a folder named after the source file's size and time.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from peers.client import BENCHMARKS, PeerError
from peers.engines import Interpreters


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
            _run(interpreters.peers, "peers.convert", "q4_0", str(model), str(partial))
            partial.replace(target)
        return target
    return _onnx(model, folder, interpreters)


def _onnx(model: Path, folder: Path, interpreters: Interpreters) -> Path:
    """ONNX Runtime GenAI's own builder on the weights dequantized to a Hugging Face folder."""
    target, plain = folder / "onnx-int4", folder / "dequantized"
    if (target / "genai_config.json").exists():
        return target
    if not (plain / "config.json").exists():
        _run(interpreters.reference, "peers.convert", "folder", str(model), str(plain))
    _run(interpreters.reference, "peers.convert", "onnx", str(plain), str(target))
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
