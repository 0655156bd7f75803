"""Files must lie inside their folder, and folders appear complete or not at all."""

import itertools
import os
import pathlib

import pytest

from memjax.checkpoint import CheckpointError
from memjax.errors import ConfigError
from memjax.interop.folders import file_in, read_json
from memjax.io.files import MAX_BYTES
from memjax.runs import files
from memjax.runs.files import check_new, written_whole


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with written_whole(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "file"]


def write_and_fail(folder, error: Exception) -> None:
    with written_whole(folder) as unfinished:
        (unfinished / "file").write_text("x")
        raise error


def test_after_an_error_nothing_is_left(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_and_fail(tmp_path / "out", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match=r"out: cannot be written .*No space left.*is the disk full"):
        write_and_fail(tmp_path / "out", OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_requested_folder(tmp_path):
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/out/checkpoints: full$"):
        write_and_fail(tmp_path / "out", CheckpointError(f"{tmp_path}/.out.unfinished/checkpoints: full"))


def test_what_threads_write_after_an_error_is_removed_too(tmp_path, monkeypatch):
    late = iter(range(3))

    def write_late(_):
        for number in itertools.islice(late, 1):
            (tmp_path / ".out.unfinished" / f"late{number}").mkdir(parents=True)

    monkeypatch.setattr(files.time, "sleep", write_late)
    with pytest.raises(CheckpointError):
        write_and_fail(tmp_path / "out", OSError(28, "No space left on device"))
    assert next(late, None) is None
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_has_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "half").write_text("x")
    (tmp_path / ".out.lock").write_text("")
    with written_whole(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_two_processes_do_not_write_one_folder(tmp_path):
    with written_whole(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(ConfigError, match=rf"out is being written by process {os.getpid()} on .*; name another"):
            write_and_fail(tmp_path / "out", ZeroDivisionError())
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_only_an_empty_folder_is_accepted(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    with written_whole(tmp_path / "empty") as folder:
        (folder / "new").write_text("x")
    assert (tmp_path / "empty" / "new").exists()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="already exists and is not empty"):
            check_new(taken)


def test_the_folder_is_written_where_a_link_points(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, place in (("link", "empty"), ("broken", "new")):
        (tmp_path / name).symlink_to(place)
        with written_whole(tmp_path / name) as folder:
            (folder / "file").write_text("x")
        assert (tmp_path / place / "file").read_text() == "x"
        assert (tmp_path / name).is_symlink()


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        ConfigError, match=r"^\. is the current folder, which no new folder can replace; name a folder in"
    ):
        check_new(".")
    monkeypatch.setattr(pathlib.Path, "is_mount", lambda path: True)
    with pytest.raises(ConfigError, match="here is a mount point"):
        check_new(tmp_path / "here")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/file", "..", ".", "", "a\\b", "a\0b"])
def test_a_name_that_is_a_path_is_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match="must be the name of a file in this folder, not a path"):
        file_in(tmp_path, name)


def test_a_link_that_points_outside_is_refused_and_one_inside_is_not(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    (folder / "out").symlink_to("../secret")
    (folder / "real").write_text("r")
    (folder / "in").symlink_to("real")
    assert file_in(folder, "in").read_text() == "r"
    with pytest.raises(CheckpointError, match="is a link that leads out of its folder"):
        file_in(folder, "out")


def test_the_download_cache_keeps_its_links(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "digest").write_text("weights")
    (tmp_path / "secret").write_text("s")
    (snapshot / "good").symlink_to("../../blobs/digest")
    (snapshot / "bad").symlink_to("../../../secret")
    assert file_in(snapshot, "good").read_text() == "weights"
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        file_in(snapshot, "bad")


def test_anything_but_a_file_is_refused_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would block forever
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "nothing"):
        with pytest.raises(CheckpointError, match="is missing, or not a file"):
            file_in(tmp_path, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "cannot be read as JSON"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b"\xff{}", "cannot be read as JSON"),
        (b"[1]", "must hold a JSON object, not list"),
        (b'{"a":' * 100_000, "cannot be read as JSON"),
    ],
)
def test_anything_but_a_json_object_is_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match="more than 268,435,456 bytes"):
        read_json(tmp_path / "config.json")


def test_a_link_to_itself_is_missing(tmp_path):
    (tmp_path / "config.json").symlink_to("config.json")
    with pytest.raises(CheckpointError, match="is missing, or not a file"):
        file_in(tmp_path, "config.json")
