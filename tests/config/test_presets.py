"""Presets are found by name from any folder and are part of the wheel."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

from memjax.config import presets
from memjax.config.load import CONFIG_FILE, load, parse
from memjax.config.run import RunConfig
from memjax.presets import main

ROOT = pathlib.Path(__file__).parents[2]


def parsed(*argv):
    return parse(RunConfig, argv, prog="train", description="").config


def test_a_preset_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = load(RunConfig, ROOT / "configs" / "wiki_text.yaml")
    assert parsed("wiki_text") == parsed("wiki_text.yaml") == expected
    assert parsed("wiki_text", "--model.dim", "64").model.dim == 64


def test_a_file_of_the_same_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wiki_text.yaml").write_text("model: {dim: 32}")
    assert parsed("wiki_text.yaml").model.dim == 32


def test_a_folder_that_is_not_a_run_does_not_hide_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wiki_text").mkdir()
    assert parsed("wiki_text").run.dir == "runs/wiki_text"


def test_a_home_folder_is_expanded_from_python_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("model: {dim: 256}")
    assert load(RunConfig, pathlib.Path("~/mine.yaml")).model.dim == 256


def test_a_config_elsewhere_may_extend_a_preset_and_its_neighbours_come_first(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("extends: wiki_text.yaml\nmodel: {dim: 256}")
    assert load(RunConfig, config).model.dim == 256
    assert load(RunConfig, config).run.dir == "runs/wiki_text"
    (tmp_path / "wiki_text.yaml").write_text("run: {dir: neighbour}")
    assert load(RunConfig, config).run.dir == "neighbour"


@pytest.mark.parametrize("word", ["wiki_txt", "configs/wiki_text.yaml"])
def test_a_name_that_is_close_is_suggested(word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        parsed(word)
    assert ended.value.code == 2
    assert f"{word} does not exist; did you mean 'wiki_text'?" in capsys.readouterr().err


def test_the_list_has_every_preset_with_its_size(monkeypatch, capsys):
    monkeypatch.setattr(presets, "names", lambda: ["134m_dense", "paper", "wiki_text"])
    assert main([]) == 0
    header, wiki, dense, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "parameters", "active", "tokens", "of", "a", "run", "what", "it", "is"]
    assert dense.split()[:3] == ["134m_dense", "0.134", "b"]
    assert wiki.startswith("wiki_text      2.771 m  1.071 m          0.001 b  A small memory model on real text")


def test_a_shell_is_offered_presets_settings_and_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(RunConfig, ["--complete"], prog="train", description="", positional=CONFIG_FILE, flags={"dry_run": ""})
    assert ended.value.code == 0
    assert {"134m_dense", "--model.memory.num_keys", "--dry_run", "--help"} <= set(capsys.readouterr().out.split())


def test_the_wheel_holds_the_presets_the_marker_of_types_and_the_console_script(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "memjax = memjax.__main__:program" in archive.read(scripts).decode()
    assert "memjax/py.typed" in names
    assert {f"memjax/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names


@pytest.mark.slow
def test_the_table_of_what_fits_where_is_that_of_the_command(capsys):
    page = (ROOT / "docs" / "device_memory.md").read_text()
    assert main(["--only", "134m_memory_plus_1m", "--fit", "1x80"]) == 0
    printed = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    rows = {row[1]: row for row in (line.split("|") for line in page.splitlines()) if len(row) == 6}
    for name, found in (row[1:3] for row in printed if "---" not in row[1]):
        assert rows[name][3] == found
    named = {name for name in presets.names() if f"| `{name}` |" in page}
    assert named == {*presets.names()} - {presets.RECIPE}


def test_the_memory_of_a_device_need_not_be_a_whole_number_of_gb(capsys):
    assert main(["--only", "134m_dense", "--fit", "1x0.5"]) == 0
    assert capsys.readouterr().out.splitlines() == ["| preset | 1 x 0.5 GB |", "|---|---|", "| `134m_dense` | no |"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--fit", "80gb"], "fit=80gb must be numbers of devices and GB of each, such as 1x24,8x80"),
        (["--fit", "1x0.0"], "fit=1x0.0 must be numbers of devices and GB of each, such as 1x24,8x80"),
        (["--only", "134m_dense,none"], "only=none must be names of presets"),
        (["--only", "paper"], "only=paper must be names of presets"),
    ],
)
def test_invalid_devices_and_presets_are_refused(words, problem, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err
