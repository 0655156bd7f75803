"""Reads YAML configs, each merged over the one that it `extends`, and records the place of every setting."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from memjax.config import presets
from memjax.config.problems import Problems, close, did_you_mean
from memjax.config.renamed import upgraded
from memjax.config.schema import FieldPath, printable
from memjax.config.yaml import compose, scalar, why_invalid
from memjax.io.files import read_text
from memjax.io.paths import local_path

_DEEPEST = 32
"""Maximum nesting of sections and lists in a config; the schema has four levels."""

_WRITTEN_BY_RUNS = ("checkpoints", "metrics.jsonl")
"""Files that mark a config.yaml beside them as written by a run, possibly of an earlier version."""

Tree = dict[str, Any]


def read_config(path: Path, problems: Problems) -> Tree:
    """The settings tree of a config file, a preset or a run's folder, even if the folder was moved."""
    try:
        path = local_path(str(path), "config")
    except ValueError as error:
        problems.of_arguments(str(error))
        return {}
    file = path / "config.yaml"
    if not path.is_dir() or (not file.exists() and presets.find(path)):
        return _read(path if path.is_file() else presets.find(path) or path, problems, "command line")
    if not file.exists():
        is_part = path.name == "checkpoints" and (path.parent / "config.yaml").exists()
        problems.of_arguments(
            f"{path} is a folder without a config.yaml, so not the folder of a run that has made a step; "
            f"{f'name {path.parent}' if is_part else f'name a YAML file, and --run.dir {path} to run there'}"
        )
        return {}
    tree = _read(file, problems, "command line")
    if not tree:
        problems.of_arguments(
            f"give {path} its original settings again, and --run.dir {path}: they are compared with those of "
            "its checkpoints"
        )
    return merge(tree, {"run": {"dir": str(path)}})


def _read(path: Path, problems: Problems, asked_at: str, chain: tuple[Path, ...] = ()) -> Tree:
    """The tree of a file, merged over that of the file it extends."""
    if os.path.realpath(path) in map(os.path.realpath, chain):
        circle = " -> ".join(str(link) for link in (*chain, path))
        problems.add(asked_at, f"extends forms a cycle: {circle}")
        return {}
    problems.places.setdefault((), str(path))
    try:
        node = compose(read_text(path))
    except (OSError, ValueError, YAMLError, RecursionError) as error:  # ValueError: not UTF-8, or a path with a NUL
        problems.add(*_unreadable(path, asked_at, error))
        return {}
    is_of_run = path.name == "config.yaml" and any((path.parent / name).exists() for name in _WRITTEN_BY_RUNS)
    if node is None:
        if is_of_run:
            problems.add(asked_at, f"{path} is empty, though a run writes all of its settings")
        return {}
    if not isinstance(node, MappingNode):
        problems.add(f"{path}:1", "a config consists of sections, `name:` with indented lines below it")
        return {}
    # The base is read before this file's places are recorded, so that a place is always that of the final value.
    base: Tree = {}
    for key, value in node.value:
        if key.value == "extends":
            line = f"{path}:{key.start_mark.line + 1}"
            if isinstance(value, ScalarNode) and (value.value.endswith((".yaml", ".yml")) or presets.find(value.value)):
                named = path.parent / value.value
                named = named if named.is_file() else presets.find(value.value) or named
                base = _read(named, problems, line, (*chain, path))
            else:  # other files are not opened: errors would print parts of their content
                problems.add(line, "extends must name one YAML file, .yaml or .yml, or a preset")
    tree = to_tree(node, (), problems, lambda part: f"{path}:{part.start_mark.line + 1}")
    tree.pop("extends", None)
    return merge(base, upgraded(tree) if is_of_run else tree)


def _unreadable(path: Path, asked_at: str, error: Exception) -> tuple[str, str]:
    """The place, and why the file is not a config."""
    name = printable(str(path))
    match error:
        case MarkedYAMLError():
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            return f"{path}:{line}", f"not valid YAML: {why_invalid(error)}"
        case RecursionError():
            return str(path), f"is nested more than {_DEEPEST} levels deep"
        case FileNotFoundError():
            return asked_at, f"{name} does not exist{_other_name(path)}"
        case IsADirectoryError():
            return asked_at, f"{name} is a folder; name a YAML file"
        case UnicodeDecodeError():
            return asked_at, f"{name} is not UTF-8 text"
        case _:
            reason = getattr(error, "strerror", None) or error
            return asked_at, f"{name} cannot be read: {' '.join(str(reason).split())}"


def _other_name(path: Path) -> str:
    """A hint at what a missing file's name may have meant."""
    if hint := did_you_mean(close(str(path), [str(other) for other in path.parent.glob("*.yaml")])):
        return hint
    return f"; for a setting write --{path}" if "=" in str(path) else did_you_mean(close(path.stem, presets.names()))


def to_tree(node: Node, path: FieldPath, problems: Problems, place: Callable[[Node], str], depth: int = 0) -> Any:
    """Converts a node to a value, with sections as dicts, and records the place of each setting."""
    if isinstance(node, ScalarNode):
        return scalar(node)
    if depth > _DEEPEST:
        problems.add(place(node), f"{printable('.'.join(path))}: nested more than {_DEEPEST} levels deep")
        return None
    if isinstance(node, SequenceNode):
        return [to_tree(item, path, problems, place, depth + 1) for item in node.value]
    tree: Tree = {}
    for key, value in node.value:
        inner = (*path, str(key.value))
        if not isinstance(key, ScalarNode):
            problems.add(place(key), "a name must be a single word")
        elif key.value in tree:
            name = printable(".".join(inner))
            problems.add(place(key), f"{name}: given twice; first at {problems.places[inner]}")
        else:
            problems.places[inner] = place(key)
            tree[key.value] = to_tree(value, inner, problems, place, depth + 1)
    return tree


def merge(base: Tree, over: Mapping[str, Any]) -> Tree:
    """A tree, overridden by the settings of another."""
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        # A section over null starts from the defaults, as when a dense base gets a memory section.
        merged[name] = merge(old if isinstance(old, dict) else {}, value) if isinstance(value, dict) else value
    return merged
