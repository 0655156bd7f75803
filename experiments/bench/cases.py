"""Runs each case of a benchmark in its own process, so that an out-of-memory error is a row and the rest continues."""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import timing

from memjax.io.files import write_atomic

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]

Row = dict[str, Any]


def run(script: str, case: Row, seconds: float, *, xla_flags: str = "") -> tuple[list[Row], Row]:
    """Runs a script of this folder on a case in its own process; returns its rows, and its environment.

    The script is called with the case as JSON, and a file for `{"rows": [...], "environment": {...}}`, which it may
    write after every row.
    """
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip(),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / "result.json"
        command = [sys.executable, str(HERE / script), json.dumps(case), str(result)]
        try:
            code = subprocess.run(command, env=environment, timeout=seconds, check=False).returncode
            note = f"ended with exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            note = f"stopped after {seconds:.0f} s"
        found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {"rows": []}
        return found["rows"] + ([{"note": note}] if note else []), found.get("environment", {})


def save(result: pathlib.Path, rows: Iterable[Row], common: Row | None = None) -> None:
    """In a case's process: writes the rows for `run`, each with the common columns, and prints them."""
    written: list[Row] = []
    for row in rows:
        # After every row, since the next may take too long.
        written.append({**(common or {}), **row})
        result.write_text(json.dumps({"rows": written, "environment": timing.environment()}))
        print({name: value for name, value in written[-1].items() if name != "profile"}, flush=True)


def parser(doc: str | None, *, small: str = "small sizes") -> argparse.ArgumentParser:
    """A benchmark's parser, with the arguments that all have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/bench/results"))
    made.add_argument("--small", action="store_true", help=small)
    made.add_argument("--stem", help="name of the files in the folder, without suffix")
    return made


def command(bench: str, arguments: argparse.Namespace) -> str:
    """The command that a record shows, which omits where files go."""
    words = [word for word in sys.argv[1:] if word not in ("--out", str(arguments.out), "--stem", arguments.stem)]
    return f"python experiments/bench/{bench}.py {shlex.join(words)}".strip()


def stem(bench: str, arguments: argparse.Namespace, record: Row) -> str:
    """Name of a record's files, without suffix: the one asked for, or that of the device."""
    device = record.get("device", "unknown").replace(" ", "-").lower()
    return arguments.stem or f"{bench}-{device}" + ("-small" if arguments.small else "")


def read(file: pathlib.Path) -> Row:
    """A record written earlier; empty if there is none."""
    return json.loads(file.read_text()) if file.exists() else {}


def write(
    out: pathlib.Path,
    stem: str,
    record: Row,
    *,
    title: str,
    columns: Sequence[str],
    key: Sequence[str],
    compare: Callable[[list[Row]], None] = lambda rows: None,
) -> None:
    """Writes the record as JSON and as a table; rows of an existing record are kept unless they were measured again.

    Args:
        out: the folder.
        stem: of the file names.
        record: `command`, `rows`, and the environment.
        title: of the table; the device's name follows.
        columns: of the table; columns without values are omitted.
        key: the columns that identify a row.
        compare: adds columns that compare rows.
    """
    file = out / f"{stem}.json"
    old = read(file)
    name = lambda row: tuple(row.get(column) for column in key)
    again = {name(row) for row in record["rows"]}
    kept = [row for row in old.get("rows", []) if name(row) not in again]
    commands = dict.fromkeys([*old.get("command", "").split(" ; "), record["command"]])
    record = record | {"rows": kept + record["rows"], "command": " ; ".join(filter(None, commands))}
    compare(record["rows"])
    timing.write_record(file, record)
    device = record.get("device", "an unknown device")
    table = timing.table(record["rows"], timing.filled(record["rows"], columns))
    text = f"# {title} {device}\n\n{record['command']}\n\n{table}\n"
    write_atomic(out / f"{stem}.md", text)
