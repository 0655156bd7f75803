"""Shape checks that raise with the names of the arrays, so that nothing is silently broadcast or reshaped."""

from typing import Any

import jax.numpy as jnp


def require(operation: str, fits: bool, rule: str, **arrays: Any) -> None:
    """Raises ValueError unless the arrays fit together; the message has the rule, their types and their shapes."""
    if not fits:
        found = ", ".join(f"{name} {describe(array)}" for name, array in arrays.items())
        raise ValueError(f"{operation}: {rule}; found {found}")


def describe(array: Any) -> str:
    """Type and shape, as in float32[16, 64]; the class name of anything that is not an array."""
    if not hasattr(array, "dtype"):
        return f"of type {type(array).__name__}"
    return f"{jnp.dtype(array.dtype).name}[{', '.join(map(str, array.shape))}]"


def in_range(indices: Any, num_rows: int) -> Any:
    """Mask of the indices in 0..num_rows - 1, even if their type cannot represent num_rows."""
    below = indices < num_rows if num_rows <= jnp.iinfo(indices.dtype).max else True
    return (indices >= 0) & below


def check_table(operation: str, table: Any, indices: Any) -> None:
    """Raises ValueError unless the table is a matrix of floating-point numbers and the indices are integers [*t, k]."""
    is_table = table.ndim == 2 and jnp.issubdtype(table.dtype, jnp.floating)
    require(operation, is_table, "table must be [slots, width] of floating-point numbers", table=table)
    is_indices = jnp.issubdtype(indices.dtype, jnp.integer) and indices.ndim >= 1
    require(operation, is_indices, "indices must be integers [..., picks]", indices=indices)
    require(operation, table.shape[0] > 0 or not indices.size, "a table without rows cannot be read", table=table)
