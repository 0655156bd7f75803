"""docs/checked.md shows the committed results of experiments/references, which needs torch and is not run here."""

import importlib.util
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "references"


@pytest.fixture
def script(monkeypatch):
    """Imports run.py, and afterwards undoes its change of sys.path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("references_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("checks", None)


def test_the_page_has_the_table_of_the_results_and_all_of_them_pass(script):
    document = json.loads((FOLDER / "results" / "references.json").read_text())
    page = (ROOT / "docs" / "checked.md").read_text()
    assert page.split(script.BEGIN)[1].split(script.END)[0] == script.report(document)
    assert all(check["figure"] <= check["bound"] for check in document["checks"])
    assert {check["area"] for check in document["checks"]} == {
        "layers", "optimizers", "training", "tokenizers", "generation", "models in", "models out", "evaluation",
        "memory in torch", "public sets",
    }  # fmt: skip


def test_a_figure_that_is_not_a_number_does_not_pass(script):
    check = script.Check("layers", "x", "y", "z", float("nan"), 1.0)
    assert not check.passes
