"""Tables in other formats and places are loaded block by block, kept in files, or refused with a reason."""

import ctypes
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memjax
from drawn import drawn
from memjax import convert, generate
from memjax.checkpoint import CheckpointError, Checkpoints
from memjax.config.memory import MemoryConfig, PEERConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.errors import ConfigError
from memjax.evaluation.recall import zero_tables
from memjax.io.remote import push
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts, split_decoder
from memjax.ops import host_memory
from memjax.ops.row_formats import formats
from memjax.ops.table import Table
from memjax.runs import table_files
from memjax.runs import tables as run_tables
from memjax.runs.layout import meta_document, params_to_tree
from memjax.runs.load import TableSettings
from memjax.runs.patches import edit
from memjax.runs.patches.applied import model_digest
from memjax.runs.patches.patch import Patch, RowChange, write_patch
from memjax.runs.quantize import quantize_run
from memjax.runs.saved import read_only_formats
from memjax.runs.settings import CheckpointSettings, InferenceSettings, loaded

TOKENS = jnp.asarray([[1, 5, 9, 200], [1, 8, 7, 6]])
CODED = ("int8", "float8_e4m3", "int4")


def run_config(table_dtype="float32") -> RunConfig:
    sizes = {"num_keys": 8, "num_heads": 2, "top_k": 4, "key_dim": 8, "table_dtype": table_dtype}
    memory = MemoryConfig(layers=(1,), value_dim=32, **sizes)
    experts = PEERConfig(layers=(0,), **sizes)
    return RunConfig(
        model=ModelConfig(dim=16, num_layers=2, num_heads=2, ffn_dim=32, vocab_size=259, memory=memory, peer=experts)
    )


forward = nnx.jit(lambda model, tokens: model(tokens))


def save(folder, table_dtype="float32") -> Decoder:
    """Saves a checkpoint as training does, with tables in several blocks."""
    run = run_config(table_dtype)
    model = drawn(run.model, seed=3)
    _, params, tables = split_decoder(model)
    with Checkpoints(folder / "checkpoints", block_bytes=1024) as checkpoints:
        items = {"params": params_to_tree(params), "tables": tables}
        checkpoints.save(3, items, {"meta": meta_document(run, ByteTokenizer(), step=3)})
    return model


def stored(model) -> Mapping[str, Any]:
    return split_decoder(model)[2]


def decoded(table):
    every = jnp.arange(table.shape[0])
    return np.asarray(Table.of(table).take(every, jnp.float32))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("saved", "device"),
        ("int4", "device"),
        ("int4", "host"),
        ("int8", "host"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("saved", "host"),
                ("float16", "device"),
                ("float16", "host"),
                ("int8", "device"),
                ("float8_e4m3", "device"),
                ("float8_e4m3", "host"),
            )
        ),
    ],
)
def test_tables_are_those_that_the_format_makes_of_the_saved_rows(tmp_path, name, place):
    # NumPy has no bfloat16, so host memory is compared as bits.
    table_dtype = "bfloat16" if place == "host" else "float32"
    original = save(tmp_path, table_dtype)
    found = memjax.load(tmp_path, table_format=None if name == "saved" else name, table_place=place)
    for pool, rows in stored(original).items():
        table = stored(found.model)[pool]
        row_format = formats.find(table_dtype if name == "saved" else name)
        np.testing.assert_array_equal(decoded(table), decoded(Table.encoded(rows, row_format)))
        if name != "saved" or place == "host":
            assert (table.format, table.place, table.dtype) == (row_format, place, rows.dtype)
    if name == "saved":
        np.testing.assert_array_equal(forward(found.model, TOKENS), forward(memjax.load(tmp_path).model, TOKENS))


def test_a_format_of_training_on_the_device_is_a_plain_array(tmp_path):
    save(tmp_path)
    for table in stored(memjax.load(tmp_path, table_format="bfloat16").model).values():
        assert isinstance(table, jax.Array)
        assert table.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saved", *CODED])
def test_files_of_a_quantized_run_hold_what_load_would_make(tmp_path, name, monkeypatch):
    monkeypatch.setattr(table_files, "_READ_BYTES", 300)
    save(tmp_path / "run")
    row_format = None if name == "saved" else formats.find(name)
    quantize_run(tmp_path / "run", tmp_path / "small", row_format)
    expected = memjax.load(tmp_path / "run", table_format=row_format)
    for place in ("device", "host"):
        found = memjax.load(tmp_path / "small", table_place=place)
        np.testing.assert_array_equal(forward(found.model, TOKENS), forward(expected.model, TOKENS))
    with pytest.raises(ConfigError, match="cannot be converted again"):
        memjax.load(tmp_path / "small", table_format="float32" if name != "saved" else "int8")
    with pytest.raises(CheckpointError, match="its tables are already in files"):
        quantize_run(tmp_path / "small", tmp_path / "smaller", row_format)


def test_a_quantized_run_names_its_source_from_wherever_it_is_read(tmp_path, monkeypatch):
    save(tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = f"memory://{tmp_path.name}/run"
    push(tmp_path / "run", address)
    for number, (source, name) in enumerate({"~/run": str(tmp_path / "run"), address: address}.items()):
        quantize_run(source, tmp_path / f"small{number}", formats.find("int8"))
        assert read_only_formats(tmp_path / f"small{number}") == ("int8", name)


def test_files_are_mapped_on_a_cpu_and_never_written(tmp_path):
    save(tmp_path / "run")
    quantize_run(tmp_path / "run", tmp_path / "small", formats.find("int8"))
    table = stored(memjax.load(tmp_path / "small", table_place="host").model)["shared"]
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if "shared.rows" in line]
    begins = [int(line.split("-")[0], 16) for line in mapped]
    assert table.rows.unsafe_buffer_pointer() in begins
    assert all("p " in line.split()[1] + " " for line in mapped)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["shorter", "another byte", "gone"])
def test_damaged_files_are_refused(tmp_path, damage):
    save(tmp_path / "run")
    quantize_run(tmp_path / "run", tmp_path / "small", formats.find("int8"))
    file = tmp_path / "small/tables/shared.rows"
    content = file.read_bytes()
    file.write_bytes(content[:-1] if damage == "shorter" else bytes([content[0] ^ 1]) + content[1:])
    if damage == "gone":
        file.unlink()
    message = {"shorter": "has 2047 bytes, not 2048", "another byte": "is damaged", "gone": "cannot be read"}[damage]
    for place in ("device", "host"):
        with pytest.raises(CheckpointError, match=rf"shared\.rows: {message}"):
            memjax.load(tmp_path / "small", table_place=place)


def test_damaged_rows_of_a_checkpoint_are_refused(tmp_path, monkeypatch):
    save(tmp_path)
    read = Checkpoints.read_rows
    index = json.loads((tmp_path / "checkpoints/3/digests/metadata").read_text())
    record = index["index"]["arrays"]["tables"]["shared"]
    assert len(list(read(Checkpoints(tmp_path / "checkpoints"), "tables", "shared", step=3))) > 1
    from memjax.checkpoint import restoring

    monkeypatch.setattr(restoring.RowsDigest, "hex", lambda _: "0" * 16)
    assert record["digest"] != "0" * 16
    with pytest.raises(CheckpointError, match="digest differs in"):
        memjax.load(tmp_path, table_format="int8")


@pytest.mark.slow
@pytest.mark.parametrize("name", CODED)
def test_tables_in_a_format_are_split_by_columns(tmp_path, name, mesh, monkeypatch):
    save(tmp_path)
    found: Any = formats.find(name)
    small = dataclasses.replace(found, group=4)
    monkeypatch.setattr(formats, "SMALLEST_GROUP", 4)
    expected = forward(memjax.load(tmp_path, table_format=small).model, TOKENS)
    with jax.set_mesh(mesh):
        model = memjax.load(tmp_path, table_format=small).model
        table = stored(model)["shared"]
        assert table.rows.sharding.spec == table.scales.sharding.spec == jax.P(None, "memory")
        got = forward(model, jnp.repeat(TOKENS, 4, axis=0))
        with pytest.raises(ConfigError, match="table_place=host is for one device"):
            memjax.load(tmp_path, table_place="host")
        with pytest.raises(ConfigError, match=f"table_format={name} has 1 scales a row of"):
            memjax.load(tmp_path, table_format=name)
    np.testing.assert_allclose(got[::4], expected, rtol=1e-4, atol=1e-4)


def test_settings_that_cannot_be_met_are_refused():
    with pytest.raises(ConfigError, match="table format 'int3' is unknown; known: float32") as refused:
        TableSettings.of("int3", "disk")
    assert "table_place=disk must be one of device, host" in str(refused.value)
    with pytest.raises(ValueError, match=r"memory_devices=2 splits tables .* table_place=host"):
        InferenceSettings(memory_devices=2, table_place="host")


@pytest.fixture
def run_and_patch(tmp_path) -> tuple[str, str]:
    """A run, and a patch that changes one of its rows."""
    model = save(tmp_path / "run")
    folder = str(tmp_path / "run")
    rows = np.asarray(stored(model)["shared"])[[5]]
    change = RowChange(num_slots=64, rows=np.array([5]), old=rows, new=rows + 1)
    patch = Patch(model_digest(tmp_path / "run/checkpoints", 3), {"shared": change})
    return folder, str(write_patch(tmp_path / "new.safetensors", patch))


FORMS = [{"table_format": "int8"}, {"table_place": "host"}, {"table_format": "bfloat16"}]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_patches_are_refused_with_another_format_or_place(run_and_patch, form):
    run, patch = run_and_patch
    ((name, value),) = form.items()
    with pytest.raises(ConfigError, match=rf"patch={patch} and {name}={value} do not go together"):
        memjax.load(run, patches=[patch], **form)
    with pytest.raises(ValueError, match=rf"{name}={value} and patch={patch} do not go together"):
        InferenceSettings(patch=(patch,), **form)
    edit.apply(run, patch)
    with pytest.raises(CheckpointError, match=rf"patch \w+ is applied to step 3, .* with {name}={value}: .* revert"):
        memjax.load(run, **form)
    with pytest.raises(ConfigError, match="do not go together"):
        memjax.load(run, patches=[patch], **form)


@pytest.mark.slow
def test_a_run_with_patches_is_not_quantized_and_its_copy_with_the_rows_is(run_and_patch, tmp_path):
    run, patch = run_and_patch
    edit.apply(run, patch)
    with pytest.raises(CheckpointError, match=r"patch \w+ is applied to step 3, .* with quantize"):
        quantize_run(run, tmp_path / "small", formats.find("int8"))
    assert not (tmp_path / "small").exists()
    patched = decoded(stored(memjax.load(run).model)["shared"])
    # The way out suggested by the message.
    edit.revert(run, patch)
    edit.apply(run, patch, out=tmp_path / "written")
    quantize_run(tmp_path / "written", tmp_path / "small", None)
    np.testing.assert_array_equal(decoded(stored(memjax.load(tmp_path / "small").model)["shared"]), patched)


def test_patches_of_a_quantized_run_are_refused(run_and_patch, tmp_path):
    run, patch = run_and_patch
    small = tmp_path / "small"
    quantize_run(run, small, formats.find("int8"))
    for refused in (lambda: memjax.load(small, patches=[patch]), lambda: edit.apply(small, patch)):
        with pytest.raises(CheckpointError, match="the tables of this run are read-only, in int8; use the run that"):
            refused()


def test_commands_that_need_gradients_refuse_a_quantized_run(tmp_path):
    save(tmp_path / "run")
    quantize_run(tmp_path / "run", tmp_path / "small", formats.find("int8"))
    with (
        pytest.raises(CheckpointError, match=r"table \w+ is read-only \(int8.*use the run that it was made from"),
        loaded(str(tmp_path / "small"), CheckpointSettings()),
    ):
        pass


def test_rows_that_a_format_cannot_store_are_named(tmp_path):
    run = run_config()
    parts = DecoderParts.of(run.model)
    zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
    tables = zeros(parts.abstract_tables)
    tables["shared"] = tables["shared"].at[7, 3].set(jnp.nan)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        items = {"params": params_to_tree(zeros(parts.abstract_params)), "tables": tables}
        checkpoints.save(0, items, {"meta": meta_document(run, ByteTokenizer(), step=0)})
    with pytest.raises(ConfigError, match=r"table shared of .*: int8 has no code for NaN"):
        memjax.load(tmp_path, table_format="int8")
    with pytest.raises(ConfigError, match=r"table shared of .*: int8 has no code for NaN"):
        quantize_run(tmp_path, tmp_path / "small", formats.find("int8"))
    assert not (tmp_path / "small").exists()


def test_too_little_host_memory_is_an_error_with_numbers(tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 100)
    with pytest.raises(ConfigError, match=r"needs 0\.0 GB of host memory, of which 0\.0 GB are available"):
        memjax.load(tmp_path, table_place="host")


def test_tables_beyond_the_memory_are_refused_before_they_are_read_with_what_would_fit(tmp_path, monkeypatch):
    save(tmp_path)
    restore = Checkpoints.restore

    def documents_only(self, targets, *args, **options):
        assert not targets, "something was read"
        return restore(self, targets, *args, **options)

    monkeypatch.setattr(Checkpoints, "restore", documents_only)
    # 64 rows of 32 and two tables of 64 rows of 16 are 16 KiB in float32; int8 has a scale per 32 or 16 columns.
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 4_600)
    with pytest.raises(ConfigError) as caught:
        memjax.load(tmp_path)
    assert re.fullmatch(
        r"tables of \S+: 0\.02 MB is more than the 0\.00 MB of memory that this machine has left; load with "
        r"table_format=int8 \(0\.00 MB\) or table_format=int4 \(0\.00 MB\) or table_place=host, which maps .*",
        str(caught.value),
    )
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 100)
    with pytest.raises(ConfigError, match=r"has left; load with table_place=host"):
        memjax.load(tmp_path)


class GpuWithMemory:
    platform = "gpu"

    def memory_stats(self):
        return {"bytes_limit": 3_000_000_000, "bytes_in_use": 1_000_000_000}


def test_on_gpus_int4_host_memory_and_more_gpus_are_suggested(monkeypatch):
    monkeypatch.setattr(run_tables.jax, "devices", lambda: [GpuWithMemory()])
    rows = jax.ShapeDtypeStruct((5_000_000, 512), jnp.bfloat16)
    with pytest.raises(ConfigError) as caught:
        run_tables.check_room([run_tables.TableForm.of("shared", rows, formats.find("bfloat16"))], None)
    assert str(caught.value) == (
        "5.12 GB is more than the 2.00 GB of memory that a device has left; load with table_format=int4 (1.36 GB) or "
        "table_place=host or memory_devices=3"
    )
    cases: tuple[tuple[list[run_tables.LoadOption], str], ...] = (
        (["memory_devices"], "load with memory_devices=3"),
        ([], "set JAX_PLATFORMS=cpu to use the memory of the machine"),
    )
    for options, way_out in cases:
        with pytest.raises(ConfigError, match=f"a device has left; {way_out}$"):
            run_tables.check_room([run_tables.TableForm.of("shared", rows, formats.find("bfloat16"))], None, options)


@pytest.mark.slow
def test_a_table_is_zeroed_without_another_one(tmp_path):
    save(tmp_path)
    without = forward(zero_tables(memjax.load(tmp_path).model), TOKENS)
    forms: list[dict[str, Any]] = [
        {"table_format": "int8"},
        {"table_place": "host"},
        {"table_format": "int4", "table_place": "host"},
    ]
    for settings in forms:
        model = memjax.load(tmp_path, **settings).model
        zeroed = zero_tables(model, donate=True)
        assert stored(zeroed)["shared"].rows is stored(model)["shared"].rows
        np.testing.assert_array_equal(forward(zeroed, TOKENS), without)


class Library:
    """A CUDA driver as loaded by ctypes, of which one call may fail."""

    def __init__(self, failing=None):
        self.failing = failing

    def __getattr__(self, name):
        if name == "cuGetErrorName":
            return lambda code, text: setattr(text._obj, "value", b"CUDA_ERROR_OUT_OF_MEMORY") or 0
        if name == "missing":
            raise AttributeError(name)

        def call(*arguments):
            if name == "cuMemHostGetDevicePointer_v2":
                arguments[0]._obj.value = arguments[1].value
            return 2 if name == self.failing else 0

        return call


def test_the_driver_is_given_the_memory_and_gives_its_address():
    rows = np.zeros(4096, np.uint8)
    assert host_memory._Driver(Library(), 0).register(rows) == rows.ctypes.data
    with pytest.raises(ConfigError, match=r"cuMemHostRegister_v2 answered CUDA_ERROR_OUT_OF_MEMORY \(2\) when asked"):
        host_memory._Driver(Library("cuMemHostRegister_v2"), 0).register(rows)
    with pytest.raises(ConfigError, match="cuDevicePrimaryCtxRetain answered CUDA_ERROR_OUT_OF_MEMORY"):
        host_memory._Driver(Library("cuDevicePrimaryCtxRetain"), 0)


def test_without_a_driver_the_message_says_so(monkeypatch):
    class Gpu:
        platform, local_hardware_id = "gpu", 0

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    host_memory._driver.cache_clear()
    monkeypatch.setattr(host_memory.jax, "devices", lambda: [Gpu()])
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(ConfigError, match=r"needs the CUDA driver, which cannot be loaded: libcuda\.so\.1"):
        host_memory.address_of(np.zeros(8, np.uint8))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="memory can be pinned only for NVIDIA GPUs, and the device is a cpu"):
        host_memory.address_of(np.zeros(8, np.uint8))


@pytest.mark.slow
def test_commands_take_formats_and_places(tmp_path, capsys):
    save(tmp_path / "run")
    assert convert.main(["quantize", str(tmp_path / "run"), "--table", "int4", "--out", str(tmp_path / "small")]) == 0
    assert "tables in int4, read-only" in capsys.readouterr().out
    ask = ["--prompt", "a", "--max_tokens", "3"]
    texts = []
    for arguments in (["small"], ["small", "--table_place", "host"], ["run", "--table_format", "int4"]):
        assert generate.main([str(tmp_path / arguments[0]), *arguments[1:], *ask]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    with pytest.raises(SystemExit, match="2"):
        generate.main([str(tmp_path / "run"), "--table_place", "disk", *ask])
    assert "table_place" in capsys.readouterr().err
