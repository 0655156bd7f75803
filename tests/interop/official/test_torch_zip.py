"""Files of torch.save are read without torch, and nothing in them is ever executed."""

import builtins
import os
import pathlib
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest

from memjax.checkpoint import CheckpointError
from memjax.interop.official.lazy_array import LazyArray
from memjax.interop.official.torch_zip import read_torch_zip

FIXTURE = pathlib.Path(__file__).parents[2] / "fixtures/official"


class Op:
    """A pickle written by hand, the way torch writes it."""

    @staticmethod
    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    @staticmethod
    def numbers(*values: int) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    @classmethod
    def tensor(cls, offset=0, shape=(2, 3), strides=(3, 1), size=6, key="0", kind="FloatStorage") -> bytes:
        storage = b"(" + cls.text("storage") + f"ctorch\n{kind}\n".encode() + cls.text(key) + cls.text("cpu")
        storage += b"J" + struct.pack("<i", size) + b"tQ"
        rest = cls.numbers(offset)[1:-1] + cls.numbers(*shape) + cls.numbers(*strides)
        hooks = b"ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"\x89" + hooks + b"tR"

    @classmethod
    def state(cls, **tensors: bytes) -> bytes:
        items = b"".join(cls.text(name) + tensor for name, tensor in tensors.items())
        return b"\x80\x02}(" + items + b"u."


def archive(path: pathlib.Path, pickled: bytes, data: bytes = bytes(24), **entries: bytes) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", pickled)
        file.writestr("model/data/0", data)
        for name, content in entries.items():
            file.writestr(f"model/{name}", content)
    return path


def test_a_checkpoint_of_torch_is_read_number_for_number():
    found = read_torch_zip(FIXTURE / "consolidated.pth")
    assert list(found) == ["model", "optim"]
    assert found["optim"]["param_groups"] == [{"lr": 1e-3}]
    assert np.asarray(found["optim"]["state"][0]["step"]) == 3
    model, expected = found["model"], np.load(FIXTURE / "expected.npz")
    assert set(model) == set(expected)
    for name, array in model.items():
        assert isinstance(array, LazyArray)
        assert array.shape == expected[name].shape
        np.testing.assert_array_equal(np.asarray(array, np.float32), expected[name])
    assert model["layers.1.feed_forward.values.weight"].dtype.name == "bfloat16"
    assert model["norm.weight"].dtype == np.float32


def test_views_are_cut_out_of_their_storage(tmp_path):
    numbers = np.arange(6, dtype=np.float32)
    view = Op.tensor(offset=1, shape=(2, 2), strides=(1, 3))
    found = read_torch_zip(archive(tmp_path / "x.pth", Op.state(view=view), numbers.tobytes()))
    np.testing.assert_array_equal(np.asarray(found["view"]), [[1, 4], [2, 5]])


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_nothing_that_a_pickle_asks_for_is_run(tmp_path, monkeypatch):
    traces = [tmp_path / name for name in ("system", "eval", "import")]
    (tmp_path / "evil_module.py").write_text(f"open({str(traces[2])!r}, 'w')\ndef f(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    attacks = {
        "posix.system": pickle.dumps({"a": Evil(os.system, f"touch {traces[0]}")}, protocol=2),
        "__builtin__.eval": pickle.dumps({"a": Evil(builtins.eval, f"open({str(traces[1])!r}, 'w')")}, protocol=2),
        "evil_module.f": b"\x80\x02cevil_module\nf\n)R.",
        "INST": b"\x80\x02(ievil_module\nf\n.",
        "OBJ": b"\x80\x02(ccollections\nOrderedDict\no.",
        "FRAME": pickle.dumps(Evil(os.system, f"touch {traces[0]}"), protocol=4),
        "NEWOBJ": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "EXT1": b"\x80\x02\x82\x01.",
        "torch.load": b"\x80\x02ctorch\nload\n(X\x01\x00\x00\x00xtR.",
        "collections.OrderedDict": b"\x80\x02ccollections\nOrderedDict\n(" + Op.text("x") + b"tR.",
    }
    for named, pickled in attacks.items():
        with pytest.raises(CheckpointError, match="nothing was run") as error:
            read_torch_zip(archive(tmp_path / "x.pth", pickled))
        assert named in str(error.value)
    assert not any(trace.exists() for trace in traces)
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Op.tensor(shape=(2, 4)), "a tensor of shape [2, 4] reaches beyond its storage of 6 numbers"),
        (Op.tensor(offset=1), "reaches beyond"),
        (Op.tensor(shape=(1_000_000,), strides=(0,)), "reaches beyond"),
        (Op.tensor(strides=(3, -1)), "makes no sense"),
        (Op.tensor(size=7), "storage '0' should have 28 bytes, the archive has 24"),
        (Op.tensor(key="1"), "storage '1' should have 24 bytes, the archive has none"),
        (Op.tensor(key="../../secret"), "makes no sense"),
        (Op.tensor(kind="QInt8Storage"), "asks for torch.QInt8Storage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "makes no sense"),
        (b"N)R", "calls something that is not a name"),
        (b"h\x07", "makes no sense"),
    ],
)
def test_impossible_tensors_are_refused(tmp_path, tensor, message):
    with pytest.raises(CheckpointError) as error:
        read_torch_zip(archive(tmp_path / "x.pth", Op.state(a=tensor)))
    assert message in str(error.value)
    assert str(tmp_path / "x.pth") in str(error.value)


def test_anything_but_a_torch_archive_is_refused(tmp_path):
    path = tmp_path / "x.pth"

    def message() -> str:
        with pytest.raises(CheckpointError) as error:
            read_torch_zip(path)
        return str(error.value)

    assert "there is no such file" in message()
    path.write_bytes(pickle.dumps({}))
    assert "is not a complete zip archive" in message()
    path.write_bytes((FIXTURE / "consolidated.pth").read_bytes()[:-100])
    assert "is not a complete zip archive" in message()
    archive(path, Op.state(), byteorder=b"big")
    assert "big-endian" in message()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model/data.pkl", Op.state())
    assert "compressed" in message()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/other.pkl", Op.state())
    assert "holds 0 entries <name>/data.pkl" in message()
    archive(path, b"\x80\x02}")
    assert "makes no sense" in message()


def test_a_flipped_bit_is_found_when_the_tensor_is_read(tmp_path):
    numbers = np.arange(6, dtype=np.float32).tobytes()
    path = archive(tmp_path / "x.pth", Op.state(a=Op.tensor()), numbers)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(numbers, numbers[:-1] + b"\x41"))
    array = read_torch_zip(path)["a"]
    with pytest.raises(CheckpointError, match="model/data/0 cannot be read"):
        np.asarray(array)


_TWICE = b"q\x00h\x00\x86"
"""A tuple that holds the top of the stack twice."""


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (b"\x80\x02})K\x01s.", "has a tuple for the key of a dict, must have a str or an int"),
        (b"\x80\x02}NK\x01s.", "has a NoneType for the key of a dict"),
        (b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.", "nests containers more than 50 deep"),
        (b"\x80\x02})" + b"\x85" * 10_000 + b"K\x01s.", "nests containers more than 50 deep"),
        (b"\x80\x02})" + _TWICE * 40 + b"K\x01s.", "has a tuple for the key of a dict"),
        (b"\x80\x02)" + _TWICE * 40 + b"Q.", "makes no sense"),
        (b"\x80\x02" + b"]" * 200 + b"a" * 199 + b".", "nests containers more than 50 deep"),
        (b"\x80\x02" + b"}K\x00" * 200 + b"N" + b"s" * 200 + b".", "nests containers more than 50 deep"),
        (b"\x80\x02]q\x00h\x00a.", "holds itself"),
        (b"\x80\x02c" + b"x" * 10_000_000 + b"\ny\n.", "asks for xxx"),
    ],
    ids=["tuple", "none", "deep", "less deep", "doubled", "doubled storage", "lists", "dicts", "itself", "long name"],
)
def test_descriptions_that_would_exhaust_the_stack_or_the_memory_are_refused(description, message, tmp_path):
    with pytest.raises(CheckpointError) as error:
        read_torch_zip(archive(tmp_path / "x.pth", description))
    assert message in str(error.value)
    assert len(str(error.value)) < 1000
