"""Counts the instructions that kernels and a model's step execute, against a committed budget.

A count needs no clock and no quiet machine, so that CI sees a slow-down in the change that brings
it::

    python benchmarks/instructions.py                # count, and fail where a budget is exceeded
    python benchmarks/instructions.py --update       # make what is counted now the budget
    python benchmarks/instructions.py --only q4_0

Each case is compiled for AVX2 with caches and tile sizes of its own, linked to an executable
without Python, and run under valgrind for a few turns and for twice as many: the difference is what
the turns take.  It doesn't depend on the machine; it does on LLVM's version, which
``constraints.txt`` pins.  Needs an x86-64 with AVX2, a C compiler and valgrind, and says what is
missing where it can't count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instruction_cases import CASES, Build

from dure.errors import TargetError
from dure.runtime.host import architecture_name, features_of, host_levels
from dure.runtime.llvm import llvm_version
from dure.runtime.standalone import Executable, Toolchain, toolchain

BUDGET = Path(__file__).parent / "data" / "instructions.json"
LEVEL = "avx2"
#: Counts may grow by this part before it is a failure, and small ones by a few instructions: what
#: the driver's compiler made of its loop is among them.
TOLERANCE, FEW = 0.03, 16
TURNS = 4
VALGRIND = (
    *("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"),
)


@dataclass(frozen=True)
class Counted:
    """What a turn of a case takes, and its budget, if it has one."""

    name: str
    count: int
    budget: int | None

    @property
    def limit(self) -> int:
        """The most that passes."""
        budget = self.budget or 0
        return budget + max(FEW, int(budget * TOLERANCE))

    @property
    def exceeds(self) -> bool:
        """Whether it takes more, or nobody has said how much it may take."""
        return self.budget is None or self.count > self.limit

    @property
    def change(self) -> str:
        """How the count stands to the budget."""
        return "no budget" if not self.budget else f"{self.count / self.budget - 1:+.1%}"


def missing() -> str:
    """Why nothing can be counted here; empty where it can."""
    if architecture_name() != "x86-64" or LEVEL not in host_levels():
        return f"instructions are counted for {LEVEL}, which this machine lacks"
    if shutil.which(VALGRIND[0]) is None:
        return "instructions are counted by valgrind, which isn't installed"
    try:
        toolchain("x86-64")
    except TargetError as error:
        return str(error).split("\n", 1)[0]
    return ""


def instructions(build: Build, tools: Toolchain) -> int:
    """What one turn takes."""
    case = build(features_of(LEVEL))
    program = Executable(case.objects, tools)

    def whole(turns: int) -> int:
        _, said = program.run(case.memory, turns=turns, watched_by=VALGRIND)
        found = re.search(r"I +refs: +([\d,]+)", said)
        assert found is not None, f"valgrind said no count:\n{said}"
        return int(found[1].replace(",", ""))

    # The first turns may take other ways through the C library than later ones.
    return (whole(2 * TURNS) - whole(TURNS)) // TURNS


def table(rows: list[Counted]) -> str:
    """All counts for people."""
    wide = max(len(row.name) for row in rows)
    lines = [f"{'instructions of a turn':<{wide}}  {'counted':>12}  {'budget':>12}  change"]
    for row in rows:
        budget = "" if row.budget is None else f"{row.budget:,}"
        lines.append(f"{row.name:<{wide}}  {row.count:>12,}  {budget:>12}  {row.change}")
    return "\n".join(lines)


def verdict(rows: list[Counted], llvm: str) -> str:
    """What is wrong, and what to do about it; empty where nothing is."""
    worse = [row for row in rows if row.exceeds]
    if not worse:
        return ""
    lines = [
        f"'{row.name}' takes {row.count:,} instructions, of at most {row.limit:,} "
        f"(its budget and {TOLERANCE:.0%})"
        if row.budget is not None
        else f"'{row.name}' takes {row.count:,} instructions and has no budget"
        for row in worse
    ]
    if llvm != llvm_version():
        lines.append(f"budgets were counted with LLVM {llvm}, this is {llvm_version()}")
    lines.append("Find what costs more; if it is worth it, put the new counts in with the change:")
    lines.append("    python benchmarks/instructions.py --update")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases named so")
    parser.add_argument("--update", action="store_true", help="write the counts as the budget")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Count, and compare or write; the exit status."""
    arguments = parse(argv)
    reason = missing()
    if reason:
        print(f"skipped: {reason}")
        return 0
    # What asks for the host is given the level too.
    os.environ["DURE_CPU_LEVEL"] = LEVEL
    document: dict[str, Any] = (
        json.loads(BUDGET.read_text("utf-8")) if BUDGET.exists() else {"counts": {}}
    )
    budgets: dict[str, int] = document["counts"]
    names = [n for n in CASES if not arguments.only or any(w in n for w in arguments.only)]
    tools = toolchain("x86-64")
    rows = [Counted(n, instructions(CASES[n], tools), budgets.get(n)) for n in names]
    print(table(rows))
    if arguments.update:
        counts = {n: c for n, c in budgets.items() if n in CASES} | {r.name: r.count for r in rows}
        ordered = {name: counts[name] for name in CASES if name in counts}
        written = {"level": LEVEL, "llvm": llvm_version(), "counts": ordered}
        BUDGET.write_text(json.dumps(written, indent=1) + "\n", "utf-8")
        print("`python benchmarks/all.py page` puts them into docs/performance.md")
        return 0
    wrong = verdict(rows, document.get("llvm", "another version"))
    if wrong:
        print(f"\n{wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
