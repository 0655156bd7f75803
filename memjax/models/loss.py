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

    kernel = model.output_matrix()
    one_chunk = lambda hidden, targets: _cross_entropy(hidden, kernel, targets)
    if count == 1:
        return one_chunk(hidden, targets)
    losses = jax.lax.map(lambda chunk: one_chunk(*chunk), (split(hidden), split(targets)))
    return jnp.moveaxis(losses, 0, 1).reshape(batch, count * chunk)[:, :length]


@jax.custom_vjp
def _cross_entropy(
    hidden: Float[Array, "b s dim"], kernel: Float[Array, "dim vocab"], targets: Int[Array, "b s"]
) -> Float[Array, "b s"]:
    """-log softmax(hidden @ kernel)[target]; nothing of the logits' size is kept for the backward pass."""
    return _cross_entropy_forward(hidden, kernel, targets)[0]


def _cross_entropy_forward(hidden: Array, kernel: Array, targets: Array):
    logits = _logits(hidden, kernel)
    total = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return total - picked, (hidden, kernel, targets, total)


def _cross_entropy_backward(residuals: tuple[Array, Array, Array, Array], cotangent: Array):
    hidden, kernel, targets, total = residuals
    probabilities = jnp.exp(_logits(hidden, kernel) - total[..., None])
    is_target = jnp.arange(kernel.shape[1])[None, None, :] == targets[..., None]
    # In the type of the factors: left as wide as the logits, it would keep both products from the fast units.
    d_logits = ((probabilities - is_target) * cotangent[..., None]).astype(hidden.dtype)
    d_hidden = jnp.matmul(d_logits, kernel.astype(hidden.dtype).T)
    d_kernel = jnp.einsum("bsd,bsv->dv", hidden, d_logits, preferred_element_type=accumulator(hidden.dtype))
    return d_hidden, d_kernel.astype(kernel.dtype), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _logits(hidden: Array, kernel: Array) -> Float[Array, "b s vocab"]:
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=accumulator(hidden.dtype))


def chunk_count(tokens: int, vocab_size: int, dtype: DTypeLike, devices: int) -> int:
    """Pieces in which the logits of so many tokens, spread over the devices, are made."""
    logit_bytes = tokens * vocab_size * accumulator(dtype).itemsize
    return max(1, -(-logit_bytes // (LOGIT_BYTES * max(1, devices))))
