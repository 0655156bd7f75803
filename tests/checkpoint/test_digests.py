"""Digests of arrays depend on every bit and its position, not on the mesh, and need no extra memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from memjax.checkpoint.digests import _digest, _of_few, array_digests


def mesh_of(data, memory):
    return jax.make_mesh((data, memory), ("data", "memory"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def place(mesh, *spec):
    return NamedSharding(mesh, PartitionSpec(*spec))


def digest_of(array):
    return array_digests({"w": array})["w"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool"])
def test_digest_is_the_same_on_every_mesh_and_depends_on_bits_and_order(dtype):
    values = np.random.default_rng(1).integers(0, 2, (16, 32)).astype(jnp.dtype(dtype))
    shardings = [None, place(mesh_of(8, 1), "data"), place(mesh_of(2, 4), "data", "memory"), place(mesh_of(2, 4))]
    digests = {digest_of(jax.device_put(values, sharding)) for sharding in shardings}
    assert len(digests) == 1
    changed = [values[::-1], values[:, ::-1], values.reshape(32, 16), values.reshape(-1)]
    for row, column in ((0, 0), (15, 31), (7, 9)):
        changed.append(values.copy())
        changed[-1][row, column] = not values[row, column]
    digests |= {digest_of(jnp.asarray(other)) for other in changed}
    assert len(digests) == 1 + len(changed)


def test_the_same_bit_flipped_in_two_elements_changes_the_digest():
    ones = np.ones((64, 64), np.float32)
    flipped = ones.copy()
    flipped[3, 5] = flipped[40, 2] = -1  # a plain weighted sum modulo 2**32 would miss two flipped sign bits
    assert digest_of(jnp.asarray(ones)) != digest_of(jnp.asarray(flipped))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_small_arrays_get_the_same_digest_without_a_compiler(dtype):
    for shape in ((), (7,), (2, 3, 4), (0, 4)):
        array = jnp.asarray(np.random.default_rng(2).integers(0, 100, shape).astype(jnp.dtype(dtype)))
        assert [int(one) for one in _of_few(array)] == [int(one) for one in _digest(array)]


def test_digest_needs_no_memory():
    table = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=place(mesh_of(2, 4), None, "memory"))
    memory = _digest.lower(table).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4096
