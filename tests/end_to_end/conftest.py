"""Reads the arrays of a run's checkpoints."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from memjax.checkpoint import Checkpoints
from memjax.config.run import RunConfig
from memjax.runs.layout import params_to_tree
from memjax.training.program import TrainProgram


@pytest.fixture(scope="session")
def arrays_of() -> Callable[[RunConfig, Checkpoints, int], dict[str, np.ndarray]]:
    """arrays_of(config, checkpoints, step): every leaf of a checkpoint, by path."""

    def read(config: RunConfig, checkpoints: Checkpoints, step: int) -> dict[str, np.ndarray]:
        state = TrainProgram.of(config).abstract_state
        targets = {
            "params": params_to_tree(state.params),
            "opt_state": state.opt_state,
            "tables": state.tables,
            "table_state": {"optimizer": state.table_state, "reads": state.reads, "step": state.step},
        }
        targets = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), targets)
        flat, _ = jax.tree_util.tree_flatten_with_path(checkpoints.restore(targets, step=step).arrays)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}

    return read
