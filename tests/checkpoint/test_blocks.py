"""Large leaves are stored and read in blocks of rows, however they are split over devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from memjax.checkpoint import Checkpoints


def mesh_of(data, memory):
    return jax.make_mesh((data, memory), ("data", "memory"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def place(mesh, *spec):
    return NamedSharding(mesh, PartitionSpec(*spec))


def test_a_large_leaf_is_stored_as_row_blocks_with_a_rest(tmp_path):
    table = jnp.arange(37 * 16, dtype=jnp.float32).reshape(37, 16)
    with Checkpoints(tmp_path, block_bytes=10 * 64) as checkpoints:
        checkpoints.save(1, {"tables": {"shared": table}}, {})
    metadata = json.loads((tmp_path / "1" / "tables" / "_METADATA").read_text())
    names = ["/".join(key["key"] for key in leaf["key_metadata"]) for leaf in metadata["tree_metadata"].values()]
    assert names == [f"shared/rows_{start:08d}" for start in (0, 10, 20, 30)]
    wide = jax.ShapeDtypeStruct((37, 16), jnp.float32, sharding=place(mesh_of(2, 4), None, ("data", "memory")))
    restored = Checkpoints(tmp_path).restore({"tables": {"shared": wide}}).arrays["tables"]["shared"]
    assert np.asarray(restored).tobytes() == np.asarray(table).tobytes()


def test_split_rows_are_stored_and_read_in_blocks(tmp_path):
    table = np.arange(40 * 4, dtype=np.float32).reshape(40, 4)
    split = place(mesh_of(8, 1), "data")
    with Checkpoints(tmp_path, block_bytes=7 * 16) as checkpoints:
        checkpoints.save(1, {"tables": {"shared": jax.device_put(table, split)}}, {})
    target = {"tables": {"shared": jax.ShapeDtypeStruct((40, 4), jnp.float32, sharding=split)}}
    restored = Checkpoints(tmp_path).restore(target).arrays["tables"]["shared"]
    assert np.asarray(restored).tobytes() == table.tobytes()
    assert restored.sharding == split


def test_leaves_of_one_shape_share_their_programs(tmp_path):
    # 70,000 elements are too many for the NumPy digest; stored as blocks of 300 rows and a last one of 100.
    leaves = {name: jnp.full((1000, 70), value, jnp.float32) for value, name in enumerate("abcde")}
    with Checkpoints(tmp_path, block_bytes=300 * 280) as checkpoints:
        checkpoints.save(1, {"tables": leaves}, {})
    jax.clear_caches()
    compiled = []
    count = lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        restored = Checkpoints(tmp_path).restore({"tables": target}).arrays["tables"]
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert all(np.array_equal(restored[name], leaves[name]) for name in leaves)
    # Creating an empty leaf, writing blocks of either size, the digest (already compiled by the save), a row index.
    assert len(compiled) <= 5
