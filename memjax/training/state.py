"""Everything that changes from step to step."""

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state between two steps. Donated to the step, which returns the next one in the same memory.

    The same class holds the state's shapes, or where each array lives, so its leaves are of any type.
    """

    step: Any
    """Finished steps (int32). A step whose gradient is not a number does not count."""
    healthy: Any
    """False once a step was not finite; the state then stays as it was before that step."""
    params: nnx.State
    """Dense parameters."""
    opt_state: optax.OptState
    tables: dict[str, Any]
    """Rows of every table, by the name of the pool."""
    table_state: dict[str, Any]
    reads: dict[str, Any]
    """Reads of every slot (int32 [num_slots]) since the last statistics, by layer."""
