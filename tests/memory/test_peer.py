"""The PEER layer and its gradients against loops over tokens, heads and experts."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from drawn import filled
from memjax.config.memory import PEERConfig
from memjax.memory.peer import PEERLayer
from memjax.memory.sparse_gradient import row_sparse_value_and_grad
from memjax.memory.table import ValueTable

DIM, NUM_KEYS, HEADS, TOP_K, KEY_DIM = 6, 5, 3, 4, 8
SLOTS = NUM_KEYS**2


def gelu(x):
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def d_gelu(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2 + x * math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def by_hand(p, x, factors, score_scale):
    """Outputs for the tokens x and gradients of sum(factors * outputs), one expert at a time."""
    y, half = np.zeros_like(x), KEY_DIM // 2
    d = SimpleNamespace(x=np.zeros_like(x), **{name: np.zeros_like(array) for name, array in vars(p).items()})
    for t, head in np.ndindex(len(x), HEADS):
        columns = slice(head * KEY_DIM, (head + 1) * KEY_DIM)
        query = x[t] @ p.kernel[:, columns] + p.bias[columns]
        left, right = p.keys[head, 0] @ query[:half], p.keys[head, 1] @ query[half:]
        scores = score_scale * np.add.outer(left, right).reshape(-1)
        best = np.argsort(-scores)[:TOP_K]
        weights = np.exp(scores[best]) / np.sum(np.exp(scores[best]))
        dots = p.inputs[best] @ x[t]
        hidden = np.array([gelu(dot) for dot in dots])
        y[t] += (weights * hidden) @ p.outputs[best]

        d_factor = p.outputs[best] @ factors[t]
        d_weights = hidden * d_factor
        d_scores = score_scale * weights * (d_weights - weights @ d_weights)
        d_query = np.zeros(KEY_DIM)
        for pick, expert in enumerate(best):
            d_dot = d_factor[pick] * weights[pick] * d_gelu(dots[pick])
            d.inputs[expert] += d_dot * x[t]
            d.outputs[expert] += weights[pick] * hidden[pick] * factors[t]
            d.x[t] += d_dot * p.inputs[expert]
            for side, key in enumerate(divmod(expert, NUM_KEYS)):
                part = slice(side * half, (side + 1) * half)
                d.keys[head, side, key] += d_scores[pick] * query[part]
                d_query[part] += d_scores[pick] * p.keys[head, side, key]
        d.bias[columns] += d_query
        d.kernel[:, columns] += np.outer(x[t], d_query)
        d.x[t] += p.kernel[:, columns] @ d_query
    return y, d


class Experts(nnx.Module):
    """A user's model: the layer with its tables."""

    def __init__(self, rngs, dtype=jnp.float32, **options):
        sizes: dict[str, Any] = {"num_keys": NUM_KEYS, "num_heads": HEADS, "top_k": TOP_K, "key_dim": KEY_DIM}
        settings = sizes | {"qk_norm": False, "score_scale": 1.0} | options
        self.layer = PEERLayer(DIM, **settings, param_dtype=dtype, rngs=rngs)
        self.inputs, self.outputs = (
            ValueTable(SLOTS, DIM, dtype=dtype, name=name, rngs=rngs) for name in ("inputs", "outputs")
        )

    def __call__(self, x):
        return self.layer(x, self.inputs, self.outputs)


def build(dtype=jnp.float32, **options):
    return filled(lambda: Experts(nnx.Rngs(0), dtype, **options))


def parameters(model):
    """Parameters or their gradients, named as in `by_hand`."""
    found = {
        "keys": model.layer.keys.keys,
        "kernel": model.layer.keys.query_kernel,
        "bias": model.layer.keys.query_bias,
        "inputs": model.inputs.rows,
        "outputs": model.outputs.rows,
    }
    return SimpleNamespace(**{name: np.asarray(variable[...]) for name, variable in found.items()})


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_output_and_all_gradients_are_those_of_the_formula(implementation):
    with jax.enable_x64(True):
        model = build(jnp.float64, score_scale=0.7, implementation=implementation)
        graphdef, state = nnx.split(model)
        x, factors = np.random.default_rng(1).normal(size=(2, 2, 3, DIM))

        def loss(state, x):
            y = nnx.merge(graphdef, state)(x)
            return jnp.sum(factors * y), y

        (_, y), (d_state, d_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x)
        flat, flat_factors = (array.reshape(-1, DIM) for array in (x, factors))
        expected_y, expected = by_hand(parameters(model), flat, flat_factors, 0.7)
        np.testing.assert_allclose(y, expected_y.reshape(y.shape), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(d_x.reshape(-1, DIM), expected.x, rtol=1e-9, atol=1e-11)
        for name, gradient in vars(parameters(nnx.merge(graphdef, d_state))).items():
            assert np.any(gradient), name
            np.testing.assert_allclose(gradient, getattr(expected, name), rtol=1e-9, atol=1e-11, err_msg=name)


def test_row_gradients_are_the_dense_gradients_of_both_tables():
    with jax.enable_x64(True):
        model = build(jnp.float64, qk_norm=True)
        x, factors = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, DIM)))
        dense = nnx.jit(nnx.value_and_grad(lambda model: jnp.sum(factors * model(x))))
        graphdef, params = nnx.split(model.layer)

        def loss_fn(params, perturbations, inputs, outputs):
            layer = nnx.merge(graphdef, params)
            y, reads = layer.with_reads(x, inputs, outputs, perturbations=perturbations["experts"])
            return jnp.sum(factors * y), ({"experts": reads}, None)

        perturbations = {"experts": model.layer.zero_perturbations(4, model.inputs, model.outputs)}
        run = jax.jit(row_sparse_value_and_grad(loss_fn))
        (loss, _), gradient, rows = run(params, perturbations, model.inputs, model.outputs)

        expected_loss, expected = dense(model)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
        for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected.layer), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-13)
        assert rows.keys() == {"inputs", "outputs"}
        for name, (found,) in rows.items():
            assert found.indices.shape == (4, HEADS * TOP_K)
            whole = expected[name].rows[...]
            assert np.any(whole)
            np.testing.assert_allclose(found.dense(SLOTS), whole, rtol=1e-10, atol=1e-13, err_msg=name)


def test_vmap_equals_a_loop():
    model, x = build(), jax.random.normal(jax.random.key(0), (3, 2, DIM))
    run = jax.jit(lambda x: model(x))
    mapped = jax.jit(jax.vmap(model))(x)
    np.testing.assert_allclose(mapped, np.stack([run(one) for one in x]), rtol=2e-5, atol=1e-5)


def test_the_output_has_the_type_of_the_input():
    model = build(dtype=jnp.bfloat16)
    for dtype in (jnp.bfloat16, jnp.float32):
        assert jax.eval_shape(model, jnp.ones((2, DIM), dtype)).dtype == dtype


def test_the_output_has_the_requested_type():
    def output():
        inputs, outputs = (ValueTable(SLOTS, DIM, rngs=nnx.Rngs(0)) for _ in range(2))
        layer = PEERLayer(DIM, num_keys=NUM_KEYS, top_k=2, key_dim=4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return layer(jnp.ones((2, DIM)), inputs, outputs)

    assert jax.eval_shape(output).dtype == jnp.bfloat16


def test_the_layer_is_initialised_as_its_section_says():
    section = PEERConfig(num_keys=9, num_heads=3, top_k=5, key_dim=12)
    model = nnx.eval_shape(lambda: PEERLayer(16, section, top_k=6, rngs=nnx.Rngs(0)))
    assert model.keys.keys.shape == (3, 2, 9, 6)
    assert model.keys.top_k == 6
    assert {"keys", "query_kernel", "query_bias"} == {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model))}


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="key_dim=7 must be positive and even"):
        PEERLayer(DIM, key_dim=7, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"top_k=5 must be in 1\.\.num_keys=4"):
        PEERLayer(DIM, num_keys=4, top_k=5, rngs=nnx.Rngs(0))
    model, small = build(), filled(lambda: ValueTable(9, DIM, rngs=nnx.Rngs(0)))
    for name, tables in (("inputs", (small, model.outputs)), ("outputs", (model.inputs, small))):
        with pytest.raises(ValueError, match=rf"the experts' {name} has .* \(9, 6\), the layer addresses \(25, 6\)"):
            jax.eval_shape(lambda x, tables=tables: model.layer(x, *tables), jnp.ones((1, DIM)))


def test_foreign_optimizer_loop_trains_both_tables_where_they_were_read():
    model = build()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (2, DIM))
    before, read = parameters(model), np.zeros(SLOTS, bool)

    @nnx.jit
    def step(model, optimizer):
        indices = model.layer.lookup(x).indices
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x) - jnp.sin(3 * x)) ** 2))(model)
        optimizer.update(model, gradient)
        return loss, indices

    losses = []
    for _ in range(40):
        loss, indices = step(model, optimizer)
        losses.append(float(loss))
        read[np.asarray(indices)] = True
    assert losses[-1] < 0.2 * losses[0]
    assert not read.all(), "the test needs experts that no token chose"
    for name, rows in (("inputs", before.inputs), ("outputs", before.outputs)):
        np.testing.assert_array_equal(np.any(getattr(parameters(model), name) != rows, axis=1), read, err_msg=name)
