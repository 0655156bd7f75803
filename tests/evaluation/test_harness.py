"""lm-eval's tasks give the results of whole forward passes and of greedy decoding without a cache."""

import contextlib
import json
import pathlib
import re
import sys

import numpy as np
import pytest

from memjax import evaluate
from memjax.config.run import RunConfig
from memjax.config.sampling import SamplingConfig
from memjax.config.training import EvalConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.errors import ConfigError, DataError
from memjax.evaluation import model as model_module
from memjax.evaluation.model import EvalModel
from memjax.evaluation.recall import zero_tables
from memjax.inference.scoring import Score
from memjax.training.evaluation_hooks import Questions

# lm-eval and its dependencies emit warnings of their own.
pytestmark = pytest.mark.filterwarnings("ignore")
TOKENIZER = ByteTokenizer()

CHOICES = [
    {"q": "The sky is", "choices": ["blue", "a long way off"], "gold": 0},
    {"q": "", "choices": ["red", "green", "x"], "gold": 1},
    {"q": "Snow that fell in a town far away and long ago was", "choices": ["white", "w"], "gold": 0},
    {"q": "One", "choices": ["a", "b", "c", "d"], "gold": 3},
]
PROMPTS = ["The capital is", "Two and two", "A prompt that is far longer than what the model may see at once, is cut"]
TEXTS = ["A small text.", "", "Another text, which is so long that it needs more than a single window to be read."]
MAX_LENGTH, MAX_TOKENS = 32, 10


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        from memjax.evaluation import harness

        yield harness


def write_task(folder: pathlib.Path, name: str, rows: list[dict], **settings) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "metadata": {"version": 3.0},
        **settings,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def metric(name: str) -> dict:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def report(harness, found, folder: pathlib.Path, *tasks: str, keep=lambda _: None, **settings) -> dict:
    model = EvalModel.of(found, batch_size=8)
    return harness.task_report(model, tasks, folder=str(folder), zero_tables=False, keep=keep, **settings)


def test_choices_are_those_of_whole_forward_passes(harness, found, by_hand, tmp_path):
    rule = {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    rule |= {"output_type": "multiple_choice", "metric_list": [metric("acc"), metric("acc_norm")]}
    write_task(tmp_path, "choose", CHOICES, **rule)
    kept = []
    measured = report(harness, found, tmp_path, "choose", keep=kept.append)
    plain, normalised, scores = [], [], []
    for row in CHOICES:
        context = [1, *TOKENIZER.encode(row["q"])]
        mine = [by_hand.score(context, TOKENIZER.encode(f" {choice}"), MAX_LENGTH)[0] for choice in row["choices"]]
        scores.append(mine)
        plain.append(np.argmax(mine) == row["gold"])
        lengths = [len(choice) for choice in row["choices"]]
        normalised.append(np.argmax(np.array(mine) / lengths) == row["gold"])
    results = measured["results"]["choose"]
    assert (results["acc,none"], results["acc_norm,none"]) == (np.mean(plain), np.mean(normalised))
    for sample, mine in zip(kept, scores, strict=True):
        assert sample["task"] == "choose"
        found_scores = [float(value) for value, _ in sample["filtered_resps"]]
        np.testing.assert_allclose(found_scores, mine, atol=1e-4)
    assert measured["versions"] == {"choose": 3.0}
    assert (measured["sequence_length"], measured["begin_token"]) == (MAX_LENGTH, True)
    assert "choose" in harness.format_task_report(measured)
    json.dumps(measured)


def test_texts_are_those_of_greedy_decoding_without_a_cache(harness, found, by_hand, tmp_path):
    room = MAX_LENGTH - MAX_TOKENS
    prompts = [[1, *TOKENIZER.encode(prompt)][-room:] for prompt in PROMPTS]
    written = [TOKENIZER.decode(by_hand.write(prompt, MAX_TOKENS)) for prompt in prompts]
    stop = written[1][2:4]
    assert stop
    expected = [text.partition(stop)[0] for text in written]
    rows = [{"q": prompt, "a": text} for prompt, text in zip(PROMPTS, [*expected[:2], "another"], strict=True)]
    kept = []
    rule = {"doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "output_type": "generate_until"}
    until = {"until": [stop], "max_gen_toks": MAX_TOKENS, "do_sample": False}
    write_task(tmp_path, "write", rows, **rule, generation_kwargs=until, metric_list=[metric("exact_match")])
    measured = report(harness, found, tmp_path, "write", keep=kept.append)
    assert [sample["filtered_resps"] for sample in kept] == [[text] for text in expected]
    assert measured["results"]["write"]["exact_match,none"] == pytest.approx(2 / 3)


def test_whole_texts_are_read_in_windows(harness, found, by_hand, tmp_path):
    rule = {"doc_to_text": "", "doc_to_target": "{{text}}", "output_type": "loglikelihood_rolling"}
    write_task(tmp_path, "read", [{"text": text} for text in TEXTS], **rule, metric_list=[{"metric": "bits_per_byte"}])
    kept = []
    measured = report(harness, found, tmp_path, "read", keep=kept.append)
    expected = [by_hand.score([1], TOKENIZER.encode(text), MAX_LENGTH)[0] for text in TEXTS]
    assert expected[1] == 0
    np.testing.assert_allclose([float(*sample["filtered_resps"]) for sample in kept], expected, atol=1e-4)
    bits = -sum(expected) / np.log(2) / len("".join(TEXTS))
    assert measured["results"]["read"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-5)


def test_the_zeroed_tables_the_shots_and_the_limit(harness, found, tmp_path, monkeypatch):
    rule = {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    rule |= {"output_type": "multiple_choice", "metric_list": [metric("acc")]}
    write_task(tmp_path, "choose", CHOICES, **rule)
    asked = []

    def score(model, requests, **_):
        asked.append((float(np.abs(np.asarray(model.tables["shared"].rows[...])).sum()), requests))
        return [Score(-float(number), False) for number in range(len(requests))]

    monkeypatch.setattr(model_module, "score", score)
    monkeypatch.setattr(model_module, "zero_tables", lambda model, donate: zero_tables(model))
    measured = harness.task_report(EvalModel.of(found), ["choose"], folder=str(tmp_path), limit=2, shots=1)
    (whole, requests), (zeroed, _) = asked
    assert whole > 0 == zeroed
    assert measured["n-samples"]["choose"] == {"original": 4, "effective": 2}
    assert set(measured["zeroed"]) == {"choose"}
    assert "tables zeroed" in harness.format_task_report(measured)
    assert len(requests) == 5
    # One solved document precedes each.
    assert all(TOKENIZER.decode([*one.context, *one.continuation]).count("\n\n") == 1 for one in requests)


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        (("chose",), ConfigError, "tasks=chose is not known; did you mean 'choose'"),
        (("*",), DataError, "cannot be loaded"),
        (("broken",), DataError, "--tasks broken: cannot be loaded .*data must be on this machine"),
        (("contrastive",), DataError, "generation_kwargs: penalty_alpha unknown; known are until, max_gen_toks"),
    ],
)
def test_what_cannot_be_done_is_reported(harness, found, tmp_path, tasks, error, message):
    rule = {"doc_to_text": "{{q}}", "doc_to_target": "{{gold}}", "output_type": "generate_until"}
    rule |= {"metric_list": [metric("exact_match")]}
    write_task(tmp_path, "choose", CHOICES, **rule)
    write_task(tmp_path, "broken", CHOICES, **rule)
    (tmp_path / "broken.jsonl").unlink()
    write_task(tmp_path, "contrastive", CHOICES, **rule, generation_kwargs={"until": ["x"], "penalty_alpha": 4})
    with pytest.raises(error, match=message):
        report(harness, found, tmp_path, *tasks)


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("chose", ConfigError, r"eval\.tasks=chose is not known; did you mean 'choose'"),
        ("choose", DataError, r"--eval\.tasks choose: cannot be loaded"),
        ("contrastive", DataError, "generation_kwargs: penalty_alpha unknown"),
    ],
)
def test_training_refuses_what_cannot_be_done_before_its_first_step(harness, tmp_path, task, error, message):
    rule = {"doc_to_text": "{{q}}", "doc_to_target": "{{gold}}", "output_type": "generate_until"}
    rule |= {"metric_list": [metric("exact_match")]}
    write_task(tmp_path, "choose", CHOICES, **rule)
    (tmp_path / "choose.jsonl").unlink()
    if task == "contrastive":
        write_task(tmp_path, task, CHOICES, **rule, generation_kwargs={"until": ["x"], "penalty_alpha": 4})
    with pytest.raises(error, match=message):
        Questions(RunConfig(eval=EvalConfig(tasks=(task,), task_folder=str(tmp_path))))


def test_errors_in_a_tasks_own_code_are_reported(harness, found, tmp_path):
    rows = [{"q": {"text": "a"}}, {"q": None}]  # lm-eval tries out the first document when it loads the task
    rule = {"doc_to_text": "{{q.text.strip()}}", "doc_to_target": "a", "output_type": "generate_until"}
    write_task(tmp_path, "broken", rows, **rule, metric_list=[metric("exact_match")])
    with pytest.raises(DataError, match=r"tasks=broken: cannot be measured \(UndefinedError: .*correct the template"):
        report(harness, found, tmp_path, "broken")


def test_a_failing_task_does_not_affect_the_others(harness, found, tmp_path, monkeypatch, capsys):
    rule = {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    rule |= {"output_type": "multiple_choice", "metric_list": [metric("acc")]}
    for name in ("first", "last"):
        write_task(tmp_path, name, CHOICES, **rule)
    rows = [CHOICES[0], {**CHOICES[1], "q": None}]
    write_task(tmp_path, "middle", rows, **rule | {"doc_to_text": "{{q.strip()}}"})
    monkeypatch.setattr(evaluate, "loaded", lambda run, settings: contextlib.nullcontext(found))
    options = ["--tasks", "first,middle,last", "--task_folder", str(tmp_path), "--batch_size", "8", "--no-zero_tables"]
    assert evaluate.main(["run", *options]) == 3
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines() if " acc " in line] == ["first", "last"]
    assert re.search("tasks=middle: cannot be measured .*correct the template", printed.err)
    kept = json.loads((tmp_path / "evals" / "0-tasks-first-and-2-more.json").read_text())
    assert list(kept["results"]) == list(kept["versions"]) == ["first", "last"]
    assert list(kept["failed"]) == ["middle"]
    answers = (tmp_path / "evals" / "0-tasks-first-and-2-more-answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in answers] == ["first"] * len(CHOICES) + ["last"] * len(CHOICES)


def test_tasks_of_a_group_are_asked_once(harness, found, tmp_path):
    rule = {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    rule |= {"output_type": "multiple_choice", "metric_list": [metric("acc")]}
    for name in "part_1", "part_2", "alone":
        write_task(tmp_path, name, CHOICES, **rule)
    mean = [{"metric": "acc", "weight_by_size": False}]
    for group, parts in ("part_all", ["part_1", "part_some"]), ("part_some", ["part_2"]):
        document = {"group": group, "task": parts, "aggregate_metric_list": mean}
        (tmp_path / f"{group}.yaml").write_text(json.dumps(document))
    kept = []
    measured = report(harness, found, tmp_path, "part_*", "alone", keep=kept.append)
    asked = [sample["task"] for sample in kept]
    assert {name: asked.count(name) for name in asked} == dict.fromkeys(["part_1", "part_2", "alone"], len(CHOICES))
    assert set(measured["results"]) == {"part_1", "part_2", "part_all", "part_some", "alone"}


def test_errors_of_the_model_are_not_blamed_on_a_task(harness, found, tmp_path, monkeypatch):
    rule = {"doc_to_text": "{{q}}", "doc_to_target": "a", "output_type": "generate_until"}
    write_task(tmp_path, "sound", CHOICES, **rule, metric_list=[metric("exact_match")])
    monkeypatch.setattr(EvalModel, "write", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(harness, found, tmp_path, "sound")


def test_a_metric_of_several_filters_has_a_line_for_each(harness, found, tmp_path):
    take = {"function": "take_first"}
    letters = {"function": "regex", "regex_pattern": "([a-z])"}
    filters = [{"name": "strict", "filter": [take]}, {"name": "letter", "filter": [letters, take]}]
    rule = {"doc_to_text": "{{q}}", "doc_to_target": "a", "output_type": "generate_until", "filter_list": filters}
    rule["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 2}
    write_task(tmp_path, "filtered", CHOICES, **rule, metric_list=[metric("exact_match")])
    lines = harness.format_task_report(report(harness, found, tmp_path, "filtered"))
    assert "exact_match (strict)" in lines
    assert "exact_match (letter)" in lines


def test_whole_numbers_are_metrics_and_sizes_of_sets_are_not(harness):
    results = {"alias": "t", "sample_len": 4, "count,none": 3, "count_stderr,none": "N/A", "acc,none": 0.5}
    results["perplexity,none"] = 123456789012345678.0
    lines = harness.format_task_report({"results": {"t": results}, "n-shot": {"t": 0}})
    assert [line.split()[2:] for line in lines.splitlines()[1:]] == [
        ["count", "3.0000"],
        ["acc", "0.5000"],
        ["perplexity", "1.235e+17"],
    ]


def test_a_missing_folder_is_reported(harness, found, tmp_path):
    with pytest.raises(ConfigError, match=r"task_folder=.*none is not a folder; name one with YAML files"):
        report(harness, found, tmp_path / "none", "choose")


GREEDY, DRAWN = SamplingConfig(), SamplingConfig(temperature=1.0)


@pytest.mark.parametrize(
    ("rule", "max_tokens", "stop", "sampling"),
    [
        (
            {"until": "\n\n", "do_sample": True, "temperature": 0.5, "top_k": 3},
            256,
            ("\n\n",),
            SamplingConfig(temperature=0.5, top_k=3),
        ),
        # A temperature alone means sampling; with do_sample false it does not.
        ({"temperature": 3.0, "max_gen_toks": 7, "until": None}, 7, (), SamplingConfig(temperature=3.0)),
        ({"temperature": 3.0, "do_sample": False}, 256, (), GREEDY),
        ({}, 256, (), GREEDY),
        ({"do_sample": True}, 256, (), DRAWN),
        # Zeros are values, not missing.
        ({"do_sample": True, "temperature": 0.0}, 256, (), GREEDY),
        ({"do_sample": True, "temperature": 0, "top_p": 0.5, "top_k": 4}, 256, (), SamplingConfig(top_p=0.5, top_k=4)),
        ({"max_gen_toks": 0}, 0, (), GREEDY),
        ({"max_new_tokens": 0, "until": []}, 0, (), GREEDY),
        ({"do_sample": True, "top_k": 0}, 256, (), DRAWN),
        ({"do_sample": True, "top_k": -1}, 256, (), DRAWN),
        ({"do_sample": True, "top_p": 0}, 256, (), GREEDY),
        # lm-eval's synonyms, and null.
        ({"max_new_tokens": 9, "until": ["a", "b"]}, 9, ("a", "b"), GREEDY),
        ({"max_tokens": 9, "max_gen_toks": 5}, 5, (), GREEDY),
        ({"max_completion_tokens": 3, "temperature": None, "top_p": None, "do_sample": None}, 3, (), GREEDY),
        ({"do_sample": True, "min_p": 0.1}, 256, (), SamplingConfig(temperature=1.0, min_p=0.1)),
        ({"num_beams": 1, "repetition_penalty": 1.3}, 256, (), SamplingConfig(repetition_penalty=1.3)),
    ],
)
def test_a_tasks_generation_settings_mean_what_lm_eval_means(harness, rule, max_tokens, stop, sampling):
    assert harness._writing(rule) == {"max_tokens": max_tokens, "stop": stop, "sampling": sampling}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 must be 1"),
        ({"do_sample": "yes"}, "do_sample='yes' must be true or false"),
        ({"do_sample": True, "temperature": -1}, r"temperature=-1\.0 must not be negative"),
        ({"do_sample": True, "top_k": -3}, "top_k=-3 must be positive"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p=1\.5 must be above 0 and at most 1"),
        ({"do_sample": True, "min_p": 2}, r"min_p=2\.0 must be in 0\.\.1"),
        ({"temperature": "warm"}, "could not convert"),
        ({"max_gen_toks": -1}, "max_gen_toks=-1 must not be negative"),
        ({"until": [3]}, r"until=\[3\] must be strings"),
    ],
)
def test_generation_settings_that_cannot_be_met_are_refused(harness, rule, message):
    with pytest.raises(DataError, match=f"generation_kwargs: .*{message}"):
        harness._writing(rule)


def test_no_token_is_generated_if_none_is_requested(harness, found, tmp_path):
    kept = []
    rule = {"doc_to_text": "{{q}}", "doc_to_target": "", "output_type": "generate_until"}
    rule |= {"generation_kwargs": {"max_gen_toks": 0}, "metric_list": [metric("exact_match")]}
    write_task(tmp_path, "nothing", [{"q": prompt} for prompt in PROMPTS], **rule)
    report(harness, found, tmp_path, "nothing", keep=kept.append)
    assert [sample["filtered_resps"] for sample in kept] == [[""]] * len(PROMPTS)


def test_lm_eval_needs_no_torch(harness):
    assert "torch" not in sys.modules
    assert "transformers" not in sys.modules


def test_the_command_keeps_results_and_answers(harness, found, tmp_path, monkeypatch, capsys):
    rule = {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    rule |= {"output_type": "multiple_choice", "metric_list": [metric("acc")]}
    write_task(tmp_path, "choose", CHOICES, **rule)
    monkeypatch.setattr(evaluate, "loaded", lambda run, settings: contextlib.nullcontext(found))
    options = ["--tasks", "choose", "--task_folder", str(tmp_path), "--batch_size", "8", "--no-zero_tables"]
    assert evaluate.main(["run", *options]) == 0
    assert "choose" in capsys.readouterr().out
    kept = json.loads((tmp_path / "evals" / "0-tasks-choose.json").read_text())
    assert kept["versions"] == {"choose": 3.0}
    assert len((tmp_path / "evals" / "0-tasks-choose-answers.jsonl").read_text().splitlines()) == len(CHOICES)
