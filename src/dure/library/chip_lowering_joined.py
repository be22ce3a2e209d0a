"""Which ops of a body are lowered together: linear layers of one input as one product, and a linear
layer with the sum over devices of its results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dure.ir.core import Op


def summed(ops: Sequence[Op]) -> dict[Op, Op]:
    """Sums over devices, each with the linear layer whose results nobody but it reads."""
    used = Counter(operand for op in ops for operand in set(op.operands))
    linears = {op.result: op for op in ops if op.name == "linear" and plain(op)}
    sums = [op for op in ops if op.name == "all_reduce" and op.operands[0] in linears]
    return {op: linears[op.operands[0]] for op in sums if used[op.operands[0]] == 1}


def in_parts(linear: Op, ops: Sequence[Op]) -> bool:
    """Whether all that read a linear layer's result can read it as a part of a wider one: heads,
    one after another.
    """
    results = {linear.result}
    for op in ops:
        if results.isdisjoint(op.operands):
            continue
        if op.name == "reshape_tensor":
            results.add(op.result)
        elif op.name == "attention":
            if op.operands[0].tensor.shape[1] is not op.operands[1].tensor.shape[1]:
                return False
        elif op.name not in ("rope", "kv_write"):
            return False
    return True


def plain(linear: Op) -> bool:
    """A linear layer without an epilogue, but perhaps with a bias."""
    ignored = {"activation_bits", "bias"}
    defaults = linear.definition.defaults
    return all(linear.attr(n) == d for n, d in defaults.items() if n not in ignored)


def joins(first: Op, other: Op) -> bool:
    """Whether two linear layers are one product."""
    if other.name != "linear" or other.operands[0] is not first.operands[0]:
        return False
    return plain(other) and other.attr("bias") == first.attr("bias")
