"""A kernel with the arguments of a launch as a :class:`~dure.library.call.KernelCall`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dure.ir.dtypes import DTYPES
from dure.ir.types import TensorType
from dure.lang.binding import match
from dure.lang.kernel import Kernel
from dure.lang.launch import adopt_all, array_of
from dure.library.call import IndexArray, KernelCall, index_tensor, tensor
from dure.library.operators_common import check_size
from dure.library.work import legal_tiles


def launched(kernel: Kernel, args: Sequence[object], consts: Mapping[str, object]) -> KernelCall:
    """The call of ``kernel(*args, **consts)``: arrays are shapes and types, but for the values of
    index arguments; consts without a value are the compiler's choice.

    Raises :class:`~dure.errors.KernelError` for arguments that the kernel doesn't take.
    """
    arguments = match(kernel.signature, args, consts)
    types: list[TensorType | None] = []
    lists: dict[int, IndexArray] = {}
    views = adopt_all(kernel.__name__, arguments)
    for place, (name, view) in enumerate(zip(arguments.names, views, strict=True)):
        declared = kernel.signature.index_of(name)
        if view is None:
            types.append(None)
        elif declared is None:
            types.append(check_size(tensor(DTYPES[view.dtype], *view.shape)))
        else:
            values = np.array(array_of(view), np.int32)
            most = declared.high if declared.high is not None else int(values.max(initial=0))
            types.append(index_tensor(values, declared.low, most, unique=declared.unique))
            lists[place] = values
    call = KernelCall(
        kernel, tuple(types), arguments.consts, dict.fromkeys(arguments.open, 1), lists
    )
    return replace(call, tiles=legal_tiles(call))
