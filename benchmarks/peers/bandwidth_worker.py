"""How fast this host's memory can be read, by dure's own probe: the yardstick of every decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peers.protocol import Unsupported, Worker, serve

if TYPE_CHECKING:
    from dure.runtime.bandwidth import BandwidthProbe

PASSES = 4
"""Passes over a buffer smaller than 1 GB in one burst, so that a burst takes milliseconds."""


class BandwidthWorker(Worker):
    """A pool of dure's pinned workers and a buffer for each size asked for."""

    def load(self, model: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        import dure
        from dure.runtime.pool import shared_pool

        self.threads = threads
        self.vocabulary = 0
        self.pool = shared_pool(threads)
        self.probes: dict[int, BandwidthProbe] = {}
        return {"dure": dure.__version__}

    def bandwidth(self, size: int) -> float:
        from dure.runtime.bandwidth import BandwidthProbe

        if size not in self.probes:
            self.probes[size] = BandwidthProbe(size, self.pool)
            self.probes[size].burst()
        return self.probes[size].burst(1 if size >= 1 << 30 else PASSES) * 1e9

    def prefill(self, tokens: int) -> float:
        raise Unsupported("this worker runs no model")

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        raise Unsupported("this worker runs no model")


if __name__ == "__main__":
    serve(BandwidthWorker())
