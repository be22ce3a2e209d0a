"""The kernels that every chip must compile, verify, compute rightly and be timed on.

:data:`CASES` is the table.  A case has small sizes, odd and tiny ones among them, for its values,
and one full size for its time; its ``item`` is the row that it stands for where results are
summed up.
"""

from __future__ import annotations

from dure.library.suite import attentions, matmuls, memory, rows
from dure.library.suite.case import ABSOLUTE, TOLERANCES, Argument, Case, Drawn

__all__ = ["ABSOLUTE", "CASES", "ITEMS", "TOLERANCES", "Argument", "Case", "Drawn", "case"]

#: Every case.
CASES: tuple[Case, ...] = tuple(
    case for module in (matmuls, rows, memory, attentions) for case in module.cases()
)
#: The kinds of kernels, in the table's order.
ITEMS: tuple[str, ...] = tuple(dict.fromkeys(case.item for case in CASES))

_BY_NAME = {case.name: case for case in CASES}


def case(name: str) -> Case:
    """The case of this name; KeyError for an unknown one."""
    return _BY_NAME[name]
