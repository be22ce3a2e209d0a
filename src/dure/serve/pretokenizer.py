"""How byte-level BPE tokenizers cut a text into words before merging.

A GGUF file names its rule in ``tokenizer.ggml.pre``; :data:`PRE_TOKENIZERS` says what each name
means.  The patterns are the ones in the models' published ``tokenizer.json`` (Oniguruma syntax, as
the ``tokenizers`` library compiles them); which names share a rule follows llama.cpp's
``llama-vocab.cpp``. Patterns apply in order: each cuts the pieces that the one before it left, and
what no pattern matches stays a piece of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer as LibraryPreTokenizer


@dataclass(frozen=True)
class PreTokenizer:
    """One rule: its patterns, and what goes with it when the file's metadata are silent."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is itself a token is taken whole, whatever its merges would give."""
    add_bos: bool = False
    compose: bool = False
    """The text is brought to Unicode's normal form C first, as the models' own tokenizers do."""

    def build(self) -> LibraryPreTokenizer:
        """The rule for the ``tokenizers`` library: words, with bytes as visible characters."""
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

        cuts: list[LibraryPreTokenizer] = [
            Split(Regex(pattern), behavior="isolated", invert=False) for pattern in self.patterns
        ]
        return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = "|".join((_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _MARKS, _SPACES))
_QWEN2 = "|".join((_CONTRACTIONS, _WORDS, r"\p{N}", _MARKS, _SPACES))
_QWEN35 = "|".join(
    (
        _CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        _SPACES,
    )
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_CASED_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = "|".join((*_CASED, r"\p{N}", _CASED_MARKS, _SPACES))
_GPT4O = "|".join(
    (*(words + _CONTRACTIONS + "?" for words in _CASED), r"\p{N}{1,3}", _CASED_MARKS, _SPACES)
)
_DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_EXAONE_MOE = "|".join(
    (
        _CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
        r"\s*[\r\n]|\s+(?!\S)|\s+",
    )
)

_RULES: dict[PreTokenizer, str] = {
    # No name was written: what llama.cpp falls back to for files from before the key existed.
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): "default",
    PreTokenizer((_GPT2,)): (
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 a.x-4.0 mellum gigachat "
        "modern-bert jina-es jina-de jina-v2-es jina-v2-de"
    ),
    PreTokenizer((r"\p{N}", _GPT2)): (
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"
    ),
    PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True): (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2"
    ),
    PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe chatglm-bpe",
    PreTokenizer((_LLAMA3,), ignore_merges=True): "glm4 glm5",
    PreTokenizer((_QWEN2,), compose=True): "qwen2 deepseek-r1-qwen f2llmv2",
    PreTokenizer((_QWEN2,)): "kormo stablelm2 hunyuan megrez grok-2 solar-open",
    PreTokenizer((_QWEN35,), compose=True): "qwen35",
    PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True): "tekken",
    PreTokenizer((_GPT4O,)): "gpt-4o llama4 kanana2 minimax-m2 talkie",
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")): "falcon",
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")): (
        "deepseek-coder"
    ),
    PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_WORDS)): (
        "deepseek-v3 hunyuan-dense joyai-llm"
    ),
    PreTokenizer((_BLOOM,)): "bloom poro-chat gpt3-finnish",
    PreTokenizer((_BLOOM, r"\p{N}")): "viking",
    PreTokenizer((_EXAONE_MOE,)): "exaone-moe",
}

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: rule for rule, names in _RULES.items() for name in names.split()
}
"""The rule of each name that ``tokenizer.ggml.pre`` may have."""
