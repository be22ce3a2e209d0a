"""A tokenizer from a GGUF file's metadata: special tokens around the encoder of the file's kind."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

from dure.errors import ModelFileError
from dure.frontends.gguf import GGUFFile
from dure.serve import bytelevel_bpe, sentencepiece
from dure.serve.bytelevel_bpe import ByteLevelBPE
from dure.serve.sentencepiece import SentencePieceBPE
from dure.serve.special_tokens import SpecialTokenFinder
from dure.serve.vocabulary import PREFIX, TokenType, Vocabulary, read_vocabulary

_STRUCTURE = (TokenType.CONTROL, TokenType.UNKNOWN)


class Encoder(Protocol):
    """Plain text to ids, by the rules of one kind of tokenizer."""

    def normalize(self, text: str) -> str:
        """The text as the vocabulary's tokens are written, special tokens included."""
        ...

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of normalized text.  No token in it is special; ``after_special`` says that it
        begins the whole text or follows a special token."""
        ...


class GGUFTokenizer:
    """The backend of :class:`~dure.serve.tokenizer.Tokenizer` for GGUF files."""

    def __init__(self, file: GGUFFile) -> None:
        """Raises ModelFileError for whatever is missing, malformed or unknown."""
        self.kind = file.metadata.require_str(PREFIX + "model")
        if self.kind not in ("gpt2", "llama"):
            raise ModelFileError(
                f"the tokenizer kind {self.kind!r} is unknown",
                where=f"{file.path}, {PREFIX}model",
                rule="the kinds gpt2 (byte-level BPE) and llama (SentencePiece) are read",
                fix="take a model with one of these, or give its Hugging Face folder",
            )
        vocabulary = self.vocabulary = read_vocabulary(file)
        self._types = vocabulary.types.tobytes()  # indexed faster than the array
        self._pieces: dict[int, bytes] = {}
        self._encoder: Encoder
        if self.kind == "llama":
            self._encoder = pieces = SentencePieceBPE(file, vocabulary)
            self.strips_space, bos_by_default = pieces.add_space_prefix, True
        else:
            self._encoder = words = ByteLevelBPE(file, vocabulary)
            self.strips_space, bos_by_default = False, words.rule.add_bos
        self.add_bos, self.add_eos = _added_ends(file, vocabulary, bos_by_default)
        self.bos_ids = [vocabulary.bos_id] if vocabulary.bos_id is not None else []
        self.eos_ids = [vocabulary.eos_id] if vocabulary.eos_id is not None else []

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.tokens)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of ``text``; control tokens in it count only with ``parse_special``, user-defined
        ones always, as the models were trained."""
        finder = self._all_special if parse_special else self._user_defined
        ids: list[int] = []
        after_special = True
        for piece in finder.split(self._encoder.normalize(text)):
            if isinstance(piece, int):
                ids.append(piece)
                after_special = True
            else:
                ids += self._encoder.encode(piece, after_special)
                after_special = False
        return ids

    def piece(self, token: int) -> bytes:
        """The bytes of one token."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._spell(token)
        return known

    def is_special(self, token: int) -> bool:
        """Whether a token marks structure and has no text of its own."""
        return self._types[token] in _STRUCTURE

    def _spell(self, token: int) -> bytes:
        text = self.vocabulary.tokens[token]
        kind = TokenType(self._types[token])
        if kind in _STRUCTURE:
            return text.encode("utf-8", "surrogateescape")
        if self.kind == "llama":
            return sentencepiece.bytes_of_token(text, kind)
        if kind is TokenType.USER_DEFINED:
            return text.encode("utf-8", "surrogateescape")
        return bytelevel_bpe.bytes_of_token(text)

    @cached_property
    def _user_defined(self) -> SpecialTokenFinder:
        return self._finder(TokenType.USER_DEFINED)

    @cached_property
    def _all_special(self) -> SpecialTokenFinder:
        return self._finder(TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.UNKNOWN)

    def _finder(self, *types: TokenType) -> SpecialTokenFinder:
        tokens, normalize = self.vocabulary.tokens, self._encoder.normalize
        return SpecialTokenFinder(
            (normalize(tokens[index]), index) for index in self.vocabulary.of_type(*types)
        )


def _added_ends(file: GGUFFile, vocabulary: Vocabulary, bos_by_default: bool) -> tuple[bool, bool]:
    """Whether texts begin with BOS and end with EOS; an error where the file wants one it lacks."""
    has_bos, has_eos = vocabulary.bos_id is not None, vocabulary.eos_id is not None
    add_bos = file.metadata.get_bool(PREFIX + "add_bos_token", bos_by_default and has_bos)
    add_eos = file.metadata.get_bool(PREFIX + "add_eos_token", False)
    for wanted, present, name in ((add_bos, has_bos, "bos"), (add_eos, has_eos, "eos")):
        if wanted and not present:
            raise ModelFileError(
                f"{PREFIX}add_{name}_token is true, but there is no {PREFIX}{name}_token_id",
                where=file.path,
                rule="a text can begin or end only with a token that the file names",
                fix="convert the model again with a current converter",
            )
    return add_bos, add_eos
