"""What the compiler asks the CPU target: where weights, KV pools and buffers should lie."""

from __future__ import annotations

from collections.abc import Sequence

from dure.ir.dtypes import BlockFormat, ElementType, bfloat16, bfp9_block32
from dure.ir.layout import AnyLayout, Digit, Layout
from dure.ir.lowering import ActivationPolicy, Use
from dure.ir.types import TensorType, static_extent
from dure.runtime.host import HostFeatures
from dure.targets.cpu.instructions import Operation, has
from dure.targets.cpu.packing import activation_layout, packed_layout

#: Tokens in a page, and those that tile registers multiply at a time.
_PAGE, _TILE_STEPS = 16, 32


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
        return "bfp" if self._tiles else "int8"

    def weight_layout(self, weight: TensorType, uses: Sequence[Use]) -> AnyLayout | None:
        """Panels for what a product reads; None (the file's bytes) for the rest."""
        static = all(static_extent(e) is not None for e in weight.shape)
        if weight.rank == 2 and static and any(_in_product(use) for use in uses):
            return packed_layout(weight, self.lanes, any(_meets_bfp(use) for use in uses))
        return None

    def state_layout(self, state: TensorType, uses: Sequence[Use]) -> AnyLayout | None:
        """KV pools head by head and page by page, so that a sequence whose pages follow one another
        is one stream a head: keys with a page's tokens side by side (a lane is a token), values
        with the elements of a head side by side.  Where tile registers multiply them, two elements
        of a key lie in a word, and an element of two tokens' values.
        """
        attention = next((u for u in uses if u.op.name == "attention"), None)
        heads, size = (static_extent(e) for e in state.shape[-2:]) if state.rank == 3 else (0, 0)
        if attention is None or not heads or not size:
            return None
        page: int = attention.op.attr("page_size")
        bits = int(state.dtype.bits)
        is_key = attention.position == 1
        total = static_extent(state.shape[0])
        if total is None or total % page:
            outer, head = page * heads * size * bits, page * size * bits
        else:
            outer, head = page * size * bits, total * size * bits
        rows = (Digit(None, head),)
        token, element = (1, page) if is_key else (size, 1)
        if self._holds_tiles(state.dtype, page, size):
            word = 2 * bits
            pairs = Digit(None, page * word), Digit(2, bits)
            if is_key:
                return Layout(((Digit(None, outer), Digit(page, word)), rows, pairs))
            slots = Digit(None, outer), Digit(page // 2, size * word), Digit(2, bits)
            return Layout((slots, rows, (Digit(None, word),)))
        slots = (Digit(None, outer), Digit(page, token * bits))
        return Layout((slots, rows, (Digit(None, element * bits),)))

    def _holds_tiles(self, dtype: ElementType, page: int, size: int) -> bool:
        """Whether pages of heads of this size are whole tiles, as a product takes them."""
        whole = page % _TILE_STEPS == 0 and size >= _TILE_STEPS and size & (size - 1) == 0
        return whole and dtype is bfloat16 and self._tiles

    @property
    def _tiles(self) -> bool:
        return has(self.host, Operation.TILES_OF_BFLOAT16)

    @property
    def cached_dtype(self) -> str:
        """The 16-bit type for keys and values: the one that the host multiplies fastest."""
        return "bfloat16" if self._tiles else "float16"

    def page_size(self, dtype: str) -> int:
        """Tokens in a page of keys and values: as many as products take at a time."""
        return _TILE_STEPS if dtype == "bfloat16" and self._tiles else _PAGE

    def buffer_layout(self, value: TensorType) -> AnyLayout | None:
        """Quantized activations as dots read them."""
        return activation_layout(value) if isinstance(value.dtype, BlockFormat) else None


def _meets_bfp(use: Use) -> bool:
    return _in_product(use) and use.op.operands[0].tensor.block is bfp9_block32


def _in_product(use: Use) -> bool:
    products = {"linear": (1,), "gated_linear": (1, 2)}
    return use.position in products.get(use.op.name, ())
