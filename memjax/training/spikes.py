"""Loss spikes: skips the update of a step whose loss or gradient norm is far above the recent ones."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

WINDOW = 128
"""Number of recent steps with which a step is compared."""

FEWEST = WINDOW // 2
"""Number of steps that must be known before one is skipped."""

Recent = dict[str, Array]
"""Loss and gradient norm of the last steps, infinite where unknown, and the number of steps skipped so far."""


def none_yet() -> Recent:
    """The value before the first step."""
    unknown = jnp.full(WINDOW, jnp.inf, jnp.float32)  # NaN would stop runs under jax_debug_nans
    return {"loss": unknown, "grad_norm": unknown + 0, "skipped": jnp.zeros((), jnp.int32)}


def is_spike(recent: Recent, sigma: float, **measured: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a measured value exceeds the mean of the recent ones by more than sigma standard deviations."""
    found = jnp.zeros((), bool)
    for name, value in measured.items():
        known = jnp.isfinite(recent[name])
        mean, deviation = (of(recent[name], where=known) for of in (jnp.mean, jnp.std))
        found |= (jnp.sum(known) >= FEWEST) & (value > mean + sigma * deviation)
    return found


def with_step(
    recent: Recent, step: Int[Array, ""], spike: Bool[Array, ""], ok: Bool[Array, ""], **measured: Float[Array, ""]
) -> Recent:
    """Replaces the oldest of the recent steps by a new one; unchanged if ok is false.

    Spikes are included, so that a loss that stays higher soon stops being one.
    """
    place = jnp.where(ok, step % WINDOW, WINDOW)  # an index past the end is not written
    values = {
        name: recent[name].at[place].set(value.astype(jnp.float32), mode="drop") for name, value in measured.items()
    }
    return values | {"skipped": recent["skipped"] + (spike & ok).astype(jnp.int32)}
