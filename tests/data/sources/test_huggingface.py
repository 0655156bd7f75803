"""Data sets read by the package `datasets`, here from Parquet files in a folder."""

import sys

import pytest

from memjax.config.data import DataConfig
from memjax.data.sources.kinds import find_source
from memjax.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """A data set of two splits."""
    import pyarrow
    import pyarrow.parquet

    for split, texts in (("train", ["one", "two", "three"]), ("test", ["four"])):
        table = pyarrow.table({"text": texts, "number": [*range(len(texts))]})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    return tmp_path


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def config(path, **settings) -> DataConfig:
    return DataConfig(source="huggingface", path=str(path), **settings)


@pytest.mark.slow
def test_the_records_of_a_split_are_its_rows(folder, cache):
    for split, texts in (("train", ["one", "two", "three"]), ("test", ["four"])):
        (corpus,) = find_source(config(folder, split=split)).corpora
        records = [segment.text for record in corpus_records(corpus) for segment in record]
        assert records == texts
        (name, size), *none = corpus.names_and_sizes()
        assert name.endswith(".arrow")
        assert size == corpus.files[0].path.stat().st_size
        assert not none
        assert corpus.settings()["split"] == split
    with pytest.raises(DataError, match="cannot load it"):
        _ = find_source(config(folder, split="none")).corpora[0].files


def corpus_records(corpus):
    from memjax.data.sources.corpus import CorpusStream

    return CorpusStream(corpus).records()


def test_without_the_package_its_name_is_reported(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"source=huggingface needs the package datasets .*pip install datasets"):
        _ = find_source(config(folder)).corpora[0].files


def test_a_part_of_a_split_is_refused(folder):
    with pytest.raises(ValueError, match=r"split=train\[:10%\] must be the name of a split"):
        config(folder, split="train[:10%]")
