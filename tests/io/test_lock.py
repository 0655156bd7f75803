"""Locks have one holder, are reported to others, end with their process, and are never written through a link."""

import contextlib
import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from memjax.io.lock import Locked, locked

ROOT = pathlib.Path(__file__).parents[2]

HOLDER = """
import os, pathlib, sys, time
from memjax.io.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    if "fork" in sys.argv and os.fork() > 0:
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held_elsewhere(tmp_path):
    """held_elsewhere(path, *words): a process that holds the lock; it and its forks end with the test."""
    processes = []

    def start(path: pathlib.Path, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(path), *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def take(path: pathlib.Path) -> None:
    with locked(path):
        pass


@pytest.mark.parametrize("words", [(), ("fork",)])
def test_the_holder_is_named_and_its_death_frees_the_lock_even_if_a_process_that_it_forked_lives(
    held_elsewhere, tmp_path, words
):
    path = tmp_path / "lock"
    holder = held_elsewhere(path, *words)
    with pytest.raises(Locked, match=rf"process {holder.pid} on {os.uname().nodename} since \d{{4}}-"):
        take(path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert path.exists(), "killed, it could not tidy up"
    take(path)
    assert not path.exists()


def test_another_thread_is_another_holder_and_waiting_ends_when_the_lock_is_free(tmp_path):
    waited, done = [], threading.Event()

    def wait() -> None:
        with locked(tmp_path / "lock", on_wait=waited.append):
            done.set()

    thread = threading.Thread(target=wait)
    with locked(tmp_path / "lock"):
        thread.start()
        while not waited:
            assert thread.is_alive()
        assert not done.is_set()
    thread.join(10)
    assert done.is_set()
    assert str(os.getpid()) in waited[0]


def test_files_made_for_the_lock_are_removed_if_they_stay_empty(tmp_path):
    (tmp_path / "there").mkdir()
    take(tmp_path / "there/lock")
    take(tmp_path / "a/b/lock")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with locked(tmp_path / "a/b/lock"):
        (tmp_path / "a/kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_concurrent_holders_never_overlap(tmp_path):
    path, inside, worst = tmp_path / "folder/lock", [], []

    def work() -> None:
        for _ in range(50):
            with locked(path, on_wait=lambda _: None):
                inside.append(1)
                worst.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(worst) == 200
    assert max(worst) == 1


def test_links_and_other_things_in_its_place_are_refused_and_not_written(tmp_path):
    theirs, path = tmp_path / "theirs", tmp_path / "lock"
    theirs.write_text("theirs")
    for make in (path.symlink_to, path.hardlink_to):
        make(theirs)
        with pytest.raises(OSError, match="remove it"):
            take(path)
        path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="remove it"):
        take(path)
    assert theirs.read_text() == "theirs"


def test_a_folder_that_cannot_hold_files_is_an_error():
    with pytest.raises(FileNotFoundError, match="/proc/memjax"):
        take(pathlib.Path("/proc/memjax"))


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    take(tmp_path / "lock")
    assert f"{tmp_path}: its file system has no locks" in capsys.readouterr().out
