"""Every way in which a file's tokenizer can be missing or malformed is a ModelFileError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf_builder as gb
import pytest
from gguf_builder import Builder
from tokenizer_files import (
    BPE_MERGES,
    BPE_TOKENS,
    T,
    bpe_builder,
    opened,
    spm_builder,
    spm_vocabulary,
)
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryTokenizer

from dure.errors import ModelFileError
from dure.serve.tokenizer import Tokenizer

Change = Callable[[Builder], object]


def without(key: str) -> Change:
    raw = gb.string(T + key)
    return lambda builder: builder.entries.__setitem__(
        slice(None), [entry for entry in builder.entries if not entry.startswith(raw)]
    )


def replaced(key: str, kind: int, value: object) -> Change:
    def change(builder: Builder) -> None:
        without(key)(builder)
        if isinstance(value, list):
            builder.add_array(T + key, kind, value)
        else:
            builder.add(T + key, kind, value)

    return change


SIZE = len(BPE_TOKENS) + 4
BPE_CASES: dict[str, tuple[Change, str]] = {
    "no kind": (without("model"), r"ggml\.model' is missing"),
    "kind of another type": (replaced("model", gb.U32, 1), "is UINT32, not a string"),
    "kind not UTF-8": (replaced("model", gb.STRING, b"\xff"), "not UTF-8"),
    "unknown kind": (replaced("model", gb.STRING, "bert"), "kind 'bert' is unknown"),
    "unknown pre-tokenizer": (replaced("pre", gb.STRING, "x"), "pre-tokenizer 'x' is unknown"),
    "pre of another type": (replaced("pre", gb.U32, 1), "is UINT32, not a string"),
    "no tokens": (without("tokens"), r"ggml\.tokens' is missing"),
    "tokens of another type": (replaced("tokens", gb.I32, [1]), "ARRAY of INT32"),
    "empty tokens": (replaced("tokens", gb.STRING, []), "empty list"),
    "tokens that are no bytes": (
        replaced("tokens", gb.STRING, [f"word{i}" for i in range(SIZE)]),
        "printable ASCII",
    ),
    "no merges": (without("merges"), r"ggml\.merges' is missing"),
    "merges of another type": (replaced("merges", gb.STRING, "a b"), "is STRING, not an array"),
    "a merge without a space": (replaced("merges", gb.STRING, ["ab"]), "merge 0 is 'ab'"),
    "a merge of nothing": (replaced("merges", gb.STRING, [" b"]), "merge 0 is ' b'"),
    "a merge of unknown tokens": (
        replaced("merges", gb.STRING, ["qqq zzz"]),
        "does not fit the vocabulary",
    ),
    "a merge to an unknown token": (
        replaced("merges", gb.STRING, ["Q Z"]),
        "does not fit the vocabulary",
    ),
    "a merge to a token longer than any": (
        replaced("merges", gb.STRING, [f"{BPE_TOKENS[-1]} {max(BPE_TOKENS, key=len)}"]),
        "is no token",
    ),
    "a merge that is not UTF-8": (
        replaced("merges", gb.STRING, [b"\xff a"]),
        "does not fit the vocabulary",
    ),
    "too few types": (replaced("token_type", gb.I32, [1, 1]), "2 entries for"),
    "types of another type": (replaced("token_type", gb.F32, [1.0]), "ARRAY of FLOAT32"),
    "unknown token type": (replaced("token_type", gb.I32, [7] * SIZE), "no token type"),
    "negative token type": (replaced("token_type", gb.I32, [-1] * SIZE), "no token type"),
    "BOS outside": (replaced("bos_token_id", gb.U32, SIZE), f"but the vocabulary has {SIZE}"),
    "EOS outside": (replaced("eos_token_id", gb.I32, -2), "eos_token_id is -2"),
    "EOT outside": (replaced("eot_token_id", gb.U64, 2**63), "eot_token_id is"),
    "EOS of another type": (replaced("eos_token_id", gb.STRING, "</s>"), "STRING, not an integer"),
    "BOS wanted and missing": (
        lambda builder: (without("bos_token_id")(builder), builder.add(T + "add_bos_token", 7, 1)),
        "add_bos_token is true",
    ),
    "EOS wanted and missing": (
        lambda builder: (without("eos_token_id")(builder), builder.add(T + "add_eos_token", 7, 1)),
        "add_eos_token is true",
    ),
    "a flag of another type": (replaced("add_bos_token", gb.U32, 1), "UINT32, not a bool"),
    "a template of another type": (
        lambda builder: builder.add("tokenizer.chat_template", gb.U32, 1),
        "UINT32, not a string",
    ),
}


@pytest.mark.parametrize("case", list(BPE_CASES))
def test_byte_level_bpe(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, match = BPE_CASES[case]
    builder = bpe_builder()
    change(builder)
    with pytest.raises(ModelFileError, match=match) as caught:
        Tokenizer.from_gguf(opened(builder, tmp_path))
    assert "tokenizer.gguf" in caught.value.where and caught.value.fix
    assert capfd.readouterr().err == "", "a library's panic was printed"


SPM_CASES: dict[str, tuple[Change, str]] = {
    "no scores": (without("scores"), r"ggml\.scores' is missing"),
    "too few scores": (replaced("scores", gb.F32, [0.0]), "1 entries for"),
    "scores of another type": (replaced("scores", gb.STRING, ["0"]), "ARRAY of STRING"),
    "scores that are no numbers": (
        replaced("scores", gb.F32, [float("nan")] * len(spm_vocabulary()[0])),
        "not a number",
    ),
    "space prefix of another type": (
        replaced("add_space_prefix", gb.STRING, "no"),
        "STRING, not a bool",
    ),
    "neither byte tokens nor unknown": (
        lambda builder: (
            [
                replaced(key, kind, value)(builder)
                for key, kind, value in (
                    ("tokens", gb.STRING, ["a", "b", "</s>"]),
                    ("scores", gb.F32, [0.0, 0.0, 0.0]),
                    ("token_type", gb.I32, [1, 1, 3]),
                )
            ]
            and without("unknown_token_id")(builder)
        ),
        "0 of 256 byte tokens and no unknown",
    ),
}
"""Further cases than those that both kinds share."""


@pytest.mark.parametrize("case", list(SPM_CASES))
def test_sentencepiece(case: str, tmp_path: Path) -> None:
    change, match = SPM_CASES[case]
    builder = spm_builder()
    change(builder)
    with pytest.raises(ModelFileError, match=match):
        Tokenizer.from_gguf(opened(builder, tmp_path))


def test_tokens_that_are_not_utf8_are_kept_and_do_no_harm(tmp_path: Path) -> None:
    tokens: list[str | bytes] = [*BPE_TOKENS, b"\xff\xfe", "<|im_start|>", "<|im_end|>", b"<\xe2>"]
    builder = bpe_builder()
    replaced("tokens", gb.STRING, tokens)(builder)
    tokenizer = Tokenizer.from_gguf(opened(builder, tmp_path))
    text = "plain text"
    assert tokenizer.decode(tokenizer.encode(text, add_special=True, parse_special=True)) == text
    assert tokenizer.piece(SIZE - 1) == b"<\xe2>"


def hf_folder(folder: Path, **config: object) -> Path:
    library = LibraryTokenizer(
        models.BPE(
            {token: index for index, token in enumerate(BPE_TOKENS)},
            [tuple(merge.split(" ")) for merge in BPE_MERGES],
        )
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<|im_end|>")])
    library.add_tokens([AddedToken("<tool>", normalized=False)])
    first = len(BPE_TOKENS)
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", first)]
    )
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_hugging_face_folder(tmp_path: Path) -> None:
    folder = hf_folder(
        tmp_path,
        bos_token={"content": "<s>"},
        eos_token="<|im_end|>",
        chat_template=[{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}],
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    tokenizer = Tokenizer.from_hf_folder(folder)
    first = len(BPE_TOKENS)
    assert tokenizer.vocab_size == first + 3
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.add_eos) == (first, True, False)
    assert tokenizer.eos_ids == {3, 4, first + 1}
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "<|im_end|>")
    assert tokenizer.chat_template == "d"
    text = "두레 <s><|im_end|><tool> 👨‍🌾"
    ids = tokenizer.encode(text, add_special=True, parse_special=True)
    assert ids[0] == first and ids.count(first) == 2 and first + 1 in ids and first + 2 in ids
    assert tokenizer.decode(ids, skip_special=False) == "<s>" + text
    assert tokenizer.decode(ids) == "두레 <tool> 👨‍🌾"
    plain = tokenizer.encode(text, add_special=False, parse_special=False)
    assert first not in plain and first + 2 in plain and tokenizer.decode(plain) == text
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_hf_folder(folder).chat_template == "file"


def test_config_overrides_the_post_processor(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_hf_folder(
        hf_folder(tmp_path, add_bos_token=False, add_eos_token=True, eos_token="<|im_end|>")
    )
    ids = tokenizer.encode("x", add_special=True, parse_special=False)
    assert ids[0] != len(BPE_TOKENS) and ids[-1] == len(BPE_TOKENS) + 1


HF_CASES: dict[str, tuple[str, str | bytes, str]] = {
    "not JSON": ("tokenizer.json", "{", "not JSON"),
    "not an object": ("tokenizer.json", "[]", "not a JSON object"),
    "not UTF-8": ("tokenizer.json", b"\xff\xfe\x00", "cannot be read"),
    "nested deep": ("tokenizer.json", "[" * 200_000, "not JSON"),
    "no model": ("tokenizer.json", "{}", "cannot be built"),
    "unknown model": ("tokenizer.json", '{"model": {"type": "X"}}', "cannot be built"),
    "no decoder": (
        "tokenizer.json",
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
        "decoder is of an unknown kind",
    ),
    "config not JSON": ("tokenizer_config.json", "nope", "not JSON"),
    "generation config not JSON": ("generation_config.json", "{]", "not JSON"),
}


@pytest.mark.parametrize("case", list(HF_CASES))
def test_damaged_hugging_face_folder(case: str, tmp_path: Path) -> None:
    name, content, match = HF_CASES[case]
    hf_folder(tmp_path)
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ModelFileError, match=match):
        Tokenizer.from_hf_folder(tmp_path)


def test_no_folder_or_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no tokenizer\.json"):
        Tokenizer.from_hf_folder(tmp_path)
    with pytest.raises(ModelFileError, match=r"no tokenizer\.json"):
        Tokenizer.from_hf_folder(tmp_path / "missing")
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ModelFileError, match="cannot be read"):
        Tokenizer.from_hf_folder(tmp_path)
