from __future__ import annotations

import ctypes
import gc
import threading

import pytest

from dure.errors import IRError
from dure.runtime import llvm
from dure.runtime.host import host_features

ADD = "define i32 @add(i32 %a, i32 %b) {\n  %c = add i32 %a, %b\n  ret i32 %c\n}\n"
BINARY = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)


def call(module: llvm.LoadedModule, name: str, *arguments: int) -> int:
    function = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int32] * len(arguments))
    return function(module.address(name))(*arguments)


@pytest.mark.parametrize("level", llvm.OptLevel)
def test_compile_load_and_call(level: llvm.OptLevel) -> None:
    module = llvm.load_object(llvm.compile_module(ADD, host_features(), level))
    assert call(module, "add", 2, 40) == 42


def test_several_symbols_of_one_module() -> None:
    text = ADD + "define i32 @one() { ret i32 1 }\ndefine i32 @two() { ret i32 2 }\n"
    module = llvm.load_object(llvm.compile_module(text, host_features()))
    assert [call(module, "one"), call(module, "two"), call(module, "add", 1, 1)] == [1, 2, 2]
    gc.collect()
    assert [call(module, "one"), call(module, "two"), call(module, "add", 1, 1)] == [1, 2, 2]


def test_equal_names_in_different_modules_do_not_meet() -> None:
    modules = [
        llvm.load_object(llvm.compile_module(f"define i32 @f() {{ ret i32 {i} }}", host_features()))
        for i in range(20)
    ]
    del modules[5:10]
    gc.collect()
    assert [call(module, "f") for module in modules] == [*range(5), *range(10, 20)]


def test_external_symbols() -> None:
    callback = BINARY(lambda a, b: a * b)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address
    text = """declare i32 @external(i32, i32)
    declare double @sqrt(double)
    define i32 @f(i32 %a) {
      %b = call i32 @external(i32 %a, i32 3)
      ret i32 %b
    }
    define double @g(double %x) {
      %y = call double @sqrt(double %x)
      ret double %y
    }"""
    module = llvm.load_object(llvm.compile_module(text, host_features()), {"external": address})
    assert call(module, "f", 5) == 15
    root = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(module.address("g"))
    assert root(16.0) == 4.0


def test_memory_intrinsics_reach_the_c_library() -> None:
    text = """declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
    define void @copy(ptr %to, ptr %from, i64 %n) {
      call void @llvm.memcpy.p0.p0.i64(ptr %to, ptr %from, i64 %n, i1 false)
      ret void
    }"""
    module = llvm.load_object(llvm.compile_module(text, host_features()))
    source, target = ctypes.create_string_buffer(b"dure"), ctypes.create_string_buffer(5)
    copy = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    copy(module.address("copy"))(ctypes.addressof(target), ctypes.addressof(source), 5)
    assert target.value == b"dure"


def test_a_syntax_error_names_the_line() -> None:
    text = "define i32 @f(i32 %a) {\n  ; a comment\n  %b = fadd i32 %a, 1\n  ret i32 %b\n}\n"
    with pytest.raises(IRError, match="at line 3") as caught:
        llvm.compile_module(text, host_features())
    assert "%b = fadd i32 %a, 1" in caught.value.where
    assert "^" in caught.value.where


def test_a_verifier_error_is_named() -> None:
    text = "define i32 @f(i1 %c) {\n br label %a\na:\n %y = add i32 %z, 1\n br label %b\nb:\n"
    with pytest.raises(IRError, match="dominate"):
        llvm.compile_module(text + " %z = add i32 1, 1\n ret i32 %y\n}", host_features())


@pytest.mark.parametrize("text", ["define", "}{", "define void @f() {\0}", "@" * 100, "\n\n\n %"])
def test_no_text_crashes_the_parser(text: str) -> None:
    with pytest.raises(IRError):
        llvm.compile_module(text, host_features())


def test_unresolved_symbols_are_an_error() -> None:
    text = "declare void @nobody_has_this()\ndefine void @f() {\n call void @nobody_has_this()\n"
    object_code = llvm.compile_module(text + " ret void\n}", host_features())
    with pytest.raises(IRError, match="cannot be loaded"):
        llvm.load_object(object_code).address("f")


def test_an_unknown_symbol_is_an_error() -> None:
    module = llvm.load_object(llvm.compile_module(ADD, host_features()))
    with pytest.raises(IRError, match="no symbol 'subtract'"):
        module.address("subtract")


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", b"not an object", None])
def test_damaged_objects_are_an_error(damage: bytes | None) -> None:
    object_code = llvm.compile_module(ADD, host_features())
    with pytest.raises(IRError):
        llvm.load_object(object_code[: len(object_code) // 2] if damage is None else damage)


def test_damage_inside_an_object_never_goes_unnoticed_at_load() -> None:
    object_code = llvm.compile_module(ADD, host_features())
    for length in range(0, len(object_code), 37):
        with pytest.raises(IRError):
            llvm.load_object(object_code[:length]).address("add")


def test_times_add_up_by_phase() -> None:
    times = llvm.CompileTimes()
    llvm.load_object(llvm.compile_module(ADD, host_features(), times=times), times=times)
    assert times.modules == 1
    assert min(times.parse, times.verify, times.passes, times.codegen, times.load) > 0
    assert times.total == pytest.approx(
        times.parse + times.verify + times.passes + times.codegen + times.load
    )


def test_vectorizing_is_an_option() -> None:
    text = """define void @f(ptr noalias %a, ptr noalias %b, i64 %n) {
    entry:
      br label %loop
    loop:
      %i = phi i64 [0, %entry], [%j, %loop]
      %p = getelementptr i32, ptr %a, i64 %i
      %q = getelementptr i32, ptr %b, i64 %i
      %x = load i32, ptr %p
      %y = add i32 %x, 7
      store i32 %y, ptr %q
      %j = add i64 %i, 1
      %more = icmp ult i64 %j, %n
      br i1 %more, label %loop, label %done
    done:
      ret void
    }"""
    plain = llvm.optimized_ir(text, host_features(), llvm.OptLevel.O3)
    vector = llvm.CompileOptions(passes=llvm.OptLevel.O3, vectorize=True)
    assert "x i32>" not in plain
    assert "x i32>" in llvm.optimized_ir(text, host_features(), vector)


def test_o0_inlines_what_must_be_inlined() -> None:
    text = """define internal i32 @twice(i32 %a) alwaysinline {
      %b = mul i32 %a, 2
      ret i32 %b
    }
    define i32 @f(i32 %a) {
      %b = call i32 @twice(i32 %a)
      ret i32 %b
    }"""
    assert "call" not in llvm.optimized_ir(text, host_features(), llvm.OptLevel.O0)


def test_many_threads_compile_at_once() -> None:
    results: dict[int, int] = {}

    def work(number: int) -> None:
        text = f"define i32 @f(i32 %a) {{\n  %b = add i32 %a, {number}\n  ret i32 %b\n}}"
        module = llvm.load_object(llvm.compile_module(text, host_features()))
        results[number] = call(module, "f", 1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: i + 1 for i in range(12)}
