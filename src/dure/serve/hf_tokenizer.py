"""A tokenizer from a Hugging Face folder: ``tokenizer.json`` run by the ``tokenizers`` library.

``tokenizer_config.json`` (BOS and EOS, chat template), ``generation_config.json`` (further end
tokens) and ``chat_template.jinja`` are read where they exist.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dure.errors import ModelFileError
from dure.serve import bytelevel_bpe, sentencepiece
from dure.serve.vocabulary import END_OF_TURN_TEXTS, TokenType

if TYPE_CHECKING:
    from tokenizers import Tokenizer as LibraryTokenizer

JSON = dict[str, Any]
MAX_CONFIG_BYTES = 64 << 20
MAX_TOKENIZER_BYTES = 1 << 30


class HFTokenizer:
    """The backend of :class:`~dure.serve.tokenizer.Tokenizer` for ``tokenizer.json``."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelFileError when the folder lacks a tokenizer.json that can be used."""
        path = folder / "tokenizer.json"
        text = _read(path, MAX_TOKENIZER_BYTES)
        if text is None:
            raise ModelFileError(
                "the folder has no tokenizer.json",
                where=str(folder),
                fix="save one with transformers: AutoTokenizer.save_pretrained(folder)",
            )
        config = _read_json(folder / "tokenizer_config.json") or {}
        generation = _read_json(folder / "generation_config.json") or {}
        description = _parse(text, path)
        self._library = _load(text, path)
        self._source = (text, path)
        self._added, self._special = _added_tokens(description, path)
        self._byte_level, self.strips_space = _decoder_kind(description, path)
        self.vocab_size = self._size()
        prefix, suffix = self._ends_added_by_library()
        bos, eos = (self._id_of(config.get(f"{name}_token")) for name in ("bos", "eos"))
        self.bos_ids = prefix or ([bos] if bos is not None else [])
        self.eos_ids = suffix or ([eos] if eos is not None else [])
        self.add_bos = _flag(config.get("add_bos_token"), bool(prefix)) and bool(self.bos_ids)
        self.add_eos = _flag(config.get("add_eos_token"), bool(suffix)) and bool(self.eos_ids)
        self.end_ids = self._end_ids(eos, generation.get("eos_token_id"))
        self.chat_template = _chat_template(folder, config)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of ``text``, without BOS and EOS."""
        library = self._library if parse_special else self._plain
        return library.encode(text, add_special_tokens=False).ids

    @cached_property
    def _plain(self) -> LibraryTokenizer:
        """The same tokenizer, for text in which special tokens are only text."""
        plain = _load(*self._source)
        plain.encode_special_tokens = True
        return plain

    def piece(self, token: int) -> bytes:
        """The bytes of one token; none for an id that the vocabulary skips."""
        added = self._added.get(token)
        if added is not None:
            return added.encode("utf-8")
        text = self._library.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            return bytelevel_bpe.bytes_of_token(text)
        return sentencepiece.bytes_of_token(text, TokenType.NORMAL)

    def is_special(self, token: int) -> bool:
        """Whether a token marks structure and has no text of its own."""
        return token in self._special

    def _size(self) -> int:
        return max(
            self._library.get_vocab_size(with_added_tokens=True),
            max(self._added, default=-1) + 1,
        )

    def _id_of(self, token: object) -> int | None:
        """The id of a token as configs write it: text, or an object with the text as `content`."""
        if isinstance(token, dict):
            token = cast(JSON, token).get("content")
        return self._library.token_to_id(token) if isinstance(token, str) else None

    def _ends_added_by_library(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and behind a text."""
        plain = self._library.encode("a", add_special_tokens=False).ids
        full = self._library.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    def _end_ids(self, eos: int | None, generation: object) -> frozenset[int]:
        listed = cast(list[object], generation) if isinstance(generation, list) else [generation]
        ends = {
            index for index in listed if isinstance(index, int) and 0 <= index < self.vocab_size
        }
        ends |= {index for index in self._special if self._added[index] in END_OF_TURN_TEXTS}
        return frozenset(ends if eos is None else ends | {eos})


def _flag(value: object, default: bool) -> bool:
    return value if isinstance(value, bool) else default


def _read(path: Path, limit: int) -> str | None:
    try:
        if path.stat().st_size > limit:
            raise ModelFileError(
                f"the file has more than {limit} bytes", where=str(path), fix="check the folder"
            )
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ModelFileError(
            f"the file cannot be read: {error}", where=str(path), fix="download it again"
        ) from None


def _read_json(path: Path) -> JSON | None:
    text = _read(path, MAX_CONFIG_BYTES)
    return None if text is None else _parse(text, path)


def _parse(text: str, path: Path) -> JSON:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(
            f"the file is not JSON: {error}", where=str(path), fix="download it again"
        ) from None
    if not isinstance(value, dict):
        raise ModelFileError(
            "the file is not a JSON object", where=str(path), fix="download it again"
        )
    return cast(JSON, value)


def _load(text: str, path: Path) -> LibraryTokenizer:
    from tokenizers import Tokenizer as LibraryTokenizer

    try:
        library = LibraryTokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library also panics, which is not an Exception
        raise ModelFileError(
            f"the tokenizer cannot be built: {error}",
            where=str(path),
            fix="download it again, or save it with a current version of transformers",
        ) from None
    library.no_truncation()
    library.no_padding()
    return library


def _added_tokens(description: JSON, path: Path) -> tuple[dict[int, str], frozenset[int]]:
    """Text by id of the added tokens, and which of them are special."""
    texts: dict[int, str] = {}
    special: set[int] = set()
    entries: object = description.get("added_tokens") or []
    for entry in cast(list[object], entries) if isinstance(entries, list) else [entries]:
        fields = cast(JSON, entry) if isinstance(entry, dict) else {}
        index, content = fields.get("id"), fields.get("content")
        if not isinstance(index, int) or not isinstance(content, str) or index < 0:
            raise ModelFileError(
                f"an added token has no id or no content: {entry!r:.80}",
                where=str(path),
                fix="download the file again",
            )
        texts[index] = content
        if fields.get("special"):
            special.add(index)
    return texts, frozenset(special)


def _decoder_kind(description: JSON, path: Path) -> tuple[bool, bool]:
    """Whether the vocabulary is byte-level, and whether decoding takes off a leading space."""
    steps = list(_decoder_steps(description.get("decoder")))
    types = {step.get("type") for step in steps}
    if "ByteLevel" in types:
        return True, False
    replaces = any(step.get("type") == "Replace" and step.get("content") == " " for step in steps)
    metaspace = [step for step in steps if step.get("type") == "Metaspace"]
    if not (replaces or metaspace or "ByteFallback" in types):
        found = ", ".join(sorted(str(kind) for kind in types)) or "none"
        raise ModelFileError(
            f"the tokenizer's decoder is of an unknown kind ({found})",
            where=str(path),
            rule="byte-level BPE and SentencePiece vocabularies are read",
            fix="take a model with one of these tokenizers",
        )
    strips = any(
        step.get("type") == "Strip" and step.get("content") == " " and bool(step.get("start"))
        for step in steps
    ) or any(step.get("prepend_scheme", "always") != "never" for step in metaspace)
    return False, strips


def _decoder_steps(decoder: object) -> Iterator[JSON]:
    if isinstance(decoder, dict):
        fields = cast(JSON, decoder)
        yield fields
        inner: object = fields.get("decoders")
        for step in cast(list[object], inner) if isinstance(inner, list) else ():
            yield from _decoder_steps(step)


def _chat_template(folder: Path, config: JSON) -> str | None:
    text = _read(folder / "chat_template.jinja", MAX_CONFIG_BYTES)
    if text is not None:
        return text
    template: object = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        for entry in cast(list[object], template):
            fields = cast(JSON, entry) if isinstance(entry, dict) else {}
            if fields.get("name") == "default" and isinstance(fields.get("template"), str):
                return fields["template"]
        return None
    return template if isinstance(template, str) else None
