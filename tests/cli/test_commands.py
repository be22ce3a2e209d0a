"""The commands, with an engine that is no model: what they print, and how they end."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dure.cli import session
from dure.cli.main import run
from dure.errors import ModelFileError
from dure.serve.sampler import SamplingParams
from dure.serve.tokenizer import Tokenizer

END = 256
BEGIN = 257
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Bytes:
    """A tokenizer's backend with one token a byte, an end and a beginning."""

    add_bos = False
    add_eos = False
    strips_space = False
    bos_ids = (BEGIN,)
    eos_ids = (END,)
    vocab_size = 258

    def encode(self, text: str, parse_special: bool) -> list[int]:
        return list(text.encode())

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def is_special(self, token: int) -> bool:
        return token >= 256


@dataclass
class Stats:
    prompt_tokens: int = 0
    tokens: int = 0
    prefill_s: float = 0.5
    decode_s: float = 0.25
    first_token_s: float = 0.6


class FakeEngine:
    """Answers with a fixed text; remembers what it was asked."""

    architecture = "llama"
    load_s = 0.125

    def __init__(self, threads: int | None, context: int | None) -> None:
        self.tokenizer = Tokenizer(Bytes(), frozenset([END]), TEMPLATE)
        self.threads = threads or 2
        self.context_length = context or 2048
        self.answer = "It scatters: 하늘."
        self.interrupt_after: int | None = None
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.closed = 0
        self.stats = Stats()

    def generate(
        self, prompt_ids: list[int], params: SamplingParams, max_tokens: int
    ) -> Iterator[int]:
        self.prompts.append(self.tokenizer.decode(prompt_ids))
        self.params.append(params)
        self.stats = Stats(prompt_tokens=len(prompt_ids))
        for token in [*self.answer.encode(), END][:max_tokens]:
            if self.stats.tokens == self.interrupt_after:
                raise KeyboardInterrupt
            self.stats.tokens += 1
            yield token

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        random = np.random.default_rng(ids)
        return random.normal(size=(len(ids), 258)).astype(np.float32)

    def bench(self, *, prompt: int, gen: int, batch: int, repeats: int) -> dict[str, object]:
        return {"prefill_tok_s": prompt * 2.0, "decode_tok_s": gen * 2.0, "read_gb_s": 10.0}

    def close(self) -> None:
        self.closed += 1


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.out.count("\n") == 1
        return json.loads(self.out)


Command = Callable[..., Ended]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """The engines that commands open; the first one is there from the start, to be set up."""
    made = [FakeEngine(None, None)]

    def load(path: Path, threads: int | None, context: int | None) -> FakeEngine:
        engine = made[0]
        engine.threads = threads or engine.threads
        engine.context_length = context or engine.context_length
        return engine

    monkeypatch.setattr(session, "load_engine", load)
    return made


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    path = tmp_path / "toy.gguf"
    path.write_bytes(b"GGUF")
    return str(path)


@pytest.fixture
def dure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def command(*arguments: str, stdin: bytes = b"") -> Ended:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = run(arguments)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return command


def test_run_streams_the_answer(dure: Command, gguf: str, engines: list[FakeEngine]) -> None:
    ended = dure("run", gguf, "Why?", "--seed", "7")
    assert (ended.code, ended.out) == (0, "It scatters: 하늘.\n")
    assert engines[0].prompts == ["[user]Why?\n[assistant]"]
    assert "seed 7" in ended.err
    assert engines[0].closed == 1


def test_run_json(dure: Command, gguf: str, engines: list[FakeEngine]) -> None:
    result = dure("run", gguf, "Why?", "--json", "--threads", "1", "--seed", "3").json
    assert result == {
        "model": gguf,
        "text": "It scatters: 하늘.",
        "tokens": 20,
        "prompt_tokens": 22,
        "stop": "end",
        "prefill_tok_s": 44.0,
        "decode_tok_s": 80.0,
        "load_s": 0.125,
        "first_token_s": 0.6,
        "threads": 1,
        "seed": 3,
    }


def test_run_passes_the_options_on(dure: Command, gguf: str, engines: list[FakeEngine]) -> None:
    options = "--temperature 0.5 --top-k 9 --top-p 0.8 --min-p 0.1 --repetition-penalty 1.2"
    ended = dure(
        "run", gguf, "a", "-n", "5", *options.split(), "--presence-penalty", "0.5", "--json"
    )
    assert (ended.json["text"], ended.json["stop"]) == ("It sc", "length")
    params = engines[0].params[0]
    assert params == SamplingParams(0.5, 9, 0.8, 0.1, 1.2, 0.5, ended.json["seed"])


def test_run_raw_and_base_models(dure: Command, gguf: str, engines: list[FakeEngine]) -> None:
    dure("run", gguf, "Once", "--raw")
    engines[0].tokenizer.chat_template = None
    dure("run", gguf, "upon")
    assert engines[0].prompts == ["Once", "upon"]


def test_run_reads_standard_input(dure: Command, gguf: str, engines: list[FakeEngine]) -> None:
    assert dure("run", gguf, "-", "--raw", stdin="하늘\n".encode()).code == 0
    assert engines[0].prompts == ["하늘\n"]


def test_an_unfinished_character_at_the_end(
    dure: Command, gguf: str, engines: list[FakeEngine]
) -> None:
    assert dure("run", gguf, "a", "-n", "14", "--json").json["text"] == "It scatters: \ufffd"


def test_a_prompt_longer_than_the_context(
    dure: Command, gguf: str, engines: list[FakeEngine]
) -> None:
    ended = dure("run", gguf, "x" * 60, "--context", "40", "--raw")
    assert ended.code == 2
    assert "the prompt has 60 tokens, and the context holds 40" in ended.err
    assert "--truncate" in ended.err
    words = "".join(chr(ord("a") + i % 26) for i in range(60))
    ended = dure("run", gguf, words, "--context", "40", "-n", "8", "--truncate", "--json")
    assert ended.code == 0
    prompt = engines[0].prompts[-1]
    assert prompt == f"[user]{words[-14:]}\n[assistant]"
    assert "first 46 of 60 tokens were cut off" in ended.err
    assert (ended.json["tokens"], ended.json["stop"]) == (8, "length")


def test_truncating_cannot_mend_a_context_smaller_than_the_template(
    dure: Command, gguf: str, engines: list[FakeEngine]
) -> None:
    ended = dure("run", gguf, "x" * 60, "--context", "10", "--truncate")
    assert ended.code == 2
    assert "the context holds 10" in ended.err


def test_the_answer_stops_at_the_end_of_the_context(
    dure: Command, gguf: str, engines: list[FakeEngine]
) -> None:
    ended = dure("run", gguf, "x" * 35, "--context", "40", "--raw", "--json")
    assert (ended.json["tokens"], ended.json["stop"]) == (5, "context")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "{gguf}", ""], "the prompt is empty"),
        (["run", "{gguf}", "-"], "the prompt is empty"),
        (["run", "{gguf}", "ab\udcff"], "not valid UTF-8: byte 0xff at character 2"),
        (["run", "{gguf}", "a\ud800"], "a lone surrogate"),
        (["run", "{gguf}", "a", "--temperature", "-1"], "temperature = -1.0 can't be used"),
        (["run", "{gguf}", "a", "--top-p", "0"], "top_p = 0.0 can't be used"),
        (["run", "{gguf}", "a", "--seed", "-1"], "seed = -1 can't be used"),
        (["run", "{gguf}", "a", "--seed", "x"], "Invalid value for '--seed'"),
        (["run", "{gguf}", "a", "-n", "0"], "Invalid value for '-n'"),
        (["run", "{gguf}", "a", "--threads", "0"], "Invalid value for '--threads'"),
        (["run", "{gguf}"], "Missing argument"),
        (["run", "smolm2", "a"], "did you mean smollm2?"),
        (["run", "/nowhere/a.gguf", "a"], "there is no file at /nowhere/a.gguf"),
        (["pull", "nothing"], "no model named 'nothing'"),
        (["frobnicate"], "No such command"),
        (["run", "{gguf}", "a", "--frobnicate"], "No such option"),
        (["chat", "{gguf}", "--system", "\udcff"], "the system prompt is not valid UTF-8"),
        (["perplexity", "{gguf}", "/nowhere/text"], "can't be read: No such file"),
        (["perplexity", "{gguf}", "{gguf}", "--window", "1"], "Invalid value for '--window'"),
        (["bench", "llm", "{gguf}", "--prompt", "4000"], "don't fit the context of 2048"),
    ],
)
def test_what_the_user_got_wrong(
    dure: Command, gguf: str, engines: list[FakeEngine], arguments: list[str], said: str
) -> None:
    for extra in ([], ["--json"]):
        ended = dure(*(argument.format(gguf=gguf) for argument in arguments), *extra)
        assert ended.code == 2
        assert ended.out == ""
        assert said in ended.err
        assert "fix:" in ended.err
        assert "Traceback" not in ended.err


def test_errors_of_the_engine_are_the_users_to_see(
    dure: Command, gguf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ModelFileError("the file ends too early", where="toy.gguf", fix="pull it again")

    monkeypatch.setattr(session, "load_engine", fail)
    ended = dure("run", gguf, "a")
    assert ended.code == 2
    assert ended.err.splitlines()[-3:] == [
        "dure: the file ends too early",
        "  where: toy.gguf",
        "  fix: pull it again",
    ]


def test_more_threads_than_cores(dure: Command, gguf: str, engines: list[FakeEngine]) -> None:
    ended = dure("run", gguf, "a", "--threads", "1000", "--json")
    assert (ended.code, ended.json["threads"]) == (0, 1000)
    assert "1000 threads share" in ended.err


def test_threads_from_the_environment(
    dure: Command, gguf: str, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DURE_THREADS", "1")
    assert dure("run", gguf, "a", "--json").json["threads"] == 1
    monkeypatch.setenv("DURE_THREADS", "many")
    ended = dure("run", gguf, "a", "--json")
    assert ended.code == 2
    assert "DURE_THREADS=many" in ended.err


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_while_generating(
    dure: Command, gguf: str, engines: list[FakeEngine], as_json: bool
) -> None:
    engines[0].interrupt_after = 3
    ended = dure("run", gguf, "a", *(["--json"] if as_json else []))
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert engines[0].closed == 1


def test_chat(dure: Command, gguf: str, engines: list[FakeEngine]) -> None:
    ended = dure(
        "chat", gguf, "--system", "Be brief.", stdin=b"one\n\ntwo\n/clear\nthree\n/exit\nfour\n"
    )
    assert ended.code == 0
    assert ended.out == "It scatters: 하늘.\n" * 3
    system, answer = "[system]Be brief.\n", "[assistant]It scatters: 하늘.\n"
    assert engines[0].prompts == [
        f"{system}[user]one\n[assistant]",
        f"{system}[user]one\n{answer}[user]two\n[assistant]",
        f"{system}[user]three\n[assistant]",
    ]


def test_chat_json(dure: Command, gguf: str, engines: list[FakeEngine]) -> None:
    result = dure("chat", gguf, "--json", stdin=b"one\ntwo").json
    assert [turn["user"] for turn in result["turns"]] == ["one", "two"]
    assert {"text", "tokens", "decode_tok_s"} <= result["turns"][0].keys()


def test_chat_with_a_base_model(dure: Command, gguf: str, engines: list[FakeEngine]) -> None:
    engines[0].tokenizer.chat_template = None
    ended = dure("chat", gguf, stdin=b"one\n")
    assert ended.code == 2
    assert "has no chat template" in ended.err


def test_chat_forgets_what_does_not_fit(
    dure: Command, gguf: str, engines: list[FakeEngine]
) -> None:
    ended = dure("chat", gguf, "--context", "90", stdin=b"one\ntwo\nthree\n")
    assert ended.code == 0
    assert "forgotten" in ended.err
    assert engines[0].prompts[-1].startswith("[user]two")
    ended = dure("chat", gguf, "--context", "90", stdin=b"x" * 100)
    assert ended.code == 2
    assert "the context holds 90" in ended.err


def test_chat_refuses_what_is_not_text(dure: Command, gguf: str, engines: list[FakeEngine]) -> None:
    ended = dure("chat", gguf, stdin=b"a\xff\n")
    assert ended.code == 2
    assert "byte 0xff at offset 1" in ended.err


def test_bench(dure: Command, gguf: str, engines: list[FakeEngine]) -> None:
    arguments = ["bench", "llm", gguf, "--prompt", "100", "--gen", "10", "--batch", "2"]
    result = dure(*arguments, "--threads", "2", "--json").json
    assert result["prefill_tok_s"] == 200.0
    assert result["decode_tok_s"] == 20.0
    assert (result["prompt"], result["gen"], result["batch"]) == (100, 10, 2)
    ended = dure(*arguments)
    assert "prefill_tok_s" in ended.out


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("length", [50, 64, 129])
def test_perplexity(
    dure: Command,
    gguf: str,
    engines: list[FakeEngine],
    tmp_path: Path,
    add_bos: bool,
    length: int,
) -> None:
    """Against the definition, token by token in plain Python."""
    engine = engines[0]
    engine.tokenizer.add_bos = add_bos
    ids = [97 + (i * i) % 26 for i in range(length)]
    file = tmp_path / "prose.txt"
    file.write_bytes(bytes(ids))
    losses: list[float] = []
    for start in range(0, length, 64):
        window = ids[start : start + 64]
        given = [BEGIN, *window] if add_bos else window
        logits = engine.logits(given).astype(float)
        for index in range(1, len(window)):
            row = logits[index + add_bos - 1]
            losses.append(math.log(sum(math.exp(x) for x in row)) - row[window[index]])
    result = dure("perplexity", gguf, str(file), "--window", "64", "--json").json
    assert result["tokens_scored"] == len(losses)
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-9)
    assert result["tokens"] == length
    assert "perplexity" in dure("perplexity", gguf, str(file), "--window", "64").out


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b"a", "has 1 token"), (b"ab\xc3(", "byte 0xc3 at offset 2")],
)
def test_texts_without_a_perplexity(
    dure: Command, gguf: str, engines: list[FakeEngine], tmp_path: Path, content: bytes, said: str
) -> None:
    file = tmp_path / "text"
    file.write_bytes(content)
    ended = dure("perplexity", gguf, str(file))
    assert ended.code == 2
    assert said in ended.err


def test_a_window_longer_than_the_context(
    dure: Command, gguf: str, engines: list[FakeEngine], tmp_path: Path
) -> None:
    file = tmp_path / "text"
    file.write_text("a" * 5000)
    ended = dure("perplexity", gguf, str(file), "--window", "4000")
    assert ended.code == 2
    assert "use --window 2048 or less" in ended.err


def test_logits_that_are_no_numbers(
    dure: Command,
    gguf: str,
    engines: list[FakeEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "text"
    file.write_text("abcd")
    monkeypatch.setattr(
        engines[0], "logits", lambda ids: np.full((len(ids), 258), np.nan, np.float32)
    )
    ended = dure("perplexity", gguf, str(file))
    assert ended.code == 2
    assert "aren't numbers" in ended.err


def test_models(dure: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURE_CACHE_DIR", str(tmp_path))
    result = dure("models", "--json").json
    assert [entry["name"] for entry in result["models"]] == ["smollm2", "gemma3-270m"]
    assert not any(entry["downloaded"] for entry in result["models"])
    assert "smollm2" in dure("models").out


def test_targets(dure: Command) -> None:
    for target in dure("targets", "--json").json["targets"]:
        assert target.keys() == {"name", "kind", "summary", "features", "numbers"}
        assert all(number["source"] for number in target["numbers"].values())
        assert target["name"] in dure("targets").out


def test_cache(dure: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURE_CACHE_DIR", str(tmp_path))
    model = tmp_path / "models" / "smollm2.gguf"
    model.parent.mkdir()
    model.write_bytes(b"x" * 1000)
    result = dure("cache", "stats", "--json").json
    assert (result["model_files"], result["model_bytes"], result["objects"]) == (1, 1000, 0)
    assert "models" in dure("cache", "stats").out
    assert dure("cache", "clear", "--json").json["freed_model_bytes"] == 0
    assert model.exists()
    assert dure("cache", "clear", "--models", "--json").json["freed_model_bytes"] == 1000
    assert not model.exists()


def test_help_of_every_command_has_an_example(dure: Command) -> None:
    for command in (
        [],
        ["run"],
        ["chat"],
        ["pull"],
        ["models"],
        ["targets"],
        ["targets", "show"],
        ["bench"],
        ["bench", "llm"],
        ["perplexity"],
        ["cache"],
        ["cache", "stats"],
        ["cache", "clear"],
    ):
        ended = dure(*command, "--help")
        assert ended.code == 0
        example = " ".join(ended.out.split("Example:")[1].split())
        assert example.startswith(" ".join(["dure", *command]))


def test_version_and_no_arguments(dure: Command) -> None:
    assert dure("--version").out.startswith("dure ")
    ended = dure()
    assert ended.code == 0
    assert "Usage: dure" in ended.out
    ended = dure("bench")
    assert ended.code == 2
    assert "Usage: dure bench" in ended.err
