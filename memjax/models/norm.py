"""The norm in front of every part of a block."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.ops import dispatch
from memjax.ops.rms_norm.api import Normed, rms_norm
from memjax.sharding.axes import has_memory_axis, over_mesh, unsharded
from memjax.sharding.rules import REPLICATED, TOKENS


def norm(
    x: Float[Array, "*b d"], scale: Float[Array, " d"], epsilon: float, *, implementation: str | None = None
) -> Normed:
    """`rms_norm`, each device for its own tokens."""
    name = dispatch.choose("rms_norm", implementation, x.dtype)
    run = partial(rms_norm, epsilon=epsilon, implementation=name)
    if name != "triton":
        return run(x, scale)
    # XLA cannot split a kernel.
    return (over_mesh(run, (TOKENS, REPLICATED), TOKENS) if has_memory_axis() else unsharded(run, x))(x, scale)


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
        return norm(x, self.scale[...], self.epsilon, implementation=self.implementation)
