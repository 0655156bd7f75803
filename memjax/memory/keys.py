"""The parameters that decide which slots are read: the query projection and the product keys."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.memory import parallel
from memjax.ops.precision import drawn_wide


class AddressParam(nnx.Param):
    """A parameter of the address (queries and keys), which has a learning rate of its own."""


class ProductKeys(nnx.Module):
    """Queries a product-key memory: [.., dim] -> scores and slots of the best top_k of num_keys ** 2, for each head."""

    def __init__(
        self,
        dim: int,
        *,
        num_keys: int,
        num_heads: int,
        top_k: int,
        key_dim: int,
        qk_norm: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Queries are one linear layer (Xavier-uniform, bias 0), keys uniform within +- key_dim ** -0.5."""
        self.num_heads, self.top_k, self.key_dim, self.qk_norm = num_heads, top_k, key_dim, qk_norm
        self.dtype, self.implementation = dtype, implementation
        glorot, uniform = drawn_wide(nnx.initializers.xavier_uniform()), drawn_wide(_uniform)
        self.query_kernel = AddressParam(glorot(rngs.params(), (dim, num_heads * key_dim), param_dtype))
        self.query_bias = AddressParam(jnp.zeros((num_heads * key_dim,), param_dtype))
        shape, bound = (num_heads, 2, num_keys, key_dim // 2), key_dim**-0.5
        self.keys = AddressParam(uniform(rngs.params(), shape, param_dtype, bound))

    def __call__(self, x: Float[Array, "t dim"]) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
        """Scores, best first, and slots."""
        x, kernel, bias, keys = promote_dtype(
            (x, self.query_kernel[...], self.query_bias[...], self.keys[...]), dtype=self.dtype
        )
        queries = (x @ kernel + bias[None, :]).reshape(-1, self.num_heads, 2, self.key_dim // 2)
        if self.qk_norm:
            queries, keys = unit_length(queries), unit_length(keys)
        queries = queries.reshape(-1, self.num_heads, self.key_dim)
        return parallel.search(queries, keys, self.top_k, implementation=self.implementation)


def unit_length(vectors: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Vectors over their Euclidean length, computed in float32 or wider."""
    wide = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide**2, axis=-1, keepdims=True) + 1e-12)).astype(vectors.dtype)


def _uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike, bound: float) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)
