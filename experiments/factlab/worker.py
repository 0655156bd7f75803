"""A process that trains one model after another: reads tasks and writes results, each as one line of JSON.

Started by runs.py as `python -m factlab.worker`. Compiled programs are reused by later tasks of the same model.
"""

import importlib.metadata
import json
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from factlab import guessing, training
from factlab.entity_questions import question_rows
from factlab.rows import biography_rows
from factlab.steps import OutOfTime
from memjax.config.data import BiographiesConfig
from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.training.state import TrainState

Task = dict[str, Any]
MAX_ASKED = 20_480
"""Maximum number of questions answered by generation."""


def main() -> None:
    """Serves trainings on facts."""
    models: dict[str, Model] = {}
    serve(lambda task: _run(task, models))


def serve(run: Callable[[Task], dict[str, Any]]) -> None:
    """Serves until the input ends. All other output goes to standard error, to keep results separate."""
    results, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = {"result": run(task)}
        except OutOfTime as reason:
            answer = {"late": str(reason)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=results, flush=True)


def _run(task: Task, models: dict[str, "Model"]) -> dict[str, Any]:
    key = json.dumps([task[name] for name in ("config", "settings", "facts", "perfect_address", "without")])
    if key not in models:
        models[key] = Model(task)
    return models[key].run(task) | environment()


class Model:
    """A family's trainer on given facts, for any rates, seeds and lengths."""

    def __init__(self, task: Task):
        facts = task["facts"]
        # Generated people, or a file of real facts.
        self.questions, told = None, facts.get("told")
        if "people" in facts:
            told = [1] if told is None else [int(times) for times in told.split("-")]
            rows = biography_rows(BiographiesConfig(num_people=facts["people"]), told)
        else:
            self.questions = question_rows(pathlib.Path(facts["file"]), facts["count"], told)
            rows = self.questions.rows
        sizes = ["--model.vocab_size", str(rows.vocab_size), "--data.sequence_length", str(rows.length)]
        config = load(RunConfig, pathlib.Path(task["config"]), [*sizes, *task["settings"]])
        self.trainer = training.FactTrainer(
            config, rows, perfect_address=task["perfect_address"], without=task["without"]
        )

    def run(self, task: Task) -> dict[str, Any]:
        return self.trainer.run(
            training.Rates(task["lr"], task["table_lr"]),
            exposures=task["exposures"],
            seed=task["seed"],
            deadline=task["deadline"],
            tell=lambda line: print(f"[{task['name']}] {line}", file=sys.stderr, flush=True),
            examine=lambda state: self._ask(state) | self._measure(task, state),
        )

    def _ask(self, state: TrainState) -> dict[str, Any]:
        """Grades generated answers to held-out questions; for generated people, the test of all facts is enough."""
        if self.questions is None:
            return {}
        rows = self.questions.rows
        kept = np.flatnonzero((rows.first_wording > 0) & (rows.told > 0))[:MAX_ASKED]
        return self.questions.grade(self.trainer.write_answers(state, kept))

    def _measure(self, task: Task, state: TrainState) -> dict[str, Any]:
        if task["measure"] != "guessing":
            return {}
        return {"guessing": guessing.measure(self.trainer, state, epochs=task["exposures"])}


def environment() -> dict[str, Any]:
    """The device, and versions of packages."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    return {"device": jax.devices()[0].device_kind, "versions": versions}


if __name__ == "__main__":
    main()
