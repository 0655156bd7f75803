"""Learns facts as a patch: counts the background, measures before and after, and writes the changed rows."""

import itertools
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from memjax.checkpoint.digests import text_digest
from memjax.data.sources import biographies
from memjax.data.sources.kinds import find_source
from memjax.data.sources.parsing import MalformedError
from memjax.data.sources.records import Record, Segment
from memjax.data.tokenizers.base import Tokenizer
from memjax.errors import DataError
from memjax.evaluation.perplexity import bits_per_byte
from memjax.inference.scoring import Request, score
from memjax.io.console import say, warn
from memjax.io.files import check_inside, read_document, write_atomic
from memjax.knowledge.corpus import open_corpus
from memjax.knowledge.facts import Fact
from memjax.knowledge.finetune import Recipe, learn
from memjax.knowledge.slots import Background, count_texts
from memjax.models.decoder import Decoder
from memjax.monitoring.progress import Progress
from memjax.runs.load import LoadedModel
from memjax.runs.patches.applied import model_digest
from memjax.runs.patches.edit import patch_between
from memjax.runs.patches.patch import Patch, write_patch

LEARNED = "learned"
"""Key of a patch's notes with the facts that it was made of, as objects with the fields of FACTS."""
_SCORED_BYTES = 50_000
"""Bytes of the background on which bits per byte are measured."""
_PROGRESS_SECONDS = 5.0
"""Between two lines of progress."""
_REPLAYED = 4_096
"""Texts of the background from which those are drawn that are learned again."""


def learn_facts(
    found: LoadedModel,
    facts: Sequence[Fact],
    held_out: Sequence[Fact] | None,
    recipe: Recipe,
    *,
    out: str,
    source: str,
    corpus: str | None = None,
    corpus_texts: int = 20_000,
    most_questions: int = 1_000,
) -> Patch:
    """Learns facts, prints what is known before and after, and writes the rows that differ as a patch.

    Args:
        found: the run's model.
        facts: what to learn.
        held_out: questions to ask besides; None asks the run's own where it has some.
        recipe: how to learn.
        out: the patch's file or folder.
        source: where the facts are from, for the patch's notes.
        corpus: the background; None is what the run was trained on.
        corpus_texts: the most texts of it that are read.
        most_questions: the most held-out questions of a kind that are asked.

    Raises:
        DataError: the background cannot be read.
        CheckpointError: the patch cannot be written.
    """
    model, tokenizer = found.model, found.tokenizer
    length = found.config.data.sequence_length
    records = list(itertools.islice(open_corpus(found, corpus, "--background"), corpus_texts))
    background = _background(found, records)
    groups = {"new facts": _questions(facts)} | {
        name: _spread(questions, most_questions) for name, questions in _held_out(found, held_out).items()
    }
    groups = {name: questions for name, questions in groups.items() if questions}
    texts = {"bits per byte, background": [_text(record) for record in records]}
    if "new facts" not in groups:
        texts["bits per byte, facts"] = [_text(fact.wordings[0]) for fact in facts]

    def measure(model: Decoder) -> dict[str, float]:
        rates = {name: known(model, tokenizer, questions, length=length) for name, questions in groups.items()}
        return rates | {
            name: bits_per_byte(
                model, tokenizer, some, sequence_length=length, batch_size=8, max_bytes=_SCORED_BYTES
            ).bits_per_byte
            for name, some in texts.items()
        }

    last = ""

    def tell(epoch: int, loss: float, model: Decoder) -> bool:
        nonlocal last
        rate = known(model, tokenizer, groups["new facts"], length=length) if "new facts" in groups else None
        last = f"loss {loss:.4f}" + ("" if rate is None else f"  new facts {rate:.1%}")
        progress.update(epoch, f"epoch {epoch}/{recipe.epochs}  {last}")
        last += f"  after {epoch} of {recipe.epochs} epochs"
        return rate == 1

    before, began = measure(model), time.perf_counter()
    with Progress(recipe.epochs, _PROGRESS_SECONDS) as progress:
        learned = learn(
            model, tokenizer, facts, background, recipe, longest=length, known=records[:_REPLAYED], after_epoch=tell
        )
    seconds = time.perf_counter() - began
    say(f"learned in {seconds:.0f} s: {last}")
    patch = patch_between(found, learned, {})
    # What is written is what is measured: rows in the type of the run's tables.
    after = measure(found_with(learned, patch))
    notes = {"made_by": "learn", "facts": len(facts), "source": source, "seconds": round(seconds, 2)}
    notes |= {LEARNED: [fact.fields() for fact in facts]}
    for moment, rates in (("before", before), ("after", after)):
        notes |= {f"{name} {moment}": value for name, value in rates.items()}
    patch = Patch(patch.base, patch.tables, notes)
    path = write_patch(out, patch)
    say("\n".join(_report(groups, before, after, patch, seconds / len(facts))))
    say(f"written to {path}")
    return patch


def facts_of(label: str, patch: Patch) -> list[Fact]:
    """The facts that a patch was made of, which it keeps; a merged one those of all its sources.

    Raises:
        DataError: it keeps none.
    """
    try:
        return [Fact.of_fields(fields) for notes in _sources(patch.notes) for fields in notes[LEARNED]]
    except (KeyError, TypeError, MalformedError) as error:
        raise DataError(
            f"{label}: holds no facts that could be learned again; name the file that it was made of"
        ) from error


def _sources(notes: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The notes of the patches that were merged, or these."""
    if "sources" not in notes:
        yield notes
        return
    for source in notes["sources"]:
        yield from _sources(source["notes"])


def found_with(model: Decoder, patch: Patch) -> Decoder:
    """A learned model with its changed rows as the patch has them."""
    for name, change in patch.tables.items():
        rows = model.tables[name].rows
        rows[...] = rows[...].at[change.rows].set(change.new.astype(rows[...].dtype))
    return model


def _report(
    groups: Mapping[str, Sequence[Record]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    patch: Patch,
    seconds: float,
) -> list[str]:
    lines = ["", f"{'':<34}{'before':>10}{'after':>10}"]
    for name, old in before.items():
        label = f"{name} ({len(groups[name]):,})" if name in groups else name
        kind = "10.1%" if name in groups else "10.4f"
        lines.append(f"{label:<34}{old:>{kind}}{after[name]:>{kind}}")
    for name, change in patch.tables.items():
        lines.append(f"{f'rows changed in {name}':<34}{len(change.rows):>10,} of {change.num_slots:,}")
    return [*lines, f"{'seconds a fact':<34}{seconds:>10.2f}"]


def known(model: Decoder, tokenizer: Tokenizer, questions: Sequence[Record], *, length: int) -> float:
    """Share of the questions that the model answers exactly, end of text included."""
    requests = []
    for record in questions:
        *before, answer = (tokenizer.encode(segment.text) for segment in record)
        requests.append(Request([tokenizer.bos_id, *itertools.chain(*before)], [*answer, tokenizer.eos_id]))
    return float(np.mean([found.is_greedy for found in score(model, requests, max_length=length, batch_size=128)]))


def _questions(facts: Sequence[Fact]) -> list[Record]:
    return [fact.question for fact in facts if fact.question is not None]


def _held_out(found: LoadedModel, held_out: Sequence[Fact] | None) -> dict[str, list[Record]]:
    if held_out is not None:
        return {"held-out questions": _questions(held_out)}
    people = find_source(found.config.data).people
    if people is None:
        return {}
    return {
        name: [
            (Segment(question.prompt, False), Segment(question.answer, True))
            for question in biographies.questions(people, asked)
        ]
        for name, asked in (("old facts, asked in training", True), ("old facts, only told there", False))
    }


def _spread(questions: list[Record], most: int) -> list[Record]:
    """At most so many, evenly spread."""
    step = max(1, -(-len(questions) // most))
    return questions[::step]


def _text(record: Record) -> str:
    return "".join(segment.text for segment in record)


def _background(found: LoadedModel, records: Sequence[Record]) -> Background:
    """Document frequency of every slot in the records, cached in the run's folder where that is writable."""
    length = found.config.data.sequence_length
    content = [_text(record) for record in records]
    asked = {
        "model": model_digest(found.checkpoints, found.step),
        "texts": text_digest(content),
        "sequence_length": length,
    }
    path = found.folder / "knowledge" / f"background-{text_digest(asked)[:16]}.safetensors"
    sizes = {name: found.model.config.tables[name].num_slots for name in found.model.config.tables}
    if (kept := _kept(path, sizes)) is not None:
        return kept
    say(f"counting the slots that {len(records):,} texts read")
    counted = count_texts(found.model, found.tokenizer, records, length=length)
    arrays = {"texts": np.asarray(counted.texts)} | {f"counts/{name}": total for name, total in counted.counts.items()}
    try:
        check_inside(path.parent, found.folder)
        write_atomic(path, safetensors.numpy.save(arrays))
    except OSError as error:
        warn(f"the counts are not kept: {path.parent}: {error.strerror}")
    return counted


def _kept(path: pathlib.Path, sizes: Mapping[str, int]) -> Background | None:
    """The counts of a file; None where there is none, or what is there is damaged."""
    try:
        arrays = safetensors.numpy.load(read_document(path, None))
        counts = {name.removeprefix("counts/"): array for name, array in arrays.items() if name != "texts"}
        if not counts or any(array.shape != (sizes[name],) for name, array in counts.items()):
            return None
        return Background(int(arrays["texts"]), counts)
    except Exception:  # kinds of the library's own, and whatever the file makes of the rest
        return None
