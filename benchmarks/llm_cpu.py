"""dure against the CPU's other LLM engines: one run, interleaved bursts, medians, fresh prompts.

    python benchmarks/llm_cpu.py run --models smollm2.gguf --peers-python PEERS/bin/python
    python benchmarks/llm_cpu.py run --models smollm2 --context 4096 --only decode --starts 0
    python benchmarks/llm_cpu.py run --smallest
    python benchmarks/llm_cpu.py table benchmarks/results/llm_cpu-*.json
    python benchmarks/llm_cpu.py chart benchmarks/results/FILE.json chart.svg

``--smallest`` runs a few tokens of the first model on every engine, to see that all run; it ends
with 1 where dure fails.  ``benchmarks/README.md`` says how the peers' environments are made and
what every number means.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.engines import Interpreters, resolve_model
from peers.measure import Settings, measure_model
from peers.results import place, stamp, write
from report.llm_cpu import chart, table

#: Tokens of a prompt before decoding; a result of others has a file of its own.
CONTEXT = 128
BENCHMARKED = ["dure", "llama.cpp", "llama.cpp-q4_0", "openvino", "onnxruntime"]


def run(arguments: argparse.Namespace) -> bool:
    """Measure, write the JSON file after every model, print the table; whether all of dure ran."""
    smallest: bool = arguments.smallest
    settings = Settings(
        engines=arguments.engines,
        rounds=1 if smallest else arguments.rounds,
        threads=arguments.threads,
        generated=8 if smallest else arguments.generated,
        context=16 if smallest else arguments.context,
        realtime=arguments.realtime,
        cache=Path(arguments.cache),
        interpreters=Interpreters(arguments.peers_python, arguments.reference_python),
        starts=1 if smallest else arguments.starts,
        bandwidth=not smallest,
        only=tuple(arguments.only),
    )
    document = stamp()
    path = place("llm_cpu", document, arguments.out, smallest)
    if path is not None and arguments.out is None and arguments.context != CONTEXT:
        path = path.with_stem(f"{path.stem}-context-{arguments.context}")
    document["settings"] = {
        "rounds": settings.rounds,
        "threads": settings.threads,
        "generated": settings.generated,
        "context": settings.context,
        "realtime": settings.realtime,
        "smallest": smallest,
        "prompts": "random token ids, never repeated",
    }
    models: dict[str, Any] = {}
    document["models"] = models
    for name in arguments.models[:1] if smallest else arguments.models:
        model = resolve_model(name)
        models[model.stem] = measure_model(model, settings)
        write(path, document)
    print(table(document))
    if path is not None:
        print(f"written: {path}", file=sys.stderr)
    ours = [data["engines"].get("dure", {}) for data in models.values()]
    return not any("error" in result or result.get("errors") for result in ours)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="measure and write a JSON file")
    measure.add_argument("--models", nargs="+", default=["smollm2", "gemma3-270m"])
    measure.add_argument(
        "--engines", nargs="+", default=BENCHMARKED, choices=BENCHMARKED, metavar="ENGINE"
    )
    measure.add_argument("--rounds", type=int, default=7)
    measure.add_argument("--threads", type=int, default=2)
    measure.add_argument("--generated", type=int, default=64)
    measure.add_argument("--context", type=int, default=CONTEXT)
    measure.add_argument("--starts", type=int, default=3, help="processes timed to a first token")
    measure.add_argument("--only", nargs="+", default=[], metavar="MEASURE", help="such as decode")
    measure.add_argument("--smallest", action="store_true", help="a few tokens of one model")
    measure.add_argument("--realtime", action="store_true", help="run before all other processes")
    measure.add_argument("--cache", default=str(Path.home() / ".cache" / "dure-benchmarks"))
    measure.add_argument("--out", type=Path)
    Interpreters.add_options(measure)
    render = commands.add_parser("table", help="print the Markdown table of result files")
    render.add_argument("files", nargs="+", type=Path)
    draw = commands.add_parser("chart", help="draw a result file as SVG")
    draw.add_argument("file", type=Path)
    draw.add_argument("picture", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    """Run the command."""
    arguments = parse()
    if arguments.command == "run":
        sys.exit(0 if run(arguments) else 1)
    if arguments.command == "table":
        print("\n\n".join(table(json.loads(file.read_text("utf-8"))) for file in arguments.files))
    else:
        drawn = chart(json.loads(arguments.file.read_text("utf-8")))
        arguments.picture.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
