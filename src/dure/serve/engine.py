"""The LLM engine: a model file, compiled and loaded, that turns token ids into logits and tokens.

    with Engine.load("model.gguf") as engine:
        for token in engine.generate(engine.tokenizer.encode(...), SamplingParams(), 100):
            ...

Below :meth:`Engine.generate` lies :meth:`Engine.step`, which a serving engine drives: one step
over any mix of prefill chunks and single tokens of any sequences.  A sequence's logits have the
same bits alone, in a batch, and prefilled in any chunks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dure.errors import UsageError
from dure.ir.dtypes import DTYPES
from dure.models.decoder import StepLimits
from dure.models.stored import StoredModel
from dure.runtime.forks import StepLock
from dure.runtime.host import host_features
from dure.runtime.memory import available_bytes
from dure.serve.kv import KVCache, Sequence
from dure.serve.runner import CompiledStep, StepRunner
from dure.serve.sampler import Sampler, SamplingParams
from dure.serve.work import BatchEntry, build_step
from dure.targets.cpu.target import CpuTarget

if TYPE_CHECKING:
    from dure.serve.tokenizer import Tokenizer
    from dure.targets.cpu.program import CompiledProgram

#: Tokens of context unless asked for: what the model was made for, but no more than this.
DEFAULT_CONTEXT = 8192
#: Tokens in one step at most: longer prompts are prefilled in chunks of this size.
CHUNK = 512
#: Sequences that can be in the cache at once.
SEQUENCES = 64
#: The element types that a KV cache can have.
KV_DTYPES = ("bfloat16", "float16", "float32")
#: Attention reads the pages of so many tokens at a time.
_PIECE = 64
_LOGIT_BYTES = 1 << 25
#: What code, tables and working memory take besides weights and cache (the lead's budget: 300 MB).
_OVERHEAD_BYTES = 200 << 20
_PACKING = 1.05


@dataclass(frozen=True)
class GenerationStats:
    """Counts and times (seconds) of the last generation.

    ``prefill_s`` is the time in steps over the prompt, ``decode_s`` in those after it, sampling
    included; ``first_token_s`` from the call to the first token.  What the caller does with a token
    counts nowhere.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0


class Engine:
    """A loaded model.  Make one with :meth:`load`; close it, or use it as a context manager.

    Steps of several threads run one after another.
    """

    def __init__(
        self,
        model: StoredModel,
        runner: StepRunner,
        limits: StepLimits,
        context_length: int,
        kv_dtype: str,
    ) -> None:
        self.model = model
        self.limits = limits
        self.kv_dtype = kv_dtype
        self.context_length = context_length
        self.cache = KVCache(
            sequences=limits.sequences,
            pool_pages=limits.pool_pages,
            pages_per_sequence=limits.pages,
            page_size=limits.page_size,
        )
        self.stats = GenerationStats()
        self.load_s = 0.0
        self._runner: StepRunner | None = runner
        self._lock = StepLock()
        self._tokenizer: Tokenizer | None = None

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        threads: int | None = None,
        context: int | None = None,
        *,
        sequences: int = SEQUENCES,
        chunk: int = CHUNK,
        kv_dtype: str | None = None,
        recorded: bool = False,
    ) -> Engine:
        """Open, compile and load the GGUF at ``path``.

        ``threads`` of None takes the machine's cores; ``context`` of None the model's own context,
        at most :data:`DEFAULT_CONTEXT`.  ``kv_dtype`` is the element type of the KV cache; None is
        the 16-bit type that the machine multiplies fastest.  ``recorded`` steps keep when each
        worker did what, for :mod:`dure.serve.profile`.  Raises :class:`ModelFileError` for a file
        that is no model that dure knows, :class:`UsageError` for a context beyond the model's, an
        element type that a cache can't have, and a model that doesn't fit in memory, all before
        anything is loaded.
        """
        started = time.perf_counter()
        model = StoredModel.open(path)
        try:
            length = _context_length(model, context)
            target = CpuTarget(host_features())
            kind = _cached_type(kv_dtype or target.cached_dtype)
            page = target.page_size(kind)
            limits = step_limits(model, length, sequences, chunk, page)
            check_memory(model, limits, kind)
            runner = CompiledStep.load(model, limits, threads, kv_dtype=kind, recorded=recorded)
            engine = Engine(model, runner, limits, length, kind)
        except BaseException:
            model.close()
            raise
        engine.load_s = time.perf_counter() - started
        return engine

    # What it is -----------------------------------------------------------------------------------

    @property
    def architecture(self) -> str:
        """As the file names it."""
        return self.model.file.architecture

    @property
    def threads(self) -> int:
        """Workers of a step."""
        return self._open().threads

    @property
    def program(self) -> CompiledProgram:
        """The program that the host runs a step with."""
        runner = self._open()
        assert isinstance(runner, CompiledStep)
        return runner.program

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer, read when it is first asked for; :class:`ModelFileError` if
        damaged.
        """
        if self._tokenizer is None:
            from dure.serve.tokenizer import Tokenizer

            self._tokenizer = Tokenizer.from_gguf(self.model.file)
        return self._tokenizer

    @property
    def vocabulary(self) -> int:
        """Logits in a row."""
        return self.model.config.vocabulary

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes in the file of every tensor that a step reads, each once, a tied head once."""
        return self.model.bytes_per_step

    def kv_bytes(self, context: float) -> float:
        """Bytes of keys and values that a token at this position reads, windows counted."""
        config = self.model.config
        seen = sum(min(context, window) if window else context for window in config.windows)
        return seen * config.kv_size * 2 * DTYPES[self.kv_dtype].bits / 8

    # Steps ----------------------------------------------------------------------------------------

    def sequence(self) -> Sequence:
        """A new, empty sequence for :meth:`step`; give it back with :meth:`release`."""
        with self._lock:
            return self.cache.sequence()

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's pages."""
        with self._lock:
            self.cache.release(sequence)

    def step(self, entries: SequenceOf[BatchEntry]) -> npt.NDArray[np.float32]:
        """Run one step over new tokens of some sequences; gives the logits that the entries want.

        At most ``limits.tokens`` tokens and ``limits.logit_rows`` rows.  The result (rows,
        vocabulary) is a view that the next step overwrites.  Raises :class:`UsageError`, and
        changes nothing, for ids outside the vocabulary, too many tokens, or a full cache.
        """
        self._check(entries)
        with self._lock:
            runner = self._open()
            extended: list[Sequence] = []
            try:
                for entry in entries:
                    self.cache.extend(entry.sequence, len(entry.tokens))
                    extended.append(entry.sequence)
                inputs = build_step(self.cache, entries, self.limits.query_rows)
                logits = runner.run(inputs.arrays())
            except BaseException:
                for sequence in extended:
                    self.cache.truncate(sequence, sequence.length)
                raise
            for sequence in extended:
                self.cache.commit(sequence)
            return logits

    def check_room(self, sequences: int, tokens: int) -> None:
        """Raise :class:`UsageError` unless so many sequences of ``tokens`` each fit the cache."""
        limits = self.limits
        if tokens > self.context_length or sequences > limits.sequences:
            raise UsageError(
                f"{sequences} sequences of {tokens} tokens",
                rule=f"at most {limits.sequences} sequences of {self.context_length} tokens",
                fix="take fewer or shorter sequences, or load with a larger context",
            )
        pages = sequences * -(-tokens // limits.page_size)
        if pages > limits.pool_pages:
            raise UsageError(
                f"{sequences} sequences of {tokens} tokens take {pages} pages of KV cache",
                rule=f"the cache has {limits.pool_pages}",
                fix="take fewer or shorter sequences",
            )

    def _check(self, entries: SequenceOf[BatchEntry]) -> None:
        tokens = sum(len(entry.tokens) for entry in entries)
        rows = sum(len(entry.logits) for entry in entries)
        if not entries or any(len(entry.tokens) == 0 for entry in entries):
            raise UsageError(
                "a step without tokens", rule="each entry of a step brings at least one token"
            )
        if tokens > self.limits.tokens or rows > self.limits.logit_rows:
            raise UsageError(
                f"a step of {tokens} tokens and {rows} rows of logits",
                rule=f"a step has at most {self.limits.tokens} tokens and "
                f"{self.limits.logit_rows} rows of logits",
                fix="cut it into several steps",
            )
        if len({id(entry.sequence) for entry in entries}) != len(entries):
            raise UsageError(
                "a sequence occurs twice in one step",
                rule="a step has one entry for each sequence",
                fix="put its tokens into one entry",
            )
        for entry in entries:
            _check_ids(entry.tokens, self.vocabulary)

    def prefill(
        self, sequence: Sequence, ids: npt.NDArray[np.int32], chunk: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Run all of ``ids`` in chunks; gives the last token's logits (vocabulary,), a view.

        Raises :class:`UsageError` where there are none, and like :meth:`step`.
        """
        size = min(chunk or self.limits.tokens, self.limits.tokens)
        last = max(0, len(ids) - 1) // size * size
        for start in range(0, last, size):
            self.step([BatchEntry(sequence, ids[start : start + size])])
        rest = ids[last:]
        return self.step([BatchEntry(sequence, rest, (len(rest) - 1,))])[0]

    # Whole sequences ------------------------------------------------------------------------------

    def generate(
        self, prompt_ids: SequenceOf[int], params: SamplingParams, max_tokens: int
    ) -> Iterator[int]:
        """Tokens after a prompt, one by one, until ``max_tokens`` or the context is full.

        It doesn't stop at the model's end token: whoever reads the tokens does.  :attr:`stats` is
        up to date after each token.  Raises :class:`UsageError` for an empty prompt, one that
        fills the context, or ids outside the vocabulary, before the first token.
        """
        ids = self._prompt(prompt_ids, room=1)
        if max_tokens < 0:
            raise UsageError(
                f"{max_tokens} tokens were asked for", rule="a number of tokens is at least 0"
            )
        return self._generate(ids, params, min(max_tokens, self.context_length - len(ids)))

    def _generate(
        self, ids: npt.NDArray[np.int32], params: SamplingParams, limit: int
    ) -> Iterator[int]:
        started = time.perf_counter()
        self.stats = GenerationStats(prompt_tokens=len(ids))
        if limit == 0:
            return
        sampler = Sampler(params)
        history = np.empty(len(ids) + limit, np.int64)
        history[: len(ids)] = ids
        sequence = self.sequence()
        try:
            logits = self.prefill(sequence, ids)
            token = sampler.sample(logits, history[: len(ids)], len(ids))
            elapsed = time.perf_counter() - started
            self.stats = replace(self.stats, tokens=1, prefill_s=elapsed, first_token_s=elapsed)
            yield token
            for count in range(1, limit):
                begun = time.perf_counter()
                history[len(ids) + count - 1] = token
                entry = BatchEntry(sequence, np.array([token], np.int32), (0,))
                logits = self.step([entry])[0]
                token = sampler.sample(logits, history[: len(ids) + count], len(ids))
                decode_s = self.stats.decode_s + time.perf_counter() - begun
                self.stats = replace(self.stats, tokens=count + 1, decode_s=decode_s)
                yield token
        finally:
            self.release(sequence)

    def logits(self, ids: SequenceOf[int]) -> npt.NDArray[np.float32]:
        """The logits after every token of ``ids``: (n, vocabulary) float32, a new array."""
        tokens = self._prompt(ids, room=0)
        result = np.empty((len(tokens), self.vocabulary), np.float32)
        size = min(self.limits.logit_rows, self.limits.tokens)
        sequence = self.sequence()
        try:
            for start in range(0, len(tokens), size):
                part = tokens[start : start + size]
                entry = BatchEntry(sequence, part, tuple(range(len(part))))
                result[start : start + size] = self.step([entry])
        finally:
            self.release(sequence)
        return result

    def _prompt(self, ids: SequenceOf[int], room: int) -> npt.NDArray[np.int32]:
        """The ids as an array, checked; ``room`` tokens must fit behind them."""
        wide = np.asarray(ids, np.int64)
        if wide.ndim != 1 or len(wide) == 0:
            raise UsageError(
                "the prompt is empty", rule="a prompt has at least one token", fix="write something"
            )
        if len(wide) + room > self.context_length:
            raise UsageError(
                f"the prompt has {len(wide)} tokens and the context {self.context_length}",
                rule="the prompt and what is generated fit in the context",
                fix="shorten the prompt (--truncate cuts it), or use a larger context",
            )
        _check_ids(wide, self.vocabulary)
        return wide.astype(np.int32)

    def bench(
        self, *, prompt: int = 512, gen: int = 64, batch: int = 1, repeats: int = 3
    ) -> dict[str, object]:
        """Prefill and decode speed with random prompts; see :mod:`dure.serve.bench`."""
        from dure.serve.bench import bench

        return bench(self, prompt=prompt, gen=gen, batch=batch, repeats=repeats)

    # Its end --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free everything; a second time is nothing.  Steps afterwards raise UsageError."""
        with self._lock:
            runner, self._runner = self._runner, None
            if runner is not None:
                runner.close()
                self.model.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> StepRunner:
        if self._runner is None:
            raise UsageError(
                "the engine is closed", rule="a closed engine runs nothing", fix="load it again"
            )
        return self._runner


def _check_ids(ids: npt.NDArray[Any], vocabulary: int) -> None:
    low, high = (int(ids[0]),) * 2 if len(ids) == 1 else (int(ids.min()), int(ids.max()))
    if low < 0 or high >= vocabulary:
        raise UsageError(
            f"token id {low if low < 0 else high} in a vocabulary of {vocabulary}",
            rule="an id is at least 0 and below the vocabulary's size",
            fix="encode the text with this model's own tokenizer",
        )


def _context_length(model: StoredModel, context: int | None) -> int:
    """The context to load, checked against the model's."""
    longest = model.config.context
    if context is None:
        return min(longest, DEFAULT_CONTEXT)
    if not 1 <= context <= longest:
        raise UsageError(
            f"a context of {context} tokens",
            rule=f"this model's context is from 1 to {longest}",
            fix=f"ask for at most {longest}",
        )
    return context


def _cached_type(name: str) -> str:
    """The name of an element type that a KV cache can have."""
    if name not in KV_DTYPES:
        raise UsageError(
            f"a KV cache of '{name}'",
            rule=f"keys and values are one of {', '.join(KV_DTYPES)}",
            fix="leave it to the machine",
        )
    return name


def step_limits(
    model: StoredModel, context: int, sequences: int, chunk: int, page: int
) -> StepLimits:
    """The bounds of a step's sizes, with pages of so many tokens.

    The pool holds at least one sequence of the whole context, and :data:`DEFAULT_CONTEXT` tokens in
    all; memory is taken when pages are first written.
    """
    if not 1 <= chunk <= 1 << 16 or not 1 <= sequences <= 1 << 12:
        raise UsageError(
            f"steps of {chunk} tokens over {sequences} sequences",
            rule="a step has from 1 to 65536 tokens, and there are from 1 to 4096 sequences",
            fix=f"use {CHUNK} and {SEQUENCES}",
        )
    pages = -(-context // _PIECE) * (_PIECE // page)
    rows = max(sequences, _LOGIT_BYTES // (4 * model.config.vocabulary))
    return StepLimits(
        tokens=max(chunk, sequences),
        sequences=sequences,
        pages=pages,
        pool_pages=max(pages, DEFAULT_CONTEXT // page),
        logit_rows=min(rows, max(chunk, sequences)),
        positions=pages * page,
        page_size=page,
    )


def check_memory(model: StoredModel, limits: StepLimits, kv_dtype: str) -> None:
    """Raise :class:`UsageError` where the model would not fit in the memory that is free now."""
    config = model.config
    weights = model.weight_bytes
    token = 2 * config.kv_size * config.layers * int(DTYPES[kv_dtype].bits) // 8
    cache = limits.pool_pages * limits.page_size * token
    wanted = int(weights * _PACKING) + cache + _OVERHEAD_BYTES
    free = available_bytes()
    if wanted > free:
        raise UsageError(
            f"the model needs about {wanted / 1e9:.1f} GB and {free / 1e9:.1f} GB are free",
            where=model.file.path,
            rule=f"{weights / 1e9:.1f} GB of weights, {cache / 1e9:.1f} GB of cache fit in memory",
            fix="use a smaller model or quantization, or a shorter context",
        )
