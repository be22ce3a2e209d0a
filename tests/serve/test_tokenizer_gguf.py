"""Tokenizers from GGUF metadata: ids as the references give them, and exact round trips."""

from __future__ import annotations

from pathlib import Path

import gguf_builder as gb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import (
    BPE_MERGES,
    BPE_SPECIAL,
    BPE_TOKENS,
    FIRST,
    TEXT,
    T,
    bpe_builder,
    opened,
    spm_builder,
    spm_reference,
    spm_vocabulary,
)
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers

from dure.errors import UsageError
from dure.serve.pretokenizer import PRE_TOKENIZERS
from dure.serve.tokenizer import Detokenizer, Tokenizer

PIECES = ["the", " rice", "두레", "  ", "\n", "\n\n", "<tool>", "<|im_end|>", "12", "é", "👨‍🌾"]
PIECES += ["▁", "a", "aa", "'ll", "\t", "<", "</s>", "<0x41>", " ", "."]
text_like = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(PIECES),
        max_size=25,
    ).map("".join),
)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(opened(bpe_builder(), tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(opened(spm_builder(False), tmp_path_factory.mktemp("spm")))


@pytest.fixture(scope="module")
def spm_prefix(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(opened(spm_builder(), tmp_path_factory.mktemp("spmp")))


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False, parse_special=False)


def test_bpe_facts(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == FIRST + 4
    assert (bpe.bos_id, bpe.bos_token, bpe.add_bos) == (FIRST, "<|endoftext|>", False)
    assert bpe.eos_ids == {FIRST, FIRST + 2}  # eos, and <|im_end|> by its name
    assert bpe.chat_template is None


@settings(max_examples=80, deadline=None)
@given(text=text_like)
def test_bpe_is_the_librarys_own_pipeline(bpe: Tokenizer, text: str) -> None:
    library = LibraryTokenizer(
        models.BPE(
            {token: index for index, token in enumerate(BPE_TOKENS)},
            [tuple(merge.split(" ")) for merge in BPE_MERGES],
        )
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    expected: list[int] = []
    for index, part in enumerate(text.split("<tool>")):
        expected += [FIRST + 3] if index else []
        expected += library.encode(part).ids
    assert plain(bpe, text) == expected


@settings(max_examples=80, deadline=None)
@given(text=text_like)
def test_bpe_round_trip(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(plain(bpe, text)) == text


@settings(max_examples=80, deadline=None)
@given(text=text_like)
def test_spm_is_greedy_merging_by_score(spm: Tokenizer, text: str) -> None:
    tokens = spm_vocabulary()[0]
    expected: list[int] = []
    for index, part in enumerate(text.split("<tool>")):
        expected += [tokens.index("<tool>")] if index else []
        for newline, piece in enumerate(part.split("\n\n")):
            expected += [tokens.index("\n\n")] if newline else []
            expected += spm_reference(piece)
    assert plain(spm, text) == expected


@settings(max_examples=80, deadline=None)
@given(text=text_like.filter(lambda text: "▁" not in text))
def test_spm_round_trip(spm: Tokenizer, spm_prefix: Tokenizer, text: str) -> None:
    assert spm.decode(plain(spm, text)) == text
    if "<tool>" not in text and "\n\n" not in text:
        assert spm_prefix.decode(plain(spm_prefix, text)) == text


def test_spm_space_prefix_and_specials(spm: Tokenizer, spm_prefix: Tokenizer) -> None:
    tokens = spm_vocabulary()[0]
    the, tool = tokens.index("▁the"), tokens.index("<tool>")
    assert spm_prefix.encode("the<tool>the", add_special=True, parse_special=False) == [
        1,  # BOS is on by default for this kind
        the,
        tool,
        the,
    ]
    assert plain(spm, "the") == [tokens.index("the")]
    assert spm_prefix.decode([1, the]) == "the"
    assert spm_prefix.decode([the, the]) == "the the"
    detokenizer = Detokenizer(spm_prefix)  # a generation that goes on after a prompt
    assert detokenizer.push(the) == " the"


def test_spm_control_tokens_only_when_asked(spm: Tokenizer) -> None:
    assert spm.encode("</s>", add_special=False, parse_special=True) == [2]
    assert 2 not in plain(spm, "</s>") and spm.decode(plain(spm, "</s>")) == "</s>"
    assert spm.decode(plain(spm, "<0x41>")) == "<0x41>"
    assert spm.decode([1, 2]) == "" and spm.decode([1, 2], skip_special=False) == "<s></s>"


def test_spm_without_byte_tokens_uses_unknown(tmp_path: Path) -> None:
    builder = gb.Builder().add(T + "model", gb.STRING, "llama")
    builder.add_array(T + "tokens", gb.STRING, ["<unk>", "a", "b", "ab"])
    builder.add_array(T + "scores", gb.F32, [0, -2, -3, -1])
    builder.add_array(T + "token_type", gb.I32, [2, 1, 1, 1])
    builder.add(T + "unknown_token_id", gb.U32, 0).add(T + "add_space_prefix", gb.BOOL, False)
    tokenizer = Tokenizer.from_gguf(opened(builder, tmp_path))
    assert plain(tokenizer, "abxa") == [3, 0, 1]
    assert tokenizer.add_bos is False  # no BOS in the file, none by default


def test_spm_long_words_take_linear_time(spm: Tokenizer) -> None:
    text = "a" * 30_000 + "두" * 20_000
    assert spm.decode(plain(spm, text)) == text


def test_control_tokens_in_text(bpe: Tokenizer) -> None:
    text = "<|im_start|>user\nHi<|im_end|>"
    ids = bpe.encode(text, add_special=False, parse_special=True)
    assert ids[0] == FIRST + 1 and ids[-1] == FIRST + 2
    assert not set(plain(bpe, text)) & {FIRST, FIRST + 1, FIRST + 2}
    assert bpe.decode(plain(bpe, text)) == text
    assert bpe.decode(ids) == "user\nHi" and bpe.decode(ids, skip_special=False) == text


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken", "gpt-4o"])
def test_control_tokens_cannot_be_spelled_as_words(tmp_path: Path, pre: str) -> None:
    """With ignore_merges a whole word is looked up as a token; a control token is none."""
    builder = bpe_builder(pre)
    builder.entries[2] = (
        gb.Builder()
        .add_array(T + "tokens", gb.STRING, [*BPE_TOKENS, "stop", *BPE_SPECIAL[1:], "<tool>"])
        .entries[0]
    )
    tokenizer = Tokenizer.from_gguf(opened(builder, tmp_path))
    assert FIRST not in plain(tokenizer, "stop")
    assert tokenizer.encode("stop", add_special=False, parse_special=True) == [FIRST]


def test_begin_and_end_tokens(tmp_path: Path) -> None:
    builder = bpe_builder().add(T + "add_bos_token", gb.BOOL, True)
    builder.add(T + "add_eos_token", gb.BOOL, True)
    tokenizer = Tokenizer.from_gguf(opened(builder, tmp_path))
    assert tokenizer.encode("", add_special=True, parse_special=False) == [FIRST, FIRST]
    ids = tokenizer.encode("hi", add_special=True, parse_special=False)
    assert ids[0] == ids[-1] == FIRST and tokenizer.decode(ids) == "hi"
    assert plain(tokenizer, "") == []


def test_end_tokens_come_from_metadata_and_known_names(tmp_path: Path) -> None:
    builder = spm_builder().add(T + "eot_token_id", gb.U32, 300)
    assert Tokenizer.from_gguf(opened(builder, tmp_path)).eos_ids == {2, 300}
    tokens = [*spm_vocabulary()[0][:-1], "<end_of_turn>"]
    builder = spm_builder()
    builder.entries[1] = gb.Builder().add_array(T + "tokens", gb.STRING, tokens).entries[0]
    found = Tokenizer.from_gguf(opened(builder, tmp_path)).eos_ids
    assert found == {2, len(tokens) - 1}


def test_harmony_messages_end_without_ending_the_turn(tmp_path: Path) -> None:
    builder = bpe_builder("gpt-4o")
    names = ["<|end|>", "<|return|>", "<|call|>", "<tool>"]
    builder.entries[2] = (
        gb.Builder().add_array(T + "tokens", gb.STRING, [*BPE_TOKENS, *names]).entries[0]
    )
    builder.entries[-1] = gb.Builder().add(T + "eos_token_id", gb.U32, FIRST + 1).entries[0]
    assert Tokenizer.from_gguf(opened(builder, tmp_path)).eos_ids == {FIRST + 1, FIRST + 2}


def test_chat_template_is_passed_on(tmp_path: Path) -> None:
    builder = bpe_builder().add("tokenizer.chat_template", gb.STRING, "{{ messages }}")
    assert Tokenizer.from_gguf(opened(builder, tmp_path)).chat_template == "{{ messages }}"


def test_qwen_composes_unicode(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(opened(bpe_builder("qwen2"), tmp_path))
    assert plain(tokenizer, "e\u0301") == plain(tokenizer, "é")


WORDS = {
    "smollm": ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "Ġwon", "!!", "ĊĊĠ", "ĠNow"],
    "gpt-2": ["I", "'ll", "Ġpay", "Ġ1234", "Ġwon", "!!", "ĊĊĠ", "ĠNow"],
    "llama-bpe": ["I", "'ll", "Ġpay", "Ġ", "123", "4", "Ġwon", "!!ĊĊ", "Ġ", "ĠNow"],
    "qwen2": ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "Ġwon", "!!ĊĊ", "Ġ", "ĠNow"],
    "tekken": ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "Ġwon", "!!ĊĊ", "Ġ", "ĠNow"],
    "gpt-4o": ["I'll", "Ġpay", "Ġ", "123", "4", "Ġwon", "!!ĊĊ", "Ġ", "ĠNow"],
    "deepseek-v3": ["I", "'ll", "Ġpay", "Ġ", "123", "4", "Ġwon", "!!ĊĊ", "Ġ", "ĠNow"],
}


@pytest.mark.parametrize("name", list(WORDS))
def test_words_of_each_rule(name: str) -> None:
    library = PRE_TOKENIZERS[name].build()
    words = [word for word, _ in library.pre_tokenize_str("I'll pay 1234 won!!\n\n  Now")]
    assert words == WORDS[name]


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_rule_compiles_and_loses_nothing(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(opened(bpe_builder(name), tmp_path))
    text = TEXT + "camelCaseWord HTTPServer x_y ١٢٣ ½ 中文 e\u0301 🇰🇷\r\n\t \u00a0end  "
    if PRE_TOKENIZERS[name].compose:
        text = text.replace("e\u0301", "é")
    assert tokenizer.decode(plain(tokenizer, text)) == text


def test_a_missing_rule_is_the_default_one(tmp_path: Path) -> None:
    unnamed = Tokenizer.from_gguf(opened(bpe_builder(None), tmp_path))
    ids = plain(unnamed, TEXT)
    assert ids == plain(Tokenizer.from_gguf(opened(bpe_builder("default"), tmp_path)), TEXT)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_streaming_gives_whole_characters_and_the_same_text(
    bpe: Tokenizer, spm: Tokenizer, data: st.DataObject
) -> None:
    for tokenizer in (bpe, spm):
        last = tokenizer.vocab_size - 1
        ids = data.draw(st.lists(st.integers(0, last), max_size=30))
        skip = data.draw(st.booleans())
        detokenizer = Detokenizer(tokenizer, skip_special=skip, at_start=True)
        pieces = [detokenizer.push(token) for token in ids]
        text = "".join(pieces) + detokenizer.flush()
        assert text == tokenizer.decode(ids, skip_special=skip)
        raw = b"".join(
            tokenizer.piece(token) for token in ids if not (skip and tokenizer.is_special(token))
        )
        assert text == raw.decode("utf-8", "replace")


def test_streaming_holds_back_half_a_character(bpe: Tokenizer) -> None:
    ids = plain(bpe, "🌾")
    assert len(ids) > 1
    detokenizer = Detokenizer(bpe)
    assert [detokenizer.push(token) for token in ids] == [""] * (len(ids) - 1) + ["🌾"]
    detokenizer = Detokenizer(bpe)
    assert detokenizer.push(ids[0]) == "" and detokenizer.flush() == "\ufffd"


def test_text_that_is_no_unicode(bpe: Tokenizer) -> None:
    with pytest.raises(UsageError, match="not valid Unicode"):
        plain(bpe, "a\ud800b")


@pytest.mark.parametrize("token", [-1, FIRST + 4, 2**40])
def test_ids_outside_the_vocabulary(bpe: Tokenizer, token: int) -> None:
    with pytest.raises(UsageError, match="outside the vocabulary"):
        bpe.decode([token])


@pytest.mark.model
def test_smollm2(smollm2_path: Path) -> None:
    from dure.frontends.gguf import open_gguf

    with open_gguf(smollm2_path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, {0, 2}, False)
    # Ids from transformers' AutoTokenizer on the same file.
    assert plain(tokenizer, "Hello world") == [19556, 905]
    assert tokenizer.decode(plain(tokenizer, TEXT)) == TEXT


@pytest.mark.model
@pytest.mark.long
def test_gemma3(gemma3_path: Path) -> None:
    from dure.frontends.gguf import open_gguf

    with open_gguf(gemma3_path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (2, {1, 106}, True)
    # Ids from SentencePiece on the same pieces and scores.
    assert tokenizer.encode("Hello world", add_special=True, parse_special=False) == [2, 9259, 1902]
    assert tokenizer.decode(plain(tokenizer, TEXT)) == TEXT
