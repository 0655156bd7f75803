"""Learn facts as a patch: measure before and after, and write the changed rows."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from memjax.data.sources import biographies
from memjax.data.sources.kinds import find_source
from memjax.data.sources.parsing import MalformedError
from memjax.data.sources.records import Record, Segment, text_of
from memjax.data.tokenizers.base import Tokenizer
from memjax.errors import DataError
from memjax.evaluation.perplexity import bits_per_byte
from memjax.evaluation.recall import answer_requests
from memjax.inference.scoring import score
from memjax.io.console import say, warn
from memjax.knowledge.background import background_of
from memjax.knowledge.corpus import open_corpus
from memjax.knowledge.facts import Fact, pairs_of
from memjax.knowledge.finetune import Recipe, learn
from memjax.knowledge.slots import Background
from memjax.models.decoder import Decoder
from memjax.monitoring.progress import Progress
from memjax.ops.tiles import next_power_of_two
from memjax.runs.load import LoadedModel
from memjax.runs.patches.edit import patch_between
from memjax.runs.patches.patch import Patch, write_patch

LEARNED = "learned"
"""Key in a patch's notes of the facts it was made from, as objects with the fields of FACTS."""
_SCORED_BYTES = 50_000
"""Bytes of the background on which bits per byte are measured."""
_PROGRESS_SECONDS = 5.0
"""Seconds between progress lines."""
NEW = "new facts"
"""The group of questions about the facts to learn."""
_SHOWN = 10
"""Questions that are still not answered, to print."""
_REPLAYED = 4_096
"""Background texts from which replayed ones are drawn."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Probe:
    """Measures a model before and after learning."""

    tokenizer: Tokenizer
    length: int
    """Tokens per window."""
    questions: Mapping[str, Sequence[Record]]
    """By group; the facts to learn are under NEW, if they are questions."""
    texts: Mapping[str, Sequence[str]]

    @classmethod
    def of(
        cls, loaded: LoadedModel, facts: Sequence[Fact], groups: Mapping[str, list[Record]], background: Sequence[str]
    ) -> "_Probe":
        """A probe of the facts, other groups of questions, and bits per byte of the background."""
        asked = {name: some for name, some in {NEW: _questions(facts), **groups}.items() if some}
        texts = {"bits per byte, background": background}
        if NEW not in asked:
            texts["bits per byte, facts"] = [text_of(fact.wordings[0]) for fact in facts]
        return cls(loaded.tokenizer, loaded.config.data.sequence_length, asked, texts)

    def unknown(self, model: Decoder) -> list[Record] | None:
        """The new questions that the model does not answer exactly; None if no new fact is a question."""
        if (questions := self.questions.get(NEW)) is None:
            return None
        found = are_known(model, self.tokenizer, questions, length=self.length)
        return list(itertools.compress(questions, ~found))

    def measure(self, model: Decoder) -> dict[str, float]:
        """The share of known answers for every group, and bits per byte for every text."""
        rates = {name: known(model, self.tokenizer, some, length=self.length) for name, some in self.questions.items()}
        bits = {
            name: bits_per_byte(
                model, self.tokenizer, some, sequence_length=self.length, batch_size=8, max_bytes=_SCORED_BYTES
            ).bits_per_byte
            for name, some in self.texts.items()
        }
        return rates | bits

    def table(self, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
        """Both measurements side by side."""
        lines = ["", f"{'':<34}{'before':>10}{'after':>10}"]
        for name, old in before.items():
            is_share = name in self.questions
            label, kind = (f"{name} ({len(self.questions[name]):,})", "10.1%") if is_share else (name, "10.4f")
            lines.append(f"{label:<34}{old:>{kind}}{after[name]:>{kind}}")
        return lines


def learn_facts(
    loaded: LoadedModel,
    facts: Sequence[Fact],
    held_out: Sequence[Fact] | None,
    recipe: Recipe,
    *,
    out: str,
    source: str,
    corpus: str | None,
    corpus_texts: int,
    most_questions: int,
) -> Patch:
    """Learns facts, prints what is known before and after, and writes the changed rows as a patch.

    Without held_out, the run's own questions are asked, if it has any. `corpus` is the background; None: the run's
    training data.

    Raises:
        DataError: the background cannot be read.
        CheckpointError: the patch cannot be written.
    """
    records = list(itertools.islice(open_corpus(loaded, corpus, "--background"), corpus_texts))
    background = background_of(loaded, records)
    groups = {name: _spread(some, most_questions) for name, some in _held_out(loaded, held_out).items()}
    probe = _Probe.of(loaded, facts, groups, list(map(text_of, records)))
    if problem := too_long(facts, loaded.tokenizer, probe.length):
        warn(problem)
    before, began = probe.measure(loaded.model), time.perf_counter()
    # Whether a text is known is not tested.
    is_known = before.get(NEW) == 1 and len(probe.questions[NEW]) == len(facts)
    if is_known:
        learned, last = loaded.model, "every fact was known before"
    else:
        learned, last = _learn(loaded, facts, background, records[:_REPLAYED], recipe, probe)
    seconds = time.perf_counter() - began
    say(f"learned in {seconds:.0f} s: {last}")
    patch = patch_between(loaded, learned, {})
    # Measure what is written: rows in the type of the run's tables.
    written = _found_with(learned, patch)
    after, unknown = probe.measure(written), probe.unknown(written) or []
    notes = {"made_by": "learn", "facts": len(facts), "source": source, "seconds": round(seconds, 2)}
    notes |= {LEARNED: [fact.fields() for fact in facts]}
    for moment, rates in (("before", before), ("after", after)):
        notes |= {f"{name} {moment}": value for name, value in rates.items()}
    patch = Patch(patch.base, patch.tables, notes)
    path = write_patch(out, patch)
    lines = probe.table(before, after)
    for name, change in patch.tables.items():
        lines.append(f"{f'rows changed in {name}':<34}{len(change.rows):>10,} of {change.num_slots:,}")
    say("\n".join([*lines, f"{'seconds a fact':<34}{seconds / len(facts):>10.2f}"]))
    if unknown:
        say("\n".join(["not known:", *shown(unknown)]))
    if not is_known and (hint := advice(patch, after.get(NEW, 1.0), recipe)) is not None:
        say(hint)
    say(f"written to {path}")
    return patch


def _learn(
    loaded: LoadedModel,
    facts: Sequence[Fact],
    background: Background,
    known: Sequence[Record],
    recipe: Recipe,
    probe: _Probe,
) -> tuple[Decoder, str]:
    """The model after the last epoch, or the first one after which it knows all facts; and a line about that epoch."""
    last = ""

    def after_epoch(epoch: int, loss: float, model: Decoder) -> bool:
        nonlocal last
        unknown = probe.unknown(model)
        rate = None if unknown is None else 1 - len(unknown) / len(probe.questions[NEW])
        last = f"loss {loss:.4f}" + ("" if rate is None else f"  {NEW} {rate:.1%}")
        progress.update(epoch, f"epoch {epoch}/{recipe.epochs}  {last}")
        last += f"  after {epoch} of {recipe.epochs} epochs"
        return rate == 1 and len(probe.questions[NEW]) == len(facts)

    with Progress(recipe.epochs, _PROGRESS_SECONDS) as progress:
        learned = learn(
            loaded.model,
            loaded.tokenizer,
            facts,
            background,
            recipe,
            longest=loaded.config.data.sequence_length,
            known=known,
            after_epoch=after_epoch,
        )
    return learned, last


def too_long(facts: Sequence[Fact], tokenizer: Tokenizer, length: int) -> str | None:
    """A warning about questions that do not fit into `length` tokens with their answers; None if all do."""
    questions = _questions(facts)
    long = [one for one, pairs in zip(questions, pairs_of(questions, tokenizer), strict=True) if len(pairs) > length]
    if not long:
        return None
    return (
        f"too long for the {length} tokens that the model was trained on (data.sequence_length): {len(long):,} of "
        f"{len(facts):,} facts, such as {_quoted(text_of(long[0]))}. The end of the answer is learned without the "
        "question, and will hardly be known; make the question or the answer shorter"
    )


def shown(questions: Sequence[Record]) -> list[str]:
    """The first questions with their answers, one a line, and how many more there are."""
    lines = [f"  {_quoted(text_of(one[:-1]))}: {_quoted(one[-1].text.strip())}" for one in questions[:_SHOWN]]
    return lines + ([f"  and {len(questions) - _SHOWN:,} more"] if len(questions) > _SHOWN else [])


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:96]} ...")


def advice(patch: Patch, known: float, recipe: Recipe) -> str | None:
    """What to try if the share of known facts is below 1 or the patch changes nothing; otherwise None."""
    longer, faster = f"--epochs {2 * recipe.epochs}", f"--lr {2 * recipe.lr:g}"
    if not patch.num_rows:
        return (
            "no row has changed: every slot that the facts read is read by all texts of the background too (give other "
            f"texts with --background), or the rate is too small for the numbers in the table ({faster})"
        )
    if known < 1:
        return f"not every fact is known; more passes ({longer}) or a higher rate ({faster}) help"
    return None


def facts_of(label: str, patch: Patch) -> list[Fact]:
    """The facts recorded in a patch, or in all sources of a merged one; DataError if there are none."""
    try:
        return [Fact.of_fields(fields) for notes in _sources(patch.notes) for fields in notes[LEARNED]]
    except (KeyError, TypeError, MalformedError) as error:
        raise DataError(f"{label}: records no facts to learn; name the file that it was made from") from error


def _sources(notes: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The notes of all patches that were merged, or these notes if none were."""
    if "sources" not in notes:
        yield notes
        return
    for source in notes["sources"]:
        yield from _sources(source["notes"])


def _found_with(model: Decoder, patch: Patch) -> Decoder:
    """The learned model with its changed rows as the patch stores them."""
    for name, change in patch.tables.items():
        rows = model.tables[name].rows
        rows[...] = rows[...].at[change.rows].set(change.new.astype(rows[...].dtype))
    return model


def known(model: Decoder, tokenizer: Tokenizer, questions: Sequence[Record], *, length: int) -> float:
    """Share of the questions that the model answers exactly, end of text included."""
    return float(np.mean(are_known(model, tokenizer, questions, length=length)))


def are_known(
    model: Decoder, tokenizer: Tokenizer, questions: Sequence[Record], *, length: int
) -> Bool[np.ndarray, " questions"]:
    """Whether the model answers each question exactly, end of text included."""
    requests = answer_requests(tokenizer, [(text_of(record[:-1]), record[-1].text) for record in questions])
    # Few questions are asked after every step: rows of padding would take as long as learning.
    batch_size = min(128, next_power_of_two(max(8, len(requests))))
    return np.array([found.is_greedy for found in score(model, requests, max_length=length, batch_size=batch_size)])


def _questions(facts: Sequence[Fact]) -> list[Record]:
    return [fact.question for fact in facts if fact.question is not None]


def _held_out(loaded: LoadedModel, held_out: Sequence[Fact] | None) -> dict[str, list[Record]]:
    if held_out is not None:
        return {"held-out questions": _questions(held_out)}
    people = find_source(loaded.config.data).people
    if people is None:
        return {}
    return {
        name: [
            (Segment(question.prompt, False), Segment(question.answer, True))
            for question in biographies.questions(people, asked)
        ]
        for name, asked in (("old facts, asked in training", True), ("old facts, seen, not asked", False))
    }


def _spread(questions: list[Record], most: int) -> list[Record]:
    """At most `most` of the questions, evenly spread."""
    step = max(1, -(-len(questions) // most))
    return questions[::step]
