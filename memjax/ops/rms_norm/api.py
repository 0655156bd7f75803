"""Public API of RMSNorm: batch shapes, gradients, dispatch."""

from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from memjax.ops import dispatch
from memjax.ops.manual_axes import vary_together
from memjax.ops.shapes import require


class Normed(NamedTuple):
    """The residual stream and its norm."""

    x: Float[Array, "*t d"]
    """The norm's input. Use this one as the residual: its gradient is added inside the norm's backward pass."""
    normed: Float[Array, "*t d"]


def rms_norm(
    x: Float[Array, "*t d"],
    scale: Float[Array, " d"],
    epsilon: float,
    *,
    residual: Float[Array, "*t d"] | None = None,
    implementation: str | None = None,
) -> Normed:
    """x, and scale * x / sqrt(mean(x**2) + epsilon) over the last axis (arXiv:1910.07467), in x's type.

    Sums are in float32 or wider. Differentiable in x, scale and residual.

    Args:
        x: rows.
        scale: a factor for each column.
        epsilon: avoids division by zero in rows of zeros.
        residual: added to x first, in x's type.
        implementation: one of `dispatch.IMPLEMENTATIONS`; None takes the fastest that can run.

    Raises:
        ValueError: shapes do not fit together, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    name = dispatch.choose("rms_norm", implementation, x.dtype)
    fits = x.ndim >= 1 and scale.shape == x.shape[-1:]
    require("rms_norm", fits, "scale must have one number for each column of x", x=x, scale=scale)
    if residual is not None:
        fits = residual.shape == x.shape and residual.dtype == x.dtype
        require("rms_norm", fits, "residual must have the shape and type of x", x=x, residual=residual)
    if x.size == 0:
        return Normed(x, x)
    fold = lambda array: array.reshape(-1, x.shape[-1])
    if name != "triton":
        x = x if residual is None else x + residual
        return Normed(x, dispatch.load("rms_norm", name).rms_norm(fold(x), scale, epsilon).reshape(x.shape))
    rows = [fold(array) for array in (x, residual) if array is not None]
    found: Any = _by_kernels(epsilon, *vary_together((scale, *rows)))
    added, normed = found
    return Normed(added.reshape(x.shape), normed.reshape(x.shape))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernels(epsilon: float, scale: Array, x: Array, *residual: Array) -> tuple[Array, Array]:
    kernels = dispatch.load("rms_norm", "triton")
    if residual:
        return kernels.added_rms_norm(x, *residual, scale, epsilon)
    return x, kernels.rms_norm(x, scale, epsilon)


def _forward(epsilon: float, scale: Array, x: Array, *residual: Array):
    both: Any = _by_kernels(epsilon, scale, x, *residual)
    # The number of residuals is kept as structure, because an int would become a tracer.
    return both, (scale, both[0], (None,) * len(residual))


def _backward(epsilon: float, residuals: tuple[Array, Array, tuple[None, ...]], cotangents: tuple[Array, Array]):
    (scale, x, added), (d_residual, d_y) = residuals, cotangents
    d_x, d_scale = dispatch.load("rms_norm", "triton").rms_norm_gradient(x, scale, d_y, d_residual, epsilon=epsilon)
    return d_scale.astype(scale.dtype), d_x, *(d_x for _ in added)


_by_kernels.defvjp(_forward, _backward)
