"""Training steps of a model with experts: equal on every mesh, and what they report."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 3
EXPERTS = "--model.experts.num_experts 3 --model.experts.layers"
# A memory and experts in one model, and experts alone that choose their tokens.
MODELS = {
    "token choice": f"--model.memory.layers 0 --optim.table.optimizer sgd {EXPERTS} 1",
    "expert choice": f"--model.memory null {EXPERTS} 0,1 --model.experts.routing expert_choice",
}
LOSSES = "--model.experts.balance_weight 0.1 --model.experts.z_weight 0.05"


@pytest.fixture(scope="module")
def trained(tiny, float64):
    """trained(name, settings, mesh): some steps; runs are kept."""

    @functools.cache
    def run(name: str, settings: str = LOSSES, mesh_shape: tuple[int, int] = (1, 1)):
        # Quick start's tables are in float64 where there are some.
        wide = "--model.dtype float64 --model.param_dtype float64 " + (
            "--model.memory.table_dtype float64" if name == "token choice" else ""
        )
        mesh = "--mesh.data {} --mesh.memory {}".format(*mesh_shape)
        config = tiny.config(MODELS[name], wide, settings, mesh)
        return tiny.train(config, tiny.batches(STEPS), mesh_shape)

    return run


@pytest.mark.parametrize(
    ("name", "mesh_shape"),
    [("token choice", (1, 2)), ("token choice", (2, 4)), ("expert choice", (4, 1)), ("expert choice", (4, 2))],
)
def test_on_a_mesh_parameters_and_metrics_are_those_of_one_device(trained, name, mesh_shape):
    split, alone = trained(name, LOSSES, mesh_shape), trained(name)
    assert any(leaf.ndim == 3 for leaf in jax.tree.leaves(alone.after.params))
    for one, other in zip(jax.tree.leaves(split.after.params), jax.tree.leaves(alone.after.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-7)
    assert split.metrics[-1].keys() == alone.metrics[-1].keys()
    for row, expected in zip(split.metrics, alone.metrics, strict=True):
        np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=1e-7)


def test_experts_lie_in_pieces_on_the_devices(trained):
    params = trained("expert choice", LOSSES, (4, 2)).live.params
    shape = params["blocks"][0]["experts"]["down"][...]
    assert shape.shape == (3, 24, 16)
    assert {piece.data.shape for piece in shape.addressable_shards} == {(3, 3, 16)}


def test_the_loss_that_is_told_is_the_language_models(trained):
    with_losses, without = (
        trained("token choice", settings)
        for settings in (LOSSES, "--model.experts.balance_weight 0 --model.experts.z_weight 0")
    )
    assert with_losses.losses[0] == without.losses[0]
    assert not np.array_equal(with_losses.losses[1:], without.losses[1:])


def test_metrics_tell_how_tokens_spread(trained):
    row = trained("token choice").metrics[0]
    found = {name.removeprefix("moe/L1/"): float(value) for name, value in row.items() if name.startswith("moe/")}
    assert found.keys() == {"load_balance_loss", "z_loss", "entropy", "most_loaded", "least_loaded"}
    assert 0 <= found["least_loaded"] <= 1 / 3 <= found["most_loaded"] <= 1 / 2
    assert 0 < found["entropy"] <= np.log(3)
    assert 0.5 < found["load_balance_loss"] < 3


def test_micro_batches_of_equal_routing_losses_are_the_whole_batch(trained):
    """Only the balance loss is not a sum over tokens."""
    whole, cut = (
        trained("token choice", f"--model.experts.balance_weight 0 --model.experts.z_weight 0.05 {more}")
        for more in ("", "--train.accumulate 2")
    )
    for one, other in zip(jax.tree.leaves(cut.after.params), jax.tree.leaves(whole.after.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    for name in ("z_loss", "entropy", "most_loaded"):
        np.testing.assert_allclose(cut.metrics[0][f"moe/L1/{name}"], whole.metrics[0][f"moe/L1/{name}"], rtol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_blocks_route_as_they_did(trained, name):
    plain, again = trained(name), trained(name, f"{LOSSES} --train.remat block")
    for one, other in zip(jax.tree.leaves(again.after.params), jax.tree.leaves(plain.after.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_padding_changes_nothing(tiny, trained):
    config = tiny.config(
        MODELS["expert choice"], LOSSES, "--model.dtype float64 --model.param_dtype float64 --data.packing none"
    )
    batches = tiny.batches(1)
    other = [{**batch, "tokens": np.where(batch["segments"] > 0, batch["tokens"], 7)} for batch in batches]
    runs = [tiny.train(config, found) for found in (batches, other)]
    assert np.any(batches[0]["tokens"] != other[0]["tokens"])
    for name in runs[0].metrics[0]:
        assert jnp.allclose(runs[0].metrics[0][name], runs[1].metrics[0][name], rtol=1e-12), name
