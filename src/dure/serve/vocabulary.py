"""The vocabulary in a GGUF file's metadata, checked: tokens, their types, and the special ids.

Keys are those of the GGUF specification (``tokenizer.ggml.*``).  Whatever is missing, has another
type than it should, or points outside the vocabulary is a :class:`~dure.errors.ModelFileError`
that names the key; nothing is guessed where a guess would change the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from dure.errors import ModelFileError
from dure.frontends.gguf import GGUFFile, Metadata

PREFIX = "tokenizer.ggml."
_CONVERT = "convert the model again with a current converter"

END_OF_TURN_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|eot|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<turn|>",
        "<end_of_utterance>",
        "<EOT>",
        "[EOT]",
        "<｜end▁of▁sentence｜>",
    }
)
"""Control tokens that end a turn in the published chat formats.  Many files name only one end token
in their metadata and rely on the reader to know these, as llama.cpp does."""


class TokenType(IntEnum):
    """What a token is for, by its number in ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id.  A token that is not UTF-8 keeps its bytes as surrogate escapes (PEP 383)."""

    tokens: list[str]
    types: NDArray[np.uint8]
    """One :class:`TokenType` a token; a read-only array."""
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    end_ids: frozenset[int]
    """Every token that ends a generation: eos, eot, eom, and known end-of-turn control tokens."""

    def of_type(self, *types: TokenType) -> list[int]:
        """The ids of all tokens of these types, in order."""
        return [int(index) for index in np.flatnonzero(np.isin(self.types, types))]


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    """The checked vocabulary of a file, of whatever tokenizer kind."""
    metadata = file.metadata
    tokens = metadata.require_strings(PREFIX + "tokens")
    if not tokens:
        raise ModelFileError(
            f"{PREFIX}tokens is an empty list", where=file.path, rule="a vocabulary", fix=_CONVERT
        )
    types = _read_types(file, len(tokens))
    special = {name: _read_id(file, name, len(tokens)) for name in _SPECIAL_IDS}
    for name in ("bos", "eos", "eot", "eom"):
        index = special[name]
        if index is not None and types[index] == TokenType.NORMAL:
            types[index] = TokenType.CONTROL  # old converters leave everything NORMAL
    end_ids = {special[name] for name in ("eos", "eot", "eom")} - {None}
    end_ids |= _end_of_turn_ids(tokens, types)
    types.flags.writeable = False
    return Vocabulary(
        tokens=tokens,
        types=types,
        bos_id=special["bos"],
        eos_id=special["eos"],
        unknown_id=special["unknown"],
        end_ids=frozenset(index for index in end_ids if index is not None),
    )


_SPECIAL_IDS = ("bos", "eos", "eot", "eom", "unknown")


def _read_id(file: GGUFFile, name: str, size: int) -> int | None:
    key = f"{PREFIX}{name}_token_id"
    if key not in file.metadata:
        return None
    index = file.metadata.require_int(key)
    if index in (-1, 0xFFFFFFFF):  # how converters write "none"
        return None
    if not 0 <= index < size:
        raise ModelFileError(
            f"{key} is {index}, but the vocabulary has {size} tokens",
            where=file.path,
            rule="a token id lies inside the vocabulary",
            fix=_CONVERT,
        )
    return index


def _read_types(file: GGUFFile, size: int) -> NDArray[np.uint8]:
    key = PREFIX + "token_type"
    if key not in file.metadata:
        return np.full(size, TokenType.NORMAL, dtype=np.uint8)
    types = file.metadata.require_ints(key)
    check_length(file, key, len(types), size)
    if int(types.min()) < 0 or int(types.max()) > max(TokenType):
        raise ModelFileError(
            f"{key} holds a number that is no token type: {types.min()} or {types.max()}",
            where=file.path,
            rule="token types are 0 to 6",
            fix=_CONVERT,
        )
    return types.astype(np.uint8)


def check_length(file: GGUFFile, key: str, length: int, size: int) -> None:
    """Raise unless a list that runs beside the tokens has their number."""
    if length != size:
        raise ModelFileError(
            f"{key} has {length} entries for {size} tokens",
            where=file.path,
            rule="one entry for each token",
            fix=_CONVERT,
        )


def _end_of_turn_ids(tokens: list[str], types: NDArray[np.uint8]) -> set[int]:
    marked = np.flatnonzero((types == TokenType.CONTROL) | (types == TokenType.USER_DEFINED))
    found = {tokens[index]: int(index) for index in marked if tokens[index] in END_OF_TURN_TEXTS}
    if "<|return|>" in found and "<|call|>" in found:
        # The harmony format: <|end|> closes a message, and the turn goes on.
        found.pop("<|end|>", None)
    return set(found.values())


def add_flag(metadata: Metadata, name: str, default: bool) -> bool:
    """``tokenizer.ggml.<name>``, a bool that files may leave out."""
    return metadata.get_bool(PREFIX + name, default)
