"""The first state of a run: its newest checkpoint, random parameters, or those of another run."""

import dataclasses
import shlex
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.checkpoint.checkpoints import Checkpoints
from memjax.checkpoint.names import flatten
from memjax.config.load import differences
from memjax.config.optim import ScheduleConfig
from memjax.config.run import RunConfig
from memjax.errors import CheckpointError, ConfigError
from memjax.io.console import say
from memjax.models.parts import DecoderParts, split_decoder, writable
from memjax.monitoring.progress import log_phase
from memjax.runs.folder import Claim, RunFolder
from memjax.runs.layout import DATA_ITER, META, OPT_STATE, PARAMS, TABLES, params_to_tree, tree_to_params, widened
from memjax.runs.load import load
from memjax.runs.saved import cast_like, read_config, read_only_formats
from memjax.training import spikes
from memjax.training.optimizer import make_schedule
from memjax.training.program import TrainProgram
from memjax.training.state import OPTIONAL, TrainState, from_items, to_items


def check_trainable(config: RunConfig) -> None:
    """Refuses the folder of a model without training state, before the data is opened.

    Raises:
        ConfigError: the run's own folder holds a model without training state.
        CheckpointError: its model cannot be read.
    """
    folder = RunFolder.of(config)
    checkpoints = Checkpoints(folder.checkpoints)
    if checkpoints.latest() is None or checkpoints.newest_with(OPT_STATE) is not None:
        return
    place, source = folder.path, shlex.quote(str(folder.path))
    formats, origin = read_only_formats(place)
    if formats:
        run = shlex.quote(origin or "THAT_RUN")
        raise ConfigError(
            f"run.dir={place} holds a model whose tables are read-only, in {formats}; {_OF_WHAT_IT_WAS}: "
            f"python -m memjax.train {run} --train.init_from {run} --run.dir NEW_RUN, and the other settings"
        )
    raise ConfigError(
        f"run.dir={place} holds a model without the state of a training, so there is nothing to resume; to train that "
        f"model: python -m memjax.train {source} --train.init_from {source} --run.dir NEW_RUN, and the other settings, "
        "such as --data.path FILE"
    )


_OF_WHAT_IT_WAS = "train the run that `convert quantize` made it from"


def check_start(config: RunConfig) -> None:
    """Refuses, before anything is written, a run that cannot start; prints which settings of the model change.

    Raises:
        ConfigError: shapes differ from those of train.init_from, its tables are read-only, or train.steps is below
            the step that the run has reached.
        CheckpointError: train.init_from is not a readable run, or no step of the run itself can be read.
    """
    folder, source = RunFolder.of(config), config.train.init_from
    if _check_own_steps(folder, config) or source is None:
        return
    saved = read_config(source).model
    formats, origin = read_only_formats(source)
    if formats:
        named = f", {origin}" if origin else ""
        raise ConfigError(f"train.init_from={source}: its tables are read-only, in {formats}; {_OF_WHAT_IT_WAS}{named}")
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
        say(f"differs from {source}: model.{line}")


def _check_own_steps(folder: RunFolder, config: RunConfig) -> bool:
    """Whether the run has its own checkpoints, so that it can be resumed."""
    checkpoints = Checkpoints(folder.checkpoints)
    if not checkpoints.steps():
        return False
    unreadable = sorted(set(checkpoints.steps()) - set(checkpoints.readable()))
    if unreadable and checkpoints.latest() is None:
        # Starting again would bury what may still be repaired.
        raise CheckpointError(
            f"{folder.checkpoints}: none of the steps {unreadable} can be read, and no other holds all of the state; "
            "repair or remove them, or name another run.dir"
        )
    newest = checkpoints.latest() if folder.read_summary() is None else None
    if newest is not None and newest > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps} is below step {newest}, which {folder.path} has reached; set it to "
            f"{newest} or more"
        )
    return True


def log_schedule_changes(claim: Claim) -> None:
    """Prints how a changed number of steps changes the learning rates of a resumed run."""
    before, config = claim.before, claim.config
    if before is None or before.train.steps == config.train.steps:
        return
    step = 1 + (Checkpoints(claim.folder.checkpoints).latest() or 0)
    schedules: list[tuple[str, ScheduleConfig, ScheduleConfig]] = [("optim", before.optim, config.optim)]
    if config.model.lookups:
        schedules.append(("optim.table", before.optim.table, config.optim.table))
    for name, old, new in schedules:
        was, now = (
            jnp.asarray(jax.jit(make_schedule(schedule, run.train.steps))(step - 1)).item()
            for schedule, run in ((old, before), (new, config))
        )
        if was != now:
            say(
                f"{name}: its {new.schedule} schedule now spans {config.train.steps} steps; the rate of step "
                f"{step} is {now:.2e}, it was {was:.2e} over {before.train.steps}"
            )


def first_state(program: TrainProgram, mesh: jax.sharding.Mesh) -> TrainState:
    """The state before the first step; call it under the mesh, so that every array is sharded from the start.

    Raises:
        CheckpointError: train.init_from cannot be read, or its tables are read-only.
    """
    source = program.config.train.init_from
    if source is None:
        log_phase("drawing parameters and tables")
        return jax.block_until_ready(program.init(jax.random.key(program.config.run.seed), mesh))
    log_phase(f"reading {source}")
    loaded = load(source)
    _, params, tables = split_decoder(loaded.model)
    params, tables = tree_to_params(program.parts, params_to_tree(params)), writable(tables, str(source))
    arrays = cast_like((params, tables), (program.parts.abstract_params, program.parts.abstract_tables))
    say(f"starts from step {loaded.step} of {source}")
    return program.place(arrays, program.shardings(mesh))


class SavedState(NamedTuple):
    """Contents of a training checkpoint."""

    state: TrainState
    data_position: dict[str, Any]
    meta: dict[str, Any]


def newest_state(program: TrainProgram, mesh: jax.sharding.Mesh, checkpoints: Checkpoints) -> SavedState | None:
    """The newest state that can be read; None if no complete checkpoint is saved.

    Raises:
        CheckpointError: none of the saved ones can be read.
    """
    steps, complete = checkpoints.steps(), checkpoints.complete()
    if steps and steps[-1:] != complete[-1:]:
        place = f"step {complete[-1]}" if complete else "the beginning"
        say(f"step {steps[-1]} was saved without tables, so the run resumes from {place}")
    if not complete:
        return None
    log_phase("restoring the newest checkpoint")
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.abstract_state,
        program.shardings(mesh),
    )
    restored = checkpoints.restore(to_items(abstract), [DATA_ITER, META], optional=OPTIONAL)
    documents = restored.documents
    state = _completed(program, mesh, from_items(program.parts, restored.arrays))
    return SavedState(state, documents[DATA_ITER], documents[META])


def _completed(program: TrainProgram, mesh: jax.sharding.Mesh, state: TrainState) -> TrainState:
    """Adds what the checkpoint lacks because its setting is new; it starts at this step."""
    optim, shardings = program.config.optim, program.shardings(mesh)
    if optim.ema_decay is not None and state.ema is None:
        copied = jax.jit(lambda params: jax.tree.map(jnp.copy, widened(params)), out_shardings=shardings.ema)
        state = dataclasses.replace(state, ema=copied(state.params))
    if optim.skip_step_sigma is not None and state.recent is None:
        state = dataclasses.replace(state, recent=jax.device_put(spikes.none_yet(), shardings.recent))
    return state


def _shapes(parts: DecoderParts) -> dict[str, list[int]]:
    tree = {PARAMS: params_to_tree(parts.abstract_params), TABLES: parts.abstract_tables}
    return {name: list(leaf.shape) for name, leaf in flatten(tree).items()}
