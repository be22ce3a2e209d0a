"""A tile kernel to textual LLVM IR.

The function that comes out runs one worker's share of the grid::

    void kernel(ptr args, ptr sizes, i64 worker, i64 workers, ptr arena)

``args`` holds a data pointer per tensor parameter, ``sizes`` an i64 per symbol of the kernel,
``arena`` is scratch of ``arena_bytes`` that this worker alone uses.  Instances are numbered with
the first grid axis fastest, and each worker runs one contiguous range of them; a kernel that
combines into its output runs on the first worker alone, in that order.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

from dure.errors import KernelError
from dure.ir.core import Function, Op, walk
from dure.ir.dtypes import DType
from dure.ir.expr import symbols
from dure.runtime.host import HostFeatures
from dure.targets.cpu.body import BodyEmitter
from dure.targets.cpu.locations import Locations
from dure.targets.cpu.tiledots import finish_sizes
from dure.targets.cpu.values import Emitter
from dure.targets.cpu.writer import Reg, Writer, integer


@dataclass(frozen=True)
class KernelCode:
    """The LLVM IR of one kernel.

    ``definition`` is the function's text, ``declarations`` what it calls (by name, so that several
    kernels can share a module), ``arena_bytes`` the scratch that each worker needs.
    """

    symbol: str
    definition: str
    arena_bytes: int
    declarations: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def llvm_ir(self) -> str:
        """A whole module that holds this kernel alone."""
        return module_text([self])


def module_text(kernels: list[KernelCode], more: str = "") -> str:
    """One module of several kernels and further definitions."""
    declarations: dict[str, str] = {}
    definitions: dict[str, str] = {}
    for kernel in kernels:
        declarations.update(kernel.declarations)
        definitions[kernel.symbol] = kernel.definition
    return "\n".join([*declarations.values(), *definitions.values(), more, ""])


def emit_kernel(
    function: Function, host: HostFeatures, locations: Locations | None = None
) -> KernelCode:
    """LLVM IR of a tile kernel for this host; each instruction says where it comes from where
    ``locations`` are given.

    Raises :class:`KernelError` with the author's line where an op cannot be compiled.
    """
    if function.level != "tile":
        raise KernelError(
            f"'{function.name}' is a {function.level}-level function",
            rule="the CPU compiles tile kernels",
            fix="lower the program to kernels first",
        )
    _check_elements(function)
    w = Writer()
    w.locations = locations
    e = Emitter(w, host, Reg("ptr", "%arena"))
    body = BodyEmitter(e, function)
    for place, param in enumerate(function.params):
        slot = w.offset(Reg("ptr", "%args"), integer(8 * place))
        body.bind(param.value, w.load("ptr", slot, 8))
    for place, symbol in enumerate(function.symbols):
        slot = w.offset(Reg("ptr", "%sizes"), integer(8 * place))
        w.symbols[symbol] = w.load("i64", slot, 8)
    entry = w.reserve()
    _instances(w, function, body)
    finish_sizes(e, entry)
    body.distant.finish()
    w.do("ret void")
    text = w.text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    symbol = "k_" + re.sub(r"\W", "_", function.name) + "_" + digest
    parameters = "ptr %args, ptr %sizes, i64 %worker, i64 %workers, ptr %arena"
    attributes = f"nounwind {host.function_attributes}"
    if locations is not None:
        attributes += locations.attribute
    definition = f"define void @{symbol}({parameters}) {attributes} {{\nentry:\n{text}\n}}\n"
    if locations is not None:
        definition += locations.metadata(symbol)
    return KernelCode(symbol, definition, e.arena_bytes, w.declarations)


def _check_elements(function: Function) -> None:
    """Refuse elements that share a byte outside of a block format, where they are first used."""
    for param in function.params:
        dtype = param.value.tensor.dtype
        if isinstance(dtype, DType) and dtype.bits < 8:
            spans = [op.span for op in walk(function.body) if param.value in op.operands]
            raise KernelError(
                f"'{param.value.name}' of kernel '{function.name}' is a plain tensor of {dtype}",
                where=next((span.render() for span in spans if span is not None), ""),
                rule="the CPU reads and writes elements of whole bytes, or of block formats",
                fix="use int8, or a block format for weights, such as q4_0",
            )


def _instances(w: Writer, function: Function, body: BodyEmitter) -> None:
    """The loop over this worker's instances."""
    extents = [w.maximum(w.index(extent), integer(0)) for extent in function.grid]
    total = integer(1)
    for extent in extents:
        total = w.mul(total, extent)
    worker, workers = Reg("i64", "%worker"), Reg("i64", "%workers")
    if any(_combines(op) for op in walk(function.body)):
        first = w.compare("icmp eq", worker, integer(0))
        begin, end = integer(0), w.select(first, total, integer(0))
    else:
        begin = w.binary("udiv", w.mul(total, worker), workers)
        end = w.binary("udiv", w.mul(total, w.add(worker, integer(1))), workers)

    def instance(number: Reg, _: list[Reg]) -> list[Reg]:
        rest = number
        for axis, (program_id, extent) in enumerate(
            zip(function.program_ids, extents, strict=True)
        ):
            last = axis == len(extents) - 1
            w.symbols[program_id] = rest if last else w.binary("urem", rest, extent)
            rest = rest if last else w.binary("udiv", rest, extent)
        body.region(function.body)
        return []

    def run(number: Reg, _: list[Reg]) -> list[Reg]:
        first, last = (
            w.select(w.compare("icmp eq", number, integer(0)), front, back)
            for front, back in zip(*spans, strict=True)
        )
        w.loop(first, last, 1, instance)
        return []

    if not _uneven(function):
        w.loop(begin, end, 1, instance)
        return
    spans = _mirrored(w, begin, end, total)
    w.loop(integer(0), integer(2), 1, run)


def _uneven(function: Function) -> bool:
    """Whether instances walk loops of different lengths, as causal attention does."""
    own = set(function.program_ids)
    loops = (op for op in walk(function.body) if op.name == "for")
    return any(own & {*symbols(op.attr("start")), *symbols(op.attr("stop"))} for op in loops)


def _mirrored(w: Writer, begin: Reg, end: Reg, total: Reg) -> tuple[tuple[Reg, Reg], ...]:
    """A worker's instances where later ones take longer, or shorter: a run from the front, and as
    many from the back.

    They are counted from both ends in turns; ``begin`` to ``end`` is the worker's part of that.
    """
    one, two = integer(1), integer(2)

    def half(number: Reg) -> Reg:
        return w.floordiv(number, two)

    front = half(w.add(begin, one)), half(w.add(end, one))
    return front, (w.sub(total, half(end)), w.sub(total, half(begin)))


def _combines(op: Op) -> bool:
    return op.name == "store" and bool(op.attr("combine"))
