"""The end of a run: what it learned, in words, numbers and plots."""

import time
from typing import Any

from memjax.data.tokenizer import Tokenizer
from memjax.evaluation.recall import fact_report, format_fact_report
from memjax.memory.parallel import TOKENS
from memjax.training.mesh import put_batch
from memjax.training.metrics import read_metrics
from memjax.training.plots import plot_run
from memjax.training.run_folder import RunFolder
from memjax.training.state import Trainer, TrainState


def finish(trainer: Trainer, state: TrainState, mesh: Any, folder: RunFolder, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes plots, the recall test of runs on biographies, and the summary, which marks the run as finished."""
    config, rows = trainer.config, read_metrics(folder.metrics)
    summary: dict[str, Any] = {
        "steps": config.train.steps,
        "metrics": {name: value for name, value in rows[-1].items() if name != "step"},
        "plots": [str(path) for path in plot_run(rows, folder.plots)],
        "training_seconds": sum(row.get("throughput/step_seconds", 0) for row in rows),
    }
    if config.data.source == "biographies":
        started = time.monotonic()
        model = trainer.parts.assemble(state.params, state.tables)
        batch_size = -(-256 // mesh.size) * mesh.size
        place = lambda batch: put_batch(mesh, batch, TOKENS)
        report = fact_report(
            model, tokenizer, config.data, config.eval.recall_people, batch_size=batch_size, place=place, donate=True
        )
        folder.write_json(f"evals/{config.train.steps}-facts.json", report)
        summary["facts"] = report
        print(f"asked about {config.eval.recall_people} people in {time.monotonic() - started:.0f} s", flush=True)
    folder.write_json(folder.summary.name, summary)
    return summary


def describe_summary(summary: dict[str, Any], folder: RunFolder) -> str:
    """The closing screen of a run."""
    metrics = summary["metrics"]
    lines = [f"finished: {summary['steps']} steps, training loss {metrics['train/loss']:.4f}"]
    if "eval/validation/loss" in metrics:
        lines[0] += f", validation loss {metrics['eval/validation/loss']:.4f}"
    layers = sorted({name.split("/")[1] for name in metrics if name.startswith("memory/")})
    for layer in layers:
        used, effective = (metrics[f"memory/{layer}/{field}"] for field in ("used_fraction", "effective_fraction"))
        lines.append(f"memory {layer}: {used:.1%} of the slots read, as if {effective:.1%} were read equally often")
    if "facts" in summary:
        lines += ["", format_fact_report(summary["facts"])]
    lines += [
        "",
        *(f"plot       {path}" for path in summary["plots"]),
        f"metrics    {folder.metrics}",
        f'ask it     python -m memjax.generate {folder.path} --prompt "..."',
        f"test it    python -m memjax.evaluate {folder.path}",
    ]
    return "\n".join(lines)
