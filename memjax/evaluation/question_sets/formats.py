"""Question sets in files of JSON lines, and the prompts that ask them.

These add to lm-eval's tasks: closed-book answers by relation, from files as published, and programs in a sandbox.
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import pydantic

from memjax.data.sources.files import DataFile, find_files
from memjax.data.sources.parsing import Keys, MalformedError
from memjax.data.sources.stream import Stream
from memjax.errors import DataError
from memjax.io.documents import listed

_SPLITS = ("train", "validation", "val", "dev", "test")
_MBPP_PARTS = {"prompt": 10, "test": 510, "validation": 600, "train": sys.maxsize}
"""The parts in which MBPP was published, with the number of each part's last task."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Base of all kinds of questions."""

    kind: ClassVar[str]
    text: str
    """The question, for people."""
    prompt: str
    """The question, for the model."""
    solved: str
    """The prompt with the right answer, as an example for other questions."""
    group: str | None = None
    """Group within the set, such as the relation of a fact."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OpenQuestion(Question):
    """A question that is answered in a few words."""

    kind: ClassVar = "open"
    answers: tuple[str, ...]
    """All accepted answers."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem(Question):
    """A function to write in Python."""

    kind: ClassVar = "program"
    beginning: str
    """Code before the model's text."""
    tests: str
    """Code after it; it fails unless the function is correct."""
    functions: tuple[str, ...]
    """Names of the functions to write."""
    stop: tuple[str, ...]
    """Strings that cannot occur in the function and show that the model has moved on to something else."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuestionSet:
    """The questions of a file, all of one kind."""

    path: pathlib.Path
    questions: tuple[Question, ...]

    @property
    def name(self) -> str:
        """Name of the file, prefixed by its folder's if the file is just called `dev` or the like."""
        name = self.path.name.partition(".")[0]
        return f"{self.path.resolve().parent.name}_{name}" if name in _SPLITS else name

    @property
    def family(self) -> str:
        """The name without the suffix of its split, such as `_dev`."""
        return re.sub(f"_({'|'.join(_SPLITS)})$", "", self.name)


def read_question_sets(paths: Sequence[str], *, field: str) -> list[QuestionSet]:
    """Reads the question sets in files, folders and globs; other files in folders are skipped.

    Raises:
        DataError: there is no question set, or a file cannot be read or holds something other than questions.
    """
    found = []
    for path in paths:
        is_whole = pathlib.Path(path).is_file()
        for file in find_files(path, "jsonl", field):
            if file.format != "jsonl" and not is_whole:
                continue
            layout = _layout(file, must_fit=is_whole)
            questions = tuple(_questions(file, layout)) if layout else ()
            if is_whole and not questions:
                raise DataError(f"{file.path}: holds no question: every list of questions in it is empty")
            if questions:
                found.append(QuestionSet(path=file.path, questions=questions))
    if not found:
        raise DataError(f"{', '.join(paths)}: no file there holds questions; set {field} to one that does: {_known()}")
    return found


class _Row(pydantic.BaseModel):
    """A line of a file; the layout is chosen by its required fields."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    def questions(self) -> Iterable[Question]:
        """The questions of the line."""
        raise NotImplementedError


class _OpenRow(_Row):
    question: str
    answers: tuple[str, ...] = pydantic.Field(min_length=1)
    relation: str | None = None

    def questions(self) -> Iterable[Question]:
        yield _open_question(self.question, self.answers, group=self.relation)


class _ParagraphQuestion(pydantic.BaseModel):
    question: str
    answers: tuple[str, ...] = pydantic.Field(min_length=1)


class _ParagraphRow(_Row):
    context: str
    qas: tuple[_ParagraphQuestion, ...]

    def questions(self) -> Iterable[Question]:
        """The questions about the paragraph, closed-book: without the paragraph."""
        return (_open_question(item.question, item.answers) for item in self.qas)


class _HumanEvalRow(_Row):
    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    def questions(self) -> Iterable[Question]:
        """The signature and docstring of a function, whose body the model writes."""
        # Tests may call the code before the function too: the original, not what the program makes of it.
        helpers = self.prompt.rpartition(f"\ndef {self.entry_point}(")[0]
        yield Problem(
            text=self.task_id,
            prompt=self.prompt,
            solved=self.prompt + self.canonical_solution,
            beginning=self.prompt,
            tests=f"{helpers}\n{self.test}\ncheck({self.entry_point})",
            functions=(self.entry_point,),
            stop=("\ndef ", "\nclass ", "\nif ", "\nprint(", "\n#", "\n@"),
        )


class _MbppRow(_Row):
    task_id: int
    text: str
    code: str
    test_list: tuple[str, ...] = pydantic.Field(min_length=1)
    test_setup_code: str = ""

    def questions(self) -> Iterable[Question]:
        """A docstring with the task and its assertions, after which the model writes the function."""
        tests = "\n".join(self.test_list)
        prompt = f'"""\n{self.text}\n{tests}\n"""\n'
        yield Problem(
            text=f"MBPP/{self.task_id}",
            group=next(name for name, last in _MBPP_PARTS.items() if self.task_id <= last),
            prompt=prompt,
            solved=prompt + self.code.replace("\r\n", "\n"),
            beginning="",
            tests=f"{self.test_setup_code}\n{tests}",
            functions=tuple(re.findall(r"^(?:def|class) (\w+)", self.code, re.MULTILINE)),
            stop=('\n"""', "\nassert ", "\nprint(", "\nif "),
        )


_LAYOUTS: tuple[type[_Row], ...] = (_OpenRow, _ParagraphRow, _HumanEvalRow, _MbppRow)
"""A line has the first layout whose required fields it all has."""
_RULES = {
    "string_type": "a string",
    "int_type": "a whole number",
    "tuple_type": "a list",
    "too_short": "a list of at least one",
}
"""What fields must be, by pydantic's type of the error."""


def _open_question(text: str, answers: tuple[str, ...], *, group: str | None = None) -> OpenQuestion:
    prompt = f"Question: {text}\nAnswer:"
    return OpenQuestion(text=text, prompt=prompt, solved=f"{prompt} {answers[0]}", group=group, answers=answers)


def _required(layout: type[_Row]) -> list[str]:
    return [name for name, field in layout.model_fields.items() if field.is_required()]


def _known() -> str:
    return "objects with the fields " + "; ".join(", ".join(_required(layout)) for layout in _LAYOUTS)


def _layout(file: DataFile, *, must_fit: bool) -> type[_Row] | None:
    """The layout of a file's lines, judged by the first; for other content None, or DataError if `must_fit` is set."""
    number, payload = next(iter(Stream(file, Keys())))
    try:
        fields = json.loads(payload) if isinstance(payload, bytes) else None
    except (ValueError, RecursionError):
        fields = None
    names = fields if isinstance(fields, dict) else {}
    found = next((layout for layout in _LAYOUTS if all(name in names for name in _required(layout))), None)
    if found is None and must_fit:
        problem = payload if isinstance(payload, MalformedError) else f"not a question; known are {_known()}"
        if "choices" in names:
            problem = "questions with choices are tasks of lm-eval: name a YAML file for them with --tasks"
        raise DataError(f"{file.path}:{number}: {problem}")
    return found


def _questions(file: DataFile, layout: type[_Row]) -> Iterator[Question]:
    for number, payload in Stream(file, Keys()):
        try:
            if not isinstance(payload, bytes):
                raise DataError(f"{file.path}:{number}: {payload}")
            # Validated from JSON, because only then does pydantic's strict mode accept lists for tuples.
            yield from layout.model_validate_json(payload).questions()
        except pydantic.ValidationError as error:
            raise DataError(f"{file.path}:{number}: {_explained(error)}") from error


def _explained(error: pydantic.ValidationError) -> str:
    """The first problem of a line: the field, its value and the rule."""
    first = error.errors(include_url=False)[0]
    name, rule = ".".join(map(str, first["loc"])), _RULES.get(first["type"])
    if first["type"] == "json_invalid":
        return f"not JSON ({first['msg']}); write one whole JSON object per line"
    if first["type"] == "missing":
        return f"{name} is missing"
    return f"{name}={json.dumps(first['input'], ensure_ascii=False)[:100]} must be {rule}" if rule else listed(error)
