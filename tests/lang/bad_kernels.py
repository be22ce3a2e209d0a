"""Kernels that break one rule each; their errors are tested in test_lang_errors."""

from __future__ import annotations

from typing import Any

import numpy as np

import dure
import dure.lang as dl


@dure.kernel
def while_loop(x: dl.Tensor, y: dl.Tensor):
    i = 0
    while i < x.shape[0]:
        i += 1


@dure.kernel
def try_block(x: dl.Tensor, y: dl.Tensor):
    try:
        dl.store(y, (0, 0), dl.load(x, (0, 0), (4, 4)))
    finally:
        pass


@dure.kernel
def with_block(x: dl.Tensor, y: dl.Tensor):
    with x:
        pass


@dure.kernel
def imports(x: dl.Tensor, y: dl.Tensor):
    import math

    dl.store(y, (0, 0), dl.full((4, 4), math.pi, dl.float32))


@dure.kernel
def breaks(x: dl.Tensor, y: dl.Tensor):
    for k in dl.range(x.shape[0]):
        if k > 3:
            break


@dure.kernel
def element_assignment(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (4, 4))
    tile[0] = 1.0
    dl.store(y, (0, 0), tile)


@dure.kernel
def loop_else(x: dl.Tensor, y: dl.Tensor):
    for k in dl.range(4):
        dl.store(y, (k, 0), dl.load(x, (k, 0), (4, 4)))
    else:
        pass


@dure.kernel
def truth_of_a_tile(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (4, 4))
    if tile > 0:
        dl.store(y, (0, 0), tile)


@dure.kernel
def chained_comparison(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (4, 4))
    dl.store(y, (0, 0), dl.where(0 < tile < 1, tile, 0.0))


@dure.kernel
def and_of_tiles(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (4, 4))
    dl.store(y, (0, 0), dl.where(tile > 0 and tile < 1, tile, 0.0))


@dure.kernel
def shape_mismatch(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (4, 8)) + dl.load(x, (0, 0), (8, 4))
    dl.store(y, (0, 0), tile)


@dure.kernel
def dot_mismatch(x: dl.Tensor, y: dl.Tensor, n: dl.const):
    left = dl.load(x, (0, 0), (n, 8))
    dl.store(y, (0, 0), left @ left)


@dure.kernel
def dot_of_floats_and_integers(x: dl.Tensor, y: dl.Tensor):
    left = dl.load(x, (0, 0), (4, 4))
    right = left.to(dl.int8)
    dl.store(y, (0, 0), left @ right)


@dure.kernel
def store_dtype(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), dl.load(x, (0, 0), (4, 4)).to(dl.float16))


@dure.kernel
def store_rank(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0,), dl.load(x, (0, 0), (4, 4)))


@dure.kernel
def load_rank(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), dl.load(x, (0, 0), (4,)))


@dure.kernel
def unknown_name(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), undefined_name)  # noqa: F821


@dure.kernel
def read_before_write(x: dl.Tensor, y: dl.Tensor):
    total = total + dl.load(x, (0, 0), (4, 4))  # noqa: F821
    dl.store(y, (0, 0), total)


@dure.kernel
def bound_in_loop_only(x: dl.Tensor, y: dl.Tensor):
    for k in dl.range(x.shape[0]):
        last = dl.load(x, (k, 0), (1, 4))
    dl.store(y, (0, 0), last)


@dure.kernel
def bound_in_one_branch(x: dl.Tensor, y: dl.Tensor):
    if dl.program_id(0) > 2:
        value = dl.zeros((4, 4), dl.float32)
    dl.store(y, (0, 0), value)


@dure.kernel
def loop_changes_dtype(x: dl.Tensor, y: dl.Tensor):
    acc = dl.zeros((4, 4), dl.float32)
    for _ in dl.range(x.shape[0]):
        acc = acc.to(dl.float16)
    dl.store(y, (0, 0), acc)


@dure.kernel
def loop_changes_shape(x: dl.Tensor, y: dl.Tensor):
    acc = dl.zeros((4,), dl.float32)
    for _ in dl.range(x.shape[0]):
        acc = acc[None, :]
    dl.store(y, (0, 0), acc)


@dure.kernel
def loop_carries_a_number(x: dl.Tensor, y: dl.Tensor):
    count = 0
    for _ in dl.range(x.shape[0]):
        count = count + 1
    dl.store(y, (0, 0), dl.full((4, 4), count, dl.float32))


@dure.kernel
def loop_carries_number_to_tile(x: dl.Tensor, y: dl.Tensor):
    best = 0.0
    for k in dl.range(x.shape[0]):
        best = dl.maximum(best, dl.load(x, (k, 0), (1, 4)))
    dl.store(y, (0, 0), best)


@dure.kernel
def branches_disagree(x: dl.Tensor, y: dl.Tensor):
    if dl.program_id(0) > 2:
        value = dl.zeros((4, 4), dl.float32)
    else:
        value = dl.zeros((4, 4), dl.int32)
    dl.store(y, (0, 0), value)


@dure.kernel
def negative_index(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), dl.load(x, (-1, 0), (4, 4)))


@dure.kernel
def computed_index(x: dl.Tensor, rows: dl.Index(0, None), y: dl.Tensor):
    rows = dl.load(rows, (0,), (4,)) + 1
    dl.store(y, (0, 0), dl.load(x, (rows, 0), (4, 4)))


@dure.kernel
def element_of_a_tensor(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (x[0, 0], 0), dl.zeros((4, 4), dl.float32))


@dure.kernel
def tensor_arithmetic(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), x + 1)


@dure.kernel
def dynamic_shape(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), dl.zeros((x.shape[0], 4), dl.float32))


@dure.kernel
def negative_step(x: dl.Tensor, y: dl.Tensor):
    for k in dl.range(8, 0, -1):
        dl.store(y, (k, 0), dl.zeros((4, 4), dl.float32))


@dure.kernel
def float_range(x: dl.Tensor, y: dl.Tensor):
    for k in dl.range(2.5):
        dl.store(y, (k, 0), dl.zeros((4, 4), dl.float32))


@dure.kernel
def return_in_loop(x: dl.Tensor, y: dl.Tensor):
    for k in dl.range(x.shape[0]):
        dl.store(y, (k, 0), dl.zeros((4, 4), dl.float32))
        return


@dure.kernel
def returns_a_value(x: dl.Tensor, y: dl.Tensor):
    return dl.load(x, (0, 0), (4, 4))


def forever(x: Any) -> Any:
    return forever(x)


@dure.kernel
def recursion(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), forever(x))


@dure.kernel
def wrong_arguments(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (4, 4))
    dl.store(y, (0, 0), dl.exp(tile, tile))


@dure.kernel
def unknown_attribute(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (4, 4))
    dl.store(y, (0, 0), tile.sqrt())


@dure.kernel
def unknown_function(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), dl.expp(dl.load(x, (0, 0), (4, 4))))


@dure.kernel
def numpy_call(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (4, 4))
    dl.store(y, (0, 0), np.exp(tile))


@dure.kernel
def tile_slice(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (4, 4))
    dl.store(y, (0, 0), tile[0:2])


@dure.kernel
def dynamic_view_step(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), dl.load(x[::2], (0, 0), (4, 4)))


@dure.kernel
def store_into_index(rows: dl.Index(0, 9), y: dl.Tensor):
    dl.store(rows, (0,), dl.arange(4))


@dure.kernel
def bad_quantize(x: dl.Tensor, y: dl.Tensor):
    tile = dl.quantize(dl.load(x, (0, 0), (4, 16)), dl.int8_block32)
    dl.store(y, (0, 0), tile.to(dl.float32))


@dure.kernel
def static_failure(x: dl.Tensor, y: dl.Tensor, n: dl.const):
    dl.static_assert(n > 4, "four or more")


@dure.kernel
def refuses(x: dl.Tensor, y: dl.Tensor, n: dl.const):
    if n % 2 == 0:
        raise ValueError(f"only even numbers are refused, as {n}")


@dure.kernel
def static_division(x: dl.Tensor, y: dl.Tensor, n: dl.const):
    dl.store(y, (0, 0), dl.zeros((n // 0, 4), dl.float32))


@dure.kernel
def too_many_names(x: dl.Tensor, y: dl.Tensor):
    a, b, c = x.shape
    dl.store(y, (a, b), dl.zeros((4, c), dl.float32))


@dure.kernel
def number_too_large(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (4, 4)).to(dl.uint8)
    dl.store(y, (0, 0), (tile + 300).to(dl.float32))


@dure.kernel
def combine_function(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (4, 4))
    dl.store(y, (0, 0), dl.reduce(tile, 0, lambda a, b: a > b, 0.0, keepdims=True))


@dure.kernel
def runtime_division(x: dl.Tensor, y: dl.Tensor):
    i = dl.program_id(0)
    dl.store(y, (i // (i - 1), 0), dl.load(x, (i, 0), (4, 4)))


@dure.kernel
def huge_tile(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), dl.zeros((1 << 20, 1 << 20), dl.float32))


@dure.kernel
def combine_number(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), dl.reduce(dl.load(x, (0, 0), (4, 4)), 0, 3, 0.0))


@dure.kernel
def quantize_to_text(x: dl.Tensor, y: dl.Tensor):
    dl.store(y, (0, 0), dl.quantize(dl.load(x, (0, 0), (4, 32)), "int8"))


def helper(tile: Any) -> Any:
    """Called from a kernel."""
    return tile + missing  # noqa: F821


@dure.kernel
def unordered_name_in_helper(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (4, 4))
    dl.store(y, (0, 0), helper(tile))


def wrong_annotation(x: int) -> None:
    """Not a kernel."""


def takes_keywords(x: dl.Tensor, **others: dl.const) -> None:
    """Not a kernel."""
