"""A cache of object code on disk, found by what was compiled.

An entry's name is the SHA-256 of everything that decides the object code: LLVM IR, features,
options, LLVM's version and the format of these entries.  Equal names mean equal contents, so that
an entry never has to be invalidated, and processes may write the same one at the same time: each
writes a file of its own and renames it into place.  An entry that is damaged in any way is removed
and compiled again.  A folder that cannot be written (a full disk, no permission) costs one
warning, and then everything is compiled without a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dure import settings
from dure.runtime import llvm
from dure.runtime.host import HostFeatures

FORMAT = 2
"""Raised whenever the meaning of an entry, or the way in which code is linked, changes."""

_MAGIC = b"dure-object\x00\x01\n"
_SUFFIX = ".dureobj"
_ENTRY = f"??/*{_SUFFIX}"
_LEFTOVER = "??/.*.tmp"  # of a process that was killed while it wrote
_DIGEST_BYTES = 32
_HEADER_BYTES = len(_MAGIC) + 8 + _DIGEST_BYTES
_SHRINK_TO = 0.9
"""When the cache is full, the oldest entries go until this part of the limit is left."""


@dataclass(frozen=True)
class CacheStatistics:
    """What the cache holds and what this process got from it; sizes in bytes."""

    folder: Path
    entries: int
    total_bytes: int
    limit_bytes: int
    hits: int
    misses: int
    damaged: int


class ObjectCache:
    """Object code by key in ``folder``, at most ``limit_bytes``; the least recently used go first.

    Any thread and any number of processes may use the same folder.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._hits = self._misses = self._damaged = 0
        self._known_bytes: int | None = None
        self._writable = True

    def get(self, key: str) -> bytes | None:
        """The object code stored under ``key``, or None; using an entry makes it young again."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            self._count(misses=1)
            return None
        object_code = _unpack(data)
        if object_code is None:
            self._count(misses=1, damaged=1)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self._count(hits=1)
        with contextlib.suppress(OSError):
            os.utime(path)
        return object_code

    def put(self, key: str, object_code: bytes) -> None:
        """Store ``object_code`` under ``key``.  A failure is reported once, else ignored."""
        data = _pack(object_code)
        if not self._writable or len(data) > self.limit_bytes:
            return
        try:
            self._write(self._path(key), data)
        except OSError as error:
            self._give_up(error)
            return
        with self._lock:
            if self._known_bytes is None:
                self._known_bytes = sum(size for _, _, size in self._entries())
            else:
                self._known_bytes += len(data)
            full = self._known_bytes > self.limit_bytes
        if full:
            self._shrink()

    def statistics(self) -> CacheStatistics:
        """What is on disk now, and this process's hits and misses."""
        sizes = [size for _, _, size in self._entries()]
        with self._lock:
            counts = self._hits, self._misses, self._damaged
        return CacheStatistics(self.folder, len(sizes), sum(sizes), self.limit_bytes, *counts)

    def clear(self) -> int:
        """Remove every entry, and what interrupted writes left behind; returns the bytes freed."""
        freed = 0
        for path, _, size in list(self._entries(_ENTRY, _LEFTOVER)):
            with contextlib.suppress(OSError):
                path.unlink()
                freed += size
        with self._lock:
            self._known_bytes = None
        return freed

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def _write(self, path: Path, data: bytes) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            # Another process that makes room or clears the cache may have taken it for a leftover.
            with contextlib.suppress(FileNotFoundError):
                temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def _entries(self, *patterns: str) -> Iterator[tuple[Path, float, int]]:
        """Path, time of last use and size of every file of ours that doesn't vanish meanwhile."""
        for pattern in patterns or (_ENTRY,):
            with contextlib.suppress(OSError):
                for path in self.folder.glob(pattern):
                    with contextlib.suppress(OSError):
                        status = path.stat()
                        yield path, status.st_mtime, status.st_size

    def _shrink(self) -> None:
        """Remove the least recently used entries until there is some room again."""
        entries = sorted(self._entries(_ENTRY, _LEFTOVER), key=lambda entry: entry[1])
        total = sum(size for _, _, size in entries)
        goal = int(self.limit_bytes * _SHRINK_TO)
        for path, _, size in entries:
            if total <= goal:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size
        with self._lock:
            self._known_bytes = total

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            first, self._writable = self._writable, False
        if first:
            print(
                f"dure: compiled code is not kept: {self.folder}: {error.strerror or error}. "
                f"Set {settings.CACHE_DIR.name} to a folder that can be written.",
                file=sys.stderr,
            )

    def _count(self, *, hits: int = 0, misses: int = 0, damaged: int = 0) -> None:
        with self._lock:
            self._hits += hits
            self._misses += misses
            self._damaged += damaged


def object_cache() -> ObjectCache | None:
    """The cache in the folder that the settings name now; None where the limit is 0."""
    limit = settings.cache_limit_bytes()
    if limit == 0:
        return None
    folder = settings.cache_dir()
    with _caches_lock:
        cache = _caches.get((folder, limit))
        if cache is None:
            cache = _caches[folder, limit] = ObjectCache(folder, limit)
        return cache


def compile_cached(
    ir_text: str,
    cpu: HostFeatures,
    opt: llvm.OptLevel | llvm.CompileOptions = llvm.OptLevel.O1,
    *,
    times: llvm.CompileTimes | None = None,
) -> bytes:
    """:func:`dure.runtime.llvm.compile_module` through the cache; raises the same errors."""
    cache = object_cache()
    if cache is None:
        return llvm.compile_module(ir_text, cpu, opt, times=times)
    key = object_key(ir_text, cpu, opt)
    object_code = cache.get(key)
    if object_code is None:
        object_code = llvm.compile_module(ir_text, cpu, opt, times=times)
        cache.put(key, object_code)
    return object_code


def object_key(
    ir_text: str, cpu: HostFeatures, opt: llvm.OptLevel | llvm.CompileOptions = llvm.OptLevel.O1
) -> str:
    """The SHA-256, in hexadecimal, of everything that decides the object code."""
    options = opt if isinstance(opt, llvm.CompileOptions) else llvm.CompileOptions(passes=opt)
    parts = (
        f"format {FORMAT}",
        f"llvm {llvm.llvm_version()}",
        f"{cpu.triple} {cpu.architecture} {cpu.feature_string}",
        options.key,
        ir_text,
    )
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


_caches: dict[tuple[Path, int], ObjectCache] = {}
_caches_lock = threading.Lock()


def _pack(object_code: bytes) -> bytes:
    """Magic, length, SHA-256, object code."""
    length = len(object_code).to_bytes(8, "little")
    return _MAGIC + length + hashlib.sha256(object_code).digest() + object_code


def _unpack(data: bytes) -> bytes | None:
    """The object code of a whole and undamaged entry, else None."""
    body = data[_HEADER_BYTES:]
    length = int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 8], "little")
    digest = data[_HEADER_BYTES - _DIGEST_BYTES : _HEADER_BYTES]
    whole = data.startswith(_MAGIC) and len(data) >= _HEADER_BYTES and len(body) == length
    return body if whole and hashlib.sha256(body).digest() == digest else None
