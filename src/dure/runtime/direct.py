"""Launches that were made before, made again by one native call.

A launch checks its arguments and finds out where they are; in Python that takes longer than a small
kernel.  What was found is kept as a *pattern*: of each array its element type, shape, strides and
what must be true of its memory.  A native function, which Python calls like one of its own, holds
arrays against the patterns, and runs the step of the first that fits.  It reads NumPy's arrays
where they are: the layout of ``PyArrayObject`` is part of NumPy's ABI, and is probed before use.

Words of a table, of a pattern and of an array's record are 64 bits; ``_TABLE`` and the rest say
which is which.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dure.runtime import cache, host, llvm
from dure.runtime.arrays import ArrayView
from dure.runtime.pool import Pool, launch_address

#: Patterns of one function; more launches than these take the longer way.
MOST = 16

#: Words of a table: its first pattern, the type of an array, what is returned, and the pool.
_FIRST, _ARRAY_TYPE, _YES, _NO, _STATE, _TABLE = range(6)
#: Words of a pattern: the next one, how many arrays, the step and its context, workers, where the
#: arrays' addresses go, the arrays' records, and pairs that must not overlap.
_NEXT, _COUNT, _STEP, _CONTEXT, _WORKERS, _ADDRESSES, _RECORDS, _PAIRS, _PAIR_COUNT, _PATTERN = (
    range(10)
)
#: Words of a record: element type, rank, flags, shape and strides, the first and last byte used.
_TYPE, _RANK, _FLAGS, _SHAPE, _LOW, _HIGH, _RECORD = range(7)
#: Places of NumPy's fields, in bytes, and its flags.
_DATA, _ND, _DIMENSIONS, _STRIDES, _DESCR, _ARRAY_FLAGS = 16, 24, 32, 40, 56, 64
_ALIGNED, _WRITEABLE = 0x0100, 0x0400

_CODE = f"""
declare ptr @PyLong_AsVoidPtr(ptr)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare void @Py_IncRef(ptr)
declare void @dure_launch(ptr, ptr, ptr, i64)

define internal i64 @word(ptr %at, i64 %number) alwaysinline {{
  %place = getelementptr i64, ptr %at, i64 %number
  %value = load i64, ptr %place, align 8
  ret i64 %value
}}

define internal ptr @pointer(ptr %at, i64 %number) alwaysinline {{
  %place = getelementptr i64, ptr %at, i64 %number
  %value = load ptr, ptr %place, align 8
  ret ptr %value
}}

; Whether %count words at %one are those at %other.
define internal i1 @same(ptr %one, ptr %other, i64 %count) alwaysinline {{
entry:
  br label %head
head:
  %i = phi i64 [0, %entry], [%i1, %next]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %look, label %yes
look:
  %a = call i64 @word(ptr %one, i64 %i)
  %b = call i64 @word(ptr %other, i64 %i)
  %equal = icmp eq i64 %a, %b
  br i1 %equal, label %next, label %no
next:
  %i1 = add i64 %i, 1
  br label %head
yes:
  ret i1 true
no:
  ret i1 false
}}

; Whether an object is an array of NumPy's own type that a record fits.
define internal i1 @fits(ptr %object, ptr %record, ptr %array_type) alwaysinline {{
entry:
  %type = call ptr @pointer(ptr %object, i64 1)
  %is_array = icmp eq ptr %type, %array_type
  br i1 %is_array, label %elements, label %no
elements:
  %descr = call i64 @word(ptr %object, i64 {_DESCR // 8})
  %wanted = call i64 @word(ptr %record, i64 {_TYPE})
  %same_type = icmp eq i64 %descr, %wanted
  br i1 %same_type, label %ranks, label %no
ranks:
  %nd_at = getelementptr i8, ptr %object, i64 {_ND}
  %nd = load i32, ptr %nd_at, align 4
  %rank = call i64 @word(ptr %record, i64 {_RANK})
  %short = trunc i64 %rank to i32
  %same_rank = icmp eq i32 %nd, %short
  br i1 %same_rank, label %flags, label %no
flags:
  %flags_at = getelementptr i8, ptr %object, i64 {_ARRAY_FLAGS}
  %has = load i32, ptr %flags_at, align 4
  %needs = call i64 @word(ptr %record, i64 {_FLAGS})
  %mask = trunc i64 %needs to i32
  %present = and i32 %has, %mask
  %all = icmp eq i32 %present, %mask
  br i1 %all, label %shapes, label %no
shapes:
  %shape = call ptr @pointer(ptr %record, i64 {_SHAPE})
  %dimensions = call ptr @pointer(ptr %object, i64 {_DIMENSIONS // 8})
  %same_shape = call i1 @same(ptr %dimensions, ptr %shape, i64 %rank)
  br i1 %same_shape, label %steps, label %no
steps:
  %behind = getelementptr i64, ptr %shape, i64 %rank
  %strides = call ptr @pointer(ptr %object, i64 {_STRIDES // 8})
  %same_strides = call i1 @same(ptr %strides, ptr %behind, i64 %rank)
  ret i1 %same_strides
no:
  ret i1 false
}}

; Whether the bytes that two arrays of a pattern use overlap.
define internal i1 @overlap(ptr %addresses, ptr %records, ptr %pair) alwaysinline {{
  %i = call i64 @word(ptr %pair, i64 0)
  %j = call i64 @word(ptr %pair, i64 1)
  %i_record = mul i64 %i, {_RECORD}
  %j_record = mul i64 %j, {_RECORD}
  %one = getelementptr i64, ptr %records, i64 %i_record
  %other = getelementptr i64, ptr %records, i64 %j_record
  %i_data = call i64 @word(ptr %addresses, i64 %i)
  %j_data = call i64 @word(ptr %addresses, i64 %j)
  %i_low = call i64 @word(ptr %one, i64 {_LOW})
  %i_high = call i64 @word(ptr %one, i64 {_HIGH})
  %j_low = call i64 @word(ptr %other, i64 {_LOW})
  %j_high = call i64 @word(ptr %other, i64 {_HIGH})
  %i_first = add i64 %i_data, %i_low
  %i_end = add i64 %i_data, %i_high
  %j_first = add i64 %j_data, %j_low
  %j_end = add i64 %j_data, %j_high
  %before = icmp ult i64 %i_first, %j_end
  %behind = icmp ult i64 %j_first, %i_end
  %both = and i1 %before, %behind
  ret i1 %both
}}

define ptr @dure_direct(ptr %self, ptr %arguments, i64 %given) {{
entry:
  %table = call ptr @PyLong_AsVoidPtr(ptr %self)
  %array_type = call ptr @pointer(ptr %table, i64 {_ARRAY_TYPE})
  %first = call ptr @pointer(ptr %table, i64 {_FIRST})
  br label %look
look:
  %pattern = phi ptr [%first, %entry], [%following, %skip]
  %none = icmp eq ptr %pattern, null
  br i1 %none, label %leave, label %count
count:
  %wanted = call i64 @word(ptr %pattern, i64 {_COUNT})
  %records = call ptr @pointer(ptr %pattern, i64 {_RECORDS})
  %addresses = call ptr @pointer(ptr %pattern, i64 {_ADDRESSES})
  %as_many = icmp eq i64 %wanted, %given
  br i1 %as_many, label %arrays, label %skip
arrays:
  %n = phi i64 [0, %count], [%n1, %place]
  %left = icmp ult i64 %n, %wanted
  br i1 %left, label %array, label %pairs
array:
  %object = call ptr @pointer(ptr %arguments, i64 %n)
  %shift = mul i64 %n, {_RECORD}
  %record = getelementptr i64, ptr %records, i64 %shift
  %good = call i1 @fits(ptr %object, ptr %record, ptr %array_type)
  br i1 %good, label %place, label %skip
place:
  %data = call i64 @word(ptr %object, i64 {_DATA // 8})
  %slot = getelementptr i64, ptr %addresses, i64 %n
  store i64 %data, ptr %slot, align 8
  %n1 = add i64 %n, 1
  br label %arrays
pairs:
  %pair_count = call i64 @word(ptr %pattern, i64 {_PAIR_COUNT})
  %all_pairs = call ptr @pointer(ptr %pattern, i64 {_PAIRS})
  br label %pair
pair:
  %p = phi i64 [0, %pairs], [%p1, %apart]
  %pairs_left = icmp ult i64 %p, %pair_count
  br i1 %pairs_left, label %compare, label %run
compare:
  %at = mul i64 %p, 2
  %which = getelementptr i64, ptr %all_pairs, i64 %at
  %shared = call i1 @overlap(ptr %addresses, ptr %records, ptr %which)
  br i1 %shared, label %skip, label %apart
apart:
  %p1 = add i64 %p, 1
  br label %pair
skip:
  %following = call ptr @pointer(ptr %pattern, i64 {_NEXT})
  br label %look
run:
  %state = call ptr @pointer(ptr %table, i64 {_STATE})
  %step = call ptr @pointer(ptr %pattern, i64 {_STEP})
  %context = call ptr @pointer(ptr %pattern, i64 {_CONTEXT})
  %workers = call i64 @word(ptr %pattern, i64 {_WORKERS})
  %thread = call ptr @PyEval_SaveThread()
  call void @dure_launch(ptr %state, ptr %step, ptr %context, i64 %workers)
  call void @PyEval_RestoreThread(ptr %thread)
  br label %leave
leave:
  %which_word = phi i64 [{_NO}, %look], [{_YES}, %run]
  %result = call ptr @pointer(ptr %table, i64 %which_word)
  call void @Py_IncRef(ptr %result)
  ret ptr %result
}}
"""

_METH_FASTCALL = 0x0080


class _MethodDef(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


@dataclass
class Direct:
    """Launches on a pool that one native function makes: ``function(*arrays)`` is True where a
    pattern fitted and its step has run.  It is called as :meth:`Pool.call` does.
    """

    pool: Pool
    function: Callable[..., bool]
    table: npt.NDArray[np.int64]
    #: The pool's helpers, for which alone the patterns are.
    helpers: object
    count: int = 0
    kept: list[object] = field(default_factory=list[object])

    @staticmethod
    def on(pool: Pool) -> Direct | None:
        """No patterns yet; None where Python or NumPy isn't one whose objects are known."""
        native = _native()
        if native is None:
            return None
        table = np.zeros(_TABLE, np.int64)
        table[_ARRAY_TYPE], table[_YES], table[_NO] = id(np.ndarray), id(True), id(False)
        table[_STATE] = pool.state_address
        make = ctypes.pythonapi.PyCFunction_NewEx
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p]
        function = make(ctypes.addressof(native.method), table.ctypes.data, None)
        return Direct(pool, function, table, pool.helpers)

    def remember(
        self,
        arrays: Sequence[npt.NDArray[Any]],
        views: Sequence[ArrayView],
        stored: Sequence[bool],
        step: int,
        arena: int,
        sizes: Sequence[int],
        workers: int,
    ) -> None:
        """Add the pattern of a launch that was checked: ``stored`` says what it writes, which must
        be writable and overlap nothing.  It runs on so many ``workers``, or all of the pool's.
        """
        if self.count >= MOST:
            return
        records = np.zeros((max(1, len(arrays)), _RECORD), np.int64)
        shapes = [np.array([*a.shape, *a.strides, 0], np.int64) for a in arrays]
        for record, array, view, written, shape in zip(
            records, arrays, views, stored, shapes, strict=False
        ):
            low, high = view.byte_range
            flags = _ALIGNED | (_WRITEABLE if written else 0)
            record[:] = (
                *(id(array.dtype), array.ndim, flags, shape.ctypes.data),
                *(low - view.address, high - view.address),
            )
        count = len(arrays)
        pairs = [
            (i, j) for i in range(count) for j in range(i + 1, count) if stored[i] or stored[j]
        ]
        both = np.array([*pairs, (0, 0)], np.int64)
        addresses, numbers = np.zeros(count + 1, np.int64), np.array([*sizes, 0], np.int64)
        context = np.array([addresses.ctypes.data, numbers.ctypes.data, arena], np.int64)
        pattern = np.zeros(_PATTERN, np.int64)
        pattern[_NEXT], pattern[_COUNT] = self.table[_FIRST], count
        pattern[_STEP], pattern[_CONTEXT] = step, context.ctypes.data
        pattern[_WORKERS] = min(self.pool.workers, workers)
        pattern[_ADDRESSES] = addresses.ctypes.data
        pattern[_RECORDS] = records.ctypes.data
        pattern[_PAIRS], pattern[_PAIR_COUNT] = both.ctypes.data, len(pairs)
        dtypes = [array.dtype for array in arrays]
        self.kept += [records, shapes, both, addresses, numbers, context, pattern, dtypes]
        self.count += 1
        self.table[_FIRST] = pattern.ctypes.data


@dataclass(frozen=True)
class _Native:
    module: llvm.LoadedModule
    method: _MethodDef


@functools.cache
def _native() -> _Native | None:
    if not _known_objects():
        return None
    names = ("PyLong_AsVoidPtr", "PyEval_SaveThread", "PyEval_RestoreThread", "Py_IncRef")
    addresses = {"dure_launch": launch_address()}
    for name in names:
        address = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value
        assert address is not None
        addresses[name] = address
    code = cache.compile_cached(_CODE, host.host_features(), llvm.OptLevel.O2)
    module = llvm.load_object(code, addresses)
    method = _MethodDef(b"direct", module.address("dure_direct"), _METH_FASTCALL, None)
    # Functions look into it until they are freed, at the interpreter's exit after everything here.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(method))
    return _Native(module, method)


def _known_objects() -> bool:
    """Whether objects begin with their references and type, and arrays are as NumPy's ABI says."""
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return False
    probe = np.zeros((5, 7), np.float32)[1::2, ::-1]
    words = (ctypes.c_int64 * (_ARRAY_FLAGS // 8 + 1)).from_address(id(probe))
    if words[1] != id(np.ndarray) or words[_DESCR // 8] != id(probe.dtype):
        return False
    data, dimensions, strides = (words[n // 8] for n in (_DATA, _DIMENSIONS, _STRIDES))
    rank = ctypes.c_int32.from_address(id(probe) + _ND).value
    flags = ctypes.c_int32.from_address(id(probe) + _ARRAY_FLAGS).value
    if data != probe.ctypes.data or rank != probe.ndim or not dimensions or not strides:
        return False
    found = [tuple((ctypes.c_int64 * 2).from_address(at)) for at in (dimensions, strides)]
    read_only = np.zeros(1, np.float32)
    read_only.flags.writeable = False
    refused = ctypes.c_int32.from_address(id(read_only) + _ARRAY_FLAGS).value
    needs = _ALIGNED | _WRITEABLE
    return (
        found == [probe.shape, probe.strides]
        and flags & needs == needs
        and refused & needs == _ALIGNED
    )
