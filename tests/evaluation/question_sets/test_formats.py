"""The fields of a file identify its question set, and with it the form of the prompts."""

import gzip
import json
import lzma
import pathlib
import typing

import pytest

from memjax.errors import DataError
from memjax.evaluation.question_sets.formats import OpenQuestion, Problem, read_question_sets


def write(path: pathlib.Path, *rows: dict | str) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(path)


def read(*paths: str, **options):
    return read_question_sets(paths, field="--questions", **options)


def only(path: str, **options) -> typing.Any:
    ((question,),) = [one.questions for one in read(path, **options)]
    return question


OPEN = {"id": 3, "question": "Who?", "answers": ["He", "Him"]}


def test_short_answers(tmp_path):
    question = only(write(tmp_path / "a.jsonl", OPEN))
    assert question == OpenQuestion(
        text="Who?", prompt="Question: Who?\nAnswer:", solved="Question: Who?\nAnswer: He", answers=("He", "Him")
    )
    assert only(write(tmp_path / "b.jsonl", OPEN | {"relation": "P17"})).group == "P17"


def test_questions_about_a_paragraph_are_asked_without_it(tmp_path):
    row = {"title": "T", "context": "He did.", "qas": [{"id": None, "question": "Who?", "answers": ["He"]}]}
    assert only(write(tmp_path / "a.jsonl", row)).prompt == "Question: Who?\nAnswer:"


def test_a_file_without_a_question_is_refused_alone_and_left_out_of_a_folder(tmp_path):
    path = write(tmp_path / "none.jsonl", {"context": "He did.", "qas": []})
    with pytest.raises(DataError, match="holds no question"):
        read(path)
    write(tmp_path / "some.jsonl", OPEN)
    assert [one.name for one in read(str(tmp_path))] == ["some"]


def run(problem: Problem, body: str) -> None:
    exec(problem.beginning + body + "\n" + problem.tests, {})


def test_problems_are_programs_that_fail_unless_the_function_is_right(tmp_path):
    human_eval = {
        "task_id": "HumanEval/0",
        "prompt": "def half(x):\n    return x / 2\n\ndef double(x):\n",
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert half(candidate(3)) == 3\n",
    }
    mbpp = {
        "task_id": 11,
        "text": "Write a function that doubles.",
        "code": "def double(x):\r\n    return 2 * x",
        "test_list": ["assert double(node.value) == 6"],
        "test_setup_code": "import types\nnode = types.SimpleNamespace(value=double(1) + 1)",
    }
    for row, right, wrong in [
        (human_eval, "    return 2 * x\n", "    return x\n"),
        (human_eval, "    return 2 * x\n", "    return x\n\ndef half(x):\n    return 3\n"),
        (mbpp, "def double(x):\n    return 2 * x", "def double(x):\n    return 4"),
    ]:
        problem = only(write(tmp_path / "a.jsonl.gz", row))
        assert problem.solved == problem.prompt + right
        run(problem, right)
        with pytest.raises(AssertionError):
            run(problem, wrong)
        assert problem.functions == ("double",)
    assert problem.group == "test"
    parts = [only(write(tmp_path / "b.jsonl", mbpp | {"task_id": number})).group for number in (10, 510, 511, 601)]
    assert parts == ["prompt", "test", "validation", "train"]


def test_a_folder_gives_its_sets_and_leaves_out_the_rest(tmp_path):
    write(tmp_path / "squad" / "dev.jsonl.xz", OPEN, OPEN)
    write(tmp_path / "nq_open_test.jsonl", OPEN)
    write(tmp_path / "text.jsonl", {"text": "A document."})
    write(tmp_path / "templates.json", "{")
    write(tmp_path / "readme.txt", "Read me.")
    found = read(str(tmp_path))
    assert [(one.name, one.family, len(one.questions)) for one in found] == [
        ("nq_open_test", "nq_open", 1),
        ("squad_dev", "squad", 2),
    ]
    assert len(read(str(tmp_path / "*.jsonl"))) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "A document."}],
            r"a\.jsonl:1: not a question; known are objects with the fields question, answers",
        ),
        (["{"], r"a\.jsonl:1: not a question"),
        ([OPEN, "{"], r"a\.jsonl:2: not JSON \(.*\); write one whole JSON object per line$"),
        (['{"question": "\\ud800", "answers": ["4"]}'], r"a\.jsonl:1: not JSON"),
        ([OPEN, {"question": "Who?"}], r"a\.jsonl:2: answers is missing$"),
        ([OPEN, OPEN | {"answers": []}], r"a\.jsonl:2: answers=\[\] must be a list of at least one$"),
        ([OPEN | {"answers": "Ché"}], r"a\.jsonl:1: answers=\"Ché\" must be a list$"),
        ([OPEN | {"answers": ["4", 4]}], r"a\.jsonl:1: answers\.1=4 must be a string$"),
        ([{"context": "", "qas": [{"question": "Who?", "answers": [None]}]}], r"qas\.0\.answers\.0=null must be a str"),
        (
            [{"question": "Which?", "choices": ["a", "b"], "answer": 1}],
            r"a\.jsonl:1: questions with choices are tasks of lm-eval: name a YAML file for them with --tasks",
        ),
        ([], r"a\.jsonl:1: the file holds no text"),
    ],
)
def test_anything_but_a_question_is_refused_with_its_line(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.jsonl", *rows))


def test_a_folder_without_questions_is_refused(tmp_path):
    write(tmp_path / "text.jsonl", {"text": "A document."})
    with pytest.raises(DataError, match="no file there holds questions; set --questions to one that does"):
        read(str(tmp_path))
    with pytest.raises(DataError, match="there is no such file; set --questions"):
        read(str(tmp_path / "none.jsonl"))
