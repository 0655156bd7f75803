"""Checkpoints are restored bit for bit, on any mesh and after a kill, or the error says what is wrong."""

import errno
import gc
import itertools
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from memjax.checkpoint import CheckpointError, Checkpoints
from memjax.checkpoint.errors import write_advice
from memjax.checkpoint.index import INDEX, seal

# When a read of a damaged array fails, TensorStore leaves other reads pending, which warn when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect_failed_reads():
    yield
    gc.collect()


def mesh_of(data, memory):
    return jax.make_mesh((data, memory), ("data", "memory"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def place(mesh, *spec):
    return NamedSharding(mesh, PartitionSpec(*spec))


def host_state(seed=0):
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    return {
        "params": {"blocks": [{"w": normal((16, 8)).astype(np.float32)}, {"w": normal((16, 8)).astype(jnp.bfloat16)}]},
        "tables": {"shared": normal((37, 16)).astype(jnp.bfloat16), "pair": {"down": normal((5, 8)), "up": normal(8)}},
        "opt_state": (np.int32(7), {"m": rng.integers(0, 255, 11).astype(np.uint8), "mask": normal(9) > 0}, None),
        "table_state": {"shared": normal((37, 4)).astype(np.float32), "none": np.zeros((0, 4), np.float16)},
    }


def sharding_of(leaf, mesh):
    """Splits 16 rows over `data` and columns of tables over `memory`; everything else is replicated."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    if np.shape(leaf) == (16, 8):
        return place(mesh, "data", "memory")
    return place(mesh, None, "memory") if np.shape(leaf) == (37, 16) else place(mesh)


def on(mesh, tree):
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding_of(leaf, mesh)), tree)


def targets_on(mesh, tree):
    def target(leaf):
        array = jnp.asarray(leaf)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding_of(leaf, mesh))

    return jax.tree.map(target, tree)


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        left, right = np.asarray(left), np.asarray(jnp.asarray(right))
        assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())


def small(step, columns=8):
    return {"params": {"w": jnp.arange(64 * columns, dtype=jnp.float32).reshape(64, columns) + step}}


def small_target(columns=8):
    return {"params": {"w": jax.ShapeDtypeStruct((64, columns), jnp.float32)}}


def saved(folder, *steps, **settings):
    checkpoints = Checkpoints(folder, keep=9, **settings)
    for step in steps:
        checkpoints.save(step, small(step), {"meta": {"step": step}})
    checkpoints.close()
    return checkpoints


def data_files(folder):
    return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file() and path.parent.name == "d")


@pytest.mark.parametrize(
    ("shape", "block_bytes"),
    [
        pytest.param((8, 1), 100, marks=pytest.mark.slow),
        ((2, 4), 2 << 30),
        pytest.param(None, 100, marks=pytest.mark.slow),
    ],
)
def test_every_dtype_comes_back_bit_for_bit_on_another_mesh(tmp_path, shape, block_bytes):
    state = host_state()
    documents = {"meta": {"config": {"a": [1, 2.5, None]}}, "data_iter": {"position": 3, "names": ["ä"]}}
    with Checkpoints(tmp_path, block_bytes=block_bytes) as checkpoints:
        checkpoints.save(3, on(mesh_of(2, 4), state), documents)
    mesh = mesh_of(*shape) if shape else None
    restored = Checkpoints(tmp_path).restore(targets_on(mesh, state), list(documents))
    assert (restored.step, restored.documents) == (3, documents)
    assert_same_bits(restored.arrays, state)
    for leaf, target in zip(jax.tree.leaves(restored.arrays), jax.tree.leaves(targets_on(mesh, state)), strict=True):
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)


def test_empty_arrays_come_back_split_over_the_devices(tmp_path):
    split = place(mesh_of(2, 4), None, "memory")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": jax.device_put(np.zeros((0, 8), np.float32), split)}}, {})
    target = jax.ShapeDtypeStruct((0, 8), jnp.float32, sharding=split)
    array = checkpoints.restore({"params": {"w": target}}).arrays["params"]["w"]
    assert {shard.data.shape for shard in array.addressable_shards} == {(0, 2)}
    assert np.asarray(array).shape == (0, 8)


def test_float64_comes_back(tmp_path):
    with jax.enable_x64(True):
        values = {"w": jnp.linspace(0, 1, 30).reshape(10, 3), "n": jnp.arange(5)}
        with Checkpoints(tmp_path, block_bytes=50) as checkpoints:
            checkpoints.save(1, {"params": values}, {})
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), values)
        assert values["w"].dtype == jnp.float64
        assert_same_bits(Checkpoints(tmp_path).restore({"params": target}).arrays["params"], values)


def test_only_the_named_items_are_read(tmp_path):
    state = host_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, on(None, state), {"meta": {"a": 1}, "data_iter": {}})
    for item in ("tables", "opt_state", "table_state", "data_iter"):
        shutil.rmtree(tmp_path / "1" / item)
    restored = Checkpoints(tmp_path).restore({"params": targets_on(None, state["params"])}, ["meta"])
    assert_same_bits(restored.arrays["params"], state["params"])
    assert Checkpoints(tmp_path).read_document("meta", 1) == {"a": 1}


def test_latest_and_best_stay(tmp_path):
    losses = {1: 3.0, 2: 0.5, 3: None, 4: float("nan"), 5: 2.0, 6: None, 7: float("-inf")}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, small(step), {}, loss=loss)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 6, 7]
        assert (checkpoints.latest(), checkpoints.best()) == (7, 2)
    with Checkpoints(tmp_path, keep=1) as later:
        assert later.best() == 2
        later.save(8, small(8), {}, loss=0.25)
    assert later.steps() == [8]
    with Checkpoints(tmp_path, keep=1, keep_best=False) as plain:
        plain.save(9, small(9), {}, loss=1.0)
    assert plain.steps() == [9]
    assert sorted(os.listdir(tmp_path)) == ["9"]


def test_best_is_none_without_losses(tmp_path):
    assert saved(tmp_path, 1, 2).best() is None


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {"meta": {"first": True}})
        checkpoints.save(1, small(5), {"meta": {"first": False}})
    assert checkpoints.read_document("meta") == {"first": True}
    assert_same_bits(checkpoints.restore(small_target()).arrays, small(1))


@pytest.mark.parametrize("name", ["lr[1e-3] ü", "a\\b"])
def test_folders_whose_names_are_patterns_hold_steps_like_others(name, tmp_path):
    folder = tmp_path / name
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, small(1), {})
        checkpoints.save(2, small(2), {})
    assert (folder / "2").is_dir()
    assert checkpoints.steps() == [2]
    assert_same_bits(checkpoints.restore(small_target()).arrays, small(2))
    moved = folder.rename(tmp_path / "moved [2]")
    assert_same_bits(Checkpoints(moved).restore(small_target()).arrays, small(2))


def test_a_folder_may_be_named_by_way_of_its_parent_or_a_link(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "elsewhere" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "below")
    for folder, real in ("other/../run", "run"), ("link/../run", "elsewhere/run"), ("link", "elsewhere/below"):
        with Checkpoints(tmp_path / folder) as checkpoints:
            checkpoints.save(1, small(1), {})
        assert (tmp_path / real / "1").is_dir()
        assert_same_bits(checkpoints.restore(small_target()).arrays, small(1))


def test_arrays_may_be_donated_right_after_save(tmp_path):
    update = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    for trial, block_bytes in enumerate([1 << 30, 1 << 20] * 2):
        table = jax.device_put(jnp.full((1 << 14, 256), 3, jnp.float32) + trial, place(mesh_of(2, 4), None, "memory"))
        wanted = np.array(table)
        with Checkpoints(tmp_path / str(trial), block_bytes=block_bytes) as checkpoints:
            checkpoints.save(1, {"tables": {"shared": table}}, {})
            for _ in range(3):
                table = update(table)
        target = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=table.sharding)
        assert_same_bits(checkpoints.restore({"tables": {"shared": target}}).arrays["tables"]["shared"], wanted)


@pytest.mark.parametrize("block_bytes", [2 << 30, 16 * 64 * 4])
def test_no_flipped_bit_passes(tmp_path, block_bytes):
    generator = random.Random(0)
    values = jax.random.normal(jax.random.key(0), (64, 64), jnp.float32)
    with Checkpoints(tmp_path, block_bytes=block_bytes) as checkpoints:
        checkpoints.save(1, {"params": {"w": values}}, {})
    files = data_files(tmp_path / "1" / "params")
    data = max(files, key=lambda path: path.stat().st_size)
    found = 0
    for _ in range(50):
        whole = data.read_bytes()
        place_, bit = generator.randrange(len(whole)), generator.randrange(8)
        data.write_bytes(whole[:place_] + bytes([whole[place_] ^ (1 << bit)]) + whole[place_ + 1 :])
        try:
            restored = checkpoints.restore(small_target(64), step=1).arrays["params"]["w"]
        except CheckpointError as error:
            found += all(part in str(error) for part in ("step 1", "params", str(tmp_path)))
        else:
            assert_same_bits(restored, values)
        data.write_bytes(whole)
    assert found > 25
    assert_same_bits(checkpoints.restore(small_target(64)).arrays["params"]["w"], values)


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_truncated_and_deleted_files_never_give_wrong_values(tmp_path, damage):
    checkpoints = saved(tmp_path, 1)
    found = 0
    for path in [path for path in sorted((tmp_path / "1").rglob("*")) if path.is_file()]:
        whole = path.read_bytes()
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes(whole[: len(whole) // 2])
        try:
            restored = checkpoints.restore(small_target(), ["meta"], step=1)
            assert restored.documents == {"meta": {"step": 1}}
            assert_same_bits(restored.arrays, small(1))
        except CheckpointError as error:
            found += "step 1" in str(error)
        path.write_bytes(whole)
    assert found >= 4


def test_a_changed_document_is_found(tmp_path):
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "1" / "meta" / "metadata").write_text('{"step": 2}')
    with pytest.raises(CheckpointError, match="step 1, document meta"):
        checkpoints.read_document("meta", 1)
    assert Checkpoints(tmp_path, verify=False).read_document("meta") == {"step": 2}


def test_a_damaged_step_falls_back_to_the_one_before_and_is_saved_again(tmp_path, capsys):
    saved(tmp_path, 1, 2, 3)
    for step in (2, 3):
        for path in data_files(tmp_path / str(step) / "params"):
            path.write_bytes(b"x" * path.stat().st_size)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(small_target())
        assert restored.step == 1
        assert_same_bits(restored.arrays, small(1))
        first, second = capsys.readouterr().err.splitlines()
        assert "step 3" in first
        assert "step 2" in second
        checkpoints.save(2, small(2), {})
        checkpoints.save(3, small(3), {})
    assert checkpoints.steps() == [2, 3]
    assert_same_bits(checkpoints.restore(small_target(), step=3).arrays, small(3))


def test_nothing_readable_is_an_error(tmp_path):
    checkpoints = saved(tmp_path, 1)
    shutil.rmtree(tmp_path / "1" / "params")
    with pytest.raises(CheckpointError, match=r"none of the steps \[1\] can be read"):
        checkpoints.restore(small_target())


def test_a_target_that_does_not_fit_is_an_error_and_no_reason_to_fall_back(tmp_path, capsys):
    checkpoints = saved(tmp_path, 1, 2)
    other = {"w": jax.ShapeDtypeStruct((64, 9), jnp.bfloat16), "b": small_target()["params"]["w"]}
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore({"params": other})
    assert "params/w: saved float32[64, 8], wanted bfloat16[64, 9]" in str(error.value)
    assert "params/b: saved nothing, wanted float32[64, 8]" in str(error.value)
    assert "types" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"resumes elsewhere with --model.memory.table_dtype bfloat16"):
        checkpoints.restore({"params": {"w": jax.ShapeDtypeStruct((64, 8), jnp.bfloat16)}})
    with pytest.raises(CheckpointError, match="opt_state: no such item"):
        checkpoints.restore({"opt_state": {}})
    with pytest.raises(CheckpointError, match="tokens: no such document"):
        checkpoints.read_document("tokens")
    assert not capsys.readouterr().err


def test_reading_a_missing_folder_says_so_and_creates_nothing(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            checkpoints.restore(small_target())
        with pytest.raises(CheckpointError, match="there is no step 4"):
            checkpoints.restore(small_target(), step=4)
    assert not (tmp_path / "run").exists()


def test_only_device_arrays_can_be_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"not a jax\.Array: b/0"):
        checkpoints.save(1, {"params": {"a": jnp.ones(3), "b": [np.ones(3)]}}, {})


@pytest.mark.parametrize("tree", [{"a": 1, "a/b": 2}, {"a/b/c": 1, "a": {"b": 2}}, {"a": {"b": 1}, "a/b": 2}])
def test_keys_with_slashes_that_make_names_ambiguous_are_refused(tmp_path, tree):
    with pytest.raises(CheckpointError, match="rename a key with a slash among a"):
        Checkpoints(tmp_path).save(1, {"params": jax.tree.map(jnp.asarray, tree)}, {})
    assert Checkpoints(tmp_path).steps() == []


def test_saving_into_a_file_fails(tmp_path):
    (tmp_path / "run").write_text("")
    with Checkpoints(tmp_path / "run") as checkpoints, pytest.raises(CheckpointError, match="step 1 cannot be written"):
        checkpoints.save(1, small(1), {})


def test_a_clock_that_is_set_forward_does_not_end_a_save(tmp_path, monkeypatch):
    now, asked = time.time(), itertools.count()
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(time, "time", lambda: now + 200 * next(asked))
        checkpoints.save(1, small(1), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1]
    assert 24 * 3600 > 200 * next(asked) > 3600, "the timeout is within a day and above an hour"


def test_a_save_that_fails_in_the_background_is_reported(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1), {})
    checkpoints.wait()
    checkpoints.check()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    assert checkpoints._writer is not None
    manager = checkpoints._writer.open()
    monkeypatch.setattr(manager._checkpointer.handler, "finalize", full)
    checkpoints.save(2, small(2), {})
    while manager.is_saving_in_progress():
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.check()
    assert os.listdir(tmp_path) == ["1"], "partial writes are removed"
    checkpoints.save(2, small(2), {})
    checkpoints.close()
    assert checkpoints.restore(small_target()).step == 2
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_errors_that_orbax_logs_are_not_printed_beside_those_that_are_raised(tmp_path, caplog):
    saved(tmp_path, 1)
    logger = logging.getLogger("absl")
    caplog.set_level(logging.WARNING, logger="absl")
    for file, level, text in [
        ("/lib/orbax/metadata.py", logging.ERROR, "Failed to json parse"),
        ("/lib/orbax/manager.py", logging.WARNING, "Waiting took long"),
        ("/lib/another.py", logging.ERROR, "of another library"),
    ]:
        logger.handle(logger.makeRecord("absl", level, file, 1, text, (), None))
    assert [record.getMessage() for record in caplog.records] == ["Waiting took long", "of another library"]


def test_a_reader_leaves_a_save_in_progress_alone(tmp_path):
    saved(tmp_path, 1)
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with Checkpoints(tmp_path) as reader:
        assert reader.restore(small_target()).step == 1
    assert unfinished.exists()


WRITER = """
import sys, jax, jax.numpy as jnp
from memjax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2, block_bytes=1 << 20)
first = (checkpoints.latest() or 0) + 1
for step in range(first, first + 10000):
    arrays = {"params": {"w": jnp.full((64, 8), step, jnp.float32)}, "tables": {"shared": jnp.full((4096, 256), step)}}
    checkpoints.save(step, arrays, {"meta": {"step": step}}, loss=float(step % 5))
    if step == first:
        print("ready", flush=True)
"""


@pytest.mark.slow
def test_after_a_kill_every_listed_step_can_be_read(tmp_path):
    generator = random.Random(0)
    target = {
        "params": {"w": jax.ShapeDtypeStruct((64, 8), jnp.float32)},
        "tables": {"shared": jax.ShapeDtypeStruct((4096, 256), jnp.int32)},
    }
    newest = 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(generator.uniform(0.1, 0.6))
            writer.send_signal(signal.SIGKILL)
        checkpoints = Checkpoints(tmp_path)
        latest = checkpoints.latest()
        assert latest is not None
        assert latest >= newest
        newest = latest
        for step in checkpoints.steps():
            restored = checkpoints.restore(target, ["meta"], step=step)
            assert restored.documents["meta"] == {"step": step}
            assert all((np.asarray(leaf) == step).all() for leaf in jax.tree.leaves(restored.arrays))


def light(step):
    return {"params": small(step)["params"]}


def whole(step):
    return light(step) | {"tables": {"shared": jnp.full((3, 2), step, jnp.float32)}}


WHOLE = small_target() | {"tables": {"shared": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}


def test_partial_steps_are_skipped_and_never_replace_the_last_complete_one(tmp_path, capsys):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, light(1), {}, loss=0.1, partial=True)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([1], None, None)
        with pytest.raises(
            CheckpointError, match=r"the steps \[1\] are all partial, saved without their largest items"
        ):
            checkpoints.restore(WHOLE)
        checkpoints.save(2, whole(2), {"meta": {"step": 2}}, loss=3.0)
        for step in (3, 4):
            checkpoints.save(step, light(step), {"meta": {"step": step}}, loss=2.0, partial=True)
    with Checkpoints(tmp_path, keep=1) as later:
        assert (later.steps(), later.complete(), later.latest(), later.best()) == ([2, 4], [2], 2, 2)
        restored = later.restore(WHOLE, ["meta"])
        assert (restored.step, restored.documents["meta"]) == (2, {"step": 2})
        # A partial step can still be restored by its number.
        assert_same_bits(later.restore(small_target(), ["meta"], step=4).arrays, small(4))
        message = "step 4 was saved without its tables; the newest step with all of it is 2"
        with pytest.raises(CheckpointError, match=message):
            later.restore(WHOLE, step=4)
        assert later.restore({}, ["meta"]).documents["meta"] == {"step": 2}
    assert not capsys.readouterr().err


def test_resuming_from_a_complete_step_saves_later_partial_ones_again(tmp_path):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        checkpoints.save(1, whole(1), {})
        for step in (2, 3, 4):
            checkpoints.save(step, light(step), {}, partial=True)
    with Checkpoints(tmp_path, keep=9) as again:
        assert again.restore(WHOLE).step == 1
        again.save(2, light(20), {}, partial=True)
        assert again.steps() == [1]
        again.save(3, whole(30), {})
        again.wait()
        assert (again.steps(), again.complete()) == ([1, 2, 3], [1, 3])
        assert_same_bits(again.restore(small_target(), step=2).arrays, small(20))
        # Within one run, too, a complete step replaces a partial one, but not the reverse.
        again.save(3, light(31), {}, partial=True)
        again.save(2, whole(21), {})
        again.wait()
        assert again.complete() == [1, 2, 3]
        assert_same_bits(again.restore(WHOLE, step=2).arrays, whole(21))
        assert_same_bits(again.restore(WHOLE, step=3).arrays, whole(30))


def test_folders_that_changed_places_are_noticed(tmp_path, capsys):
    checkpoints = saved(tmp_path, 1, 2, 3)
    for source, target in (("2", "x"), ("3", "2"), ("x", "3")):
        (tmp_path / source).rename(tmp_path / target)
    later = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"step 3.*it was saved as step 2, so the folder was renamed"):
        later.restore(small_target(), step=3)
    assert later.restore(small_target()).step == 1
    assert (later.latest(), later.readable(), checkpoints.steps()) == (1, [1], [1, 2, 3])
    assert "step 3" in capsys.readouterr().err


def test_an_index_without_a_number_is_still_read(tmp_path):
    saved(tmp_path, 7)
    file = tmp_path / "7" / INDEX / "metadata"
    index = json.loads(file.read_text())["index"]
    del index["step"], index["partial"]
    file.write_text(json.dumps(seal(index)))
    assert_same_bits(Checkpoints(tmp_path).restore(small_target(), step=7).arrays, small(7))


@pytest.mark.parametrize("name", ["0099", "99999999", "٣٣", "+9", "9.orbax-checkpoint-tmp"])
def test_other_folders_and_empty_steps_are_skipped(tmp_path, name):
    saved(tmp_path, 1)
    (tmp_path / name).mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == ([1, 99999999] if name == "99999999" else [1])
    assert (checkpoints.latest(), checkpoints.newest_with("params")) == (1, 1)
    assert checkpoints.newest_with("opt_state") is None
    assert checkpoints.restore(small_target()).step == 1


def test_an_unreadable_step_does_not_displace_another(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "2").mkdir()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, light(3), {}, partial=True)
    assert checkpoints.latest() == 1


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"v": jnp.zeros((64, 8))}, "NOT_FOUND"),
        ({"w": jnp.zeros((64, 9))}, "w is float32[64, 9]"),
        ({"w": jnp.zeros((64, 8), jnp.bfloat16)}, "w is bfloat16[64, 8]"),
    ],
)
def test_a_leaf_that_does_not_come_back_is_damage(tmp_path, capsys, other, reason):
    saved(tmp_path / "run", 1, 2)
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(2, {"params": other}, {})
    params = tmp_path / "run" / "2" / "params"
    shutil.rmtree(params)
    (tmp_path / "other" / "2" / "params").rename(params)
    for verify in (True, False):
        assert Checkpoints(tmp_path / "run", verify=verify).restore(small_target()).step == 1
        said = capsys.readouterr().err
        assert "step 2, item params: cannot be read (ValueError: " in said
        assert reason in said


def test_an_array_without_its_data_is_damage(tmp_path, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small(step), {})
    # Empty the database directly: TensorStore would read the missing chunks as zeros.
    base = {"driver": "ocdbt", "base": f"file://{tmp_path}/2/params/"}
    database = ts.KvStore.open(base).result()
    (chunk,) = [key for key in database.list().result() if not key.endswith(b".zarray")]
    database.delete_range(ts.KvStore.KeyRange(chunk, chunk + b"0")).result()
    assert Checkpoints(tmp_path, verify=False).restore(small_target()).step == 1
    assert "step 2, item params: cannot be read" in capsys.readouterr().err


def test_a_piece_larger_than_its_array_is_damage_and_not_unpacked(tmp_path, capsys):
    saved(tmp_path, 1, 2)
    database = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/2/params/"}).result()
    metadata = json.loads(database.read("w/.zarray").result().value)
    # 1 GiB, which packs into kilobytes.
    ts.open({"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{tmp_path}/2/params/", "path": "w/"},
             "metadata": metadata | {"chunks": [1 << 14, 1 << 14]}},
            create=True, delete_existing=True).result()[:].write(np.zeros((64, 8), np.float32)).result()  # fmt: skip
    assert Checkpoints(tmp_path, verify=False).restore(small_target()).step == 1
    assert "w is float32[64, 8] in pieces of [16384, 16384]" in capsys.readouterr().err


def test_what_orbax_says_of_the_arrays_beside_them_is_not_needed(tmp_path):
    saved(tmp_path, 1)
    for name in ("_METADATA", "_sharding"):
        (tmp_path / "1" / "params" / name).write_bytes(b"\xff")
    assert_same_bits(Checkpoints(tmp_path).restore(small_target()).arrays, small(1))


@pytest.mark.parametrize("name", [".unreadable", ".trash"])
def test_a_link_in_place_of_a_folder_that_is_emptied_is_refused(tmp_path, name):
    (tmp_path / "elsewhere" / "2").mkdir(parents=True)
    saved(tmp_path / "run", 1, 2)
    shutil.rmtree(tmp_path / "run" / "2" / "params")
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.restore(small_target()).step == 1
    with pytest.raises(CheckpointError, match=f"{name} is a link"):
        checkpoints.save(2, small(2), {})
    assert os.listdir(tmp_path / "elsewhere") == ["2"]


FAILING = """
import pathlib, sys, jax.numpy as jnp
from memjax.checkpoint import CheckpointError, Checkpoints
folder = pathlib.Path(sys.argv[1])
checkpoints = Checkpoints(folder)
checkpoints.save(1, {"params": {"w": jnp.ones(3)}}, {})
checkpoints.wait()
folder.rename(folder.with_suffix(".old"))
folder.write_text("")  # a file in the way of the folder
try:
    checkpoints.save(2, {"params": {"w": jnp.ones(3)}}, {})
    checkpoints.wait()
except CheckpointError as error:
    print(error)
"""


def test_a_failed_save_ends_the_program_at_once_with_the_reason(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", FAILING, str(tmp_path / "run")], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0
    assert "step 2" in run.stdout
    assert "cannot be written: a file is where a folder should be" in run.stdout
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']"), "the disk is full"),
        (PermissionError(errno.EACCES, "x"), "this user may not write there"),
        (OSError(errno.EROFS, "x"), "read-only"),
        (OSError(errno.EMFILE, "x"), "ulimit -n"),
        (OSError(errno.ENOTEMPTY, "x"), "another process writes there"),
        (
            ValueError("Checkpoint directory does not exist: run/checkpoints/20.orbax-checkpoint-tmp"),
            "was removed while",
        ),
        (TypeError("x"), ""),
    ],
)
def test_advice_fits_the_cause(error, advice):
    for found in (error, RuntimeError("wrapped")):
        if found is not error:
            found.__cause__ = error
        assert advice in write_advice(found)
        assert bool(advice) == bool(write_advice(found))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["arrays"]["params"]["w"].pop("block_rows"),
        lambda index: index["arrays"]["params"]["w"].update(block_rows="x"),
        lambda index: index["arrays"]["params"]["w"].update(shape={"a": 1}),
        lambda index: index["arrays"]["params"]["w"].update(dtype="int9"),
        lambda index: index["arrays"].update(params=5),
        lambda index: index.pop("documents"),
        lambda index: index.clear(),
    ],
)
def test_a_sealed_index_of_another_shape_is_damage(tmp_path, change, capsys):
    saved(tmp_path, 1, 2)
    file = tmp_path / "2" / INDEX / "metadata"
    index = json.loads(file.read_text())["index"]
    change(index)
    file.write_text(json.dumps(seal(index)))
    assert Checkpoints(tmp_path).restore(small_target()).step == 1
    assert "step 2, item digests: is damaged" in capsys.readouterr().err


def test_a_pipe_or_a_device_in_a_step_is_damage_and_never_opened(tmp_path, capsys):
    saved(tmp_path, 1, 2, 3)
    metadata = [tmp_path / step / "params" / "_METADATA" for step in ("2", "3")]
    for path in metadata:
        path.unlink()
    os.mkfifo(metadata[0])
    metadata[1].symlink_to("/dev/zero")
    assert Checkpoints(tmp_path).restore(small_target()).step == 1
    assert capsys.readouterr().err.count("not a regular file") == 2


def test_reading_imports_no_orbax(tmp_path):
    saved(tmp_path, 1)
    program = (
        "import sys, jax, jax.numpy as jnp\n"
        "from memjax.checkpoint import Checkpoints\n"
        "target = {'params': {'w': jax.ShapeDtypeStruct((64, 8), jnp.float32)}}\n"
        "with Checkpoints(sys.argv[1]) as checkpoints:\n"
        "    print(float(checkpoints.restore(target, ['meta']).arrays['params']['w'][0, 1]), 'orbax' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["2.0", "False"]
