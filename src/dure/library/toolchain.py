"""How a vendor's toolchain runs a matmul where that is known: what it stages, tile by tile.

A chip's file may have a ``toolchain``: measurements of the chip were made with programs of it.  One
with a ``pipeline`` copies one whole operand into the scratchpad before the first product, the
largest that leaves room for the pipeline, and streams the other one and the result through that in
tiles, double buffered.  Of two operands of one size the left one stays; a single row is never
staged.  Its choice of tiles isn't published: the fastest program is taken that keeps to these
rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from dure.compiler.chip.partition import Partition
from dure.compiler.chip.pipeline import Options, compile_for
from dure.compiler.chip.resident import Reuse
from dure.errors import DureError, UsageError
from dure.ir.dtypes import bfloat16, float32
from dure.ir.types import TensorType
from dure.lang.kernel import Kernel
from dure.library.activation import gelu_erf, silu
from dure.library.attention_measured import (
    causal_attention_blocks,
    encoder_attention,
    encoder_scores,
    encoder_values,
)
from dure.library.build import Built, build, index_values, tile_function
from dure.library.call import KernelCall, tensor
from dure.library.matmul_staged import (
    ffn_staged,
    ffn_weights_first,
    gated_ffn_staged,
    gated_ffn_weights_first,
    gated_matmul_staged,
    matmul_staged,
)
from dure.library.operators_common import Shape, call, power_of_two
from dure.library.operators_measured import PAGE, sequences
from dure.machine.chip import Chip, Dma
from dure.sim.timing import simulate

#: The most elements of a tile.
_MOST = 1 << 24
#: Candidates that are compiled and simulated.
_TRIED = 4
#: Rows of queries (queries times the heads that share a KV head) that a block of attention has.
_QUERY_ROWS = 512


@dataclass(frozen=True)
class Product:
    """A matmul (M, K) @ (K, N) to be run: which operands and whether the result cross the far
    memory's edge, bytes of an element, and how many numbers of the left operand make one factor.
    """

    m: int
    k: int
    n: int
    bits: int = 16
    doubled: int = 1

    @property
    def left(self) -> int:
        """Bytes of the left operand."""
        return self.m * self.k * self.doubled * self.bits // 8

    @property
    def right(self) -> int:
        """Bytes of the right operand."""
        return self.k * self.n * self.bits // 8


@dataclass(frozen=True)
class Tiles:
    """A way to run a product: tile extents, the operand that is staged, and its loops."""

    m: int
    n: int
    k: int
    staged: str
    columns_outside: bool

    def options(self, product: Product) -> Options:
        """How the compiler is told."""
        order = (1, 0) if self.columns_outside else (0, 1)
        reuse = None
        several = {"x": product.m > self.m, "w": product.n > self.n}.get(self.staged, False)
        if self.staged and (product.k > self.k or several):
            reuse = Reuse(self.staged, 0)
        return Options(Partition((1, 1), order), 2, False, (), reuse)


def pipeline_bytes(chip: Chip) -> float:
    """Bytes of the pipeline."""
    assert chip.toolchain is not None and chip.toolchain.pipeline is not None
    return chip.toolchain.pipeline.base


def room(chip: Chip) -> int:
    """Bytes that a staged operand stays below."""
    return int(chip.memories[chip.scratchpad].size.base - pipeline_bytes(chip))


def staged_operand(chip: Chip, product: Product) -> str:
    """``x``, ``w`` or nothing."""
    if product.m == 1:
        return ""
    fitting = [(b, n) for n, b in (("w", product.right), ("x", product.left)) if b < room(chip)]
    return max(fitting, key=lambda entry: entry)[1] if fitting else ""


def candidates(chip: Chip, product: Product, staged: str) -> Iterator[Tiles]:
    """Tiles with which the pipeline fits."""
    budget, size = pipeline_bytes(chip), product.bits // 8
    for m in _sizes(product.m, 128):
        for n in _sizes(product.n, 256):
            for k in _sizes(product.k, 256):
                if max(m * k, k * n, m * n) > _MOST:
                    continue
                streamed = 2 * size * m * n + 4 * m * n
                streamed += 0 if staged == "x" else 2 * size * m * k * product.doubled
                streamed += 0 if staged == "w" else 2 * size * k * n
                if streamed <= budget and _stays(product, m, n, k, staged):
                    yield Tiles(m, n, k, staged, staged == "x")


def _stays(product: Product, m: int, n: int, k: int, staged: str) -> bool:
    """Whether the compiler can keep the staged operand: as one tile, or as tiles of which only one
    extent is cut and that a loop loads again and again.
    """
    if not staged:
        return True
    several = product.m > m if staged == "x" else product.n > n
    again = product.n > n if staged == "x" else product.m > m
    return not (several and product.k > k) and (again or not (several or product.k > k))


def estimate(chip: Chip, product: Product, tiles: Tiles) -> float:
    """About how many seconds, to rank candidates: copies, products and what hides what."""
    rows, columns, depth = (
        -(-product.m // tiles.m),
        -(-product.n // tiles.n),
        -(-product.k // tiles.k),
    )
    bandwidth = chip.memories[chip.home].bandwidth
    assert bandwidth is not None
    rate = chip.bytes_a_second(bandwidth)
    again = {
        "x": 1 if tiles.staged == "x" or columns == 1 or (depth == 1 and not tiles.columns_outside)
        else columns,
        "w": 1 if tiles.staged == "w" or rows == 1 or (depth == 1 and tiles.columns_outside)
        else rows,
    }  # fmt: skip
    size = product.bits // 8
    total = product.left * again["x"] + product.right * again["w"] + size * product.m * product.n
    ahead = {"x": product.left, "w": product.right}.get(tiles.staged, 0)
    first = size * (
        (0 if tiles.staged == "x" else tiles.m * tiles.k * product.doubled)
        + (0 if tiles.staged == "w" else tiles.k * tiles.n)
    )
    last = size * tiles.m * tiles.n
    steps = rows * columns * depth
    compute = steps * _step_seconds(chip, tiles)
    moving = max(0.0, (total - ahead - first - last) / rate)
    contention = chip.memories[chip.scratchpad].contention
    lost = contention.base if contention is not None else 0.0
    # A slot of two is loaded when its product has ended, and computed on when it is loaded.
    turn = compute / steps + chip.seconds(_dma(chip).latency) + moving / steps
    compute = max(compute, steps * turn / 2)
    beside = min(moving, compute / (1 - lost))
    return (ahead + first + last) / rate + max(compute + lost * beside, moving + compute / steps)


def _dma(chip: Chip) -> Dma:
    """What loads tiles."""
    return next(d for d in chip.dma.values() if (chip.home, chip.scratchpad) in d.moves)


def _step_seconds(chip: Chip, tiles: Tiles) -> float:
    """One product of tiles."""
    engine = next(e for e in chip.engines.values() if e.dot is not None)
    values = {name: number.base for name, number in engine.numbers.items()}
    values |= {"m": tiles.m, "n": tiles.n, "k": tiles.k, "batch": 1, "rate": 1}
    clock = engine.clock or chip.clock
    return engine.laws["dot"](values) / clock.base + chip.seconds(engine.issue, engine.clock)


def _sizes(extent: int, least: int) -> list[int]:
    """The extent, its halves in whole multiples of ``least``, and powers of two below it."""
    found = {extent}
    part = extent
    while part > least:
        part = -(-part // 2)
        found.add(-(-part // least) * least)
    power = least
    while power < extent:
        found.add(power)
        power *= 2
    return sorted(size for size in found if size <= extent)


def fastest(chip: Chip, choices: Sequence[tuple[KernelCall, Options]]) -> Built:
    """The fastest of some calls, each compiled in one way; proved.

    Raises the last one's error where none compiles.
    """
    best: tuple[int, KernelCall, Options] | None = None
    failure: DureError | None = None
    for made, options in choices:
        try:
            function = tile_function(made)
            lists = index_values(made, function)
            compiled = compile_for(function, chip, options, lists)
        except DureError as error:
            failure = error
            continue
        ps = simulate(compiled.function, chip, indices=lists).ps
        if best is None or ps < best[0]:
            best = ps, made, options
    if best is None:
        raise failure or UsageError("no tiles fit the pipeline", fix="take other dims")
    return build(best[1], chip, tiles=dict(best[1].tiles), options=best[2])


def ranked(chip: Chip, product: Product, staged: str) -> list[Tiles]:
    """The most promising candidates."""
    found = sorted(
        candidates(chip, product, staged), key=lambda tiles: estimate(chip, product, tiles)
    )
    return found[:_TRIED]


# --- operators -----------------------------------------------------------------------------------


def compiles(op: str, dtype: str, chip: Chip) -> bool:
    """Whether what the chip's toolchain makes of an operator is known."""
    staging = chip.toolchain is not None and chip.toolchain.pipeline is not None
    return staging and op in _OPERATORS and dtype == "bf16"


def compiled_by(op: str, dims: Shape, chip: Chip) -> tuple[Built, ...]:
    """An operator in bfloat16 as the toolchain runs it: launches of one program, one after another.

    The program is launched once: see :func:`program_ps`.
    """
    return _OPERATORS[op](dims, chip)


def program_ps(parts: Sequence[Built]) -> int:
    """The time of launches that are one program."""
    return sum(part.timing.ps for part in parts) - sum(p.timing.launch for p in parts[1:])


def _product(
    chip: Chip,
    product: Product,
    staged: str,
    call_of: Callable[[Tiles], KernelCall],
) -> Built:
    # An operand that can't be cut so that it stays is streamed.
    found = ranked(chip, product, staged) or ranked(chip, product, "")
    return fastest(chip, [(call_of(tiles), tiles.options(product)) for tiles in found])


def _gemm(dims: Shape, chip: Chip) -> tuple[Built, ...]:
    m, k, n = dims
    product = Product(m, k, n)
    return (_product(chip, product, staged_operand(chip, product), _matmul(dims)),)


def _matmul(shape: Shape) -> Callable[[Tiles], KernelCall]:
    m, k, n = shape
    types = [tensor(bfloat16, m, k), tensor(bfloat16, k, n), tensor(bfloat16, m, n)]

    def made(tiles: Tiles) -> KernelCall:
        sizes = {"bm": tiles.m, "bn": tiles.n, "bk": tiles.k}
        return call(matmul_staged, types, sizes, {"whole": tiles.k >= k})

    return made


def _ffn(dims: Shape, chip: Chip, *, gate: bool) -> tuple[Built, ...]:
    m, d, f = dims
    columns = 2 * f if gate else f
    x, up, down = 2 * m * d, 2 * d * columns, 2 * f * d
    fitting = [(b, n) for n, b in (("x", x), ("w", up), ("down", down)) if b < room(chip)]
    kept, staged = max(fitting) if fitting and m > 1 else (0, "")
    if m == 1 or 2 * m * columns < room(chip) - kept:
        return (_ffn_kept(dims, chip, gate, staged),)
    first = Product(m, d, columns)
    here = staged if staged in ("x", "w") else ""
    second = Product(m, f, d, doubled=2 if gate else 1)

    def gated(tiles: Tiles) -> KernelCall:
        types = [tensor(bfloat16, m, columns), tensor(bfloat16, f, d), tensor(bfloat16, m, d)]
        sizes = {"bm": tiles.m, "bn": tiles.n, "bk": tiles.k}
        return call(gated_matmul_staged, types, sizes, {"activation": silu})

    return (
        _product(chip, first, here, _matmul((m, d, columns))),
        _product(chip, second, "", gated if gate else _matmul((m, f, d))),
    )


def _ffn_kept(dims: Shape, chip: Chip, gate: bool, staged: str) -> Built:
    """With the hidden tensor in the scratchpad."""
    m, d, f = dims
    types = [
        *(tensor(bfloat16, m, d), tensor(bfloat16, d, 2 * f if gate else f)),
        *(tensor(bfloat16, f, d), tensor(bfloat16, m, d)),
    ]
    if not gate:
        types += [tensor(bfloat16, f), tensor(bfloat16, d)]
    consts = {"bd": d, "activation": silu if gate else gelu_erf}
    plan = Partition((1,), (0,))
    choices: list[tuple[KernelCall, Options]] = []
    # Of a single row the second weight is copied whole, behind the first.
    behind = m == 1 and 2 * f * d < room(chip)
    if (staged == "w" or behind) and d * f <= _MOST:
        kernel = gated_ffn_weights_first if gate else ffn_weights_first
        for rows in _sizes(m, 128):
            widths = [d] if behind else _sizes(d, 256)
            for columns in (n for n in widths if max(rows, n) * f <= _MOST):
                made = call(kernel, types, {"bm": rows, "bn": columns}, {**consts, "bf": f})
                choices.append((made, Options(plan)))
                if rows < m and columns < d:
                    choices.append((made, Options(plan, resident=(Reuse("down", 0),))))
        return fastest(chip, choices)
    kernel = gated_ffn_staged if gate else ffn_staged
    widths = [n for n in _sizes(f, 256) if f % n == 0 and d * n <= _MOST] or _sizes(f, 256)
    for rows in _sizes(m, 128):
        for columns in widths:
            if rows * columns <= _MOST and d * max(rows, columns) <= _MOST:
                made = call(kernel, types, {"bm": rows, "bf": columns}, consts)
                choices.append((made, Options(plan)))
    return fastest(chip, choices)


def _attention(dims: Shape, chip: Chip) -> tuple[Built, ...]:
    """Causal attention: the largest block of keys of which two fit the pipeline with their values,
    512 rows of queries, and as many KV heads at once as fit.
    """
    s = sequences(dims)
    piece = power_of_two(s.length)
    while piece > PAGE and 2 * 2 * 2 * piece * s.heads * s.size > pipeline_bytes(chip):
        piece //= 2
    bq = min(power_of_two(s.queries), max(1, _QUERY_ROWS // s.group))
    pool = tensor(bfloat16, s.heads, s.slots, s.size)
    q = tensor(bfloat16, s.count, s.heads, s.queries, s.group, s.size)
    consts = {
        "bq": bq,
        "group": s.group,
        "bd": s.size,
        "page": PAGE,
        "piece": max(piece, PAGE),
        "length": s.length,
        "scale": s.size**-0.5,
    }
    lists = {3: (s.block_table(), 0, s.count * s.pages - 1)}
    failure: DureError | None = None
    for heads in reversed(_sizes(s.heads, 1)):
        made = call(causal_attention_blocks, [q, pool, pool, None, q], {"bh": heads}, consts, lists)
        try:
            return (build(made, chip, tiles={"bh": heads}),)
        except DureError as error:
            failure = error
    assert failure is not None
    raise failure


def _encoder(dims: Shape, chip: Chip) -> tuple[Built, ...]:
    """Attention without a mask; whole scores in float32 are in the scratchpad where they fit."""
    h, s, d = dims
    kind, scores = tensor(bfloat16, h, s, d), tensor(float32, h, s, s)
    padded = -(-s // 128) * 128
    # Whole heads, or rows of one where its scores are many.
    sizes = [(b, s) for b in _sizes(h, 1) if b * s * max(s, d) <= _MOST // 2]
    sizes = sizes or [(1, rows) for rows in _sizes(s, 8) if rows * max(s, d) <= _MOST // 4]
    scale = {"scale": d**-0.5}

    def built(kernel: Kernel, types: Sequence[TensorType], consts: dict[str, float]) -> Built:
        whole = {"bs": s, "bd": d, **consts}
        tiles = [{"bh": heads, "bq": rows} for heads, rows in sizes]
        return fastest(chip, [(call(kernel, types, t, whole), Options()) for t in tiles])

    if 4 * h * s * padded + 3 * 2 * h * s * d < room(chip):
        return (built(encoder_attention, [kind] * 4, scale),)
    return (
        built(encoder_scores, [kind, kind, scores], scale),
        built(encoder_values, [scores, kind, kind], {}),
    )


_OPERATORS: dict[str, Callable[[Shape, Chip], tuple[Built, ...]]] = {
    "gemm": _gemm,
    "ffn_gated": partial(_ffn, gate=True),
    "ffn_gelu": partial(_ffn, gate=False),
    "attn": _attention,
    "attn_enc": _encoder,
}
