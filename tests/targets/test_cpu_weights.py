"""Every weight format through the load program, in a product and in a look-up, against decoding."""

from __future__ import annotations

import numpy as np
import pytest
from tensor_programs import random_value

import dure.library
from dure.compiler.pipeline import compile_program
from dure.ir.blocks import Blocks, quantize
from dure.ir.builder import ProgramBuilder
from dure.ir.dtypes import element_type, int8_block32
from dure.ir.pack import pack

pytestmark = pytest.mark.usefixtures("guarded_buffers")

assert dure.library
FORMATS = [
    *("float32", "float16", "bfloat16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
    *("q4_k", "q5_k", "q6_k"),
]
#: No whole number of panels of any vector width.
ROWS, LENGTH = 37, 256


def program(dtype, *, product):
    b = ProgramBuilder("weights")
    count = b.symbol("T", 1, 4)
    weight = b.weight("w", (ROWS, LENGTH), dtype)
    if product:
        b.output("y", b.linear(b.input("x", (count, LENGTH)), weight))
    tokens = b.input("tokens", (count,), "int32", index=(0, ROWS - 1))
    b.output("rows", b.embedding(weight, tokens))
    return b.build()


def decoded(value):
    return value.decode() if isinstance(value, Blocks) else value.astype(np.float32)


@pytest.mark.parametrize("product", [True, False], ids=["packed", "as stored"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_format_is_multiplied_and_looked_up(dtype, product):
    rng = np.random.default_rng(3)
    element = element_type(dtype)
    value = random_value(rng, element, (ROWS, LENGTH))
    compiled = compile_program(program(dtype, product=product), workers=2)
    kind = compiled.weight_types["w"]
    stored = pack(value, kind.layout, element) if isinstance(value, Blocks) else value
    compiled.load({"w": stored})
    tokens = np.array([36, 0, 17], np.int32)
    inputs = {"tokens": tokens}
    x = rng.standard_normal((3, LENGTH)).astype(np.float32)
    if product:
        inputs["x"] = x
    found = compiled.run(inputs)
    np.testing.assert_array_equal(found["rows"], decoded(value)[tokens])
    if product:
        blocks = isinstance(value, Blocks)
        seen = quantize(x, int8_block32).decode() if blocks else x
        expected = seen.astype(np.float64) @ decoded(value).astype(np.float64).T
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found["y"], expected, atol=2e-5 * scale, rtol=0)
    moved = {w.name for w in compiled._plan.weights}
    assert moved == ({"w"} if product else set())
