import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from memjax import doctor
from memjax.ops import dispatch, specs
from memjax.ops.embedding_bag import xla


@pytest.fixture(autouse=True)
def without_the_slow_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", ("xla", "reference"))


def test_the_report_names_versions_devices_and_kernels_and_checks_the_operations(capsys):
    assert doctor.main(["--quick"]) == 0
    out = capsys.readouterr().out
    for wanted in ("jaxlib", "device            0: cpu", "the default here", "all checks passed"):
        assert wanted in out
    assert "training" not in out
    for operation in specs.OPERATIONS:
        assert f"{operation} xla" in out


def test_a_kernel_that_cannot_run_is_shown_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", ("triton", "xla", "reference"))
    monkeypatch.setattr(dispatch, "why_not", lambda name, *_: "no such device" if name == "triton" else None)
    print(doctor.describe_machine())
    assert "triton            cannot run: no such device" in capsys.readouterr().out


def test_a_wrong_result_is_found(monkeypatch, capsys):
    right = xla.embedding_bag
    monkeypatch.setattr(xla, "embedding_bag", lambda *arguments: 1.001 * right(*arguments))
    assert doctor.main(["--quick"]) == 1
    captured = capsys.readouterr()
    assert "embedding_bag xla           FAILED: ArithmeticError: differs from the definition by" in captured.out
    assert "some checks failed" in captured.out
    assert "Traceback" in captured.err


def finished_run(losses, code=0):
    """Replaces `train`: writes the files of a run with that outcome."""

    def train(config):
        folder = pathlib.Path(config.run.dir)
        folder.mkdir()
        lines = [json.dumps({"step": number + 1, "train/loss": loss}) for number, loss in enumerate(losses)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return code

    return train


@pytest.mark.parametrize(
    ("losses", "code", "works", "line"),
    [
        ([3.0, 2.0], 0, True, "train and save              ok, the loss fell from 3.000 to 2.000 in 2 steps"),
        ([2.0, 3.0], 0, False, "FAILED: ArithmeticError: the loss rose from 2.000 to 3.000"),
        ([3.0, 2.0], 5, False, "FAILED: RuntimeError: training ended with exit code 5"),
    ],
)
def test_the_training_run_is_judged_by_its_loss_and_exit_code(losses, code, works, line, monkeypatch, capsys):
    monkeypatch.setattr("memjax.training.main.train", finished_run(losses, code))
    monkeypatch.setattr(doctor, "_write", lambda folder: "ok")
    assert doctor.check_training() is works
    assert line in capsys.readouterr().out


@pytest.mark.slow
def test_a_signal_ends_the_report_at_once_and_leaves_no_folder(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-u", "-m", "memjax.doctor"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert any(line == "training\n" for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "\ninterrupted\n")
    assert list(tmp_path.iterdir()) == []
