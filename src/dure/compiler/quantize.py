"""The policy for activations: where a weight is block-quantized, its product takes blocks.

This is the one pass that changes a program's numbers, and it says so with explicit ops: every later
pass keeps the precision that it finds.  Activations go to ``int8_block32`` along K: int8 codes in
blocks of 32 with a float32 scale, which makes every product an exact integer dot inside a block.  A
product that asks for more bits (the logits, whose error nothing averages out) takes 16-bit codes,
``int16_block32``.  By the policy ``bfp``, products that ask for no more than nine bits take
``bfp9_block32`` where all their weights do, unless one of them also meets a product that asks for
more (a weight lies in one layout), or their operand one that doesn't.  Many rows gain by it, and
few ones lose, but where 8 bits aren't enough: so those that ask for more take it, and those that
have no fewer columns than K, which are most of a model's arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator

from dure.compiler.rebuild import Rebuilder, rebuild
from dure.errors import UsageError
from dure.ir.core import Function, Op, Region, Value
from dure.ir.dtypes import takes_bfp
from dure.ir.lowering import ActivationPolicy
from dure.ir.types import static_extent

#: The ops that take quantized activations, all as their first operand, and where their weights are.
_PRODUCTS = {"linear": (1,), "gated_linear": (1, 2)}
#: Bits of block floating point's codes.
_BFP_BITS = 9


def quantize_activations(function: Function, policy: ActivationPolicy = "int8") -> Function:
    """Puts ``quantize_rows`` in front of every product with block-quantized weights.

    ``policy`` of ``float`` changes nothing: weights are dequantized inside the product.
    """
    if policy == "float":
        return function
    if policy not in ("int8", "bfp"):
        raise UsageError(
            f"unknown policy '{policy}' for activations",
            rule="activations are int8 or bfp (blocks of 32) or float",
            fix="use int8",
        )
    others = set(_beyond_bfp(function.body))
    quantized: dict[tuple[Rebuilder, Value, str], Value] = {}

    def visit(builder: Rebuilder, op: Op) -> bool:
        if op.name not in _PRODUCTS or not _wants_blocks(op):
            return False
        x = builder.value(op.operands[0])
        format = "int8_block32" if _bits(op) <= 8 else "int16_block32"
        if policy == "bfp" and others.isdisjoint(_weights(op)):
            format = "bfp9_block32"
        # Once a region: what is quantized inside a repeat is not visible outside.
        place = (builder, x, format)
        if place not in quantized:
            quantized[place] = builder.make("quantize_rows", [x], {"quantize": format}, op)[0]
        operands = (quantized[place], *builder.operands(op)[1:])
        builder.replace(op, builder.make(op.name, operands, op.attrs, op))
        return True

    return rebuild(function, visit)


def _weights(op: Op) -> list[Value]:
    return [op.operands[place] for place in _PRODUCTS[op.name]]


def _bits(op: Op) -> int:
    """The least bits that the op's activations keep."""
    return int(op.attr("activation_bits")) if op.name == "linear" else 8


def _beyond_bfp(region: Region) -> Iterator[Value]:
    """The weights of products that don't take block floating point, in this region and inside it.

    Those of one operand take it together, or none does: it is quantized once.
    """
    together: dict[Value, list[Op]] = {}
    for op in region.ops:
        if op.name in _PRODUCTS:
            together.setdefault(op.operands[0], []).append(op)
        for inner in op.regions:
            yield from _beyond_bfp(inner)
    for products in together.values():
        few = [op for op in products if _bits(op) <= _BFP_BITS]
        for op in products:
            if op not in few or not all(map(_takes_bfp, few)):
                yield from _weights(op)


def _takes_bfp(op: Op) -> bool:
    """Whether a product that asks for few bits takes block floating point, and gains by it."""
    weights = _weights(op)
    formats = [w.tensor.block for w in weights]
    fit = all(f is not None and takes_bfp(f) for f in formats)
    return fit and (_bits(op) > 8 or all(map(_expands, weights)))


def _expands(weight: Value) -> bool:
    """Whether a product with this weight has no fewer columns than K."""
    columns, length = (static_extent(extent) for extent in weight.tensor.shape)
    return columns is not None and length is not None and columns >= length


def _wants_blocks(op: Op) -> bool:
    x = op.operands[0].tensor
    return x.block is None and all(w.tensor.block is not None for w in _weights(op))
