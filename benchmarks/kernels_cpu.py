"""dure's CPU kernels against the CPU's other libraries: one run, interleaved bursts, medians.

    python benchmarks/kernels_cpu.py run --peers-python PEERS/bin/python
    python benchmarks/kernels_cpu.py run --smallest
    python benchmarks/kernels_cpu.py table benchmarks/results/kernels_cpu-*.json

``--smallest`` runs every kernel at a tiny size, without a claim, to see that the results agree; it
ends with 1 where one of dure's doesn't.  ``benchmarks/README.md`` says how everything is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.kernels.measure import Settings, measure
from peers.results import place, stamp, write
from report.kernels_cpu import table


def run(arguments: argparse.Namespace) -> bool:
    """Measure, write the JSON file after every round, print the table; whether dure's agree."""
    settings = Settings(
        rounds=1 if arguments.smallest else arguments.rounds,
        threads=tuple(dict.fromkeys(arguments.threads)),
        seconds=0.0 if arguments.smallest else arguments.seconds,
        realtime=arguments.realtime,
        peers_python=arguments.peers_python,
        smallest=arguments.smallest,
        only=tuple(arguments.only),
    )
    document = stamp()
    path = place("kernels_cpu", document, arguments.out, settings.smallest)
    document["settings"] = {
        "rounds": settings.rounds,
        "threads": settings.threads,
        "burst_seconds": settings.seconds,
        "realtime": settings.realtime,
        "smallest": settings.smallest,
        "operands": "random numbers, made afresh for every burst",
    }
    for found in measure(settings):
        document |= found
        write(path, document)
    print(table(document))
    if path is not None:
        print(f"written: {path}", file=sys.stderr)
    return not any("dure" in row["errors"] for row in document["rows"])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure and write a JSON file")
    run.add_argument("--rounds", type=int, default=7)
    run.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    run.add_argument("--seconds", type=float, default=0.2, help="how long a burst is to take")
    run.add_argument("--only", nargs="+", default=[], metavar="WORD", help="kernels named so")
    run.add_argument("--smallest", action="store_true", help="tiny sizes, for correctness only")
    run.add_argument("--realtime", action="store_true", help="run before all other processes")
    run.add_argument("--out", type=Path)
    run.add_argument(
        "--peers-python",
        default=os.environ.get("DURE_BENCH_KERNEL_PEERS_PYTHON", sys.executable),
        help="the Python that has torch",
    )
    render = commands.add_parser("table", help="print the Markdown table of result files")
    render.add_argument("files", nargs="+", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    """Run the command."""
    arguments = parse()
    if arguments.command == "run":
        sys.exit(0 if run(arguments) else 1)
    print("\n\n".join(table(json.loads(file.read_text())) for file in arguments.files))


if __name__ == "__main__":
    main()
