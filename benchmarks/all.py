"""All benchmarks as one command: runs one after another and writes the page of their results.

    python benchmarks/all.py run [--only kernels_cpu quality] [--realtime] [--out FOLDER]
    python benchmarks/all.py run --smallest
    python benchmarks/all.py page [--check] [--out FOLDER]

``run`` writes each script's JSON file to ``benchmarks/results`` and then ``docs/performance.md``
with its pictures; with ``--out`` all of it goes to that folder.  A script that fails doesn't end
the run; the exit status is then 1.  ``--smallest`` is CI's: tiny sizes that show that everything
runs and agrees, about whose speed nothing is claimed; without ``--out`` nothing of it is kept.
``page`` writes the page of the results that are there; ``--check`` only says whether it is that,
by the exit status.  The peers' environments are named by variables, see ``benchmarks/README.md``.
What needs a GPU (``cuda_gpu.py``, ``cuda_llm.py``) isn't run; its results are on the page.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peers.machine import describe, kind
from peers.results import RESULTS
from report.page import page_of

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "performance.md"


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder.

    ``arguments`` make it measure, the last of them names the file of its result; ``smallest`` are
    added for its smallest sizes.  ``timed`` is what measures this host: its file is named after the
    host's kind, and it can be run before all other processes.  ``further`` are other sizes, each
    with what ends the name of its file.
    """

    name: str
    arguments: tuple[str, ...] = ("--json",)
    smallest: tuple[str, ...] = ("--smallest",)
    timed: bool = False
    further: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def commands(self, results: Path, *, smallest: bool, realtime: bool) -> list[list[str]]:
        """The processes that measure into a folder; further sizes have no smallest ones."""
        sizes = [""] if smallest else ["", *self.further]
        how = {"smallest": smallest, "realtime": realtime}
        return [self.command(results, **how, size=size) for size in sizes]

    def command(
        self, results: Path, *, smallest: bool, realtime: bool, size: str = ""
    ) -> list[str]:
        """The process that measures into a folder, or one of the further sizes."""
        suffix = (f"-{kind(describe())}" if self.timed else "") + (f"-{size}" if size else "")
        result = [str(results / f"{self.name}{suffix}.json")] if self.arguments else []
        return [
            *(sys.executable, str(HERE / f"{self.name}.py"), *self.arguments, *result),
            *(self.further[size] if size else ()),
            *(self.smallest if smallest else ()),
            *(("--realtime",) if realtime and self.timed else ()),
        ]


#: One chip shows that the scripts run; CI has `dure kernels` and `dure matrix` for all of them.
_ONE_CHIP = ("--smallest", "--targets", "tpu-v6e")
#: Decoding after a long prompt, by the model that allows it.
_LONG = ("--models", "smollm2", "--context", "4096", "--only", "decode", "--starts", "0")
BENCHMARKS = (
    Benchmark("llm_cpu", ("run", "--out"), timed=True, further={"context-4096": _LONG}),
    Benchmark("kernels_cpu", ("run", "--out"), timed=True),
    Benchmark("quality"),
    # It holds what it counts against a budget, which only a person changes.
    Benchmark("instructions", arguments=(), smallest=()),
    Benchmark("chips", smallest=_ONE_CHIP),
    Benchmark("models", smallest=_ONE_CHIP),
)


def run(
    benchmarks: Sequence[Benchmark], results: Path, *, smallest: bool, realtime: bool
) -> list[str]:
    """Run each as a process, say how each ended, and give the names of those that failed."""
    said: list[str] = []
    failed: list[str] = []
    for number, benchmark in enumerate(benchmarks, 1):
        print(f"\n== {benchmark.name} ({number} of {len(benchmarks)})", flush=True)
        started = time.monotonic()
        commands = benchmark.commands(results, smallest=smallest, realtime=realtime)
        statuses = [subprocess.run(command, check=False).returncode for command in commands]
        status = next(filter(None, statuses), 0)
        if status:
            failed.append(benchmark.name)
        outcome = f"failed, exit status {status}" if status else "done"
        said.append(f"{benchmark.name}: {outcome}, {time.monotonic() - started:.0f} s")
    print("\n== all\n" + "\n".join(said), flush=True)
    return failed


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="run the scripts and write the page")
    names = [benchmark.name for benchmark in BENCHMARKS]
    measure.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    measure.add_argument("--smallest", action="store_true", help="tiny sizes, for correctness only")
    measure.add_argument("--realtime", action="store_true", help="run before all other processes")
    write = commands.add_parser("page", help="write the page of the results that are there")
    write.add_argument("--check", action="store_true", help="only say whether it is that page")
    for command in (measure, write):
        command.add_argument("--out", type=Path, metavar="FOLDER", help="results and page, instead")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    arguments = parse(argv)
    folder: Path | None = arguments.out
    with tempfile.TemporaryDirectory() as thrown_away:
        if arguments.command == "run" and arguments.smallest and folder is None:
            folder = Path(thrown_away)
        results, page = (folder, folder / PAGE.name) if folder else (RESULTS, PAGE)
        if arguments.command == "page" and arguments.check:
            return check(results, page)
        failed: list[str] = []
        if arguments.command == "run":
            chosen = [b for b in BENCHMARKS if b.name in arguments.only]
            how = {"smallest": arguments.smallest, "realtime": arguments.realtime}
            failed = run(chosen, results, **how)
        page_of(results).write(page)
        if folder != Path(thrown_away):
            print(f"written: {page}", file=sys.stderr)
    return 1 if failed else 0


def check(results: Path, page: Path) -> int:
    """Name what differs from the page of the results; the exit status."""
    differing = page_of(results).differing(page)
    for path in differing:
        print(f"not what the results make: {path}", file=sys.stderr)
    if differing:
        print("`python benchmarks/all.py page` writes them", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
