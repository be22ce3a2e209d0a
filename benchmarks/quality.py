r"""How far an engine's numbers are from ``transformers`` running the same weights dequantized.

Reads a text, cuts its first tokens into windows that each start afresh (BOS in front where the
file's ``tokenizer.ggml.add_bos_token`` says so), and compares the logits after every token: how
often the most probable token is the same, the mean Kullback-Leibler divergence KL(reference ||
engine) in nats, and both perplexities (every text token but a window's first is scored).

    python benchmarks/quality.py [MODEL ...] [--engines dure llama.cpp] [--json FILE] \
        --reference-python REF/bin/python --peers-python PEERS/bin/python

An engine or a reference that isn't installed is reported as absent.  ``--smallest`` takes a few
tokens of the first model, to see that it runs.  The exit status is 1 where one fails.
The reference's logits are computed once and kept in ``--cache``, ``FILE-WINDOW.npz``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dure.frontends.gguf.file import open_gguf

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.client import Peer, PeerError
from peers.engines import ENGINES, Interpreters, resolve_model
from peers.results import stamp, write
from report.quality import table

PROSE = Path(__file__).resolve().parent / "data" / "prose.txt"
MODELS = ["smollm2", "gemma3-270m"]
CHUNK = 64
"""Rows compared at once: 64 rows of a vocabulary of 262,144 in float64 are 134 MB."""


@dataclass(frozen=True)
class Reference:
    """What the reference said: one row a text token, the BOS rows left out.

    ``ids`` int32 ``[windows, n]``; ``log_probabilities`` float16 ``[windows * n, vocabulary]``,
    within 5e-4 of their size; ``top`` int32 and ``losses`` float32, both from the float32 logits,
    one a row (a window's last row has no next token: its loss is NaN).
    """

    ids: np.ndarray
    bos: int
    log_probabilities: np.ndarray
    top: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Quality:
    """The comparison of one engine with the reference; divergence in nats a token."""

    engine: str
    model: str
    windows: int
    window: int
    tokens: int
    top1_agreement: float
    mean_kl: float
    max_kl: float
    reference_perplexity: float
    perplexity: float
    perplexity_ratio: float


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities along the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def next_losses(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each next token, NaN on the last row."""
    losses = np.full(len(ids), np.nan)
    for start in range(0, len(ids) - 1, CHUNK):
        stop = min(start + CHUNK, len(ids) - 1)
        rows = log_softmax(logits[start:stop])
        losses[start:stop] = -rows[np.arange(stop - start), ids[start + 1 : stop + 1]]
    return losses


def perplexity(losses: np.ndarray) -> float:
    """exp of the mean loss over the scored tokens."""
    return float(np.exp(np.nanmean(losses.astype(np.float64))))


def window_logits(worker: Peer, ids: np.ndarray, bos: int) -> np.ndarray:
    """The engine's logits ``[len(ids), vocabulary]`` after each text token of one window."""
    head = [bos] if bos >= 0 else []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "logits.npy")
        worker.ask("logits", ids=head + [int(token) for token in ids], path=path)
        return np.load(path)[len(head) :]


def bos_of(model: Path) -> int:
    """The id to put in front of every window, or -1 for none."""
    with open_gguf(model) as file:
        if not file.metadata.get_bool("tokenizer.ggml.add_bos_token", False):
            return -1
        return file.metadata.require_int("tokenizer.ggml.bos_token_id")


def fingerprint(model: Path, text: str, tokens: int, window: int) -> str:
    """What the reference depends on, so that a stale one is recomputed."""
    digest = hashlib.sha256(f"{tokens} {window} {text}".encode())
    with model.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def compute_reference(model: Path, text: str, arguments: argparse.Namespace) -> Reference:
    """Run the reference over the text; minutes for a small model."""
    window, count = arguments.window, arguments.tokens // arguments.window
    bos = bos_of(model)
    with start_worker("transformers", model, arguments) as worker:
        tokens = worker.ask("tokenize", text=text)["ids"]
        if len(tokens) < window * count:
            raise PeerError(f"the text has {len(tokens)} tokens, {window * count} are wanted")
        ids = np.array(tokens[: window * count], np.int32).reshape(count, window)
        rows: list[np.ndarray] = []
        top: list[np.ndarray] = []
        losses: list[np.ndarray] = []
        for index, line in enumerate(ids):
            print(f"reference: window {index + 1} of {count}", file=sys.stderr)
            logits = window_logits(worker, line, bos)
            top.append(logits.argmax(-1).astype(np.int32))
            losses.append(next_losses(logits, line).astype(np.float32))
            kept = np.empty(logits.shape, np.float16)
            for start in range(0, window, CHUNK):
                kept[start : start + CHUNK] = log_softmax(logits[start : start + CHUNK])
            rows.append(kept)
    return Reference(ids, bos, np.concatenate(rows), np.concatenate(top), np.concatenate(losses))


def load_reference(model: Path, text: str, arguments: argparse.Namespace) -> Reference:
    """The reference from the cache, computed first where it is missing or stale."""
    folder = Path(arguments.cache)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{model.stem}-{arguments.window}.npz"
    key = fingerprint(model, text, arguments.tokens, arguments.window)
    if path.exists():
        with np.load(path) as stored:
            if str(stored["key"]) == key:
                fields = ("ids", "log_probabilities", "top", "losses")
                values = {name: stored[name] for name in fields}
                return Reference(bos=int(stored["bos"]), **values)
    reference = compute_reference(model, text, arguments)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, key=np.array(key), **asdict(reference))
    partial.replace(path)
    return reference


def compare(worker: Peer, model: Path, reference: Reference, engine: str) -> Quality:
    """Run the engine over the reference's windows and measure the difference."""
    windows, window = reference.ids.shape
    agreed = 0
    divergences: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    for index, ids in enumerate(reference.ids):
        logits = window_logits(worker, ids, reference.bos)
        if not np.isfinite(logits).all():
            raise PeerError(f"logits of window {index + 1} are not all finite")
        first = index * window
        agreed += int((logits.argmax(-1) == reference.top[first : first + window]).sum())
        losses.append(next_losses(logits, ids))
        for start in range(0, window, CHUNK):
            stop = min(start + CHUNK, window)
            ours = log_softmax(logits[start:stop])
            rows = reference.log_probabilities[first + start : first + stop]
            theirs = log_softmax(rows)
            divergences.append((np.exp(theirs) * (theirs - ours)).sum(-1))
    kl = np.concatenate(divergences)
    ours_all = perplexity(np.concatenate(losses))
    reference_all = perplexity(reference.losses)
    return Quality(
        engine=engine,
        model=model.stem,
        windows=windows,
        window=window,
        tokens=windows * window,
        top1_agreement=agreed / (windows * window),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        reference_perplexity=reference_all,
        perplexity=ours_all,
        perplexity_ratio=ours_all / reference_all,
    )


def start_worker(name: str, model: Path, arguments: argparse.Namespace) -> Peer:
    """A loaded worker for the engine of that name."""
    interpreters = Interpreters(arguments.peers_python, arguments.reference_python)
    worker = Peer(name, ENGINES[name].module, interpreters.of(name))
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0, 1]
    try:
        worker.ask(
            "load",
            model=str(model),
            threads=arguments.threads,
            sequences=1,
            context=arguments.window + 8,
            processors=processors[: arguments.threads],
            realtime=False,
        )
    except PeerError:
        worker.close()
        raise
    return worker


def measure(name: str, text: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A model's row for each engine; one that fails says why, alone where it is the reference."""
    model = resolve_model(name)
    try:
        reference = load_reference(model, text, arguments)
    except PeerError as error:
        return [failure(model, "transformers", error)]
    rows: list[dict[str, Any]] = []
    for engine in arguments.engines:
        try:
            with start_worker(engine, model, arguments) as worker:
                rows.append(asdict(compare(worker, model, reference, engine)))
        except PeerError as error:
            rows.append(failure(model, engine, error))
    return rows


def failure(model: Path, engine: str, error: PeerError) -> dict[str, Any]:
    """The row of an engine that said nothing."""
    print(f"{engine}: {error}", file=sys.stderr)
    return {"model": model.stem, "engine": engine, "absent": error.absent, "error": str(error)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", help="GGUF files, or names of dure's catalogue")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["dure", "llama.cpp"],
        choices=["dure", "llama.cpp", "transformers"],
        metavar="ENGINE",
    )
    parser.add_argument("--text", type=Path, default=PROSE)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", default=str(Path.home() / ".cache" / "dure-benchmarks"))
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--smallest", action="store_true", help="a few tokens of the first model")
    Interpreters.add_options(parser)
    arguments = parser.parse_args(argv)
    arguments.models = arguments.models or MODELS
    if arguments.smallest:
        arguments.models, arguments.tokens, arguments.window = arguments.models[:1], 64, 32
    return arguments


def main() -> int:
    """Compare, write the result after every model, print a table; the exit status."""
    arguments = parse()
    text = arguments.text.read_text(encoding="utf-8")
    document = stamp()
    rows: list[dict[str, Any]] = []
    document["rows"] = rows
    for name in arguments.models:
        rows += measure(name, text, arguments)
        write(arguments.json, document)
    print(table(document))
    return 1 if any("error" in row and not row["absent"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
