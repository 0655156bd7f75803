"""The four commands of docs/knowledge.md on a small model: facts are learned, applied, inspected and reverted."""

import json
import pathlib
import re
import sys

import numpy as np
import pytest

from memjax import evaluate, generate, inspect, learn, patch, train
from memjax.config.data import BiographiesConfig
from memjax.data.sources import biographies
from memjax.models.parts import split_decoder
from memjax.runs.load import load

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "experiments/trust"))

import merging

SETTINGS = """
--model.dim 64 --model.num_layers 2 --model.num_heads 2 --model.vocab_size 600 --model.memory.layers 1
--data.biographies.num_people 24 --data.batch_size 16 --train.steps 150 --eval.recall_people 4 --log.tensorboard false
"""
LEARN = "--background_texts 200 --replay 32 --held_out_questions 72 --epochs 40"


def facts_about(count: int) -> list[dict]:
    """Facts about new people, in all the wordings used in training."""
    known = {person.name for person in biographies.people(BiographiesConfig())}
    people = [person for person in biographies.people(BiographiesConfig(seed=77)) if person.name not in known]
    facts = []
    for person in people[:count]:
        for attribute in biographies.attribute_names:
            wordings = (*biographies.QUESTIONS[attribute], *biographies.STATEMENTS[attribute])
            prompt, *paraphrases = [wording.format(name=person.name) for wording in wordings]
            facts.append({"prompt": prompt, "answer": person.value(attribute), "paraphrases": paraphrases})
    return facts


def table_of(run: pathlib.Path) -> np.ndarray:
    (rows,) = split_decoder(load(run).model)[2].values()
    return np.asarray(rows)


def measured(printed: str) -> dict[str, tuple[float, float]]:
    """Parses the percentages before and after that `learn` prints."""
    rows = re.findall(r"^(.*) \(\d+\) +([\d.]+)% +([\d.]+)%$", printed, re.MULTILINE)
    return {name: (float(before), float(after)) for name, before, after in rows}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train.main([*SETTINGS.split(), "--run.dir", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_facts_are_learned_shown_and_reverted(run, tmp_path, capsys):
    people, patches = tmp_path / "people.jsonl", tmp_path / "people"
    facts = facts_about(2)
    people.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    original = table_of(run)
    files = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    asked = ["--prompt", facts[2]["prompt"], "--max_tokens", "12"]
    capsys.readouterr()

    assert learn.main([str(run), str(people), "--out", str(patches), *LEARN.split()]) == 0
    found = measured(capsys.readouterr().out)
    assert found["new facts"][0] == 0
    assert found["new facts"][1] >= 90
    assert found["old facts, asked in training"][0] - found["old facts, asked in training"][1] <= 5
    np.testing.assert_array_equal(table_of(run), original)

    assert patch.main(["apply", str(run), str(patches)]) == 0
    capsys.readouterr()
    assert generate.main([str(run), *asked]) == 0
    assert facts[2]["answer"] in capsys.readouterr().out
    assert inspect.main([str(run), "--prompt", facts[2]["prompt"], "--out", str(tmp_path / "page.html")]) == 0
    assert re.search(r"^ .* changed$", capsys.readouterr().out, re.MULTILINE)
    assert re.search(r'"changed":\[\d', (tmp_path / "page.html").read_text())
    assert evaluate.main([str(run), "--people", "2"]) == 0
    capsys.readouterr()

    assert patch.main(["revert", str(run), str(patches)]) == 0
    np.testing.assert_array_equal(table_of(run), original)
    assert {path: path.read_bytes() for path in files} == files
    assert evaluate.main([str(run), "--people", "2"]) == 0
    results = [json.loads(path.read_text()) for path in (run / "evals").glob("150-facts*.json")]
    assert {tuple(result.get("settings", {}).get("patches", ())) for result in results} == {(), (patch_name(patches),)}


@pytest.mark.slow
def test_patches_learned_together_keep_what_each_has_alone(run, tmp_path):
    result = merging.measure(run, 2, 1, LEARN.split(), tmp_path)
    assert result["alone"] >= 0.9
    assert result["together_kept"] >= 0.95
    assert result["old_facts"] - result["old_facts_together"] <= 0.05
    assert 0 < result["rows_shared_by_two"] < result["rows_each"] < result["rows_together"] <= result["slots"]


def patch_name(folder: pathlib.Path) -> str:
    from memjax.runs.patches.patch import read_patch

    return read_patch(folder).identity
