"""``dure.save`` and ``dure.load``: a kernel, an operator or a model's step as a portable file.

What is loaded is what was saved, a :class:`~dure.library.work.Work` or a
:class:`~dure.models.chip_step.ChipStep`, but for its kernels, which come from the file: their tile
functions are compiled for a chip by the same passes.  docs/artefacts.md says what later releases
promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dure
from dure.compiler.chip.pipeline import Options
from dure.errors import ArtefactError, DureError, UsageError
from dure.lang.kernel import Kernel
from dure.library.artefact import container
from dure.library.artefact.kernels import Writer, read_calls, read_lists
from dure.library.artefact.schema import WorkEntry, manifest_text, read_manifest
from dure.library.call import KernelCall, stored_bytes
from dure.library.launched import launched
from dure.library.work import Work
from dure.machine.chip import Chip
from dure.models.artefact_step import read_step, step_manifest
from dure.models.chip_program import options_for
from dure.models.chip_step import ChipStep
from dure.targets import chip, chip_names

#: How the name of an artefact's file ends.
SUFFIX = ".dure"


def save(
    path: str | Path,
    what: Work | ChipStep | KernelCall | Kernel,
    *args: object,
    chips: Sequence[Chip] | None = None,
    **consts: object,
) -> None:
    """Write a kernel, an operator or a model's step to a file, which :func:`load` reads.

    A kernel of the language is given with the arguments of a launch: arrays, whose shapes and types
    are kept and whose bytes are not, but for index arguments, and consts.  Tile sizes that are left
    open are stored as they are best on each of ``chips`` (None: all that dure has) and from small
    to large.  Raises :class:`~dure.errors.DureError` for what is no legal tile kernel, and where
    the file can't be written.
    """
    if isinstance(what, Kernel):
        what = launched(what, args, consts)
    elif args or consts:
        raise UsageError(
            f"arguments beside {type(what).__name__}",
            rule="dure.save(path, kernel, *arrays, **consts); all else is given by itself",
            fix="leave out the arguments",
        )
    write(path, packed(what, chips))


def write(path: str | Path, data: bytes) -> None:
    """Write a file; raises :class:`DureError` where that can't be."""
    try:
        Path(path).write_bytes(data)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DureError(
            f"{path} can't be written: {reason}", fix="give a file that can be written to"
        ) from error


def packed(what: Work | ChipStep | KernelCall, chips: Sequence[Chip] | None = None) -> bytes:
    """The bytes of the file that :func:`save` writes."""
    if isinstance(what, KernelCall):
        what = _work_of(what)
    known = [chip(name) for name in chip_names()] if chips is None else chips
    if isinstance(what, Work):
        writer = Writer([(each, Options()) for each in known])
        holds = {"work": _work(what, writer)}
    else:
        step = what
        writer = Writer([(e, options_for(step, e, strict=False, prefetch=True)) for e in known])
        holds = {"step": step_manifest(step, writer)}
    text = manifest_text({**writer.manifest(), **holds})
    return container.write(_title(what), dure.__version__, {"manifest": text, **writer.sections()})


def load(path: str | Path) -> Work | ChipStep:
    """What :func:`save` wrote.

    Raises :class:`~dure.errors.ArtefactError` for a file that is no artefact, that is damaged, of
    a newer format, or that uses what only a later release knows.
    """
    where = str(path)
    try:
        with Path(path).open("rb") as file:
            data = file.read(container.MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArtefactError(
            f"{where} can't be read: {reason}", fix="give the path of a file that `dure save` wrote"
        ) from error
    if len(data) > container.MOST_BYTES:
        raise ArtefactError(
            f"{where} has more than {container.MOST_BYTES >> 20} MiB",
            rule="an artefact is the text of a step's kernels, without weights",
            fix="give the path of a file that `dure save` wrote",
        )
    return unpacked(data, where)


def unpacked(data: bytes, where: str) -> Work | ChipStep:
    """What the bytes of a file hold; ``where`` names it in errors."""
    found = container.read(data, where)
    if "manifest" not in found.sections:
        raise container.damaged("it has no manifest", where)
    manifest = read_manifest(found.sections["manifest"], where)
    lists = read_lists(found, manifest, where)
    calls = read_calls(found, manifest, lists, where)
    if manifest.work is not None:
        return _read_work(manifest.work, calls, where)
    assert manifest.step is not None
    return read_step(manifest.step, calls, lists, where)


def launches(what: Work | ChipStep) -> tuple[KernelCall, ...]:
    """The launches of what was loaded, each kernel once."""
    if isinstance(what, Work):
        calls = what.calls
    else:
        calls = tuple(call for entry in what.calls for call in entry.part.calls)
    return tuple({id(call.kernel): call for call in calls}.values())


def _title(what: Work | ChipStep) -> str:
    if isinstance(what, Work):
        return f"{what.name} {what.dims} {what.dtype}"
    batch = what.batch
    return f"{what.name} {batch.phase} {batch.sequences}x{batch.context} {what.dtype}"


def _work_of(call: KernelCall) -> Work:
    """A launch by itself; its compulsory bytes are those of its arguments."""
    kinds = [kind for kind in call.types if kind is not None]
    dims = " ".join("x".join(map(str, kind.shape)) for kind in kinds)
    moved = sum(stored_bytes(kind) for kind in kinds)
    return Work(
        call.kernel.__name__, dims, str(kinds[0].dtype) if kinds else "", (call,), None, moved
    )


def _work(work: Work, writer: Writer) -> dict[str, object]:
    return {
        "name": work.name,
        "dims": work.dims,
        "dtype": work.dtype,
        "launches": [writer.add(call) for call in work.calls],
        "flops": work.flops,
        "bytes": work.bytes,
    }


def _read_work(entry: WorkEntry, calls: Sequence[KernelCall], where: str) -> Work:
    launches = tuple(_numbered(calls, number, where) for number in entry.launches)
    return Work(entry.name, entry.dims, entry.dtype, launches, entry.flops, entry.bytes)


def _numbered(calls: Sequence[KernelCall], number: int, where: str) -> KernelCall:
    if number >= len(calls):
        raise container.damaged(f"a launch of kernel {number}, of {len(calls)}", where)
    return calls[number]
