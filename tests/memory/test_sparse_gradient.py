import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from drawn import filled
from memjax.memory.layer import MemoryLayer
from memjax.memory.sparse_gradient import row_sparse_value_and_grad
from memjax.memory.table import ValueTable

DIM, VALUE_DIM, NUM_KEYS, TOKENS = 6, 10, 4, 8


class Model(nnx.Module):
    """Two layers of different sizes that share a table."""

    def __init__(self, rngs):
        sizes = {"num_keys": NUM_KEYS, "value_dim": VALUE_DIM, "param_dtype": jnp.float64, "rngs": rngs}
        first = MemoryLayer(DIM, num_heads=2, top_k=3, key_dim=4, **sizes)
        self.layers = nnx.Dict(first=first, second=MemoryLayer(DIM, top_k=2, key_dim=6, gate="none", **sizes))
        self.table = ValueTable(NUM_KEYS**2, VALUE_DIM, dtype=jnp.float64, rngs=rngs)


def build():
    """The layers, their table and an input."""
    model = filled(lambda: Model(nnx.Rngs(0)), std=1.0)
    return model.layers, model.table, jnp.asarray(np.random.default_rng(1).normal(size=(2, TOKENS // 2, DIM)))


def test_row_gradients_of_layers_that_share_a_table_add_up_to_the_dense_gradient():
    with jax.enable_x64(True):
        layers, table, x = build()
        graphdef, params = nnx.split(layers)
        table_def, table_state = nnx.split(table)

        def dense_loss(params, table_state):
            layers, table = nnx.merge(graphdef, params), nnx.merge(table_def, table_state)
            y = x + layers["first"](x, table)
            return jnp.mean(jnp.sin(y + layers["second"](y, table)))

        def sparse_loss(params, perturbations, table):
            layers, reads, y = nnx.merge(graphdef, params), {}, x
            for name, layer in layers.items():
                out, reads[name] = layer.with_reads(y, table, perturbations=perturbations[name])
                y = y + out
            return jnp.mean(jnp.sin(y)), (reads, y.shape)

        perturbations = {name: layer.zero_perturbations(TOKENS, table) for name, layer in layers.items()}
        loss, (d_params, d_table) = jax.jit(jax.value_and_grad(dense_loss, argnums=(0, 1)))(params, table_state)
        run = jax.jit(row_sparse_value_and_grad(sparse_loss))
        (got, aux), gradient, rows = run(params, perturbations, table)

        assert tuple(map(int, aux)) == (2, TOKENS // 2, DIM)
        np.testing.assert_allclose(got, loss, rtol=1e-12)
        for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(d_params), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-13)
        assert [row.indices.shape for row in rows["table"]] == [(8, 6), (8, 4)]
        total = sum(row.dense(NUM_KEYS**2) for row in rows["table"])
        np.testing.assert_allclose(total, d_table["rows"][...], rtol=1e-10, atol=1e-13)


def test_reads_and_perturbations_must_name_the_same_layers():
    def loss(params, perturbations):
        return (params.sum() + perturbations["a"][0].sum(), ({}, None))

    with pytest.raises(ValueError, match=r"returned reads of \[\] for perturbations of \['a'\]"):
        row_sparse_value_and_grad(loss)(jnp.ones(2), {"a": (jnp.zeros((1, 2)),)})
