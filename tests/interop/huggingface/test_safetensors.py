"""Broken, lying and sharded files; headers are made by hand."""

import json
import pathlib
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from limits import files_of_at_most
from memjax.checkpoint import CheckpointError
from memjax.interop.huggingface.safetensors import TensorToWrite, open_tensors, write_tensors

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def entry(start: int, end: int, shape=(2,)) -> dict:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


def write_raw(path: pathlib.Path, header: dict | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def write_shards(folder: pathlib.Path, **weight_map) -> None:
    """Writes tensor a to the first file, b to the second, and an index with the given entries."""
    save_file({"a": np.ones(2, np.float32)}, folder / ONE)
    save_file({"b": np.zeros(2, np.float32)}, folder / TWO)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": ONE, "b": TWO} | weight_map}))


def refused(folder: pathlib.Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message), open_tensors(folder):
        pass


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), None),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), None),
        ({"a": entry(0, 8), "b": entry(16, 24)}, bytes(24), None),
        ({"a": entry(0, 8)}, bytes(12), None),
        ({"a": entry(0, 8)}, bytes(4), None),
        ({"a": entry(0, 8, (3,))}, bytes(8), None),
        ({"a": entry(0, 8, (-2,))}, bytes(8), None),
        ({"a": entry(0, 8)}, bytes(8), 1 << 40),
        ({"a": entry(0, 8)}, bytes(8), 200_000_000),
        (b"[]", b"", None),
        (b'{"a": ' + b"[" * 10_000, b"", None),
        (b"", b"", 0),
    ],
    ids=[
        "same bytes",
        "overlap",
        "hole",
        "rest",
        "too short",
        "other shape",
        "negative",
        "longer than the file",
        "too long",
        "list",
        "deep",
        "empty",
    ],
)
def test_a_header_that_lies_is_refused(header, data, length, tmp_path):
    write_raw(tmp_path / "model.safetensors", header, data, length)
    refused(tmp_path, "model.safetensors: is not a valid safetensors file")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../other/model.safetensors", "must be the name of a file in this folder, not a path"),
        ("/etc/x.safetensors", "must be the name of a file in this folder, not a path"),
        ("missing.safetensors", "missing.safetensors: is missing, or not a file"),
        ("weights.bin", r"weight_map\['a'\]='weights.bin' must name a .safetensors file"),
        (7, r"weight_map\['a'\]=7 must name a .safetensors file"),
    ],
)
def test_an_index_that_names_another_file_is_refused(file, message, tmp_path):
    write_shards(tmp_path, a=file)
    refused(tmp_path, message)


def test_an_index_may_leave_tensors_out_but_not_name_another_of_its_files(tmp_path):
    write_shards(tmp_path, c=ONE)
    save_file({"a": np.ones(2, np.float32), "d": np.ones(1, np.float32)}, tmp_path / ONE)
    with open_tensors(tmp_path) as files:
        assert sorted(files.tensors) == ["a", "b", "d"]
    write_shards(tmp_path, c=ONE, a=TWO)
    refused(tmp_path, f"tensor 'a' is in {ONE}, the index says {TWO}")
    write_shards(tmp_path)
    save_file({"a": np.ones(2, np.float32), "b": np.ones(1, np.float32)}, tmp_path / ONE)
    refused(tmp_path, "tensor 'b' is in model-00001-of-00002.safetensors too")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map_is_refused(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refused(tmp_path, "weight_map must name the file of each tensor")


def test_a_file_that_is_a_link_to_elsewhere_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "secret.safetensors")
    (folder / "model.safetensors").symlink_to("../secret.safetensors")
    refused(folder, "is a link that leads out of its folder")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_named_and_not_opened(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(tmp_path, f"its weights are pickles \\({name}\\), which can run any code")


def test_a_folder_without_weights_says_what_is_missing(tmp_path):
    refused(tmp_path, "there is neither model.safetensors nor model.safetensors.index.json")
    refused(tmp_path / "nowhere", "there is no such folder; name the folder of a downloaded model$")
    refused(pathlib.Path("org/some-1.5"), r"`hf download org/some-1\.5 --local-dir some-1\.5`")


@pytest.mark.parametrize(("max_bytes", "num_files"), [(1000, 1), (40, 2), (1, 3)])
def test_tensors_are_cut_into_files_of_at_most_a_size(max_bytes, num_files, tmp_path):
    arrays = {name: np.full((2, 2), i, np.float32) for i, name in enumerate("cab")}
    made = []

    def make(name: str) -> np.ndarray:
        made.append(name)
        return arrays[name].T

    tensors = [TensorToWrite(name, (2, 2), np.dtype(np.float32), lambda name=name: make(name)) for name in arrays]
    write_tensors(tmp_path, tensors, max_bytes=max_bytes)
    assert made == list("cab")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    assert all(sum(array.nbytes for array in load_file(file).values()) <= max(max_bytes, 16) for file in files)
    with open_tensors(tmp_path) as found:
        assert {name: tensor.shape for name, tensor in found.tensors.items()} == dict.fromkeys("abc", (2, 2))
        for name, array in arrays.items():
            np.testing.assert_array_equal(found.read(name), array)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_single_shard_needs_no_index(with_index, tmp_path):
    name = "model-00001-of-00001.safetensors"
    save_file({"a": np.ones(2, np.float32)}, tmp_path / name)
    if with_index:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with open_tensors(tmp_path) as files:
        assert list(files.tensors) == ["a"]


def test_files_get_the_permissions_that_open_would_give_them(tmp_path):
    (tmp_path / "ordinary").touch()
    tensor = TensorToWrite("a", (2,), np.dtype(np.float32), lambda: np.ones(2, np.float32))
    write_tensors(tmp_path, [tensor], max_bytes=100)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_disk_that_fills_up_is_an_error_of_the_system(tmp_path):
    tensor = TensorToWrite("weight", (4096,), np.dtype(np.float32), lambda: np.zeros(4096, np.float32))
    with files_of_at_most(4096), pytest.raises(OSError, match=rf"{tmp_path}/model.safetensors: .*File too large"):
        write_tensors(tmp_path, [tensor], max_bytes=1 << 20)
