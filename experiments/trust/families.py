"""The families of files of settings, tokenizers, models and runs, and the list of all families."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import runpy
import shutil
from collections.abc import Callable
from typing import Any

from fuzz import Family
from lab import CONFIG, ROOT
from records import RECORDS, TEXTS

FIXTURES = ROOT / "tests/fixtures"


def settings(folder: pathlib.Path) -> Family:
    """A short and a complete file of settings."""
    from memjax.config.load import load, to_yaml
    from memjax.config.run import RunConfig

    (folder / "short.yaml").write_text(CONFIG, encoding="utf-8")
    path = folder / "config.yaml"
    path.write_text(to_yaml(load(RunConfig, folder / "short.yaml")), encoding="utf-8")
    return Family(
        [folder / "short.yaml", path], lambda: [load(RunConfig, file) for file in (path, folder / "short.yaml")]
    )


def tokenizers(folder: pathlib.Path) -> Family:
    """A Hugging Face tokenizer with its companion files, SentencePiece, tiktoken, and each as stored in a run."""
    from memjax.config.data import TokenizerConfig
    from memjax.data.tokenizers.base import Tokenizer
    from memjax.data.tokenizers.bpe import train_bpe
    from memjax.data.tokenizers.open import open_tokenizer
    from memjax.errors import CheckpointError, ConfigError, DataError
    from memjax.interop.huggingface.tokenizer import read_tokenizer

    made = runpy.run_path(str(ROOT / "tests/data/conftest.py"))
    hf = folder / "hf"
    hf.mkdir()
    beside = {
        "tokenizer.json": made["hf_json"](),
        "tokenizer_config.json": {
            "add_bos_token": True,
            "bos_token": "<|begin_of_text|>",
            "eos_token": {"content": "<|end_of_text|>"},
        },
        "generation_config.json": {"bos_token_id": 290, "eos_token_id": [291, 292]},
    }
    for name, content in beside.items():
        (hf / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "sentencepiece.model").write_bytes(made["sentencepiece_model"]())
    (folder / "ranks.tiktoken").write_bytes(made["tiktoken_ranks"]())
    opening = [
        TokenizerConfig(kind="hf", path=str(hf / "tokenizer.json")),
        TokenizerConfig(kind="sentencepiece", path=str(folder / "sentencepiece.model")),
        TokenizerConfig(kind="tiktoken", path=str(folder / "ranks.tiktoken")),
    ]
    saved = []
    for number, tokenizer in enumerate([train_bpe(TEXTS, 300), *map(open_tokenizer, opening)]):
        tokenizer.save(folder / f"run{number}")
        saved.append(folder / f"run{number}")

    def read() -> Any:
        # Each separately, so that a refused one does not prevent reading the others.
        refused = []
        for reading in (
            lambda: read_tokenizer(hf, None, {"vocab_size": 1000}),
            *(functools.partial(open_tokenizer, config) for config in opening),
            *(functools.partial(Tokenizer.load, run) for run in saved),
        ):
            try:
                found = reading()
                tokenizer = found[1] if isinstance(found, tuple) else found
                tokenizer.decode(tokenizer.prompt(tokenizer.encode("word é end")))
            except (ConfigError, DataError, CheckpointError) as error:
                refused.append(error)
        if refused:
            raise refused[0]

    files = [*(hf / name for name in beside), folder / "sentencepiece.model", folder / "ranks.tiktoken"]
    return Family([*files, *(run / "tokenizer.json" for run in saved)], read)


def huggingface(folder: pathlib.Path) -> Family:
    """Hugging Face models: config.json, safetensors and their index."""
    from memjax.interop.folders import file_in, read_json
    from memjax.interop.huggingface.config import longest_text, read_model_config
    from memjax.interop.huggingface.safetensors import INDEX, open_tensors
    from memjax.interop.huggingface.tensors import read_model

    places = []
    for name in ("llama3", "qwen3", "olmo2", "mistral"):
        place = folder / name
        shutil.copytree(FIXTURES / "llama" / name, place)
        places.append(place)
    (places[0] / "model.safetensors").rename(places[0] / "model-00001-of-00001.safetensors")
    with (places[0] / "model-00001-of-00001.safetensors").open("rb") as file:
        names = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    index = {"weight_map": {name: "model-00001-of-00001.safetensors" for name in names if name != "__metadata__"}}
    (places[0] / INDEX).write_text(json.dumps(index), encoding="utf-8")

    def read_one(place: pathlib.Path) -> Any:
        with open_tensors(place) as files:
            fields = read_json(file_in(place, "config.json"))
            described = read_model_config(fields, str(place))
            longest_text(fields, str(place))
            return read_model(files, described, str(place))

    configs = [place / "config.json" for place in places]
    weights = [path for place in places for path in sorted(place.glob("*.safetensors"))]
    return Family([*configs, *weights, places[0] / INDEX], _of_changed(places, read_one))


def official(folder: pathlib.Path) -> Family:
    """Torch archives, whose storages have checksums, and params.json of the official code."""
    import numpy as np

    from memjax.interop.folders import read_json
    from memjax.interop.official.convert import load_decoder, open_arrays

    for name in ("consolidated.pth", "params.json"):
        shutil.copy(FIXTURES / "official" / name, folder / name)

    def read() -> Any:
        settings = read_json(folder / "params.json")
        with open_arrays(folder) as arrays:
            load_decoder(arrays, settings, place=str(folder))
            return {name: np.asarray(array).tobytes() for name, array in arrays.items()}

    same = lambda found, right, how: "" if found == right or ": " in how else "other numbers"
    return Family([folder / "consolidated.pth", folder / "params.json"], read, same)


def _of_changed(places: list[pathlib.Path], read_one: Callable[[pathlib.Path], Any]) -> Callable[[], None]:
    """A function that reads the folders that have changed since they were last read without an error."""
    before: dict[pathlib.Path, Any] = {}

    def state(place: pathlib.Path) -> Any:
        return [(path.name, path.lstat().st_mtime_ns, path.lstat().st_size) for path in sorted(place.iterdir())]

    def read() -> None:
        for place in places:
            if before.get(place) != (now := state(place)):
                read_one(place)
                before[place] = now

    return read


def make_run(folder: pathlib.Path) -> None:
    """Writes the folder of a run with an untrained model, like conversions do, and the files that training adds."""
    import jax
    import numpy as np

    from memjax.config.load import load
    from memjax.config.run import RunConfig
    from memjax.data.tokenizers.base import ByteTokenizer
    from memjax.models.parts import DecoderParts
    from memjax.runs.write import write_run

    place = folder.with_name(f"{folder.name}.yaml")
    place.write_text(CONFIG, encoding="utf-8")
    config = load(RunConfig, place)
    place.unlink()
    assert config.model.memory is not None
    memory = dataclasses.replace(config.model.memory, table_dtype="float32")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32", memory=memory))
    parts, rng = DecoderParts.of(config.model), np.random.default_rng(0)
    # Drawn with NumPy: compiling the initialisation would take longer than most attempts.
    draw = lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype)
    params, tables = (jax.tree.map(draw, tree) for tree in (parts.abstract_params, parts.abstract_tables))
    write_run(folder, parts.merge(params, tables), ByteTokenizer(), config)
    rows = [{"step": step, "train/loss": 5.0 / step, "val/loss": None, "train/tokens": 64} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    summary = {"steps": 8, "metrics": {"train/loss": 0.6}, "facts": {"asked": {"accuracy": 0.5}}}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def _sealed(run: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path, Callable[[pathlib.Path], None]]:
    """The meta document and index of a step, and a function that updates their digests after a change."""
    from memjax.checkpoint.digests import text_digest
    from memjax.checkpoint.index import seal

    meta, index = (run / f"checkpoints/0/{item}/metadata" for item in ("meta", "digests"))

    def sealed(path: pathlib.Path) -> None:
        if path not in (meta, index):
            return
        stored = json.loads(index.read_text(encoding="utf-8"))
        if path == meta:
            stored["index"]["documents"]["meta"] = text_digest(json.loads(meta.read_text(encoding="utf-8")))
        index.write_text(json.dumps(seal(stored["index"])), encoding="utf-8")

    return meta, index, sealed


def documents(folder: pathlib.Path) -> Family:
    """The documents of a checkpoint with updated digests, as from an attacker who knows the format."""
    import memjax

    run = folder / "run"
    make_run(run)
    meta, index, sealed = _sealed(run)

    def read() -> Any:
        found = memjax.load(run)
        return found.tokenizer.encode("x"), found.model.config

    return Family([meta, index], read, seal=sealed)


def runs(folder: pathlib.Path) -> Family:
    """The other files of a run's folder, as read by starts and comparisons."""
    from memjax.config.load import load
    from memjax.config.run import RunConfig
    from memjax.errors import ConfigError
    from memjax.monitoring.compared_runs import read_runs
    from memjax.runs.folder import RunFolder

    run = folder / "run"
    make_run(run)
    config = load(RunConfig, run / "config.yaml", ["--run.dir", str(run)])

    def read() -> None:
        place = RunFolder.of(config)
        with place.owned():
            with contextlib.suppress(ConfigError):
                place.claim(config)
            place.saved_tokenizer()
        for metric in ("train/loss", "facts/asked/accuracy", "val/loss"):
            for found in read_runs([run]):
                found.final(metric)

    names = ("config.yaml", "metrics.jsonl", "summary.json", "tokenizer.json", "metrics.jsonl")
    return Family([run / name for name in names], read)


def table_files(folder: pathlib.Path) -> Family:
    """Table files in a quantised format, and the document that describes them, with updated digests."""
    import memjax
    from memjax.ops.row_formats.formats import find
    from memjax.runs.quantize import quantize_run

    make_run(folder / "made")
    run = folder / "run"
    quantize_run(folder / "made", run, find("int8"))
    meta, _, sealed = _sealed(run)
    files = sorted(path for path in (run / "tables").rglob("*") if path.is_file())
    return Family([meta, *files], lambda: memjax.load(run), seal=sealed)


def patch_files(folder: pathlib.Path) -> Family:
    """Forged patches, and the list of applied ones."""
    import numpy as np

    import memjax
    from memjax.models.parts import split_decoder
    from memjax.runs.patches.applied import Applied, model_digest
    from memjax.runs.patches.patch import Patch, RowChange, read_patch, write_patch

    run = folder / "run"
    make_run(run)
    ((name, table),) = split_decoder(memjax.load(run).model)[2].items()
    before = np.array(table)
    rows, old = np.array([1, 5, 60]), before[[1, 5, 60]]
    base = model_digest(run / "checkpoints", 0)
    patch = Patch(base, {name: RowChange(len(before), rows, old, old + 1)}, {"facts": [{"prompt": "a", "answer": "b"}]})
    file = write_patch(folder / "a.safetensors", patch)
    applied = Applied(run / "checkpoints")
    other = before[[2]]
    applied.add(0, dataclasses.replace(patch, tables={name: RowChange(len(before), rows[:1] + 1, other, other + 2)}))

    def read() -> Any:
        read_patch(file)
        return np.asarray(split_decoder(memjax.load(run, patches=[file]).model)[2][name])

    def same(found: Any, right: Any, how: str) -> str:
        changed = np.flatnonzero((found != before).any(axis=1))
        return "" if set(changed) <= {1, 2, 5, 60} and np.isfinite(found).all() else f"rows {changed[:9]} are others"

    return Family([file, run / "patches/applied.json", *(run / "patches").glob("*.safetensors")], read, same)


def facts(folder: pathlib.Path) -> Family:
    """Facts to learn, and sets of questions."""
    from memjax.evaluation.question_sets.formats import read_question_sets
    from memjax.knowledge.facts import read_facts

    texts = {
        "facts.jsonl": [{"prompt": "a b", "answer": "c", "paraphrases": ["d", "e"]}, {"text": "f"}] * 5,
        "nq.jsonl": [{"question": "who?", "answers": ["me", "you"]}] * 5,
        "mbpp.jsonl": [{"task_id": 11, "text": "f", "code": "def f(): pass", "test_list": ["assert f()"]}] * 5,
    }
    for name, rows in texts.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def read() -> None:
        read_facts(str(folder / "facts.jsonl"), "facts")
        read_question_sets([str(folder / "nq.jsonl"), str(folder / "mbpp.jsonl")], field="eval.sets")

    return Family([folder / name for name in texts], read)


FAMILIES = {
    make.__name__: make
    for make in (
        *RECORDS.values(),
        *(settings, tokenizers, huggingface, official, documents, runs, table_files, patch_files, facts),
    )
}
