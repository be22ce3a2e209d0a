"""The tile kernels that measure the host, as text of the IR.

Each runs many instances on the same bytes, so that these stay in the nearest cache; the kernels of
whole working sets walk through them.  No two instances of a kernel of the library would write the
same bytes: these are run by one worker, and only their time is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Elements of a row that stays in the nearest cache, and instances that go over it.
_ROW = 2048
_TURNS = 100

#: Operations whose time is the difference between chains of two lengths.
CHAINS: dict[str, tuple[int, int]] = {
    "add": (4, 12),
    "mul": (4, 12),
    "max": (2, 6),
    "div": (2, 6),
    "where": (2, 6),
    "exp": (0, 1),
    "log": (0, 1),
    "sqrt": (0, 1),
    "rsqrt": (0, 1),
    "tanh": (0, 1),
    "sigmoid": (0, 1),
    "erf": (0, 1),
    "sin": (0, 1),
}

#: Operations that take what another one takes.
FORMS: dict[str, str] = {
    "sub": "add",
    "neg": "mul",
    "abs": "mul",
    "min": "max",
    "exp2": "exp",
    "log2": "log",
    "cos": "sin",
    "pow": "tanh",
    "and": "mul",
    "or": "mul",
    "xor": "mul",
    "not": "mul",
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), "mul"),
}
_BINARY = ("add", "mul", "max", "div")


@dataclass(frozen=True)
class Micro:
    """A kernel's text, the bytes of its tensors, and how many units of what is measured it does."""

    text: str
    bytes: tuple[int, ...]
    units: float


def _size(shape: Sequence[int], dtype: str) -> int:
    total = {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2}[dtype]
    for extent in shape:
        total *= extent
    return total


def _tile(shape: Sequence[int], dtype: str) -> str:
    return f"tile<{' x '.join(map(str, shape))} x {dtype}>"


def _tuple(values: Sequence[object]) -> str:
    inner = ", ".join(map(str, values))
    return f"({inner},)" if len(values) == 1 else f"({inner})"


def _place(index: Sequence[str], tile: Sequence[int]) -> str:
    zeros = _tuple(["[0]"] * len(tile))
    where = _tuple([f"[{i}]" for i in index])
    stride = _tuple([1] * len(tile))
    return f"index = {where}, offset = {zeros}, step = {_tuple(tile)}, stride = {stride}"


def _load(name: str, tensor: str, index: Sequence[str], tile: Sequence[int], dtype: str) -> str:
    where = _place(index, tile)
    attributes = f"{{fill = 0, shape = {_tuple(tile)}, {where}}}"
    return f"  %{name} = load(%{tensor}) {attributes} : {_tile(tile, dtype)}"


def _store(value: str, tensor: str, index: Sequence[str], tile: Sequence[int]) -> str:
    return f"  store(%{tensor}, %{value}) {{{_place(index, tile)}}}"


def _kernel(
    tensors: Sequence[tuple[str, str, Sequence[int], str]],
    grid: Sequence[int],
    body: Sequence[str],
    units: float,
) -> Micro:
    """``tensors``: access, name, shape and dtype of each."""
    params = [
        f"  {access} %{name}: tensor<{' x '.join(map(str, shape))} x {dtype}>"
        for access, name, shape, dtype in tensors
    ]
    ids = [f"  grid i{axis} in [0, {extent - 1}] of {extent}" for axis, extent in enumerate(grid)]
    text = "\n".join(["tile function micro", *params, *ids, "{", *body, "}"])
    return Micro(text, tuple(_size(shape, dtype) for _, _, shape, dtype in tensors), units)


def small(instances: int) -> Micro:
    """Instances that do next to nothing; units: instances."""
    tile = (1, 8)
    tensors = [("in", "x", tile, "float32"), ("out", "y", tile, "float32")]
    body = [_load("a", "x", ("0", "0"), tile, "float32"), _store("a", "y", ("0", "0"), tile)]
    return _kernel(tensors, [instances], body, instances)


def chain(op: str, length: int, lanes: int, tile: tuple[int, int] = (1, _ROW)) -> Micro:
    """``length`` operations one after another on each element; units: vectors."""
    kind = _tile(tile, "float32")
    names = ("x", "z", "w")
    tensors = [*(("in", n, tile, "float32") for n in names), ("out", "y", tile, "float32")]
    body = [_load(n + "0", n, ("0", "0"), tile, "float32") for n in names]
    value = "x0"
    for place in range(length):
        other = "z0" if place % 2 else "w0"
        if op in _BINARY:
            call = f"{op}(%{value}, %{other})"
        elif op == "where":
            body.append(f"  %c{place} = lt(%{other}, %{value}) : {_tile(tile, 'bool')}")
            call = f"where(%c{place}, %{value}, %{other})"
        else:
            call = f"{op}(%{value})"
        body.append(f"  %v{place} = {call} : {kind}")
        value = f"v{place}"
    body.append(_store(value, "y", ("0", "0"), tile))
    return _kernel(tensors, [_TURNS], body, _TURNS * tile[0] * tile[1] / lanes)


def rows(lanes: int) -> Micro:
    """Copies of rows of two vectors; units: vectors."""
    return chain("add", 0, lanes, (_ROW // (2 * lanes), 2 * lanes))


def streams(lanes: int) -> Micro:
    """The sum of four rows; units: vectors."""
    tile = (1, _ROW // 2)
    names = ("a", "b", "c", "d")
    tensors = [*(("in", n, tile, "float32") for n in names), ("out", "y", tile, "float32")]
    body = [_load(n + "0", n, ("0", "0"), tile, "float32") for n in names]
    kind = _tile(tile, "float32")
    body += [
        f"  %s = add(%a0, %b0) : {kind}",
        f"  %t = add(%s, %c0) : {kind}",
        f"  %u = add(%t, %d0) : {kind}",
        _store("u", "y", ("0", "0"), tile),
    ]
    return _kernel(tensors, [_TURNS], body, _TURNS * tile[1] / lanes)


def convert(source: str, target: str, lanes: int) -> Micro:
    """A copy into another type; units: vectors."""
    tile = (1, _ROW)
    tensors = [("in", "x", tile, source), ("out", "y", tile, target)]
    body = [_load("a", "x", ("0", "0"), tile, source)]
    value = "a"
    if source != target:
        body.append(f"  %b = cast(%a) {{dtype = {target}}} : {_tile(tile, target)}")
        value = "b"
    body.append(_store(value, "y", ("0", "0"), tile))
    return _kernel(tensors, [_TURNS], body, _TURNS * tile[1] / lanes)


def masked(way: str, dtype: str, lanes: int) -> Micro:
    """A copy in pieces, the last of which leaves the tensor that is read, or written.

    The code of all pieces is the same; units: vectors.
    """
    whole, cut, part = (1, _ROW), (1, _ROW - 4), (1, 64)
    x, y = (cut, whole) if way == "load" else (whole, cut)
    tensors = [("in", "x", x, dtype), ("out", "y", y, dtype)]
    body = [_load("a", "x", ("0", "i0"), part, dtype), _store("a", "y", ("0", "i0"), part)]
    pieces = _ROW // part[1]
    return _kernel(tensors, [pieces, _TURNS], body, _TURNS * _ROW / lanes)


def transposed(lanes: int) -> Micro:
    """A small tile turned; units: vectors of the result."""
    tile = (32, 32)
    tensors = [("in", "x", tile, "float32"), ("out", "y", tile, "float32")]
    body = [
        _load("a", "x", ("0", "0"), tile, "float32"),
        f"  %b = transpose(%a) {{order = (1, 0)}} : {_tile(tile, 'float32')}",
        _store("b", "y", ("0", "0"), tile),
    ]
    return _kernel(tensors, [_TURNS], body, _TURNS * 1024 / lanes)


def reduction(name: str, count: int, columns: int, lanes: int) -> Micro:
    """Rows to one number each; units: vectors that are read."""
    tile = (count, columns)
    combiner = {"add": "sum"}.get(name, name)
    tensors = [("in", "x", tile, "float32"), ("out", "y", (count, 1), "float32")]
    body = [
        _load("a", "x", ("0", "0"), tile, "float32"),
        f'  %b = reduce(%a) {{axis = 1, combiner = "{combiner}"}} : {_tile((count, 1), "float32")}',
        _store("b", "y", ("0", "0"), (count, 1)),
    ]
    return _kernel(tensors, [10], body, 10 * count * columns / lanes)


def dot(dtype: str, height: int, vectors: int, depth: int, lanes: int) -> Micro:
    """A register block of a product; units: steps of K."""
    width = vectors * lanes
    tensors = [
        ("in", "x", (height, depth), dtype),
        ("in", "w", (depth, width), dtype),
        ("out", "y", (height, width), "float32"),
    ]
    kind = _tile((height, width), "float32")
    body = [
        _load("a", "x", ("0", "0"), (height, depth), dtype),
        _load("b", "w", ("0", "0"), (depth, width), dtype),
        f"  %c = full() {{dtype = float32, shape = ({height}, {width}), value = 0.0}} : {kind}",
        f"  %d = dot(%a, %b, %c) : {kind}",
        _store("d", "y", ("0", "0"), (height, width)),
    ]
    turns = 4 * _TURNS
    return _kernel(tensors, [turns], body, turns * depth)


_PART = 1024
#: Floats of a row of the matrices whose columns are walked: neighbours in a column fall into the
#: same set of a cache where rows are a power of two, and into others where they are not.
WIDTHS = {True: 1024, False: 1056}


def _passes(size: int) -> int:
    return max(1, (1 << 18) // size)


def writing(size: int, workers: int) -> Micro:
    """A working set filled, each worker its own part; units: bytes."""
    columns, parts = _PART, max(1, size // 4 // _PART // workers)
    tensors = [("out", "y", (parts * workers, columns), "float32")]
    kind = _tile((1, columns), "float32")
    body = [
        f"  %a = full() {{dtype = float32, shape = (1, {columns}), value = 1.0}} : {kind}",
        _store("a", "y", (f"i0 + {parts} * i2", "0"), (1, columns)),
    ]
    grid = [parts, _passes(size), workers]
    return _kernel(tensors, grid, body, parts * workers * columns * 4 * grid[1])


def copying(size: int, workers: int) -> Micro:
    """Half a working set copied to the other, each worker its own part; units: bytes read."""
    columns, parts = _PART, max(1, size // 8 // _PART // workers)
    shape = (parts * workers, columns)
    tensors = [("in", "x", shape, "float32"), ("out", "y", shape, "float32")]
    place = (f"i0 + {parts} * i2", "0")
    body = [_load("a", "x", place, (1, columns), "float32"), _store("a", "y", place, (1, columns))]
    grid = [parts, _passes(size), workers]
    return _kernel(tensors, grid, body, parts * workers * columns * 4 * grid[1])


#: Columns of a patch, and its bytes a row: two lines, which come together.
PATCH = 32
CHUNK = 128


def patches(way: str, size: int, wide: int) -> Micro:
    """Patches of 64 rows of a chunk out of a matrix read, written, or an ``exp`` of each; units:
    chunks.

    With a ``size`` of 0 it is one patch again and again, which stays in the nearest cache.
    """
    deep = max(64, size // 4 // wide // 64 * 64)
    patch, tall, shape = (64, PATCH), (64, 1), (deep, wide)
    grid = [wide // PATCH, deep // 64, max(1, (1 << 18) // size)] if size else [1, 1, 200]
    place = ("i1", "i0") if size else ("0", "0")
    x, y = ("in", "x", shape, "float32"), ("out", "y", shape, "float32")
    kind = _tile(patch, "float32")
    body = [_load("a", "x", place, patch, "float32")]
    if way == "read":
        y = ("out", "y", tall, "float32")
        body.append(f'  %b = reduce(%a) {{axis = 1, combiner = "sum"}} : {_tile(tall, "float32")}')
        body.append(_store("b", "y", ("0", "0"), tall))
    elif way == "exp":
        body += [f"  %b = exp(%a) : {kind}", _store("b", "y", place, patch)]
    else:
        full = f"full() {{dtype = float32, shape = {patch}, value = 1.0}}"
        body = [f"  %a = {full} : {kind}", _store("a", "y", place, patch)]
    tensors = [y] if way == "write" else [x, y]
    return _kernel(tensors, grid, body, grid[0] * grid[1] * grid[2] * 64)


def _column(deep: int, wide: int, where: str, grid: Sequence[int], height: int) -> Micro:
    tensors = [
        ("in", "x", (height, deep), "float32"),
        ("in", "w", (deep, wide), "float32"),
        # Rows of the result that lay as the matrix's do would stand in its way.
        ("out", "y", (height, 16 if where == "0" else wide), "float32"),
    ]
    block = (height, 16)
    kind = _tile(block, "float32")
    body = [
        _load("a", "x", ("0", "0"), (height, deep), "float32"),
        _load("b", "w", ("0", where), (deep, 16), "float32"),
        f"  %c = full() {{dtype = float32, shape = {block}, value = 0.0}} : {kind}",
        f"  %d = dot(%a, %b, %c) : {kind}",
        _store("d", "y", ("0", where), block),
    ]
    units = deep
    for extent in grid:
        units *= extent
    return _kernel(tensors, grid, body, units)


def walk(size: int, wide: int) -> Micro:
    """Columns of a line's width down all rows of a matrix, one after another; units: lines."""
    deep = max(16, size // 4 // wide)
    return _column(deep, wide, "i0", [wide // 16, _passes(size)], 1)


def rewalk(deep: int, wide: int, height: int) -> Micro:
    """One such column again and again, by dots of ``height`` rows; units: lines."""
    return _column(deep, wide, "0", [max(4, 40960 // deep)], height)
