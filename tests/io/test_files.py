import os
import pathlib

import pytest

from memjax.io.files import check_inside, naming, read_document, read_text, write_atomic, written_lines


def test_replaces_the_content_and_leaves_no_other_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_atomic(path, "one")
    write_atomic(path, b"two\xff")
    assert path.read_bytes() == b"two\xff"
    assert os.listdir(path.parent) == ["a.json"]


def test_a_new_file_has_the_mode_that_open_gives(tmp_path: pathlib.Path) -> None:
    (tmp_path / "like").write_text("x")
    write_atomic(tmp_path / "new", "x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "like").stat().st_mode


def test_equal_content_is_not_written_again(tmp_path: pathlib.Path) -> None:
    path = write_atomic(tmp_path / "a", "same")
    before = path.stat().st_ino
    write_atomic(path, "same")
    assert path.stat().st_ino == before


def test_a_link_is_replaced_and_its_target_untouched(tmp_path: pathlib.Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "a").symlink_to(tmp_path / "outside")
    write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "outside").read_text() == "mine"
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "a").read_text() == "new"


def test_a_failed_write_keeps_the_old_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomic(tmp_path / "a", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_pipe_or_a_device_is_not_replaced(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with pytest.raises(OSError, match=f"not a regular file: '.*{name}'"):
            write_atomic(tmp_path / name, "new")
    assert (tmp_path / "null").is_symlink()
    assert (tmp_path / "pipe").is_fifo()


def test_errors_name_the_requested_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / ("n" * 255)
    with pytest.raises(OSError, match=f"File name too long: '{path}'"):
        write_atomic(path, "new")


def test_errors_of_an_open_file_name_it(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: 'a'"), naming("a"), open("/dev/full", "w") as full:
        print("x", file=full, flush=True)
    with pytest.raises(FileNotFoundError, match=r"b'"), naming(tmp_path / "a"):
        (tmp_path / "b").read_text()
    with pytest.raises(BlockingIOError) as caught, naming("a"):
        raise BlockingIOError
    assert caught.value.filename is None


def test_lines_are_in_the_file_at_once_and_only_errors_of_the_file_name_it(tmp_path: pathlib.Path) -> None:
    with written_lines(tmp_path / "a") as write:
        write("ü")
        assert (tmp_path / "a").read_text(encoding="utf-8") == "ü\n"
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"), written_lines("/dev/full") as write:
        write("x")
    with pytest.raises(ConnectionRefusedError) as caught, written_lines(tmp_path / "a"):
        raise ConnectionRefusedError(111, "Connection refused")
    assert caught.value.filename is None


def test_pipes_devices_and_folders_are_not_read(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "itself").symlink_to("itself")
    for name, message in (("pipe", "not a regular file"), ("endless", "not a regular file"), ("itself", "symbolic")):
        with pytest.raises(OSError, match=message):
            read_document(tmp_path / name)
    with pytest.raises(IsADirectoryError) as caught:
        read_document(tmp_path)
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_document(tmp_path / "missing")


def test_only_so_many_bytes_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a"
    path.write_text("é" * 5)
    assert read_text(path, 10) == read_text(path, None) == "é" * 5
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_document(path, 9)


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
def test_what_a_shell_pipes_is_read_to_its_end(folder: str) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"train: {}")
    os.close(writing)
    assert read_text(f"{folder}/{reading}") == "train: {}"
    os.close(reading)


def test_a_link_out_of_a_folder_is_refused_and_one_within_it_is_not(tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    (run / "there").mkdir(parents=True)
    for name, target in (
        ("out", tmp_path),
        ("beside", tmp_path / "run2"),
        ("within", run / "there"),
        ("round", "round"),
    ):
        (run / name).symlink_to(target)
    for name in ("within", "there", "there/deep", "new", "round"):
        check_inside(run / name, run)
    for name in ("out", "beside", "out/deep"):
        with pytest.raises(OSError, match=r"leads out of its folder, to .*; move that folder here"):
            check_inside(run / name, run)
