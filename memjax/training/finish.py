"""Finishes a run: recall test, plots, summary."""

import shlex
import time
from typing import Any

import numpy as np
from jax.sharding import Mesh

from memjax.data.sources.kinds import find_source
from memjax.data.tokenizers.base import Tokenizer
from memjax.errors import CheckpointError
from memjax.evaluation.recall import fact_report, format_fact_report
from memjax.io.console import fitted, say
from memjax.models.counts import count_parameters
from memjax.monitoring.metrics import WINDOW, read_metrics
from memjax.monitoring.plots import plot_run
from memjax.runs.folder import RunFolder
from memjax.sharding.mesh import divisible, put_batch
from memjax.sharding.processes import is_first, process_zero_first
from memjax.sharding.rules import TOKENS
from memjax.training.program import TrainProgram
from memjax.training.state import TrainState


def finish(
    program: TrainProgram, state: TrainState, mesh: Mesh, folder: RunFolder, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Runs the recall test of runs on biographies, and writes the plots and the summary, which marks a run as finished.

    All processes evaluate the model; the first one writes.
    """
    config = program.config
    report = _ask_for_facts(program, state, mesh, tokenizer) if find_source(config.data).people else None
    with process_zero_first("summary"):
        if is_first():
            _write(program, folder, report)
    summary = folder.read_summary()
    if summary is None:
        raise CheckpointError(f"{folder.summary}: was written, but cannot be read; is this file system damaged?")
    return summary


def _ask_for_facts(program: TrainProgram, state: TrainState, mesh: Mesh, tokenizer: Tokenizer) -> dict[str, Any]:
    """Consumes the tables, which are donated."""
    config, started = program.config, time.monotonic()
    model = program.parts.merge(state.params, state.tables)
    report = fact_report(
        model,
        tokenizer,
        config.data,
        config.eval.recall_people,
        batch_size=divisible(256, mesh),
        place=lambda batch: put_batch(mesh, batch, TOKENS),
        donate=True,
    )
    asked = sum(group["questions"] for group in report.values())
    say(f"asked {asked:,} questions in {time.monotonic() - started:.0f} s")
    return report


def _write(program: TrainProgram, folder: RunFolder, report: dict[str, Any] | None) -> None:
    steps, metrics = program.config.train.steps, read_metrics(folder.metrics)
    usage = metrics.last_usage()
    summary: dict[str, Any] = {
        "steps": steps,
        "metrics": {name: value for name, value in (usage | metrics.last()).items() if name != "step"},
        "plots": [str(path) for path in plot_run(metrics, folder.plots)],
        "training_seconds": float(np.nansum(metrics.values("throughput/step_seconds"))),
        "parameters": count_parameters(program.parts).total,
        "flops_per_token": program.flops_per_token,
    }
    if usage:
        summary["slots_until_step"] = usage["step"]
    if report is not None:
        folder.write_json(f"evals/{steps}-facts.json", report)
        summary["facts"] = report
    folder.write_json(folder.summary.name, summary)


def describe_summary(summary: dict[str, Any], folder: RunFolder) -> str:
    """The closing screen of a run."""
    metrics, place = summary["metrics"], shlex.quote(str(folder.path))
    results = [f"finished: {summary['steps']} steps"]
    if metrics.get("train/loss") is not None:
        results.append(f"training loss {metrics['train/loss']:.4f}")
    if metrics.get("eval/validation/loss") is not None:
        results.append(f"validation loss {metrics['eval/validation/loss']:.4f}")
    lines = [", ".join(results)]
    for layer in sorted({name.split("/")[1] for name in metrics if name.startswith("memory/L")}):
        used, effective = (metrics.get(f"memory/{layer}/{field}") for field in ("used_fraction", "effective_fraction"))
        if used is None or effective is None:
            continue
        line = f"memory {layer}: {used:.1%} of the slots read, as if {effective:.1%} were read equally often"
        if (last := summary.get("slots_until_step")) is not None and WINDOW in metrics:
            line += f" (steps {last - metrics[WINDOW] + 1:,} to {last:,})"
        lines.append(fitted(line, 11))
    if "facts" in summary:
        lines += ["", fitted(format_fact_report(summary["facts"]), 4)]
    lines += [
        "",
        *(f"plot       {path}" for path in summary.get("plots", ())),
        f"metrics    {folder.metrics}",
        f'ask it     python -m memjax.generate {place} --prompt "..."',
        f"test it    python -m memjax.evaluate {place}",
    ]
    return "\n".join(lines)
