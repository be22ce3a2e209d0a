"""Result files of CUDA GPUs as Markdown tables: single operators, and whole steps of an LLM."""

from __future__ import annotations

from typing import Any

from report import markdown


def operators(document: dict[str, Any]) -> str:
    """The GPU, then a row an operator."""
    columns = ("operator", "sizes", "type", "us", "TFLOP/s", "GB/s")
    rows = (
        [
            *(row["op"], row["dims"], row["dtype"], f"{row['ns'] / 1e3:,.1f}"),
            f"{row['tflops']:,.0f}" if "tflops" in row else "",
            f"{row['gb_s']:,.0f}" if "gb_s" in row else "",
        ]
        for row in document["rows"]
    )
    return f"{_device(document)}.\n\n{markdown.table(columns, rows, words=3)}"


def steps(document: dict[str, Any]) -> str:
    """The GPU and the model, then a row a step."""
    columns = ("step", "kernels", "attention", "sequences", "positions", "ms", "launches")
    rows = (
        [
            *(row["phase"], row["how"], row["attention"].lower().replace("_", " ")),
            *(f"{row['batch']}", f"{row['context']:,}", f"{row['ms']:.2f}"),
            f"{row['launches']:,}" if "launches" in row else "",
        ]
        for row in document["rows"]
    )
    head = f"{_device(document)}; {document['model']}."
    return f"{head}\n\n{markdown.table(columns, rows, words=3)}"


def _device(document: dict[str, Any]) -> str:
    return f"{document['device']}; torch {document['torch']}, CUDA {document['cuda']}"
