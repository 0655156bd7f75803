"""The plot command: what it writes, prints and refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memjax import plot


@pytest.fixture
def runs(tmp_path) -> list[str]:
    for name, steps in (("first", 12), ("second", 5)):
        rows = [{"step": step, "train/loss": 2 / step, "train/tokens": 10} for step in range(1, steps + 1)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "first"), str(tmp_path / "second")]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".html"])
def test_runs_are_compared_in_one_file_and_a_table(runs, tmp_path, capsys, suffix):
    out = tmp_path / f"all{suffix}"
    assert plot.main([*runs, "--out", str(out), "--x", "tokens"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run     steps  tokens    loss  best validation  tokens/s  slots read",
        "first      12     120  0.1667                -         -           -",
        "second      5      50  0.4000                -         -           -",
        "there is no validation loss in any run",
        "there is no throughput in any run",
        "there is no slot use in any run",
        f"written to {out}",
    ]
    assert out.read_bytes()[:4] == {".png": b"\x89PNG", ".svg": b"<?xm", ".pdf": b"%PDF", ".html": b"<!do"}[suffix]


def test_wrong_settings_end_with_2_and_folders_without_metrics_with_3(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        plot.main(["--out", "all.gif", "--smoothing", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "python -m memjax.plot: 3 problems",
        "  command line: RUN is missing: The folders of the runs.",
        "  command line: smoothing=0 must be positive",
        "  command line: out=all.gif must end in .png, .svg, .pdf or .html",
        "--help lists every setting.",
    ]
    assert plot.main([runs[0], str(tmp_path / "none")]) == 3
    assert "there are no metrics in metrics.jsonl" in capsys.readouterr().err


def test_an_interactive_page_holds_the_values_of_every_run_and_loads_nothing(runs, tmp_path):
    pytest.importorskip("plotly")
    out = tmp_path / "all.html"
    assert plot.main([*runs, "--out", str(out), "--interactive", "--smoothing", "1"]) == 0
    page = out.read_text()
    curves = re.search(r'Plotly\.newPlot\(\s*"[^"]+",\s*(\[.*?\]),\s*\{"template"', page, re.DOTALL)
    assert curves
    found = {curve["name"]: curve for curve in json.loads(curves[1])}
    assert set(found) == {"first", "second"}
    for name, steps in (("first", 12), ("second", 5)):
        assert found[name]["y"] == pytest.approx([2 / step for step in range(1, steps + 1)])
    assert "<td>0.1667</td>" in page
    assert not re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=""", page)


@pytest.mark.parametrize("arguments", [["--out", "all.png"], ["--out", "a.html", "--x", "parameters", "--metric", "m"]])
def test_only_curves_in_a_page_are_interactive(runs, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        plot.main([*runs, "--interactive", *arguments])
    assert ended.value.code == 2
    assert "interactive=true is for the curves of runs in an .html file" in capsys.readouterr().err


def test_without_plotly_a_line_says_how_to_install_it(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.subplots", None)
    assert plot.main([*runs, "--out", str(tmp_path / "all.html"), "--interactive"]) == 2
    assert "needs the package plotly: pip install plotly" in capsys.readouterr().err
    assert not (tmp_path / "all.html").exists()


def test_help_says_that_there_may_be_several_runs(capsys):
    with pytest.raises(SystemExit):
        plot.main(["--help"])
    assert "usage: python -m memjax.plot RUN [RUN ...] [--setting value ...]" in capsys.readouterr().out


def test_no_jax_is_needed(runs, tmp_path):
    code = "import sys; from memjax import plot; plot.main(sys.argv[1:]); sys.exit('jax' in sys.modules)"
    command = [sys.executable, "-c", code, *runs, "--out", str(tmp_path / "all.png")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, timeout=120, check=False)
    assert done.returncode == 0


def test_what_cannot_be_written_ends_with_4_and_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert plot.main([*runs, "--out", str(tmp_path / "file/all.png")]) == 4
    error = capsys.readouterr().err
    assert "file" in error
    assert len(error.splitlines()) == 1


@pytest.fixture
def configured(runs) -> list[str]:
    for run, keys, recall in zip(runs, (64, 128), (0.25, 0.5), strict=True):
        Path(run, "config.yaml").write_text(f"run: {{dir: {run}}}\nmodel: {{memory: {{num_keys: {keys}}}}}")
        summary = {"parameters": keys**2, "facts": {"asked": {"accuracy": recall}}}
        Path(run, "summary.json").write_text(json.dumps(summary))
    return runs


def test_the_table_shows_differing_settings_and_results(configured, tmp_path, capsys):
    assert plot.main([*configured, "--out", str(tmp_path / "all.png")]) == 0
    assert [line.split()[:4] for line in capsys.readouterr().out.splitlines()[:3]] == [
        ["run", "num_keys", "parameters", "facts"],
        ["first", "64", "4,096", "25.0%"],
        ["second", "128", "16,384", "50.0%"],
    ]


@pytest.mark.parametrize("x", ["model.memory.num_keys", "parameters"])
def test_a_metric_is_drawn_over_a_setting(configured, tmp_path, capsys, x):
    out = tmp_path / "over.svg"
    assert plot.main([*configured, "--out", str(out), "--x", x, "--metric", "facts/asked/accuracy"]) == 0
    assert out.read_text().startswith("<?xml")
    assert plot.main([*configured, "--out", str(out), "--x", x, "--metric", "eval/validation/loss"]) == 3
    assert "0 of 2 runs have both; two are needed" in capsys.readouterr().err


def test_a_setting_needs_a_metric_and_a_metric_a_setting(capsys):
    for words, problem in ((["--x", "optim.lr"], "x=optim.lr is neither"), (["--metric", "a"], "metric=a is drawn")):
        with pytest.raises(SystemExit):
            plot.main(["run", *words])
        assert problem in capsys.readouterr().err
