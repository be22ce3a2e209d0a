"""BERT: inputs of a batch, the program interpreted, and on the CPU against ``transformers``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dure.library
from dure.compiler.pipeline import compile_program
from dure.errors import UsageError
from dure.ir.interpret import execute
from dure.models import shapes
from dure.models.encoder import (
    ENCODER_NAMES,
    EncoderLimits,
    encoder_batch,
    encoder_program,
    encoder_specs,
    encoder_types,
)
from dure.models.encoder_config import EncoderConfig
from dure.models.stored import program_name

assert dure.library
LIMITS = EncoderLimits(pages=8, sequences=4, query_rows=8)
TINY = EncoderConfig(
    hidden=64, intermediate=96, layers=3, heads=4, vocabulary=512, context=40, token_types=2
)
LENGTHS = (17, 1, 40, 33)


def batch(seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, TINY.vocabulary, n).tolist() for n in LENGTHS]
    return ids, [rng.integers(0, 2, n).tolist() for n in LENGTHS]


def random_weights(labels: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    found: dict[str, np.ndarray] = {}
    for spec in encoder_specs(TINY, labels):
        values = rng.standard_normal(spec.shape).astype(np.float32)
        found[program_name(spec)] = values * np.float32(spec.shape[-1] ** -0.5)
    return found


def test_a_batch_lies_on_pages() -> None:
    ids, types = batch()
    found = encoder_batch(TINY, LIMITS, ids[:3], types[:3])
    assert found.places == (slice(0, 17), slice(32, 33), slice(48, 88))
    assert found.sizes == {"P": 6, "W": 9}
    inputs = found.inputs
    assert inputs["tokens"].shape == (96,) and inputs["context"].tolist() == [17, 1, 40, 0]
    assert inputs["block_table"].tolist() == [[0, 1, 0], [2, 0, 0], [3, 4, 5], [0, 0, 0]]
    assert inputs["work_rows"].tolist() == [8, 8, 1, 1, 8, 8, 8, 8, 8]
    assert inputs["positions"][48:88].tolist() == list(range(40))
    for wrong, message in (
        ([], "a batch of 0 sequences"),
        ([[1]] * 5, "a batch of 5 sequences"),
        ([[1] * 40] * 3, "on 9 pages"),
        ([[1] * 41], "sequences of 41 to 41 tokens"),
        ([[1], []], "sequences of 0 to 1 tokens"),
    ):
        with pytest.raises(UsageError, match=message):
            encoder_batch(TINY, LIMITS, wrong)
    with pytest.raises(UsageError, match="other lengths"):
        encoder_batch(TINY, LIMITS, [[1, 2]], [[1]])


def test_the_compiled_program_computes_what_the_program_means() -> None:
    program = encoder_program(TINY, encoder_types(TINY, "float32"), LIMITS)
    weights = random_weights(0)
    compiled = compile_program(program, workers=2)
    compiled.load(weights)
    ids, types = batch()
    three = encoder_batch(TINY, LIMITS, ids[1:], types[1:])
    found = compiled.run(three.inputs, three.sizes)["hidden"].copy()
    names = program.attrs["names"]
    assert isinstance(names, tuple)
    values = {**weights, **three.inputs}
    (expected,) = execute(program, [values[str(n)] for n in names], three.sizes)
    for place in three.places:
        np.testing.assert_allclose(found[place], expected[place], atol=2e-5, rtol=1e-4)
    # A sequence's bits are the same alone.
    alone = encoder_batch(TINY, LIMITS, ids[3:], types[3:])
    again = compiled.run(alone.inputs, alone.sizes)["hidden"][alone.places[0]]
    np.testing.assert_array_equal(again, found[three.places[2]])


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_logits_are_those_of_transformers(activation: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from reference_models import randomize

    values = transformers.BertConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=40,
        hidden_act=activation,
        attn_implementation="eager",
    )
    model = transformers.BertForQuestionAnswering(values).float().eval()
    randomize(model)
    values.save_pretrained(tmp_path)
    config = shapes.encoder_config(tmp_path)
    program = encoder_program(config, encoder_types(config, "float32", 2), LIMITS, labels=2)
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    compiled = compile_program(program, workers=2)
    specs = encoder_specs(config, 2)
    compiled.load({program_name(s): state[s.in_file(ENCODER_NAMES)] for s in specs})
    ids, types = batch()
    for part in (slice(0, 2), slice(2, 4)):
        two = encoder_batch(config, LIMITS, ids[part], types[part])
        found = compiled.run(two.inputs, two.sizes)["logits"]
        for row, kinds, place in zip(ids[part], types[part], two.places, strict=True):
            with torch.no_grad():
                out = model(torch.tensor([row]), token_type_ids=torch.tensor([kinds]))
            expected = np.stack([out.start_logits[0].numpy(), out.end_logits[0].numpy()], axis=1)
            error = np.abs(found[place] - expected).max() / np.abs(expected).max()
            assert error < 2e-5, f"{error:.1e}"
