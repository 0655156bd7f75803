"""What a dry run reports about the files that the run would read."""

import json

import datasets
import pytest

from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.errors import ConfigError, DataError
from memjax.io import remote
from memjax.monitoring.units import aligned
from memjax.training.plan.inputs import describe


def told(*settings: str) -> list[str]:
    return [aligned([row]) for row in describe(load(RunConfig, None, settings))]


def test_data_is_counted_once_its_first_record_was_read(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "seven"}) + "\n")
    held_out = tmp_path / "held.txt"
    held_out.write_text("one line\n")
    lines = told("--data.source=files", f"--data.path={tmp_path}/*.jsonl", f"--data.validation_path={held_out}")
    assert [line.split()[:2] for line in lines] == [["data,", "training"], ["data,", "validation"]]
    assert lines[0].endswith("2 files, 0.00 MB")
    assert lines[1].endswith("held.txt: 1 file, 0.00 MB")
    assert told("--data.source=jsonl") == [
        "data                        data.path is null: source=jsonl needs a file; set --data.path FILE"
    ]
    assert told() == []


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "no such file"), ("", "holds no"), ("[1]\n", r"a\.jsonl:1: "), ("\n\n", "holds no")]
)
def test_data_that_cannot_be_used_is_refused(tmp_path, content, problem):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=problem):
        told("--data.source=jsonl", f"--data.path={path}")


@pytest.mark.parametrize("source", ["text", "huggingface"])
def test_what_a_run_would_fetch_is_named_and_not_fetched(monkeypatch, source):
    monkeypatch.setattr(remote, "fetch", lambda address, *_, **__: pytest.fail(f"{address} was fetched"))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *_, **__: pytest.fail(f"{path} was fetched"))
    path = "nobody/texts" if source == "huggingface" else "memory://bucket/*.txt"
    held_out, begun = "memory://bucket/held_out.txt", "memory://bucket/run"
    lines = told(
        f"--data.source={source}",
        f"--data.path={path}",
        f"--data.validation_path={held_out}",
        f"--train.init_from={begun}",
    )
    assert lines == [
        f"data, training              {path}: not read; the run copies it to this machine",
        f"data, validation            {held_out}: not read; the run copies it to this machine",
        f"tokenizer                   of {begun}: not read; the run copies it to this machine",
    ]


def test_a_tokenizer_from_a_file_is_opened_and_compared_with_the_model(tmp_path):
    ranks = tmp_path / "ranks.tiktoken"
    ranks.write_text("".join(f"{encoded(byte)} {byte}\n" for byte in range(256)))
    settings = ("--data.tokenizer.kind=tiktoken", f"--data.tokenizer.path={ranks}")
    assert told(*settings) == ["tokenizer                   257 tokens; the model has 2,048"]
    with pytest.raises(ConfigError, match=r"model.vocab_size=256 is less than the 257 tokens"):
        told(*settings, "--model.vocab_size=256")
    with pytest.raises(DataError, match="cannot be read"):
        told(settings[0], "--data.tokenizer.path=nowhere.tiktoken")


def encoded(byte: int) -> str:
    import base64

    return base64.b64encode(bytes([byte])).decode()
