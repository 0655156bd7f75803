"""The commands that learn facts, inspect them and revert them."""

import dataclasses
import functools
import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import inspect, learn
from memjax.checkpoint import Checkpoints
from memjax.config.data import BiographiesConfig, DataConfig
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.models.parts import DecoderParts
from memjax.runs.files import owned
from memjax.runs.layout import meta_document, params_to_tree
from memjax.runs.patches.patch import read_patch, write_patch

FACTS = [{"prompt": "Q a", "answer": "x"}, {"prompt": "Q b", "answer": "y", "paraphrases": ["b is"]}]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A model with one randomly initialised memory layer."""
    folder = tmp_path_factory.mktemp("run")
    memory = MemoryConfig(layers=(0,), num_keys=8, num_heads=2, top_k=4, key_dim=8, gate="none")
    model = ModelConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=16, vocab_size=259, memory=memory)
    config = RunConfig(model=model, data=DataConfig(sequence_length=64, biographies=BiographiesConfig(num_people=2)))
    parts, rng = DecoderParts.of(model), np.random.default_rng(0)
    fill = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype))
    items = {"params": params_to_tree(fill(parts.abstract_params)), "tables": fill(parts.abstract_tables)}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(7, items, {"meta": meta_document(config, ByteTokenizer(), step=7)})
    return str(folder)


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    return str(path)


def test_a_slot_is_shown_by_the_texts_that_read_it(run, facts, capsys):
    assert inspect.main([run, "--slot", "L0:3", "--corpus", facts]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("L0:3 is read by ")
    assert "tokens in 2 texts" in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("command", "words", "code", "problem"),
    [
        (learn, ["RUN"], 2, "out"),
        (learn, ["RUN", "--out", "x"], 2, "takes a run and at least one file"),
        (learn, ["RUN", "none.jsonl", "--out", "x"], 3, "there is no such file"),
        (learn, ["RUN", "TABLE", "--out", "x"], 3, "FACTS must be JSON lines, not a table of values"),
        (learn, ["RUN", "FACTS", "CONTRARY", "--out", "x"], 3, "the prompt 'b is' has two answers, 'y' and 'z'"),
        (learn, ["RUN", "FACTS", "--out", "FACTS"], 2, "facts.jsonl is a file, where a folder is needed"),
        (learn, ["RUN", "FACTS", "--out", "x", "--rows", "0", "--lr", "-1"], 2, "rows=0 must be positive"),
        (learn, ["RUN", "FACTS", "--out", "x", "--held_out", "TEXTS"], 3, "held_out must hold questions"),
        (inspect, ["RUN"], 2, "give one of the two"),
        (inspect, ["RUN", "--slot", "4"], 2, "must name a layer and a row"),
        (inspect, ["RUN", "--slot", "L0:" + "9" * 5000], 2, "must name a layer and a row"),
        (inspect, ["RUN", "--slot", "L1:4"], 2, "layer L1 has no slots; those that have: L0"),
        (inspect, ["RUN", "--slot", "L0:64"], 2, "must be below L0:64"),
        (inspect, ["RUN", "--prompt", "x", "--token", "9"], 2, "token=9 must be in 0..1"),
        (inspect, ["RUN", "--prompt", "x", "--out", "page.txt"], 2, "must end in .html"),
        (inspect, ["RUN", "--prompt", "x", "--patch", "nowhere"], 4, "there is no such file"),
    ],
)
def test_wrong_command_lines_are_refused(run, facts, command, words, code, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "no question"}')
    (tmp_path / "contrary.jsonl").write_text('{"prompt": "b is", "answer": "z"}')
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(b"prompt,answer\nQ a,x\n"))
    names = {"RUN": run, "FACTS": facts, "TEXTS": str(tmp_path / "texts.jsonl")}
    names |= {"CONTRARY": str(tmp_path / "contrary.jsonl"), "TABLE": str(tmp_path / "table.csv.gz")}
    words = [names.get(word, word) for word in words]
    try:
        found = command.main(words)
    except SystemExit as end:
        found = end.code
    assert found == code
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(("facts", "epochs"), [(1, 384), (16, 384), (17, 192), (120, 48), (10_000, 16)])
def test_few_facts_are_repeated_until_they_fill_as_many_batches(facts, epochs):
    assert learn.fewest_epochs(facts, batch_size=16) == epochs


@pytest.mark.slow
def test_damaged_counts_are_counted_again(run, facts, tmp_path, capsys):
    settings = ["--rows", "8", "--epochs", "1", "--replay", "0", "--held_out_questions", "1"]
    assert learn.main([run, facts, "--out", str(tmp_path / "one"), *settings]) == 0
    (kept,) = pathlib.Path(run, "knowledge").iterdir()
    content = kept.read_bytes()
    kept.write_bytes(content[:40])
    capsys.readouterr()
    assert learn.main([run, facts, "--out", str(tmp_path / "two"), *settings]) == 0
    assert "counting the slots" in capsys.readouterr().out
    assert kept.read_bytes() == content


@pytest.mark.slow
def test_a_patch_stands_for_the_facts_that_it_was_made_of(run, facts, tmp_path, capsys):
    settings = ["--rows", "16", "--epochs", "3", "--replay", "0", "--held_out_questions", "1"]
    files, patches = ([str(tmp_path / f"{number}{kind}") for number in range(2)] for kind in (".jsonl", ""))
    for fact, file, patch in zip(FACTS, files, patches, strict=True):
        pathlib.Path(file).write_text(json.dumps(fact) + "\n")
        assert learn.main([run, file, "--out", patch, *settings]) == 0
    assert learn.main([run, files[0], "--out", patches[1], *settings]) == 2
    assert "holds a patch of other facts, which would be lost" in capsys.readouterr().err
    for words, out in (([facts], "of_file"), (patches, "of_patches"), ([patches[0], files[1]], "of_both")):
        assert learn.main([run, *words, "--out", str(tmp_path / out), *settings]) == 0
        assert "new facts (2)" in capsys.readouterr().out
    made = [read_patch(tmp_path / name) for name in ("of_file", "of_patches", "of_both")]
    assert len({patch.identity for patch in made}) == 1
    assert made[0].notes["learned"] == FACTS

    without = tmp_path / "without.safetensors"
    write_patch(without, dataclasses.replace(made[0], notes={}))
    assert learn.main([run, str(without), "--out", str(tmp_path / "none")]) == 3
    assert "records no facts to learn" in capsys.readouterr().err


def test_texts_are_learned_beside_questions_that_are_known(run, facts, tmp_path, monkeypatch, capsys):
    all_known = lambda model, tokenizer, questions, *, length: np.ones(len(questions), bool)
    monkeypatch.setattr("memjax.knowledge.learning.are_known", all_known)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Q d z"}')
    settings = ["--rows", "8", "--epochs", "3", "--replay", "0", "--held_out_questions", "1"]
    for words, said, has_rows in (
        ([facts], "every fact was known before", False),
        ([facts, str(text)], "after 3 of 3 epochs", True),
    ):
        out = tmp_path / f"of_{len(words)}"
        assert learn.main([run, *words, "--out", str(out), *settings]) == 0
        assert said in capsys.readouterr().out
        assert (read_patch(out).num_rows > 0) == has_rows


def test_two_processes_do_not_learn_into_one_patch(run, facts, tmp_path, capsys):
    with owned(tmp_path / "patch.safetensors"):
        assert learn.main([run, facts, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path}/patch.safetensors is being written by process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_patch_that_another_process_has_just_finished_is_not_lost(run, facts, tmp_path, monkeypatch, capsys):
    (tmp_path / "others.jsonl").write_text(json.dumps({"prompt": "Q c", "answer": "z"}))
    out = tmp_path / "patch"

    def later(path):
        monkeypatch.undo()
        assert learn.main([run, str(tmp_path / "others.jsonl"), "--out", str(out), "--epochs", "1"]) == 0
        return owned(path)

    monkeypatch.setattr("memjax.runs.files.owned", later)
    assert learn.main([run, facts, "--out", str(out)]) == 2
    assert "holds a patch of other facts, which would be lost" in capsys.readouterr().err
