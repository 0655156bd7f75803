"""Read the checkpoints of a run: config, tokenizer, parameters and tables."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding
from jax.typing import DTypeLike
from pydantic import NonNegativeInt, PositiveInt

from memjax.checkpoint.checkpoints import Checkpoints
from memjax.config.checks import is_count
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import MALFORMED, Tokenizer, explained
from memjax.errors import CheckpointError, ConfigError
from memjax.io import remote
from memjax.io.documents import line_of, read_as
from memjax.io.paths import hub_download, is_remote, local_path, readable_path
from memjax.models.parts import DecoderParts
from memjax.ops.row_formats.formats import Plain
from memjax.runs.layout import (
    CHECKPOINTS,
    EMA,
    FORMAT,
    FORMAT_WITH_TABLE_FILES,
    META,
    PARAMS,
    TABLES,
    params_to_tree,
    upgraded,
    widened,
)
from memjax.runs.tables import LOAD_OPTIONS, LoadOption, TableForm, check_room
from memjax.sharding.axes import has_memory_axis
from memjax.sharding.rules import COLUMNS, MEMORY, REPLICATED

TableDtypes = Mapping[str, str]
"""Names of the types of tables, by config section."""


class OpenStep(NamedTuple):
    """A step of a run, open for reading."""

    checkpoints: Checkpoints
    folder: pathlib.Path
    """The folder of the steps."""
    number: int | None
    """None: the newest that can be read, which is known only once its arrays are read."""
    meta: dict[str, Any]
    """A validated `meta` document; its config and table types hold for all steps."""


@contextlib.contextmanager
def open_step(path: str | os.PathLike[str], step: int | str = "latest") -> Iterator[OpenStep]:
    """Opens a step of a run: its number, the newest that can be read, or that with the lowest validation loss.

    Raises:
        CheckpointError: there is no such step, or it cannot be read.
    """
    folder = _readable_folder(path, step)
    with Checkpoints(folder) as checkpoints:
        number = _number(checkpoints, step)
        yield OpenStep(checkpoints, folder, number, _checked_meta(checkpoints.read_document(META, number), folder))


class Saved(NamedTuple):
    """The content of a checkpoint."""

    config: RunConfig
    parts: DecoderParts
    """Structure of the model, with the dtypes in which the tables are stored."""
    params: dict[str, Any]
    tables: dict[str, Any]
    """Empty unless requested."""
    tokenizer: Tokenizer
    step: int
    meta: dict[str, Any]


def read_saved(
    opened: OpenStep, *, ema: bool = False, with_tables: bool = False, advise: Collection[LoadOption] = LOAD_OPTIONS
) -> Saved:
    """Reads the arrays and tokenizer of a step. `ema` replaces the dense parameters with their moving average, in
    the same types. If memory is short, the error recommends the settings in `advise`.

    Raises:
        CheckpointError: the step cannot be read here, or has no moving average.
        ConfigError: the device has too little memory for the tables.
    """
    folder = opened.folder
    config, stored = _config_of(opened.meta, folder)
    replicated, columns = shardings(config.model, folder)
    parts, item = DecoderParts.of(with_dtypes(config.model, tables=stored)), EMA if ema else PARAMS
    params = jax.eval_shape(widened, parts.abstract_params) if ema else parts.abstract_params
    targets = {item: _placed(params_to_tree(params), replicated)}
    if with_tables and parts.abstract_tables:
        targets[TABLES] = _placed(parts.abstract_tables, columns)
        forms = [TableForm.of(name, table, Plain(table.dtype.name)) for name, table in parts.abstract_tables.items()]
        try:
            check_room(forms, columns, advise)
        except ConfigError as error:
            raise ConfigError(f"tables of {folder}: {error}") from error
    restored = opened.checkpoints.restore(targets, [META], step=opened.number, optional=[EMA])
    if item not in restored.arrays:
        raise CheckpointError(
            f"{folder}: ema=True, and step {restored.step} has no moving average of its parameters: only "
            "checkpoints trained with optim.ema_decay have one, and no run that convert makes of them; leave ema out"
        )
    found = restored.arrays[item]
    if ema:
        found = cast_like(found, params_to_tree(parts.abstract_params))
    meta = _checked_meta(restored.documents[META], folder)
    return Saved(
        config, parts, found, restored.arrays.get(TABLES, {}), _tokenizer_of(meta, folder), restored.step, meta
    )


@dataclasses.dataclass
class _File:
    bytes: NonNegativeInt
    digest: str


@dataclasses.dataclass
class _TableFiles:
    format: str
    num_rows: NonNegativeInt
    width: PositiveInt
    files: dict[Literal["rows", "scales"], _File]
    group: PositiveInt | None = None


@dataclasses.dataclass
class _Meta:
    """The shape of a `meta` document."""

    config: dict[str, Any]
    tokenizer: dict[str, Any]
    table_dtypes: dict[str, Literal["float32", "bfloat16", "float16", "float64"] | None]
    table_files: dict[str, _TableFiles] | None = None
    quantized_from: str | None = None


def _placed(tree: Any, sharding: Sharding | None) -> Any:
    """The shapes of a tree, with one sharding for all its arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def read_config(path: str | os.PathLike[str]) -> RunConfig:
    """The config of a run, from its newest checkpoint that can be read.

    Raises:
        CheckpointError: there is no such checkpoint, or this version cannot read it.
    """
    with open_step(path) as opened:
        return _config_of(opened.meta, opened.folder)[0]


def formats_in_files(meta: Mapping[str, Any]) -> str:
    """Formats of the tables that a run keeps in files, which are read-only (`convert quantize`); empty without any."""
    return ", ".join(sorted({record["format"] for record in (meta.get("table_files") or {}).values()}))


def read_only_formats(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """`formats_in_files` of the newest checkpoint of a run, and the run that it was made from, if recorded.

    Raises:
        CheckpointError: there is no checkpoint that can be read.
    """
    with open_step(path) as opened:
        return formats_in_files(opened.meta), opened.meta.get("quantized_from")


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a run, from its newest checkpoint that can be read.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    with open_step(path) as opened:
        return _tokenizer_of(opened.meta, opened.folder)


def _tokenizer_of(meta: Mapping[str, Any], folder: pathlib.Path) -> Tokenizer:
    try:
        return Tokenizer.from_state(meta["tokenizer"])
    except MALFORMED as error:
        raise CheckpointError(f"{folder}: the checkpoint's tokenizer cannot be read: {explained(error)}") from error


def _readable_folder(path: str | os.PathLike[str], step: int | str) -> pathlib.Path:
    """The folder of a run's steps; for a run at an address, that of its local copy.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not is_remote(path):
        return checkpoint_folder(path)
    try:
        return checkpoint_folder(remote.fetch_run(readable_path(str(path), "path"), step))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # each file system raises its own
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def checkpoint_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of steps in a run's folder, or the path itself if it is that folder.

    Raises:
        CheckpointError: the path is neither.
    """
    folder = local_path(path, "path", CheckpointError)
    for candidate in (folder / CHECKPOINTS, folder):
        if Checkpoints(candidate).steps():
            return candidate
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{folder}: {problem}; name the folder of a run (run.dir){_of_hub(path)}")
    raise CheckpointError(f"{folder}: there is no checkpoint in it; name the folder of a run that has saved one")


def _of_hub(path: str | os.PathLike[str]) -> str:
    """A hint for paths that look like the name of a model on the Hugging Face Hub; otherwise empty."""
    if (download := hub_download(path)) is None:
        return ""
    name, folder = os.fspath(path), os.path.basename(path)
    return (
        f". Of a model on the Hugging Face Hub: a run of memjax is read from hf://{name}; for any other `{download}`, "
        f"`python -m memjax.convert from-hf {folder} --out runs/{folder}`, and name runs/{folder}"
    )


def _number(checkpoints: Checkpoints, step: int | str) -> int | None:
    if step == "latest":
        return None
    if step != "best":
        if not is_count(str(step)):
            raise ConfigError(f"step={step!r} must be latest, best or the number of a checkpoint")
        return int(step)
    best = checkpoints.best()
    if best is None:
        raise CheckpointError(f"{checkpoints.folder}: no step was saved with a validation loss; load the latest")
    return best


def _checked_meta(meta: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Validates a `meta` document and converts it to the current version.

    Raises:
        CheckpointError: the document, which may come from elsewhere, is malformed.
    """
    try:
        meta = upgraded(meta)
        read_as(_Meta, meta)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        reason = f"{type(error).__name__}: {line_of(error)}"
        raise CheckpointError(f"{folder}: the checkpoint's meta document is malformed ({reason})") from error
    return meta


def _config_of(meta: dict[str, Any], folder: pathlib.Path) -> tuple[RunConfig, TableDtypes]:
    """The config in a `meta` document, and the types in which the tables are stored."""
    if meta.get("format") not in (FORMAT, FORMAT_WITH_TABLE_FILES):
        raise CheckpointError(
            f"{folder}: the checkpoint has format {meta.get('format')!s:.40}, this version of memjax reads 1 to "
            f"{FORMAT_WITH_TABLE_FILES}; use the version that wrote it"
        )
    try:
        config = read_as(RunConfig, meta["config"])
    except ValueError as error:
        raise CheckpointError(f"{folder}: the checkpoint's config is not one of this version: {error}") from error
    dtypes: TableDtypes = {
        kind: meta["table_dtypes"].get(kind, section.table_dtype)
        for kind, section in config.model.lookup_sections.items()
    }
    if "float64" in (config.model.param_dtype, *dtypes.values()) and not jax.config.read("jax_enable_x64"):
        raise CheckpointError(f"{folder}: the checkpoint is in float64; set JAX_ENABLE_X64=1 to load it")
    return config, dtypes


def with_dtypes(config: ModelConfig, *, tables: TableDtypes, all_of: DTypeLike | None = None) -> ModelConfig:
    """The config with explicit types for its tables, or for everything."""
    changes: dict[str, Any] = {}
    if all_of is not None:
        name = jnp.dtype(all_of).name
        tables, changes = dict.fromkeys(tables, name), {"dtype": name, "param_dtype": name}
    for kind, section in config.lookup_sections.items():
        changes[kind] = dataclasses.replace(section, table_dtype=tables[kind])
    return dataclasses.replace(config, **changes)


def shardings(config: ModelConfig, folder: pathlib.Path) -> tuple[Sharding | None, Sharding | None]:
    """Shardings of dense parameters and of tables; None is the first device."""
    if not has_memory_axis():
        return None, None
    mesh = jax.sharding.get_mesh()
    devices = mesh.shape[MEMORY]
    for width in {table.width for table in config.tables.values() if table.width % devices}:
        raise CheckpointError(
            f"{folder}: rows of {width} columns cannot be split evenly over {devices} devices; "
            "use a number that divides the columns"
        )
    return NamedSharding(mesh, REPLICATED), NamedSharding(mesh, COLUMNS)


def cast_like(arrays: Any, like: Any) -> Any:
    """Casts arrays to the types of those in `like`."""
    return jax.tree.map(lambda array, target: array.astype(target.dtype), arrays, like)
