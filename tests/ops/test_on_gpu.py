"""Tests of the Triton kernels that need a real GPU: JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu -n 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops import dispatch
from memjax.ops.embedding_bag.api import embedding_bag
from memjax.ops.embedding_dot.api import embedding_dot
from memjax.ops.grouped_matmul.api import grouped_matmul
from memjax.ops.product_key_search.api import product_key_search
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.api import row_update
from memjax.ops.row_update.rules import RowRule, row_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


def test_auto_chooses_triton():
    assert dispatch.choose("embedding_bag", None) == "triton"


def test_rows_beyond_two_to_the_31_elements_are_read_and_written():
    columns, rows = 1024, 2**21 + 9
    table = jax.jit(lambda: jnp.zeros((rows, columns), jnp.bfloat16))()
    assert table.size > 2**31
    indices = jnp.asarray([[0, rows - 1], [rows - 2, 2**20]], jnp.int32)
    weights, vectors = jnp.ones((2, 2)), jnp.ones((2, columns)) * jnp.asarray([[1.0], [2.0]])
    update = jax.jit(
        lambda table: row_update(
            table,
            {},
            [RowGradient(indices, weights, vectors)],
            RowRule(kind="sgd"),
            row_step(-1.0, 0),
            implementation="triton",
        )[0],
        donate_argnums=0,
    )
    table = update(table)
    bag = embedding_bag(table, indices, weights, implementation="triton")
    np.testing.assert_array_equal(bag, np.full((2, columns), [[2.0], [4.0]]))
    dot = embedding_dot(table, indices, jnp.ones((2, columns)), implementation="triton")
    np.testing.assert_array_equal(dot, columns * np.asarray([[1.0, 1.0], [2.0, 2.0]]))
    # A 32-bit offset would have wrapped around into the rows in between.
    touched = jnp.any(table != 0, axis=1)
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(touched)), [0, 2**20, rows - 2, rows - 1])


def test_two_runs_give_the_same_bits():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(4096, 256)), jnp.bfloat16)
    queries = jnp.asarray(rng.normal(size=(512, 2, 64)), jnp.bfloat16)
    keys = jnp.asarray(rng.normal(size=(2, 2, 64, 32)), jnp.bfloat16)
    vectors = jnp.asarray(rng.normal(size=(512, 256)), jnp.bfloat16)
    rule = RowRule()

    @jax.jit
    def run():
        scores, indices = product_key_search(queries, keys, 8, implementation="triton")
        weights, indices = jax.nn.softmax(scores).reshape(512, 16), indices.reshape(512, 16)
        bag = embedding_bag(table, indices, weights, implementation="triton")
        dot = embedding_dot(table, indices, vectors, implementation="triton")
        # Includes a hot row, which several kernel programs sum.
        hot = RowGradient(jnp.full((512, 1), 7), jnp.ones((512, 1)), vectors)
        gradients = [RowGradient(indices, weights, vectors), hot]
        updated = row_update(table, rule.init(4096, 256), gradients, rule, row_step(1e-2, 0), implementation="triton")
        return scores, indices, bag, dot, updated

    first, second = (jax.tree.leaves(jax.device_get(run())) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.tobytes() == other.tobytes()


def test_grouped_products_of_bfloat16_and_their_gradients_are_the_references():
    rng = np.random.default_rng(0)
    sizes = jnp.asarray([700, 0, 1, 299, 24], jnp.int32)
    rows = jnp.asarray(rng.normal(size=(1024, 320)), jnp.bfloat16)
    matrices = jnp.asarray(rng.normal(size=(5, 320, 520)) / 18, jnp.bfloat16)
    cotangent = jnp.asarray(rng.normal(size=(1024, 520)), jnp.bfloat16)

    def run(name):
        product = lambda rows, matrices: grouped_matmul(rows, matrices, sizes, implementation=name)
        out, pull = jax.vjp(product, rows, matrices)
        return [np.asarray(array, np.float64) for array in (out, *pull(cotangent))]

    for one, other in zip(run("triton"), run("reference"), strict=True):
        # Both sum in float32 and round once to 8 bits.
        np.testing.assert_allclose(one, other, rtol=2**-7, atol=2**-10 * np.abs(other).max())
