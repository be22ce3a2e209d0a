"""What the compiler asks the CPU target: where weights, KV pools and buffers should lie."""

from __future__ import annotations

from collections.abc import Sequence

from dure.ir.dtypes import BlockFormat, bfp9_block32
from dure.ir.layout import AnyLayout, Digit, Layout
from dure.ir.lowering import ActivationPolicy, Use
from dure.ir.types import TensorType, static_extent
from dure.runtime.host import HostFeatures
from dure.targets.cpu.instructions import Operation, has
from dure.targets.cpu.packing import activation_layout, packed_layout


class CpuTarget:
    """The CPU with these features; see :class:`dure.ir.lowering.CompilerTarget`."""

    def __init__(self, host: HostFeatures) -> None:
        self.host = host

    @property
    def name(self) -> str:
        """``cpu``."""
        return "cpu"

    @property
    def lanes(self) -> int:
        """32-bit lanes of a vector register, and rows of a panel."""
        return self.host.vector_bits // 32

    @property
    def activations(self) -> ActivationPolicy:
        """Block floating point where tile registers add up its products over the whole of K."""
        return "bfp" if has(self.host, Operation.TILES_OF_BFLOAT16) else "int8"

    def weight_layout(self, weight: TensorType, uses: Sequence[Use]) -> AnyLayout | None:
        """Panels for what a product reads; None (the file's bytes) for the rest."""
        static = all(static_extent(e) is not None for e in weight.shape)
        if weight.rank == 2 and static and any(_in_product(use) for use in uses):
            return packed_layout(weight, self.lanes, any(_meets_bfp(use) for use in uses))
        return None

    def state_layout(self, state: TensorType, uses: Sequence[Use]) -> AnyLayout | None:
        """KV pools head by head and page by page, so that a sequence whose pages follow one another
        is one stream a head: keys with a page's tokens side by side (a lane is a token), values
        with the elements of a head side by side.
        """
        attention = next((u for u in uses if u.op.name == "attention"), None)
        heads, size = (static_extent(e) for e in state.shape[-2:]) if state.rank == 3 else (0, 0)
        if attention is None or not heads or not size:
            return None
        page: int = attention.op.attr("page_size")
        bits = state.dtype.bits
        is_key = attention.position == 1
        token, element = (1, page) if is_key else (size, 1)
        total = static_extent(state.shape[0])
        if total is None or total % page:
            outer, head = page * heads * size * bits, page * size * bits
        else:
            outer, head = page * size * bits, total * size * bits
        slots = (Digit(None, int(outer)), Digit(page, int(token * bits)))
        rows = (Digit(None, int(head)),)
        return Layout((slots, rows, (Digit(None, int(element * bits)),)))

    def buffer_layout(self, value: TensorType) -> AnyLayout | None:
        """Quantized activations as dots read them."""
        return activation_layout(value) if isinstance(value.dtype, BlockFormat) else None


def _meets_bfp(use: Use) -> bool:
    return _in_product(use) and use.op.operands[0].tensor.block is bfp9_block32


def _in_product(use: Use) -> bool:
    products = {"linear": (1,), "gated_linear": (1, 2)}
    return use.position in products.get(use.op.name, ())
