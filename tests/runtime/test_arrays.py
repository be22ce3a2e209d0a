from __future__ import annotations

import array
import ctypes
import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dure.errors import KernelError
from dure.runtime.arrays import ArrayView, adopt

DTYPES = [
    *("float32", "float16", "float64", "int64", "int32", "int16", "int8"),
    *("uint8", "uint16", "uint32", "bool"),
]


def read(view: ArrayView, index: tuple[int, ...]) -> bytes:
    """The bytes of one element, by the view's own address arithmetic."""
    place = view.address + sum(i * s for i, s in zip(index, view.strides, strict=True))
    return ctypes.string_at(place, view.itemsize)


def assert_same(view: ArrayView, expected: np.ndarray[Any, Any]) -> None:
    assert view.shape == expected.shape
    assert view.itemsize == expected.itemsize
    for index in np.ndindex(*expected.shape):
        assert read(view, index) == expected[index].tobytes()


@given(st.data())
def test_any_numpy_view_is_read_where_it_is(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    base = data.draw(hnp.arrays(dtype, hnp.array_shapes(max_dims=4, max_side=5)))
    indices = data.draw(hnp.basic_indices(base.shape, allow_ellipsis=True))
    view = base[indices]
    if not isinstance(view, np.ndarray):
        return
    if view.ndim > 1:
        view = view.transpose(data.draw(st.permutations(range(view.ndim))))
    found = adopt(view)
    assert found.dtype == dtype
    assert found.contiguous == view.flags.c_contiguous
    assert found.size == view.size
    assert_same(found, view)
    low, high = found.byte_range
    assert (low, high) == np.lib.array_utils.byte_bounds(view) if view.size else low == high


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_narrow_floats(dtype: type) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    view = adopt(values[:, ::-2])
    assert view.dtype == np.dtype(dtype).name
    assert_same(view, values[:, ::-2])


def test_empty_and_zero_dimensional() -> None:
    assert adopt(np.zeros((3, 0, 2), np.float32)).shape == (3, 0, 2)
    scalar = np.array(7, np.int32)
    view = adopt(scalar)
    assert view.shape == () and view.strides == () and view.contiguous
    assert read(view, ()) == scalar.tobytes()


def test_broadcast_has_zero_strides_and_is_read_only() -> None:
    view = adopt(np.broadcast_to(np.float32([1, 2]), (5, 2)))
    assert view.strides == (0, 4)
    assert view.readonly
    with pytest.raises(KernelError, match="out is written by the kernel, and its memory is read"):
        adopt(np.broadcast_to(np.float32([1, 2]), (5, 2)), "out", writable=True)


def test_memory_is_shared_and_kept_alive() -> None:
    values = np.ones(1000, np.float32)
    view = adopt(values, writable=True)
    ctypes.c_float.from_address(view.address).value = 5.0
    assert values[0] == 5.0
    gone = weakref.ref(values)
    del values
    gc.collect()
    assert gone() is not None
    del view
    gc.collect()
    assert gone() is None


class Foreign:
    """An array of another library, which speaks only DLPack, in its old or its new form."""

    def __init__(
        self, values: np.ndarray[Any, Any], *, versioned: bool, device: tuple[int, int] = (1, 0)
    ) -> None:
        self.values, self.versioned, self.device = values, versioned, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> object:
        if options and not self.versioned:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.values.__dlpack__(**options)


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dlpack(dtype: str, versioned: bool) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)[:, ::-1, 1:]
    view = adopt(Foreign(values, versioned=versioned))
    assert view.dtype == dtype
    assert not view.readonly
    assert_same(view, values)


def test_dlpack_gives_the_tensor_back() -> None:
    values = np.ones(10, np.float32)
    gone = weakref.ref(values)
    view = adopt(Foreign(values, versioned=True))
    del values
    gc.collect()
    assert gone() is not None
    del view
    gc.collect()
    assert gone() is None


def test_dlpack_tells_read_only() -> None:
    values = np.ones(3, np.float32)
    values.flags.writeable = False
    assert adopt(Foreign(values, versioned=True)).readonly
    with pytest.raises(KernelError, match="cannot be shared"):
        adopt(Foreign(values, versioned=False))


@pytest.mark.parametrize(
    ("device", "word"), [((2, 1), "cuda:1"), ((8, 0), "metal:0"), ((99, 3), "device type 99:3")]
)
def test_a_foreign_device_is_named(device: tuple[int, int], word: str) -> None:
    with pytest.raises(KernelError, match=f"x is on the device {word}"):
        adopt(Foreign(np.ones(3), versioned=True, device=device), "x")


def test_dlpack_of_complex_numbers() -> None:
    with pytest.raises(KernelError, match="complex64"):
        adopt(Foreign(np.ones(3, np.complex64), versioned=True))


def test_a_capsule_that_is_none() -> None:
    class Broken:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **options: Any) -> object:
            return 5

    with pytest.raises(KernelError, match="no DLPack capsule"):
        adopt(Broken())


def test_torch_like_export_errors_are_passed_on() -> None:
    class Gradient:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **options: Any) -> object:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")

    with pytest.raises(KernelError, match=r"detach\(\)"):
        adopt(Gradient())


def test_array_interface() -> None:
    values = np.arange(12, dtype=np.int16).reshape(3, 4)[:, 1::2]

    class Image:
        __array_interface__ = values.__array_interface__

    view = adopt(Image())
    assert view.address == values.ctypes.data
    assert_same(view, values)


def test_buffers() -> None:
    assert adopt(b"abc").readonly
    mutable = bytearray(b"abc")
    view = adopt(mutable, writable=True)
    ctypes.c_char.from_address(view.address).value = b"x"
    assert mutable == b"xbc"
    assert adopt(array.array("f", [1, 2, 3])).dtype == "float32"
    assert adopt(memoryview(b"abcdef")[::2]).strides == (2,)
    assert adopt((ctypes.c_int32 * 4)()).dtype == "int32"


def test_structs_in_a_buffer_are_refused() -> None:
    class Pair(ctypes.Structure):
        _fields_ = (("a", ctypes.c_int32), ("b", ctypes.c_float))

    with pytest.raises(KernelError):
        adopt((Pair * 3)())


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (np.ones(3, ">f4"), "byte order"),
        (np.ones(3, np.complex64), "complex64"),
        (np.array([object()]), "object"),
        (np.ones(3, np.uint64), "uint64"),
        (np.zeros(3, "datetime64[s]"), "datetime64"),
        (np.array(["a"]), "<U1"),
        (np.zeros(2, [("a", "f4")]), "'a'"),
        (np.zeros(4, ml_dtypes.int4), "int4"),
        (np.ma.masked_array([1.0], [True]), "masked"),
        (np.zeros(9, np.uint8)[1:].view(np.float32), "multiple of 4"),
        (np.zeros(3, [("a", "i1"), ("b", "f4")])["b"], "multiple of 4"),
        (3, "type int"),
        (2.5, "type float"),
        (np.float32(1), "numpy.float32"),
        ([1.0, 2.0], "type list"),
        ("text", "type str"),
        (None, "NoneType"),
        (np.ones, "type function"),
    ],
)
def test_what_cannot_be_adopted_is_named(value: object, word: str) -> None:
    with pytest.raises(KernelError) as caught:
        adopt(value, "x")
    assert caught.value.what.startswith("x ")
    assert word in caught.value.what
    assert caught.value.rule and caught.value.fix
