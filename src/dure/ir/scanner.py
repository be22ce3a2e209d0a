"""Tokens of the text form of programs, and errors that show the line with a caret."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeAlias

from dure.errors import IRError

TokenKind: TypeAlias = Literal["word", "value", "integer", "float", "string", "sign", "end"]

_PATTERN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
      | (?P<value>%[\w.]+)
      | (?P<float>\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)
      | (?P<integer>\d+)
      | (?P<word>[^\W\d][\w.]*)
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<sign>//|<=|>=|==|!=|[-+*<>()\[\]{},:;=@])
    """,
    re.VERBOSE,
)
#: Nesting that a program never reaches, and that Python's own stack bears.
DEEPEST = 60
#: Digits of the largest integer that the text may hold (2^63 has 19).
LONGEST = 19


@dataclass(frozen=True, slots=True)
class Token:
    """A token and where it starts."""

    kind: TokenKind
    text: str
    start: int


class Scanner:
    """Reads tokens one by one.  What doesn't fit raises :class:`IRError` with a caret."""

    def __init__(self, text: str, file: str = "<text>") -> None:
        self.text = text
        self.file = file
        self.tokens = self._split(text)
        self.position = 0
        self.depth = 0

    def _split(self, text: str) -> list[Token]:
        tokens: list[Token] = []
        at = 0
        while at < len(text):
            found = _PATTERN.match(text, at)
            if found is None:
                self.fail(f"unexpected character {text[at]!r}", at)
            kind = found.lastgroup
            if kind != "space":
                tokens.append(Token(_KINDS[kind or ""], found.group(), at))
            at = found.end()
        tokens.append(Token("end", "", len(text)))
        return tokens

    def fail(self, what: str, at: int | None = None, *, fix: str = "") -> NoReturn:
        """Raise the error for what was found at an offset (the next token's if None)."""
        start = self.tokens[self.position].start if at is None else at
        line = self.text.count("\n", 0, start) + 1
        begin = self.text.rfind("\n", 0, start) + 1
        end = self.text.find("\n", start)
        shown = self.text[begin : len(self.text) if end < 0 else end]
        column = start - begin
        # A window of the line keeps messages readable whatever the input is.
        left = max(0, column - 60)
        gutter = f"{line:>5} | "
        window = shown[left : left + 120]
        caret = " " * (len(gutter) + column - left) + "^"
        raise IRError(
            what,
            where=f"  {self.file}:{line}:{column + 1}\n{gutter}{window}\n{caret}",
            rule="the text form of a program, as dure.ir.printer writes it",
            fix=fix,
        )

    @property
    def next(self) -> Token:
        """The token that comes next."""
        return self.tokens[self.position]

    def ahead(self, count: int) -> Token:
        """The token ``count`` after the next one."""
        return self.tokens[min(self.position + count, len(self.tokens) - 1)]

    def take(self) -> Token:
        """The next token, consumed."""
        token = self.next
        self.position = min(self.position + 1, len(self.tokens) - 1)
        return token

    def sees(self, *texts: str) -> bool:
        """Whether the next token is one of these words or signs."""
        return self.next.kind in ("word", "sign") and self.next.text in texts

    def accept(self, text: str) -> bool:
        """Consume the next token if it is this word or sign."""
        if self.sees(text):
            self.take()
            return True
        return False

    def expect(self, text: str) -> None:
        """Consume this word or sign, which must come next."""
        if not self.accept(text):
            self.fail(f"expected '{text}', found {self.shown()}")

    def shown(self) -> str:
        """The next token as messages name it."""
        return f"'{self.next.text[:40]}'" if self.next.kind != "end" else "the end of the text"

    def word(self, what: str) -> str:
        """An identifier."""
        if self.next.kind != "word":
            self.fail(f"expected {what}, found {self.shown()}")
        return self.take().text

    def name(self, what: str) -> str:
        """An identifier, or a quoted name."""
        return self.string() if self.next.kind == "string" else self.word(what)

    def string(self) -> str:
        """A quoted string."""
        token = self.next
        if token.kind != "string":
            self.fail(f"expected a string, found {self.shown()}")
        try:
            found: object = json.loads(token.text)
        except ValueError:
            self.fail("a string with an escape that JSON doesn't know")
        assert isinstance(found, str)
        self.take()
        return found

    def integer(self, what: str = "an integer") -> int:
        """An integer with an optional sign."""
        negative = self.accept("-")
        token = self.next
        if token.kind != "integer" or len(token.text) > LONGEST:
            self.fail(f"expected {what}, found {self.shown()}", fix="integers fit in 64 bits")
        self.take()
        return -int(token.text) if negative else int(token.text)

    def deeper(self) -> None:
        """Count a level of nesting; :meth:`shallower` ends it."""
        self.depth += 1
        if self.depth > DEEPEST:
            self.fail("nesting too deep", fix=f"keep to {DEEPEST} levels")

    def shallower(self) -> None:
        """End a level of nesting."""
        self.depth -= 1


_KINDS: dict[str, TokenKind] = {
    "value": "value",
    "float": "float",
    "integer": "integer",
    "word": "word",
    "string": "string",
    "sign": "sign",
}
