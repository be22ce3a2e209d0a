"""The machine level: when, on which engine, at which address.  Importing this package declares its
ops.

A machine program is one :class:`~dure.ir.core.Function` of level ``machine``.  It is SPMD: the
function is what one core does, its ``program_ids`` are the core's coordinates and ``grid`` their
extents.  The body is written once, in an order in which it could run; each op names the ``queue``
that executes it, and **a queue executes the body's projection on its own ops, in order, with the
loops kept**.  Control (``for``, ``if``) is uniform: every queue follows it by itself.  Between
queues nothing is ordered but by semaphores.

    buffer      scratchpad storage of a tile: memory, offset, ``stages`` slots ``pitch`` apart
    rotate      turn buffers to their next slot: from here on, in text order, ops use that slot
    semaphore   a counter with an initial value and a maximum
    wait        block the queue until the counter is at least ``count``, then subtract it
    signal      add ``count`` when all that the queue has issued before has completed
    dma_load    tensor -> buffer; starts when issued, may touch its bytes until it completes
    dma_store   buffer -> tensor
    compute     one instruction: tile ops on buffers, in the engines' own arithmetic
    phase       a program of its own, begun when those before it are complete on all cores

The slot of an op is the number of ``rotate`` ops on its buffer executed before it in text order,
modulo ``stages``; its address is ``offset + slot * pitch``.  A compute queue executes one op after
another.  A DMA queue issues in order, has several transfers in flight, and completes in order; a
``signal`` after a DMA fires when that DMA completes.  A semaphore has one queue that signals it and
one that waits on it, so that which signal a wait consumes does not depend on timing.  A program of
several kernels is a sequence of phases (:mod:`dure.ir.machine.phase`), in loops or not.
"""

from dure.ir.machine import compute, phase, storage, transfer

__all__ = ["compute", "phase", "storage", "transfer"]
