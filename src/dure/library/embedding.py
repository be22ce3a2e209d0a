"""Gather of rows: an embedding table of any element type, or rows of an activation."""

from __future__ import annotations

import dure
import dure.lang as dl
from dure.library.convert import convert
from dure.library.indices import OptionalPlaces, Places


@dure.kernel
def embedding(
    table: dl.Tensor,
    tokens: Places,
    y: dl.Tensor,
    bd: dl.const,
    scale: dl.const = 1.0,
):
    """``y[t] = table[tokens[t]] * scale`` for table (V, D), tokens (T,), y (T, D), a row an
    instance.
    """
    c, t = dl.program_id(0), dl.program_id(1)
    row = dl.load(table, (tokens[t], c), (1, bd)).to(dl.float32)
    if scale != 1.0:
        row = row * scale
    dl.store(y, (t, c), convert(row, y.dtype))


@dure.kernel
def gather_rows(
    table: dl.Tensor,
    rows: OptionalPlaces,
    y: dl.Tensor,
    bt: dl.const,
    bd: dl.const,
    scale: dl.const = 1.0,
):
    """``y[t] = table[rows[t]] * scale`` by index lists of ``bt`` rows; a row of -1 is absent and
    reads zeros.
    """
    c, t = dl.program_id(0), dl.program_id(1)
    found = dl.load(rows, (t,), (bt,), fill=-1)
    picked = dl.load(table, (found, c), (bt, bd))
    if scale != 1.0:
        picked = convert(picked.to(dl.float32) * scale, y.dtype)
    dl.store(y, (t, c), picked)
