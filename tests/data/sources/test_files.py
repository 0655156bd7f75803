import os

import pytest

from memjax.data.sources.files import find_files
from memjax.errors import DataError


@pytest.fixture
def tree(tmp_path):
    for name in (
        ".texts/f.txt",
        "sub/.copies/c.jsonl",
        "._b.jsonl",
        "b.jsonl",
        "a.jsonl.gz",
        "sub/c.jsonl",
        "sub/d.txt",
        "e.parquet",
        "README",
        ".cache/x.lock",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "source", "names"),
    [
        (".", "files", ["a.jsonl.gz", "b.jsonl", "e.parquet", "sub/c.jsonl", "sub/d.txt"]),
        (".", "jsonl", ["a.jsonl.gz", "b.jsonl", "e.parquet", "sub/c.jsonl"]),
        (".", "text", ["e.parquet", "sub/d.txt"]),
        ("*.jsonl*", "files", ["a.jsonl.gz", "b.jsonl"]),
        ("**/*.jsonl", "files", ["b.jsonl", "sub/c.jsonl"]),
        ("READM?", "text", ["README"]),
        ("README", "jsonl", ["README"]),
    ],
)
def test_folders_and_globs_are_read_in_sorted_order(tree, path, source, names):
    found = find_files(str(tree / path), source, "data.path")
    assert [file.path.relative_to(tree).as_posix() for file in found] == names
    assert [file.is_random_access for file in found] == [not n.endswith((".gz", ".parquet")) for n in names]


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("none.jsonl", "files", "no such file; set data.path"),
        ("none*", "files", "the glob finds nothing; set data.path"),
        ("README", "files", r"the suffix does not say what the file is; name it \.jsonl, .*, or set the source"),
        ("sub/../.cache", "files", r"holds no file that ends in \.jsonl, .*\.parquet.*a glob$"),
        ("sub/../.texts", "jsonl", r"holds no file that ends in \.jsonl, .*; source=files reads those that it holds$"),
    ],
)
def test_what_cannot_be_found_is_refused(tree, path, source, message):
    with pytest.raises(DataError, match=message):
        find_files(str(tree / path), source, "data.path")


def test_a_pipe_is_refused_as_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe: is a pipe or a device, which cannot be read twice; save"):
        find_files(str(tmp_path / "pipe"), "text", "--text")


def test_a_folder_of_hugging_faces_datasets_is_its_arrow_files(tmp_path):
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        (tmp_path / name).touch()
    (file,) = find_files(str(tmp_path), "files", "data.path")
    assert file.format == "arrow"


def test_splits_of_a_data_set_are_not_read_together(tmp_path):
    for name in ("dataset_dict.json", "train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"holds the splits of a data set; set data.path to one of them, as .*/train"):
        find_files(str(tmp_path), "files", "data.path")
    assert len(find_files(str(tmp_path / "test"), "files", "data.path")) == 1


def test_packed_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet.gz").touch()
    with pytest.raises(DataError, match="compressed in themselves; unpack it"):
        find_files(str(tmp_path / "a.parquet.gz"), "files", "data.path")
