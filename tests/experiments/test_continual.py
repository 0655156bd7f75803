"""005: training and test questions differ, baselines start at the base model, and settings are chosen by protocol."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from continual import facts, generated, methods, tables

from memjax.config.model import ModelConfig
from memjax.models.parts import DecoderParts
from tests.experiments.conftest import EXPERIMENTS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generated.write(folder)
    return folder


def test_new_facts_are_about_others_than_the_old_and_asked_in_wordings_that_are_not_learned(data):
    old, new = facts.old_facts(data, 40), facts.new_facts(data, 20)
    assert {len(fact.told) for fact in old[::2]} == {5}
    assert all(fact.question.prompt not in fact.told for fact in old[1::2])
    for fact in new:
        assert not set(fact.learned) & set(fact.asked)
        assert not any(prompt in other.told for other in old for prompt in (*fact.learned, *fact.asked))
        assert [len(wording) for wording in fact.fact.wordings] == [2] * facts.TRAINED


def test_lora_starts_at_the_base_and_reaches_every_matrix_of_the_blocks():
    parts = DecoderParts.of(
        ModelConfig(dim=8, num_layers=2, num_heads=2, ffn_dim=12, vocab_size=300, memory=None), attention="xla"
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), parts.abstract_params)
    added = methods._lora(params, 2)
    same, _ = methods._with_lora(added, params, {})
    jax.tree.map(np.testing.assert_array_equal, params, same)
    moved = {place: (left, right + 1) for place, (left, right) in added.items()}
    other, _ = methods._with_lora(moved, params, {})
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(other), strict=True)
    changed = {jax.tree_util.keystr(path) for (path, leaf), new in pairs if (np.asarray(leaf) != np.asarray(new)).any()}
    assert changed == set(added)
    assert len(added) == 2 * 7


def test_the_setting_that_forgets_least_is_chosen_of_those_that_learn_enough():
    def row(name, learned, lost, **others):
        return {"stage": "grid", "family": name, "paraphrases": learned, "as_learned": 0, "old_lost": lost, **others}

    rows = [row("a", 0.9, 0.3), row("a", 0.7, 0.2), row("a", 0.6, 0.0), row("b", 0.1, 0.0), row("b", 0.2, 0.5)]
    assert tables.chosen([*rows, {**rows[0], "stage": "headline", "old_lost": 0}]) == [rows[1], rows[4]]


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("continual_run", EXPERIMENTS / "005_continual_learning/run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the types of their fields here
    spec.loader.exec_module(module)
    return module


def test_rates_are_tried_between_those_that_learn_too_little_and_enough_and_below_the_end_of_dense_ones(experiment):
    def row(name, lr, learned, rows=0, rank=0):
        method = {"family": name, "lr": lr, "rows_given": rows, "rank": rank, "optimizer": "adamw", "epochs": 4}
        return {"stage": "grid", "paraphrases": learned, **method}

    rows = [
        *(row("sparse", lr, learned, 1000) for lr, learned in ((0.1, 0.6), (0.3, 0.8), (1.0, 0.7))),
        *(row("sparse", lr, learned, 25) for lr, learned in ((0.1, 0.1), (0.3, 0.2))),
        *(row("sparse", lr, 0.9, 500) for lr in (0.1, 0.3)),
        *(row("full", lr, learned) for lr, learned in ((3e-5, 0.9), (1e-4, 0.9), (1e-3, 0.3))),
        *(row("lora", lr, learned, rank=32) for lr, learned in ((1e-4, 0.2), (1e-3, 0.69), (3e-3, 0.7))),
    ]
    results = {str(number): one for number, one in enumerate(rows)}
    given = lambda stage: [
        (run.method["name"], run.method["rows"], run.method["rank"], run.method["lr"])
        for run in experiment.runs_of(stage, results, experiment.SIZES["full"], "data", "work")
    ]
    assert given("between") == [("sparse", 1000, 0, 0.17), ("full", 0, 0, 1e-5), ("lora", 0, 32, 0.0017)]
    results["later"] = row("sparse", 0.17, 0.75, 1000) | {"stage": "between"}
    assert ("sparse", 1000, 0, 0.13) in given("closer")
    assert given("between")[0] == ("sparse", 1000, 0, 0.17)


@pytest.mark.slow
def test_the_small_size_runs_on_a_cpu_and_its_results_make_the_tables(tmp_path):
    command = [sys.executable, "experiments/005_continual_learning/run.py", "--size", "small", "--jobs", "2"]
    words = ["--families", "sparse", "lora", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    ended = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
    assert "every run has its result" in ended.stdout
    rows = json.loads((tmp_path / "small.json").read_text())["runs"]
    assert {(row["family"], row["how"]) for row in rows} == {
        (name, how) for name in ("sparse", "lora") for how in ("together", "in_parts", "edits", "merged")
    } - {("lora", "merged")}
    assert all(row["rows"] > 0 for row in rows if row["family"] == "sparse")
    assert all(row["rows"] == 0 for row in rows if row["family"] == "lora" and row["how"] == "together")
    made = tables.report(rows, tmp_path)
    assert made.count("| lora, rank 32, 0.0003 |") == 5
