from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from drawn import filled
from memjax.memory.keys import QueryKeyParam
from memjax.memory.layer import MemoryLayer
from memjax.memory.table import TableRows, ValueTable

DIM, NUM_KEYS = 6, 5


def silu(x):
    return x / (1 + np.exp(-x))


def by_hand(layer, rows, x, *, num_heads, top_k, qk_norm, score_scale):
    """The paper's Memory+, one token and one head at a time, over all num_keys ** 2 slots."""

    def parameter(variable):
        return np.asarray(variable[...], np.float64)

    kernel, bias, keys = (parameter(p) for p in (layer.keys.query_kernel, layer.keys.query_bias, layer.keys.keys))

    def unit(vectors):
        return vectors / np.sqrt(np.sum(vectors**2, axis=-1, keepdims=True)) if qk_norm else vectors

    half = keys.shape[-1]
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:-1]):
        query, y = (x[place] @ kernel + bias).reshape(num_heads, 2 * half), np.zeros(rows.shape[1])
        for head in range(num_heads):
            left = unit(keys[head, 0]) @ unit(query[head, :half])
            right = unit(keys[head, 1]) @ unit(query[head, half:])
            scores = score_scale * np.add.outer(left, right).reshape(-1)
            best = np.argsort(-scores)[:top_k]
            weights = np.exp(scores[best]) / np.sum(np.exp(scores[best]))
            y += weights @ rows[best]
        if layer.gate_proj is not None:
            y *= silu(x[place] @ parameter(layer.gate_proj.kernel) + parameter(layer.gate_proj.bias))
        if layer.value_proj is not None:
            y = y @ parameter(layer.value_proj.kernel) + parameter(layer.value_proj.bias)
        if layer.output_gate is not None:
            gate = x[place] @ parameter(layer.output_gate.kernel) + parameter(layer.output_gate.bias)
            y = y / (1 + np.exp(-gate))
        if layer.scale is not None:
            y = y * parameter(layer.scale)
        out[place] = y
    return out


def build(dtype=jnp.float32, **options):
    """A layer with non-zero biases, and its table."""
    sizes = {"num_keys": NUM_KEYS, "num_heads": 3, "top_k": 4, "key_dim": 8, "param_dtype": dtype}
    options = sizes | {"qk_norm": False, "score_scale": 1.0} | options
    layer = filled(lambda: MemoryLayer(DIM, rngs=nnx.Rngs(0), **options))
    return layer, filled(lambda: ValueTable(NUM_KEYS**2, layer.value_dim, dtype=dtype, rngs=nnx.Rngs(0)))


run = nnx.jit(lambda layer, x, table: layer(x, table))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "none", "num_heads": 1},
        {"gate": "none", "value_dim": 10, "output_gate": True, "placement": "parallel"},
        {"output_gate": True},
        {"value_dim": 4, "qk_norm": True, "score_scale": 3.0},
        {"top_k": NUM_KEYS, "num_heads": 1, "score_scale": 0.5, "implementation": "reference"},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()) or "default",
)
def test_output_is_the_papers_formula(options):
    with jax.enable_x64(True):
        layer, table = build(dtype=jnp.float64, **options)
        x = np.random.default_rng(0).normal(size=(2, 3, DIM))
        y = run(layer, x, table)
        assert y.dtype == np.float64
        settings = {"num_heads": 3, "top_k": 4, "qk_norm": False, "score_scale": 1.0} | {
            name: value for name, value in options.items() if name in ("num_heads", "top_k", "qk_norm", "score_scale")
        }
        np.testing.assert_allclose(
            y, by_hand(layer, np.asarray(table.rows[...]), x, **settings), rtol=1e-10, atol=1e-10
        )


def test_a_layer_that_starts_at_zero_adds_nothing_at_first():
    layer = MemoryLayer(DIM, num_keys=NUM_KEYS, top_k=2, key_dim=4, placement="parallel", rngs=nnx.Rngs(0))
    assert layer.scale is not None
    np.testing.assert_array_equal(layer.scale[...], np.zeros(DIM))


def test_lookup_weights_of_every_head_add_up_to_one():
    layer, _ = build()
    lookup = nnx.jit(lambda layer, x: layer.lookup(x))(layer, jax.random.normal(jax.random.key(0), (7, DIM)))
    assert lookup.indices.shape == lookup.weights.shape == (7, 12)
    np.testing.assert_allclose(lookup.weights.reshape(7, 3, 4).sum(-1), 1, rtol=1e-6)
    assert int(lookup.indices.min()) >= 0
    assert int(lookup.indices.max()) < NUM_KEYS**2


def test_activations_have_the_requested_type():
    layer, table = build(dtype=jnp.float32)
    x = jnp.ones((2, DIM), jnp.bfloat16)
    assert jax.eval_shape(lambda: layer(x, table)).dtype == jnp.float32
    options = {"num_keys": NUM_KEYS, "top_k": 2, "key_dim": 4, "dtype": jnp.bfloat16}
    compute = filled(lambda: MemoryLayer(DIM, rngs=nnx.Rngs(0), **options))
    assert jax.eval_shape(lambda: compute(x, table)).dtype == jnp.bfloat16


@pytest.mark.parametrize("options", [{}, {"gate": "none"}, {"gate": "none", "value_dim": 2 * DIM}])
@pytest.mark.parametrize(
    ("dtype", "of_input", "of_parameters", "expected"),
    [
        ("bfloat16", "float32", "float32", "bfloat16"),
        ("float32", "bfloat16", "bfloat16", "float32"),
        (None, "bfloat16", "float32", "float32"),
        (None, "bfloat16", "bfloat16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("of_table", ["float32", "bfloat16"])
def test_neither_gate_nor_table_decides_the_type_of_the_output(
    options, dtype, of_input, of_parameters, expected, of_table
):
    def output():
        sizes = {"num_keys": NUM_KEYS, "num_heads": 2, "top_k": 2, "key_dim": 4} | options
        layer = MemoryLayer(DIM, dtype=dtype, param_dtype=of_parameters, rngs=nnx.Rngs(0), **sizes)
        table = ValueTable(NUM_KEYS**2, layer.value_dim, dtype=of_table, rngs=nnx.Rngs(0))
        return layer(jnp.ones((2, DIM), of_input), table)

    assert jax.eval_shape(output).dtype == expected


def test_parameters_are_initialised_as_in_the_paper():
    layer = MemoryLayer(64, num_keys=32, num_heads=2, key_dim=128, value_dim=256, rngs=nnx.Rngs(0))
    keys, kernel = layer.keys.keys[...], layer.keys.query_kernel[...]
    assert keys.shape == (2, 2, 32, 64)
    bound = 128**-0.5
    assert bound * 0.99 < float(jnp.abs(keys).max()) <= bound
    xavier = (6 / (64 + 2 * 128)) ** 0.5
    assert xavier * 0.99 < float(jnp.abs(kernel).max()) <= xavier
    assert layer.gate_proj is not None
    assert layer.value_proj is not None
    np.testing.assert_allclose(np.std(layer.gate_proj.kernel[...]), 256**-0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(layer.value_proj.kernel[...]), 64**-0.5, rtol=0.05)
    for bias in (layer.keys.query_bias, layer.gate_proj.bias, layer.value_proj.bias):
        assert bias is not None
        assert not np.any(bias[...])


def test_queries_and_keys_are_distinguished_by_type():
    layer, table = build()
    addresses = nnx.to_flat_state(nnx.state(layer, QueryKeyParam))
    assert [path for path, _ in addresses] == [("keys", name) for name in ("keys", "query_bias", "query_kernel")]
    assert [path for path, _ in nnx.to_flat_state(nnx.state(table, TableRows))] == [("rows",)]
    # TableRows is a subclass of Param, so optimizers that select nnx.Param train it.
    assert [path for path, _ in nnx.to_flat_state(nnx.state(table, nnx.Param))] == [("rows",)]


def test_sizes_that_do_not_fit_are_refused():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="key_dim=7 must be positive and even"):
        MemoryLayer(DIM, num_keys=4, top_k=2, key_dim=7, rngs=rngs)
    with pytest.raises(ValueError, match=r"top_k=5 must be in 1\.\.num_keys=4: each half offers only"):
        MemoryLayer(DIM, num_keys=4, top_k=5, key_dim=8, rngs=rngs)
    layer, _ = build()
    small = filled(lambda: ValueTable(9, DIM, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"the table has \[num_slots, value_dim\] = \(9, 6\), .* \(25, 6\)"):
        jax.eval_shape(lambda: layer(jnp.ones((1, DIM)), small))
    with pytest.raises(ValueError, match="implementation='cuda' is unknown"):
        build(implementation="cuda")[0].lookup(jnp.ones((1, DIM)))


@cache
def shared():
    """A layer, its table and an input, for tests that need no particular one."""
    layer, table = build()
    return layer, table, jax.random.normal(jax.random.key(1), (4, 3, DIM))


def test_vmap_equals_a_loop():
    layer, table, x = shared()
    expected = np.stack([run(layer, one, table) for one in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda one: layer(one, table)))(x), expected, rtol=2e-5, atol=1e-6)

    def gradient(one):
        return jax.grad(lambda rows: jnp.sum(layer(one, with_rows(table, rows)) ** 2))(table.rows[...])

    mapped = jax.jit(jax.vmap(gradient))(x)
    alone = jax.jit(gradient)
    np.testing.assert_allclose(mapped, np.stack([alone(one) for one in x]), rtol=2e-5, atol=1e-6)


def with_rows(table, rows):
    graphdef, _ = nnx.split(table)
    return nnx.merge(graphdef, nnx.State({"rows": TableRows(rows)}))


def test_vmap_over_layers_equals_a_loop():
    layer, table, x = shared()
    graphdef, state = nnx.split(layer)
    states = [jax.tree.map(lambda leaf, factor=factor: factor * leaf, state) for factor in (1.0, -0.5, 0.7)]
    stacked = nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    mapped = nnx.jit(nnx.vmap(lambda layer, x, table: layer(x, table), in_axes=(0, None, None)))(stacked, x[0], table)
    alone = [run(nnx.merge(graphdef, state), x[0], table) for state in states]
    np.testing.assert_allclose(mapped, np.stack(alone), rtol=2e-5, atol=1e-6)


def test_scan_equals_a_loop():
    layer, table, x = shared()
    _, scanned = jax.jit(lambda x: jax.lax.scan(lambda carry, one: (carry, layer(one, table)), 0, x))(x)
    np.testing.assert_allclose(scanned, np.stack([run(layer, one, table) for one in x]), rtol=2e-5, atol=1e-6)


def test_checkpoint_leaves_loss_and_gradients_as_they_are():
    layer, table, x = shared()
    graphdef, state = nnx.split((layer, table))

    def loss(state, x):
        layer, table = nnx.merge(graphdef, state)
        return jnp.sum(layer(x, table) ** 2)

    plain = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, x)
    again = jax.jit(jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1)))(state, x)
    for got, expected in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


class Model(nnx.Module):
    """A user's model."""

    def __init__(self, rngs):
        self.table = ValueTable(NUM_KEYS**2, DIM, rngs=rngs)
        self.layer = MemoryLayer(DIM, num_keys=NUM_KEYS, num_heads=2, top_k=2, key_dim=4, rngs=rngs)
        self.out = nnx.Linear(DIM, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(x + self.layer(x, self.table))


def test_foreign_optimizer_loop_trains_the_table():
    model = filled(lambda: Model(nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (4, DIM))
    target = jnp.sin(3 * x.sum(-1, keepdims=True))
    before = np.asarray(model.table.rows[...])
    read = np.zeros(len(before), bool)

    @nnx.jit
    def step(model, optimizer):
        lookup = model.layer.lookup(x)
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x) - target) ** 2))(model)
        optimizer.update(model, gradient)
        return loss, lookup.indices

    losses = []
    for _ in range(30):
        loss, indices = step(model, optimizer)
        losses.append(float(loss))
        read[np.asarray(indices)] = True
    assert losses[-1] < 0.2 * losses[0]
    changed = np.any(np.asarray(model.table.rows[...]) != before, axis=1)
    assert not read.all(), "the test needs rows that were never read"
    np.testing.assert_array_equal(changed, read)
