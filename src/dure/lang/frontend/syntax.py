"""Python that a kernel cannot use, with the rule and what to write instead."""

from __future__ import annotations

import ast

from dure.errors import KernelError

_LOOP = "a kernel's loops are for statements over dl.range or dl.static_range, with a bound"
_NONE = "a kernel has no exceptions, contexts, generators or classes"
_TABLE: dict[type[ast.AST], tuple[str, str, str]] = {
    ast.While: ("a while loop", _LOOP, "for k in dl.range(bound):, with an if on index scalars"),
    ast.Break: ("break", _LOOP, "compute the loop's bound first, with min and max"),
    ast.Continue: ("continue", _LOOP, "put the rest of the body under an if"),
    ast.Try: ("try", _NONE, "remove it: errors are found when the kernel is compiled or launched"),
    ast.With: ("with", _NONE, "remove it"),
    ast.ClassDef: ("a class", _NONE, "define it outside, and pass its numbers as consts"),
    ast.Yield: ("yield", _NONE, "return a tuple"),
    ast.YieldFrom: ("yield from", _NONE, "return a tuple"),
    ast.Await: ("await", _NONE, "remove it"),
    ast.Import: ("import", "modules are imported outside of a kernel", "move it to the file's top"),
    ast.ImportFrom: (
        *("import", "modules are imported outside of a kernel"),
        "move it to the file's top",
    ),
    ast.Global: ("global", "a kernel changes nothing but its arguments", "store into a tensor"),
    ast.Nonlocal: ("nonlocal", "a kernel changes nothing but its arguments", "store into a tensor"),
    ast.Delete: ("del", "names stay bound", "remove it"),
    ast.Match: ("match", "choices are if statements", "write if and elif"),
    ast.NamedExpr: (":=", "a name is assigned in a statement", "assign it on a line of its own"),
    ast.Set: ("a set", "a kernel has tuples", "use a tuple"),
    ast.SetComp: ("a set comprehension", "a kernel has tuples", "use a tuple"),
    ast.DictComp: ("a dict comprehension", "a kernel has tuples", "use a tuple"),
    ast.Attribute: (
        *("an assignment to an attribute", "a kernel changes nothing but its arguments"),
        "assign to a name",
    ),
    ast.Subscript: (
        *("an assignment to an element", "tensors are written with dl.store, tiles are values"),
        "dl.store(x, index, tile), or dl.where to change a part of a tile",
    ),
    ast.Starred: ("a starred target", "every value has a name", "name each value"),
}


def unsupported(node: ast.AST) -> KernelError:
    """The error for a syntax that kernels don't have."""
    name, rule, fix = _TABLE.get(
        type(node),
        (
            f"the syntax '{type(node).__name__}'",
            "a kernel is written with assignments, if, for, return and calls",
            "write it with those",
        ),
    )
    return KernelError(f"{name} in a kernel", rule=rule, fix=fix)
