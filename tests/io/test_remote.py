"""Files of other places by way of local copies: in the memory of the process, and behind a web server."""

import functools
import http.server
import pathlib
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

from memjax.io import paths, remote
from memjax.io.paths import is_remote, readable_path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memjax" / "fetched"


@pytest.fixture
def bucket() -> str:
    """An empty folder in memory."""
    return f"memory://{uuid.uuid4().hex}"


def write(address: str, content: str) -> None:
    file: Any
    with fsspec.open(address, "w") as file:
        file.write(content)


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[str, pathlib.Path, list[str]]]:
    """A web server of a folder: its address, the folder, and the paths of files that it was asked for."""
    asked, folder = [], tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, format: str, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder, asked
        running.shutdown()
        thread.join()


def contents(folder: pathlib.Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_a_folder_and_a_glob_are_copied(bucket):
    for name in ("a.jsonl", "deep/b.jsonl", "deep/c.txt"):
        write(f"{bucket}/{name}", f"of {name}")
    assert remote.fetch(f"{bucket}/a.jsonl").read_text() == "of a.jsonl"
    everything = {name: f"of {name}" for name in ("a.jsonl", "deep/b.jsonl", "deep/c.txt")}
    assert contents(remote.fetch(bucket)) == everything
    assert contents(remote.fetch(f"{bucket}/deep/*.jsonl")) == {"b.jsonl": "of deep/b.jsonl"}
    assert contents(remote.fetch(bucket, lambda names: [name for name in names if "b" in name])) == {
        "deep/b.jsonl": "of deep/b.jsonl"
    }
    with pytest.raises(FileNotFoundError):
        remote.fetch(f"{bucket}/none")
    with pytest.raises(FileNotFoundError):
        remote.fetch(f"{bucket}/*.xz")


def test_what_has_changed_or_gone_there_changes_and_goes_here(bucket):
    write(f"{bucket}/a", "one")
    write(f"{bucket}/b", "two")
    remote.fetch(bucket)
    write(f"{bucket}/a", "eno")
    fsspec.filesystem("memory").rm(f"{bucket}/b")
    assert contents(remote.fetch(bucket)) == {"a": "eno"}


def test_a_file_of_a_web_server_is_read_once(server):
    address, folder, asked = server
    (folder / "a.jsonl").write_text("{}")
    for _ in range(2):
        assert remote.fetch(f"{address}/a.jsonl").read_text() == "{}"
    assert asked.count("/a.jsonl") == 1
    with pytest.raises(FileNotFoundError):
        remote.fetch(f"{address}/b.jsonl")


def test_a_folder_becomes_its_copy_and_a_step_is_complete_last(bucket, tmp_path, monkeypatch):
    run = tmp_path / "run"
    step = lambda number: {f"checkpoints/{number}/params/data": "p", f"checkpoints/{number}/_CHECKPOINT_METADATA": "m"}
    left_out = {"prepared/x": "x", "checkpoints/9.orbax-checkpoint-tmp/params/y": "y", ".lock": "l"}

    def make(files: dict[str, str]) -> None:
        for name, content in files.items():
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_text(content)

    make({"config.yaml": "one"} | step(1) | step(2) | left_out)
    order = []
    file_system = type(fsspec.filesystem("memory"))
    put = file_system.put_file
    monkeypatch.setattr(
        file_system, "put_file", lambda self, *where, **how: (order.append(where[1]), put(self, *where))
    )
    remote.push(run, bucket)
    assert all("_CHECKPOINT_METADATA" in name for name in order[-2:])
    there = lambda: {name.partition(bucket.removeprefix("memory://"))[2][1:] for name in file_system().find(bucket)}
    assert there() == {"config.yaml", *step(1), *step(2)}

    make({"config.yaml": "two"} | step(3))
    for name in step(1):
        (run / name).unlink()
    order.clear()
    remote.push(run, bucket)
    assert there() == {"config.yaml", *step(2), *step(3)}
    assert not any("checkpoints/2/" in name for name in order), "a step is never changed"
    fetched = remote.fetch_run(bucket)
    assert contents(fetched) == {"config.yaml": "two"} | step(3)
    assert contents(remote.fetch_run(bucket, 2)) == {"config.yaml": "two"} | step(2)
    assert contents(remote.fetch_run(bucket, "best")) == {"config.yaml": "two"} | step(2) | step(3)
    file_system().rm(f"{bucket}/checkpoints/3/_CHECKPOINT_METADATA")
    assert contents(remote.fetch_run(bucket)) == {"config.yaml": "two"} | step(2), "half of a step is none"


def test_addresses_are_told_from_paths_and_need_their_packages(monkeypatch):
    assert [*map(is_remote, ("gs://b/x", "http://h/x", "a:b", "/gs://x", "hdfs://x"))] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert readable_path("http://host/x.jsonl", "data.path") == "http://host/x.jsonl"
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None if name == "s3fs" else object())
    with pytest.raises(
        ValueError, match=r"^data\.path=s3://b must be a path on this machine, or the package s3fs must be there"
    ):
        readable_path("s3://b", "data.path")
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"must be a path on this machine, or the package fsspec .*memjax\[remote\]"):
        readable_path("http://host/x", "data.path")
    with pytest.raises(ValueError, match="must be a path on this machine; mount"):
        readable_path("hdfs://x", "data.path")
