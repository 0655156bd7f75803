"""Sets of questions in files of JSON lines: what is asked in them, and how it is put to a language model.

What lm-eval's tasks lack: closed-book answers by relation from files as they are published, and programs in a sandbox.
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
"""The parts that MBPP was published in, with the number of the last task of each."""


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
    """All that are right."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem(Question):
    """A function to write in Python."""

    kind: ClassVar = "program"
    beginning: str
    """Code in front of the model's text."""
    tests: str
    """Code after it: fails unless the function is right."""
    functions: tuple[str, ...]
    """Names of what to write."""
    stop: tuple[str, ...]
    """Strings that the function cannot hold, with which a model begins something else."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuestionSet:
    """The questions of a file, all of one kind."""

    path: pathlib.Path
    questions: tuple[Question, ...]

    @property
    def name(self) -> str:
        """Name of the file, with that of its folder where the file is only called `dev` or the like."""
        name = self.path.name.partition(".")[0]
        return f"{self.path.resolve().parent.name}_{name}" if name in _SPLITS else name

    @property
    def family(self) -> str:
        """The name without what says which part of the questions it is."""
        return re.sub(f"_({'|'.join(_SPLITS)})$", "", self.name)


def read_question_sets(paths: Sequence[str], *, field: str) -> list[QuestionSet]:
    """The sets of some files, folders and globs; in folders, files with anything else are left out.

    Raises:
        DataError: a file cannot be read, holds something else than questions, or there is none.
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
        """The begin of a function, which its body is to follow."""
        # Tests call what stands in front of it, too, and not what a program makes of that.
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
        """A docstring with the task and what must hold, which the function is to follow."""
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
"""A line has the first layout all of whose required fields it has."""


def _open_question(text: str, answers: tuple[str, ...], *, group: str | None = None) -> OpenQuestion:
    prompt = f"Question: {text}\nAnswer:"
    return OpenQuestion(text=text, prompt=prompt, solved=f"{prompt} {answers[0]}", group=group, answers=answers)


def _required(layout: type[_Row]) -> list[str]:
    return [name for name, field in layout.model_fields.items() if field.is_required()]


def _known() -> str:
    return "objects with the fields " + "; ".join(", ".join(_required(layout)) for layout in _LAYOUTS)


def _layout(file: DataFile, *, must_fit: bool) -> type[_Row] | None:
    """The layout of a file's lines, by its first one; None if it holds something else.

    Raises:
        DataError: it is something else, and must not be.
    """
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
            # JSON is what pydantic reads strictly and yet turns lists into tuples from.
            yield from layout.model_validate_json(payload).questions()
        except pydantic.ValidationError as error:
            raise DataError(f"{file.path}:{number}: {listed(error)}") from error
