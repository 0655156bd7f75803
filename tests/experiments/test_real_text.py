"""004: its questions, training and tables agree with calculations by hand."""

import collections
import dataclasses
import gzip
import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from factlab.entity_questions import Fact
from factlab.runs import read_results
from factlab.steps import FINAL_FRACTION, OutOfTime, Rates
from realtext import comparisons, corpus, generated, grading, measures, prepare, tables, training, worker

from memjax.config.data import DataConfig
from memjax.config.load import load
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.optim import OptimConfig, TableOptimConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.inference.scoring import ScoreRequest, score

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "004_real_text"


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    generated.generate(folder, num_people=6)
    corpus.build(folder, folder / "work")
    return corpus.load(folder, folder / "work")


def test_names_and_facts_are_counted_by_article_and_paragraph_as_words():
    facts = [Fact("P19", "Ada King", "?", ("London", "Bath")), Fact("P36", "France", "?", ("Paris",))]
    texts = ["Ada King came from London.\nBath, for Ada King.\nFrance", "In Paris\nFrance; Londoner", "ada-king: BATH"]
    found = prepare.Phrases(["London"] + [name for f in facts for name in (f.subject, *f.answers)], facts).count(texts)
    assert dict(found.paragraphs) == {0: 3}
    assert dict(found.articles) == {0: 2, 1: 1}
    assert found.of["london"] == 1
    assert found.of["bath"] == 2
    assert found.of["ada king"] == 3


def test_every_token_of_a_text_is_predicted_once(read):
    text = read.texts["held_out"]
    rows = text.rows(64)
    assert np.array_equal(rows[:, 1:].ravel()[: len(text.tokens) - 1], text.tokens[1:])
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])
    tokenizer = ByteTokenizer()
    assert (text.tokens != tokenizer.bos_id).sum() == text.bytes
    assert (rows.ravel()[len(text.tokens) + len(rows) :] == tokenizer.bos_id).all()


def test_long_prompts_lose_examples_first_and_answers_stay():
    tokenizer = ByteTokenizer()
    of = lambda *row: corpus.spans(tokenizer, [row], width=12)
    fits, cut, clipped = of(["abc"], "defg", " xy"), of(["a" * 9], "defg", " xy"), of([], "d" * 20, " xy")
    text = lambda found: tokenizer.decode(found.tokens[0, 1 : found.ends[0, 1]].tolist())
    assert text(fits) == "abcdefg xy"
    assert text(cut) == "defg xy"
    assert text(clipped) == "d" * 9 + " xy"
    for found in (fits, cut, clipped):
        begin, end = found.ends[0]
        assert tokenizer.decode(found.tokens[0, begin:end].tolist()) == " xy"


@pytest.mark.slow
def test_a_run_learns_and_its_scores_are_those_of_the_librarys_engine(read):
    at = {"lr": 1.0, "schedule": "constant", "warmup_steps": 0}
    config = RunConfig(
        model=ModelConfig(
            **{"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "dtype": "float32", "vocab_size": 384},
            memory=MemoryConfig(layers=(0,), num_keys=8, top_k=4),
        ),
        data=DataConfig(packing="none", batch_size=8, sequence_length=32),
        optim=OptimConfig(**at, table=TableOptimConfig(**at)),
    )
    trainer = training.TextTrainer(config, read)
    result = trainer.run(Rates(1e-2, 1e-1), epochs=3, points=2, seed=1)
    first, last = result["curve"]
    assert last["loss"] < first["loss"]
    assert last["tokens"] == result["steps"] * 8 * 32
    assert set(last["slots"]) == {"layer_0"} or len(last["slots"]) == 1
    assert result["zeroed"]["bits_per_byte"]["held_out"] != last["bits_per_byte"]["held_out"]
    assert set(result["written"]) == set(last["answers"])

    state = trainer._init(jax.random.key(1))
    model = trainer.program.parts.merge(state.params, state.tables)
    rows = [
        ScoreRequest(tokens[:begin].tolist(), tokens[begin:end].tolist())
        for tokens, (begin, end) in zip(read.asked.tokens, read.asked.ends, strict=True)
    ]
    expected = score(model, rows)
    found = trainer.score(state, read.asked)
    np.testing.assert_allclose(found.nats, [-one.log_likelihood for one in expected], rtol=1e-4)
    assert found.greedy.tolist() == [one.is_greedy for one in expected]
    written = [ScoreRequest(one.context, ids) for one, ids in zip(rows, trainer.write(state, read.asked), strict=True)]
    assert {len(one.continuation) for one in written} == {training.ANSWER_TOKENS}
    assert all(one.is_greedy for one in score(model, written))
    with pytest.raises(OutOfTime):
        trainer.run(Rates(1e-2, 1e-1), epochs=3, points=2, seed=1, deadline=0.0)


def test_runs_are_cut_into_equal_calls_that_meet_every_point():
    for steps, points in ((2624, 10), (328, 1), (50, 5), (18.4, 2), (0.4, 1)):
        length = training.length_of(steps, points)
        assert length.steps % length.chunk == 0
        assert len(length.points) == points
        assert length.points[-1] == length.steps
        assert all(point % length.chunk == 0 for point in length.points)
        assert abs(length.steps - steps) <= max(points, 0.05 * steps)
    assert training.length_of(2624, 10).chunk == training.length_of(328, 1).chunk


def test_every_row_is_read_equally_often():
    order = training.draw_order(5, 2, 10, seed=0)
    assert set(collections.Counter(order.ravel().tolist()).values()) == {4}
    assert not np.array_equal(order, training.draw_order(5, 2, 10, seed=1))


def test_choices_and_answers_are_graded_by_hand():
    questions = [{"set": "s", "choices": ["a", "bbb"], "answer": 1}, {"set": "s", "choices": ["a", "b"], "answer": 1}]
    found = grading.choices(questions, np.array([1.0, 1.5, 2.0, 3.0]))
    assert found == {"s": {"questions": 2, "accuracy": 0.0, "accuracy_by_byte": 0.5, "chance": 0.5}}
    asked = [
        {"set": "TriviaQA", "in_text": True, "answers": ["The Nile", "Nil"]},
        {"set": "SQuAD", "in_text": False, "answers": ["1901"]},
    ]
    marks = grading.written(asked, [" nile.\nQuestion", " in 1901"])
    assert marks["in the text"] == {"questions": 1, "exact_match": 1.0, "f1": 1.0}
    assert marks["SQuAD, not in the text"] == {"questions": 1, "exact_match": 0.0, "f1": pytest.approx(2 / 3)}


def result(family, seed, loss, flops, **more):
    """A made-up result."""
    groups = {"in the text": 3 * loss, "not in the text": 4.0} | dict.fromkeys(measures.SQUAD, 3 * loss)
    groups |= dict.fromkeys(prepare.BINS, loss)
    marks = {name: {"questions": 10, "exact_match": 0.1, "f1": 0.2} for name in groups}
    point = lambda tokens, loss: {
        **{"tokens": tokens, "flops": tokens * flops, "loss": loss, "answers": groups | {"in the text": 3 * loss}},
        "bits_per_byte": {"held_out": loss, "seen": loss, "code": loss},
        "slots": {"3": {"used_fraction": 0.5, "effective_fraction": 0.2, "dead_fraction": 0.5, "top1_share": 0.1}},
    }
    row = {
        "name": f"{family} {seed} {more}",
        "stage": "full",
        "family": family,
        "seed": seed,
        "lr": 1e-3,
        "table_lr": 0,
    }
    row |= {"settings": [], "tokens": 200, "epochs": 2.0, "flops_per_token": flops, "training_flops": 200 * flops}
    row |= {"parameters": {"dense": flops, "table": 0, "experts": 0, "total": flops}, "written": marks, "steps": 4}
    row |= {"curve": [point(100, loss + 0.5), point(200, loss)], "choices": {}, "tokens_per_second": 5, "healthy": True}
    row |= {"by_relation": {"P19": {"questions": 1, "nats": 1.0, "exact_match": 0.0, "commonest_answer": 0.5}}}
    return row | {"zeroed": {"bits_per_byte": {"held_out": 9.0}}, "flops_utilization": 0.4} | more


def test_the_dense_equivalent_is_read_off_the_line_through_the_dense_models(tmp_path):
    # The loss falls by 1 with each doubling, so 0.5 below x1 equals a dense model larger by the square root of two.
    rows = [result("dense_x1", seed, 4 + noise, 1e6) for seed, noise in enumerate((-0.01, 0.0, 0.01))]
    rows += [result("dense_x2", 0, 3.0, 2e6), result("134m_dense", 0, 2.0, 4e6), result("memory_plus", 0, 3.5, 1e6)]
    families = {name: [row for row in rows if row["family"] == name] for name in ("dense_x1", "dense_x2", "134m_dense")}
    families["memory_plus"] = rows[-1:]
    shown = comparisons.equivalent(
        families, ["dense_x1", "dense_x2", "134m_dense"], "memory_plus", measures.bits("held_out"), comparisons._flops
    )
    middle, low, high = (float(word.strip("()")) for word in shown.replace(" to", "").split())
    assert middle == pytest.approx(2**0.5, abs=0.01)
    assert low < middle < high
    text = tables.report(rows, tmp_path)
    assert (tmp_path / "learning.png").exists()
    assert "| `memory_plus` | 50% |" in text.replace("100%", "50%")
    assert "-0.500 ± 0.023, better" in text
    assert "| Memory+, 1,048,576 slots | 1.00 |" in tables.summary(rows)


@pytest.mark.parametrize("left_out", ["full", "grid", "ablations", "large", "long"])
def test_a_report_leaves_out_what_has_not_been_run(left_out, tmp_path):
    rows = [result("dense_x1", 0, 4.0, 1e6), result("memory_plus", 0, 3.5, 1e6)]
    for stage in ("grid", "ablations", "large", "long"):
        rows += [row | {"stage": stage, "name": f"{stage} {row['name']}"} for row in rows[:2]]
    assert tables.report([row for row in rows if row["stage"] != left_out], tmp_path)


def test_a_report_of_nothing_says_so(tmp_path):
    assert tables.report([], tmp_path) == "Not run at full size yet."


@pytest.fixture
def run(monkeypatch):
    spec = importlib.util.spec_from_file_location("real_text_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "real_text_run", module)
    spec.loader.exec_module(module)
    return module


def test_the_rates_are_those_of_the_grid_for_every_family(run):
    found = {}
    for (family, lr, table_lr), loss in {
        ("dense_x1", 1e-3, 0.0): 2.0,
        ("dense_x1", 4e-3, 0.0): 1.9,
        ("memory_plus", 2e-3, 2e-2): 1.8,
        ("memory_plus", 2e-3, 3e-1): 1.7,
        ("memory_plus", 4e-3, 1e-1): 1.0,
    }.items():
        row = {
            "stage": "grid",
            "family": family,
            "lr": lr,
            "table_lr": table_lr,
            "healthy": True,
            "tokens_per_second": 0,
        }
        found[f"{family}{lr}{table_lr}"] = row | {"curve": [{"bits_per_byte": {"held_out": loss}}]}
    assert run.rates_of("dense_x1", found) == (4e-3, 0.0)
    assert run.rates_of("memory_plus", found) == (4e-3, 3e-1)
    assert run.rates_of("134m_memory_plus", found) == (2e-3, 15e-2)
    assert run.rates_of("peer", found) == (4e-3, pytest.approx(6e-2))
    assert run.rates_of("memory_plus", {}) == run.MIDDLE


def test_every_run_has_a_unique_name_and_a_valid_config(run):
    runs = [one for stage in run.STAGES for one in run.runs_of(stage, run.SIZES["full"], {}, "data", "work")]
    assert len({one.name for one in runs}) == len(runs)
    for config, settings in {one.kind for one in runs}:
        assert load(RunConfig, FOLDER.parents[1] / config, list(settings)).data.packing == "none"
    json.dumps([one.row() for one in runs])


def test_the_recipe_of_134m_is_the_run_of_the_experiment(run):
    results = read_results(FOLDER / "results" / "full.json")
    (one,) = (one for one in run.runs_of("134m", run.SIZES["full"], results, "", "") if "memory" in one.family)
    of_run = load(RunConfig, FOLDER.parents[1] / one.config, ["--model.vocab_size", "50304", *one.settings])
    recipe = load(RunConfig, FOLDER / "134m_memory_plus.yaml")
    assert recipe.model == of_run.model
    assert (recipe.optim.lr, recipe.optim.table.lr) == (one.lr, one.table_lr)
    same = lambda config: dataclasses.replace(config, lr=1.0, schedule="constant", warmup_steps=0, final_fraction=0.0)
    rates = lambda optim: dataclasses.replace(same(optim), table=same(optim.table))
    assert rates(recipe.optim) == rates(of_run.optim)
    assert recipe.optim.warmup_steps == recipe.optim.table.warmup_steps == training.WARMUP_STEPS
    assert recipe.optim.final_fraction == recipe.optim.table.final_fraction == FINAL_FRACTION
    assert recipe.data.batch_size == of_run.data.batch_size
    assert recipe.data.sequence_length == of_run.data.sequence_length
    assert not recipe.data.rows_hold_documents
    assert recipe.train.steps == training.length_of(2 * 43_333_187 / 32_768, one.points).steps


@pytest.mark.slow
def test_the_small_size_runs_from_its_task_alone(run, tmp_path):
    generated.generate(tmp_path, num_people=9)
    corpus.build(tmp_path, tmp_path / "work")
    runs = run.runs_of("full", run.SIZES["small"], {}, str(tmp_path), str(tmp_path / "work"))
    assert [one.family for one in runs] == ["dense_x1", "memory_plus"]
    # The measurements are tested above, and take longer to compile than the step.
    task = dataclasses.asdict(dataclasses.replace(runs[1], measures="loss")) | {"name": "a", "deadline": None}
    row = {**runs[1].row(), **worker.run(json.loads(json.dumps(task)))}
    assert run.describe(row).startswith("loss ")
    assert row["curve"][-1]["loss"] < row["curve"][0]["loss"]
    json.dumps(row)


def test_the_prepared_folder_has_every_kind_of_question_and_is_the_same_again(tmp_path):
    data = tmp_path / "data"
    (data / "tokenizers").mkdir(parents=True)
    (data / "tokenizers" / prepare.TOKENIZER).write_bytes(b"ranks")
    cities = ["London", "Bath", "Paris", "Rome"]
    text = "Ada was born in London.\nBea was born in Bath. Bea came from Bath."
    lines = {
        "wiki/wiki_a.jsonl.xz": [{"title": "Ada King", "text": text}],
        "wiki/wiki_heldout.jsonl.xz": [{"title": "Other", "text": "No."}],
        "factual_qa/wiki_support.jsonl.xz": [{"set": name, "row": 0} for name in prepare.OPEN_SETS],
        "code_eval/mbpp.jsonl": [{"text": "One.", "code": "one = 1"}],
    }
    born = {"relation": "P19", "answers": ["London", "Bath", "a b c d e f g h"]}
    for part in ("train", "dev"):
        names = {"train": ("Ada", "Bea", "Cid", "London Ltd"), "dev": tuple("VWXYZ")}[part]
        lines[f"entity_questions/{part}.jsonl.xz"] = [
            {**born, "subject": name, "question": f"Where was {name} born?"} for name in names
        ]
        paragraph = {"title": {"train": "Ada_King", "dev": "No"}[part], "context": "?"}
        asked = [{"question": f"Which city, {city}?", "answers": [city, city]} for city in cities + cities]
        lines[f"squad11/{part}.jsonl.xz"] = [paragraph | {"qas": asked}]
    for name in prepare.OPEN_SETS:
        lines[f"factual_qa/{name}.jsonl.xz"] = [
            {"question": f"{name} {city}?", "answers": [city]} for city in cities * 2
        ]
    for name in prepare.CHOICE_SETS:
        lines[f"mc_eval/{name}.jsonl.xz"] = [{"set": name, "question": "?", "choices": ["a", "b"], "answer": 0}]
    for name, rows in lines.items():
        (data / name).parent.mkdir(exist_ok=True)
        if name.endswith(".xz"):
            prepare.write(data / name, rows)
        else:
            (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = {"prompt": "def two():\n", "canonical_solution": "    return 2\n"}
    (data / "code_eval/HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(program).encode()))

    sizes = prepare.Sizes(in_text=6, not_in_text=18, squad=6, by_exposures=5, choices=1)
    prepare.prepare(data, tmp_path / "out", sizes)
    prepare.prepare(data, tmp_path / "again", sizes)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert files["wiki_a.jsonl.xz"] == (data / "wiki/wiki_a.jsonl.xz").read_bytes()

    rows = list(prepare.read(tmp_path / "out" / prepare.QUESTIONS))
    facts = {row["question"]: row for row in rows if "bin" in row}
    assert facts["Where was Ada born?"]["bin"] == "1 paragraph"
    assert facts["Where was Bea born?"]["bin"] == "1 paragraph"
    assert facts["Where was Bea born?"]["target"] == "Bath"
    assert "Where was London Ltd born?" not in facts
    assert {row["bin"] for row in facts.values()} == {"1 paragraph", "in no article"}
    assert all(row["answers"] == ["London", "Bath"] for row in facts.values())
    in_text = [row["question"] for row in rows if row.get("in_text") and row["set"] != "SQuAD"]
    assert sorted(in_text) == sorted(f"{name} London?" for name in prepare.OPEN_SETS)
    shots = [row for row in rows if row.get("shot")]
    assert not any(row.get("in_text") for row in shots)
    assert all(0 < sum(row["set"] == name for row in shots) <= prepare.SHOTS for name in ("SQuAD", "TriviaQA"))
    assert [row["code"][:7] for row in rows if "code" in row] == ["def two", '"""\nOne']
