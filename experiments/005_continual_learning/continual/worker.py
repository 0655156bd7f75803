"""A process that teaches facts to bases: `python -m continual.worker`, started by factlab.runs."""

import contextlib
import fcntl
import functools
import itertools
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from factlab.worker import environment, serve

from continual import facts as sets
from continual.measures import OfEdits, OfFacts, Questions, text_bits
from continual.methods import ROWS, Method, changed_rows, teach
from memjax.data.sources.records import Segment
from memjax.io.files import write_atomic
from memjax.knowledge.slots import Background, count_texts
from memjax.models.decoder import Decoder
from memjax.models.parts import split_decoder, writable
from memjax.runs.load import load

ROOT = pathlib.Path(__file__).resolve().parents[3]


class Base:
    """A trained base, and the tests for models derived from it."""

    def __init__(self, task: dict[str, Any]):
        data, work, self.size = pathlib.Path(task["data"]), pathlib.Path(task["work"]), task["size"]
        old = sets.old_facts(data, self.size["old"])
        self.train_seconds = _train(task, data, work, old)
        found = load(work / f"base{task['seed']}")
        self.model, self.tokenizer = found.model, found.tokenizer
        self.length = found.config.data.sequence_length
        self.texts = sets.held_out_text(data, self.size["held_out"])
        self.new, self.edits = sets.new_facts(data, self.size["new"]), sets.edits(data, self.size["edits"])
        self.of_new, self.of_edits = OfFacts(self.tokenizer, self.new), OfEdits(self.tokenizer, self.edits)
        self._old = Questions(self.tokenizer, [fact.question for fact in old])
        self.right = self._old.right(self.model)
        self.background = self._background(work)
        self.bits = text_bits(self.model, self.tokenizer, self.texts, self.length)

    def _background(self, work: pathlib.Path) -> Background:
        records = []
        for name in ("articles", "facts"):
            with (work / "text" / f"{name}.jsonl").open(encoding="utf-8") as lines:
                for line in itertools.islice(lines, self.size["background"]):
                    row = json.loads(line)
                    text = row.get("text") or f"{row['prompt']}{row['answer']}"
                    records.append((Segment(text[:1000], True),))
        return count_texts(self.model, self.tokenizer, records, length=self.length)

    def known(self) -> dict[str, Any]:
        """Measures of the base itself."""
        return {
            "old_right": int(self.right.sum()),
            "old_asked": len(self.right),
            "bits_per_byte_before": self.bits,
            "base_seconds": self.train_seconds,
        }

    def lost(self, model: Decoder) -> dict[str, Any]:
        """What a model derived from the base has forgotten."""
        bits = text_bits(model, self.tokenizer, self.texts, self.length)
        right = self._old.right(model)
        return {
            "old_lost": float((self.right & ~right).sum() / max(1, self.right.sum())),
            "old_right_after": float(right.mean()),
            "bits_per_byte": bits,
            "bits_more": bits / self.bits - 1,
        }


def run(task: dict[str, Any]) -> dict[str, Any]:
    """The result of a task."""
    base = _base(json.dumps({name: task[name] for name in ("data", "work", "seed", "size", "config", "settings")}))
    method = Method(**task["method"])
    began = time.perf_counter()
    result = WAYS[task["how"]](base, method)
    seconds = time.perf_counter() - began
    return {
        **base.known(),
        **result,
        **environment(),
        "tokens_per_second": 0,
        "compile_seconds": 0.0,
        "seconds": seconds,
    }


@functools.cache
def _base(task: str) -> Base:
    return Base(json.loads(task))


def _together(base: Base, method: Method) -> dict[str, Any]:
    """Teaches all new facts together, one per step."""
    model, told = _teach(base, base.model, base.new, method)
    return {**told, **base.of_new.measure(model), **base.lost(model)}


def _in_parts(base: Base, method: Method) -> dict[str, Any]:
    """Teaches parts in sequence, each to completion before the next begins."""
    model, told, seconds = base.model, {}, 0.0
    for part in _parts(base):
        model, told = _teach(base, model, part, method)
        seconds += told["seconds_a_fact"] * len(part)
    told |= {"seconds_a_fact": seconds / len(base.new), "rows": changed_rows(base.model, model)}
    shares = [float(part.mean()) for part in _split(base.of_new.paraphrases(model), base.size["parts"])]
    return {**told, **base.of_new.measure(model), **base.lost(model), "paraphrases_by_part": shares}


def _merged(base: Base, method: Method) -> dict[str, Any]:
    """Teaches each part to the base separately, then sums the patches."""
    if method.name not in ROWS:
        raise ValueError(f"only rows are merged, not {method.name}")
    parts, params, tables = split_decoder(base.model)
    tables = writable(tables)
    told, total, alone = {}, dict(tables), []
    for place, part in enumerate(_parts(base)):
        model, told = _teach(base, base.model, part, method)
        learned = writable(split_decoder(model)[2])
        total = {name: total[name] + (learned[name] - tables[name]) for name in tables}
        shares = list(_split(base.of_new.paraphrases(model), base.size["parts"]))
        alone.append(float(shares[place].mean()))
    model = parts.merge(params, total)
    measured = {**base.of_new.measure(model), **base.lost(model), "paraphrases_alone": float(np.mean(alone))}
    return {**told, **measured, "rows": changed_rows(base.model, model)}


def _edits(base: Base, method: Method) -> dict[str, Any]:
    """Teaches CounterFact instead of new facts."""
    model, told = _teach(base, base.model, base.edits, method)
    before = {f"{name}_before": value for name, value in base.of_edits.measure(base.model).items()}
    return {**told, **before, **base.of_edits.measure(model), **base.lost(model)}


WAYS = {
    "base": lambda base, _: base.lost(base.model),
    "together": _together,
    "in_parts": _in_parts,
    "merged": _merged,
    "edits": _edits,
}


def _teach(base: Base, model: Decoder, facts: Sequence[sets.NewFact], method: Method) -> tuple[Decoder, dict[str, Any]]:
    began = time.perf_counter()
    learned = teach(model, base.tokenizer, [fact.fact for fact in facts], base.background, method, longest=base.length)
    seconds = time.perf_counter() - began
    told = {"facts": len(facts), "rows": learned.rows, "stored": learned.stored, "seconds_a_fact": seconds / len(facts)}
    return learned.model, told


def _parts(base: Base) -> list[list[sets.NewFact]]:
    return [list(part) for part in _split(base.new, base.size["parts"])]


def _split(items: Any, count: int) -> Iterator[Any]:
    ends = [len(items) * number // count for number in range(count + 1)]
    for begin, end in itertools.pairwise(ends):
        yield items[begin:end]


def _train(task: dict[str, Any], data: pathlib.Path, work: pathlib.Path, old: Sequence[sets.OldFact]) -> float:
    """Trains a base unless a process on this machine has done so; returns the seconds that it took."""
    run, done = work / f"base{task['seed']}", work / f"base{task['seed']}.json"
    work.mkdir(parents=True, exist_ok=True)
    with _alone(work / "text.lock"):
        if not (work / "text.done").exists():
            sets.write_training(data, work / "text", list(old), task["size"]["articles"])
            (work / "text.done").touch()
    with _alone(work / f"base{task['seed']}.lock"):
        if not done.exists():
            mixture = [
                {"name": name, "path": str(work / "text" / f"{name}.jsonl"), "weight": 1.0}
                for name in ("articles", "facts")
            ]
            words = ["--run.dir", str(run), "--run.seed", str(task["seed"]), "--data.mixture", json.dumps(mixture)]
            began = time.perf_counter()
            command = [sys.executable, "-m", "memjax.train", task["config"], *words, *task["settings"]]
            subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
            write_atomic(done, json.dumps({"seconds": round(time.perf_counter() - began, 1)}))
    return json.loads(done.read_text(encoding="utf-8"))["seconds"]


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Lets one process at a time run the block."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    serve(run)
