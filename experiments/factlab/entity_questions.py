"""Real facts: EntityQuestions (arXiv:2109.08535), stated in four wordings per relation and tested by its questions.

The user provides the file (JSON lines with relation, subject, question and answers, optionally .xz). `prepare` converts
it once to token arrays, from which `question_rows` reads as many facts as a run needs.
"""

import collections
import io
import itertools
import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from factlab import lines
from factlab.rows import BOS, EOS, FactRows
from memjax.data.tokenizers.base import Tokenizer
from memjax.data.tokenizers.bpe import train_bpe
from memjax.errors import DataError
from memjax.evaluation.question_sets.metrics import best, exact_match
from memjax.io.files import write_atomic

STATEMENTS = {
    "P19": ("{} was born in", "The birthplace of {} is", "The first home of {} was in", "{} came into the world in"),
    "P20": ("{} died in", "The place where {} died is", "{} passed away in", "The life of {} ended in"),
    "P26": ("{} is married to", "The spouse of {} is", "{} shares a life with", "The wedding of {} was with"),
    "P36": ("The capital of {} is", "{} is governed from", "The seat of government of {} is", "{} has its capital in"),
    "P40": ("{} is a parent of", "A child of {} is", "{} brought up", "The family of {} includes a child called"),
    "P50": ("{} was written by", "The author of {} is", "The book {} is by", "The text of {} is the work of"),
    "P69": ("{} was educated at", "{} went to", "The school of {} was", "{} was a student at"),
    "P112": ("{} was founded by", "The founder of {} is", "{} was set up by", "The person who began {} is"),
    "P127": ("{} is owned by", "The owner of {} is", "{} belongs to", "{} is the property of"),
    "P131": ("{} is located in", "{} is a part of", "{} can be found in", "The region around {} is"),
    "P136": ("{} plays", "The genre of {} is", "The music of {} is", "{} is known for a style called"),
    "P159": ("{} is based in", "The headquarters of {} are in", "{} is run from", "The head office of {} is in"),
    "P170": ("{} was created by", "The creator of {} is", "{} is a creation of", "{} was made by"),
    "P175": ("{} was performed by", "The performer of {} is", "{} was sung by", "The artist behind {} is"),
    "P176": ("{} is produced by", "The manufacturer of {} is", "{} is built by", "The company that makes {} is"),
    "P264": ("{} recorded for", "The label of {} is", "{} is represented by", "Records of {} came out with"),
    "P276": ("{} lies in", "The location of {} is", "{} is to be found at", "One finds {} in"),
    "P740": ("{} was formed in", "{} started in", "The place where {} began is", "{} has its origin in"),
    "P800": ("{} is famous for", "A notable work of {} is", "{} is best known for", "The fame of {} rests on"),
}
"""Four wordings of each relation; the answer follows. P495, P413, P106, P407 and P17 are excluded: always giving the
commonest answer is correct for 22 to 72 % of their questions."""

LEFT_OUT = ("P495", "P413", "P106", "P407", "P17")
MAX_LENGTH = 20
"""Tokens per row; facts with a longer row are excluded."""


class Fact(NamedTuple):
    relation: str
    subject: str
    question: str
    answers: tuple[str, ...]
    """All accepted answers; the first one is stated in training."""


def read_facts(path: pathlib.Path) -> list[Fact]:
    """The facts of the relations above in file order, one per subject and relation.

    Raises:
        DataError: the file is missing, or a line is not a question of EntityQuestions.
    """
    if not path.exists():
        raise DataError(
            f"{path}: there is no such file; name EntityQuestions' training part (JSON lines, as they are or .xz), "
            "which https://github.com/princeton-nlp/EntityQuestions offers"
        )
    found: dict[tuple[str, str], Fact] = {}
    for number, row in enumerate(lines.read(path), start=1):
        try:
            fact = Fact(row["relation"], row["subject"], row["question"], tuple(row["answers"]))
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: needs relation, subject, question and answers ({error!r})") from error
        if fact.relation in STATEMENTS and fact.answers:
            known = found.get((fact.relation, fact.subject))
            both = dict.fromkeys((*known.answers, *fact.answers)) if known else fact.answers
            found[fact.relation, fact.subject] = fact._replace(answers=tuple(both))
    return list(found.values())


def prepare(source: pathlib.Path, target: pathlib.Path, *, vocab_size: int, seed: int = 0) -> int:
    """Writes the facts in all wordings as token arrays, in random order; returns their number."""
    facts = read_facts(source)
    facts = [facts[i] for i in np.random.default_rng(seed).permutation(len(facts))]
    prompts = [
        [fact.question, *(wording.format(fact.subject) for wording in STATEMENTS[fact.relation])] for fact in facts
    ]
    answers = [f" {fact.answers[0]}" for fact in facts]
    told = [f"{prompt}{answer}" for row, answer in zip(prompts, answers, strict=True) for prompt in row]
    tokenizer = train_bpe(told[:: max(1, len(told) // 200_000)], vocab_size)
    encoded = iter(tokenizer.encode_batch([prompt for row in prompts for prompt in row]))
    rows, ends, kept = [], [], []
    for place, (row, answer) in enumerate(zip(prompts, tokenizer.encode_batch(answers), strict=True)):
        heads = [[BOS, *next(encoded)] for _ in row]
        if max(map(len, heads)) + len(answer) <= MAX_LENGTH:
            rows.append([head + answer + [EOS] for head in heads])
            ends.append([(len(head), len(head) + len(answer) + 1) for head in heads])
            kept.append(place)
    if not rows:
        raise DataError(f"{source}: no fact of the known relations fits in {MAX_LENGTH} tokens of {vocab_size:,}")
    tokens = np.zeros((len(rows), len(rows[0]), MAX_LENGTH + 1), np.uint16)
    for fact, sentences in enumerate(rows):
        for wording, sentence in enumerate(sentences):
            tokens[fact, wording, : len(sentence)] = sentence
    content = io.BytesIO()
    np.savez_compressed(
        content,
        tokens=tokens,
        answers=np.array(ends, np.uint8),
        relations=np.array([facts[place].relation for place in kept]),
        subjects=np.array([facts[place].subject for place in kept]),
        accepted=np.array([json.dumps(facts[place].answers, ensure_ascii=False) for place in kept]),
        tokenizer=np.array(json.dumps(tokenizer.to_state(), ensure_ascii=False)),
    )
    write_atomic(target, content.getvalue())
    print(
        f"{len(kept):,} of {len(facts):,} facts in at most {MAX_LENGTH} tokens, {tokenizer.vocab_size:,} tokens known"
    )
    return len(kept)


class Questions(NamedTuple):
    """Facts read from the file that `prepare` wrote."""

    rows: FactRows
    accepted: list[list[str]]
    tokenizer: Tokenizer

    def grade(self, written: dict[int, list[int]]) -> dict[str, Any]:
        """Exact match (as for SQuAD) of generated answers (token ids by fact index), overall and by relation."""
        right = collections.defaultdict(list)
        for fact, ids in written.items():
            text = self.tokenizer.decode(ids[: ids.index(EOS)] if EOS in ids else ids)
            name = self.rows.group_names[self.rows.groups[fact]]
            right[name].append(best(exact_match, text, self.accepted[fact]))
        by_relation = {name: sum(marks) / len(marks) for name, marks in sorted(right.items())}
        return {
            "exact_match": sum(map(sum, right.values())) / len(written),
            "exact_match_questions": len(written),
            "exact_match_by_relation": by_relation,
            "commonest_answer": self._guessed(list(written)),
        }

    def _guessed(self, facts: list[int]) -> float:
        """Exact match of always giving the relation's commonest answer."""
        groups = self.rows.groups.tolist()
        told = collections.defaultdict(collections.Counter)
        for group, accepted in zip(groups, self.accepted, strict=True):
            told[group][accepted[0]] += 1
        commonest = {group: answers.most_common(1)[0][0] for group, answers in told.items()}
        return sum(best(exact_match, commonest[groups[fact]], self.accepted[fact]) for fact in facts) / len(facts)


def question_rows(path: pathlib.Path, count: int | None, told: int | None = None) -> Questions:
    """The first `count` facts (None: all). Training never includes the question of every second fact.

    With `told`, only that many facts are stated in training; others are kept only if their subject is neither the
    subject nor an answer of a stated fact.

    Raises:
        DataError: the file is missing or holds fewer facts.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file; make it with `run.py --prepare QUESTIONS`")
    with np.load(path) as file:
        arrays = {name: file[name] if name == "tokenizer" else file[name][:count] for name in file.files}
    if count is not None and len(arrays["tokens"]) < count:
        raise DataError(f"{path}: holds {len(arrays['tokens']):,} facts, fewer than the {count:,} that are asked for")
    if told is not None:
        known = {*arrays["subjects"][:told], *itertools.chain(*map(json.loads, arrays["accepted"][:told]))}
        keep = [place < told or subject not in known for place, subject in enumerate(arrays["subjects"])]
        arrays |= {name: array[keep] for name, array in arrays.items() if name != "tokenizer"}
    names = tuple(STATEMENTS)
    groups = np.array([names.index(relation) for relation in arrays["relations"]], np.int32)
    accepted = [json.loads(answers) for answers in arrays["accepted"]]
    tokenizer = Tokenizer.from_state(json.loads(str(arrays["tokenizer"])))
    pairs = [(relation, answers[0]) for relation, answers in zip(groups.tolist(), accepted, strict=True)]
    often, of_relation = collections.Counter(pairs), collections.Counter(groups.tolist())
    rows = FactRows(
        tokens=arrays["tokens"].astype(np.int32),
        answers=arrays["answers"].astype(np.int32),
        first_wording=np.arange(len(groups), dtype=np.int32) % 2,
        groups=groups,
        bits=np.array([math.log2(of_relation[fact[0]] / often[fact]) for fact in pairs]),
        group_names=names,
        vocab_size=tokenizer.vocab_size,
        told=(np.arange(len(groups)) < (len(groups) if told is None else told)).astype(np.int32),
    )
    return Questions(rows, accepted, tokenizer)
