"""The text form: printing, parsing back, and what the parser says about anything else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tile_programs import Program, programs

from dure.errors import IRError
from dure.ir import dtypes
from dure.ir.blocks import Blocks
from dure.ir.core import Function, Op, Param, Region, Span, Value, infer, walk
from dure.ir.expr import as_expr, const, symbol
from dure.ir.interpret import run
from dure.ir.layout import Digit, Layout, PlaneLayouts
from dure.ir.parser import parse_function
from dure.ir.printer import print_function
from dure.ir.types import TensorType, shape_of

SLOW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def outputs(function: Function, program: Program) -> list[bytes]:
    arguments = program.arguments()
    run(function, arguments)
    return [a.tobytes() for a in arguments if not isinstance(a, Blocks)]


@SLOW
@given(programs())
def test_random_programs_round_trip(program: Program) -> None:
    text = print_function(program.function)
    again = parse_function(text)
    assert print_function(again) == text
    assert outputs(again, program) == outputs(program.function, program)


def layouts() -> TensorType:
    n, lda = symbol("n", "size", 1, 9), symbol("lda", "stride", 0, None)
    digits = ((Digit(None, lda * 32 + 5), Digit(4, 8)), (Digit(2, 3, "core"), Digit(8, 1)))
    layout = Layout(digits, n * 8)
    return TensorType(shape_of(n, 16), dtypes.q8_0, PlaneLayouts((("d", layout), ("code", layout))))


def strange() -> Function:
    n, lda = symbol("n", "size", 1, 9), symbol("lda", "stride", 0, None)
    x = Value(TensorType(shape_of(n), dtypes.float32, Layout(((Digit(None, lda),),))), "x")
    odd = Value(layouts(), "x")
    index = Value(
        TensorType(shape_of(n, 2), dtypes.int32, None, -1, (const(-1), n * 2), True), "x_1"
    )
    inner = Function("inner kernel", "tile", (), Region((), ()), attrs={"order": (0, 1)})
    attrs = {
        "none": None,
        "flags": (True, False),
        "numbers": (1, -2, 0.5, -0.0, float("inf"), -float("inf"), float("nan"), 1e-30),
        "text": 'a "b"\n가\\',
        "index": (n * 2 + 1, None, as_expr(4), 4),
        "type": dtypes.bfloat16,
        "format": dtypes.q4_k,
        "inner": (inner, ((n < 3), inner)),
        "empty": (),
        "one": (1,),
        "layout": Layout((), 7),
        "an odd name": 1,
    }
    span = Span("가 b.py", 3, 4, 9, "    y = f(x)", Span("c.py", 1, 0, 2, "k(x)"))
    full = infer("full", [], {"shape": (2,), "value": 1.0, "dtype": dtypes.float32}, span=span)
    op = Op("add", (full.result, full.result), (Value(full.result.type, "크기"),), attrs)
    params = (Param(x, "in"), Param(odd, "inout"), Param(index, "in"))
    body = Region((), (full, op), (op.result,))
    return Function("a kernel", "tile", params, body, (n, lda), attrs=attrs)


@pytest.mark.parametrize("spans", [False, True])
def test_everything_that_a_program_may_hold(spans: bool) -> None:
    text = print_function(strange(), spans=spans)
    again = parse_function(text)
    assert print_function(again, spans=spans) == text
    first = next(walk(again.body))
    assert (first.span == next(walk(strange().body)).span) is spans
    numbers = again.attrs["numbers"]
    assert isinstance(numbers, tuple)
    assert np.signbit(numbers[3])
    assert again.params[1].value.type == layouts()


GOOD = """tile function f
  size n in [0, 9]
  in %x: tensor<n x float32>
{
  %0 = load(%x) {index = ([0],), offset = (0,), shape = (4,), step = (4,), stride = (1,)} \
: tile<4 x float32>
  %1 = neg(%0) : tile<4 x float32>
}
"""


def test_errors_show_the_line_and_a_caret() -> None:
    cases = {
        "neg(%9)": "value %9 is not defined",
        "nag(%0)": "unknown op 'nag'",
        "neg(%0": "expected ')'",
        "neg(%0) {axis = [m]}": "unknown symbol 'm'",
        "neg(%0) {axis = [n//0]}": "division by 0",
        "neg(%0) {axis = flaot32}": "expected an attribute's value",
        'neg(%0) {axis = "a}': "unexpected character",
        "neg(%0) {axis = 99999999999999999999}": "expected a number",
    }
    for wrong, message in cases.items():
        with pytest.raises(IRError) as raised:
            parse_function(GOOD.replace("neg(%0)", wrong), "f.dure")
        assert message in str(raised.value)
        assert "f.dure:6:" in str(raised.value)
        assert "^" in str(raised.value)
    with pytest.raises(IRError, match="unknown element type 'flaot32'"):
        parse_function(GOOD.replace("tile<4 x float32>", "tile<4 x flaot32>"))
    with pytest.raises(IRError, match="defined twice"):
        parse_function(GOOD.replace("%1 =", "%0 ="))


PIECES = [
    "(",
    ")",
    "[n",
    "]",
    "{",
    "}",
    "//",
    "*",
    "-",
    "%0",
    "n",
    "min(",
    "tile<",
    "4",
    ",",
    " x ",
]


@settings(max_examples=400, deadline=1000)
@given(st.data())
@example(None)
def test_damaged_text_is_an_error_or_a_program(data: st.DataObject | None) -> None:
    source = print_function(strange(), spans=True)
    if data is None:
        text = GOOD.replace("([0],)", "(" * 100_000)
    else:
        start = data.draw(st.integers(0, len(source)))
        length = data.draw(st.integers(0, 20))
        piece = data.draw(st.text(max_size=5) | st.lists(st.sampled_from(PIECES)).map("".join))
        repeat = data.draw(st.sampled_from([1, 2, 500]))
        text = source[:start] + piece * repeat + source[start + length :]
    try:
        parsed = parse_function(text)
    except IRError:
        return
    assert print_function(parse_function(print_function(parsed))) == print_function(parsed)


def test_products_that_would_explode() -> None:
    sums = "*".join(["(n + (n//2) + (n//3) + (n//5) + 1)"] * 30)
    with pytest.raises(IRError, match="too many terms"):
        parse_function(GOOD.replace("([0],)", f"([{sums}],)"))
