"""Byte-level BPE (tokenizer kind ``gpt2``): text to ids with the ``tokenizers`` library.

A text is cut into words by the file's pre-tokenizer, each word's UTF-8 bytes are written as 256
visible characters, and pairs are merged in the order of the file's merge list.  A byte for which
the vocabulary has no token is left out, as the models' own tokenizers do (SmolLM2 lacks six
control characters).
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from dure.errors import ModelFileError
from dure.frontends.gguf import GGUFFile
from dure.serve.pretokenizer import PRE_TOKENIZERS, PreTokenizer
from dure.serve.vocabulary import PREFIX, TokenType, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers.models import BPE


def _byte_characters() -> dict[str, int]:
    """The character that GPT-2's vocabulary writes for each byte, to that byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    table = {chr(byte): byte for byte in visible}
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_SURROGATE = re.compile("[\ud800-\udfff]")
BYTE_OF_CHARACTER = _byte_characters()
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


def bytes_of_token(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; other characters as UTF-8."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return b"".join(
            bytes([BYTE_OF_CHARACTER[character]])
            if character in BYTE_OF_CHARACTER
            else character.encode("utf-8", "surrogateescape")
            for character in token
        )


class ByteLevelBPE:
    """The encoder of one file's ``gpt2`` vocabulary."""

    def __init__(self, file: GGUFFile, vocabulary: Vocabulary) -> None:
        """Raises ModelFileError for an unknown pre-tokenizer or a merge list that doesn't fit."""
        self.rule = _rule(file)
        self._library = _build(file, vocabulary, self.rule)

    def normalize(self, text: str) -> str:
        """Unicode's composed form where the model was trained on it."""
        return unicodedata.normalize("NFC", text) if self.rule.compose else text

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of normalized text, in which no token is special, wherever it stands."""
        return self._library.encode(text, add_special_tokens=False).ids


def _rule(file: GGUFFile) -> PreTokenizer:
    name = file.metadata.get_str(PREFIX + "pre", "default")
    rule = PRE_TOKENIZERS.get(name)
    if rule is None:
        raise ModelFileError(
            f"the pre-tokenizer {name!r} is unknown",
            where=f"{file.path}, {PREFIX}pre",
            rule="known names: " + ", ".join(sorted(PRE_TOKENIZERS)),
            fix="give the Hugging Face folder of the model, whose tokenizer.json says the rule",
        )
    return rule


def _build(file: GGUFFile, vocabulary: Vocabulary, rule: PreTokenizer) -> LibraryTokenizer:
    from tokenizers import Tokenizer as LibraryTokenizer

    library = LibraryTokenizer(_model(file, vocabulary, rule))
    library.pre_tokenizer = rule.build()
    return library


def _model(file: GGUFFile, vocabulary: Vocabulary, rule: PreTokenizer) -> BPE:
    from tokenizers.models import BPE

    merges = _merges(file)
    ids = dict(zip(vocabulary.tokens, range(len(vocabulary.tokens)), strict=True))
    _require_byte_level(file, ids)
    ids = _writable(ids)
    # Checked here, because the library panics where it isn't so, and prints a stack trace.
    made = [left + right for left, right in merges]
    if None in map(ids.get, made):
        raise _misfit(file, _describe_stray(merges, ids))
    # Text must not become a control token by being spelled like one, so these are taken out, unless
    # the merge list itself needs them.
    kinds = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED)
    reserved = {vocabulary.tokens[index] for index in vocabulary.of_type(*kinds)}
    reserved.difference_update(made)
    plain = {text: index for text, index in ids.items() if text not in reserved}
    problem = ""
    for table in (plain, ids):
        try:
            return BPE(table, merges, ignore_merges=rule.ignore_merges)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library also panics, which is not an Exception
            problem = str(error)
    raise _misfit(file, _describe_stray(merges, ids) or problem)


def _describe_stray(merges: list[tuple[str, str]], ids: dict[str, int]) -> str:
    for index, (left, right) in enumerate(merges):
        for text in (left, right, left + right):
            if text not in ids:
                return f"merge {index}, {left!r} and {right!r}: {text!r} is no token"
    return ""


def _misfit(file: GGUFFile, problem: str) -> ModelFileError:
    return ModelFileError(
        f"the merge list does not fit the vocabulary: {problem}",
        where=f"{file.path}, {PREFIX}merges",
        rule="both halves of a merge, and the two together, are tokens",
        fix="convert the model again with a current converter",
    )


def _require_byte_level(file: GGUFFile, ids: dict[str, int]) -> None:
    missing = [chr(byte) for byte in range(0x20, 0x7F) if CHARACTER_OF_BYTE[byte] not in ids]
    if missing:
        raise ModelFileError(
            f"the vocabulary has no token for {len(missing)} of the printable ASCII characters, "
            f"{missing[0]!r} among them",
            where=f"{file.path}, {PREFIX}tokens",
            rule="a vocabulary of kind gpt2 has a token for every byte of ordinary text",
            fix="convert the model again with a current converter",
        )


def _writable(table: dict[str, int]) -> dict[str, int]:
    """The tokens that are UTF-8; no text, which is, has any of the others in it."""
    try:
        "".join(table).encode("utf-8")
        return table
    except UnicodeEncodeError:
        return {text: index for text, index in table.items() if not _SURROGATE.search(text)}


def _merges(file: GGUFFile) -> list[tuple[str, str]]:
    lines = file.metadata.require_strings(PREFIX + "merges")
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    for index, (left, right) in enumerate(merges):
        if not (left and right):
            raise ModelFileError(
                f"merge {index} is {lines[index]!r}",
                where=f"{file.path}, {PREFIX}merges",
                rule="a merge is two tokens with a space between them",
                fix="convert the model again with a current converter",
            )
    return merges
