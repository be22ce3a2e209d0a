"""The policy for activations: where a weight is block-quantized, its product takes int8 blocks.

This is the one pass that changes a program's numbers, and it says so with explicit ops: every later
pass keeps the precision that it finds.  Activations go to ``int8_block32`` along K: int8 codes in
blocks of 32 with a float32 scale, which makes every product an exact integer dot inside a block.  A
product that is declared ``precise`` (the logits, whose error nothing averages out) takes 16-bit
codes, ``int16_block32``.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from dure.compiler.rebuild import Rebuilder, rebuild
from dure.errors import UsageError
from dure.ir.core import Function, Op, Value

Policy: TypeAlias = Literal["int8", "float"]

#: The ops that take quantized activations, all as their first operand, and where their weights are.
_PRODUCTS = {"linear": (1,), "gated_linear": (1, 2)}


def quantize_activations(function: Function, policy: Policy = "int8") -> Function:
    """Puts ``quantize_rows`` in front of every product with block-quantized weights.

    ``policy`` of ``float`` changes nothing: weights are dequantized inside the product.
    """
    if policy == "float":
        return function
    if policy != "int8":
        raise UsageError(
            f"unknown policy '{policy}' for activations",
            rule="activations are int8 (blocks of 32) or float",
            fix="use int8",
        )
    quantized: dict[tuple[Rebuilder, Value, str], Value] = {}

    def visit(builder: Rebuilder, op: Op) -> bool:
        if op.name not in _PRODUCTS or not _wants_blocks(op):
            return False
        x = builder.value(op.operands[0])
        # Once a region: what is quantized inside a repeat is not visible outside.
        format = "int16_block32" if op.name == "linear" and op.attr("precise") else "int8_block32"
        place = (builder, x, format)
        if place not in quantized:
            quantized[place] = builder.make("quantize_rows", [x], {"quantize": format}, op)[0]
        operands = (quantized[place], *builder.operands(op)[1:])
        builder.replace(op, builder.make(op.name, operands, op.attrs, op))
        return True

    return rebuild(function, visit)


def _wants_blocks(op: Op) -> bool:
    x = op.operands[0].tensor
    weights = [op.operands[place].tensor for place in _PRODUCTS[op.name]]
    return x.block is None and all(w.block is not None for w in weights)
