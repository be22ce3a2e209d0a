"""Three loop nests of one matmul whose order and tile sizes are pinned: nothing is left to choose.

They are those of the AWS NKI kernel-optimization guide, whose times on Trainium2 are public: the
left operand comes transposed, one core does everything, and a tile is what the tensor engine
takes at once (128 rows of K, 128 columns of the left operand, 512 of the right).  A tuple of tiles
is what the guide keeps as a list of tiles in the scratchpad.
"""

from __future__ import annotations

import dure
import dure.lang as dl
from dure.library.convert import convert


@dure.kernel
def matmul_tiled(
    x: dl.Tensor,
    w: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const = 128,
    bn: dl.const = 512,
    bk: dl.const = 128,
):
    """``y = x.T @ w`` for x (K, M), w (K, N), y (M, N): both tiles are loaded for each dot."""
    for m in dl.range(dl.cdiv(y.shape[0], bm)):
        for n in dl.range(dl.cdiv(y.shape[1], bn)):
            acc = dl.zeros((bm, bn), dl.float32)
            for k in dl.range(dl.cdiv(x.shape[0], bk)):
                left = dl.load(x, (k, m), (bk, bm))
                acc = dl.dot(left.T, dl.load(w, (k, n), (bk, bn)), acc)
            dl.store(y, (m, n), convert(acc, y.dtype))


@dure.kernel
def matmul_hoisted(
    x: dl.Tensor,
    w: dl.Tensor,
    y: dl.Tensor,
    depth: dl.const,
    bm: dl.const = 128,
    bn: dl.const = 512,
    bk: dl.const = 128,
):
    """``y = x.T @ w``: a column of x's tiles is loaded once for each m, a column of w's once for
    each n.

    ``depth`` is how many tiles of ``bk`` rows cover K.
    """
    for m in dl.range(dl.cdiv(y.shape[0], bm)):
        left = ()
        for k in dl.static_range(depth):
            left = (*left, dl.load(x, (k, m), (bk, bm)))
        for n in dl.range(dl.cdiv(y.shape[1], bn)):
            right = ()
            for k in dl.static_range(depth):
                right = (*right, dl.load(w, (k, n), (bk, bn)))
            acc = dl.zeros((bm, bn), dl.float32)
            for k in dl.static_range(depth):
                acc = dl.dot(left[k].T, right[k], acc)
            dl.store(y, (m, n), convert(acc, y.dtype))


@dure.kernel
def matmul_blocked(
    x: dl.Tensor,
    w: dl.Tensor,
    y: dl.Tensor,
    rows: dl.const = 1,
    bm: dl.const = 1024,
    bn: dl.const = 512,
    bk: dl.const = 512,
):
    """``y = x.T @ w``: all three axes are blocked, and a tile of w (bk, bn) meets ``rows`` tiles of
    x (bk, bm) before the next one is loaded.

    ``rows * bm`` divides M rounded up to whole ``bm``.  The guide walks K outside all blocks of M,
    and adds every block of K to sums in the scratchpad, for which its own blocks need 28 MiB of 24
    there; here K is walked for each block of M, and its sum stays where the tensor engine leaves
    it, which holds one such tile.
    """
    for n in dl.range(dl.cdiv(y.shape[1], bn)):
        for m in dl.range(dl.cdiv(y.shape[0], rows * bm)):
            sums = ()
            for _ in dl.static_range(rows):
                sums = (*sums, dl.zeros((bm, bn), dl.float32))
            for k in dl.range(dl.cdiv(x.shape[0], bk)):
                right = dl.load(w, (k, n), (bk, bn))
                added = ()
                for r in dl.static_range(rows):
                    left = dl.load(x, (k, m * rows + r), (bk, bm))
                    added = (*added, dl.dot(left.T, right, sums[r]))
                sums = added
            for r in dl.static_range(rows):
                dl.store(y, (m * rows + r, n), convert(sums[r], y.dtype))
