"""``dure`` as a process: signals, pipes, bytes and encodings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

SLOW_ENGINE = """
    import sys, time
    from types import SimpleNamespace
    sys.path.insert(0, {tests!r})
    from test_commands import FakeEngine
    from dure.cli import main, session

    class Slow(FakeEngine):
        def generate(self, prompt_ids, params, max_tokens):
            while True:
                yield ord("a")
                time.sleep(0.01)

    session.load_engine = lambda path, threads, context: Slow(threads, 10**6)
    main.main()
"""


def start(*arguments: str | bytes, **options: object) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONUTF8": "0"} | dict(options.pop("env", {}) or {})
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **(streams | options))


def dure(*arguments: str | bytes, **options: object) -> tuple[int, bytes, bytes]:
    process = start("-m", "dure.cli.main", *arguments, **options)
    out, err = process.communicate(timeout=30)
    return process.returncode, out or b"", err or b""


def slow_run(tmp_path: Path, *arguments: str, **options: object) -> subprocess.Popen[bytes]:
    """``dure run`` with an engine that never comes to an end."""
    (tmp_path / "toy.gguf").write_bytes(b"GGUF")
    script = textwrap.dedent(SLOW_ENGINE).format(tests=str(Path(__file__).parent))
    command = ("-c", script, "run", str(tmp_path / "toy.gguf"), "hello", "-n", "100000")
    return start(*command, *arguments, **options)


def test_ctrl_c(tmp_path: Path) -> None:
    process = slow_run(tmp_path)
    assert process.stdout is not None
    assert process.stdout.read(5) == b"aaaaa"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert err.endswith(b"dure: interrupted\n")


def test_ctrl_c_in_a_chat_that_waits_for_input(tmp_path: Path) -> None:
    (tmp_path / "toy.gguf").write_bytes(b"GGUF")
    script = textwrap.dedent(SLOW_ENGINE).format(tests=str(Path(__file__).parent))
    process = start(
        "-c", script, "chat", str(tmp_path / "toy.gguf"), "--threads", "999", stdin=subprocess.PIPE
    )
    assert process.stderr is not None
    assert b"take turns" in process.stderr.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, b"dure: interrupted\n")


def test_a_closed_pipe(tmp_path: Path) -> None:
    process = slow_run(tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(3)
    process.stdout.close()
    assert process.wait(10) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_full_device(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        return  # only Linux has one
    with Path("/dev/full").open("w") as full:
        code, _, err = dure("models", stdout=full)
    assert code == 2
    assert b"can't be written to standard output: No space left on device" in err
    assert b"Traceback" not in err


def test_streams_that_are_closed() -> None:
    code = subprocess.call(
        ["/bin/sh", "-c", f"{sys.executable} -m dure.cli.main models >&- 2>&- <&-"], timeout=30
    )
    assert code == 0


def test_a_prompt_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "toy.gguf").write_bytes(b"GGUF")
    model = os.fsencode(tmp_path / "toy.gguf")
    for locale in ("C.UTF-8", "C"):
        code, out, err = dure("run", model, b"ab\xff\xfe", env={"LC_ALL": locale})
        assert (code, out) == (2, b"")
        assert b"the prompt is not valid UTF-8: byte 0xff at character 2" in err
        assert b"Traceback" not in err


@pytest.mark.parametrize("name", [b"\xff\xfe", "하늘".encode(), b"a\x1b[31m"])
def test_model_names_that_no_terminal_shows(name: bytes) -> None:
    code, out, err = dure("run", name, "x", env={"PYTHONIOENCODING": "ascii"})
    assert (code, out) == (2, b"")
    assert b"there is no model named" in err
    assert b"Traceback" not in err and b"\x1b" not in err


def test_json_in_an_encoding_without_the_letters(tmp_path: Path) -> None:
    folder = tmp_path / "하늘"
    for encoding in ("utf-8", "ascii"):
        environment = {"PYTHONIOENCODING": encoding, "DURE_CACHE_DIR": str(folder)}
        code, out, _ = dure("models", "--json", env=environment)
        assert code == 0
        assert json.loads(out)["models"][0]["path"] == str(folder / "models" / "smollm2.gguf")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dure.cli.app import build; build();"
        "print([m for m in ('numpy', 'rich', 'jinja2', 'tokenizers', 'huggingface_hub',"
        " 'llvmlite') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
