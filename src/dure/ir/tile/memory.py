"""Loads, stores, views and reads of index arguments: the only ops that touch memory.

A load or store names, for each axis, where its elements lie:

    element t of axis a  =  index[a] * step[a] + offset[a] + t * stride[a]        (an expression)
    element t of axis a  =  list[t // step[a]] * step[a] + t % step[a] + offset[a]   (an index list)

so each is one bounded strided descriptor, or one list of them.  An expression addresses tiles
(``index`` counts in units of ``step``); a list is a rank-1 int32 tile loaded from an index
argument, and a negative entry of it means *absent*.  Elements outside the tensor (or absent) read
``fill`` and are not written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dure.ir import dtypes
from dure.ir.core import Cost, Op, OpDef, Region, declare
from dure.ir.expr import Expr, as_expr
from dure.ir.rules import broken, free, moves_bytes, plain, tensor, tile
from dure.ir.types import TensorType, TileType, Type

#: The attributes that describe where a load or store lies; ``index[a]`` is None where a list rules.
DESCRIPTOR: dict[str, Any] = {"index": (), "step": (), "offset": (), "stride": (), "list_axes": ()}


def _check_descriptor(
    name: str,
    source: TensorType,
    shape: Sequence[int],
    attrs: Mapping[str, Any],
    lists: Sequence[Type],
) -> None:
    rank = source.rank
    for key in ("index", "step", "offset", "stride"):
        if len(attrs[key]) != rank:
            raise broken(
                f"{name} with {len(attrs[key])} entries of {key} for a tensor of rank {rank}",
                "a load or store has one index per axis of its tensor",
                f"give {rank} indices",
            )
    if len(shape) != rank:
        raise broken(
            f"{name} of a tile of rank {len(shape)} from a tensor of rank {rank}",
            "tile and tensor have the same rank",
            "use extents of 1 and reshape the tile",
        )
    if len(lists) != len(attrs["list_axes"]):
        raise broken(
            f"{name} with {len(lists)} lists for axes {attrs['list_axes']}", "one list an axis"
        )
    for axis, entry in zip(attrs["list_axes"], lists, strict=True):
        found = plain(entry, "an index list")
        if found.rank != 1 or found.dtype is not dtypes.int32:
            raise broken(
                f"an index list of type {found}", "an index list is a rank-1 tile of int32"
            )
        if found.shape[0] * attrs["step"][axis] != shape[axis]:
            raise broken(
                f"a list of {found.shape[0]} entries of {attrs['step'][axis]} for an extent of "
                f"{shape[axis]}",
                "entries times step is the tile's extent",
            )
    if source.block is not None:
        _check_blocks(name, source, shape, attrs)


def _check_blocks(
    name: str, source: TensorType, shape: Sequence[int], attrs: Mapping[str, Any]
) -> None:
    assert source.block is not None
    axis, block = source.quantized_axis % source.rank, source.block.block
    whole = shape[axis] % block == 0 and attrs["step"][axis] % block == 0
    aligned = attrs["stride"][axis] == 1 and as_expr(attrs["offset"][axis] % block) is as_expr(0)
    if not whole or not aligned:
        raise broken(
            f"{name} of {shape[axis]} elements along the quantized axis of {source}",
            f"a tile of a {source.block} tensor holds whole blocks of {block}",
            f"use a tile size that is a multiple of {block}",
        )


def _load_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    source = tensor(operands[0], "the source of load")
    shape: tuple[int, ...] = tuple(attrs["shape"])
    _check_descriptor("load", source, shape, attrs, operands[1:])
    axis = source.quantized_axis % source.rank if source.block is not None else -1
    return [TileType(shape, source.dtype, axis)]


declare(
    OpDef(
        "load",
        "tile",
        _load_typing,
        None,
        moves_bytes,
        defaults={**DESCRIPTOR, "fill": 0.0},
        doc="load(tensor, *lists) {shape, index, step, offset, stride, list_axes, fill}",
    )
)


def _store_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    target, source = (
        tensor(operands[0], "the target of store"),
        tile(operands[1], "what store writes"),
    )
    _check_descriptor("store", target, source.shape, attrs, operands[2:])
    if source.dtype != target.dtype:
        raise broken(
            f"store of {source.dtype} into a tensor of {target.dtype}",
            "a store converts nothing",
            f"write .to({target.dtype}), or dl.quantize for a block-quantized tensor",
        )
    if attrs["combine"] not in ("", "add", "max", "min"):
        raise broken(f"combine='{attrs['combine']}'", "combine is one of add, max, min")
    return []


def _store_cost(op: Op) -> Cost:
    return Cost(bytes=op.operands[1].tile.bytes)


declare(
    OpDef(
        "store",
        "tile",
        _store_typing,
        None,
        _store_cost,
        defaults={**DESCRIPTOR, "combine": ""},
        doc="store(tensor, tile, *lists) {index, step, offset, stride, list_axes, combine}",
    )
)


def _view_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    source = tensor(operands[0], "the source of view")
    axis: int = attrs["axis"]
    if source.block is not None and axis == source.quantized_axis % source.rank:
        raise broken("a view along the quantized axis", "a view keeps whole blocks")
    start, stop = as_expr(attrs["start"]), as_expr(attrs["stop"])
    shape = (*source.shape[:axis], stop - start, *source.shape[axis + 1 :])
    return [
        TensorType(
            shape, source.dtype, source.layout, source.quantized_axis, source.index, source.unique
        )
    ]


declare(
    OpDef(
        "view",
        "tile",
        _view_typing,
        None,
        free,
        doc="view(tensor) {axis, start, stop}: tensor[start:stop]; 0 <= start <= stop <= size",
    )
)


def _index_load_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    source = tensor(operands[0], "the source of index_load")
    if source.index is None:
        raise broken(
            "a scalar read of a tensor that isn't an index argument",
            "a run-time index comes from a program id, a loop variable or a dl.Index argument",
            "declare the parameter as dl.Index(low, high)",
        )
    if len(attrs["index"]) != source.rank:
        raise broken(
            f"{len(attrs['index'])} indices into {source}", "one index per axis", "index every axis"
        )
    return []


declare(
    OpDef(
        "index_load",
        "tile",
        _index_load_typing,
        None,
        free,
        doc="index_load(tensor) {index}: defines a symbol, the element of an index argument",
    )
)


def element(op: Op, axis: int, position: Expr) -> Expr:
    """The tensor's element at ``position`` along ``axis`` of a load's or store's tile (no list)."""
    start = as_expr(op.attr("index")[axis]) * op.attr("step")[axis] + op.attr("offset")[axis]
    return start + position * op.attr("stride")[axis]
