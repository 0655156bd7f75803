"""The notebooks run, and their committed output comes from a run."""

import ast
import json
import pathlib
from typing import Any

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def code_cells(path: pathlib.Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_ran_from_top_to_bottom_without_an_error(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert any(output["output_type"] == "display_data" for output in outputs) or path.stem == "teach_and_revert"
    streams = [output["name"] for output in outputs if output["output_type"] == "stream"]
    assert set(streams) == {"stdout"}, "nothing was written to standard error"


def test_there_are_three_notebooks_and_the_site_shows_them():
    assert [path.stem for path in NOTEBOOKS] == ["own_model", "teach_and_revert", "train_and_look"]
    contents = (NOTEBOOKS[0].parents[1] / "index.md").read_text()
    assert all(f"\nnotebooks/{path.stem}\n" in contents for path in NOTEBOOKS)


@pytest.mark.slow
def test_every_cell_runs_and_prints_where_output_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    # In this order, as the last notebook teaches the model that the first one has trained.
    for name in ("train_and_look", "own_model", "teach_and_revert"):
        namespace: dict[str, Any] = {"__name__": "__main__"}
        path = NOTEBOOKS[0].with_name(f"{name}.ipynb")
        for number, cell in enumerate(code_cells(path), 1):
            source = "".join(cell["source"])
            ast.parse(source)  # every cell is plain Python, without IPython magics
            capsys.readouterr()
            exec(compile(source, f"{name}[{number}]", "exec"), namespace)
            shown = [output for output in cell["outputs"] if output["output_type"] == "stream"]
            assert capsys.readouterr().out or not shown, f"{name}[{number}] shows what it does not print"
