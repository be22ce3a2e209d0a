"""How fast the workers of a pool read memory: the yardstick of every decode benchmark.

The reading step is generated for the host's widest vectors, unrolled, over huge pages, each worker
over a contiguous part of its own: the same threads, pages and access pattern as a step that
streams weights. On virtual machines the result changes by the minute with what other machines do
on the same host, so that it is measured in the same run as what it is compared with.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass

from dure.errors import UsageError
from dure.runtime import cache, host, llvm
from dure.runtime.memory import Buffer
from dure.runtime.pool import Pool, shared_pool

UNROLL = 16
"""Vectors in flight in each round of the loop.  Software prefetch makes it slower (Zen 4)."""

_LINE = 64
_SINK_OFFSET = 64


@dataclass(frozen=True)
class Bandwidth:
    """A measured read bandwidth, in 10^9 bytes a second: ``median`` and ``best`` of the bursts."""

    nbytes: int
    workers: int
    median: float
    best: float
    bursts: int


class BandwidthProbe:
    """A buffer that a pool reads, so that bursts can alternate with what is being measured."""

    def __init__(self, nbytes: int, pool: Pool | None = None) -> None:
        """``nbytes`` is rounded up to a whole number of rounds for each worker.

        Raises :class:`~dure.errors.UsageError` unless positive, and
        :class:`~dure.errors.TargetError` when there is not that much memory.
        """
        if nbytes < 1:
            raise UsageError(
                f"a buffer of {nbytes} bytes has no bandwidth", rule="at least one byte is read"
            )
        self.pool = shared_pool() if pool is None else pool
        features = host.host_features()
        round_bytes = UNROLL * features.vector_bits // 8
        workers = self.pool.workers
        part = -(-nbytes // (workers * round_bytes)) * round_bytes
        self.nbytes = part * workers
        self._module = _reading_module(features)
        self._step = self._module.address("dure_read")
        self._buffer = Buffer(self.nbytes)
        # Pages that were never written are all the same page of zeros, which stays in the cache.
        self._buffer.array[:] = 1
        self._context = Buffer(_SINK_OFFSET + _LINE * workers)
        self._words = self._context.view(3, "int64")
        self._words[:] = self._buffer.address, part, 1

    def burst(self, passes: int = 1) -> float:
        """Read the buffer ``passes`` times in one step; returns 10^9 bytes a second."""
        self._words[2] = passes
        started = time.perf_counter()
        self.pool.run(self._step, self._context.address)
        elapsed = time.perf_counter() - started
        return passes * self.nbytes / elapsed / 1e9


def read_bandwidth(
    nbytes: int = 1 << 30, workers: int | None = None, *, bursts: int = 9
) -> Bandwidth:
    """Median over ``bursts`` of reading ``nbytes`` with ``workers`` workers of the shared pool.

    A buffer that fits in a cache gives the cache's bandwidth.  A burst reads at least 64 MB.
    """
    probe = BandwidthProbe(nbytes, shared_pool(workers))
    passes = max(1, -(-64_000_000 // probe.nbytes))
    probe.burst(passes)
    samples = [probe.burst(passes) for _ in range(max(1, bursts))]
    return Bandwidth(
        probe.nbytes, probe.pool.workers, statistics.median(samples), max(samples), len(samples)
    )


@functools.cache
def _reading_module(features: host.HostFeatures) -> llvm.LoadedModule:
    return llvm.load_object(cache.compile_cached(_reading_ir(features), features, llvm.OptLevel.O2))


def _reading_ir(features: host.HostFeatures) -> str:
    """The context: i64 address, bytes a worker, passes; from byte 64 on a result line a worker.

    What was read is combined and stored, so that no load can be left out.
    """
    lanes = features.vector_bits // 32
    vector, size = f"<{lanes} x i32>", features.vector_bits // 8
    accumulators = "\n".join(
        f"  %s{i} = phi {vector} [zeroinitializer, %again], [%x{i}, %read]" for i in range(UNROLL)
    )
    reads = "\n".join(
        f"  %p{i} = getelementptr i8, ptr %here, i64 {i * size}\n"
        f"  %v{i} = load {vector}, ptr %p{i}, align {size}\n"
        f"  %x{i} = xor {vector} %s{i}, %v{i}"
        for i in range(UNROLL)
    )
    sums = "\n".join(
        f"  %t{i} = xor {vector} {f'%t{i - 1}' if i > 1 else '%x0'}, %x{i}"
        for i in range(1, UNROLL)
    )
    return f"""
define void @dure_read(ptr %context, i64 %worker, i64 %workers) #0 {{
entry:
  %part_at = getelementptr i64, ptr %context, i64 1
  %passes_at = getelementptr i64, ptr %context, i64 2
  %base = load ptr, ptr %context
  %part = load i64, ptr %part_at
  %passes = load i64, ptr %passes_at
  %first = mul i64 %worker, %part
  %start = getelementptr i8, ptr %base, i64 %first
  %line = mul i64 %worker, {_LINE}
  %sinks = getelementptr i8, ptr %context, i64 {_SINK_OFFSET}
  %sink = getelementptr i8, ptr %sinks, i64 %line
  br label %again
again:
  %pass = phi i64 [0, %entry], [%pass1, %read_all]
  br label %read
read:
  %offset = phi i64 [0, %again], [%offset1, %read]
{accumulators}
  %here = getelementptr i8, ptr %start, i64 %offset
{reads}
  %offset1 = add i64 %offset, {UNROLL * size}
  %more = icmp ult i64 %offset1, %part
  br i1 %more, label %read, label %read_all
read_all:
{sums}
  store {vector} %t{UNROLL - 1}, ptr %sink, align {size}
  %pass1 = add i64 %pass, 1
  %once_more = icmp ult i64 %pass1, %passes
  br i1 %once_more, label %again, label %done
done:
  ret void
}}

attributes #0 = {{ {features.function_attributes} }}
"""
