"""Product keys: the query projection and the sub-keys, which select the slots that are read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.config import checks
from memjax.config.memory import ProductKeyConfig
from memjax.ops import dispatch
from memjax.ops.precision import accumulator, init_in_float32
from memjax.ops.product_key_search.api import product_key_search
from memjax.ops.shapes import require
from memjax.sharding.axes import alike_over_tensor, fold, on_own_tokens


class Lookup(NamedTuple):
    """The slots that a layer reads for each token, with weights."""

    indices: Int[Array, "t k"]
    """Slots that all heads picked, head after head."""
    weights: Float[Array, "t k"]
    """Weight of each slot; the weights of a head add up to 1."""


class QueryKeyParam(nnx.Param):
    """A parameter of queries or keys, which has its own learning rate."""


class ProductKeys(nnx.Module):
    """Queries a product-key memory: [..., dim] -> the best top_k of num_keys ** 2 slots per head, with weights."""

    def __init__(
        self,
        dim: int,
        config: ProductKeyConfig,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Queries are one linear layer (Xavier-uniform, bias 0), keys uniform within +- key_dim ** -0.5.

        Raises:
            ValueError: dim is not positive, a type is not a floating-point type, or `implementation` is unknown.
        """
        kinds = {"dtype": dtype or jnp.float32, "param_dtype": param_dtype}
        checks.refuse(
            checks.counts(dim=dim)
            + dispatch.problems(implementation)
            + [
                f"{name}={jnp.dtype(kind).name} must be a type of floating-point numbers"
                for name, kind in kinds.items()
                if not jnp.issubdtype(kind, jnp.floating)
            ]
        )
        num_keys, num_heads, key_dim = config.num_keys, config.num_heads, config.key_dim
        self.dim, self.num_slots = dim, config.num_slots
        self.num_heads, self.top_k, self.key_dim = num_heads, config.top_k, key_dim
        self.qk_norm, self.score_scale = config.qk_norm, config.score_scale
        self.dtype, self.implementation = dtype, implementation
        glorot, uniform = init_in_float32(nnx.initializers.xavier_uniform()), init_in_float32(_uniform)
        self.query_kernel = QueryKeyParam(glorot(rngs.params(), (dim, num_heads * key_dim), param_dtype))
        self.query_bias = QueryKeyParam(jnp.zeros((num_heads * key_dim,), param_dtype))
        shape, bound = (num_heads, 2, num_keys, key_dim // 2), key_dim**-0.5
        self.keys = QueryKeyParam(uniform(rngs.params(), shape, param_dtype, bound))

    @property
    def picks(self) -> int:
        """Number of slots that a token reads, over all heads."""
        return self.num_heads * self.top_k

    def __call__(self, x: Float[Array, "*b dim"]) -> Lookup:
        """The slots that each token reads and their weights; batch axes are folded into tokens.

        Raises:
            ValueError: x has the wrong width.
        """
        check_width(type(self).__name__, x, self.dim)
        return self.lookup(self.queries(x))

    def promoted(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        """The input in the type of activations: `dtype`, or without it the common type of input and parameters."""
        return promote_dtype((x, self.query_bias[...]), dtype=self.dtype)[0]

    def queries(self, x: Float[Array, "*b dim"]) -> Float[Array, "t width"]:
        """Projected queries, num_heads * key_dim numbers per token; batch axes are folded into tokens."""
        x, kernel, bias = promote_dtype((fold(x), self.query_kernel[...], self.query_bias[...]), dtype=self.dtype)
        return x @ kernel + bias[None, :]

    def lookup(self, queries: Float[Array, "t width"]) -> Lookup:
        """The slots and weights for projected queries."""
        scores, slots = self.search(queries)
        weights = jax.nn.softmax(self.score_scale * scores, axis=-1)
        shape = queries.shape[0], self.picks
        return Lookup(slots.reshape(shape), weights.reshape(shape))

    def search(self, queries: Float[Array, "t width"]) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
        """Scores of each head for projected queries, best first and without `score_scale`, and slots."""
        return search(*self.vectors(queries), self.top_k, implementation=self.implementation)

    def vectors(
        self, queries: Float[Array, "t width"]
    ) -> tuple[Float[Array, "t h key_dim"], Float[Array, "h 2 n half"]]:
        """The queries of each head and the keys, whose products are the scores."""
        queries, keys = promote_dtype((queries, self.keys[...]), dtype=self.dtype)
        tokens = queries.shape[0]
        if self.qk_norm:
            halves = queries.reshape(tokens, self.num_heads, 2, self.key_dim // 2)
            queries, keys = unit_length(halves), unit_length(keys)
        return queries.reshape(tokens, self.num_heads, self.key_dim), keys


def search(
    queries: Float[Array, "t h key_dim"],
    keys: Float[Array, "h 2 n half"],
    top_k: int,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    """`product_key_search`, each device for its own tokens."""
    return on_own_tokens(_search, (queries,), (keys,), top_k=top_k, implementation=implementation)


_search = alike_over_tensor(product_key_search)


def check_width(layer: str, x: Float[Array, "*b width"], dim: int) -> None:
    """Raises ValueError unless x holds floating-point numbers of the layer's width."""
    require(layer, x.ndim >= 1 and x.shape[-1] == dim, f"x must be [..., {dim}]", x=x)
    require(layer, jnp.issubdtype(x.dtype, jnp.floating), "x must be floating-point numbers", x=x)


def unit_length(vectors: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Vectors divided by their Euclidean length, which is computed in float32 or wider."""
    wide = vectors.astype(accumulator(vectors.dtype))
    return (wide * jax.lax.rsqrt(jnp.sum(wide**2, axis=-1, keepdims=True) + 1e-12)).astype(vectors.dtype)


def _uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike, bound: float) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)
