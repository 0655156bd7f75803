"""Write a run with quantized tables, in files that are memory-mapped or read straight into place."""

import os
from functools import partial
from typing import Literal

import jax.numpy as jnp

from memjax.checkpoint.checkpoints import Checkpoints
from memjax.config.run import RunConfig
from memjax.errors import CheckpointError, ConfigError
from memjax.io.paths import is_remote, local_path
from memjax.ops.row_formats.formats import Plain, RowFormat
from memjax.runs.files import check_new, written_whole
from memjax.runs.folder import Claim, RunFolder
from memjax.runs.layout import CHECKPOINTS, FORMAT_WITH_TABLE_FILES, META, PARAMS, TABLE_FILES, TABLES, meta_document
from memjax.runs.load import refuse_applied
from memjax.runs.saved import open_step, read_saved
from memjax.runs.table_files import write_files
from memjax.runs.tables import TableForm, encoded
from memjax.runs.write import config_of_copy


def quantize_run(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    row_format: RowFormat | None,
    *,
    step: int | Literal["latest", "best"] = "latest",
) -> RunConfig:
    """Writes a copy of a run with its tables in a format, block by block; returns its config.

    Without row_format, tables keep their saved type.

    Raises:
        ConfigError: `out` is not empty, the model has no tables, or the format cannot store them.
        CheckpointError: the run cannot be read, has patches applied to it, or `out` cannot be written.
    """
    check_new(out)
    with open_step(source, step) as opened:
        if "table_files" in opened.meta:
            raise CheckpointError(
                f"{opened.folder}: its tables are already in files; convert the run that it was made from"
            )
        saved = read_saved(opened)
        refuse_applied(opened.folder, saved.step, "quantize")
        parts = saved.parts
        if not parts.abstract_tables:
            raise ConfigError(f"{source}: the model has no tables, so there is nothing to quantize")
        with written_whole(out) as path:
            (path / TABLE_FILES).mkdir()
            records = {}
            for name, table in parts.abstract_tables.items():
                found = row_format or Plain(jnp.dtype(table.dtype).name)
                form = TableForm.of(name, table, found, "host")
                rows = partial(opened.checkpoints.read_rows, TABLES, name, step=saved.step)
                try:
                    records[name] = write_files(path / TABLE_FILES, form, encoded(rows(), found))
                except ValueError as error:
                    raise ConfigError(f"table {name} of {source}: {error}") from error
            new = config_of_copy(saved.config, out)
            document = meta_document(new, saved.tokenizer, step=0)
            document |= {"format": FORMAT_WITH_TABLE_FILES, "table_files": records}
            place = str(source) if is_remote(source) else str(local_path(source, "source").absolute())
            document |= {"quantized_from": place}
            # The original types of the tables, not what 'auto' means on this machine.
            document |= {"table_dtypes": saved.meta["table_dtypes"]}
            with Checkpoints(path / CHECKPOINTS) as written:
                written.save(0, {PARAMS: saved.params}, {META: document})
            Claim(RunFolder(path), new).record(0, saved.tokenizer)
    return new
