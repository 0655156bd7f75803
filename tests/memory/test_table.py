from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from memjax.memory.table import TableRows, ValueTable, draw_rows

ROWS, COLUMNS = 96, 256


def make_mesh(shape, axis_type):
    axis_types = (axis_type,) * 2
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("data", "memory"), axis_types=axis_types, devices=devices)


# Blocks of 40 rows, with an incomplete last one.
draw_in_blocks = partial(draw_rows, num_slots=ROWS, value_dim=COLUMNS, std=0.5, block_elements=40 * COLUMNS)


@cache
def drawn_without_a_mesh(dtype):
    return np.asarray(jax.jit(partial(draw_in_blocks, dtype=dtype))(jax.random.key(3)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "axis_type"),
    [((1, 1), AxisType.Auto), ((8, 1), AxisType.Auto), ((2, 4), AxisType.Auto), ((2, 4), AxisType.Explicit)],
)
def test_table_is_bit_identical_on_every_mesh(shape, axis_type, dtype):
    with jax.set_mesh(make_mesh(shape, axis_type)):
        draw = jax.jit(lambda key: draw_in_blocks(key, dtype=dtype))
        rows = draw(jax.random.key(3))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(ROWS, COLUMNS // shape[1])}
    assert np.asarray(rows).tobytes() == drawn_without_a_mesh(dtype).tobytes()


def test_blocks_are_drawn_one_by_one_each_with_its_own_key():
    rows = drawn_without_a_mesh("float32")
    expected = [
        0.5 * jax.random.normal(jax.random.fold_in(jax.random.key(3), block), (count, COLUMNS))
        for block, count in enumerate((40, 40, 16))
    ]
    np.testing.assert_allclose(rows, np.concatenate(expected), rtol=1e-5)


def test_rows_are_normal_with_the_requested_standard_deviation():
    table = ValueTable(512, 128, init_scale=2.0, rngs=nnx.Rngs(0))
    assert isinstance(table.rows, TableRows)
    rows = np.asarray(table.rows[...], np.float64) / (2 * 128**-0.5)
    # Within five standard errors of each moment over 65,536 draws.
    assert abs(rows.mean()) < 5 / 256
    assert abs(rows.std() - 1) < 5 / 256 / 2**0.5
    assert abs(np.mean(rows**4) - 3) < 5 * 96**0.5 / 256


def test_bfloat16_rows_take_many_values():
    rows = ValueTable(512, 128, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).rows[...]
    assert rows.dtype == jnp.bfloat16
    assert len(np.unique(np.asarray(rows, np.float32))) > 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temporaries_of_drawing_a_table_do_not_grow_with_it(dtype):
    def memory(num_slots):
        draw = jax.jit(lambda key: draw_rows(key, num_slots, 64, std=1.0, dtype=dtype))
        memory = draw.lower(jax.eval_shape(lambda: jax.random.key(0))).compile().memory_analysis()
        assert memory is not None
        return memory

    small, large = memory(2**20), memory(2**23)
    assert large.output_size_in_bytes == 2**29 * jnp.dtype(dtype).itemsize
    assert large.temp_size_in_bytes < 0.1 * large.output_size_in_bytes
    assert large.temp_size_in_bytes < 1.01 * small.temp_size_in_bytes


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"num_slots": "16"}, "num_slots='16' must be a whole number"),
        ({"num_slots": 2**31 + 1}, "num_slots=2147483649 must be at most"),
        ({"value_dim": 0}, "value_dim=0 must be positive"),
        ({"init_scale": "1"}, "init_scale=1 must not be negative"),
        ({"dtype": "int8"}, "dtype=int8 must be a type of floating-point numbers"),
    ],
)
def test_arguments_are_refused_by_name(as_users_call, wrong, rule):
    with pytest.raises(ValueError, match=rule):
        ValueTable(**({"num_slots": 16, "value_dim": 8} | wrong), rngs=nnx.Rngs(0))
