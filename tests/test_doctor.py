import pytest

from memjax import doctor
from memjax.ops import dispatch
from memjax.ops.embedding_bag import xla


@pytest.fixture(autouse=True)
def without_the_slow_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", ("xla", "reference"))


def test_the_report_names_versions_devices_and_kernels_and_checks_the_operations(capsys):
    assert doctor.main(["--quick"]) == 0
    out = capsys.readouterr().out
    for wanted in ("jaxlib", "device            0: cpu", "the default here", "everything that was tried works"):
        assert wanted in out
    assert "training" not in out
    for operation in ("product_key_search", "embedding_bag", "embedding_dot", "row_update"):
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
    assert "something does not work" in captured.out
    assert "Traceback" in captured.err


@pytest.mark.slow
def test_a_small_model_is_trained_saved_loaded_and_writes(monkeypatch, capsys):
    small = ("--model.dim", "32", "--model.num_layers", "2", "--model.memory.layers", "[1]")
    monkeypatch.setattr(doctor, "SETTINGS", (*doctor.SETTINGS, *small))
    assert doctor.check_training()
    out = capsys.readouterr().out
    assert "the loss fell from" in out
    assert "8 tokens" in out
