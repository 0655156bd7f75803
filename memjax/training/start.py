"""Where a run begins that has no checkpoint of its own: at random parameters, or at those of another run."""

import jax

from memjax.checkpoint.checkpoints import Checkpoints
from memjax.command_line import differences
from memjax.config import RunConfig
from memjax.errors import ConfigError
from memjax.loading import PARAMS, TABLES, load, read_config
from memjax.models.parts import DecoderParts, take_apart
from memjax.models.trees import params_to_tree, tree_to_params
from memjax.training.metrics import tell_phase
from memjax.training.run_folder import RunFolder
from memjax.training.state import Trainer, TrainState

OPT_STATE = "opt_state"
"""The item of a checkpoint with the state of the dense optimizer, which a model without a training does not have."""


def check_start(config: RunConfig) -> None:
    """Refuses, before anything is written, a start that cannot be made; says which settings of the model change.

    Raises:
        ConfigError: shapes differ from those of train.init_from, or the run's own folder holds a model, not a training.
        CheckpointError: train.init_from names no run that can be read.
    """
    folder, source = RunFolder.of(config), config.train.init_from
    if steps := Checkpoints(folder.checkpoints).steps():
        if not (folder.checkpoints / str(steps[-1]) / OPT_STATE).exists():
            raise ConfigError(
                [
                    f"run.dir={folder.path} holds a model without the state of a training, so there is nothing to "
                    f"resume; to train that model set --train.init_from {folder.path} and another --run.dir"
                ]
            )
        return
    if source is None:
        return
    saved = read_config(source).model
    found, wanted = (_shapes(DecoderParts.of(model)) for model in (saved, config.model))
    problems = [
        f"  {name}: has {found.get(name, 'nothing')}, the model has {wanted.get(name, 'nothing')}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if problems:
        raise ConfigError(
            [
                f"train.init_from={source} does not fit the model; train with the config.yaml of that run, or add "
                "memory layers to it with memjax.convert upcycle:",
                *problems,
            ]
        )
    for line in differences(saved, config.model):
        print(f"other than in {source}: model.{line}", flush=True)


def first_state(trainer: Trainer, mesh: jax.sharding.Mesh) -> TrainState:
    """The state before the first step; under the mesh, where every array is on its devices from the beginning.

    Raises:
        CheckpointError: train.init_from cannot be read.
    """
    source = trainer.config.train.init_from
    if source is None:
        tell_phase("drawing parameters and tables")
        return jax.block_until_ready(trainer.init(jax.random.key(trainer.config.run.seed), mesh))
    tell_phase(f"reading {source}")
    loaded = load(source)
    _, params, tables = take_apart(loaded.model)
    params = tree_to_params(trainer.parts, params_to_tree(params))
    like = (trainer.parts.abstract_params, trainer.parts.abstract_tables)
    arrays = jax.tree.map(lambda array, target: array.astype(target.dtype), (params, tables), like)
    print(f"starts from step {loaded.step} of {source}", flush=True)
    return trainer.place(arrays, trainer.shardings(mesh))


def _shapes(parts: DecoderParts) -> dict[str, list[int]]:
    tree = {PARAMS: params_to_tree(parts.abstract_params), TABLES: parts.abstract_tables}
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}
