"""SentencePiece BPE (tokenizer kind ``llama``): greedy merging by score.

The text's characters are merged pairwise into longer tokens, the pair whose token has the highest
score first and the leftmost among equals, until no pair is a token: the algorithm of
SentencePiece's BPE model and of llama.cpp's SPM.  A character that is no token is written as its
UTF-8 bytes in byte tokens, or as the unknown token where the vocabulary has none.

It works on the vocabulary's own dictionary.  (The ``tokenizers`` library could run it as BPE over
merges derived from the scores; for Gemma's 262,144 tokens these are 514,847 merges, and deriving
and building them takes seconds at every start.  Here words are cached instead.)
"""

from __future__ import annotations

import re
from heapq import heapify, heappop, heappush

import numpy as np

from dure.errors import ModelFileError
from dure.frontends.gguf import GGUFFile
from dure.serve.vocabulary import PREFIX, TokenType, Vocabulary, check_length

SPACE = "▁"
"""U+2581, which stands for a space in the vocabulary."""
MAX_CACHED_WORDS = 1 << 16
MAX_CACHED_LENGTH = 48


def bytes_of_token(token: str, kind: TokenType) -> bytes:
    """The bytes that a token of a SentencePiece vocabulary stands for."""
    if kind is TokenType.BYTE or (kind is TokenType.NORMAL and len(token) == 6):
        byte = _byte_value(token)
        if byte is not None:
            return bytes([byte])
    return token.replace(SPACE, " ").encode("utf-8", "surrogateescape")


def _byte_value(token: str) -> int | None:
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return int(match[1], 16) if match else None


class SentencePieceBPE:
    """The encoder of one file's ``llama`` vocabulary."""

    def __init__(self, file: GGUFFile, vocabulary: Vocabulary) -> None:
        """Raises ModelFileError where scores, or a way to write any character, are missing."""
        self.add_space_prefix = file.metadata.get_bool(PREFIX + "add_space_prefix", True)
        self._scores = _read_scores(file, len(vocabulary.tokens))
        self._ids = dict(zip(vocabulary.tokens, range(len(vocabulary.tokens)), strict=True))
        self._bytes, self._unknown = self._set_reserved_aside(file, vocabulary)
        self._words = _word_boundary(vocabulary.tokens)
        self._cache: dict[str, list[int]] = {}

    def normalize(self, text: str) -> str:
        """Spaces as U+2581, which the vocabulary's tokens are written with."""
        return text.replace(" ", SPACE)

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of normalized text, with a space in front of the whole text and of what follows
        a special token if the vocabulary asks for one."""
        if self.add_space_prefix and after_special:
            text = SPACE + text
        ids: list[int] = []
        cache = self._cache
        for word in self._words.split(text):
            known = cache.get(word)
            if known is None:
                known = self._merge(word)
                if len(word) <= MAX_CACHED_LENGTH:
                    if len(cache) >= MAX_CACHED_WORDS:
                        cache.clear()
                    cache[word] = known
            ids += known
        return ids

    def _set_reserved_aside(
        self, file: GGUFFile, vocabulary: Vocabulary
    ) -> tuple[list[int] | None, int | None]:
        """Byte tokens by value and the unknown id; these and control tokens are never merged to."""
        kinds = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED)
        for index in vocabulary.of_type(*kinds):
            self._ids.pop(vocabulary.tokens[index], None)
        byte_ids = [self._ids.pop(f"<0x{byte:02X}>", None) for byte in range(256)]
        whole = [index for index in byte_ids if index is not None]
        unknown = vocabulary.unknown_id
        if len(whole) == 256:
            return whole, unknown
        if unknown is None:
            raise ModelFileError(
                f"the vocabulary has {len(whole)} of 256 byte tokens and no unknown token",
                where=f"{file.path}, {PREFIX}tokens",
                rule="a character outside the vocabulary is written as bytes or as unknown",
                fix="convert the model again with a current converter",
            )
        return None, unknown

    def _merge(self, word: str) -> list[int]:
        """Greedy merging of one word; linear memory, and n log n time in its length."""
        if word in self._ids and len(word) == 1:
            return [self._ids[word]]
        pieces: list[str] = list(word)
        end = len(pieces)
        following = list(range(1, end + 1))
        preceding = list(range(-1, end - 1))
        ids, scores = self._ids, self._scores
        queue: list[tuple[float, int, str]] = []
        for left in range(end - 1):
            index = ids.get(pieces[left] + pieces[left + 1])
            if index is not None:
                queue.append((-scores[index], left, pieces[left] + pieces[left + 1]))
        heapify(queue)
        while queue:
            _, left, merged = heappop(queue)
            right = following[left]
            # An entry is stale once one of its two pieces took part in another merge.
            if not pieces[left] or right >= end or pieces[left] + pieces[right] != merged:
                continue
            pieces[left], pieces[right] = merged, ""
            beyond = following[left] = following[right]
            if beyond < end:
                preceding[beyond] = left
                index = ids.get(merged + pieces[beyond])
                if index is not None:
                    heappush(queue, (-scores[index], left, merged + pieces[beyond]))
            before = preceding[left]
            if before >= 0:
                index = ids.get(pieces[before] + merged)
                if index is not None:
                    heappush(queue, (-scores[index], before, pieces[before] + merged))
        return self._ids_of([piece for piece in pieces if piece])

    def _ids_of(self, pieces: list[str]) -> list[int]:
        out: list[int] = []
        for piece in pieces:
            index = self._ids.get(piece)
            if index is not None:
                out.append(index)
            elif self._bytes is not None:
                out += [self._bytes[byte] for byte in piece.encode("utf-8")]
            elif self._unknown is not None:
                out.append(self._unknown)
        return out


def _word_boundary(tokens: list[str]) -> re.Pattern[str]:
    """A pattern that matches where no token reaches across, so that words can be cached.

    That is in front of a run of spaces, unless some token has a space behind the very character
    that stands there.
    """
    inside = {"\0", *re.findall(f"([^{SPACE}\0]){SPACE}", "\0".join(tokens))}
    joined = "".join(map(re.escape, sorted(inside)))
    return re.compile(f"(?<![{SPACE}{joined}])(?={SPACE})")


def _read_scores(file: GGUFFile, size: int) -> list[float]:
    key = PREFIX + "scores"
    scores = file.metadata.require_floats(key)
    check_length(file, key, len(scores), size)
    if bool(np.isnan(scores).any()):
        raise ModelFileError(
            f"{key} holds a value that is not a number",
            where=file.path,
            rule="merging needs scores that can be compared",
            fix="convert the model again with a current converter",
        )
    return scores.tolist()
