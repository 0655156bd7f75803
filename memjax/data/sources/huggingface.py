"""Data sets that the package datasets loads: by name from the Hugging Face Hub, or from a folder."""

import dataclasses
import functools
import pathlib
from typing import Any

from memjax.data.sources.corpus import Corpus
from memjax.data.sources.files import DataFile
from memjax.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetCorpus(Corpus):
    """A split of a data set, read from the Arrow files in the package's cache."""

    @functools.cached_property
    def files(self) -> list[DataFile]:
        """The Arrow files, downloaded and converted first if necessary.

        Raises:
            DataError: the package is missing, or cannot load the data set.
        """
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"{self.path}: source=huggingface needs the package datasets ({error}); pip install datasets"
            ) from error
        try:
            found: Any = datasets.load_dataset(self.path, self.config.subset, split=self.config.split)
        except Exception as error:  # the package wraps no errors of its dependencies
            raise DataError(
                f"{self.path}: the package datasets cannot load it ({error}); set {self.field}, or data.source=files "
                "for local files and folders of save_to_disk"
            ) from error
        return [DataFile(pathlib.Path(kept["filename"]), "arrow", as_text=False) for kept in found.cache_files]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "subset": self.config.subset, "split": self.config.split}
