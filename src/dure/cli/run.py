"""``dure run``: one prompt, one answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options, text
from dure.cli.output import print_json, say, show
from dure.cli.prompt import chat_template, encode_prompt, fit
from dure.cli.session import Completion, Engine, complete, opened, rate

if TYPE_CHECKING:
    from dure.serve.sampler import SamplingParams

Prompt = Annotated[str, typer.Argument(help="What to answer or continue; - reads standard input.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")]
Truncate = Annotated[
    bool, typer.Option("--truncate", help="Cut off the beginning of a prompt that is too long.")
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog='Example: dure run smollm2 "Why is the sky blue?" -n 64 --seed 1')(run)


def run(
    model: options.Model,
    prompt: Prompt,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = options.TEMPERATURE,
    top_k: options.TopK = options.TOP_K,
    top_p: options.TopP = options.TOP_P,
    min_p: options.MinP = options.MIN_P,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    seed: options.Seed = None,
    threads: options.Threads = None,
    context: options.Context = None,
    raw: Raw = False,
    truncate: Truncate = False,
    as_json: options.Json = False,
) -> None:
    """Answer one prompt, or continue it where the model has no chat template."""
    params = options.sampling(
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed
    )
    if prompt == "-":
        prompt = text.standard_input("standard input")
    prompt = text.not_empty(text.argument(prompt, "the prompt"), "the prompt")
    with opened(model, threads, context, quiet=as_json) as engine:
        tokenizer = engine.tokenizer
        template = None if raw else chat_template(tokenizer)
        prompt_ids = fit(
            tokenizer,
            prompt,
            lambda words: encode_prompt(tokenizer, template, words),
            engine.context_length,
            max_tokens,
            truncate=truncate,
        )
        completion = complete(
            engine, prompt_ids, params, max_tokens, (lambda piece: None) if as_json else show
        )
        result = summary(model, engine, completion, params)
    if as_json:
        print_json(result)
    else:
        show("\n")
        say(sentence(result))


def summary(
    model: str, engine: Engine, completion: Completion, params: SamplingParams
) -> dict[str, object]:
    """What ``--json`` prints.  Rates are tokens per second, times seconds.

    ``decode_tok_s`` counts the tokens after the first one, which the prefill yields.
    """
    stats = engine.stats
    return {
        "model": model,
        "text": completion.text,
        "tokens": len(completion.token_ids),
        "prompt_tokens": stats.prompt_tokens,
        "stop": completion.stop,
        "prefill_tok_s": rate(stats.prompt_tokens, stats.prefill_s),
        "decode_tok_s": rate(stats.tokens - 1, stats.decode_s),
        "load_s": engine.load_s,
        "first_token_s": stats.first_token_s,
        "threads": engine.threads,
        "seed": params.seed,
    }


def sentence(result: dict[str, object]) -> str:
    """The counts and rates for people."""

    def speed(key: str) -> str:
        value = result[key]
        return f", {value:.1f} tokens/s" if isinstance(value, float) else ""

    ended = {"length": "; stopped at -n", "context": "; stopped at the end of the context"}
    return (
        f"[prompt {result['prompt_tokens']} tokens{speed('prefill_tok_s')}; "
        f"answer {result['tokens']} tokens{speed('decode_tok_s')}; "
        f"seed {result['seed']}{ended.get(str(result['stop']), '')}]"
    )
