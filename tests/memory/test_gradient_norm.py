"""The norm of a table's row gradients equals that of the dense gradient, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from memjax.memory.gradient_norm import squared_norm
from memjax.memory.sharded import add_rows, no_rows
from memjax.ops.row_gradient import RowGradient

ROWS, WIDTH, TOKENS, PICKS = 13, 16, 8, 3


def drawn(seed: int) -> RowGradient:
    rng = np.random.default_rng(seed)
    indices = rng.integers(ROWS + 2, size=(TOKENS, PICKS)).astype(np.int32)  # rows from ROWS on do not exist
    factors = rng.normal(size=(TOKENS, PICKS)), rng.normal(size=(TOKENS, WIDTH))
    return RowGradient(jnp.asarray(indices), *(jnp.asarray(factor, jnp.float32) for factor in factors))


def by_hand(gradients) -> float:
    dense = np.zeros((ROWS + 2, WIDTH))
    for indices, weights, vectors in gradients:
        for token, pick in np.ndindex(indices.shape):
            dense[indices[token, pick]] += float(weights[token, pick]) * np.asarray(vectors[token], np.float64)
    return float(np.sum(dense[:ROWS] ** 2))


@pytest.mark.parametrize("shape", [None, (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("way", ["all_gather", "all_reduce", "summed"])
def test_the_norm_is_that_of_the_dense_gradient_and_the_table_stays(shape, way):
    gradients, table = [drawn(1), drawn(2)], jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, WIDTH)))

    def run(table, gradients):
        if way == "summed":
            return squared_norm(table, add_rows(no_rows(table), gradients))
        return squared_norm(table, gradients, collective=way)

    if shape is None:
        found, square = jax.jit(run)(table, gradients)
    else:
        automatic = (AxisType.Auto,) * 2
        mesh = jax.make_mesh(shape, ("data", "memory"), axis_types=automatic, devices=jax.devices()[:4])
        with jax.set_mesh(mesh):
            found, square = jax.jit(run)(table, gradients)
    np.testing.assert_array_equal(found, table)
    np.testing.assert_allclose(square, by_hand(gradients), rtol=1e-5)


def test_it_needs_no_memory_of_the_tables_size():
    table = jax.ShapeDtypeStruct((2**22, WIDTH), jnp.float32)
    measure = lambda table, gradients: squared_norm(table, gradients, implementation="xla")
    memory = jax.jit(measure, donate_argnums=0).lower(table, [drawn(1)]).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= 2**28
    assert memory.temp_size_in_bytes < 2**28 / 8  # one number per row, and a chunk
