"""``docs/performance.md`` and its pictures: the words of a template around what result files hold.

The template is ``performance.md`` beside this file. A line ``{{ NAME }}`` of it becomes everything
that was measured by the script of that name. The same files make the same bytes everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from report import chips, cuda, instructions, kernels_cpu, llm_cpu, markdown, models, quality

Document: TypeAlias = dict[str, Any]

_TEMPLATE = Path(__file__).with_name("performance.md")
_DATA = Path(__file__).resolve().parent.parent / "data"
_PICTURES = "images/performance"
"""The folder of the pictures beside the page; all of it is written."""


@dataclass(frozen=True)
class Section:
    """What a script measured: files ``NAME*.json`` of the results, or of ``folder``.

    ``command`` makes one; by default ``all.py`` does.
    """

    name: str
    table: Callable[[Document], str]
    chart: Callable[[Document], str | None] | None = None
    folder: Path | None = None
    command: str = ""

    def documents(self, results: Path) -> dict[str, Document]:
        """Its files by name without the ending, in the order of names."""
        paths = (self.folder or results).glob(f"{self.name}*.json")
        return {p.stem: json.loads(p.read_text("utf-8")) for p in sorted(paths, key=_stem)}


_SECTIONS = (
    Section("llm_cpu", llm_cpu.table, llm_cpu.chart),
    Section("kernels_cpu", kernels_cpu.table, kernels_cpu.chart),
    Section("quality", quality.table),
    Section("instructions", instructions.table, folder=_DATA),
    Section("chips", chips.table, chips.chart),
    Section("models", models.table, models.chart),
    Section(
        *("cuda_gpu", cuda.operators),
        command="python benchmarks/cuda_gpu.py --json benchmarks/results/cuda_gpu-GPU.json",
    ),
    Section(
        *("cuda_llm", cuda.steps),
        command="python benchmarks/cuda_llm.py --json benchmarks/results/cuda_llm-GPU.json",
    ),
)


@dataclass(frozen=True)
class Page:
    """The page's text, and its pictures by file name."""

    text: str
    pictures: dict[str, str]

    def files(self, page: Path) -> dict[Path, str]:
        """Everything that is written where ``page`` is the page's own file."""
        folder = page.parent / _PICTURES
        return {page: self.text, **{folder / n: text for n, text in self.pictures.items()}}

    def write(self, page: Path) -> None:
        """Write all, and remove pictures that have no result any more."""
        for path in self.differing(page):
            path.unlink(missing_ok=True)
        for path, text in self.files(page).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def differing(self, page: Path) -> list[Path]:
        """The files that writing would change, make or remove."""
        wanted = {path: text.encode() for path, text in self.files(page).items()}
        there = {path: path.read_bytes() for path in (page.parent / _PICTURES).glob("*")}
        if page.exists():
            there[page] = page.read_bytes()
        paths = wanted.keys() | there.keys()
        return sorted(path for path in paths if wanted.get(path) != there.get(path))


def page_of(results: Path) -> Page:
    """The page of a folder's result files."""
    found = {section.name: section.documents(results) for section in _SECTIONS}
    pictures: dict[str, str] = {}
    texts = {s.name: "\n\n".join(_parts(s, found[s.name], pictures)) for s in _SECTIONS}
    texts["hosts"] = _hosts([pair for files in found.values() for pair in files.items()])
    template = _TEMPLATE.read_text("utf-8")
    text = re.sub(r"^\{\{ (\w+) \}\}$", lambda name: texts[name[1]], template, flags=re.M)
    return Page(text, pictures)


def _parts(section: Section, files: dict[str, Document], pictures: dict[str, str]) -> Iterator[str]:
    """The paragraphs of a section; its pictures are put to the others."""
    for stem, document in files.items():
        yield f"### `{stem}.json`"
        yield section.table(document)
        drawn = section.chart(document) if section.chart else None
        if drawn:
            pictures[f"{stem}.svg"] = drawn
            yield f"![{stem}, as bars]({_PICTURES}/{stem}.svg)"
    if not files:
        command = section.command or f"python benchmarks/all.py run --only {section.name}"
        yield f"There is no result yet; this makes one:\n\n    {command}"


def _hosts(files: list[tuple[str, Document]]) -> str:
    """The machine of every file that has one."""
    columns = ("file", "date", "dure", "CPU", "cores", "instruction sets", "caches", "memory")
    rows = (_host(stem, document) for stem, document in files if "machine" in document)
    return markdown.table([*columns, "kernel", "Python"], rows, words=len(columns) + 2)


def _host(stem: str, document: Document) -> list[str]:
    machine = document["machine"]
    caches = ", ".join(f"{name} {size >> 10:,} KiB" for name, size in machine["caches"].items())
    return [
        *(f"{stem}.json", document.get("date", "")[:10], document.get("dure", "")),
        *(machine["cpu"], str(machine["cores"]), " ".join(machine["flags"]), caches),
        *(f"{machine['memory_bytes'] / 2**30:.0f} GiB", machine["kernel"], machine["python"]),
    ]


def _stem(path: Path) -> str:
    return path.stem
