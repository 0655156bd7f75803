"""Measures how much is kept of ten patches about invented people: alone, summed, and learned together.

    python experiments/trust/merging.py                  # about ten minutes on two CPU cores, including training
    python experiments/trust/merging.py --run RUN        # with an existing run of the quick start
    python experiments/trust/merging.py --small          # a minute: shows that it runs

Trains the quick start with 65,536 slots, and makes patches from ten files of twelve facts with `memjax.learn`. They are
summed, as by `patch merge --conflicts sum`, and also passed to `memjax.learn` in place of the files. The result is a
JSON file.
"""

import argparse
import datetime
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import numpy as np  # noqa: E402

from memjax import learn, train  # noqa: E402
from memjax.config.data import BiographiesConfig  # noqa: E402
from memjax.data.sources import biographies  # noqa: E402
from memjax.data.sources.records import Segment  # noqa: E402
from memjax.knowledge.facts import read_facts  # noqa: E402
from memjax.knowledge.learning import known  # noqa: E402
from memjax.runs.load import load  # noqa: E402
from memjax.runs.patches.merge import merge  # noqa: E402
from memjax.runs.patches.patch import Patch, read_patch, write_patch  # noqa: E402
from memjax.runs.saved import read_config  # noqa: E402

SLOTS = ("--model.memory.num_keys", "256")
SMALL = (
    *("--model.dim", "64", "--model.num_layers", "2", "--model.num_heads", "2", "--model.vocab_size", "600"),
    *("--model.memory.layers", "1", "--data.biographies.num_people", "24", "--data.batch_size", "16"),
    *("--train.steps", "150", "--eval.recall_people", "4"),
)
HELD_OUT = ("--held_out_questions", "20")
OLD = 400
"""Maximum number of training questions that are asked again."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=pathlib.Path, help="an existing run on invented people; default: train one")
    options.add_argument("--patches", type=int, default=10)
    options.add_argument("--people", type=int, default=2, help="people per patch, six facts each")
    options.add_argument("--small", action="store_true", help="a small model and two patches")
    options.add_argument("--learn", nargs=argparse.REMAINDER, default=[], help="options for memjax.learn, last")
    options.add_argument("--out", type=pathlib.Path, default=HERE / "merging.json")
    arguments = options.parse_args()
    if arguments.small:
        arguments.patches = 2
        arguments.learn = ["--background_texts", "200", "--replay", "32", "--epochs", "30", *arguments.learn]
    with tempfile.TemporaryDirectory() as folder:
        work, run = pathlib.Path(folder), arguments.run
        if run is None:
            run = work / "run"
            words = SMALL if arguments.small else SLOTS
            if code := train.main(["--run.dir", str(run), "--log.tensorboard", "false", *words]):
                raise SystemExit(code)
        result = measure(run, arguments.patches, arguments.people, arguments.learn, work)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if not isinstance(value, list)}, indent=1))


def measure(run: pathlib.Path, count: int, each: int, words: Sequence[str], work: pathlib.Path) -> dict[str, Any]:
    """Makes and merges the patches, and measures all of them."""
    strangers, files, patches = people(run, count * each), [], []
    began = time.perf_counter()
    for number in range(count):
        file, out = work / f"people{number}.jsonl", work / f"patch{number}"
        some = strangers[number * each : (number + 1) * each]
        file.write_text("".join(json.dumps(fact) + "\n" for one in some for fact in facts_about(one)), encoding="utf-8")
        if code := learn.main([str(run), str(file), "--out", str(out), *HELD_OUT, *words]):
            raise SystemExit(code)
        files.append(file)
        patches.append((str(out), read_patch(out)))
    seconds = time.perf_counter() - began
    merged = merge(patches, conflicts="sum")
    path = write_patch(work / "merged", merged)
    began, both = time.perf_counter(), str(work / "together")
    if code := learn.main([str(run), *(name for name, _ in patches), "--out", both, *HELD_OUT, *words]):
        raise SystemExit(code)
    seconds_together = time.perf_counter() - began
    alone = [rate(run, [name], file) for (name, _), file in zip(patches, files, strict=True)]
    of_sum, of_learned = ([rate(run, [str(name)], file) for file in files] for name in (path, both))
    changed = [rows_of(patch) for _, patch in patches]
    shared = [len(np.intersect1d(left, right)) for left, right in itertools.combinations(changed, 2)]
    return {
        "patches": count,
        "facts_each": each * len(biographies.attribute_names),
        "slots": next(iter(merged.tables.values())).num_slots,
        "alone": statistics.mean(alone),
        "summed": statistics.mean(of_sum),
        "summed_kept": statistics.mean(of_sum) / statistics.mean(alone),
        "together": statistics.mean(of_learned),
        "together_kept": statistics.mean(of_learned) / statistics.mean(alone),
        "rows_each": statistics.mean(map(len, changed)),
        "rows_shared_by_two": statistics.mean(shared),
        "old_facts": old_rate(run, []),
        "old_facts_alone": old_rate(run, [patches[0][0]]),
        "old_facts_summed": old_rate(run, [str(path)]),
        "old_facts_together": old_rate(run, [both]),
        "rows_together": len(rows_of(read_patch(both))),
        "seconds_a_patch": round(seconds / count, 1),
        "seconds_together": round(seconds_together, 1),
        "options": list(words),
        "alone_each": alone,
        "summed_each": of_sum,
        "together_each": of_learned,
        "machine": {
            "date": datetime.date.today().isoformat(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "jax": metadata.version("jax"),
        },
    }


def people(run: pathlib.Path, count: int) -> list[biographies.Person]:
    """People that do not occur in the run's training data."""
    known_names = {person.name for person in biographies.people(read_config(run).data.biographies)}
    others = biographies.people(BiographiesConfig(seed=77))
    return [person for person in others if person.name not in known_names][:count]


def facts_about(person: biographies.Person) -> list[dict[str, Any]]:
    """The six facts in all training wordings, the test question first."""
    facts = []
    for attribute in biographies.attribute_names:
        wordings = (*biographies.QUESTIONS[attribute], *biographies.STATEMENTS[attribute])
        prompt, *paraphrases = [wording.format(name=person.name) for wording in wordings]
        facts.append({"prompt": prompt, "answer": person.value(attribute), "paraphrases": paraphrases})
    return facts


def rows_of(patch: Patch) -> np.ndarray:
    """The rows that a patch of one table changes."""
    (change,) = patch.tables.values()
    return change.rows


def rate(run: pathlib.Path, patches: list[str], file: pathlib.Path) -> float:
    """Share of a file's questions that the run answers with the given patches."""
    found = load(run, patches=patches)
    questions = [fact.question for fact in read_facts(str(file), "FACTS") if fact.question]
    return known(found.model, found.tokenizer, questions, length=found.config.data.sequence_length)


def old_rate(run: pathlib.Path, patches: list[str]) -> float:
    """The same for questions from the training data."""
    found = load(run, patches=patches)
    asked = biographies.questions(found.config.data.biographies, True)
    records = [(Segment(one.prompt, False), Segment(one.answer, True)) for one in asked[:: max(1, len(asked) // OLD)]]
    return known(found.model, found.tokenizer, records, length=found.config.data.sequence_length)


if __name__ == "__main__":
    main()
