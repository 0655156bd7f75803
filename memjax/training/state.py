"""The training state, and the checkpoint items that hold it."""

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx

from memjax.models.parts import DecoderParts
from memjax.runs.layout import EMA, OPT_STATE, PARAMS, RECENT, TABLE_STATE, TABLES, params_to_tree, tree_to_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state between two steps. It is donated to the step, which returns the next one in the same memory.

    The same class holds the shapes or shardings of the state, so its leaves can be of any type.
    """

    step: Any
    """Number of finished steps (int32). A step with a gradient that is not finite does not count."""
    healthy: Any
    """False once a step was not finite; the state then stays as it was before that step."""
    params: nnx.State
    """Dense parameters."""
    opt_state: optax.OptState
    tables: dict[str, Any]
    """Rows of every table, by name."""
    table_state: dict[str, Any]
    reads: dict[str, Any]
    """Reads of every slot (int32 [num_slots]) since the last statistics, by layer."""
    ema: Any = None
    """The moving average of the dense parameters, in float32 or wider (`optim.ema_decay`); None if there is none."""
    recent: Any = None
    """Recent losses and norms (`memjax.training.spikes`); None if no steps are skipped (`optim.skip_step_sigma`)."""


def to_items(state: TrainState) -> dict[str, Any]:
    """The checkpoint items of a state."""
    items = {
        PARAMS: params_to_tree(state.params),
        OPT_STATE: state.opt_state,
        TABLE_STATE: {"optimizer": state.table_state, "reads": state.reads, "step": state.step},
    }
    items |= {TABLES: state.tables} if state.tables else {}
    items |= {EMA: params_to_tree(state.ema)} if state.ema is not None else {}
    return items | ({RECENT: state.recent} if state.recent is not None else {})


OPTIONAL = (EMA, RECENT)
"""Items that a checkpoint lacks if their setting was null when it was written."""


def from_items(parts: DecoderParts, items: dict[str, Any]) -> TrainState:
    """The state held by checkpoint items."""
    step = items[TABLE_STATE]["step"]
    return TrainState(
        step=step,
        healthy=jax.numpy.ones((), bool, device=step.sharding),
        params=tree_to_params(parts, items[PARAMS]),
        opt_state=items[OPT_STATE],
        tables=items.get(TABLES, {}),
        table_state=items[TABLE_STATE]["optimizer"],
        reads=items[TABLE_STATE]["reads"],
        ema=tree_to_params(parts, items[EMA]) if EMA in items else None,
        recent=items.get(RECENT),
    )
