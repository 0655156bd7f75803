"""Load the model of a run, on any number of devices."""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any, Literal, cast, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike

from memjax.config import checks
from memjax.config.dtype import DType
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.errors import CheckpointError, ConfigError
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts, split_decoder
from memjax.ops.precision import resolve_dtype
from memjax.ops.row_formats import formats
from memjax.ops.row_formats.formats import Plain, RowFormat
from memjax.ops.table import Place
from memjax.runs.layout import TABLE_FILES, TABLES, params_to_tree, run_folder, tree_to_params
from memjax.runs.patches.applied import Applied, patched
from memjax.runs.patches.patch import read_patch
from memjax.runs.saved import (
    OpenStep,
    Saved,
    TableDtypes,
    cast_like,
    formats_in_files,
    open_step,
    read_saved,
    shardings,
    with_dtypes,
)
from memjax.runs.table_files import read_files, stored_format
from memjax.runs.tables import LOAD_OPTIONS, LoadOption, TableForm, build, encoded


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class LoadedModel:
    """The result of `load`; it unpacks as `model, tokenizer = memjax.load(path)`."""

    model: Decoder
    tokenizer: Tokenizer
    config: RunConfig
    """The config with which the run was trained."""
    step: int
    """The step that was loaded."""
    checkpoints: pathlib.Path
    """The folder of the step; for a run at an address, that of the local copy."""
    patches: tuple[str, ...] = ()
    """Identities of the patches in its tables: those applied to the run, then those passed to `load`."""

    @property
    def folder(self) -> pathlib.Path:
        """The run's folder."""
        return run_folder(self.checkpoints)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    def __repr__(self) -> str:
        """One line, where NNX would print every array."""
        model = self.config.model
        tables = "".join(f", {table.num_slots:,} slots x {table.width}" for table in model.tables.values())
        blocks = f"{model.num_layers} block{'s' * (model.num_layers != 1)}"
        return f"LoadedModel({self.config.run.dir}, step {self.step}: {blocks} x {model.dim}{tables})"


def load(
    path: str | os.PathLike[str],
    *,
    step: int | Literal["latest", "best"] = "latest",
    ema: bool = False,
    dtype: DTypeLike | None = None,
    patches: Sequence[str | os.PathLike[str]] = (),
    table_format: str | RowFormat | None = None,
    table_place: Place = "device",
) -> LoadedModel:
    """Loads the model and tokenizer of a run, without the optimizer's state.

    Under an ambient mesh with a `memory` axis, tables are sharded by columns and everything else is replicated;
    otherwise all arrays are on the first device.

    Tables in another format or place are read-only. They are read block by block straight into place: there is never a
    second copy, and a table in host memory uses no device memory.

    Args:
        path: the run's folder or its `checkpoints` subfolder; or an address, such as hf://OWNER/NAME, from which the
            necessary files are copied to the user's cache folder.
        step: the number of a checkpoint, or the newest that can be read, or that with the lowest validation loss.
        ema: use the moving average of the dense parameters (optim.ema_decay), with the current tables.
        dtype: of activations, parameters and tables. None keeps parameters and tables as saved, but widens tables to
            the type in which this machine computes.
        patches: patch files (`memjax.patch`, `memjax.learn`) whose rows replace the model's, after patches already
            applied to the run; nothing is written. Only for tables in their saved format, on the device.
        table_format: how rows are stored: float32, bfloat16, float16, int8, float8_e4m3, int4, or a format added with
            `register` of `memjax.ops.row_formats.formats`. None keeps the saved one.
        table_place: device, or host for tables larger than the GPU: rows stay in host memory, where the kernels read
            them. On a CPU, files of `convert quantize` are memory-mapped.

    Raises:
        CheckpointError: there is no such checkpoint, it cannot be read here, or a patch does not fit it.
        ConfigError: step or table_format is unknown, there is too little memory for the tables, or patches are given
            with table_format or table_place.
    """
    tables = {"table_format": table_format, "table_place": table_place}
    return load_advising(LOAD_OPTIONS, path, step=step, ema=ema, dtype=dtype, patches=patches, **tables)


def load_advising(
    advise: Collection[LoadOption],
    path: str | os.PathLike[str],
    *,
    step: int | Literal["latest", "best"],
    ema: bool = False,
    dtype: DTypeLike | None = None,
    patches: Sequence[str | os.PathLike[str]] = (),
    table_format: str | RowFormat | None = None,
    table_place: str = "device",
) -> LoadedModel:
    """`load` for callers with other options; `advise` names those to recommend in the error if memory is short."""
    patches = checks.several(patches)
    tables = TableSettings.of(table_format, table_place)
    if patches and not tables.is_default:
        raise ConfigError(
            f"patch={', '.join(map(str, patches))} and {tables} do not go together: patches are for tables as they "
            "were saved; load without them, or write a run with the patches in its tables (python -m memjax.patch "
            "apply RUN PATCH --out NEW) and use that"
        )
    with open_step(path, step) as opened:
        if patches or (tables.is_default and "table_files" not in opened.meta):
            return _cast_for_backend(_as_saved(opened, ema, patches, advise), dtype)
        return _with_tables_as(opened, read_saved(opened, ema=ema), dtype, tables)


def load_as_saved(
    path: str | os.PathLike[str],
    *,
    step: int | Literal["latest", "best"] = "latest",
    ema: bool = False,
    patches: Sequence[str | os.PathLike[str]] = (),
) -> LoadedModel:
    """`load` with parameters and tables in their stored dtypes.

    Raises:
        CheckpointError: there is no such checkpoint, it cannot be read here, or a patch does not fit it.
    """
    with open_step(path, step) as opened:
        return _as_saved(opened, ema, patches, advise=())


@dataclasses.dataclass(frozen=True, slots=True)
class TableSettings:
    """Storage format and place of tables."""

    format: RowFormat | None
    place: Place

    @classmethod
    def of(cls, table_format: str | RowFormat | None, place: str) -> "TableSettings":
        """Parses the settings; ConfigError if one is unknown."""
        problems = []
        if isinstance(table_format, str):
            try:
                table_format = formats.find(table_format)
            except ValueError as error:
                problems.append(str(error))
        if place not in get_args(Place):
            problems.append(f"table_place={place} must be one of {', '.join(get_args(Place))}")
        if problems:
            raise ConfigError(problems)
        return cls(cast(RowFormat | None, table_format), cast(Place, place))

    def __str__(self) -> str:
        """The settings that are not the default."""
        table_format = [f"table_format={self.format.name}"] if self.format is not None else []
        return " and ".join(table_format + [f"table_place={self.place}"] * (self.place != "device"))

    @property
    def is_default(self) -> bool:
        """Whether tables are plain arrays on the device, as they were saved."""
        return self.format is None and self.place == "device"


def refuse_applied(folder: pathlib.Path, step: int, change: str) -> None:
    """Raises CheckpointError for a checkpoint with applied patches, which reading its tables by blocks would leave out.

    `change` names what requires reading by blocks.
    """
    if names := Applied(folder).names(step):
        raise CheckpointError(
            f"{folder}: patch {', '.join(names)} is applied to step {step}, which does not go together with {change}: "
            "patches are for tables as they were saved; do without that, or write a run with "
            "the rows in its tables (python -m memjax.patch revert RUN PATCH, then apply RUN PATCH --out NEW) and use "
            "that"
        )


def _as_saved(
    opened: OpenStep, ema: bool, patches: Sequence[str | os.PathLike[str]], advise: Collection[LoadOption]
) -> LoadedModel:
    """The model with plain tables on the device, in the stored dtypes."""
    folder = opened.folder
    if names := formats_in_files(opened.meta):
        raise CheckpointError(
            f"{folder}: the tables of this run are read-only, in {names}; use the run that it was made from"
        )
    step = opened.checkpoints.latest() if opened.number is None else opened.number
    if patches or (step is not None and Applied(folder).names(step)):
        # These options cannot be combined with patches.
        advise = [option for option in advise if option not in ("table_format", "table_place")]
    saved = read_saved(opened, ema=ema, with_tables=True, advise=advise)
    tables = patched(saved.tables, folder, saved.step, patches)
    identities = [*Applied(folder).names(saved.step), *(read_patch(patch).identity for patch in patches)]
    model = saved.parts.merge(tree_to_params(saved.parts, saved.params), tables)
    return LoadedModel(model, saved.tokenizer, saved.config, saved.step, folder, tuple(identities))


def _cast_for_backend(saved: LoadedModel, dtype: DTypeLike | None) -> LoadedModel:
    """The model cast to the types of this machine's backend, or to `dtype`."""
    config = with_dtypes(saved.config.model, all_of=dtype, tables=_wider(saved.config.model, saved.model.config))
    if config == saved.model.config:
        return saved
    _, params, tables = split_decoder(saved.model)
    parts = DecoderParts.of(config)
    params = cast_like(params_to_tree(params), params_to_tree(parts.abstract_params))
    model = parts.merge(tree_to_params(parts, params), cast_like(tables, parts.abstract_tables))
    return dataclasses.replace(saved, model=model)


def _with_tables_as(opened: OpenStep, saved: Saved, dtype: DTypeLike | None, settings: TableSettings) -> LoadedModel:
    """The model with its tables in the format and place of the settings."""
    folder = opened.folder
    refuse_applied(folder, saved.step, str(settings) or "tables in files")
    wider = _wider(saved.config.model, saved.parts.config)
    if isinstance(settings.format, Plain) and settings.format.name in get_args(DType):
        wider = dict.fromkeys(wider, settings.format.name)
    parts = DecoderParts.of(with_dtypes(saved.config.model, all_of=dtype, tables=wider))
    stored_tables = saved.parts.abstract_tables
    files, (_, columns) = saved.meta.get("table_files") or {}, shardings(saved.config.model, folder)
    tables = {}
    for name, abstract in parts.abstract_tables.items():
        try:
            row_format = _format_of(files.get(name), settings, stored_tables[name].dtype, folder)
            form = TableForm.of(name, abstract, row_format, settings.place)
            if name in files:
                tables[name] = read_files(run_folder(folder) / TABLE_FILES, form, files[name], columns)
                continue
            rows = partial(opened.checkpoints.read_rows, TABLES, name, step=saved.step)
            blocks = lambda rows=rows, form=form: encoded(rows(), form.format)
            tables[name] = build(form, blocks, columns)
        except ValueError as error:
            raise ConfigError(f"table {name} of {folder}: {error}") from error
    params = cast_like(saved.params, params_to_tree(parts.abstract_params))
    model = parts.merge(tree_to_params(parts, params), tables)
    return LoadedModel(model, saved.tokenizer, saved.config, saved.step, folder)


def _format_of(record: Any, settings: TableSettings, saved: DTypeLike, folder: pathlib.Path) -> RowFormat:
    """The format in which a table is loaded."""
    if record is None:
        return settings.format or Plain(jnp.dtype(saved).name)
    found = stored_format(record)
    if settings.format is not None and settings.format.name != found.name:
        raise ConfigError(
            f"table_format={settings.format.name}: the tables of {run_folder(folder)} are stored in {found.name}, "
            "which cannot be converted again; leave table_format out, or convert the run that it was made from"
        )
    return found


def _wider(wanted: ModelConfig, found: ModelConfig) -> TableDtypes:
    """The types of tables on this machine: never narrower than saved, which would lose what they learned."""
    return {
        kind: jnp.promote_types(found.lookup_sections[kind].table_dtype, resolve_dtype(section.table_dtype)).name
        for kind, section in wanted.lookup_sections.items()
    }
