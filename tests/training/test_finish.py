"""The end of a run: what it prints and keeps, even if some of its files are missing."""

import json
import shlex

from memjax.models.counts import count_parameters
from memjax.runs.folder import RunFolder
from memjax.training.finish import _write, describe_summary
from memjax.training.program import TrainProgram


def test_a_run_whose_metrics_were_removed_finishes_without_them(tiny, tmp_path):
    folder, program = RunFolder(tmp_path / "run"), TrainProgram.of(tiny.config("--train.steps 60"))
    _write(program, folder, None)
    summary = folder.read_summary()
    assert summary is not None
    sizes = {"parameters": count_parameters(program.parts).total, "flops_per_token": program.flops_per_token}
    assert summary == {"steps": 60, "metrics": {}, "plots": [], "training_seconds": 0, **sizes}
    assert describe_summary(summary, folder).startswith("finished: 60 steps\n")


def test_printed_commands_can_be_pasted_whatever_the_folder_is_called(tmp_path):
    folder = RunFolder(tmp_path / "it's a [run] of $HOME; x")
    lines = describe_summary({"steps": 1, "metrics": {}}, folder).splitlines()
    for module in ("generate", "evaluate"):
        command = next(line for line in lines if f"memjax.{module}" in line).partition("python")[2]
        assert str(folder.path) in shlex.split(command)
    assert shlex.split(folder.resume_command)[-1] == str(folder.path)


def test_a_summary_shows_what_its_last_row_has(tmp_path):
    metrics = {"train/loss": None, "memory/L1/used_fraction": 0.5, "memory/L1/effective_fraction": None}
    folder = RunFolder(tmp_path)
    folder.write_json("summary.json", {"steps": 3, "metrics": metrics})
    assert json.loads(folder.summary.read_text())["metrics"] == metrics
    assert describe_summary(folder.read_summary() or {}, folder).splitlines()[0] == "finished: 3 steps"
