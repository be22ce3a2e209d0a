"""Text to token ids and back.

    tokenizer = Tokenizer.from_gguf(file)
    ids = tokenizer.encode("Why is the sky blue?", add_special=True, parse_special=False)
    text = tokenizer.decode(ids)

Encoding follows the model's own tokenizer to the id.  Decoding works on bytes: tokens may hold
parts of a character, and only whole characters come out of :class:`Detokenizer` as a generation
proceeds.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from dure.errors import UsageError
from dure.frontends.gguf import GGUFFile


class Backend(Protocol):
    """What the GGUF and the Hugging Face tokenizer both do."""

    add_bos: bool
    add_eos: bool
    strips_space: bool
    """Encoding puts a space in front of the text, which decoding takes off again."""
    bos_ids: list[int]
    eos_ids: list[int]

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, parse_special: bool) -> list[int]: ...
    def piece(self, token: int) -> bytes: ...
    def is_special(self, token: int) -> bool: ...


class Tokenizer:
    """A model's tokenizer; make one with :meth:`from_gguf` or :meth:`from_hf_folder`.

    ``add_bos`` and ``add_eos`` say whether ``encode(add_special=True)`` puts BOS in front and EOS
    behind.  ``eos_ids`` holds every token that ends a generation: EOS and the end-of-turn tokens.
    ``chat_template`` is Jinja source, or None for a base model.
    """

    def __init__(
        self, backend: Backend, end_ids: frozenset[int], chat_template: str | None
    ) -> None:
        self._backend = backend
        self.eos_ids = end_ids
        self.chat_template = chat_template
        self.add_bos = backend.add_bos
        self.add_eos = backend.add_eos
        self.vocab_size = backend.vocab_size

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata.

        Raises :class:`~dure.errors.ModelFileError` that names the key when one is missing or
        malformed, when the kind or the pre-tokenizer is unknown, and when the parts don't fit.
        """
        from dure.serve.gguf_tokenizer import GGUFTokenizer

        backend = GGUFTokenizer(file)
        template = file.metadata.get_str("tokenizer.chat_template", "")
        return cls(backend, backend.vocabulary.end_ids, template or None)

    @classmethod
    def from_hf_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in a Hugging Face folder (``tokenizer.json`` and what lies beside it)."""
        from dure.serve.hf_tokenizer import HFTokenizer

        backend = HFTokenizer(Path(path))
        return cls(backend, backend.end_ids, backend.chat_template)

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, or None if the model has none."""
        return self._backend.bos_ids[0] if self._backend.bos_ids else None

    @property
    def bos_token(self) -> str:
        """The text of BOS as chat templates want it; empty if the model has none."""
        return self._text_of(self._backend.bos_ids)

    @property
    def eos_token(self) -> str:
        """The text of EOS as chat templates want it; empty if the model has none."""
        return self._text_of(self._backend.eos_ids)

    @property
    def strips_space(self) -> bool:
        """Whether decoding a whole text takes off the space that encoding put in front."""
        return self._backend.strips_space

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The ids of ``text``.

        ``add_special`` adds BOS and EOS where the model wants them (leave it off for text from a
        chat template, which writes them itself); ``parse_special`` lets control tokens spelled out
        in the text count as such (leave it off for what a user typed). Raises UsageError for a
        string with lone surrogates, which no UTF-8 text contains."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text is not valid Unicode: {error.reason} at position {error.start}",
                rule="text is UTF-8",
                fix="decode the bytes with the encoding that they have",
            ) from None
        ids = self._backend.encode(text, parse_special) if text else []
        if add_special and self.add_bos:
            ids = self._backend.bos_ids + ids
        if add_special and self.add_eos:
            ids = ids + self._backend.eos_ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        ``skip_special`` leaves control tokens out.  Raises UsageError for an id outside the
        vocabulary.
        """
        detokenizer = Detokenizer(self, skip_special=skip_special, at_start=True)
        return detokenizer.push_all(ids) + detokenizer.flush()

    def piece(self, token: int) -> bytes:
        """The bytes that one token stands for, control tokens spelled out."""
        if not 0 <= token < self.vocab_size:
            raise UsageError(
                f"token {token} lies outside the vocabulary of {self.vocab_size} tokens",
                rule=f"token ids are 0 to {self.vocab_size - 1}",
                fix="check that the ids come from this model",
            )
        return self._backend.piece(token)

    def is_special(self, token: int) -> bool:
        """Whether a token is a control token, which has no text of its own."""
        return self._backend.is_special(token)

    def _text_of(self, ids: list[int]) -> str:
        return b"".join(map(self._backend.piece, ids[:1])).decode("utf-8", "replace")


class Detokenizer:
    """Turns tokens into text one by one; what comes out is always whole characters.

    Bytes of an unfinished character are held back until the token that completes it, or until
    :meth:`flush` shows that none comes (then U+FFFD is put for them).  The pieces joined are the
    text that :meth:`Tokenizer.decode` gives.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, at_start: bool = False
    ) -> None:
        """``at_start`` is for ids that begin a text: the space that some vocabularies put in front
        is taken off.  A generation continues its prompt and keeps it."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip = at_start and tokenizer.strips_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        piece = self._tokenizer.piece(token)
        if self._tokenizer.is_special(token):
            if self._skip_special:
                return ""
        elif self._strip:
            piece = piece.removeprefix(b" ")
            self._strip = False
        return self._decoder.decode(piece)

    def push_all(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete."""
        return "".join(self.push(token) for token in tokens)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, or nothing."""
        return self._decoder.decode(b"", final=True)
