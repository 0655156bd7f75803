"""Cross-entropy over the vocabulary, in chunks of tokens."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.models.decoder import Decoder
from memjax.ops.precision import accumulator

LOGIT_BYTES = 1 << 29
"""Logits per device that exist at once."""


def summed_loss(
    model: Decoder, hidden: Float[Array, "b s dim"], targets: Int[Array, "b s"], mask: Float[Array, "b s"]
) -> Float[Array, ""]:
    """Sum over the masked-in tokens of -log p(target), in nats.

    The sequence axis is cut into chunks that keep the batch's sharding; each chunk's logits are made, reduced and, in
    the backward pass, made again, so that tokens x vocabulary never stands in memory.
    """
    losses = token_losses(model, hidden, targets)
    return jnp.sum(losses * mask.astype(losses.dtype))


def token_losses(model: Decoder, hidden: Float[Array, "b s dim"], targets: Int[Array, "b s"]) -> Float[Array, "b s"]:
    """-log p(target) of every token, in nats, float32 or wider."""
    batch, length = targets.shape
    count = chunk_count(targets.size, model.config.vocab_size, hidden.dtype, jax.sharding.get_abstract_mesh().size)
    count = min(count, length)
    chunk = -(-length // count)
    padding = count * chunk - length

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, padding), *[(0, 0)] * (array.ndim - 2)])
        return jnp.moveaxis(padded.reshape(batch, count, chunk, *array.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_chunk(hidden: Array, targets: Array) -> Array:
        logits = model.logits(hidden)
        # A comparison is part of the passes over the logits; a gather's gradient would be another, by scattering.
        is_target = jnp.arange(logits.shape[-1])[None, None, :] == targets[..., None]
        picked = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - picked

    if count == 1:
        return one_chunk(hidden, targets)
    losses = jax.lax.map(lambda chunk: one_chunk(*chunk), (split(hidden), split(targets)))
    return jnp.moveaxis(losses, 0, 1).reshape(batch, count * chunk)[:, :length]


def chunk_count(tokens: int, vocab_size: int, dtype: DTypeLike, devices: int) -> int:
    """Pieces in which the logits of so many tokens, spread over the devices, are made."""
    logit_bytes = tokens * vocab_size * accumulator(dtype).itemsize
    return max(1, -(-logit_bytes // (LOGIT_BYTES * max(1, devices))))
