"""The root mean square norm as others call it: any batch shape, gradients, choice of the implementation."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from memjax.ops import dispatch
from memjax.ops.manual_axes import vary_together
from memjax.ops.shapes import require


class Normed(NamedTuple):
    """What a residual block goes on with."""

    x: Float[Array, "*t d"]
    """The input itself. Its gradient is added where that of the norm is formed: use this one for the residual."""
    normed: Float[Array, "*t d"]


def rms_norm(
    x: Float[Array, "*t d"], scale: Float[Array, " d"], epsilon: float, *, implementation: str | None = None
) -> Normed:
    """x, and scale * x / sqrt(mean(x**2) + epsilon) over the last axis (arXiv:1910.07467), in x's type.

    Sums are in float32 or wider. Differentiable in x and scale.

    Raises:
        ValueError: shapes do not fit together, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    name = dispatch.choose("rms_norm", implementation, x.dtype)
    fits = x.ndim >= 1 and scale.shape == x.shape[-1:]
    require("rms_norm", fits, "scale must have one number for each column of x", x=x, scale=scale)
    if x.size == 0:
        return Normed(x, x)
    folded = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if name != "triton":
        return Normed(x, dispatch.load("rms_norm", name).rms_norm(folded, scale, epsilon).reshape(x.shape))
    both: Any = _by_kernels(epsilon, *vary_together((folded, scale)))
    same, normed = both
    return Normed(same.reshape(x.shape), normed.reshape(x.shape))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernels(epsilon: float, x: Array, scale: Array) -> tuple[Array, Array]:
    return x, dispatch.load("rms_norm", "triton").rms_norm(x, scale, epsilon)


def _forward(epsilon: float, x: Array, scale: Array):
    return _by_kernels(epsilon, x, scale), (x, scale)


def _backward(epsilon: float, residuals: tuple[Array, Array], cotangents: tuple[Array, Array]):
    (x, scale), (beside, d_y) = residuals, cotangents
    d_x, d_scale = dispatch.load("rms_norm", "triton").rms_norm_gradient(x, scale, d_y, beside, epsilon)
    return d_x, d_scale.astype(scale.dtype)


_by_kernels.defvjp(_forward, _backward)
