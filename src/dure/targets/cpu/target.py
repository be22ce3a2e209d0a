"""What the compiler asks the CPU target: where weights, KV pools and buffers should lie."""

from __future__ import annotations

from collections.abc import Sequence

from dure.ir.dtypes import BlockFormat
from dure.ir.layout import AnyLayout, Digit, Layout, PlaneLayouts
from dure.ir.lowering import Use
from dure.ir.types import TensorType, static_extent
from dure.runtime.host import HostFeatures
from dure.targets.cpu.packing import packed_layout

#: Rows of quantized activations start on cache lines.
_ROW_BITS = 512


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

    def weight_layout(self, weight: TensorType, uses: Sequence[Use]) -> AnyLayout | None:
        """Panels for what a product reads; None (the file's bytes) for the rest."""
        static = all(static_extent(e) is not None for e in weight.shape)
        if weight.rank == 2 and static and any(_in_product(use) for use in uses):
            return packed_layout(weight, self.lanes)
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
        """Quantized activations row by row, each row its codes, then its scales, then its sums."""
        if not isinstance(value.dtype, BlockFormat):
            return None
        length = static_extent(value.shape[-1])
        assert length is not None, f"{value} is quantized along a symbolic axis"
        starts: dict[str, int] = {}
        end = 0
        order = ("code", "scale", "offset", "sum")
        for plane in sorted(value.dtype.planes, key=lambda p: order.index(p.role)):
            starts[plane.name] = end
            end += length // plane.per * plane.dtype.bits
        row = -(-end // _ROW_BITS) * _ROW_BITS
        outer: list[tuple[Digit, ...]] = []
        for extent in reversed(value.shape[:-1]):
            outer.insert(0, (Digit(None, row),))
            row *= static_extent(extent) or 1
        return PlaneLayouts(
            tuple(
                (p.name, Layout((*outer, (Digit(None, p.dtype.bits),)), starts[p.name]))
                for p in value.dtype.planes
            )
        )


def _in_product(use: Use) -> bool:
    products = {"linear": (1,), "gated_linear": (1, 2)}
    return use.position in products.get(use.op.name, ())
