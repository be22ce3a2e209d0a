"""From what the user wrote to the tokens that the model reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dure.cli.output import say
from dure.cli.session import too_long

if TYPE_CHECKING:
    from dure.serve.chat import ChatTemplate
    from dure.serve.tokenizer import Tokenizer

Message = dict[str, str]


def chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The model's chat template, compiled; None for a base model."""
    from dure.serve.chat import ChatTemplate

    return None if tokenizer.chat_template is None else ChatTemplate.of(tokenizer)


def encode_prompt(tokenizer: Tokenizer, template: ChatTemplate | None, prompt: str) -> list[int]:
    """The tokens of one prompt, put into the template if there is one."""
    if template is None:
        return tokenizer.encode(prompt, add_special=True, parse_special=False)
    return encode_messages(tokenizer, template, [{"role": "user", "content": prompt}])


def encode_messages(
    tokenizer: Tokenizer, template: ChatTemplate, messages: list[Message]
) -> list[int]:
    """The tokens of a conversation, up to where the assistant's next answer begins."""
    words = template.render(messages, add_generation_prompt=True)
    return tokenizer.encode(words, add_special=False, parse_special=True)


def fit(
    tokenizer: Tokenizer,
    prompt: str,
    encode: Callable[[str], list[int]],
    context: int,
    reserve: int,
    *,
    truncate: bool,
) -> list[int]:
    """The tokens of ``prompt``, which leave room in the context.

    With ``truncate`` as much of the prompt's beginning is cut off as it takes for ``reserve``
    tokens (at most half of the context) to fit behind it; that is said.  Without, a prompt that
    leaves no room at all is a UsageError.
    """
    ids = encode(prompt)
    if len(ids) < context:
        return ids
    if not truncate:
        raise too_long(len(ids), context)
    allowed = max(1, context - min(reserve, context // 2))
    text_ids = tokenizer.encode(prompt, add_special=False, parse_special=False)
    keep = len(text_ids)
    while len(ids) > allowed and keep > 0:
        # What is left may tokenize differently where it was cut, so that one round may not do.
        keep = max(0, keep - (len(ids) - allowed))
        ids = encode(tokenizer.decode(text_ids[len(text_ids) - keep :]))
    if keep == 0:
        raise too_long(len(ids), context)
    say(f"note: the prompt's first {len(text_ids) - keep} of {len(text_ids)} tokens were cut off")
    return ids
