"""Causal self-attention with grouped queries, rotary positions, document masks, a sliding window and a cache."""

from collections.abc import Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.config import checks
from memjax.config.model import QKNorm, RopeScalingConfig
from memjax.models import dot_product
from memjax.models.feed_forward import fused_linear, linear
from memjax.models.rotary import rotate, rotation
from memjax.ops.decode_attention.api import decode_step
from memjax.ops.decode_attention.step import write
from memjax.ops.precision import accumulator
from memjax.sharding.axes import on_own_tokens
from memjax.sharding.rules import named


class KeyValues(NamedTuple):
    """Keys and values of the tokens seen so far, of one layer: a cache for generation."""

    keys: Float[Array, "b kv_heads s head_dim"]
    """A head's keys lie together, as the matrix products of decoding read them."""
    values: Float[Array, "b kv_heads s head_dim"]


class HeadNorm(nnx.Module):
    """Root mean square norm of each head, with a scale that all heads share; or of all heads together."""

    def __init__(self, head_dim: int, all_heads: int | None, epsilon: float, param_dtype: DTypeLike, axis: str):
        """Norms each head where all_heads, the number of those to be normed together, is None.

        `axis` is the logical name of what the heads are an axis of.
        """
        self.epsilon, self.head_dim, self.axes = epsilon, head_dim, (-1,) if all_heads is None else (-2, -1)
        metadata = named(None if all_heads is None else axis)
        self.scale = nnx.Param(jnp.ones(head_dim * (all_heads or 1), param_dtype), **metadata)

    def __call__(self, x: Float[Array, "b s n h"]) -> Float[Array, "b s n h"]:
        """The heads with a mean square of 1, times the scale; in float32 or wider."""
        wide = x.astype(accumulator(x.dtype))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=self.axes, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(wide.dtype).reshape(1, 1, -1, self.head_dim)
        return (normed * scale).astype(x.dtype)


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
        use_out_bias: bool | None = None,
        qk_norm: QKNorm = "none",
        norm_eps: float = 1e-5,
        rope_theta: float | None,
        rope_scaling: RopeScalingConfig | None = None,
        sliding_window: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Draws the projections.

        Args:
            dim: width of the inputs and outputs.
            num_heads: heads of queries.
            num_kv_heads: heads of keys and values.
            head_dim: width of a head; None divides dim among the heads.
            use_bias: whether the projections have biases.
            use_out_bias: whether the output projection has one; None is `use_bias`.
            qk_norm: what queries and keys are normed over, before they are rotated.
            norm_eps: epsilon of this norm.
            rope_theta: base of the rotary frequencies; None leaves positions out.
            rope_scaling: of these frequencies.
            sliding_window: tokens that a token sees; None for all.
            dtype: of activations.
            param_dtype: of parameters.
            implementation: one of `dot_product.IMPLEMENTATIONS`; None takes the fastest that can run.
            rngs: source of the `params` key.
        """
        checks.refuse(checks.one_of(get_args(QKNorm), qk_norm=qk_norm))
        self.implementation = implementation
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.rope_theta, self.rope_scaling, self.sliding_window = rope_theta, rope_scaling, sliding_window
        kwargs = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = linear(dim, num_heads * self.head_dim, axes=("embed", "heads"), **kwargs)
        self.key = linear(dim, num_kv_heads * self.head_dim, axes=("embed", "kv_heads"), **kwargs)
        self.value = linear(dim, num_kv_heads * self.head_dim, axes=("embed", "kv_heads"), **kwargs)
        kwargs["use_bias"] = use_bias if use_out_bias is None else use_out_bias
        self.out = linear(num_heads * self.head_dim, dim, axes=("heads", "embed"), **kwargs)

        def norm(count: int, axis: str) -> HeadNorm | None:
            together = count if qk_norm == "all_heads" else None
            return None if qk_norm == "none" else HeadNorm(self.head_dim, together, norm_eps, param_dtype, axis)

        self.query_norm, self.key_norm = norm(num_heads, "heads"), norm(num_kv_heads, "kv_heads")

    def __call__(
        self, x: Float[Array, "b s dim"], positions: Int[Array, "b s"], segments: Int[Array, "b s"] | None = None
    ) -> Float[Array, "b s dim"]:
        """Attention over the tokens of x."""
        query, *fresh = self._project(x, positions)
        # A window counts places in the row: within a document they differ as positions do.
        out = dot_product.self_attention(
            query,
            *fresh,
            segments=segments,
            window=self.sliding_window,
            implementation=dot_product.choose(self.implementation, query.dtype, self.head_dim, x.shape[1]),
        )
        return self._project_out(out)

    def with_cache(
        self,
        x: Float[Array, "b s dim"],
        positions: Int[Array, "b s"],
        cache: KeyValues | None,
    ) -> tuple[Float[Array, "b s dim"], KeyValues]:
        """Attention of new tokens over cached tokens and themselves, and the cache with them written in.

        Args:
            x: the new tokens.
            positions: where they stand, in their text and in the cache; each row has its own, one after the other. A
                token sees what the cache holds up to its own place: what lies behind may be anything. A token whose
                place is beyond the cache is not written.
            cache: None where nothing is cached and positions count from 0; the new cache then holds just these tokens.
        """
        if cache is not None and x.shape[1] == 1:
            return self._one_with_cache(x, positions, cache)
        query, *fresh = self._project(x, positions)
        if cache is None:
            name = dot_product.choose(self.implementation, query.dtype, self.head_dim, x.shape[1])
            out = dot_product.self_attention(
                query, *fresh, segments=None, window=self.sliding_window, implementation=name
            )
            return self._project_out(out), KeyValues(*(jnp.swapaxes(array, 1, 2) for array in fresh))
        cache = KeyValues(*(write(old, new, positions) for old, new in zip(cache, fresh, strict=True)))
        keys, values = (jnp.swapaxes(array, 1, 2).astype(query.dtype) for array in cache)
        out = dot_product.attention(query, keys, values, places=positions, window=self.sliding_window)
        return self._project_out(out), cache

    def _one_with_cache(
        self,
        x: Float[Array, "b 1 dim"],
        positions: Int[Array, "b 1"],
        cache: KeyValues,
    ) -> tuple[Float[Array, "b 1 dim"], KeyValues]:
        """`with_cache` of one new token of each row."""
        if self.query_norm is None:
            parts = self.query_key_value(x)
        else:
            parts = [part.reshape(*x.shape[:2], -1) for part in self._heads(x)]
        # Side by side, as one product gives them: XLA drops a cut that is undone at once.
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
        """`_project` before positions are brought in."""
        parts = self.query_key_value(x)
        query, key, value = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in parts)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def query_key_value(self, x: Float[Array, "b s dim"]) -> Sequence[Float[Array, "b s width"]]:
        """The three projections, before they are cut into heads."""
        return fused_linear(x, self.query, self.key, self.value)

    def _project_out(self, out: Float[Array, "b s n h"]) -> Float[Array, "b s dim"]:
        return self.out(out.reshape(*out.shape[:2], -1))


def _decode_step(
    joined: Array, keys: Array, values: Array, places: Array, *turns: Array, window: int | None
) -> tuple[Array, Array, Array]:
    angles = (turns[0], turns[1]) if turns else None
    return decode_step(joined, keys, values, places, angles, window=window)
