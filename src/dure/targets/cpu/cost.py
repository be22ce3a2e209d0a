"""What a compute instruction of a machine program takes as a loop of generated code on the host.

The generator (:mod:`dure.targets.cpu.body`) writes an instruction's ops into one loop over vectors,
reductions with their chains, and dots as register blocks; this module adds up what the
microbenchmarks say of these: vectors of each operation, passes of loops, entries into rows, steps
of K.  A dot is as slow as the lines of its right operand arrive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, inf, prod
from typing import Any

from dure.ir.core import Function, Op, Region, Value, walk
from dure.ir.dtypes import BlockFormat
from dure.ir.expr import as_expr
from dure.ir.types import TensorType, static_extent
from dure.machine.chip import Chip
from dure.runtime.host import host_features
from dure.sim.cost import ComputeCost, Costs
from dure.targets.cpu.microbench import HostRates
from dure.targets.cpu.microkernels import CHUNK
from dure.targets.cpu.paneldots import takes_panels
from dure.targets.cpu.values import lane_axis

_FREE = frozenset({"full", "iota", "reshape", "broadcast", "transpose"})

#: Runs of at least so many bytes are followed by prefetchers.
_STREAM = 256
_PAGE = 4096
#: Passes of an inner loop that is unrolled.
_UNROLLED = 2
#: Loops over vectors that turning a square of them takes: to read, to exchange, to write.
_TURNED = 3


class HostCosts(Costs):
    """The costs of one program's instructions on the host."""

    def __init__(self, chip: Chip, rates: HostRates, function: Function, footprint: int) -> None:
        super().__init__(chip)
        self.rates = rates
        self.footprint = footprint
        self.loads: dict[Value, Op] = {}
        self.stores: dict[Value, Op] = {}
        #: Loads of what another load has brought just before.
        self.again: set[Op] = set()
        #: The part of a tile of this extent that lies inside what is stored, on average.
        self.used: dict[int, float] = {}
        #: Along an axis with tiles of this extent: how many there are, and the last one's entries.
        self.tails: dict[int, tuple[int, int]] = {}
        self._known: dict[Op, ComputeCost] = {}
        roots: dict[Value, Value] = {}
        for op in walk(function.body):
            if op.name == "view":
                roots[op.result] = roots.get(op.operands[0], op.operands[0])
            elif op.name == "dma_load":
                if any(o.operands[0] is op.operands[0] for o in self.loads.values()):
                    self.again.add(op)
                self.loads[op.operands[1]] = op
            elif op.name == "dma_store":
                self.stores[op.operands[1]] = op
                self._edges(op, roots)
        self.roots = roots
        #: Buffers that dots add into.
        self.products: set[Value] = set()
        for op in walk(function.body):
            if op.name == "compute" and any(o.name == "dot" for o in op.regions[0].ops):
                self.products.update(op.operands[op.attr("reads") :])

    def _edges(self, op: Op, roots: Mapping[Value, Value]) -> None:
        kind = roots.get(op.operands[0], op.operands[0]).type
        assert isinstance(kind, TensorType)
        for extent, step in zip(kind.shape, op.attr("step"), strict=True):
            size, tile = static_extent(extent), static_extent(as_expr(step))
            if size and tile and size % tile:
                part = size / (ceil(size / tile) * tile)
                if part > self.used.get(tile, 0.0):
                    self.used[tile] = part
                    self.tails[tile] = ceil(size / tile), size % tile

    def compute(self, op: Op) -> ComputeCost:
        """The cost of a ``compute``, in the order of the host's loops."""
        found = self._known.get(op)
        if found is None:
            ps = ceil(1000 * _Instruction(self, op).nanoseconds())
            found = self._known[op] = ComputeCost(ps, {"core": ps})
        return found

    def direct(self) -> float:
        """Nanoseconds of the loops that store what was loaded or a dot has summed, of a store on
        average: no compute instruction stands for these.
        """
        total = 0.0
        for buffer, store in self.stores.items():
            load, shape = self.loads.get(buffer), buffer.tile.shape
            if load is None and buffer not in self.products:
                continue
            masks = self.masks("store", store, buffer)
            if load is not None:
                masks = max(masks, self.masks("load", load, buffer))
                total += self.waits("read", load, shape, 0.0)
            total += masks + self.waits("write", store, shape, 0.0)
            total += self.vectors(shape) * self.rates.loop + self.rows(shape) * self.rates.row
        return total / max(1, len(self.stores))

    def multiplies(self) -> bool:
        """Whether dots read tensors where they lie: then the lines' times are the dots'."""
        return bool(self.products)

    def run(self, move: Op, shape: Sequence[int]) -> float:
        """The bytes that lie side by side where a transfer of a tile reads or writes; infinite
        where the whole tile does.
        """
        kind = self.tensor(move)
        run = kind.dtype.bits / 8
        for axis in range(len(shape) - 1, -1, -1):
            size = static_extent(kind.shape[axis]) or 1
            run *= min(shape[axis], size)
            if shape[axis] < size and any(e > 1 for e in shape[:axis]):
                return float(run)
        return inf

    def alternates(self) -> bool:
        """Whether loads, arithmetic and stores take turns: where bytes come from beyond the second
        cache in runs that end before prefetchers are ahead, though not so short that every one is
        waited for by itself (:meth:`waits`).
        """
        moves = [*self.loads.items(), *self.stores.items()]
        shortest = min((self.run(move, buffer.tile.shape) for buffer, move in moves), default=inf)
        far = self.footprint > 4 * host_features().l2_bytes
        return far and not self.products and _STREAM <= shortest < _PAGE

    def waits(self, way: str, move: Op, shape: Sequence[int], busy: float) -> float:
        """Nanoseconds that a tile's short runs are waited for, with ``busy`` nanoseconds of
        arithmetic on the tile.
        """
        run = self.run(move, shape)
        if run >= _PAGE:
            return 0.0
        kind = self.tensor(move)
        chunks = prod(shape) * kind.dtype.bits / 8 / CHUNK
        stride = self.row_bytes(move)[1]
        footprint = self.footprint
        if way == "read" and move in self.again:
            footprint = min(footprint, max(1, prod(shape[:-1])) * stride * 2)
        each = self.rates.chunk(way, footprint, stride) if run < _STREAM else 0.0
        if way == "read":
            each += self.rates.behind(stride, busy / max(chunks, 1.0))
        return chunks * each * self.used.get(shape[-2] if len(shape) > 1 else 1, 1.0)

    def tensor(self, move: Op) -> TensorType:
        """The tensor that a transfer reads or writes."""
        kind = self.roots.get(move.operands[0], move.operands[0]).type
        assert isinstance(kind, TensorType)
        return kind

    # --- what is known of the operands -----------------------------------------------------------

    def masked(self, move: Op, buffer: Value) -> bool:
        """Whether vectors of a transfer may reach beyond the tensor."""
        kind = self.roots.get(move.operands[0], move.operands[0]).type
        assert isinstance(kind, TensorType)
        axis = lane_axis(buffer.tile.shape)
        if axis >= kind.rank:
            return False
        size, tile = static_extent(kind.shape[axis]), buffer.tile.shape[axis]
        if move.attr("list_axes"):
            return True
        return size is None or bool(size % tile)

    def masks(self, way: str, move: Op, buffer: Value) -> float:
        """Nanoseconds of the masks of a tile's vectors; 0 where none may reach beyond the tensor.

        Inner loops of few vectors are unrolled, and their masks computed once for all rows.
        """
        shape = buffer.tile.shape
        if not self.masked(move, buffer):
            return 0.0
        row = pieces(shape[lane_axis(shape)], self.rates.lanes)
        vectors = self.vectors(shape)
        if row <= _UNROLLED:
            vectors = min(vectors, float(row))
        return vectors * self.rates.mask(way, int(buffer.tile.dtype.bits))

    def row_bytes(self, move: Op) -> tuple[int, int]:
        """A loaded tensor's rows, and the bytes from one to the next."""
        kind = self.roots.get(move.operands[0], move.operands[0]).type
        assert isinstance(kind, TensorType)
        shape = [static_extent(e) or 1 for e in kind.shape]
        rows = shape[-2] if len(shape) > 1 else 1
        return rows, int(shape[-1] * kind.dtype.bits) // 8

    # --- shapes ----------------------------------------------------------------------------------

    def part(self, extent: int) -> float:
        """How many of ``extent`` entries are computed on average."""
        return extent * self.used.get(extent, 1.0)

    def vectors(self, shape: Sequence[int]) -> float:
        """Vectors of a tile."""
        if not shape:
            return 1.0
        axis = lane_axis(shape)
        return self.rows(shape) * pieces(shape[axis], self.rates.lanes)

    def rows(self, shape: Sequence[int]) -> float:
        """Entries into the innermost loop over a tile."""
        axis = lane_axis(shape)
        return prod((self.part(e) for a, e in enumerate(shape) if a != axis), start=1.0)


def pieces(extent: int, lanes: int) -> int:
    """Vectors that cover an extent: whole ones, then one of each smaller power of two."""
    return extent // lanes + (extent % lanes).bit_count()


class _Instruction:
    """One instruction: its ops, and where its operands come from."""

    def __init__(self, costs: HostCosts, op: Op) -> None:
        self.c = costs
        self.r = costs.rates
        self.op = op
        self.region: Region = op.regions[0]
        count: int = op.attr("reads")
        self.sources = dict(zip(self.region.args, op.operands[:count], strict=True))
        self.makers = {r: o for o in self.region.ops for r in o.results}

    def nanoseconds(self) -> float:
        total = self.r.instance
        for op in self.region.ops:
            total += self._op(op)
        for value, _ in self._outputs():
            total += self._written(value)
        total += self._masks()
        return total + self._waits(total)

    def _waits(self, busy: float) -> float:
        """What the instruction waits for tensors whose bytes come in short runs.

        Several tensors are waited for together.
        """
        reads = [0.0]
        for argument, buffer in self.sources.items():
            move = self.c.loads.get(buffer)
            if move is not None and not self._multiplied(argument):
                reads.append(self.c.waits("read", move, argument.tile.shape, busy))
        writes = [0.0]
        for value, buffer in self._outputs():
            move = self.c.stores.get(buffer)
            if move is not None and buffer not in self.c.products:
                writes.append(self.c.waits("write", move, value.tile.shape, busy))
        return max(reads) + max(writes)

    def _multiplied(self, argument: Value) -> bool:
        """Whether a dot reads an argument where it lies."""
        return any(
            o.name == "dot" and argument in {self._base(v) for v in o.operands[:2]}
            for o in self.region.ops
        )

    def _base(self, value: Value) -> Value:
        maker = self.makers.get(value)
        while maker is not None and maker.name in ("reshape", "cast"):
            value = maker.operands[0]
            maker = self.makers.get(value)
        return value

    def _outputs(self) -> list[tuple[Value, Value]]:
        """What the instruction writes, and the buffers it goes to."""
        buffers = self.op.operands[len(self.sources) :]
        return list(zip(self.region.yields, buffers, strict=True))

    def _masks(self) -> float:
        """The masks of vectors that may reach beyond a tensor: transfers of one loop share them."""
        found = [0.0]
        for argument, buffer in self.sources.items():
            move = self.c.loads.get(buffer)
            if move is not None and not self._feeds_dot(argument):
                found.append(self.c.masks("load", move, buffer))
        for _, buffer in self._outputs():
            move = self.c.stores.get(buffer)
            if move is not None and buffer not in self.c.products:
                found.append(self.c.masks("store", move, buffer))
        return max(found)

    def _feeds_dot(self, value: Value) -> bool:
        return any(o.name == "dot" and value in o.operands for o in self.region.ops)

    def _written(self, value: Value) -> float:
        """The loop that stores a result, unless the op that makes it has one."""
        shape = value.tile.shape
        maker = self.makers.get(value)
        vectors = self.c.vectors(shape)
        if maker is not None and maker.name in ("reduce", "reduce_with", "dot", "cumsum"):
            return 0.0
        if self._turned(value):
            return vectors * (self.r.loop + self._gather(value))
        return vectors * self.r.loop + self.c.rows(shape) * self.r.row

    def _turned(self, value: Value) -> bool:
        """Whether vectors of a value are gathered from a tile that lies the other way round."""
        maker = self.makers.get(value)
        while maker is not None:
            if maker.name == "transpose":
                before, after = maker.operands[0].tile.shape, maker.result.tile.shape
                return lane_axis(before) != maker.attr("order")[lane_axis(after)]
            if not maker.operands:
                return False
            maker = self.makers.get(maker.operands[0])
        return False

    def _gather(self, value: Value) -> float:
        """A vector whose lanes lie in a column: as slow as their lines come."""
        maker = self.makers.get(value)
        while maker is not None and maker.operands:
            value = maker.operands[0]
            maker = self.makers.get(value)
        shape = value.tile.shape
        deep = shape[-2] if len(shape) > 1 else 1
        stride = int((shape[-1] if shape else 1) * value.tile.dtype.bits) // 8
        buffer = self.sources.get(value)
        move = self.c.loads.get(buffer) if buffer is not None else None
        if move is not None:
            stride = self.c.row_bytes(move)[1]
        line = self.r.rewalk(deep, stride, 1) - self.r.dot_step("float32", 1, 2)
        return self.r.gather + self.r.lanes * max(0.0, line)

    # --- ops -------------------------------------------------------------------------------------

    def _op(self, op: Op) -> float:
        if op.name in _FREE:
            return 0.0
        handler: Any = getattr(self, f"_{op.name}", None)
        if handler is not None:
            return float(handler(op))
        inner = sum(self._op(o) for region in op.regions for o in region.ops)
        return inner + self.c.vectors(op.result.tile.shape) * self.r.op(op.name)

    def _cast(self, op: Op) -> float:
        if self._feeds_dot(op.result):
            return 0.0
        source, target = op.operands[0].tile.dtype, op.result.tile.dtype
        return self.c.vectors(op.result.tile.shape) * self.r.cast(source.name, target.name)

    def _reduce(self, op: Op) -> float:
        name = str(op.attrs.get("combiner", "max"))
        shape = op.operands[0].tile.shape
        vectors = self.c.vectors(shape)
        chain = self._chain(op.operands[0])
        waits = max(0.0, vectors * self.r.reduce_step(name) - chain)
        lanes = lane_axis(shape) == op.attr("axis") % len(shape)
        scale = 3.0 if name.startswith("arg") else 1.0
        return scale * waits + (self.c.rows(shape) * self.r.reduce_end(name) if lanes else 0.0)

    _reduce_with = _reduce

    def _chain(self, value: Value) -> float:
        """What the elementwise ops take that a reduction's loop computes."""
        maker = self.makers.get(value)
        if maker is None or maker.name in ("reduce", "dot", "cumsum"):
            return 0.0
        return self._op(maker) + sum(self._chain(o) for o in maker.operands)

    def _cumsum(self, op: Op) -> float:
        shape = op.operands[0].tile.shape
        axis: int = op.attr("axis")
        length = shape[axis % len(shape)]
        vectors = pieces(prod(shape) // length, self.r.lanes) * length
        return vectors * (self.r.reduce_step("add") + 2 * self.r.gather)

    def _dequantize(self, op: Op) -> float:
        return self.c.vectors(op.result.tile.shape) * (
            self.r.loop + self.r.op("mul") * 2 + self.r.cast("float16", "float32") * 4
        )

    def _quantize(self, op: Op) -> float:
        return self.c.vectors(op.result.tile.shape) * (self.r.loop + 2 * self.r.op("max"))

    # --- dots ------------------------------------------------------------------------------------

    def _dot(self, op: Op) -> float:
        left, right = op.operands[0], op.operands[1]
        *batch, m, k = left.tile.shape
        n = right.tile.shape[-1]
        k = self._depth(right, k)
        first, again = self._lines(right)
        kind = right.tile.dtype
        dtype = "float32" if isinstance(kind, BlockFormat) or kind.bits >= 32 else kind.name
        lanes, turned = self.r.lanes, self._turned(right)
        if not isinstance(kind, BlockFormat) and takes_panels(lanes, m, n, turned):
            # Lines are waited for while operands are copied and converted, once.
            copied = self.c.vectors(right.tile.shape) * (_TURNED if turned else 1)
            total = (self.c.vectors(left.tile.shape) + copied) * self.r.loop
            again, dtype = 0.0, "float32"
        else:
            total = self._stored_operand(left) + self._stored_operand(right)
        rest = n
        used = self.c.part(n) / n
        tiles, last = self.c.tails.get(m, (1, m))
        products = 0.0
        for vectors in (2, 1):
            width = vectors * lanes
            panels = rest // width
            rest -= panels * width
            if vectors == 1:
                panels += rest.bit_count()
            whole = self._panel(m, k, dtype, vectors, first, again)
            cut = self._panel(last, k, dtype, vectors, first, again)
            products += panels * used * ((tiles - 1) * whole + cut) / tiles
        return total + prod(batch, start=1) * products

    def _panel(self, m: int, k: int, dtype: str, vectors: int, first: float, again: float) -> float:
        """A panel of columns: its register blocks from the top down."""
        total, line = 0.0, first
        for height, count in ((4, m // 4), (2, m % 4 // 2), (1, m % 2)):
            step = self.r.dot_step(dtype, height, vectors)
            if count:
                total += k * (step + line) + self.r.blocks
                line = again
                total += (count - 1) * (k * (step + again) + self.r.blocks)
        return total

    def _lines(self, right: Value) -> tuple[float, float]:
        """What a line of the right operand adds to a step of K: the first time, and again.

        Masks of its vectors are computed once for a panel.
        """
        buffer = self._plain(right)
        k, n = right.tile.shape[-2:]
        move = self.c.loads.get(buffer) if buffer is not None else None
        if move is None:
            bits = right.tile.dtype.bits if buffer is None else buffer.tile.dtype.bits
            return 0.0, self._again(k, int(n * max(8, bits)) // 8)
        rows, stride = self.c.row_bytes(move)
        first = self.r.walk(self.c.footprint, stride) - self.r.dot_step("float32", 1, 2)
        again = self._again(max(rows, k), stride)
        return max(0.0, first), again

    def _again(self, deep: int, stride: int) -> float:
        return max(0.0, self.r.rewalk(deep, stride) - self.r.dot_step("float32", 4, 2))

    def _depth(self, right: Value, k: int) -> int:
        """The steps of K of a dot: loops over K end with the tensor."""
        buffer = self._plain(right)
        move = self.c.loads.get(buffer) if buffer is not None else None
        if move is None:
            return k
        rows = self.c.row_bytes(move)[0]
        return max(1, round(rows / ceil(rows / k)))

    def _plain(self, value: Value) -> Value | None:
        """The buffer that an operand is read from as it is."""
        maker = self.makers.get(value)
        while maker is not None and maker.name in ("reshape", "cast"):
            value = maker.operands[0]
            maker = self.makers.get(value)
        return self.sources.get(value)

    def _stored_operand(self, value: Value) -> float:
        """The loop that stores an operand that isn't read as it is."""
        if self._plain(value) is not None:
            return 0.0
        vectors = self.c.vectors(value.tile.shape)
        turned = self._gather(value) if self._turned(value) else 0.0
        return vectors * (self.r.loop + turned)
