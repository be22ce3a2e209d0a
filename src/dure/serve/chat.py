"""Chat templates: a conversation to the text that the model was trained on.

A template is Jinja source that comes with the model, written for Hugging Face's
``apply_chat_template``; it is run in a sandbox whose time, memory and output are bounded
(:mod:`dure.serve.bounded_jinja`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from dure.errors import DureError, ModelFileError, UsageError

if TYPE_CHECKING:
    from jinja2 import Template

    from dure.serve.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""At least ``role``; ``content`` is text, or what the template takes."""


class ChatTemplate:
    """A compiled chat template; safe to use from several threads."""

    def __init__(self, source: str | None, bos_token: str = "", eos_token: str = "") -> None:
        """``bos_token`` and ``eos_token`` are the texts that the template may write.

        Raises UsageError without a source: the model is a base model.  Raises ModelFileError for a
        template that cannot be compiled.
        """
        if not source:
            raise UsageError(
                "this is a base model: it has no chat template",
                rule="a chat needs the template that the model was trained with",
                fix="complete text with it instead (`dure run`), or take its instruct version",
            )
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._template = _compile(source)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template of a tokenizer's model; UsageError for a base model."""
        return cls(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text, control tokens spelled out: encode it with ``add_special=False,
        parse_special=True``.

        ``add_generation_prompt`` adds the words that open the assistant's turn; ``variables`` are
        what else a template asks for (``enable_thinking=False``).
        Raises UsageError when the messages are malformed or the template refuses them (roles out of
        order), ModelFileError when the template itself fails or uses more than its bounds.
        """
        _check_messages(messages)
        from dure.serve.bounded_jinja import with_budget

        given = {
            **self._tokens,
            "messages": [dict(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        try:
            return with_budget(lambda: self._template.render(given))
        except DureError:
            raise
        except Exception as error:
            raise _failed(error) from None


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise UsageError("the conversation is empty", fix="give at least one message")
    for index, message in enumerate(messages):
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise UsageError(
                f"message {index} has no role",
                rule="a message is a mapping with a role and content",
                fix="""write it as {"role": "user", "content": "..."}""",
            )


def _compile(source: str) -> Template:
    from dure.serve.bounded_jinja import BoundedEnvironment, with_budget

    environment = BoundedEnvironment(
        filters={"tojson": _to_json},
        functions={"raise_exception": _refuse, "strftime_now": _time_now},
    )
    compiled: list[Template] = []

    def compile_it() -> str:
        compiled.append(environment.from_string(source))
        return ""

    try:
        with_budget(compile_it)  # constant expressions run while compiling
    except DureError:
        raise
    except Exception as error:
        raise _failed(error) from None
    return compiled[0]


def _failed(error: Exception) -> ModelFileError:
    from dure.serve.bounded_jinja import TemplateLimitError

    line = getattr(error, "lineno", None)
    where = "the model's chat template" + (f", line {line}" if line else "")
    if isinstance(error, TemplateLimitError):
        what = f"the chat template uses too much: {error}"
    elif isinstance(error, RecursionError):
        what = "the chat template nests or recurses too deep"
    else:
        what = f"the chat template failed: {type(error).__name__}: {error}"
    return ModelFileError(
        what,
        where=where,
        fix="check the messages against what the model's card says, or run without a template",
    )


def _refuse(message: object) -> NoReturn:
    raise UsageError(
        f"the model's chat template refuses the conversation: {message}",
        fix="order and name the roles as the model's template wants them",
    )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML's characters, which a model has never seen.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _time_now(pattern: str) -> str:
    if len(pattern) > 256 or any(character.isdigit() for character in pattern):
        raise UsageError(
            "the model's chat template asks for the time in an unusual format",
            where=repr(pattern)[:80],
            fix="run without a template",
        )
    return datetime.now().strftime(pattern)
