"""Training steps of a model with experts: equal on every mesh, and with the right metrics."""

import functools

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 3
MODEL = """
--model.num_layers 1 --model.memory null --model.dtype float64 --model.param_dtype float64
--model.experts.num_experts 3 --model.experts.aux_loss_weight 0.1 --model.experts.z_loss_weight 0.05
"""


@pytest.fixture(scope="module")
def trained(tiny, float64):
    """trained(settings, mesh): the result of a few steps, cached."""

    @functools.cache
    def run(settings: str = "", mesh_shape: tuple[int, int] = (1, 1)):
        mesh = "--mesh.data {} --mesh.memory {}".format(*mesh_shape)
        return tiny.train(tiny.config(MODEL, settings, mesh), tiny.batches(STEPS), mesh_shape)

    return run


@pytest.mark.parametrize(
    ("settings", "mesh_shape"),
    [pytest.param("", (1, 2), marks=pytest.mark.slow, id="2"), pytest.param("--train.remat block", (2, 4), id="8")],
)
def test_on_a_mesh_and_with_blocks_computed_again_a_run_is_that_of_one_device(trained, settings, mesh_shape):
    split, alone = trained(settings, mesh_shape), trained()
    assert any(leaf.ndim == 3 for leaf in jax.tree.leaves(alone.after.params))
    for one, other in zip(jax.tree.leaves(split.after.params), jax.tree.leaves(alone.after.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-7)
    for row, expected in zip(split.metrics, alone.metrics, strict=True):
        assert row.keys() == expected.keys()
        np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=1e-7)


def test_experts_are_split_over_the_devices(trained):
    matrices = trained("--train.remat block", (2, 4)).live.params["blocks"][0]["experts"]["down"][...]
    assert matrices.shape == (3, 24, 16)
    assert {piece.data.shape for piece in matrices.addressable_shards} == {(3, 3, 16)}


def test_metrics_show_how_tokens_spread(trained):
    row = trained().metrics[0]
    found = {name.removeprefix("moe/L0/"): float(value) for name, value in row.items() if name.startswith("moe/")}
    assert found.keys() == {"load_balance_loss", "z_loss", "entropy", "most_loaded", "least_loaded"}
    assert 0 <= found["least_loaded"] < 1 / 3 < found["most_loaded"] <= 1 / 2
    assert 0 < found["entropy"] < np.log(3)
    assert 0.5 < found["load_balance_loss"] < 3


def test_router_losses_are_trained_but_not_reported_as_the_models_loss(trained):
    weights = "--model.experts.aux_loss_weight 0 --model.experts.z_loss_weight 0"
    with_losses, without = trained(), trained(f"{weights} --train.grad_accum_steps 2")
    np.testing.assert_allclose(with_losses.losses[0], without.losses[0], rtol=1e-12)
    assert np.all(np.abs(with_losses.losses[1:] / without.losses[1:] - 1) > 1e-6)
    # All but the balance loss are sums over tokens, so they do not depend on micro-batches.
    for name in ("z_loss", "entropy", "most_loaded", "least_loaded"):
        one, other = (run.metrics[0][f"moe/L0/{name}"] for run in (with_losses, without))
        np.testing.assert_allclose(one, other, rtol=1e-12)
