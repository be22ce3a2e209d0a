"""Adopting other libraries' arrays without copying them.

:func:`adopt` takes NumPy arrays and whatever speaks DLPack, the array interface or the buffer
protocol, and gives back where the elements are: an :class:`ArrayView`.  It is asked at every
launch and remembers nothing, so that an array may be resized, moved or freed between launches.
Costs, measured on a 2.6 GHz Zen 4: a NumPy array 1.2 us, a tensor by DLPack 5 us.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dure.errors import KernelError


@dataclass(slots=True)
class ArrayView:
    """Where an array's elements are, for native code.

    Element ``i`` is at ``address + sum(i[d] * strides[d])``; strides are in bytes and may be zero
    or negative.  ``dtype`` is dure's name of the element type.  ``owner`` keeps the memory alive
    as long as the view is.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    itemsize: int
    readonly: bool
    owner: object = field(repr=False)

    @property
    def size(self) -> int:
        """The number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def byte_range(self) -> tuple[int, int]:
        """The first address of an element and the one after the last; equal when empty."""
        if 0 in self.shape:
            return self.address, self.address
        low = high = self.address
        for extent, stride in zip(self.shape, self.strides, strict=True):
            reach = (extent - 1) * stride
            low, high = low + min(reach, 0), high + max(reach, 0)
        return low, high + self.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after the other in row-major order."""
        expected = self.itemsize
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != expected:
                return 0 in self.shape
            expected *= extent
        return True


def adopt(value: object, name: str = "the argument", *, writable: bool = False) -> ArrayView:
    """The memory of ``value`` as it is: never a copy.

    ``name`` is what errors call it.  ``writable`` refuses an array that must not be written.
    Raises :class:`~dure.errors.KernelError` when ``value`` is no array, is on another device, has
    elements that dure has no type for, another byte order or misaligned elements.
    """
    if type(value) is np.ndarray:
        view = _from_numpy(value, name)
    else:
        view = _from_foreign(value, name)
    if writable and view.readonly:
        raise KernelError(
            f"{name} is written by the kernel, and its memory is read-only",
            rule="an out or inout argument is a writable array",
            fix="pass a writable copy, as in numpy.array(x)",
        )
    return view


_NAMES: dict[np.dtype[Any], str] = {
    np.dtype(kind): np.dtype(kind).name
    for kind in (
        *(np.float32, np.float16, np.float64, np.int64, np.int32, np.int16, np.int8),
        *(np.uint8, np.uint16, np.uint32, np.bool_),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    )
}
"""NumPy's types that dure has too, in the machine's byte order; others are other keys."""

_DLPACK_NAMES = {
    **{(0, bits): f"int{bits}" for bits in (8, 16, 32, 64)},
    **{(1, bits): f"uint{bits}" for bits in (8, 16, 32)},
    **{(2, bits): f"float{bits}" for bits in (16, 32, 64)},
    (4, 16): "bfloat16",
    (6, 8): "bool",
    (10, 8): "float8_e4m3fn",
    (12, 8): "float8_e5m2",
}
"""DLPack's (code, bits) -> dure's name.  Source: dlpack.h, version 1.1."""

_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 3: "opaque", 4: "bfloat", 5: "complex", 6: "bool"}

_DLPACK_DEVICES = {
    1: "cpu",
    2: "cuda",
    3: "cuda_host",
    4: "opencl",
    7: "vulkan",
    8: "metal",
    9: "vpi",
    10: "rocm",
    11: "rocm_host",
    12: "ext_dev",
    13: "cuda_managed",
    14: "oneapi",
    15: "webgpu",
    16: "hexagon",
    17: "maia",
}
_HOST_DEVICES = frozenset({1, 3, 11})
"""Ordinary memory, and the host's pages that CUDA or ROCm pinned."""

_DLPACK_READ_ONLY = 1
_SUPPORTED = ", ".join(sorted({*_NAMES.values()}))


_TENSOR = struct.Struct("PiiiBBHPPQ")
"""``DLTensor``: data, device's type and index, ndim, code, bits, lanes, shape, strides, offset."""
_VERSIONED = struct.Struct("IIPPQ")
"""``DLManagedTensorVersioned`` before its ``DLTensor``: major, minor, context, deleter, flags."""
_DATA_OFFSET = struct.calcsize("iiciiPPP") - struct.calcsize("P")
"""In ``PyArrayInterface``: 2, ndim, kind, itemsize, flags, shape, strides, data."""


class _HasDLPack(Protocol):
    def __dlpack__(self, **options: Any) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


def _capsule_function(name: str, result: type, *arguments: type) -> Any:
    # By index and not by attribute: an attribute's types are shared with every user of ctypes.
    function = ctypes.pythonapi[name]
    function.restype, function.argtypes = result, arguments
    return function


_capsule_pointer = _capsule_function(
    "PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p
)
_capsule_is_valid = _capsule_function(
    "PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, ctypes.c_char_p
)


def _from_numpy(array: NDArray[Any], name: str) -> ArrayView:
    dtype = array.dtype
    known = _NAMES.get(dtype)
    flags = array.flags
    if known is None:
        _raise_numpy_dtype(dtype, name)
    if not flags.aligned:
        raise KernelError(
            f"{name} has elements at addresses that are no multiple of {dtype.itemsize} bytes",
            rule="an element is aligned to its size",
            fix="pass an aligned copy, as in numpy.array(x)",
        )
    # A quarter of the time that array.ctypes.data or __array_interface__ take.
    capsule = array.__array_struct__
    place = _capsule_pointer(capsule, None) + _DATA_OFFSET
    address = ctypes.c_void_p.from_address(place).value or 0
    return ArrayView(
        address, array.shape, array.strides, known, dtype.itemsize, not flags.writeable, array
    )


def _from_foreign(value: object, name: str) -> ArrayView:
    """Any array that is not exactly NumPy's: what it speaks best is taken first."""
    if isinstance(value, np.ma.MaskedArray):
        raise KernelError(
            f"{name} is a masked array, and a kernel knows no masks",
            rule="every element of an argument counts",
            fix="pass x.filled(value), or the mask as an argument of its own",
        )
    if isinstance(value, np.generic):
        # It has the protocols, but its memory is a temporary copy that is gone when they return.
        _raise_no_array(cast("object", value), name)
    if isinstance(value, np.ndarray):
        return _from_numpy(cast("NDArray[Any]", value), name)
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        return _from_dlpack(cast("_HasDLPack", value), name)
    if hasattr(value, "__array_interface__"):
        with contextlib.suppress(ValueError, TypeError):
            return _from_numpy(np.array(value, copy=False), name)
        _raise_no_array(value, name)
    try:
        memory = memoryview(cast("Any", value))
    except TypeError:
        _raise_no_array(value, name)
    try:
        array = np.array(memory, copy=False)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise KernelError(
            f"{name} is a buffer with elements of format '{memory.format}'",
            rule=f"dure's element types are {_SUPPORTED}",
            fix="convert it to a NumPy array of one of these",
        ) from error
    return _from_numpy(array, name)


def _from_dlpack(value: _HasDLPack, name: str) -> ArrayView:
    kind, index = _call(value, name, lambda: value.__dlpack_device__())
    if int(kind) not in _HOST_DEVICES:
        device = f"{_DLPACK_DEVICES.get(int(kind), f'device type {int(kind)}')}:{int(index)}"
        raise KernelError(
            f"{name} is on the device {device}, and the kernel runs on the CPU",
            rule="every array of a launch is in the memory of the device that runs it",
            fix='move it first, as in x.to("cpu") or x.cpu()',
        )
    capsule = _call(value, name, lambda: _export(value))
    # The capsule stays unconsumed: when the owner goes, its destructor gives the tensor back.
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        place = _capsule_pointer(capsule, b"dltensor_versioned")
        head = _VERSIONED.unpack(ctypes.string_at(place, _VERSIONED.size))
        major, minor, flags = head[0], head[1], head[4]
        if major != 1:
            raise KernelError(
                f"{name} speaks version {major}.{minor} of DLPack",
                rule="dure knows DLPack 0 and 1",
                fix="convert it to a NumPy array",
            )
        readonly = bool(flags & _DLPACK_READ_ONLY)
        return _from_dltensor(place + _VERSIONED.size, readonly, (value, capsule), name)
    if _capsule_is_valid(capsule, b"dltensor"):
        place = _capsule_pointer(capsule, b"dltensor")
        return _from_dltensor(place, False, (value, capsule), name)
    raise KernelError(
        f"{name}.__dlpack__() returned no DLPack capsule",
        rule="DLPack's capsules are named dltensor or dltensor_versioned",
        fix="convert it to a NumPy array",
    )


def _export(value: _HasDLPack) -> object:
    """Ask for the versioned struct, which tells read-only arrays, else for the old one."""
    try:
        return value.__dlpack__(max_version=(1, 1))
    except TypeError:
        return value.__dlpack__()


def _call(value: object, name: str, function: Any) -> Any:
    """A library may raise anything where it cannot export (gradients, sparse): say what."""
    try:
        return function()
    except KernelError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise KernelError(
            f"{name} ({_type_name(value)}) cannot be shared: {reason or type(error).__name__}",
            rule="an argument's library exports its memory through DLPack",
            fix="pass x.detach() or another plain, dense tensor in main memory",
        ) from error


def _from_dltensor(place: int, readonly: bool, owner: object, name: str) -> ArrayView:
    """The ``DLTensor`` at address ``place``; its strides count elements, and null is row-major."""
    fields = _TENSOR.unpack(ctypes.string_at(place, _TENSOR.size))
    data, _, _, ndim, code, bits, lanes, shape_at, strides_at, offset = fields
    dtype = _DLPACK_NAMES.get((code, bits))
    if dtype is None or lanes != 1:
        kind = _DLPACK_KINDS.get(code, f"type code {code}, bits ")
        _raise_dtype(f"{kind}{bits}{f' in vectors of {lanes}' if lanes != 1 else ''}", name)
    itemsize = bits // 8
    shape = _integers(shape_at, ndim)
    if strides_at:
        strides = tuple([stride * itemsize for stride in _integers(strides_at, ndim)])
    else:
        strides = _row_major(shape, itemsize)
    address = data + offset
    if address % itemsize and 0 not in shape:
        raise KernelError(
            f"{name} has elements at addresses that are no multiple of {itemsize} bytes",
            rule="an element is aligned to its size",
            fix="pass an aligned copy, as in x.clone()",
        )
    return ArrayView(address, shape, strides, dtype, itemsize, readonly, owner)


def _integers(address: int, count: int) -> tuple[int, ...]:
    """``count`` int64 numbers at ``address``."""
    return struct.unpack(f"{count}q", ctypes.string_at(address, 8 * count)) if count else ()


def _row_major(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides: list[int] = []
    for extent in reversed(shape):
        strides.append(itemsize)
        itemsize *= max(extent, 1)
    return tuple(reversed(strides))


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _raise_no_array(value: object, name: str) -> NoReturn:
    raise KernelError(
        f"{name} has the type {_type_name(value)}, which is no array",
        rule="an argument is a NumPy array, or speaks DLPack, the array interface or buffers",
        fix="pass numpy.asarray(x)",
    )


def _raise_numpy_dtype(dtype: np.dtype[Any], name: str) -> NoReturn:
    if not dtype.isnative and dtype.newbyteorder("=") in _NAMES:
        raise KernelError(
            f"{name} has elements in the byte order that this machine hasn't ({dtype.str})",
            rule="elements are in the machine's own byte order",
            fix=f'convert it, as in x.astype("{dtype.newbyteorder("=").name}")',
        )
    _raise_dtype(str(dtype), name)


def _raise_dtype(found: str, name: str) -> NoReturn:
    raise KernelError(
        f"{name} has elements of the type {found}, which dure doesn't have",
        rule=f"dure's element types are {_SUPPORTED}",
        fix='convert it to one of these, as in x.astype("float32")',
    )
