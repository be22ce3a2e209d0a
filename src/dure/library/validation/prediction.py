"""The predicted time of a measured operator: by the algorithm that ran, and by dure's program."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from dure.compiler.chip.pipeline import Options
from dure.ir.core import Op, Region, Value
from dure.library.build import Built, build, index_values, total_ps
from dure.library.operators import operator
from dure.library.operators_measured import MEASURED
from dure.library.toolchain import compiled_by, compiles, program_ps
from dure.library.validation.measurements import Measurement
from dure.machine.chip import Chip
from dure.sim.timing import simulate


@dataclass(frozen=True)
class Prediction:
    """Nanoseconds, of what algorithm, and the hashes of the programs."""

    ns: float
    algorithm: str
    programs: tuple[str, ...]


def predict(row: Measurement, chip: Chip, algorithm: str) -> Prediction:
    """The time of a measured operator on a chip.

    ``as-measured`` is the algorithm that ran, where it is known to be other than dure's own.
    Raises :class:`~dure.errors.DureError` for an operator that the chip can't run.
    """
    if row.settings:
        # A chip is changed by pydantic's tables, which take a while to import.
        from dure.machine.chip_loader import with_overrides

        chip = with_overrides(chip, row.settings)
    if algorithm == "as-measured":
        if row.kernel:
            return _predicted(_pinned(row, chip), row, chip, row.kernel)
        if chip.toolchain is not None:
            dims = operator(row.op, row.dims, row.dtype).dims
            if compiles(row.op, row.dtype, chip) and not row.near:
                parts = compiled_by(row.op, dims, chip)
                return Prediction(program_ps(parts) / 1000, _kernels(parts), _hashes(parts))
            if row.op in MEASURED:
                parts = _built(row.op, row, chip, "as-measured")
                return Prediction(program_ps(parts) / 1000, _kernels(parts), _hashes(parts))
    return _predicted(_built(row.op, row, chip), row, chip, "dure")


def _built(op: str, row: Measurement, chip: Chip, algorithm: str = "dure") -> tuple[Built, ...]:
    calls = operator(op, row.dims, row.dtype, algorithm).calls
    return tuple(build(call, chip) for call in calls)


def _pinned(row: Measurement, chip: Chip) -> tuple[Built, ...]:
    """The kernel that ran, with as many slots a tile as the vendor's compiler gives it."""
    calls = operator(row.kernel, row.dims, row.dtype).calls
    slots = chip.toolchain.slots if chip.toolchain is not None else None
    options = None if slots is None else Options(stages=int(slots.base))
    return tuple(build(call, chip, options=options) for call in calls)


def _predicted(
    parts: tuple[Built, ...], row: Measurement, chip: Chip, algorithm: str
) -> Prediction:
    ps = total_ps(parts)
    if row.near:
        ps = sum(_near_ps(part, row.near, chip) for part in parts)
    return Prediction(ps / 1000, algorithm, _hashes(parts))


def _kernels(parts: tuple[Built, ...]) -> str:
    return ", ".join(dict.fromkeys(part.call.kernel.__name__ for part in parts))


def _hashes(parts: tuple[Built, ...]) -> tuple[str, ...]:
    return tuple(part.compiled.sha256 for part in parts)


def _near_ps(part: Built, names: Collection[str], chip: Chip) -> int:
    """The time of a program some of whose tensors lie in the memory that caches the far one."""
    function = part.compiled.function
    near = {p.value for p in function.params if p.value.name in names}
    moved = replace(function, body=_from_cache(function.body, near))
    return simulate(moved, chip, indices=index_values(part.call, function)).ps


def _from_cache(region: Region, near: Collection[Value]) -> Region:
    """A body whose transfers of some tensors take nothing of the far memory's bandwidth."""
    return replace(region, ops=tuple(_op_from_cache(op, near) for op in region.ops))


def _op_from_cache(op: Op, near: Collection[Value]) -> Op:
    if op.regions:
        op = replace(op, regions=tuple(_from_cache(region, near) for region in op.regions))
    if op.name in ("dma_load", "dma_store") and op.operands[0] in near:
        return replace(op, attrs={**op.attrs, "share": (0, 1)})
    return op
