"""The commands that read a run: their output, files and exit codes."""

import gzip
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax.monitoring
import pytest

from drawn import drawn
from memjax import evaluate, generate
from memjax.checkpoint import Checkpoints
from memjax.config.data import BiographiesConfig, DataConfig
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.inference import streaming, text
from memjax.io.command import exit_code
from memjax.models.parts import split_decoder
from memjax.runs.layout import meta_document, params_to_tree
from memjax.runs.load import load


def save(folder, data: DataConfig, memory: bool = True) -> str:
    small = MemoryConfig(layers=(0,), num_keys=8, num_heads=2, top_k=4, key_dim=8)
    model = ModelConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=32, vocab_size=259, memory=small if memory else None)
    config = RunConfig(model=model, data=data)
    _, params, tables = split_decoder(drawn(model))
    meta = meta_document(config, ByteTokenizer(), step=7)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(7, {"params": params_to_tree(params), "tables": tables}, {"meta": meta})
    return str(folder)


@pytest.fixture(scope="module")
def biographies(tmp_path_factory):
    data = DataConfig(sequence_length=16, biographies=BiographiesConfig(num_people=4))
    return save(tmp_path_factory.mktemp("run"), data)


def test_facts_are_reported_and_kept(biographies, tmp_path, capsys):
    assert evaluate.main([biographies, "--people", "1", "--batch_size", "16"]) == 0
    printed = capsys.readouterr().out
    assert "asked in training" in printed
    assert "with tables zeroed" in printed
    assert "bits known" in printed
    path = printed.splitlines()[-1].removeprefix("written to ")
    assert path == f"{biographies}/evals/7-facts.json"
    with open(path) as file:
        kept = json.load(file)
    assert kept["asked"]["questions"] == kept["held_out"]["questions"] == 6
    assert kept["step"] == 7
    assert kept["settings"]["people"] == 1
    known = kept["knowledge"]
    assert (known["people"], known["people_measured"]) == (4, 1)
    assert known["bits_per_table_parameter"] == known["bits"] / (64 * 16)


def test_a_text_is_read_from_lines_or_objects(biographies, tmp_path, capsys):
    (tmp_path / "plain.txt").write_text("A first line.\n\nAnd a second, which is longer.\n")
    lines = [{"body": "A first line."}, {"body": "And a second, which is longer."}]
    (tmp_path / "objects.jsonl").write_text("\n".join(map(json.dumps, lines)))
    kept = []
    for name, extra in (("plain.txt", []), ("objects.jsonl", ["--text_key", "body"])):
        options = ["--text", str(tmp_path / name), "--batch_size", "4", "--stride", "4", *extra]
        assert evaluate.main([biographies, *options]) == 0
        printed = capsys.readouterr().out
        assert "bits per byte" in printed
        with open(printed.splitlines()[-1].removeprefix("written to ")) as file:
            kept.append({key: value for key, value in json.load(file).items() if key != "settings"})
    assert kept[0] == kept[1]
    assert kept[0]["bytes"] == 13 + 30
    assert kept[0]["difference"] == kept[0]["zeroed"]["bits_per_byte"] - kept[0]["bits_per_byte"] != 0


def test_a_run_on_text_is_measured_on_its_validation_data(tmp_path, capsys):
    # Compressed, so that it is read through the data prepared in the run's folder.
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"one\ntwo\nthree\n"))
    data = DataConfig(source="text", path=str(tmp_path / "train.txt.gz"), sequence_length=8)
    run = save(tmp_path, data, memory=False)
    assert evaluate.main([run, "--batch_size", "2"]) == 0
    assert "zeroed" not in capsys.readouterr().out
    kept = json.loads((tmp_path / "evals" / "7-validation.json").read_text())
    assert kept["bytes"] == len("three")
    assert "zeroed" not in kept


def test_questions_are_asked_and_every_answer_is_kept(biographies, tmp_path, capsys):
    short = [{"question": f"Who is {name}?", "answers": [name]} for name in ("Ann", "Ben", "Cleo")]
    problem = [{"task_id": 1, "text": "Double.", "code": "def f(x): ...", "test_list": ["assert f(1) == 2"]}]
    for name, rows in (("short_dev.jsonl", short), ("mbpp.jsonl", problem)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--limit", "2", "--max_tokens", "9", "--batch_size", "2"]
    assert evaluate.main([biographies, "--questions", str(tmp_path), *options]) == 0
    printed = capsys.readouterr().out
    assert "Short answers" in printed
    assert "Programs" in printed
    assert "tables zeroed" in printed
    path = printed.splitlines()[-1].removeprefix("written to ")
    assert path == f"{biographies}/evals/7-questions-{tmp_path.name}.json"
    with open(path) as file:
        kept = json.load(file)
    assert (kept["step"], kept["settings"]["limit"]) == (7, 2)
    assert [(one["name"], one["questions"], one["of"]) for one in kept["sets"]] == [
        ("mbpp", 1, 1),
        ("short_dev", 2, 3),
    ]
    assert all("zeroed" in one for one in kept["sets"])
    with open(path.replace(".json", "-answers.jsonl")) as file:
        answers = [json.loads(line) for line in file]
    assert [(one["set"], one.get("expected")) for one in answers] == [
        ("mbpp", None),
        ("short_dev", ["Ann"]),
        ("short_dev", ["Ben"]),
    ]
    assert answers[0]["question"] == "MBPP/1"


@pytest.mark.parametrize("name", ["a" * 249, "é" * 120])
def test_results_of_files_with_long_names_have_names_that_a_file_can_have(name):
    stem = evaluate._stem([f"{name}.jsonl", "other.jsonl"])
    assert len(f"999999-questions-{stem}-01234567-answers.jsonl".encode()) < 200


def test_text_is_generated_from_a_prompt(biographies, capsys):
    assert generate.main([biographies, "--prompt", "What is", "--max_tokens", "9"]) == 0
    model, tokenizer = load(biographies)
    tokens = list(streaming.generate(model, [1, *tokenizer.encode("What is")], max_tokens=9, stop_ids=(2,)))
    printed = capsys.readouterr()
    assert printed.out == tokenizer.decode(tokens) + "\n"
    rate = r"then ([\d,]+|\d\.\d) tokens/s(; compiling took \d+\.\d s)?"
    assert re.fullmatch(rf"{len(tokens)} tokens, the first after \d+\.\d s, {rate}\n", printed.err)


def test_the_rate_of_tokens_excludes_compilation(biographies, monkeypatch, capsys):
    def pieces(*_, **__):
        yield "a"
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1000.0)
        yield "b"
        return 2001

    found = load(biographies)
    times = iter([5.0, 5.0, 1007.0])
    monkeypatch.setattr(text, "stream_text", pieces)
    monkeypatch.setattr(generate, "time", types.SimpleNamespace(monotonic=lambda: next(times)))
    generate._write(found, generate.GenerateConfig(), "", number=0)
    told = "2,001 tokens, the first after 0.0 s, then 1,000 tokens/s; compiling took 1000.0 s\n"
    assert capsys.readouterr() == ("ab\n", told)


def test_a_file_of_prompts_gives_an_object_for_each(biographies, tmp_path, capsys):
    (tmp_path / "plain.txt").write_text("What is\n\nWho\nWhat is\n")
    asked = [{"id": 7, "prompt": "What is"}, {"prompt": "Who", "text": "overwritten"}, {"prompt": "What is"}]
    (tmp_path / "objects.jsonl").write_text("\n".join(map(json.dumps, asked)))
    options = ["--max_tokens", "9", "--temperature", "1", "--batch_size", "2"]
    assert generate.main([biographies, "--prompts", str(tmp_path / "plain.txt"), *options]) == 0
    printed = list(map(json.loads, capsys.readouterr().out.splitlines()))
    output = tmp_path / "out.jsonl"
    written = ["--prompts", str(tmp_path / "objects.jsonl"), "--output", str(output)]
    assert generate.main([biographies, *written, *options]) == 0
    kept = list(map(json.loads, output.read_text().splitlines()))
    assert kept == [printed[0] | {"id": 7}, *printed[1:]]
    assert [line["prompt"] for line in printed] == ["What is", "Who", "What is"]
    # The first prompt is numbered like a single one; the same prompt further down gets other draws.
    assert generate.main([biographies, "--prompt", "What is", *options]) == 0
    assert capsys.readouterr().out == printed[0]["text"] + "\n" != printed[2]["text"] + "\n"
    stop = printed[0]["text"][2:4]
    assert generate.main([biographies, "--prompt", "What is", "--stop", json.dumps(["no such", stop]), *options]) == 0
    assert capsys.readouterr().out == printed[0]["text"].partition(stop)[0] + "\n"


def test_a_full_disk_is_reported(biographies, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("What is")
    command = [biographies, "--prompts", str(tmp_path / "prompts.txt"), "--max_tokens", "2", "--output", "/dev/full"]
    assert generate.main(command) == 4
    assert capsys.readouterr().err.endswith("/dev/full: No space left on device\n")


def test_prompts_are_asked_for_at_a_terminal(biographies, capsys, monkeypatch):
    answers = iter(["What is", "", "What is"])

    def ask(sign):
        print(sign, end="")
        if (answer := next(answers, None)) is None:
            raise EOFError
        return answer

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", ask)
    assert generate.main([biographies, "--max_tokens", "9", "--temperature", "0.0"]) == 0
    first, second = (text.removesuffix("\n") for text in capsys.readouterr().out.split("> ", 1)[1].split("> > "))
    assert second == first + "\n> "


def test_prompts_are_read_from_a_pipe(biographies, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is\n\nWhat is\n"))
    assert generate.main([biographies, "--max_tokens", "9", "--temperature", "0.0"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_a_prompt_from_a_pipe_that_is_not_utf8_is_named(biographies, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors="surrogateescape"))
    assert generate.main([biographies]) == 3
    assert r"standard input: the prompt 'caf\udce9' is not UTF-8" in capsys.readouterr().err


@pytest.mark.slow
def test_two_devices_write_what_one_writes(biographies, capsys):
    printed = []
    for count in ("1", "2"):
        assert generate.main([biographies, "--prompt", "What is", "--max_tokens", "9", "--memory_devices", count]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def refused(module, *options) -> None:
    with pytest.raises(SystemExit) as ended:
        module.main(options)
    assert ended.value.code == 2


def test_wrong_settings_end_with_2(biographies, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert generate.main([biographies]) == 2
    refused(generate, biographies, "--prompt", "x", "--temperature", "-1", "--batch_size", "0")
    refused(generate, biographies, "--prompt", "x", "--prompts", "y")
    refused(generate, biographies, "--prompt", "x", "--output", "y")
    refused(evaluate, biographies, "--step", "newest")
    refused(evaluate, biographies, "--batch_size", "0")
    refused(evaluate, biographies, "--questions", "x", "--tasks", "y", "--text", "z")
    refused(evaluate, biographies, "--run_programs", "--limit", "3", "--sampling.temperature", "1")
    refused(evaluate, biographies, "--questions", "x", "--samples", "5", "--examples", "y", "--shots", "-1")
    refused(evaluate)
    errors = capsys.readouterr().err
    for expected in (
        "prompt=null: give --prompt or --prompts",
        "temperature=-1.0 must not be negative",
        "prompts=y cannot be combined with prompt",
        "output=y is for a file of prompts",
        "step=newest must be latest, best",
        "questions=['x'] cannot be combined with text; measure one after the other",
        "tasks=['y'] cannot be combined with text",
        "run_programs=true is only for questions; set that, or leave it out",
        "limit=3 is only for questions and tasks; set that, or leave it out",
        "sampling={temperature: 1.0, ",
        "samples=5 would all be the same; set sampling.temperature, such as 0.8",
        "shots=-1 must not be negative",
    ):
        assert expected in errors
    assert "batch_size=0 must be positive" in errors
    assert "RUN is missing" in errors
    assert generate.main([biographies, "--prompt", "x", "--memory_devices", "99"]) == 2
    assert "memory_devices=99 must be at most 8" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--help"])
    assert ended.value.code == 0


def test_tasks_need_their_package(biographies, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert evaluate.main([biographies, "--tasks", "arc_easy"]) == 2
    assert "tasks=arc_easy needs the package lm-eval: pip install lm-eval" in capsys.readouterr().err


def test_missing_texts_end_with_3_and_missing_checkpoints_with_4(biographies, tmp_path, capsys):
    assert evaluate.main([biographies, "--text", str(tmp_path / "none.txt")]) == 3
    assert "none.txt: there is no such file; set --text" in capsys.readouterr().err
    assert evaluate.main([biographies, "--questions", str(tmp_path / "none.jsonl")]) == 3
    assert "none.jsonl: there is no such file; set --questions" in capsys.readouterr().err
    assert generate.main([biographies, "--prompts", str(tmp_path / "none.txt")]) == 3
    assert "none.txt: there is no such file; set --prompts" in capsys.readouterr().err
    for line, problem in (("{", "not JSON"), ('{"text": "x"}', "not an object with a text in the field 'prompt'")):
        (tmp_path / "wrong.jsonl").write_text('{"prompt": "x"}\n' + line)
        assert generate.main([biographies, "--prompts", str(tmp_path / "wrong.jsonl")]) == 3
        assert f"wrong.jsonl:2: {problem}" in capsys.readouterr().err
    for module, options in ((evaluate, []), (generate, ["--prompt", "x"])):
        assert module.main([str(tmp_path / "none"), *options]) == 4
        assert "there is no such folder" in capsys.readouterr().err
    assert evaluate.main([biographies, "--step", "8"]) == 4
    assert "there is no step 8" in capsys.readouterr().err


def test_an_uncaught_interrupt_ends_without_a_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert exit_code(interrupted) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_system_errors_are_one_line_with_the_path(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert exit_code(lambda: (tmp_path / "file" / "x").write_text("")) == 4
    assert capsys.readouterr().err == f"{tmp_path}/file is a file, where a folder is needed; name another\n"
    assert exit_code(lambda: os.rename(tmp_path / "a", tmp_path / "b")) == 4
    assert capsys.readouterr().err == f"{tmp_path}/a -> {tmp_path}/b: No such file or directory\n"


def test_a_closed_pipe_ends_a_command_quietly():
    code = """
import sys
from memjax.io.command import exit_code
sys.exit(exit_code(lambda: [print("a line of \u2581 text", flush=True) for _ in range(100_000)] and None))
"""
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"a line of \\u2581 text\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


def test_outputs_that_cannot_be_written_are_refused_before_the_work(biographies, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("What is\n")
    for output, problem in ((tmp_path, "is a folder; name a file"), (tmp_path / "no/x", "there is no folder")):
        words = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(output)]
        assert generate.main([str(tmp_path / "no run"), *words]) == 2
        assert problem in capsys.readouterr().err


def test_results_of_other_settings_are_kept_and_printed_where_nothing_can_be(tmp_path, capsys):
    run = save(tmp_path / "run", DataConfig(sequence_length=16, biographies=BiographiesConfig(num_people=4)))
    (tmp_path / "text.txt").write_text("A first line.\n")
    options = ["--text", str(tmp_path / "text.txt"), "--batch_size", "4", "--no-zero_tables"]
    evals = tmp_path / "run" / "evals"
    for more, number in (([], 1), ([], 1), (["--max_bytes", "5"], 2), (["--max_bytes", "5"], 2)):
        assert evaluate.main([run, *options, *more]) == 0
        assert len(list(evals.iterdir())) == number
    assert (evals / "7-text-text.json").exists()
    shutil.rmtree(evals)
    evals.write_text("")
    capsys.readouterr()
    assert evaluate.main([run, *options]) == 0
    printed = capsys.readouterr()
    assert "bits per byte" in printed.out
    assert printed.err == f"the results are only printed: {evals}: File exists\n"
