"""The launches: each makes the array that a kernel writes, and gives the call and that array."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np

import dure
import dure.lang as dl
from dure import library
from dure.library.activation import gelu_tanh
from peers.kernels.operands import EPSILON

#: The call, and what it writes.
Launch: TypeAlias = tuple[Callable[[], None], Any]


def gemm(a: Any, b: Any) -> Launch:
    """``a @ b``"""
    c = np.empty((a.shape[0], b.shape[1]), a.dtype)
    return partial(library.matmul_kn, a, b, c), c


def attention(q: Any, k: Any, v: Any) -> Launch:
    """Causal attention of the last positions."""
    y, size = np.empty_like(q), q.shape[2]
    consts = {"bd": size, "group": 1, "scale": size**-0.5}
    return partial(library.dense_attention, q, k, v, y, **consts), y


def softmax(x: Any) -> Launch:
    """Softmax of rows."""
    y = np.empty_like(x)
    return partial(library.softmax, x, y), y


def rms_norm(x: Any, weight: Any) -> Launch:
    """RMS norm of rows."""
    y = np.empty_like(x)
    return partial(library.rms_norm, x, weight, None, y, epsilon=EPSILON), y


def layer_norm(x: Any, weight: Any, bias: Any) -> Launch:
    """Layer norm of rows."""
    y = np.empty_like(x)
    return partial(library.layer_norm, x, weight, bias, None, y, epsilon=EPSILON), y


def gelu_chain(x: Any, a: Any, b: Any, c: Any) -> Launch:
    """``gelu(x * a + b) * c`` in one kernel, for a, b and c of a row."""
    y = np.empty_like(x)
    return partial(library.elementwise_2d, y, x, a, b, c, function=_gelu_chain), y


def _gelu_chain(inputs: Any, index: Any, shape: Any) -> Any:
    x, a, b, c = inputs
    column, width = (index[1],), (shape[1],)
    z = dl.load(x, index, shape) * dl.load(a, column, width)[None, :]
    z = z + dl.load(b, column, width)[None, :]
    return gelu_tanh(z) * dl.load(c, column, width)[None, :]


def conv2d(x: Any, w: Any) -> Launch:
    """A convolution as large as its input."""
    y = np.empty((*x.shape[:3], w.shape[0]), x.dtype)
    pad = w.shape[1] // 2
    return partial(library.conv2d, x, w, None, y, pad_h=pad, pad_w=pad), y


@dure.kernel
def add(a: dl.Tensor, b: dl.Tensor, c: dl.Tensor, n: dl.const = 64):
    """``c = a + b``"""
    i = dl.program_id(0)
    dl.store(c, (i,), dl.load(a, (i,), (n,)) + dl.load(b, (i,), (n,)))


def launch(a: Any, b: Any) -> Launch:
    """A kernel that does next to nothing, on three small arrays."""
    c = np.empty_like(a)
    return partial(add, a, b, c), c


LAUNCHES: dict[str, Callable[..., Launch]] = {
    f.__name__: f
    for f in (gemm, attention, softmax, rms_norm, layer_norm, gelu_chain, conv2d, launch)
}
