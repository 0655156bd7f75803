"""Operations inside a user's `jax.shard_map` with its checks enabled give the same results as outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from memjax.ops.embedding_bag.api import embedding_bag
from memjax.ops.embedding_dot.api import embedding_dot
from memjax.ops.product_key_search.api import product_key_search
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update import dense
from memjax.ops.row_update.api import row_update
from memjax.ops.row_update.rules import RowRule, row_step

TOKENS, ROWS, COLUMNS = 8, 12, 4
RULE = RowRule(state_columns=4)


def mesh_of_four():
    return jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:4])


def shard_mapped(function, in_specs, out_specs, *arguments, run=True):
    """Traces with check_vma, JAX's default, and runs unless told not to: Triton's interpreter needs a single device."""
    mesh = mesh_of_four()
    placed = [jax.device_put(value, NamedSharding(mesh, spec)) for value, spec in zip(arguments, in_specs, strict=True)]
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))
    return mapped(*placed) if run else mapped.trace(*placed)


def draw():
    rng = np.random.default_rng(0)
    as_float = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    indices = jnp.asarray(rng.integers(ROWS, size=(TOKENS, 3)), jnp.int32)
    return as_float(ROWS, COLUMNS), indices, as_float(TOKENS, 3), as_float(TOKENS, COLUMNS)


def assert_close(got, expected):
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=2e-6, atol=2e-6), got, expected)


@pytest.mark.parametrize("implementation", ["triton", "xla", "reference"])
def test_bag_and_dot_and_their_gradients(implementation):
    table, indices, weights, vectors = draw()

    def losses(table, indices, weights, vectors):
        bag = embedding_bag(table, indices, weights, implementation=implementation)
        dot = embedding_dot(table, indices, vectors, implementation=implementation)
        return jnp.sum(jnp.sin(bag)) + jnp.sum(jnp.sin(dot))

    grad = lambda reduce: jax.grad(lambda *a: reduce(losses(*a)), argnums=(0, 2, 3))
    specs = (P(), P("i"), P("i"), P("i"))
    summed = grad(lambda loss: jax.lax.psum(loss, "i"))
    runs = implementation != "triton"
    got = shard_mapped(summed, specs, (P(), P("i"), P("i")), table, indices, weights, vectors, run=runs)
    if runs:
        assert_close(got, grad(lambda loss: loss)(table, indices, weights, vectors))


@pytest.mark.parametrize("implementation", ["triton", "xla", "reference"])
def test_search_in_chunks_and_its_gradients(implementation):
    rng = np.random.default_rng(1)
    queries, keys = rng.normal(size=(TOKENS, 2, 6)), rng.normal(size=(2, 2, 5, 3))
    queries, keys = jnp.asarray(queries, jnp.float32), jnp.asarray(keys, jnp.float32)

    def run(reduce):
        def loss(queries, keys):
            scores, _ = product_key_search(queries, keys, 3, implementation=implementation, chunk_bytes=8 * 2 * 5)
            return reduce(jnp.sum(jnp.sin(scores)))

        return jax.grad(loss, argnums=(0, 1))

    runs, summed = implementation != "triton", run(lambda loss: jax.lax.psum(loss, "i"))
    got = shard_mapped(summed, (P("i"), P()), (P("i"), P()), queries, keys, run=runs)
    if runs:
        assert_close(got, run(lambda loss: loss)(queries, keys))


@pytest.mark.parametrize("implementation", ["triton", "xla", "reference", "dense"])
def test_row_update_of_gathered_row_gradients(implementation):
    table, *factors = draw()

    def update(table, state, *factors):
        gradient, step = RowGradient(*factors), row_step(0.1, 0)
        if implementation != "dense":
            return row_update(table, state, [gradient], RULE, step, implementation=implementation)
        nothing = jnp.zeros((ROWS, COLUMNS)), jnp.zeros(ROWS, bool)
        return dense.update_touched(table, state, *dense.summed([gradient], nothing, piece_picks=4), RULE, step)

    def gathered(table, state, *factors):
        factors = [jax.lax.all_gather(factor, "i", tiled=True) for factor in factors]
        return jax.tree.map(lambda array: array[None], update(table, state, *factors))

    state = RULE.init(ROWS, COLUMNS)
    specs, runs = (P(), P(), P("i"), P("i"), P("i")), implementation != "triton"
    copies = shard_mapped(gathered, specs, P("i"), table, state, *factors, run=runs)
    if not runs:
        return
    expected = update(table, state, *factors)
    for device in range(4):
        assert_close(jax.tree.map(lambda array, d=device: np.asarray(array)[d], copies), expected)
