"""Updates are skipped if the loss or the gradient norm spikes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.training import spikes


def after(losses, norms=None) -> spikes.Recent:
    """The statistics after steps with these losses and gradient norms."""
    recent = spikes.none_yet()
    for step, (loss, norm) in enumerate(zip(losses, losses if norms is None else norms, strict=True)):
        measured = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}
        recent = spikes.with_step(recent, jnp.int32(step), jnp.bool(False), jnp.bool(True), **measured)
    return recent


def spike(recent, loss: float, norm: float) -> bool:
    return bool(spikes.is_spike(recent, 6.0, loss=jnp.float32(loss), grad_norm=jnp.float32(norm)))


def test_a_spike_is_above_the_last_steps_by_more_than_sigma_standard_deviations():
    losses, norms = np.random.default_rng(0).normal([[5], [1]], [[0.2], [0.1]], (2, 150))
    recent = after(losses, norms)
    loss, norm = (float(of[-spikes.WINDOW :].mean()) for of in (losses, norms))
    high_loss, high_norm = (
        mean + 6 * float(of[-spikes.WINDOW :].std()) for mean, of in ((loss, losses), (norm, norms))
    )
    assert not spike(recent, high_loss - 0.01, high_norm - 0.01)
    assert spike(recent, high_loss + 0.01, norm)
    assert spike(recent, loss, high_norm + 0.01)
    assert not spike(recent, -100.0, 0.0)


@pytest.mark.parametrize(("steps", "found"), [(spikes.FEWEST - 1, False), (spikes.FEWEST, True)])
def test_no_step_is_skipped_before_enough_are_known(steps, found):
    assert spike(after(np.ones(steps)), 1000.0, 1.0) is found


def test_a_loss_that_stays_higher_is_no_spike_for_long():
    recent = after([*np.linspace(1, 1.1, spikes.WINDOW), 9.0, 9.0, 9.0, 9.0])
    assert not spike(recent, 9.0, 1.0)


def test_a_step_that_is_not_finite_is_not_counted():
    recent = spikes.with_step(
        after([1.0]), jnp.int32(1), jnp.bool(True), jnp.bool(False), loss=jnp.float32(np.nan), grad_norm=jnp.float32(1)
    )
    assert recent["skipped"] == 0
    assert np.isfinite(recent["grad_norm"]).sum() == 1


def test_the_first_steps_of_a_run_pass_where_jax_stops_at_a_nan():
    with jax.debug_nans(True):
        recent = jax.jit(lambda: after([1.0]))()
        assert not jax.jit(lambda: spikes.is_spike(recent, 6.0, loss=jnp.float32(9), grad_norm=jnp.float32(9)))()
