"""Recall of facts, compared with the majority baseline and with the model without its tables."""

import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from memjax.config.data import DataConfig
from memjax.data.sources import biographies
from memjax.data.sources.biographies import Question
from memjax.data.tokenizers.base import Tokenizer
from memjax.inference.scoring import Place, ScoreRequest, score, to_device
from memjax.inference.streaming import generate
from memjax.models.decoder import Decoder
from memjax.models.parts import split_decoder
from memjax.ops.table import Table

_SAMPLES = 3
"""Questions of each kind whose answers are shown."""
_SAMPLE_TOKENS = 24


class Recall(NamedTuple):
    """Exact match of a model's answers."""

    correct: Bool[np.ndarray, " questions"]
    accuracy: float
    """Share of the questions answered correctly."""
    by_attribute: dict[str, float]
    """The same for the questions about each attribute."""


def recall(
    model: Decoder,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    batch_size: int = 256,
    place: Place = to_device,
) -> Recall:
    """Exact match of greedy answers, end of text included.

    Each answer is checked in one forward pass: every token of the true answer, and the end token after it, must be the
    likeliest given what precedes it. This holds exactly when greedy decoding would produce the true answer, because
    both see the same tokens up to the first difference.

    Under a mesh, batch_size must be a multiple of its devices.

    Raises:
        ValueError: there are no questions.
    """
    if not questions:
        raise ValueError("there are no questions to ask")
    requests = answer_requests(tokenizer, [(question.prompt, question.answer) for question in questions])
    correct = np.array([one.is_greedy for one in score(model, requests, batch_size=batch_size, place=place)])
    asked = defaultdict(list)
    for question, right in zip(questions, correct, strict=True):
        asked[question.attribute].append(right)
    by_attribute = {attribute: float(np.mean(rights)) for attribute, rights in asked.items()}
    return Recall(correct, float(correct.mean()), by_attribute)


def answer_requests(tokenizer: Tokenizer, asked: Sequence[tuple[str, str]], *, end: bool = True) -> list[ScoreRequest]:
    """Requests to score answers given prompts, encoded separately as in training; `end` scores the end token too."""
    prompts = tokenizer.encode_batch([prompt for prompt, _ in asked])
    answers = tokenizer.encode_batch([answer for _, answer in asked])
    last = [tokenizer.eos_id] if end else []
    return [
        ScoreRequest([tokenizer.bos_id, *prompt], [*answer, *last])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def majority_guess(train_questions: Sequence[Question], questions: Sequence[Question]) -> float:
    """Accuracy on `questions` of always giving the attribute's most common answer in `train_questions`."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train_questions:
        seen[question.attribute][question.answer] += 1
    guess = {attribute: answers.most_common(1)[0][0] for attribute, answers in seen.items()}
    right = sum(guess.get(question.attribute) == question.answer for question in questions)
    return right / len(questions) if questions else 0.0


def zero_tables(model: Decoder, *, donate: bool = False) -> Decoder:
    """The model with all its tables zeroed, so that only its dense parameters can know anything.

    With `donate`, the model's own tables are freed first: this needs no extra memory, but the model is then unusable.
    """
    parts, params, tables = split_decoder(model)
    zeroed = {}
    for name, table in tables.items():
        if isinstance(table, Table):
            zeroed[name] = table.zeroed()
            continue
        shape, dtype, sharding = table.shape, table.dtype, table.sharding
        if donate:
            table.delete()
        zeroed[name] = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    return parts.merge(params, zeroed)


def fact_report(
    model: Decoder,
    tokenizer: Tokenizer,
    config: DataConfig,
    limit_people: int | None = None,
    *,
    batch_size: int = 256,
    place: Place = to_device,
    zeroed: bool = True,
    donate: bool = False,
) -> dict[str, Any]:
    """The recall test of a run on biographies, as JSON values.

    `asked` and `held_out` (omitted if they have no people) each hold `questions`, `accuracy`, `by_attribute`,
    `majority_guess` and `samples`; with memory layers also `zeroed_accuracy` and `zeroed_by_attribute`.

    Args:
        model: a model of biographies.
        tokenizer: the one it was trained with.
        config: the data it was trained on.
        limit_people: at most this many people of each group; None for all.
        batch_size: questions per batch; under a mesh, a multiple of its devices.
        place: puts a batch on the devices.
        zeroed: ask again with the model's tables zeroed.
        donate: zero the tables in place, after which the model is unusable; otherwise the zeroed tables need as much
            memory again.
    """
    asked = biographies.questions(config.biographies, asked=True)
    groups = {
        name: biographies.questions(config.biographies, asked=name == "asked", limit_people=limit_people)
        for name in ("asked", "held_out")
    }
    groups = {name: questions for name, questions in groups.items() if questions}
    report: dict[str, Any] = {}
    for name, questions in groups.items():
        found = recall(model, tokenizer, questions, batch_size=batch_size, place=place)
        report[name] = {
            "questions": len(questions),
            "accuracy": found.accuracy,
            "by_attribute": found.by_attribute,
            # If training asked no questions, the baseline comes from the held-out ones themselves.
            "majority_guess": majority_guess(asked or questions, questions),
            "samples": [_sample(model, tokenizer, question) for question in _spread(questions)],
        }
    if zeroed and model.config.lookups:
        without = zero_tables(model, donate=donate)
        for name, questions in groups.items():
            found = recall(without, tokenizer, questions, batch_size=batch_size, place=place)
            report[name]["zeroed_accuracy"] = found.accuracy
            report[name]["zeroed_by_attribute"] = found.by_attribute
    return report


def format_fact_report(report: Mapping[str, Any]) -> str:
    """The report as text for the terminal."""
    titles = {"asked": "asked in training", "held_out": "seen, not asked"}
    groups = {titles[name]: group for name, group in report.items() if name in titles}
    lines = ["Recall of facts: exact answers to questions", "", _row("", groups)]
    lines.append(_row("questions", [f"{group['questions']:,}" for group in groups.values()]))

    def add(label: str, values: list[float | None]) -> None:
        lines.append(_row(label, ["" if value is None else f"{value:.1%}" for value in values]))

    add("recall", [group["accuracy"] for group in groups.values()])
    if any("zeroed_accuracy" in group for group in groups.values()):
        add("  with tables zeroed", [group.get("zeroed_accuracy") for group in groups.values()])
    add("  commonest answer", [group["majority_guess"] for group in groups.values()])
    lines.append("")
    for attribute in biographies.attribute_names:
        add(attribute.replace("_", " "), [group["by_attribute"].get(attribute) for group in groups.values()])
    for title, group in groups.items():
        lines += ["", f"{title[0].upper()}{title[1:]}:"]
        for sample in group["samples"]:
            mark = "right" if sample["answer"] == sample["expected"] else f"expected {sample['expected']!r}"
            text = f"{sample['prompt']} {sample['answer']!r} ({mark})"
            lines += textwrap.wrap(text, 118, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _row(label: str, cells: Any) -> str:
    return f"{label:<21}" + "".join(f"{cell:>19}" for cell in cells).rstrip()


def _spread(questions: Sequence[Question]) -> list[Question]:
    """A few questions, about different people and attributes if there are enough."""
    per_person = len(biographies.attribute_names)
    count = min(_SAMPLES, len(questions) // per_person)
    step = len(questions) // per_person // max(1, count)
    return [questions[i * step * per_person + 2 * i % per_person] for i in range(count)]


def _sample(model: Decoder, tokenizer: Tokenizer, question: Question) -> dict[str, str]:
    prompt = tokenizer.prompt(tokenizer.encode(question.prompt))
    tokens = generate(model, prompt, max_tokens=_SAMPLE_TOKENS, stop_ids=tokenizer.end_ids)
    return {"prompt": question.prompt, "answer": tokenizer.decode(tokens).strip(), "expected": question.answer.strip()}
