"""Finding special tokens in a text, leftmost first and longest at each place.

The rule is that of Hugging Face's added tokens.  The texts are looked up in a dictionary by slices
of the lengths that occur, tried only where two characters already agree, so that building costs a
pass over the special tokens and searching a pass of the regular expression engine over the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator


class SpecialTokenFinder:
    """Cuts a text into plain pieces and special tokens."""

    def __init__(self, tokens: Iterable[tuple[str, int]]) -> None:
        """``tokens`` are (text, id); of equal texts the last id counts, empty ones are left out."""
        self._ids: dict[str, int] = {text: index for text, index in tokens if text}
        lengths: dict[str, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[:2], set()).add(len(text))
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}
        firsts = sorted({head[0] for head in lengths})
        self._first = re.compile("[" + "".join(map(re.escape, firsts)) + "]") if firsts else None

    def split(self, text: str) -> Iterator[str | int]:
        """Plain pieces (never empty) and ids of special tokens, in the text's order."""
        plain = position = 0
        while self._first is not None:
            candidate = self._first.search(text, position)
            if candidate is None:
                break
            start = candidate.start()
            length = self._longest_at(text, start)
            if not length:
                position = start + 1
                continue
            if plain < start:
                yield text[plain:start]
            yield self._ids[text[start : start + length]]
            plain = position = start + length
        if plain < len(text):
            yield text[plain:]

    def _longest_at(self, text: str, start: int) -> int:
        head = text[start : start + 2]
        for length in self._lengths.get(head, ()):
            if text[start : start + length] in self._ids:
                return length
        return 1 if head[:1] in self._ids else 0
