"""Two-dimensional convolution: a dot a tap, over strided windows of the input."""

from __future__ import annotations

import dure
import dure.lang as dl
from dure.library.convert import convert


@dure.kernel
def conv2d(
    x: dl.Tensor,
    w: dl.Tensor,
    bias: dl.Tensor | None,
    y: dl.Tensor,
    bh: dl.const,
    bw: dl.const,
    bo: dl.const,
    bc: dl.const,
    stride_h: dl.const = 1,
    stride_w: dl.const = 1,
    pad_h: dl.const = 0,
    pad_w: dl.const = 0,
    dilation_h: dl.const = 1,
    dilation_w: dl.const = 1,
):
    """``y = conv(x, w) + bias`` for x (N, H, W, C), w (O, KH, KW, C), y (N, OH, OW, O).

    ``bias`` is (O,), or None.

    Tiles are ``bw`` columns of ``bh`` output rows by ``bo`` channels; input channels come in blocks
    of ``bc``.  ``pad`` counts zeros in front; what lies behind the input reads as zero too.  Taps
    are added in the order (kh, kw, c).
    """
    o, column = dl.program_id(0), dl.program_id(1)
    row, n = dl.program_id(2), dl.program_id(3)
    acc = dl.zeros((bh * bw, bo), dl.float32)
    for kh in dl.range(w.shape[1]):
        for kw in dl.range(w.shape[2]):
            for c in dl.range(dl.cdiv(w.shape[3], bc)):
                pixels = dl.load(
                    x,
                    (n, row, column, c),
                    (1, bh, bw, bc),
                    step=(1, bh * stride_h, bw * stride_w, bc),
                    offset=(0, kh * dilation_h - pad_h, kw * dilation_w - pad_w, 0),
                    stride=(1, stride_h if bh > 1 else 1, stride_w, 1),
                    fill=0,
                ).reshape((bh * bw, bc))
                taps = dl.load(w, (o, kh, kw, c), (bo, 1, 1, bc)).reshape((bo, bc))
                acc = dl.dot(pixels, taps.T, acc)
    if bias is not None:
        acc = acc + dl.load(bias, (o,), (bo,)).to(dl.float32)[None, :]
    dl.store(y, (n, row, column, o), convert(acc, y.dtype).reshape((1, bh, bw, bo)))
