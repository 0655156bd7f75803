"""Layout of the checkpoints of a run: names of items, the `meta` document, dense parameters as nested dicts.

The nested dicts have string keys, such as `blocks/0/attention/key/kernel`.
"""

import dataclasses
import importlib.metadata
import pathlib
import platform
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memjax.checkpoint.names import flatten, nest
from memjax.config import renamed
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.models.parts import DecoderParts
from memjax.ops.precision import accumulator, resolve_dtype

CHECKPOINTS = "checkpoints"
"""The subfolder of a run with its steps."""
PARAMS, TABLES, META = "params", "tables", "meta"
"""The items of a step that make up a model."""
OPT_STATE, TABLE_STATE, DATA_ITER = "opt_state", "table_state", "data_iter"
"""Items needed only for training: optimizer states of dense parameters and of tables, and the data position."""
EMA, RECENT = "ema", "recent"
"""Items of runs that keep a moving average of the dense parameters, or skip spikes of the loss."""
FORMAT = 2
"""Version of the `meta` document; increased when older code could not read it."""
FORMAT_WITH_TABLE_FILES = 3
"""Version for runs whose tables are in files, listed by name in `meta["table_files"]`, instead of the checkpoint."""
TABLE_FILES = "tables"
"""The subfolder of a run with these files."""


def run_folder(checkpoints: pathlib.Path) -> pathlib.Path:
    """The run's folder, given that of its steps, which may also stand alone."""
    return checkpoints.parent if checkpoints.name == CHECKPOINTS else checkpoints


def meta_document(config: RunConfig, tokenizer: Tokenizer, *, step: int) -> dict[str, Any]:
    """The `meta` document of a checkpoint as JSON values: everything that `load` needs except arrays."""
    dtypes = {kind: resolve_dtype(section.table_dtype).name for kind, section in config.model.lookup_sections.items()}
    return {
        "format": FORMAT,
        "step": step,
        "config": dataclasses.asdict(config),
        "tokenizer": tokenizer.full_state(),
        # Resolved, because 'auto' depends on the machine.
        "table_dtypes": dtypes,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "flax", "orbax-checkpoint")},
        },
    }


def upgraded(meta: dict[str, Any]) -> dict[str, Any]:
    """Converts a `meta` document of an older version to the current one."""
    if meta.get("format") == 1:
        dtypes = {"memory": meta["table_dtype"], "expert_lookup": meta.get("expert_table_dtype")}
        meta = meta | {"format": FORMAT, "table_dtypes": dtypes}
    # Keyed by config section, so renamed sections apply here too.
    dtypes = renamed.upgraded({"model": meta.get("table_dtypes", {})})["model"]
    return meta | {"config": renamed.upgraded(meta["config"]), "table_dtypes": dtypes}


def widened(params: nnx.State) -> nnx.State:
    """Parameters in float32 or wider, as for their moving average: a step's change to it would round to nothing."""
    return jax.tree.map(lambda param: jnp.asarray(param, accumulator(param.dtype)), params)


def params_to_tree(params: nnx.State) -> dict[str, Any]:
    """The parameters, or their shapes, as nested dicts such as `blocks/0/attention/key/kernel`."""
    return nest(flatten(nnx.to_pure_dict(params)))


def tree_to_params(parts: DecoderParts, tree: dict[str, Any]) -> nnx.State:
    """The inverse of `params_to_tree`; KeyError if the tree lacks a parameter of the decoder."""

    def find(path: tuple[Any, ...], _: Any) -> Any:
        found = tree
        for key in path:
            if isinstance(key, jax.tree_util.DictKey):  # keys after the dicts are inside the variable
                found = found[str(key.key)]
        return found

    return jax.tree_util.tree_map_with_path(find, parts.abstract_params)
