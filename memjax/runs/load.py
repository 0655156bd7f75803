"""From the folder of a run to a model that is ready to call, on any number of devices."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pydantic
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from memjax.checkpoint.checkpoints import Checkpoints
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.errors import CheckpointError
from memjax.io.paths import local_path
from memjax.models.decoder import Decoder, resolve_dtype
from memjax.models.parts import DecoderParts, take_apart
from memjax.runs.applied import patched
from memjax.runs.layout import CHECKPOINTS, FORMAT, META, PARAMS, TABLES, params_to_tree, tree_to_params, upgraded
from memjax.sharding.axes import COLUMNS, MEMORY, has_memory_axis

TableDtypes = Mapping[str, str]
"""Names of the types of tables, by the section that they belong to."""


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """What `load` gives; `model, tokenizer = memjax.load(path)` works too."""

    model: Decoder
    tokenizer: Tokenizer
    config: RunConfig
    """Of the run, as it was trained."""
    step: int
    """The step that was read."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))


def load(
    path: str | os.PathLike[str],
    *,
    step: int | Literal["latest", "best"] = "latest",
    dtype: DTypeLike | None = None,
    patches: Sequence[str | os.PathLike[str]] = (),
) -> LoadedModel:
    """The model and the tokenizer of a run.

    Only these are read, not the optimizer's state. Under an ambient mesh with a `memory` axis the tables come split by
    columns and all else on every device; otherwise everything lies on the first device.

    Args:
        path: the run's folder, or the `checkpoints` in it.
        step: the number of a checkpoint, the newest that can be read, or that with the lowest validation loss.
        dtype: of activations, parameters and tables. None keeps parameters and tables as they were saved, or widens
            tables to what this machine computes in.
        patches: files of `memjax.patch` and `memjax.learn` whose rows replace the model's, after those that are applied
            to the run already; nothing is written.

    Raises:
        CheckpointError: there is no such checkpoint, it cannot be read here, or a patch is not for it.
    """
    saved = load_as_saved(path, step=step, patches=patches)
    config = _with_dtypes(saved.config.model, all_of=dtype, tables=_wider(saved))
    if config == saved.model.config:
        return saved
    _, params, tables = take_apart(saved.model)
    parts = DecoderParts.of(config)
    params = _cast(params_to_tree(params), params_to_tree(parts.abstract_params))
    model = parts.assemble(tree_to_params(parts, params), _cast(tables, parts.abstract_tables))
    return dataclasses.replace(saved, model=model)


def load_as_saved(
    path: str | os.PathLike[str],
    *,
    step: int | Literal["latest", "best"] = "latest",
    patches: Sequence[str | os.PathLike[str]] = (),
) -> LoadedModel:
    """`load` with parameters and tables in the types in which they lie on disk.

    Raises:
        CheckpointError: there is no such checkpoint, it cannot be read here, or a patch is not for it.
    """
    folder = checkpoint_folder(path)
    with Checkpoints(folder) as checkpoints:
        wanted = _step(checkpoints, step)
        # Of all the steps of a run the config is the same; which of them is whole, only reading the arrays tells.
        saved = checkpoints.read_document(META, wanted)
        config, table_dtypes = _read_meta(saved, folder)
        whole, columns = _shardings(config.model, folder)
        parts = DecoderParts.of(_with_dtypes(config.model, tables=table_dtypes))
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
            params_to_tree(parts.abstract_params),
        )
        tables = {
            pool: jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=columns)
            for pool, table in parts.abstract_tables.items()
        }
        targets = {PARAMS: params, TABLES: tables} if tables else {PARAMS: params}
        restored = checkpoints.restore(targets, [META], step=wanted)
    arrays = patched(restored.arrays.get(TABLES, {}), folder, restored.step, patches)
    model = parts.assemble(tree_to_params(parts, restored.arrays[PARAMS]), arrays)
    tokenizer = Tokenizer.from_state(restored.documents[META]["tokenizer"])
    return LoadedModel(model, tokenizer, config, restored.step)


def read_config(path: str | os.PathLike[str]) -> RunConfig:
    """The config of a run, from its newest checkpoint that can be read.

    Raises:
        CheckpointError: there is no such checkpoint, or this version cannot read it.
    """
    folder = checkpoint_folder(path)
    return _read_meta(Checkpoints(folder).read_document(META), folder)[0]


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a run, from its newest checkpoint that can be read.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    return Tokenizer.from_state(Checkpoints(checkpoint_folder(path)).read_document(META)["tokenizer"])


def checkpoint_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of steps in a run's folder, or the path itself where it is that folder.

    Raises:
        CheckpointError: the path is neither.
    """
    try:
        folder = local_path(os.fspath(path), "path")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    for candidate in (folder / CHECKPOINTS, folder):
        if Checkpoints(candidate).steps():
            return candidate
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; name the folder of a run (run.dir)")
    raise CheckpointError(f"{folder}: there is no checkpoint in it; name the folder of a run that has saved one")


def _step(checkpoints: Checkpoints, step: int | str) -> int | None:
    """The step's number; None for the newest that can be read."""
    if step == "latest":
        return None
    if step != "best":
        return int(step)
    best = checkpoints.best()
    if best is None:
        raise CheckpointError(f"{checkpoints.folder}: no step was saved with a validation loss; load the latest")
    return best


def _read_meta(meta: dict[str, Any], folder: pathlib.Path) -> tuple[RunConfig, TableDtypes]:
    """The run's config, and the types that its tables are stored in."""
    meta = upgraded(meta)
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: the checkpoint has format {meta.get('format')}, this version of memjax reads {FORMAT}; "
            "use the version that wrote it"
        )
    try:
        # JSON is what pydantic reads strictly and yet turns lists into tuples from.
        config = pydantic.TypeAdapter(RunConfig).validate_json(json.dumps(meta["config"]), strict=True)
    except pydantic.ValidationError as error:
        reason = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise CheckpointError(f"{folder}: the checkpoint's config is not one of this version: {reason}") from error
    dtypes: TableDtypes = {
        kind: meta["table_dtypes"].get(kind, section.table_dtype)
        for kind, section in config.model.lookup_sections.items()
    }
    if "float64" in (config.model.param_dtype, *dtypes.values()) and not jax.config.read("jax_enable_x64"):
        raise CheckpointError(f"{folder}: the checkpoint is in float64; set JAX_ENABLE_X64=1 to load it")
    return config, dtypes


def _wider(saved: LoadedModel) -> TableDtypes:
    """The types that tables get here: never narrower than saved, because that would lose what they learned."""
    wanted, found = saved.config.model.lookup_sections, saved.model.config.lookup_sections
    return {
        kind: jnp.promote_types(found[kind].table_dtype, resolve_dtype(section.table_dtype)).name
        for kind, section in wanted.items()
    }


def _with_dtypes(config: ModelConfig, *, tables: TableDtypes, all_of: DTypeLike | None = None) -> ModelConfig:
    """The config with the types of its tables, or of everything, named."""
    changes: dict[str, Any] = {}
    if all_of is not None:
        name = jnp.dtype(all_of).name
        tables, changes = dict.fromkeys(tables, name), {"dtype": name, "param_dtype": name}
    for kind, section in config.lookup_sections.items():
        changes[kind] = dataclasses.replace(section, table_dtype=tables[kind])
    return dataclasses.replace(config, **changes)


def _shardings(config: ModelConfig, folder: pathlib.Path) -> tuple[Sharding | None, Sharding | None]:
    """Of dense parameters and of tables; None is the first device."""
    if not has_memory_axis():
        return None, None
    mesh = jax.sharding.get_mesh()
    devices = mesh.shape[MEMORY]
    for width in {table.width for table in config.tables.values() if table.width % devices}:
        raise CheckpointError(
            f"{folder}: rows of {width} columns cannot be split evenly over {devices} devices; "
            "use a number that divides the columns"
        )
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, COLUMNS)


def _cast(arrays: Any, like: Any) -> Any:
    return jax.tree.map(lambda array, target: array.astype(target.dtype), arrays, like)
