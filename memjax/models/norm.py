"""The norm in front of every part of a block."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.memory import parallel
from memjax.ops.rms_norm.api import Normed


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

    def __call__(self, x: Float[Array, "*b dim"]) -> Normed:
        """x, for the residual, and its norm."""
        x = x if self.dtype is None else x.astype(self.dtype)
        return parallel.norm(x, self.scale[...], self.epsilon, implementation=self.implementation)
