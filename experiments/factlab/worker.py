"""A process that trains one model after the other: a task of JSON on a line in, a result of JSON on a line out.

`python -m factlab.worker`; runs.py starts it. Programs once compiled serve all later tasks of the same model.
"""

import importlib.metadata
import json
import pathlib
import sys
import traceback
from typing import Any

from factlab import rows as fact_rows
from factlab import training
from memjax.command_line import load
from memjax.config import BiographiesConfig, RunConfig

Task = dict[str, Any]


def main() -> None:
    """Serves until the input ends. Whatever else prints goes to the error output, so that results stand alone."""
    results, sys.stdout = sys.stdout, sys.stderr
    trainers: dict[str, training.FactTrainer] = {}
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = {"result": _run(task, trainers)}
        except training.OutOfTime as reason:
            answer = {"late": str(reason)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=results, flush=True)


def _run(task: Task, trainers: dict[str, training.FactTrainer]) -> dict[str, Any]:
    key = json.dumps([task[name] for name in ("config", "settings", "facts", "perfect_address")])
    if key not in trainers:
        rows = _rows(task["facts"])
        sizes = ["--model.vocab_size", str(rows.vocab_size), "--data.sequence_length", str(rows.length)]
        config = load(RunConfig, pathlib.Path(task["config"]), [*sizes, *task["settings"]])
        trainers[key] = training.FactTrainer(config, rows, perfect_address=task["perfect_address"])
    rates = training.Rates(task["lr"], task["table_lr"])
    tell = lambda line: print(f"[{task['name']}] {line}", file=sys.stderr, flush=True)
    options = {"exposures": task["exposures"], "seed": task["seed"], "deadline": task.get("deadline")}
    return trainers[key].run(rates, **options, tell=tell) | environment()


def _rows(description: dict[str, Any]) -> fact_rows.FactRows:
    """The facts that a task names: generated people, or a file of facts."""
    if "people" in description:
        return fact_rows.biography_rows(BiographiesConfig(num_people=description["people"]))
    from factlab.entity_questions import question_rows

    return question_rows(pathlib.Path(description["file"]), description["count"], description["vocab_size"])


def environment() -> dict[str, Any]:
    """Device and versions."""
    import jax

    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    return {"device": jax.devices()[0].device_kind, "versions": versions}


if __name__ == "__main__":
    main()
