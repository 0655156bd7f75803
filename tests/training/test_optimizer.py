"""Schedules, and how the dense optimizer treats each kind of parameter."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.optim import OptimConfig, ScheduleConfig
from memjax.memory.keys import QueryKeyParam
from memjax.memory.table import TableRows
from memjax.models.parts import DecoderParts
from memjax.runs.layout import params_to_tree
from memjax.training.optimizer import make_optimizer, make_schedule, parameter_groups
from memjax.training.program import TrainProgram


def by_hand(config: ScheduleConfig, steps: int, number: int) -> float:
    """The learning rate of a step, numbered from 1."""
    if number < config.warmup_steps:
        return config.lr * number / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    floor = config.final_fraction * config.lr
    if config.schedule == "wsd":
        left = min(1, (steps - number) / config.decay_steps)
        return floor + (config.lr - floor) * left
    done = (number - config.warmup_steps) / (steps - config.warmup_steps)
    return floor + (config.lr - floor) * (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_a_rate_rises_and_then_follows_its_schedule(schedule, warmup_steps):
    config = ScheduleConfig(lr=0.3, schedule=schedule, warmup_steps=warmup_steps, final_fraction=0.1, decay_steps=8)
    rates = np.array(jax.vmap(make_schedule(config, 40))(jnp.arange(40)))
    np.testing.assert_allclose(rates, [by_hand(config, 40, number) for number in range(1, 41)], rtol=1e-5)
    assert rates[-1] == pytest.approx(0.3 if schedule == "constant" else 0.03)
    assert rates.min() > 0, "no step is wasted at rate zero"


def test_a_share_of_the_steps_warms_up_as_long_as_their_number():
    for share, steps, number in ((0.1, 40, 4), (0.03125, 128_000, 4000), (0.067, 750, 50), (0.1, 1, 0), (0.99, 5, 4)):
        assert ScheduleConfig(lr=1.0, warmup_steps=share).warmup_of(steps) == number
    rates = [make_schedule(ScheduleConfig(lr=0.3, warmup_steps=warmup), 40) for warmup in (0.1, 4)]
    by_share, by_number = (np.array([rate(step) for step in (0, 3, 4, 39)]) for rate in rates)
    np.testing.assert_array_equal(by_share, by_number)
    with pytest.raises(
        ValueError, match=r"warmup_steps=2\.5 must be a whole number of steps, or a fraction of them below 1"
    ):
        ScheduleConfig(lr=1.0, warmup_steps=2.5)


def test_a_decay_takes_no_more_than_the_warm_up_leaves():
    of = lambda **settings: ScheduleConfig(lr=1.0, schedule="wsd", **settings)
    assert of(warmup_steps=10, decay_steps=0.2).decay_of(40) == 8
    assert of(warmup_steps=10, decay_steps=50).decay_of(40) == 30
    assert of(warmup_steps=50, decay_steps=8).decay_of(40) == 0
    assert make_schedule(of(warmup_steps=0, decay_steps=0), 4)(3) == 1.0
    with pytest.raises(ValueError, match=r"decay_steps=1\.5 must be a whole number of steps"):
        of(decay_steps=1.5)


def test_a_rate_has_no_jump_where_its_parts_join():
    config = ScheduleConfig(lr=1.0, warmup_steps=100, final_fraction=0.0)
    rates = np.array(jax.vmap(make_schedule(config, 1000))(jnp.arange(1000)))
    assert rates.max() == rates[99] == 1
    assert np.abs(np.diff(rates)).max() <= 0.0101


def test_tables_have_their_own_schedule(tiny):
    config = tiny.config("--optim.lr 0.1 --optim.table.lr 0.2 --optim.table.schedule cosine --train.steps 10")
    program = TrainProgram.of(config)
    steps = jnp.arange(10)
    np.testing.assert_allclose(jax.vmap(program.schedule)(steps), np.full(10, 0.1, np.float32))
    expected = [by_hand(config.optim.table, 10, number) for number in range(1, 11)]
    np.testing.assert_allclose(jax.vmap(program.table_optimizer.rate)(steps), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def first_updates(tiny):
    """first_updates(gradient, ...): the first update at rate 1 of parameters that are all 1, by path."""
    parts = DecoderParts.of(tiny.config().model)

    def update(gradient: float, **optim) -> dict[str, np.ndarray]:
        config = OptimConfig(lr=1.0, warmup_steps=0, schedule="constant", **optim)
        optimizer = make_optimizer(config, 10, parts.abstract_params)

        @jax.jit
        def run():
            params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), parts.abstract_params)
            gradients = jax.tree.map(lambda leaf: gradient * leaf, params)
            return optimizer.update(gradients, optimizer.init(params), params)[0]

        flat, _ = jax.tree_util.tree_flatten_with_path(params_to_tree(run()))
        return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in flat}

    return update


def is_address(path: str) -> bool:
    return "memory/keys" in path


def test_queries_and_keys_move_at_a_share_of_the_rate(first_updates):
    updates = first_updates(0.01, key_lr_factor=0.25, weight_decay=0.0, max_grad_norm=None)
    slow = {path for path in updates if is_address(path)}
    assert {path.rpartition("/")[2] for path in slow} == {"keys", "query_kernel", "query_bias"}
    for path, update in updates.items():
        # Adam's first step is the rate times the gradient's sign.
        np.testing.assert_allclose(update, -0.25 if path in slow else -1.0, rtol=1e-4)


def test_matrices_decay_but_norms_and_biases_do_not(first_updates):
    updates = first_updates(0.0, key_lr_factor=0.25, weight_decay=0.1)
    for path, update in updates.items():
        decays = path.endswith(("kernel", "embedding", "/keys"))
        assert decays or path.endswith(("scale", "bias"))
        np.testing.assert_allclose(update, (-0.025 if is_address(path) else -0.1) if decays else 0.0, rtol=1e-5)


def test_the_gradient_is_clipped_as_a_whole(first_updates):
    # With an eps of 1, the first step is g / (|g| + 1), which reveals the size of the clipped gradient.
    free, clipped = (first_updates(0.5, eps=1.0, weight_decay=0.0, max_grad_norm=clip) for clip in (None, 0.1))
    count = sum(update.size for update in free.values())
    each = 0.1 / math.sqrt(count)
    np.testing.assert_allclose(free["norm/scale"], -0.5 / 1.5, rtol=1e-4)
    np.testing.assert_allclose(clipped["norm/scale"], -each / (1 + each), rtol=1e-3)


def test_frozen_parameters_neither_move_nor_have_a_state(first_updates, tiny):
    free, frozen = (
        first_updates(0.5, eps=1.0, weight_decay=0.1, max_grad_norm=None, freeze_dense=on) for on in (False, True)
    )
    for path, update in frozen.items():
        np.testing.assert_array_equal(update, free[path] if "/memory/" in path else np.zeros_like(update))
    program = TrainProgram.of(tiny.config("--optim.freeze_dense true"))
    trained = sum(array.size for path, array in free.items() if "/memory/" in path)
    kept = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.opt_state) if leaf.ndim)
    assert kept == 2 * trained, "two moments for what is trained, none for the rest"


def test_peer_layers_are_not_frozen_with_the_dense_part(tiny):
    config = tiny.config("--model.memory null --model.peer.layers 1 --optim.freeze_dense true")
    groups = parameter_groups(config.optim, TrainProgram.of(config).parts.abstract_params)
    found = {(jax.tree_util.keystr(path), group) for path, group in jax.tree_util.tree_leaves_with_path(groups)}
    assert all((group == "address") == ("peer" in path) for path, group in found)
    assert {group for _, group in found} == {"address", "frozen"}


def test_the_optimizer_of_dense_parameters_never_sees_a_table(tiny):
    program = TrainProgram.of(tiny.config())
    variables = jax.tree.leaves(program.parts.abstract_params, is_leaf=lambda leaf: hasattr(leaf, "get_metadata"))
    assert any(isinstance(variable, QueryKeyParam) for variable in variables)
    assert not any(isinstance(variable, TableRows) for variable in variables)
    state = program.abstract_state
    assert all(leaf.shape != (64, 256) for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert state.tables["shared"].shape == (64, 256)
