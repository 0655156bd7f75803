"""The figures in the experiments' READMEs match their committed results."""

import collections
import importlib.util
import json
import pathlib
import re
import shutil
import statistics
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = [
    ROOT / "experiments" / name
    for name in (
        "001_fact_capacity",
        "002_real_facts",
        "004_real_text",
        "005_continual_learning",
        "006_knowing_and_guessing",
    )
]


@pytest.mark.parametrize(
    ("folder", "metric", "key"),
    [(FOLDERS[0], "recall", ("family",)), (FOLDERS[1], "exact_match", ("facts", "family"))],
    ids=lambda value: value.name if isinstance(value, pathlib.Path) else None,
)
def test_the_headline_table_is_the_mean_over_the_seeds_of_the_results(folder, metric, key):
    results = folder / "results" / "full.json"
    text = (folder / "README.md").read_text()
    shown = text.split("<!-- made from results/full.json by run.py --report -->")[1].split("<!-- end of")[0]
    rows = (
        [row for row in json.loads(results.read_text())["runs"] if row["stage"] == "full"] if results.exists() else []
    )
    if not rows:
        assert "Not run at full size yet." in shown
        return
    groups = collections.defaultdict(list)
    for row in rows:
        groups[tuple(f"{row[name]:,}" if name == "facts" else f"`{row[name]}`" for name in key)].append(row)
    table = next(part for part in shown.split("\n\n") if part.startswith("|")).splitlines()
    cells = {tuple(re.split(r" *\| *", line)[1 : 1 + len(key)]): line for line in table[2:]}
    assert set(cells) == set(groups)
    for name, runs in groups.items():
        values = [run[metric] for run in runs]
        figure = f"{statistics.mean(values):.1%}"
        if len(values) > 1:
            figure += f" ({min(values):.1%} to {max(values):.1%})"
        assert f"| {figure} |" in cells[name], name
        assert f"| {statistics.mean(run['stored_bits'] for run in runs) / 1e3:.0f} " in cells[name]


def experiment(folder, monkeypatch):
    """Imports the experiment's run.py."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location(folder.name, folder / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, folder.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_the_readmes_show_is_what_the_command_makes_of_the_results(folder, monkeypatch, tmp_path):
    run = experiment(folder, monkeypatch)
    rows = []
    if (folder / "results").exists():
        shutil.copytree(folder / "results", tmp_path / "results")
        rows = json.loads((folder / "results" / "full.json").read_text())["runs"]
    begin = "<!-- made from results/full.json by run.py --report -->"
    made = f"{begin}\n\n{run.report(rows, tmp_path) or 'Not run at full size yet.'}\n\n<!-- end of what is made -->"
    assert made in (folder / "README.md").read_text()
    assert [path.name for path in tmp_path.glob("*.png")] == [path.name for path in folder.glob("*.png")]
    if hasattr(run, "summary"):
        assert f"{run.SUMMARY}\n\n{run.summary(rows)}\n\n<!-- end" in (ROOT / "README.md").read_text()


def test_every_folder_of_experiments_is_explained_and_results_are_merged_as_described(tmp_path, monkeypatch):
    page = (ROOT / "experiments" / "README.md").read_text()
    folders = {path.name for path in (ROOT / "experiments").iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == folders - {"__pycache__"}
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
    monkeypatch.chdir(tmp_path)
    for machine, runs in (("machine_a", ["both", "a"]), ("machine_b", ["both", "b"])):
        (tmp_path / machine).mkdir()
        rows = [{"name": name, "of": machine} for name in runs]
        (tmp_path / machine / "full.json").write_text(json.dumps({"runs": rows}))
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(code, {})
    merged = json.loads((tmp_path / "experiments/001_fact_capacity/results/full.json").read_text())["runs"]
    assert {row["name"]: row["of"] for row in merged} == {"both": "machine_a", "a": "machine_a", "b": "machine_b"}


def test_the_figures_of_merged_patches_are_those_of_their_result():
    result = json.loads((ROOT / "experiments/trust/merging.json").read_text())
    shown = (ROOT / "docs/knowledge.md").read_text().split("experiments/trust/merging.py")[1].split("\n\n")[1]
    percent = lambda *names: " | ".join(f"{result[name]:.1%}".replace("%", " %") for name in names)
    assert f"| before | 0.0 % | | {percent('old_facts')} |" in shown
    assert f"| a patch alone | {percent('alone')} | | {percent('old_facts_alone')} |" in shown
    for row, name in (("`patch merge --conflicts sum`", "summed"), ("learned together", "together")):
        assert f"| ten, {row} | {percent(name, f'{name}_kept', f'old_facts_{name}')} |" in shown
