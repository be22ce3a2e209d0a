"""dure against the CPU's other LLM engines: one run, interleaved bursts, medians, fresh prompts.

    python benchmarks/llm_cpu.py run --models smollm2.gguf --peers-python PEERS/bin/python
    python benchmarks/llm_cpu.py table benchmarks/results/*.json
    python benchmarks/llm_cpu.py chart benchmarks/results/FILE.json chart.svg

``benchmarks/README.md`` says how the peers' environments are made and what every number means.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.engines import Interpreters, resolve_model
from peers.machine import describe, kind
from peers.measure import Settings, measure_model
from peers.report import chart, table

RESULTS = Path(__file__).resolve().parent / "results"
BENCHMARKED = ["dure", "llama.cpp", "llama.cpp-q4_0", "openvino", "onnxruntime"]


def run(arguments: argparse.Namespace) -> None:
    """Measure and write the JSON file, after every model, so that a cut run keeps what it has."""
    settings = Settings(
        engines=arguments.engines,
        rounds=arguments.rounds,
        threads=arguments.threads,
        generated=arguments.generated,
        context=arguments.context,
        realtime=arguments.realtime,
        cache=Path(arguments.cache),
        interpreters=Interpreters(arguments.peers_python, arguments.reference_python),
        starts=arguments.starts,
    )
    machine = describe()
    path = arguments.out or RESULTS / f"llm_cpu-{kind(machine)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "load_average_at_start": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "settings": {
            "rounds": settings.rounds,
            "threads": settings.threads,
            "generated": settings.generated,
            "context": settings.context,
            "realtime": settings.realtime,
            "prompts": "random token ids, never repeated",
        },
        "models": {},
    }
    for name in arguments.models:
        model = resolve_model(name)
        document["models"][model.stem] = measure_model(model, settings)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document))
    print(f"written: {path}", file=sys.stderr)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="measure and write a JSON file")
    measure.add_argument("--models", nargs="+", default=["smollm2", "gemma3-270m"])
    measure.add_argument(
        "--engines", nargs="+", default=BENCHMARKED, choices=BENCHMARKED, metavar="ENGINE"
    )
    measure.add_argument("--rounds", type=int, default=7)
    measure.add_argument("--threads", type=int, default=2)
    measure.add_argument("--generated", type=int, default=64)
    measure.add_argument("--context", type=int, default=128)
    measure.add_argument("--starts", type=int, default=3, help="processes timed to a first token")
    measure.add_argument("--realtime", action="store_true", help="run before all other processes")
    measure.add_argument("--cache", default=str(Path.home() / ".cache" / "dure-benchmarks"))
    measure.add_argument("--out", type=Path)
    Interpreters.add_options(measure)
    render = commands.add_parser("table", help="print the Markdown table of result files")
    render.add_argument("files", nargs="+", type=Path)
    draw = commands.add_parser("chart", help="draw a result file as SVG or PNG (extra `bench`)")
    draw.add_argument("file", type=Path)
    draw.add_argument("picture", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    """Run the command."""
    arguments = parse()
    if arguments.command == "run":
        run(arguments)
    elif arguments.command == "table":
        print("\n\n".join(table(json.loads(file.read_text())) for file in arguments.files))
    else:
        chart(json.loads(arguments.file.read_text()), arguments.picture)


if __name__ == "__main__":
    main()
