"""Cross-entropy over the vocabulary in chunks of tokens, so that tokens x vocabulary is never in memory."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from memjax.models.chunks import by_chunks, join, split
from memjax.models.decoder import Decoder
from memjax.models.token_ids import check_ids
from memjax.ops.manual_axes import vary_like
from memjax.ops.precision import accumulator
from memjax.ops.shapes import require
from memjax.sharding.axes import has_memory_axis, has_several_devices, over_mesh
from memjax.sharding.rules import DATA, MEMORY, REPLICATED, TOKENS

T = TypeVar("T")

_LOGIT_BYTES = 1 << 29
"""Bytes of logits per device that are held at once."""


def token_losses(
    model: Decoder,
    hidden: Float[Array, "b s dim"],
    targets: Int[Array, "b s"],
    *,
    logit_bytes: int = _LOGIT_BYTES,
) -> Float[Array, "b s"]:
    """-log p(target) of every token, in nats, float32 or wider; for gradients see `summed_loss`.

    Raises:
        ValueError: as for `summed_loss`.
    """
    _check(hidden, targets=targets)
    check_ids(targets, model.config.vocab_size, "targets")
    losses = lambda logits, targets: _cross_entropy(logits, targets)[0]
    return map_logits(model, losses, hidden, targets, logit_bytes=logit_bytes)


def map_logits(
    model: Decoder,
    function: Callable[..., T],
    hidden: Float[Array, "b s dim"],
    *by_token: Float[Array, "b s *rest"] | Int[Array, "b s *rest"],
    logit_bytes: int = _LOGIT_BYTES,
) -> T:
    """function(logits, *by_token), a pytree of arrays `[b, s, ...]`, computed in chunks of the sequence axis.

    At most logit_bytes of logits per device are held at once.
    """
    kernel = model.output_matrix()
    run = lambda hidden, *by_token: function(_logits(hidden, kernel), *by_token)
    return by_chunks(run, _chunks_of(model, hidden, logit_bytes), hidden, *by_token)


def summed_loss(
    model: Decoder,
    hidden: Float[Array, "b s dim"],
    targets: Int[Array, "b s"],
    weights: Float[Array, "b s"],
    *,
    logit_bytes: int = _LOGIT_BYTES,
) -> tuple[Float[Array, ""], Float[Array, "b s"]]:
    """The sum over tokens of weight * -log p(target), in nats, and every token's own loss.

    Only the sum is differentiable, in the model and in hidden. A chunk's gradient is computed together with its losses,
    so that its logits are computed once, not again in the backward pass.

    Raises:
        ValueError: there is not one target and weight per token, or a target whose weight is not 0 is outside the
            vocabulary. Under `jax.jit`, where targets have no values yet, the loss of such a target is NaN instead.
    """
    _check(hidden, targets=targets, weights=weights)
    targets, weights = jnp.asarray(targets), jnp.asarray(weights, accumulator(hidden.dtype))
    is_ignored = _is_outside(targets, model.config.vocab_size) & (weights == 0)
    targets = jnp.where(is_ignored, 0, targets)  # such as -100 for padding
    check_ids(targets, model.config.vocab_size, "targets")
    return _summed(_chunks_of(model, hidden, logit_bytes), hidden, model.output_matrix(), targets, weights)


def _check(hidden: Array, **by_token: Array) -> None:
    shapes = [getattr(array, "shape", None) for array in by_token.values()]
    fits = hidden.ndim == 3 and all(shape == hidden.shape[:2] for shape in shapes)
    require("loss", fits, "each token needs one of each", hidden=hidden, **by_token)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(chunks: int, hidden: Array, kernel: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    losses = by_chunks(lambda h, t: _cross_entropy(_logits(h, kernel), t)[0], chunks, hidden, targets)
    return jnp.sum(losses * weights.astype(losses.dtype)), losses


def _summed_forward(chunks: int, hidden: Array, kernel: Array, targets: Array, weights: Array):
    run = partial(_losses_and_gradients, chunks=chunks)
    if has_memory_axis() and has_several_devices():
        # Every device sums over all its chunks before the devices' sums are added up.
        specs = (TOKENS, REPLICATED, TOKENS, TOKENS)
        run = over_mesh(_summed_over_devices, specs, (TOKENS, TOKENS, REPLICATED), chunks=chunks)
    losses, d_hidden, d_kernel = run(hidden, kernel, targets, weights)
    total = jnp.sum(losses * weights.astype(losses.dtype))
    return (total, losses), (d_hidden, d_kernel.astype(kernel.dtype))


def _summed_backward(chunks: int, gradients: tuple[Array, Array], cotangents: tuple[Array, Array]):
    total, _ = cotangents
    d_hidden, d_kernel = (gradient * total.astype(gradient.dtype) for gradient in gradients)
    return d_hidden, d_kernel, None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _losses_and_gradients(hidden: Array, kernel: Array, targets: Array, weights: Array, *, chunks: int):
    """Losses, and the gradients of their weighted sum with respect to hidden and kernel."""
    d_kernel = vary_like(jnp.zeros(kernel.shape, accumulator(hidden.dtype)), hidden)

    def add_chunk(d_kernel: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        hidden, targets, weights = chunk
        logits = _logits(hidden, kernel)
        losses, log_total = _cross_entropy(logits, targets)
        is_target = (jnp.arange(kernel.shape[1])[None, None, :] == targets[..., None]).astype(logits.dtype)
        d_logits = (jnp.exp(logits - log_total[..., None]) - is_target) * weights.astype(logits.dtype)[..., None]
        # In the factors' type: as wide as the logits, it would keep both products off the tensor cores.
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.matmul(d_logits, kernel.astype(hidden.dtype).T)
        d_kernel += jnp.einsum("bsd,bsv->dv", hidden, d_logits, preferred_element_type=d_kernel.dtype)
        return d_kernel, (losses, d_hidden)

    length = targets.shape[1]
    if chunks == 1:
        d_kernel, (losses, d_hidden) = add_chunk(d_kernel, (hidden, targets, weights))
        # XLA would fold the transposition for tied embeddings into the product, which CPUs then cannot run in bfloat16.
        return losses, d_hidden, jax.lax.optimization_barrier(d_kernel)
    parts = split(hidden, chunks), split(targets, chunks), split(weights, chunks)
    d_kernel, (losses, d_hidden) = jax.lax.scan(add_chunk, d_kernel, parts)
    return join(losses, length), join(d_hidden, length), d_kernel


def _summed_over_devices(*own: Array, chunks: int) -> tuple[Array, Array, Array]:
    losses, d_hidden, d_kernel = _losses_and_gradients(*own, chunks=chunks)
    return losses, d_hidden, jax.lax.psum(d_kernel, (DATA, MEMORY))


def _logits(hidden: Array, kernel: Array) -> Float[Array, "b s vocab"]:
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=accumulator(hidden.dtype))


def _cross_entropy(logits: Float[Array, "b s vocab"], targets: Int[Array, "b s"]) -> tuple[Array, Array]:
    """-log softmax(logits)[target], and the logarithm of the softmax's denominator."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    # Indices past the end give NaN; negative ones would count from the end.
    vocab_size = logits.shape[-1]
    index = jnp.where(_is_outside(targets, vocab_size), jnp.int32(vocab_size), targets.astype(jnp.int32))[..., None]
    return log_total - jnp.take_along_axis(logits, index, axis=-1, mode="fill")[..., 0], log_total


def _is_outside(targets: Int[Array, "b s"], vocab_size: int) -> Bool[Array, "b s"]:
    # A type that cannot represent vocab_size has no values beyond it.
    holds_end = vocab_size <= jnp.iinfo(targets.dtype).max
    return (targets < 0) | (targets >= vocab_size) if holds_end else targets < 0


def _chunks_of(model: Decoder, hidden: Float[Array, "b s dim"], logit_bytes: int) -> int:
    """Number of chunks for these hidden states, at most one per position."""
    tokens, devices = hidden.shape[0] * hidden.shape[1], jax.sharding.get_abstract_mesh().size
    count = chunk_count(tokens, model.config.vocab_size, hidden.dtype, devices, logit_bytes=logit_bytes)
    return max(1, min(hidden.shape[1], count))


def chunk_count(
    tokens: int, vocab_size: int, dtype: DTypeLike, devices: int, *, logit_bytes: int = _LOGIT_BYTES
) -> int:
    """Number of chunks in which to compute the logits of `tokens` tokens, with logit_bytes per device at once."""
    every = tokens * vocab_size * accumulator(dtype).itemsize
    return max(1, -(-every // (logit_bytes * max(1, devices))))
