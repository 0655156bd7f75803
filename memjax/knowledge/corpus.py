"""The corpus for slot statistics: a given file, or the training data of the run."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from memjax.data.dataset import open_dataset
from memjax.data.mixture import Split, SplitRecords
from memjax.data.sources.kinds import find_source
from memjax.data.sources.parsing import Keys
from memjax.data.sources.records import Record
from memjax.data.sources.stream import RecordFiles
from memjax.errors import DataError
from memjax.runs.load import LoadedModel


def open_corpus(loaded: LoadedModel, path: str | None, field: str) -> Iterable[Record]:
    """The records of a path or, without one, of the run's training data; each iteration reads them again.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    data = loaded.config.data
    if path is not None:
        return RecordFiles(path, field, Keys.of(data))
    source = find_source(data.in_run(str(loaded.folder)))
    if source.problem:  # a model converted from elsewhere
        raise DataError(f"the run has no text of its own; name a file with {field}")
    return TrainingRecords(open_dataset(source, loaded.tokenizer).train)


class TrainingRecords:
    """The training records of a run in a fixed random order, each in one of its wordings."""

    def __init__(self, splits: Sequence[Split]):
        self._records = SplitRecords(splits)

    def __iter__(self) -> Iterator[Record]:
        rng = np.random.default_rng(0)
        return (self._records.draw(number, rng) for number in rng.permutation(len(self._records)).tolist())
