"""Times generation by the quick start's model on a CPU, with this code and older commits: `generate_cpu.py`.

Every commit trains the model for two steps itself, and is then timed in alternating processes: from the start of Python
to the loaded model, to the first token of a first text (including compilation), to that of a later text, and for 256
further tokens. CPU time, which other processes disturb less, is reported beside wall-clock time; the best round of each
counts.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import cases
import timing

from memjax.io.files import write_atomic

BEFORE = {"3001729": "before there was an engine", "14d79c5": "the first engine"}
THIS_CODE = "this code"
COLUMNS = ("commit", "what", "load s", "load CPU s", "first token s", "first token CPU s")
COLUMNS += ("next text's first token ms", "tokens/s", "tokens/CPU s")
HIGHER_IS_BETTER = ("tokens/s", "tokens/CPU s")


def run(code: pathlib.Path, *command: str) -> None:
    """Runs a Python program on CPUs with the memjax of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(code), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    subprocess.run([sys.executable, *command], env=environment, cwd=code, check=True, stdout=subprocess.DEVNULL)


def checkout(commit: str, folder: pathlib.Path) -> pathlib.Path:
    """Extracts the files of a commit into the folder, and returns it."""
    if not folder.exists():
        archive = subprocess.run(["git", "archive", commit], cwd=cases.ROOT, check=True, capture_output=True)
        folder.mkdir(parents=True)
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def measure(codes: dict[str, pathlib.Path], folder: pathlib.Path, rounds: int) -> dict[str, cases.Row]:
    """The best value of every figure, by commit."""
    for commit, code in codes.items():
        if not (folder / commit / "checkpoints").exists():
            short = ["--train.steps", "2", "--eval.every", "2", "--checkpoint.every", "2"]
            run(code, "-m", "memjax.train", "--run.dir", str(folder / commit), *short)
    found: dict[str, cases.Row] = {}
    for _ in range(rounds):
        for commit, code in codes.items():
            result = folder / f"{commit}.json"
            run(code, str(cases.HERE / "generate_cpu_case.py"), str(folder / commit), str(result))
            row = json.loads(result.read_text())
            best = found.setdefault(commit, row)
            for name, value in row.items():
                best[name] = (max if name in HIGHER_IS_BETTER else min)(best[name], value)
            print(commit, row, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/bench/results"))
    parser.add_argument("--rounds", type=int, default=5, help="processes per commit, of which the best counts")
    parser.add_argument("--before", nargs="*", default=list(BEFORE), help="older commits; needs a Git checkout")
    parser.add_argument("--keep", type=pathlib.Path, help="folder in which to keep checkouts and runs for reuse")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or pathlib.Path(temporary)).resolve()
        codes = {}
        for commit in arguments.before:
            codes[commit] = checkout(commit, folder / f"code-{commit}")
        codes[THIS_CODE] = cases.ROOT
        found = measure(codes, folder, arguments.rounds)
    environment = timing.environment()
    whats = {**BEFORE, THIS_CODE: THIS_CODE}
    names = {THIS_CODE: (environment["commit"] or "")[:7]}
    rows = [{"commit": names.get(commit, commit), "what": whats.get(commit, "")} | row for commit, row in found.items()]
    record = {"command": "python experiments/bench/generate_cpu.py", **environment, "rows": rows}
    record |= {"processors": os.cpu_count(), "machine": platform.machine()}
    timing.write_record(arguments.out / "generate-cpu.json", record)
    heading = f"# Texts of the quick start's model on {os.cpu_count()} CPU cores\n\n"
    write_atomic(arguments.out / "generate-cpu.md", heading + timing.table(rows, COLUMNS) + "\n")
    print(timing.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
