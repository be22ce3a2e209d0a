"""``dure chat``: a conversation, line by line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options, text
from dure.cli.output import print_json, say, show
from dure.cli.prompt import Message, chat_template, encode_messages
from dure.cli.run import sentence, summary
from dure.cli.session import Engine, complete, opened, too_long
from dure.errors import UsageError
from dure.models.catalogue import printable

if TYPE_CHECKING:
    from dure.serve.chat import ChatTemplate
    from dure.serve.sampler import SamplingParams

System = Annotated[str, typer.Option("--system", help="Instructions put before the conversation.")]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog="Example: dure chat smollm2 --system 'Answer in one sentence.'")(chat)


def chat(
    model: options.Model,
    system: System = "",
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = options.TEMPERATURE,
    top_k: options.TopK = options.TOP_K,
    top_p: options.TopP = options.TOP_P,
    min_p: options.MinP = options.MIN_P,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    seed: options.Seed = None,
    threads: options.Threads = None,
    context: options.Context = None,
    as_json: options.Json = False,
) -> None:
    """Talk to a model.

    One line is one message.  /clear begins anew, /exit or the end of the input ends.
    """
    params = options.sampling(
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed
    )
    system = text.argument(system, "the system prompt")
    with opened(model, threads, context, quiet=as_json) as engine:
        template = chat_template(engine.tokenizer)
        if template is None:
            raise UsageError(
                f"{printable(model)} has no chat template: it is a base model that continues text",
                rule="a chat needs a model that was trained on conversations",
                fix=f"complete text with `dure run {printable(model)} ...`, or chat with smollm2",
            )
        turns = _converse(model, engine, template, params, system, max_tokens, as_json=as_json)
    if as_json:
        print_json({"model": model, "turns": turns})


def _converse(
    model: str,
    engine: Engine,
    template: ChatTemplate,
    params: SamplingParams,
    system: str,
    max_tokens: int,
    *,
    as_json: bool,
) -> list[dict[str, object]]:
    """The conversation until the input ends; what was said, with counts and rates."""
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    turns: list[dict[str, object]] = []
    while (line := _read_line()) is not None:
        if line == "/exit":
            break
        if line == "/clear":
            messages = list(start)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        ids = _fitting(engine, template, messages, len(start))
        completion = complete(
            engine, ids, params, max_tokens, (lambda piece: None) if as_json else show
        )
        messages.append({"role": "assistant", "content": completion.text})
        turn = {"user": line} | summary(model, engine, completion, params)
        turns.append(turn)
        if not as_json:
            show("\n")
            say(sentence(turn))
    return turns


def _fitting(
    engine: Engine, template: ChatTemplate, messages: list[Message], fixed: int
) -> list[int]:
    """The conversation's tokens; the oldest exchanges are dropped where the context is full."""
    dropped = 0
    while True:
        ids = encode_messages(engine.tokenizer, template, messages)
        if len(ids) < engine.context_length:
            break
        if len(messages) - fixed < 3:
            raise too_long(len(ids), engine.context_length)
        del messages[fixed : fixed + 2]
        dropped += 1
    if dropped:
        say(f"note: the context is full; the oldest {dropped} exchanges are forgotten")
    return ids


def _read_line() -> str | None:
    """The next message without blanks at its ends; None at the end of the input."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            import readline  # editing and history for input()
        except ImportError:
            pass
        else:
            readline.set_auto_history(True)
        try:
            return text.argument(input("> "), "the message").strip()
        except EOFError:
            return None
    data = sys.stdin.buffer.readline()
    return text.decode(data, "the message").strip() if data else None
