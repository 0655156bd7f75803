"""The norm in front of every part of a block."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.ops import dispatch
from memjax.ops.rms_norm.api import Normed, rms_norm
from memjax.sharding.axes import has_memory_axis, over_mesh, unsharded
from memjax.sharding.rules import REPLICATED, TOKENS


def norm(
    x: Float[Array, "*b d"],
    scale: Float[Array, " d"],
    epsilon: float,
    *,
    residual: Float[Array, "*b d"] | None = None,
    implementation: str | None = None,
) -> Normed:
    """`rms_norm`, each device for its own tokens."""
    name = dispatch.choose("rms_norm", implementation, x.dtype)
    arrays = (x, scale) if residual is None else (x, scale, residual)
    settings = {"epsilon": epsilon, "implementation": name}
    if name != "triton":
        return _norm(*arrays, **settings)
    # XLA cannot split a kernel.
    if not has_memory_axis():
        return unsharded(partial(_norm, **settings), x)(*arrays)
    return over_mesh(_norm, (TOKENS, REPLICATED, TOKENS)[: len(arrays)], TOKENS, **settings)(*arrays)


def _norm(x: Array, scale: Array, residual: Array | None = None, *, epsilon: float, implementation: str) -> Normed:
    return rms_norm(x, scale, epsilon, residual=residual, implementation=implementation)


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis with a learned scale that begins at 1 (arXiv:1910.07467)."""

    def __init__(
        self,
        dim: int,
        *,
        epsilon: float,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        implementation: str | None = None,
    ):
        """`implementation` is one of `dispatch.IMPLEMENTATIONS`; None takes the fastest that can run."""
        self.epsilon, self.dtype, self.implementation = epsilon, dtype, implementation
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))

    def __call__(self, x: Float[Array, "*b dim"], residual: Float[Array, "*b dim"] | None = None) -> Normed:
        """x plus the residual, for the next residual, and its norm."""
        x, residual = promote_dtype((x, residual), dtype=x.dtype if self.dtype is None else self.dtype)
        return norm(x, self.scale[...], self.epsilon, residual=residual, implementation=self.implementation)
