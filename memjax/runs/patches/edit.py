"""Diff two runs into a patch, apply a patch to a run, and revert it."""

import os
import re
from collections.abc import Mapping
from typing import Any, Literal

from memjax.checkpoint.restoring import StoredStep
from memjax.errors import CheckpointError
from memjax.models.decoder import Decoder
from memjax.models.parts import split_decoder, writable
from memjax.runs.layout import META, PARAMS
from memjax.runs.load import LoadedModel, load_as_saved
from memjax.runs.patches.applied import Applied, model_digest
from memjax.runs.patches.patch import Patch, read_patch
from memjax.runs.patches.tables import between
from memjax.runs.saved import checkpoint_folder, open_step
from memjax.runs.write import write_run

Step = int | Literal["latest", "best"]


def diff(old: str | os.PathLike[str], new: str | os.PathLike[str], *, step: Step = "latest") -> Patch:
    """The patch that turns the model of one run into that of another with the same sizes and dense parameters.

    Raises:
        CheckpointError: a run cannot be read, or they differ in more than rows.
    """
    models = [load_as_saved(path, step=step) for path in (old, new)]
    indices = [StoredStep(model.checkpoints, model.step).index["arrays"] for model in models]
    left, right = ({name: leaf["digest"] for name, leaf in index[PARAMS].items()} for index in indices)
    if other := sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name)):
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise CheckpointError(
            f"{new}: differs from {old} in {other[0]}{more}; a patch holds rows of tables only, dense "
            "parameters must be the same"
        )
    before, after = (writable(split_decoder(model.model)[2]) for model in models)
    shapes = [{name: (table.shape, table.dtype.name) for name, table in tables.items()} for tables in (before, after)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{new}: has tables {shapes[1]}, {old} has {shapes[0]}")
    notes = {"made_by": "diff", "old": str(old), "new": str(new)}
    return between(before, after, base=model_digest(models[0].checkpoints, models[0].step), notes=notes)


def patch_between(loaded: LoadedModel, new: Decoder, notes: Mapping[str, Any]) -> Patch:
    """The patch that turns a loaded run's model into `new`, which differs in rows of tables only.

    Rows are rounded to the type of the run's tables.
    """
    tables = writable(split_decoder(load_as_saved(loaded.checkpoints, step=loaded.step).model)[2])
    wanted = {name: table.astype(tables[name].dtype) for name, table in writable(split_decoder(new)[2]).items()}
    return between(tables, wanted, base=model_digest(loaded.checkpoints, loaded.step), notes=notes)


def apply(
    run: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    step: Step = "latest",
    out: str | os.PathLike[str] | None = None,
) -> Patch:
    """Applies a patch to a checkpoint of a run: from then on, loading that checkpoint includes the patch.

    With `out`, the given run is unchanged, and a new run with the changed rows in its checkpoint is written to `out`.

    Raises:
        CheckpointError: the patch cannot be read or does not fit, or nothing can be written.
    """
    patch = read_patch(path)
    if out is not None:
        loaded = load_as_saved(run, step=step, patches=[path])
        write_run(out, loaded.model, loaded.tokenizer, loaded.config)
        return patch
    applied = Applied(checkpoint_folder(run))
    with applied.owned():
        loaded = load_as_saved(run, step=step, patches=[path])
        applied.add(loaded.step, patch)
    return patch


def revert(run: str | os.PathLike[str], path: str | os.PathLike[str], *, step: Step = "latest") -> Patch:
    """Reverts a patch applied to a checkpoint, which restores the model bit for bit. `path` may also be the patch's
    identity, as printed by `show`.

    Raises:
        CheckpointError: the patch is not applied, or a later one changes the same rows.
    """
    applied = Applied(checkpoint_folder(run))
    with applied.owned():
        number = _number(applied, step)
        names = applied.names(number)
        is_identity = re.fullmatch("[0-9a-f]{16}", str(path)) and not os.path.exists(path)
        name = str(path) if is_identity or str(path) in names else read_patch(path).identity
        if name not in names:
            there = f"applied are {', '.join(names)}" if names else "none is applied"
            raise CheckpointError(f"{run}: patch {name} is not applied to step {number}; {there}")
        patch = applied.patch(name)
        for later in names[names.index(name) + 1 :]:
            if shared := patch.shared_rows(applied.patch(later)):
                count = sum(map(len, shared.values()))
                raise CheckpointError(
                    f"{run}: patch {later} was applied after {name} and changes {count:,} of the same rows; revert it "
                    "first"
                )
        applied.remove(number, name)
    return patch


def _number(applied: Applied, step: Step) -> int:
    """The number of the step."""
    with open_step(applied.checkpoints, step) as opened:
        return opened.checkpoints.restore({}, [META], step=opened.number).step
