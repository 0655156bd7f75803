"""Remote files are read through local copies; here fsspec's in-memory file system and a web server."""

import functools
import http.server
import pathlib
import shutil
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
    """An empty folder in fsspec's in-memory file system."""
    return f"memory://{uuid.uuid4().hex}"


def write(address: str, content: str) -> None:
    file: Any
    with fsspec.open(address, "w") as file:
        file.write(content)


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[str, pathlib.Path, list[str]]]:
    """Serves a folder over HTTP; yields the address, the folder and the paths of the requested files."""
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


def test_remote_changes_and_deletions_reach_the_copy(bucket):
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
    assert order[0].endswith("/mirror_id")
    assert all("_CHECKPOINT_METADATA" in name for name in order[-2:])
    found = lambda: {name.partition(bucket.removeprefix("memory://"))[2][1:] for name in file_system().find(bucket)}
    there = lambda: found() - {"mirror_id"}
    assert there() == {"config.yaml", *step(1), *step(2)}

    make({"config.yaml": "two"} | step(3))
    for name in step(1):
        (run / name).unlink()
    order.clear()
    remote.push(run, bucket)
    assert there() == {"config.yaml", *step(2), *step(3)}
    assert not any("checkpoints/2/" in name for name in order), "a step is sent once"
    always = {"config.yaml": "two", "mirror_id": (run / "mirror_id").read_text()}
    fetched = remote.fetch_run(bucket)
    assert contents(fetched) == always | step(3)
    assert contents(remote.fetch_run(bucket, 2)) == always | step(2)
    assert contents(remote.fetch_run(bucket, "best")) == always | step(2) | step(3)
    file_system().rm(f"{bucket}/checkpoints/3/_CHECKPOINT_METADATA")
    assert contents(remote.fetch_run(bucket)) == always | step(2), "an incomplete step does not count"


def make_run(folder: pathlib.Path, step: int, *, saved: str = "m", params: str = "p") -> pathlib.Path:
    place = folder / "checkpoints" / str(step)
    (place / "params").mkdir(parents=True, exist_ok=True)
    (place / "params" / "data").write_text(params)
    (place / "_CHECKPOINT_METADATA").write_text(saved)
    return folder


def test_a_mirror_belongs_to_one_run(bucket, tmp_path):
    mine, other = make_run(tmp_path / "mine", 1), make_run(tmp_path / "other", 2)
    remote.push(mine, bucket)
    before = contents(remote.fetch(bucket))
    with pytest.raises(ValueError, match=r"mirror of another run .*name another address.*copy all of .* into run\.dir"):
        remote.push(other, bucket)
    assert contents(remote.fetch(bucket)) == before
    shutil.copytree(remote.fetch(bucket), tmp_path / "back")
    assert remote.why_not_mirror(tmp_path / "back", bucket) is None
    write(f"{bucket}-data/train.jsonl", "{}")
    with pytest.raises(ValueError, match="holds files that are not a mirror's; name another address"):
        remote.push(mine, f"{bucket}-data")
    write(f"{bucket}-hub/.gitattributes", "")
    remote.push(mine, f"{bucket}-hub")


def test_a_run_without_steps_removes_none_from_its_mirror(bucket, tmp_path):
    run = make_run(tmp_path / "run", 1)
    remote.push(run, bucket)
    shutil.rmtree(run / "checkpoints")
    remote.push(run, bucket)
    assert contents(remote.fetch(bucket))["checkpoints/1/params/data"] == "p"


def test_another_step_of_the_same_number_replaces_the_first(bucket, tmp_path):
    run = make_run(tmp_path / "run", 1)
    remote.push(run, bucket)
    remote.push(make_run(run, 1, params="longer"), bucket)
    assert contents(remote.fetch(bucket))["checkpoints/1/params/data"] == "longer"
    (run / "checkpoints/1/params/data").unlink()
    make_run(run, 1, saved="M", params="LONGER")
    remote.push(run, bucket)
    assert contents(remote.fetch(bucket))["checkpoints/1/params/data"] == "LONGER"


def test_results_written_into_a_fetched_run_are_kept(bucket, tmp_path):
    remote.push(make_run(tmp_path / "run", 1), bucket)
    fetched = remote.fetch_run(bucket)
    for name in ("evals/a.json", "prepared/b", ".x.part", "stale"):
        (fetched / name).parent.mkdir(exist_ok=True)
        (fetched / name).write_text("of this machine")
    remote.fetch_run(bucket)
    kept = [name for name, content in contents(fetched).items() if content == "of this machine"]
    assert sorted(kept) == [".x.part", "evals/a.json", "prepared/b"]


def test_a_missing_package_is_named_when_an_address_is_read(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None if name == "gcsfs" else object())
    with pytest.raises(
        ModuleNotFoundError, match=r"gs:// needs the package gcsfs, which is missing; pip install 'memjax\[remote\]'"
    ):
        remote.fetch("gs://b/x")


def test_addresses_are_distinguished_from_paths_and_need_their_packages(monkeypatch):
    assert [*map(is_remote, ("gs://b/x", "http://h/x", "a:b", "/gs://x", "hdfs://x"))] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert readable_path("http://host/x.jsonl", "data.path") == "http://host/x.jsonl"
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None if name == "s3fs" else object())
    with pytest.raises(ValueError, match=r"^data\.path=s3://b needs the package s3fs to read s3:"):
        readable_path("s3://b", "data.path")
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package fsspec to read .*memjax\[remote\]"):
        readable_path("http://host/x", "data.path")
    with pytest.raises(ValueError, match="must be a path on this machine; mount"):
        readable_path("hdfs://x", "data.path")
