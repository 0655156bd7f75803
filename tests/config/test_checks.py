"""Path settings are local, with `~` expanded, and the classes check their values."""

import dataclasses
import importlib
import pkgutil
import re
from dataclasses import MISSING
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from memjax import config as config_package
from memjax import convert, errors, patch
from memjax.config import schema as schema_module
from memjax.config.help import Positional
from memjax.config.load import RUN_FOLDER, load, parse
from memjax.config.memory import LookupConfig, ProductKeyConfig, TableSizes
from memjax.config.run import RunConfig
from memjax.evaluation.settings import EvaluateConfig
from memjax.generate import GenerateConfig
from memjax.inspect import InspectConfig
from memjax.io import paths
from memjax.learn import LearnConfig
from memjax.plot import PlotConfig
from memjax.serve import ServeConfig
from memjax.training import main

PATHS = [
    (RunConfig, "run.dir"),
    (RunConfig, "run.compile_cache"),
    (RunConfig, "data.path"),
    (RunConfig, "data.validation_path"),
    (RunConfig, "data.prepared"),
    (RunConfig, "data.tokenizer.path"),
    (RunConfig, "train.init_from"),
    (RunConfig, "eval.questions"),
    (RunConfig, "eval.task_folder"),
    (RunConfig, "run.mirror"),
    (EvaluateConfig, "text"),
    (EvaluateConfig, "questions"),
    (EvaluateConfig, "examples"),
    (EvaluateConfig, "task_folder"),
    (GenerateConfig, "prompts"),
    (GenerateConfig, "output"),
    (PlotConfig, "out"),
    (InspectConfig, "out"),
    (InspectConfig, "corpus"),
    (LearnConfig, "out"),
    (LearnConfig, "background"),
    (LearnConfig, "held_out"),
    *((patch.COMMANDS[name].schema, "out") for name in ("diff", "apply", "merge")),
    *((command.schema, "out") for command in convert.COMMANDS.values()),
    (convert.FromHfConfig, "tokenizer"),
    (convert.ToHfConfig, "like"),
]
MAY_BE_ADDRESSES = {
    (RunConfig, "data.path"),
    (RunConfig, "data.validation_path"),
    (RunConfig, "train.init_from"),
    (RunConfig, "run.mirror"),
    (EvaluateConfig, "text"),
}
NEEDED = {
    (RunConfig, "data.tokenizer.path"): ["--data.tokenizer.kind", "hf"],
    (RunConfig, "eval.task_folder"): ["--eval.tasks", "a"],
    (EvaluateConfig, "examples"): ["--questions", "q.jsonl", "--shots", "1"],
    (EvaluateConfig, "task_folder"): ["--tasks", "a"],
    (GenerateConfig, "output"): ["--prompts", "p.txt"],
    (convert.FromHfConfig, "tokenizer"): ["--out", "a"],
    (convert.ToHfConfig, "like"): ["--out", "a"],
    (convert.UpcycleConfig, "out"): ["--memory.layers", "0"],
    (InspectConfig, "out"): ["--prompt", "a"],
    (InspectConfig, "corpus"): ["--slot", "L1:2"],
    (LearnConfig, "background"): ["--out", "a"],
    (LearnConfig, "held_out"): ["--out", "a"],
}


def parsed(schema: type, *words: str):
    positional = None if schema is RunConfig else RUN_FOLDER
    return parse(schema, words, prog="go", description="Goes.", positional=positional)


@pytest.mark.parametrize(("schema", "name"), PATHS)
def test_a_path_is_expanded_and_a_remote_address_refused(schema, name, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/ada")
    words = [*([] if schema is RunConfig else ["run"]), *NEEDED.get((schema, name), []), f"--{name}"]
    suffix = "html" if schema is InspectConfig else "png"
    config = parsed(schema, *words, f"~/a/x.{suffix}").config
    for part in name.split("."):
        config = getattr(config, part)
    assert config in (f"/home/ada/a/x.{suffix}", (f"/home/ada/a/x.{suffix}",))
    address = f"{'hdfs' if (schema, name) in MAY_BE_ADDRESSES else 'gs'}://bucket/x.{suffix}"
    with pytest.raises(SystemExit) as caught:
        parsed(schema, *words, address)
    assert caught.value.code == 2
    assert f"command line: {name}={address} must be a path on this machine" in capsys.readouterr().err


def test_a_config_with_addresses_is_read_where_their_packages_are_missing(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    config = load(RunConfig, None, ["--run.mirror", "gs://b/run", "--data.path", "s3://b/x", "--data.source", "files"])
    assert (config.run.mirror, config.data.path) == ("gs://b/run", "s3://b/x")
    with pytest.raises(errors.ConfigError) as caught:
        main.check(config)
    assert "data.path=s3://b/x needs the package fsspec to read s3:" in str(caught.value)


def test_a_web_server_cannot_be_a_mirror():
    with pytest.raises(errors.ConfigError, match=r"run\.mirror=http://host/run cannot be written to; name a folder"):
        load(RunConfig, None, ["--run.mirror", "http://host/run"])


def test_every_setting_that_is_named_like_a_path_is_checked():
    """Guards against forgetting a new one."""
    commands = [*convert.COMMANDS.values(), *patch.COMMANDS.values()]
    schemas = {schema for schema, _ in PATHS} | {command.schema for command in commands} | {ServeConfig}
    found = {
        (schema, ".".join(path))
        for schema in schemas
        for path, _ in schema_module.walk(schema)
        if path[-1]
        in ("path", "dir", "out", "output", "prepared", "init_from", "prompts", "like", "corpus", "held_out")
        or path[-1].endswith(("_path", "_folder", "_dir", "_file", "_cache"))
    }
    assert found <= set(PATHS)


def test_paths_in_yaml_and_in_the_parts_of_a_mixture_are_paths_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    file = tmp_path / "c.yaml"
    file.write_text("run: {dir: ~/runs}\ndata: {source: mixture, mixture: [{name: a, path: ~/a.jsonl}]}\n")
    config = load(RunConfig, file)
    assert (config.run.dir, config.data.mixture[0].path) == ("/home/ada/runs", "/home/ada/a.jsonl")
    file.write_text("run: {dir: s3://b}\ndata: {source: mixture, mixture: [{name: a, path: hdfs://a}]}\n")
    with pytest.raises(errors.ConfigError) as caught:
        load(RunConfig, file)
    problems = "\n".join(caught.value.problems)
    assert f"{file}:1: run.dir=s3://b must be a path on this machine" in problems
    assert "path=hdfs://a must be a path on this machine" in problems


def test_a_path_keeps_the_form_in_which_it_was_written():
    assert load(RunConfig, None, ["--run.dir", "./a//b/"]).run.dir == "./a//b/"


def test_folders_of_runs_are_paths_too(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/ada")
    assert parsed(EvaluateConfig, "~/run").positional == "/home/ada/run"
    with pytest.raises(SystemExit):
        parsed(EvaluateConfig, "s3://bucket/run")
    assert "command line: RUN=s3://bucket/run must be a path on this machine" in capsys.readouterr().err


WRONG = {bool: "yes", int: 2.5, float: float("nan"), tuple[int, ...]: (0, 0.5)}


def typed_fields():
    """Yields every setting that is a boolean, a number or one of several words, with an invalid value for it."""
    made_of = (LookupConfig, ProductKeyConfig, TableSizes)
    for module in pkgutil.iter_modules(config_package.__path__, f"{config_package.__name__}."):
        for found in vars(importlib.import_module(module.name)).values():
            if isinstance(found, type) and found.__module__ == module.name and found not in (*made_of, Positional):
                types = get_type_hints(found).items() if dataclasses.is_dataclass(found) else ()
                for name, kind in types:
                    inner = next((one for one in get_args(kind) if type(None) in get_args(kind) and one in WRONG), kind)
                    wrong = "Sgd" if get_origin(kind) is Literal else WRONG.get(inner)
                    if wrong is not None and name in {field.name for field in dataclasses.fields(found)}:
                        yield pytest.param(found, name, wrong, id=f"{found.__name__}.{name}")


@pytest.mark.parametrize(("section", "name", "wrong"), [*typed_fields()])
def test_values_of_other_types_are_refused_by_the_classes_too(as_users_call, section, name, wrong):
    needed = {"lr": 1.0, "name": "x", "path": "x"}
    fields = [field for field in dataclasses.fields(section) if field.init]
    required = [field.name for field in fields if MISSING is field.default is field.default_factory]
    rule = "is unknown; known: " if wrong == "Sgd" else "must be "
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(wrong))} {rule}"):
        section(**{**{key: needed[key] for key in required}, name: wrong})
