"""Causal self-attention with grouped queries, rotary positions, document masks, a sliding window and a cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from memjax.config import RopeScalingConfig
from memjax.models.feed_forward import linear
from memjax.models.rotary import rotate


class KeyValues(NamedTuple):
    """Keys and values of the tokens seen so far, of one layer: a cache for generation."""

    keys: Float[Array, "b s kv_heads head_dim"]
    values: Float[Array, "b s kv_heads head_dim"]


class Attention(nnx.Module):
    """Causal attention; with segments, each token sees only its own document, with a window only its neighbours."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        use_bias: bool = False,
        rope_theta: float,
        rope_scaling: RopeScalingConfig | None = None,
        sliding_window: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim or dim // num_heads
        self.rope_theta, self.rope_scaling, self.sliding_window = rope_theta, rope_scaling, sliding_window
        kwargs = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = linear(dim, num_heads * self.head_dim, **kwargs)
        self.key = linear(dim, num_kv_heads * self.head_dim, **kwargs)
        self.value = linear(dim, num_kv_heads * self.head_dim, **kwargs)
        self.out = linear(num_heads * self.head_dim, dim, **kwargs)

    def __call__(
        self, x: Float[Array, "b s dim"], positions: Int[Array, "b s"], segments: Int[Array, "b s"] | None = None
    ) -> Float[Array, "b s dim"]:
        """Attention over the tokens of x."""
        query, fresh = self._project(x, positions)
        mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
        if self.sliding_window is not None:
            # By places in the row: within a document they differ as positions do.
            place = jnp.arange(x.shape[1])
            near = self._is_near(place[None, None, :, None], place[None, None, None, :])
            mask = near if mask is None else mask & near
        return self._attend(query, fresh, mask=mask, is_causal=True)

    def with_cache(
        self, x: Float[Array, "b s dim"], positions: Int[Array, "b s"], cache: KeyValues
    ) -> tuple[Float[Array, "b s dim"], KeyValues]:
        """Attention of new tokens over cached tokens and themselves, and the cache with them written in.

        `positions` say where the new tokens stand, in their text and in the cache; each row has its own. A token sees
        what the cache holds up to its own place: what lies behind may be anything.
        """
        query, fresh = self._project(x, positions)
        row = jnp.arange(x.shape[0])[:, None]
        cache = KeyValues(
            *(
                old.at[row, positions].set(new.astype(old.dtype), unique_indices=True)
                for old, new in zip(cache, fresh, strict=True)
            )
        )
        place = jnp.arange(cache.keys.shape[1])[None, None, None, :]
        mask = place <= positions[:, None, :, None]
        if self.sliding_window is not None:
            mask &= self._is_near(positions[:, None, :, None], place)
        return self._attend(query, cache, mask=mask, is_causal=False), cache

    def _project(self, x: Array, positions: Array) -> tuple[Array, KeyValues]:
        query, key, value = (
            layer(x).reshape(*x.shape[:2], heads, self.head_dim)
            for layer, heads in (
                (self.query, self.num_heads),
                (self.key, self.num_kv_heads),
                (self.value, self.num_kv_heads),
            )
        )
        query, key = (rotate(part, positions, self.rope_theta, self.rope_scaling) for part in (query, key))
        return query, KeyValues(key, value)

    def _is_near(self, query_place: Array, key_place: Array) -> Array:
        assert self.sliding_window is not None
        return query_place - key_place < self.sliding_window

    def _attend(self, query: Array, seen: KeyValues, *, mask: Bool[Array, "#b 1 q k"] | None, is_causal: bool) -> Array:
        keys, values = (array.astype(query.dtype) for array in seen)
        attention = jax.nn.dot_product_attention if query.dtype != jnp.float64 else _attention_in_float64
        out = attention(query, keys, values, mask=mask, is_causal=is_causal)
        return self.out(out.reshape(*out.shape[:2], -1))


def _attention_in_float64(
    query: Float[Array, "b q n h"],
    keys: Float[Array, "b k kv h"],
    values: Float[Array, "b k kv h"],
    *,
    mask: Bool[Array, "#b 1 q k"] | None,
    is_causal: bool,
) -> Float[Array, "b q n h"]:
    """The same as jax.nn.dot_product_attention, whose softmax is float32 whatever it is given."""
    groups = query.shape[2] // keys.shape[2]
    keys, values = jnp.repeat(keys, groups, axis=2), jnp.repeat(values, groups, axis=2)
    scores = jnp.einsum("bqnh,bknh->bnqk", query, keys) * query.shape[-1] ** -0.5
    seen = jnp.ones((1, 1, *scores.shape[2:]), bool) if mask is None else mask
    if is_causal:
        seen = seen & jnp.tril(jnp.ones(scores.shape[2:], bool))[None, None]
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), values)
