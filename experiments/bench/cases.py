"""Benches whose cases run in a process each, so that an out-of-memory is a row and the rest goes on."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import timing

from memjax.io.files import write_atomic

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]

Row = dict[str, Any]


def run(script: str, case: Row, seconds: float, *, xla_flags: str = "") -> tuple[list[Row], Row]:
    """The rows that a script of this folder makes of a case, in a process of its own, and what it says of the device.

    The script is called with the case as JSON and a file for `{"rows": [...], "environment": {...}}`, which it may
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
        found = json.loads(result.read_text()) if result.exists() else {"rows": []}
        return found["rows"] + ([{"note": note}] if note else []), found.get("environment", {})


def read(file: pathlib.Path) -> Row:
    """A record that was written; empty where there is none."""
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
    """The record as JSON and as a table; rows of a record that is there already stay, unless they ran again.

    Args:
        out: the folder.
        stem: of the files' names.
        record: `command`, `rows`, and what is known of the device.
        title: of the table; the device's name follows.
        columns: of the table; those without a value in any row are left out.
        key: the columns by which a row is the same as another.
        compare: adds to rows what they say beside others.
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
