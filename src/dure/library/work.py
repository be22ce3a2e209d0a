"""What a command is asked about: an operator by name and sizes, or a kernel of a file.

Both become :class:`Work`, kernel launches of known sizes.  A kernel of a file is given as
``FILE.py:KERNEL``, and each of its tensors as ``NAME=DTYPE[EXTENTS]``:

- ``x=bf16[512x512]``: dtypes are those of operators, the language's own (``float32``), and block
  formats (``q4_k``), quantized along the last axis;
- ``ids=int32[64]:0..4095``: an index argument, with the range that its elements are drawn from;
- ``bias=none``: absent.

Consts are given as ``NAME=VALUE``, a number, true, false, or the name of a dtype; what has neither
value nor default is a tile size that the compiler chooses.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from dure.errors import DureError, KernelError, UsageError
from dure.ir.dtypes import DTYPES, FORMATS, DType, ElementType
from dure.ir.types import TensorType
from dure.lang.kernel import Kernel
from dure.lang.signature import KernelParameter
from dure.library import operators_common
from dure.library.call import IndexArray, KernelCall, index_tensor, stored_bytes, tensor
from dure.library.operators import operator

_ARGUMENT = re.compile(
    r"(\w+)\s*\[\s*([0-9]+(?:\s*[x,]\s*[0-9]+)*)?\s*\](?::(-?[0-9]+)\.\.([0-9]+))?"
)
#: Tile sizes that are tried for open consts, to have some that are legal.
_SIZES = (32, 128, 16, 64, 256, 8, 512, 4, 2, 1)
#: The most entries of an index argument, whose values are made.
_MOST_INDICES = 1 << 26


@dataclass(frozen=True)
class Work:
    """Launches one after another.

    ``flops`` are those of the definition; None for a kernel of a file, whose instructions are
    counted instead.  ``bytes`` must cross the far memory's edge at least once.
    """

    name: str
    dims: str
    dtype: str
    calls: tuple[KernelCall, ...]
    flops: int | None
    bytes: int


def operator_work(op: str, dims: str, dtype: str, algorithm: str = "dure") -> Work:
    """An operator as :func:`~dure.library.operators.operator` reads it."""
    found = operator(op, dims, dtype, algorithm)
    return Work(op, dims, dtype, found.calls, found.flops, found.bytes)


def kernel_work(place: str, arguments: Sequence[str], consts: Sequence[str]) -> Work:
    """The kernel that ``FILE.py:KERNEL`` names, of these arguments.

    Raises :class:`UsageError` for what can't be read, and :class:`KernelError` for arguments that
    the kernel doesn't take.
    """
    kernel = load_kernel(place)
    given = _pairs(arguments, "--arg", "x=bf16[512x512]")
    values = {n: _const(n, t) for n, t in _pairs(consts, "--const", "bm=64").items()}
    names = _tensor_names(kernel, given)
    types: list[TensorType | None] = []
    lists: dict[int, IndexArray] = {}
    for number, name in enumerate(names):
        parameter = _parameter(kernel, name)
        kind, drawn = _argument(name, given.get(name, "none"), parameter)
        types.append(kind)
        if drawn is not None:
            lists[number] = drawn
    open_consts = _open(kernel, values)
    call = KernelCall(kernel, tuple(types), values, dict.fromkeys(open_consts, 1), lists)
    tiles = legal_tiles(call)
    dtype = next((str(t.dtype) for t in types if t is not None), "")
    dims = " ".join(f"{name}={given[name]}" for name in names if name in given)
    moved = sum(stored_bytes(t) for t in types if t is not None)
    made = KernelCall(kernel, tuple(types), values, tiles, lists)
    return Work(kernel.__name__, dims, dtype, (made,), None, moved)


# --- the file ------------------------------------------------------------------------------------


def is_kernel(place: str) -> bool:
    """Whether this is ``FILE.py:KERNEL`` rather than an operator's name."""
    return ".py:" in place or place.endswith(".py")


def load_kernel(place: str) -> Kernel:
    """The kernel that ``FILE.py:KERNEL`` names.  The file is executed, as an import would."""
    file, _, name = place.rpartition(":")
    if not file or not name:
        raise UsageError(
            f"'{place}' names no kernel",
            rule="a kernel is named by its file and its name",
            fix="write FILE.py:KERNEL",
        )
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"there is no file {file}", fix="give the path of a Python file")
    module = _module(path)
    found = getattr(module, name, None)
    if not isinstance(found, Kernel):
        kernels = sorted(n for n, v in vars(module).items() if isinstance(v, Kernel))
        raise UsageError(
            f"{file} has no kernel '{name}'",
            rule="a kernel is a function of the file under @dure.kernel",
            fix=f"one of {', '.join(kernels)}"
            if kernels
            else "put @dure.kernel above the function",
        )
    return found


def _module(path: Path) -> object:
    name = f"dure_kernels_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except DureError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UsageError(
            f"{path} can't be imported: {type(error).__name__}: {error}",
            where=str(path),
            fix="mend the file; `python FILE.py` shows where",
        ) from error
    return module


# --- arguments -----------------------------------------------------------------------------------


def _pairs(texts: Sequence[str], option: str, example: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise UsageError(
                f"{option} {text} gives nothing",
                rule="an argument is given by its name and what it is",
                fix=f"write {option} {example}",
            )
        found[name.strip()] = value.strip()
    return found


def _tensor_names(kernel: Kernel, given: Mapping[str, str]) -> list[str]:
    """The kernel's tensors, those of ``*extras`` as ``extras_0`` and so on."""
    signature = kernel.signature
    many = next((p.name for p in signature.tensors if p.many), None)
    single = len([p for p in signature.tensors if not p.many])
    extra = len([n for n in given if many is not None and re.fullmatch(rf"{many}_[0-9]+", n)])
    names = signature.tensor_names(single + extra)
    for name in given:
        if name not in names:
            raise UsageError(
                f"the kernel '{kernel.__name__}' has no tensor '{name}'",
                rule=f"its tensors are {', '.join(names)}",
                fix="correct the spelling; consts are given with --const",
            )
    missing = [p.name for p in signature.tensors if p.required and p.name not in given]
    if missing:
        raise UsageError(
            f"the kernel '{kernel.__name__}' is missing {', '.join(missing)}",
            rule=f"each of its tensors has a dtype and a shape: {', '.join(names)}",
            fix=" ".join(f"--arg {name}=bf16[512x512]" for name in missing),
        )
    return names


def _parameter(kernel: Kernel, name: str) -> KernelParameter:
    return next(
        p
        for p in kernel.signature.tensors
        if p.name == name or (p.many and name.startswith(f"{p.name}_"))
    )


def _argument(
    name: str, text: str, parameter: KernelParameter
) -> tuple[TensorType | None, IndexArray | None]:
    """The type of an argument, None for an absent one; and the values of indices."""
    if text == "none":
        return None, None
    found = _ARGUMENT.fullmatch(text)
    if found is None:
        raise UsageError(
            f"--arg {name}={text[:80]} is no type",
            rule="a tensor is DTYPE[EXTENTS], an index argument int32[EXTENTS]:LOW..HIGH",
            fix=f"write --arg {name}=bf16[512x512]",
        )
    shape = tuple(int(e) for e in re.split(r"[x,]", found[2])) if found[2] else ()
    if any(not 1 <= e <= operators_common.MOST_ELEMENTS for e in shape) or (
        prod(shape) > operators_common.MOST_ELEMENTS
    ):
        raise UsageError(
            f"--arg {name}={text[:80]}: a tensor of {' x '.join(map(str, shape))[:80]} elements",
            rule="an extent is at least 1, and a tensor has at most 2^40 elements",
            fix=f"write --arg {name}=bf16[512x512]",
        )
    if parameter.index is None:
        return tensor(_dtype(found[1], f"--arg {name}"), *shape), None
    return _index(name, shape, parameter, found[3], found[4])


def _index(
    name: str, shape: tuple[int, ...], parameter: KernelParameter, low: str | None, high: str | None
) -> tuple[TensorType, IndexArray]:
    """An index argument: every value of its range in turn, spread over the range."""
    assert parameter.index is not None
    least = int(low) if low is not None else max(parameter.index.low, 0)
    most = int(high) if high is not None else parameter.index.high
    count = prod(shape)
    if most is None:
        raise UsageError(
            f"the index argument '{name}' has no range",
            rule="its elements are drawn from LOW..HIGH",
            fix=f"write --arg {name}=int32[{'x'.join(map(str, shape))}]:0..{max(count - 1, 0)}",
        )
    span = most - least + 1
    if (
        count > _MOST_INDICES
        or span < 1
        or most >= 1 << 31
        or (parameter.index.unique and count > span)
    ):
        raise UsageError(
            f"{count} indices of '{name}' from {least} to {most}",
            rule=f"at most {_MOST_INDICES} indices of 32 bits, unique ones no more than there are",
            fix=f"write --arg {name}=int32[64]:0..4095",
        )
    values = (least + np.arange(count, dtype=np.int64) % span).astype(np.int32).reshape(shape)
    return index_tensor(values, least, most, unique=parameter.index.unique), values


def _dtype(text: str, where: str) -> ElementType:
    known: dict[str, ElementType] = {**FORMATS, **DTYPES, **operators_common.DTYPES}
    known["i32"] = DTYPES["int32"]
    if text not in known:
        raise UsageError(
            f"no dtype is called '{text}'",
            where=where,
            rule=f"a dtype is one of {', '.join(operators_common.DTYPES)}, {', '.join(DTYPES)}, "
            f"or a block format: {', '.join(FORMATS)}",
            fix="write bf16",
        )
    return known[text]


def _const(name: str, text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    if text in DTYPES or text in operators_common.DTYPES:
        found = _dtype(text, f"--const {name}")
        assert isinstance(found, DType)
        return found
    raise UsageError(
        f"--const {name}={text} is no value",
        rule="a const is a number, true, false or the name of a dtype",
        fix=f"write --const {name}=64",
    )


def _open(kernel: Kernel, values: Mapping[str, object]) -> list[str]:
    """The consts that have neither value nor default."""
    known = [p.name for p in kernel.signature.consts]
    for name in values:
        if name not in known:
            raise UsageError(
                f"the kernel '{kernel.__name__}' has no const '{name}'",
                rule=f"its consts are {', '.join(known) or 'none'}",
                fix="correct the spelling; tensors are given with --arg",
            )
    empty = KernelParameter("", "const").default
    return [p.name for p in kernel.signature.consts if p.name not in values and p.default is empty]


def legal_tiles(call: KernelCall) -> dict[str, int]:
    """Sizes of the open consts with which the kernel is a legal tile program."""
    last: DureError | None = None
    for size in _SIZES if call.tiles else (0,):
        tiles = dict.fromkeys(call.tiles, size)
        try:
            call.specialize(tiles)
        except KernelError as error:
            last = error
            continue
        return tiles
    assert last is not None
    raise last
