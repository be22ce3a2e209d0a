"""What machines have instructions for: the one table that code generation asks.

Most of a kernel is LLVM IR that means the same on every machine.  Where LLVM finds no good
instruction for plain IR, or a machine lacks one so that it would call a function, the table says
what there is: an operation, the feature that brings it (LLVM's name), and the intrinsic by the
vectors' bits.  A new machine is new rows, no new branch.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dure.runtime.host import HostFeatures


class Operation(enum.Enum):
    """What code generation asks for.

    The first four are LLVM's own operations on floats, which are one instruction or not; the
    others, by an intrinsic, are a scaling of floats, and sums of products of bytes and of bfloat16
    numbers, and what they need.
    """

    #: ``a * b + c`` rounded once.
    FUSED = enum.auto()
    #: To an integer: nearest, down and up.
    ROUNDING = enum.auto()
    #: float16 from and to float32.
    HALF = enum.auto()
    #: float32 to bfloat16, but for subnormal numbers.
    BFLOAT16 = enum.auto()
    #: Which float32 numbers are of some classes, such as the subnormal ones.
    CLASSES = enum.auto()
    #: ``a * 2**b`` of float32, rounded once.
    SCALE_BY_POWER = enum.auto()
    #: Four products of unsigned and signed bytes, added to 32 bits.
    FOUR_BYTES = enum.auto()
    #: Four products of signed bytes, added to 32 bits.
    FOUR_SIGNED_BYTES = enum.auto()
    #: Two products of unsigned and signed bytes, added in 16 bits.
    PAIRS_OF_BYTES = enum.auto()
    #: Two products of 16-bit numbers, added in 32 bits.
    PAIRS_OF_SHORTS = enum.auto()
    #: The same, and what they are added to.
    ADDED_PAIRS_OF_SHORTS = enum.auto()
    #: The upper 17 bits of products of 16-bit numbers, rounded to 16.
    ROUNDED_PRODUCTS = enum.auto()
    #: Neighbours of 16 bits, added in 32.
    NEIGHBOURING_SHORTS = enum.auto()
    #: Neighbours of 32 bits of two vectors, added.
    NEIGHBOURING_WORDS = enum.auto()
    #: Products of signed bytes of two tile registers, added to 32 bits in a third, and of bfloat16
    #: numbers, to float32; what says how large tiles are, and ends their use; and what clears
    #: one, loads it, loads it from lines that no cache keeps for it, and stores it.
    TILES_OF_SIGNED_BYTES = enum.auto()
    TILES_OF_BFLOAT16 = enum.auto()
    TILE_SIZES = enum.auto()
    TILE_RELEASE = enum.auto()
    TILE_ZERO = enum.auto()
    TILE_LOAD = enum.auto()
    TILE_LOAD_ONCE = enum.auto()
    TILE_STORE = enum.auto()
    #: What floats do beyond their results, from and to memory.
    FLOATS_STORE = enum.auto()
    FLOATS_LOAD = enum.auto()


@dataclass(frozen=True)
class Row:
    """``operation`` is there with ``feature``: on vectors of ``bits`` by an ``intrinsic`` where it
    needs one; 0 bits are any.
    """

    operation: Operation
    feature: str
    bits: int = 0
    intrinsic: str = ""


TABLE = (
    Row(Operation.FUSED, "fma"),
    Row(Operation.FUSED, "neon"),
    Row(Operation.ROUNDING, "sse4.1"),
    Row(Operation.ROUNDING, "neon"),
    Row(Operation.HALF, "f16c"),
    Row(Operation.HALF, "neon"),
    Row(Operation.BFLOAT16, "avx512bf16", 512),
    Row(Operation.CLASSES, "avx512dq", 512, "llvm.x86.avx512.fpclass.ps.512"),
    Row(Operation.SCALE_BY_POWER, "avx512f", 512, "llvm.x86.avx512.mask.scalef.ps.512"),
    Row(Operation.FOUR_BYTES, "avxvnni", 256, "llvm.x86.avx512.vpdpbusd.256"),
    Row(Operation.FOUR_BYTES, "avx512vnni", 512, "llvm.x86.avx512.vpdpbusd.512"),
    Row(Operation.FOUR_SIGNED_BYTES, "dotprod", 128, "llvm.aarch64.neon.sdot.v4i32.v16i8"),
    Row(Operation.PAIRS_OF_BYTES, "ssse3", 128, "llvm.x86.ssse3.pmadd.ub.sw.128"),
    Row(Operation.PAIRS_OF_BYTES, "avx2", 256, "llvm.x86.avx2.pmadd.ub.sw"),
    Row(Operation.PAIRS_OF_BYTES, "avx512bw", 512, "llvm.x86.avx512.pmaddubs.w.512"),
    Row(Operation.PAIRS_OF_SHORTS, "sse2", 128, "llvm.x86.sse2.pmadd.wd"),
    Row(Operation.PAIRS_OF_SHORTS, "avx2", 256, "llvm.x86.avx2.pmadd.wd"),
    Row(Operation.PAIRS_OF_SHORTS, "avx512bw", 512, "llvm.x86.avx512.pmaddw.d.512"),
    Row(Operation.ADDED_PAIRS_OF_SHORTS, "avxvnni", 256, "llvm.x86.avx512.vpdpwssd.256"),
    Row(Operation.ADDED_PAIRS_OF_SHORTS, "avx512vnni", 512, "llvm.x86.avx512.vpdpwssd.512"),
    Row(Operation.ROUNDED_PRODUCTS, "ssse3", 128, "llvm.x86.ssse3.pmul.hr.sw.128"),
    Row(Operation.ROUNDED_PRODUCTS, "avx2", 256, "llvm.x86.avx2.pmul.hr.sw"),
    Row(Operation.ROUNDED_PRODUCTS, "avx512bw", 512, "llvm.x86.avx512.pmul.hr.sw.512"),
    Row(Operation.ROUNDED_PRODUCTS, "neon", 128, "llvm.aarch64.neon.sqrdmulh.v8i16"),
    Row(Operation.NEIGHBOURING_SHORTS, "neon", 128, "llvm.aarch64.neon.saddlp.v4i32.v8i16"),
    Row(Operation.NEIGHBOURING_WORDS, "neon", 128, "llvm.aarch64.neon.addp.v4i32"),
    Row(Operation.TILES_OF_SIGNED_BYTES, "amx-int8", 512, "llvm.x86.tdpbssd"),
    Row(Operation.TILES_OF_BFLOAT16, "amx-bf16", 512, "llvm.x86.tdpbf16ps"),
    Row(Operation.TILE_SIZES, "amx-tile", 512, "llvm.x86.ldtilecfg"),
    Row(Operation.TILE_RELEASE, "amx-tile", 512, "llvm.x86.tilerelease"),
    Row(Operation.TILE_ZERO, "amx-tile", 512, "llvm.x86.tilezero"),
    Row(Operation.TILE_LOAD, "amx-tile", 512, "llvm.x86.tileloadd64"),
    Row(Operation.TILE_LOAD_ONCE, "amx-tile", 512, "llvm.x86.tileloaddt164"),
    Row(Operation.TILE_STORE, "amx-tile", 512, "llvm.x86.tilestored64"),
    Row(Operation.FLOATS_STORE, "sse2", 0, "llvm.x86.sse.stmxcsr"),
    Row(Operation.FLOATS_LOAD, "sse2", 0, "llvm.x86.sse.ldmxcsr"),
)


def has(host: HostFeatures, operation: Operation) -> bool:
    """Whether the host does this on its whole vectors in one instruction."""
    return _find(host, operation) is not None


def intrinsic(host: HostFeatures, operation: Operation) -> str:
    """LLVM's function that does it on vectors of ``host.vector_bits``, which :func:`has` grants."""
    row = _find(host, operation)
    assert row is not None and row.intrinsic, f"level {host.level} has no {operation.name}"
    return row.intrinsic


def _find(host: HostFeatures, operation: Operation) -> Row | None:
    fitting = (r for r in TABLE if r.operation is operation and r.bits in (0, host.vector_bits))
    return next((row for row in fitting if host.has(row.feature)), None)
