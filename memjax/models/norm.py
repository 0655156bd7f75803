"""RMSNorm as a module, fused with the residual sum before it."""

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.ops import dispatch
from memjax.ops.rms_norm.api import Normed, rms_norm
from memjax.sharding.axes import on_own_tokens


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis, with a learned scale that starts at 1 (arXiv:1910.07467)."""

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
        """x plus the residual, to be used as the next residual, and its norm."""
        x, residual = promote_dtype((x, residual), dtype=x.dtype if self.dtype is None else self.dtype)
        scale, name = self.scale[...], dispatch.choose("rms_norm", self.implementation, x.dtype)
        if name != "triton":
            return rms_norm(x, scale, self.epsilon, residual=residual, implementation=name)
        # XLA cannot shard a kernel, so each device normalises its own tokens.
        tokens = (x,) if residual is None else (x, residual)
        return on_own_tokens(_by_kernel, tokens, (scale,), epsilon=self.epsilon)


def _by_kernel(x: Array, *rest: Array, epsilon: float) -> Normed:
    *residual, scale = rest
    return rms_norm(x, scale, epsilon, residual=residual[0] if residual else None, implementation="triton")
