"""Causal self-attention with grouped queries, rotary positions, document masks, a sliding window and a cache."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.config.model import ModelConfig
from memjax.models import dot_product
from memjax.models.feed_forward import fused_linear, linear
from memjax.models.rotary import rotate, rotation
from memjax.ops.decode_attention.api import decode_step
from memjax.ops.decode_attention.step import write
from memjax.ops.precision import accumulator
from memjax.sharding.axes import on_own_tokens
from memjax.sharding.rules import named


class KeyValues(NamedTuple):
    """One layer's keys and values of the tokens seen so far: a cache for generation."""

    keys: Float[Array, "b kv_heads s head_dim"]
    """The keys of a head are contiguous, as the matrix products of decoding read them."""
    values: Float[Array, "b kv_heads s head_dim"]


class HeadNorm(nnx.Module):
    """Root mean square norm of each head, with a scale that all heads share; or of all heads together."""

    def __init__(self, head_dim: int, all_heads: int | None, epsilon: float, param_dtype: DTypeLike, axis: str):
        """Normalises each head separately if all_heads is None, else that many heads together.

        `axis` is the logical name of the axis of heads.
        """
        self.epsilon, self.head_dim, self.axes = epsilon, head_dim, (-1,) if all_heads is None else (-2, -1)
        metadata = named(None if all_heads is None else axis)
        self.scale = nnx.Param(jnp.ones(head_dim * (all_heads or 1), param_dtype), **metadata)

    def __call__(self, x: Float[Array, "b s n h"]) -> Float[Array, "b s n h"]:
        """The heads normalised to a mean square of 1, times the scale; computed in float32 or wider."""
        wide = x.astype(accumulator(x.dtype))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=self.axes, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(wide.dtype).reshape(1, 1, -1, self.head_dim)
        return (normed * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention; with segments, a token sees only its own document; with a window, only the nearest tokens."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int = 0,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Draws the projections of a block, given by its index, as some blocks may have no rotary positions.

        `implementation` is one of `dot_product.IMPLEMENTATIONS`; None takes the fastest that can run.
        """
        self.implementation = implementation
        heads, kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_width
        self.rope_theta = None if layer in config.rope_free_layers else config.rope_theta
        self.rope_scaling, window = config.rope_scaling, config.sliding_window
        # Distances of tokens are 32-bit; a wider window covers all of them.
        self.sliding_window = window if window is None or window < 2**31 else None
        dim, width, kv_width = config.dim, heads * self.head_dim, kv_heads * self.head_dim
        has_bias = config.attention_bias
        has_out_bias = has_bias if config.attention_out_bias is None else config.attention_out_bias
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = linear(dim, width, axes=("embed", "heads"), use_bias=has_bias, **kwargs)
        self.key = linear(dim, kv_width, axes=("embed", "kv_heads"), use_bias=has_bias, **kwargs)
        self.value = linear(dim, kv_width, axes=("embed", "kv_heads"), use_bias=has_bias, **kwargs)
        self.out = linear(width, dim, axes=("heads", "embed"), use_bias=has_out_bias, **kwargs)

        def norm(count: int, axis: str) -> HeadNorm | None:
            if config.qk_norm == "none":
                return None
            together = count if config.qk_norm == "all_heads" else None
            return HeadNorm(self.head_dim, together, config.norm_eps, param_dtype, axis)

        self.query_norm, self.key_norm = norm(heads, "heads"), norm(kv_heads, "kv_heads")

    def __call__(
        self, x: Float[Array, "b s dim"], positions: Int[Array, "b s"], segments: Int[Array, "b s"] | None = None
    ) -> Float[Array, "b s dim"]:
        """Attention over the tokens of x."""
        return self._self_attention(x, positions, segments)[0]

    def with_cache(
        self,
        x: Float[Array, "b s dim"],
        positions: Int[Array, "b s"],
        cache: KeyValues | None,
    ) -> tuple[Float[Array, "b s dim"], KeyValues]:
        """Attention of new tokens over cached tokens and themselves, and the cache including them.

        Args:
            x: the new tokens.
            positions: positions of the tokens, both in their text and in the cache; consecutive in each row. A token
                sees the cache up to its own position; later entries may hold any finite numbers. A token beyond the
                cache is not written.
            cache: None if nothing is cached and positions count from 0; the new cache then holds just these tokens.
        """
        if cache is None:
            out, *fresh = self._self_attention(x, positions, None)
            return out, KeyValues(*(jnp.swapaxes(array, 1, 2) for array in fresh))
        if x.shape[1] == 1:
            return self._one_with_cache(x, positions, cache)
        query, *fresh = self._project(x, positions)
        cache = KeyValues(*(write(old, new, positions) for old, new in zip(cache, fresh, strict=True)))
        keys, values = (jnp.swapaxes(array, 1, 2).astype(query.dtype) for array in cache)
        out = dot_product.cached_attention(
            query, keys, values, positions=positions, window=self.sliding_window, implementation=self.implementation
        )
        return self._project_out(out), cache

    def _self_attention(self, x: Array, positions: Array, segments: Array | None) -> tuple[Array, Array, Array]:
        """The output [b, s, dim], and keys and values [b, s, kv_heads, head_dim]."""
        query, keys, values = self._project(x, positions)
        name = dot_product.choose(self.implementation, query.dtype, self.head_dim, x.shape[1])
        # A window counts tokens of the row; within a document, their distances are those of their positions.
        out = dot_product.self_attention(
            query, keys, values, segments=segments, window=self.sliding_window, implementation=name
        )
        return self._project_out(out), keys, values

    def _one_with_cache(
        self,
        x: Float[Array, "b 1 dim"],
        positions: Int[Array, "b 1"],
        cache: KeyValues,
    ) -> tuple[Float[Array, "b 1 dim"], KeyValues]:
        """`with_cache` for one new token per row."""
        if self.query_norm is None:
            parts = self.query_key_value(x)
        else:
            parts = [part.reshape(*x.shape[:2], -1) for part in self._heads(x)]
        # Joined, as one product returns them: XLA removes a split that is undone at once.
        joined = jnp.concatenate(parts, axis=-1)[:, 0]
        turns: tuple[Array, ...] = ()
        if self.rope_theta is not None:
            both = rotation(positions, self.head_dim, self.rope_theta, self.rope_scaling, joined.dtype)
            turns = tuple(part.reshape(len(x), -1) for part in both)
        tokens = (joined, *cache, positions[:, 0], *turns)
        out, *written = on_own_tokens(_decode_step, tokens, (), window=self.sliding_window)
        return self._project_out(out[:, None]), KeyValues(*written)

    def _project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values [b, s, heads, head_dim]."""
        query, key, value = self._heads(x)
        if self.rope_theta is not None:
            query, key = (rotate(part, positions, self.rope_theta, self.rope_scaling) for part in (query, key))
        return query, key, value

    def _heads(self, x: Array) -> tuple[Array, Array, Array]:
        """`_project` before positions are applied."""
        parts, width = self.query_key_value(x), self.head_dim
        query, key, value = (part.reshape(*part.shape[:2], part.shape[2] // width, width) for part in parts)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def query_key_value(self, x: Float[Array, "b s dim"]) -> Sequence[Float[Array, "b s width"]]:
        """The three projections, before they are split into heads."""
        return fused_linear(x, self.query, self.key, self.value)

    def _project_out(self, out: Float[Array, "b s n h"]) -> Float[Array, "b s dim"]:
        return self.out(out.reshape(*out.shape[:2], out.shape[2] * out.shape[3]))


def _decode_step(
    joined: Array, keys: Array, values: Array, positions: Array, *turns: Array, window: int | None
) -> tuple[Array, Array, Array]:
    angles = (turns[0], turns[1]) if turns else None
    return decode_step(joined, keys, values, positions, angles, window=window)
