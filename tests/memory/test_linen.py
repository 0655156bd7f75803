"""The layer inside a Linen model, through Flax's own bridge."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.nnx import bridge

from memjax import MemoryLayer, ValueTable

DIM = 8


class Memory(nnx.Module):
    """A layer and its table."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.table = ValueTable(8**2, DIM, rngs=rngs)
        self.layer = MemoryLayer(DIM, num_keys=8, num_heads=2, top_k=4, key_dim=8, rngs=rngs)

    def __call__(self, x):
        return x + self.layer(x, self.table)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(DIM)(x)
        x = bridge.to_linen(Memory, name="memory")(x)
        return nn.Dense(1)(x)


def test_a_linen_model_trains_its_memory():
    model = Model()
    x = jax.random.normal(jax.random.key(0), (32, 4))
    y = jnp.sin(3 * x[:, :1])
    # Table and keys are separate collections, so all variables are trained, not only `params`.
    variables = jax.jit(model.init)(jax.random.key(1), x)
    assert {"params", "TableRows", "QueryKeyParam"} == set(variables)
    assert variables["TableRows"]["memory"]["table"]["rows"].shape == (64, DIM)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, state):
        loss, gradients = jax.value_and_grad(lambda v: jnp.mean((jnp.asarray(model.apply(v, x)) - y) ** 2))(variables)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(variables, updates), state, loss

    trained, state, losses = variables, optimizer.init(variables), []
    for _ in range(100):
        trained, state, loss = step(trained, state)
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    changed = jax.tree.map(lambda old, new: bool(np.any(np.asarray(old) != np.asarray(new))), variables, trained)
    assert all(jax.tree.leaves(changed))
    # The model is worse without what the table has learned.
    forgetful = {**trained, "TableRows": variables["TableRows"]}
    assert step(forgetful, state)[2] > losses[-1]
