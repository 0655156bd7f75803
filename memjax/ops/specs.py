"""Cases of every operation on small arrays, for comparing implementations: in tests, on GPUs, in the doctor.

`memjax.ops.<operation>.specs` has a function `specs`, which draws arrays and returns the cases by name.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

OPERATIONS = (
    *("product_key_search", "embedding_bag", "embedding_dot", "row_update", "grouped_matmul", "rms_norm"),
    *("decode_attention", "matvec"),
)
"""Names of the operations, and of their folders."""


class Case(NamedTuple):
    """A call of an operation, and its gradients."""

    function: Callable[..., Any]
    """(name of the implementation, *arrays) -> arrays."""
    arrays: tuple[Array, ...] = ()
    """Arrays with respect to which it is differentiated."""

    def run(self, implementation: str) -> list[Array]:
        """The function's outputs, and the gradients of half the sum of their squares."""

        def run(*arrays: Array) -> Any:
            out, pull = jax.vjp(partial(self.function, implementation), *arrays)
            return out, pull(out) if arrays else ()

        return jax.tree.leaves(jax.jit(run)(*self.arrays))


Specs = Mapping[str, Case]


class Draw:
    """Random arrays, the same ones for the same seed."""

    def __init__(self, seed: int = 0):
        self._rng = np.random.default_rng(seed)

    def normal(self, *shape: int) -> Float[Array, "..."]:
        """Standard normal numbers (float32)."""
        return jnp.asarray(self._rng.normal(size=shape), jnp.float32)

    def integers(self, limit: int, *shape: int) -> Int[Array, "..."]:
        """Integers from 0 to limit - 1 (int32)."""
        return jnp.asarray(self._rng.integers(limit, size=shape), jnp.int32)


def specs(operation: str) -> Specs:
    """The cases of an operation, by name."""
    return importlib.import_module(f"memjax.ops.{operation}.specs").specs(Draw())


def difference(operation: str, implementation: str) -> float:
    """The largest difference from the reference in any case, relative to the reference's largest number.

    Infinite if an output is not finite.

    Raises:
        ValueError: an output or gradient differs in shape.
    """
    worst = 0.0
    for case in specs(operation).values():
        for one, other in zip(case.run(implementation), case.run("reference"), strict=True):
            if one.shape != other.shape:
                raise ValueError(f"{operation}: {implementation} has shape {one.shape}, the reference {other.shape}")
            one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
            with np.errstate(invalid="ignore"):
                share = float(np.abs(one - other).max()) / max(float(np.abs(other).max()), np.finfo(np.float64).tiny)
            worst = max(worst, share if np.isfinite(share) else np.inf)
    return worst
