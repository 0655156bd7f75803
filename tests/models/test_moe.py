"""Experts against a loop over tokens in NumPy, float64."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.models.moe import MoE, Routing, router_statistics

SEQUENCES, LENGTH, DIM, HIDDEN, EXPERTS = 8, 5, 4, 3, 3
# Padding comes last; the last sequence consists of padding only.
REAL = np.arange(LENGTH)[None, :] < np.array([5, 4, 2, 1, 5, 3, 5, 0])[:, None]
WAYS: dict[str, dict[str, Any]] = {
    "top 2": {"top_k": 2},
    "renormalized": {"top_k": 2, "renormalize": True},
    "expert choice": {"routing": "expert_choice"},
    "capacity 2": {"routing": "expert_choice", "capacity_factor": 2.0},
}


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def expert(params, number, token):
    up = token @ params["gate"][number]
    return (up / (1 + np.exp(-up)) * (token @ params["up"][number])) @ params["down"][number]


def by_hand(params, x, training=True, routing="token_choice", top_k=1, renormalize=False, capacity_factor=1.0):
    out = np.zeros(x.shape)
    for row, sequence in enumerate(x):
        probabilities = softmax(sequence @ params["router"])
        if training and routing == "expert_choice":
            count = int(np.ceil(REAL[row].sum() * capacity_factor / EXPERTS))
            for number in range(EXPERTS):
                candidates = sorted(np.flatnonzero(REAL[row]), key=lambda place: -probabilities[place, number])
                for place in candidates[:count]:
                    out[row, place] += probabilities[place, number] * expert(params, number, sequence[place])
            continue
        for place, token in enumerate(sequence):
            best = np.argsort(-probabilities[place])[:top_k]
            weights = probabilities[place, best]
            for number, weight in zip(best, weights / weights.sum() if renormalize else weights, strict=True):
                out[row, place] += weight * expert(params, number, token)
    return out


def draw(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"router": (DIM, EXPERTS), "gate": (EXPERTS, DIM, HIDDEN), "up": (EXPERTS, DIM, HIDDEN)}
    shapes |= {"down": (EXPERTS, HIDDEN, DIM)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}, rng.normal(size=(SEQUENCES, LENGTH, DIM))


def layer_of(params, **way):
    dtype = params["router"].dtype
    settings: dict[str, Any] = {"num_experts": EXPERTS, "top_k": 1} | way
    layer = MoE(DIM, HIDDEN, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0), **settings)
    layer.router.kernel[...] = jnp.asarray(params["router"])
    for name in ("gate", "up", "down"):
        getattr(layer, name)[...] = jnp.asarray(params[name])
    return layer


def run(params, x, factors, way):
    """Outputs, routing and gradients of sum(factors * sin(out)), with padding masked out of the loss."""

    def loss(params, x):
        out, routing = layer_of(params, **way)(x, jnp.asarray(REAL), training=True)
        return jnp.sum(factors * REAL[..., None] * jnp.sin(out)), (out, routing)

    (_, (out, routing)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return out, routing, gradients


@pytest.fixture(scope="module", params=WAYS)
def case(request):
    params, x = draw()
    factors = np.random.default_rng(9).normal(size=x.shape)
    way = WAYS[request.param]
    with jax.enable_x64(True):
        found = jax.jit(partial(run, way=way))(params, x, factors)
    return way, params, x, factors, jax.tree.map(np.asarray, found)


def test_outputs_are_those_of_a_loop_over_tokens(case):
    way, params, x, _, (out, routing, _) = case
    expected = by_hand(params, x, **way)
    np.testing.assert_allclose(out[REAL], expected[REAL], rtol=1e-12, atol=1e-12)
    logits = (x @ params["router"]).reshape(-1, EXPERTS)
    np.testing.assert_allclose(routing.logits, logits, rtol=1e-12)
    chosen = np.argsort(-logits, axis=-1)[:, : way.get("top_k", 1)]
    np.testing.assert_array_equal(routing.picks, chosen)
    if "routing" in way:
        assert not out[~REAL].any(), "no expert processes padding"


def test_gradients_are_those_of_finite_differences(case):
    way, params, x, factors, (_, _, gradients) = case
    rng = np.random.default_rng(5)

    def loss(params, x):
        return np.sum(factors * REAL[..., None] * np.sin(by_hand(params, x, **way)))

    slopes = []
    for name in (*params, "x"):
        direction, step = rng.normal(size=(params | {"x": x})[name].shape), 1e-6
        moved = [params | {"x": x} | {name: (params | {"x": x})[name] + sign * step * direction} for sign in (1, -1)]
        up, down = (loss(arrays, arrays["x"]) for arrays in moved)
        gradient = gradients[1] if name == "x" else gradients[0][name]
        slopes.append((np.sum(gradient * direction), (up - down) / (2 * step)))
    got, expected = np.array(slopes).T
    assert np.all(np.abs(expected) > 1e-3)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["top 2", "capacity 2"], indirect=True)
def test_on_a_mesh_outputs_and_gradients_are_those_of_one_device(case, mesh):
    way, params, x, factors, alone = case
    with jax.enable_x64(True), jax.set_mesh(mesh):
        split = jax.jit(partial(run, way=way))(params, x, factors)
    for one, other in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_without_training_experts_do_not_choose():
    params, x = draw()
    with jax.enable_x64(True):
        out, _ = nnx.jit(lambda layer: layer(jnp.asarray(x)))(layer_of(params, routing="expert_choice"))
    np.testing.assert_allclose(out, by_hand(params, x, training=False), rtol=1e-12, atol=1e-12)


def test_experts_without_tokens_learn_nothing():
    params, x = draw()
    # A constant feature in every token lets the router ignore the others.
    x[..., 0], params["router"] = 1, np.zeros((DIM, EXPERTS))
    params["router"][0] = [0, 5, -5]
    with jax.enable_x64(True):
        out, routing, (gradients, _) = jax.jit(partial(run, way={}))(params, x, np.ones(x.shape))
    np.testing.assert_allclose(out, by_hand(params, x), rtol=1e-12, atol=1e-12)
    assert np.all(np.asarray(routing.picks) == 1)
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(np.any(gradients[name], axis=(1, 2)), [False, True, False])


@pytest.mark.parametrize("name", ["top 2", "expert choice"])
def test_with_the_routing_saved_nothing_is_chosen_or_sorted_twice(name):
    params, x = (jax.tree.map(np.float32, part) for part in draw())

    def choices(policy):
        def loss(params):
            return jnp.sum(jnp.sin(layer_of(params, **WAYS[name])(jnp.asarray(x), training=True)[0]))

        text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(params))
        return len(re.findall(r" = (top_k|sort)\[", text))

    policies = jax.checkpoint_policies
    once = choices(policies.everything_saveable)
    assert once > 0
    assert choices(policies.save_only_these_names("routing")) == once
    assert choices(policies.nothing_saveable) > once


def test_the_kernels_take_the_place_of_the_ragged_dot():
    params, x = (jax.tree.map(np.float32, part) for part in draw())
    outs = [layer_of(params, top_k=2, implementation=name)(jnp.asarray(x))[0] for name in ("xla", "triton")]
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-5, atol=1e-6)


def test_statistics_by_hand_leave_padding_out():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(6, EXPERTS))
    picks = np.argsort(-logits, axis=-1)[:, :2]
    real = np.array([True, True, False, True, True, False])
    with jax.enable_x64(True):
        found = router_statistics(Routing(jnp.asarray(logits), jnp.asarray(picks, jnp.int32)), jnp.asarray(real))
        none = router_statistics(Routing(jnp.asarray(logits), jnp.asarray(picks, jnp.int32)), jnp.zeros(6, bool))
    load, mean, z, entropy = np.zeros(EXPERTS), np.zeros(EXPERTS), 0.0, 0.0
    for token in np.flatnonzero(real):
        probabilities = softmax(logits[token])
        for pick in picks[token]:
            load[pick] += 1 / (2 * 4)
        mean += probabilities / 4
        z += np.log(np.exp(logits[token]).sum()) ** 2 / 4
        entropy -= np.sum(probabilities * np.log(probabilities)) / 4
    np.testing.assert_allclose(found.load, load, rtol=1e-12)
    np.testing.assert_allclose(found.balance, EXPERTS * np.sum(load * mean), rtol=1e-12)
    np.testing.assert_allclose([found.z, found.entropy], [z, entropy], rtol=1e-12)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(none))
