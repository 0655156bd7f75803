"""Data sets as the package datasets finds them: by name on the Hugging Face Hub, or in a folder."""

import dataclasses
import functools
import pathlib
from typing import Any

from memjax.data.sources.corpus import Corpus
from memjax.data.sources.files import DataFile
from memjax.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetCorpus(Corpus):
    """A split of a data set: the Arrow files that the package keeps of it in its cache."""

    @functools.cached_property
    def files(self) -> list[DataFile]:
        """The Arrow files, made now if need be.

        Raises:
            DataError: the package is missing, or knows no such data set.
        """
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"{self.path}: source=huggingface needs the package datasets ({error}); pip install datasets"
            ) from error
        try:
            found: Any = datasets.load_dataset(self.path, self.config.subset, split=self.config.split)
        except Exception as error:  # it raises what its many parts raise
            raise DataError(
                f"{self.path}: the package datasets cannot load it ({error}); set {self.field}, or data.source=files "
                "for a folder of save_to_disk"
            ) from error
        return [DataFile(pathlib.Path(kept["filename"]), "arrow", as_text=False) for kept in found.cache_files]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "subset": self.config.subset, "split": self.config.split}
