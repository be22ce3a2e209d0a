"""The one door to LLVM: LLVM IR as text in, object code out, and object code into this process.

Everything that dure takes from llvmlite is used here and nowhere else, and llvmlite is imported
when a function is first called: importing this module costs nothing.  LLVM is called under
llvmlite's own lock, each compilation in an LLVM context of its own, so that every function here
may be called from any thread.
"""

from __future__ import annotations

import enum
import functools
import itertools
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from dure.errors import IRError, TargetError
from dure.runtime.host import HostFeatures

if TYPE_CHECKING:
    from types import ModuleType

    import llvmlite.binding as binding


class OptLevel(enum.IntEnum):
    """How hard LLVM works on a module.

    ``O0`` runs only the inliner of ``alwaysinline`` functions and the promotion of stack slots to
    registers.  ``O1`` is what is left to do on generated code in which nothing is computed
    twice, or inside a loop that doesn't change it: a quarter of the time of LLVM's own first level,
    for the same code but for a few percent.  ``O2`` and ``O3`` are LLVM's pipelines, for code that
    was written by hand.
    """

    O0 = 0
    O1 = 1
    O2 = 2
    O3 = 3


@dataclass(frozen=True)
class CompileOptions:
    """Everything besides the IR and the host's features that decides the object code.

    ``passes`` is the pipeline's level and ``codegen`` that of instruction selection, scheduling
    and register allocation.  ``vectorize`` switches the loop and the SLP vectorizers on,
    ``unroll`` loop unrolling: both are off because the generator writes vectors and unrolls
    itself.
    """

    passes: OptLevel = OptLevel.O1
    codegen: OptLevel = OptLevel.O2
    vectorize: bool = False
    unroll: bool = False

    @property
    def key(self) -> str:
        """A text that is equal exactly where the options are."""
        flags = f"vectorize={int(self.vectorize)} unroll={int(self.unroll)}"
        return f"passes={int(self.passes)} codegen={int(self.codegen)} {flags}"


@dataclass
class CompileTimes:
    """Seconds spent in each phase of compilations; a caller passes one in and it adds up."""

    parse: float = 0.0
    verify: float = 0.0
    passes: float = 0.0
    codegen: float = 0.0
    load: float = 0.0
    modules: int = 0

    @property
    def total(self) -> float:
        """All phases, in seconds."""
        return self.parse + self.verify + self.passes + self.codegen + self.load


@dataclass
class LoadedModule:
    """Object code in executable memory, which lives as long as this object."""

    _name: str
    _trackers: list[binding.ResourceTracker]
    _addresses: dict[str, int] = field(default_factory=dict[str, int])

    def address(self, symbol: str) -> int:
        """The address of a defined symbol; the first one asked for links the module.

        Raises :class:`~dure.errors.IRError` where the symbol is not defined, or where something
        that the module declares is given by nobody.
        """
        known = self._addresses.get(symbol)
        if known is not None:
            return known
        try:
            tracker = _jit().lookup(self._name, symbol)
        except RuntimeError as error:
            if "not found" not in str(error):
                raise _unlinkable(error) from error
            raise IRError(
                f"the object code defines no symbol '{symbol}'",
                rule="a function must be defined in the module that its address is taken from",
                fix="define it with external linkage",
            ) from error
        # Any tracker's end unloads the code: what a look-up returns is kept like the first one.
        self._trackers.append(tracker)
        found = self._addresses[symbol] = tracker[symbol]
        return found


def compile_module(
    ir_text: str,
    cpu: HostFeatures,
    opt: OptLevel | CompileOptions = OptLevel.O1,
    *,
    times: CompileTimes | None = None,
) -> bytes:
    """Compile LLVM IR to object code for ``cpu``.

    Raises :class:`~dure.errors.IRError` with the offending line where LLVM rejects the text, and
    :class:`~dure.errors.TargetError` where it cannot generate code for ``cpu``.
    """
    object_code = _compile(ir_text, cpu, _options(opt), times or CompileTimes(), assembly=False)
    assert isinstance(object_code, bytes)
    return object_code


def assembly(ir_text: str, cpu: HostFeatures, opt: OptLevel | CompileOptions = OptLevel.O1) -> str:
    """The assembly text of what :func:`compile_module` compiles to; raises the same errors."""
    text = _compile(ir_text, cpu, _options(opt), CompileTimes(), assembly=True)
    assert isinstance(text, str)
    return text


def optimized_ir(
    ir_text: str, cpu: HostFeatures, opt: OptLevel | CompileOptions = OptLevel.O1
) -> str:
    """The LLVM IR after the pass pipeline, before instruction selection; raises the same errors."""
    llvm, options = _binding(), _options(opt)
    machine = _target_machine(cpu, options)
    module = _parse(ir_text, machine, cpu, CompileTimes())
    _run_passes(llvm, module, machine, options)
    return str(module)


def load_object(
    object_code: bytes,
    symbols: Mapping[str, int] | None = None,
    *,
    times: CompileTimes | None = None,
) -> LoadedModule:
    """Link object code into this process.

    ``symbols`` gives the addresses of what the object code declares and does not define; the C
    library is searched for the rest.  LLVM links when the first address is asked for.  Memory is
    reserved for the module as a whole, so that its parts are near enough to each other for the
    small code model.  Raises :class:`~dure.errors.IRError` where the object is damaged.
    """
    llvm = _binding()
    started = time.perf_counter()
    builder = llvm.JITLibraryBuilder().add_object_img(object_code).add_current_process()
    for symbol, address in (symbols or {}).items():
        builder.import_symbol(symbol, address)
    name = f"dure-{next(_library_numbers)}"
    try:
        tracker = builder.link(_jit(), name)
    except RuntimeError as error:
        raise _unlinkable(error) from error
    if times is not None:
        times.load += time.perf_counter() - started
    return LoadedModule(name, [tracker])


def llvm_version() -> str:
    """LLVM's version, as in ``"22.1.0"``."""
    return ".".join(str(part) for part in _binding().llvm_version_info)


def process_triple() -> str:
    """LLVM's name of this process's architecture, system and object format."""
    return _binding().get_process_triple()


def detected_features() -> dict[str, bool]:
    """LLVM's names of the instruction features that processor and system offer; may be empty."""
    try:
        return dict(_binding().get_host_cpu_features())
    except RuntimeError:
        return {}


_library_numbers = itertools.count()
_jit_lock = threading.Lock()
_the_jit: list[binding.LLJIT] = []


@functools.cache
def _initialize() -> None:
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def _binding() -> ModuleType:
    import llvmlite.binding as llvm

    _initialize()
    return llvm


def _jit() -> binding.LLJIT:
    with _jit_lock:
        if not _the_jit:
            # JITLink places a module's sections together.  It has no COFF loader that llvmlite can
            # feed (it emits ELF on Windows), so that the older linker does the work there.
            link = sys.platform != "win32"
            llvm = _binding()
            _the_jit.append(llvm.create_lljit_compiler(use_jit_link=link, suppress_errors=True))
        return _the_jit[0]


def _options(opt: OptLevel | CompileOptions) -> CompileOptions:
    return opt if isinstance(opt, CompileOptions) else CompileOptions(passes=opt)


def _target_machine(cpu: HostFeatures, options: CompileOptions) -> binding.TargetMachine:
    llvm = _binding()
    windows = sys.platform == "win32"
    triple = f"{cpu.triple}-elf" if windows and not cpu.triple.endswith("-elf") else cpu.triple
    try:
        return llvm.Target.from_triple(triple).create_target_machine(
            cpu="x86-64" if cpu.architecture == "x86-64" else "generic",
            features=cpu.feature_string,
            opt=int(options.codegen),
            reloc="pic",
            codemodel="large" if windows else "small",
        )
    except RuntimeError as error:
        raise TargetError(
            f"LLVM generates no code for '{cpu.triple}': {_first_line(str(error))}",
            rule="the host must be one of LLVM's targets",
            fix="install an llvmlite built for this architecture",
        ) from error


def _compile(
    ir_text: str,
    cpu: HostFeatures,
    options: CompileOptions,
    times: CompileTimes,
    *,
    assembly: bool,
) -> bytes | str:
    llvm = _binding()
    machine = _target_machine(cpu, options)
    module = _parse(ir_text, machine, cpu, times)
    started = time.perf_counter()
    _run_passes(llvm, module, machine, options)
    optimized = time.perf_counter()
    times.passes += optimized - started
    try:
        return machine.emit_assembly(module) if assembly else machine.emit_object(module)
    except RuntimeError as error:
        raise IRError(
            f"LLVM cannot generate code: {_first_line(str(error))}",
            rule=f"every operation must exist at level {cpu.level}",
        ) from error
    finally:
        times.codegen += time.perf_counter() - optimized
        times.modules += 1


def _parse(
    ir_text: str, machine: binding.TargetMachine, cpu: HostFeatures, times: CompileTimes
) -> binding.ModuleRef:
    llvm = _binding()
    started = time.perf_counter()
    if "\0" in ir_text:
        _raise_rejected("the text contains a zero byte", ir_text)
    try:
        module = llvm.parse_assembly(ir_text, llvm.create_context())
    except RuntimeError as error:
        _raise_rejected(str(error), ir_text)
    parsed = time.perf_counter()
    module.triple = cpu.triple
    module.data_layout = str(machine.target_data)
    try:
        module.verify()
    except RuntimeError as error:
        _raise_rejected(str(error), ir_text)
    times.parse += parsed - started
    times.verify += time.perf_counter() - parsed
    return module


def _run_passes(
    llvm: ModuleType,
    module: binding.ModuleRef,
    machine: binding.TargetMachine,
    options: CompileOptions,
) -> None:
    tuning = llvm.create_pipeline_tuning_options(speed_level=int(options.passes))
    tuning.loop_vectorization = options.vectorize
    tuning.slp_vectorization = options.vectorize
    tuning.loop_interleaving = options.vectorize
    tuning.loop_unrolling = options.unroll
    builder = llvm.create_pass_builder(machine, tuning)
    if options.passes <= OptLevel.O1:
        manager = llvm.create_new_module_pass_manager()
        manager.add_always_inliner_pass()
        manager.add_sroa_pass()
        if options.passes == OptLevel.O1:
            manager.add_simplify_cfg_pass()
            manager.add_instruction_combine_pass()
            manager.add_loop_rotate_pass()
            manager.add_new_gvn_pass()
            manager.add_dead_code_elimination_pass()
    else:
        manager = builder.getModulePassManager()
    manager.run(module, builder)


def _raise_rejected(message: str, ir_text: str) -> NoReturn:
    """Raise what LLVM said, with the line of the IR that it said it about where it named one."""
    match = re.search(r"<string>:(\d+):(\d+): error: (.*)", message)
    if match is None:
        reason = message.removeprefix("LLVM IR parsing error").strip()
        raise IRError(
            f"LLVM rejects the generated code: {reason}", rule="LLVM's verifier accepts it"
        )
    number, column, reason = int(match[1]), int(match[2]), match[3]
    lines = ir_text.split("\n")
    shown = [
        f"  {i:>6} | {lines[i - 1]}" for i in range(max(1, number - 2), min(number, len(lines)) + 1)
    ]
    # LLVM counts the column of the character after which parsing stopped, from 1.
    shown.append(" " * (9 + max(column - 1, 0)) + "^")
    raise IRError(
        f"LLVM rejects the generated code at line {number}: {reason}",
        where="\n".join(shown),
        rule="the code generator emits LLVM IR that LLVM's parser accepts",
    )


def _unlinkable(error: RuntimeError) -> IRError:
    return IRError(
        f"the object code cannot be loaded: {_first_line(str(error))}",
        rule="object code is complete, for this machine, and every symbol it declares is given",
        fix="compile it again; pass the addresses of external functions in 'symbols'",
    )


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]
