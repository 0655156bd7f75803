"""Document frequencies of slots in a run's background texts, counted once and cached in its folder."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.numpy

from memjax.checkpoint.digests import text_digest
from memjax.data.sources.records import Record, text_of
from memjax.io.console import say, warn
from memjax.io.files import check_inside, read_document, write_atomic
from memjax.knowledge.slots import Background, count_texts, layers_by_table
from memjax.runs.load import LoadedModel
from memjax.runs.patches.applied import model_digest


def background_of(loaded: LoadedModel, records: Sequence[Record]) -> Background:
    """Document frequency of every slot in the records, cached in the run's folder if that is writable."""
    length, config = loaded.config.data.sequence_length, loaded.model.config
    asked = {
        "model": model_digest(loaded.checkpoints, loaded.step),
        "texts": text_digest(list(map(text_of, records))),
        "sequence_length": length,
    }
    path = loaded.folder / "knowledge" / f"background-{text_digest(asked)[:16]}.safetensors"
    shapes = {f"counts/{name}": (config.tables[name].num_slots,) for name in layers_by_table(config)}
    if (kept := _read(path, shapes)) is not None:
        return kept
    say(f"counting the slots that {len(records):,} texts read")
    counted = count_texts(loaded.model, loaded.tokenizer, records, length=length)
    arrays = {"texts": np.asarray(counted.texts)} | {f"counts/{name}": total for name, total in counted.counts.items()}
    try:
        check_inside(path.parent, loaded.folder)
        write_atomic(path, safetensors.numpy.save(arrays))
    except OSError as error:
        warn(f"the counts are not saved: {path.parent}: {error.strerror}")
    return counted


def _read(path: pathlib.Path, shapes: Mapping[str, tuple[int]]) -> Background | None:
    """The counts in a file; None if it is missing, damaged or of another model."""
    try:
        arrays = safetensors.numpy.load(read_document(path, None))
        texts = int(arrays.pop("texts"))
        if {name: array.shape for name, array in arrays.items()} != shapes:
            return None
        return Background(texts, {name.removeprefix("counts/"): array for name, array in arrays.items()})
    except Exception:  # a damaged file can raise anything
        return None
