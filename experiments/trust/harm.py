"""Damaged checkpoints, data and settings, read by the package in processes of many attempts; and hostile programs.

Started as a program, it makes attempts of one kind: `python harm.py KIND SEED COUNT FOLDER`, and prints a line of JSON
before and after each, so that whoever reads them knows which one ended or held up the process.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from lab import EVERY, QUICKLY, STEPS, Case, Lab

AT_ONCE = 50
"""Attempts of one process."""


def cases(lab: Lab, campaign: str, count: int) -> list[Case]:
    """The cases of a campaign; each stands for some attempts of one process."""

    def attempt(case: Case) -> None:
        case.tried = 0
        folder = lab.folder / f"{campaign}{case.seed}"
        folder.mkdir()
        command = [sys.executable, __file__, campaign, str(case.seed), str(min(count, AT_ONCE)), str(folder)]
        ended = lab.end(lab.start([*command, str(lab.folder)]), lab.patience + QUICKLY * 3)
        open_name, others = "", []
        for line in ended.output.splitlines():
            if not line.startswith('{"begin"') and not line.startswith('{"end"'):
                others.append(line)
                continue
            message = json.loads(line)
            if "begin" in message:
                case.tried += 1
                open_name = message["begin"]
                continue
            open_name = ""
            for kind, text in message["faults"]:
                case.note(kind, f"{message['end']}: {text}")
        if open_name or ended.hung:
            hung = ended.hung or ended.code == -signal.SIGALRM
            case.note("hung" if hung else "other", f"{open_name}: the process ended with {ended.code}")
        elif ended.code != 0:
            case.note("other", "\n".join([f"exit code {ended.code}", *others]))

    processes = 1 if campaign == "sandbox" else -(-count // AT_ONCE)
    return [Case(campaign, f"{campaign} {seed}", attempt, seed) for seed in range(processes)]


Faults = list[tuple[str, str]]


def damage(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Bytes that differ from others in one way."""
    place = rng.randrange(max(1, len(data)))
    match rng.randrange(6):
        case 0 | 1 | 2 if data:
            bit = rng.randrange(8)
            return f"bit {8 * place + bit}", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
        case 3:
            return f"cut at {place}", data[:place]
        case 4:
            return f"zeros from {place}", data[:place] + bytes(len(data) - place)
        case _:
            other = rng.randbytes(rng.randint(1, 20))
            return f"bytes inserted at {place}", data[:place] + other + data[place:]


def flips(seed: int, count: int, folder: pathlib.Path, lab: pathlib.Path) -> Iterator[tuple[str, Callable[[], Faults]]]:
    """One file of the newest step is damaged, removed, or taken from the step before."""
    import jax
    import numpy as np

    from memjax.checkpoint import Checkpoints
    from memjax.config.load import load
    from memjax.config.run import RunConfig
    from memjax.errors import CheckpointError
    from memjax.runs.layout import DATA_ITER, META, OPT_STATE, PARAMS, TABLE_STATE, TABLES, params_to_tree
    from memjax.sharding.mesh import make_mesh
    from memjax.training.program import TrainProgram

    checkpoints = folder / "checkpoints"
    for step in (STEPS - EVERY, STEPS):
        shutil.copytree(lab / "reference/checkpoints" / str(step), checkpoints / str(step))
    config = load(RunConfig, lab / "reference/config.yaml")
    program, mesh = TrainProgram.of(config), make_mesh(config)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.abstract_state(),
        program.shardings(mesh),
    )
    targets: dict[str, Any] = {
        PARAMS: params_to_tree(state.params),
        OPT_STATE: state.opt_state,
        TABLES: state.tables,
        TABLE_STATE: {"optimizer": state.table_state, "reads": state.reads, "step": state.step},
    }
    read = lambda step=None: Checkpoints(checkpoints).restore(targets, [DATA_ITER, META], step=step)
    as_bytes = lambda found: (
        [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found.arrays)],
        json.dumps(found.documents, sort_keys=True),
    )
    right = {step: as_bytes(read(step)) for step in (STEPS - EVERY, STEPS)}
    files = sorted(path for path in (checkpoints / str(STEPS)).rglob("*") if path.is_file())
    rng = random.Random(f"flips {seed}")
    for _ in range(count):
        path = rng.choice(files)
        before = path.read_bytes()
        match rng.randrange(8):
            case 0:
                how, after = "removed", None
            case 1:
                other = checkpoints / str(STEPS - EVERY) / path.relative_to(checkpoints / str(STEPS))
                how, after = "from the step before", other.read_bytes() if other.is_file() else b""
            case _:
                how, after = damage(before, rng)
        name = f"{path.relative_to(checkpoints)} {how}"

        def attempt(path: pathlib.Path = path, before: bytes = before, after: bytes | None = after) -> Faults:
            path.unlink() if after is None else path.write_bytes(after)
            try:
                found = read()
            except CheckpointError as error:
                return [("lost", f"no step could be read: {error}")]
            finally:
                path.write_bytes(before)
            if found.step not in right:
                return [("wrong", f"step {found.step}")]
            return [] if as_bytes(found) == right[found.step] else [("wrong", f"step {found.step} has other values")]

        yield name, attempt


def data(seed: int, count: int, folder: pathlib.Path, lab: pathlib.Path) -> Iterator[tuple[str, Callable[[], Faults]]]:
    """A file of records is damaged: with checksums every record comes back or an error names the file."""
    from memjax.data.sources.files import RecordFiles
    from memjax.errors import DataError

    texts = [f"record {number}: " + "word " * (number % 7) + "end" for number in range(60)]
    jsonl = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    half = len(jsonl[: len(jsonl) // 2].rpartition(b"\n")[0]) + 1
    files = {
        "a.jsonl": jsonl,
        "a.txt": "".join(f"{text}\n" for text in texts).encode(),
        "a.jsonl.gz": gzip.compress(jsonl),
        "two.jsonl.gz": gzip.compress(jsonl[:half]) + gzip.compress(jsonl[half:]),
        "a.jsonl.xz": lzma.compress(jsonl),
        "two.jsonl.xz": lzma.compress(jsonl[:half]) + lzma.compress(jsonl[half:]),
        "bz2.jsonl.gz": bz2.compress(jsonl),
    }
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, write_page_checksum=True)
        files["a.parquet"] = file.getvalue()
    with contextlib.suppress(ImportError):
        import zstandard

        files["a.jsonl.zst"] = zstandard.ZstdCompressor(write_checksum=True).compress(jsonl)
    sealed = (".gz", ".xz", ".zst")
    rng = random.Random(f"data {seed}")
    for number in range(count):
        name = list(files)[(seed * count + number) % len(files)]
        how, content = damage(files[name], rng)
        path = folder / f"{number}-{name}"
        path.write_bytes(content)

        def attempt(path: pathlib.Path = path) -> Faults:
            try:
                found = [record.text for record, *_ in RecordFiles(str(path), "data.path")]
            except DataError as error:
                return [] if path.name in str(error) else [("other", f"names no file: {error}")]
            finally:
                path.unlink()
            # The header of gzip has a name and a time that its checksum does not cover; so may zeros at its end be.
            if path.suffix in sealed and found != texts:
                return [("wrong", f"{len(found)} of {len(texts)} records without an error")]
            return []

        yield f"{name} {how}", attempt


_ODD = (
    "null",
    "[]",
    "{}",
    "-1",
    "0",
    "1e400",
    ".nan",
    "'x'",
    "9" * 30,
    "[[[[1]]]]",
    '"\\ud800"',
    "&a [*a]",
    "true",
    "~/x",
)


def config(
    seed: int, count: int, folder: pathlib.Path, lab: pathlib.Path
) -> Iterator[tuple[str, Callable[[], Faults]]]:
    """Settings, a tokenizer or a document of a run is damaged; what reads it succeeds or refuses in words."""
    from memjax.config.load import load
    from memjax.config.run import RunConfig
    from memjax.data.tokenizers.base import Tokenizer
    from memjax.errors import CheckpointError, ConfigError, DataError
    from memjax.monitoring.metrics import read_metrics
    from memjax.runs.folder import RunFolder

    run = folder / "run"
    shutil.copytree(lab / "reference", run, ignore=shutil.ignore_patterns("checkpoints", "plots"))
    shutil.copytree(lab / "reference/checkpoints" / str(STEPS), run / "checkpoints" / str(STEPS))
    settings = load(RunConfig, lab / "reference/config.yaml", ["--run.dir", str(run)])
    readers: dict[str, Callable[[], Any]] = {
        "config.yaml": lambda: load(RunConfig, run / "config.yaml"),
        "tokenizer.json": lambda: Tokenizer.load(run),
        "summary.json": RunFolder.of(settings).read_summary,
        "metrics.jsonl": lambda: list(read_metrics(run / "metrics.jsonl")),
        f"checkpoints/{STEPS}/meta/metadata": lambda: RunFolder.of(settings).saved_config(),
        f"checkpoints/{STEPS}/digests/metadata": lambda: RunFolder.of(settings).began(),
    }
    rng = random.Random(f"config {seed}")
    for number in range(count):
        name = list(readers)[number % len(readers)]
        path = run / name
        before = path.read_bytes()
        if name == "config.yaml" and rng.random() < 0.6:
            lines = before.decode().splitlines()
            place = rng.randrange(len(lines))
            key, odd = lines[place].partition(":")[0], rng.choice(_ODD)
            lines[place] = rng.choice((f"{key}: {odd}", f"{key}x: 1", f"  {lines[place]}", f"{key}: !!python/name:os"))
            how, after = f"line {place}: {lines[place]!r}", "\n".join(lines).encode()
        else:
            how, after = damage(before, rng)

        def attempt(
            name: str = name, path: pathlib.Path = path, before: bytes = before, after: bytes = after
        ) -> Faults:
            hidden = name.startswith("checkpoints") and (run / "config.yaml").rename(run / "config.hidden")
            path.write_bytes(after)
            try:
                readers[name]()
            except (ConfigError, DataError, CheckpointError) as error:
                text = str(error)
                return [("other", f"a message of {len(text)} letters")] if len(text) > 3000 else []
            finally:
                path.write_bytes(before)
                if hidden:
                    (run / "config.hidden").rename(run / "config.yaml")
            return []

        yield f"{name} {how}", attempt


_CHEATS = {
    "exits": "import os; os._exit(0)",
    "exits politely": "raise SystemExit",
    "writes everywhere": "import os\nfor i in range(3, 64):\n  try: os.write(i, b'0' * 64)\n  except OSError: pass\n"
    "os._exit(0)",
    "traces": "import sys; sys.settrace(print)",
    "searches": "import gc; gc.get_objects()",
    "ends its watcher": "import os; os.kill(os.getppid(), 9)",
    "waits": "import time; time.sleep(99)",
    "computes": "while True: pass",
    "allocates": "x = [bytes(1 << 20) for _ in range(9999)]",
    "fills the disk": "for i in range(9999): open(str(i), 'wb').write(bytes(1 << 20))",
    "makes files": "for i in range(99999): open(str(i), 'w').close()",
    "makes deep folders": "import os\nfor i in range(2000): os.mkdir('d'); os.chdir('d')",
    "leaves a FIFO": "import os; os.mkfifo('errors'); os.mkfifo('x')",
    "stays": "import os, time\nif os.fork() == 0:\n  os.setsid(); os.fork(); time.sleep(99)",
    "has a surrogate": "x = '\ud800'",
    "prints without end": "import sys\nwhile True: sys.stderr.write('x' * 9999)",
    "ignores signals": "import signal\nfor i in (1, 2, 15, 24): signal.signal(i, signal.SIG_IGN)\nwhile True: pass",
    "reads the environment": "import os; print(open(f'/proc/{os.getppid()}/environ').read()); os._exit(0)",
}


def sandbox(
    seed: int, count: int, folder: pathlib.Path, lab: pathlib.Path
) -> Iterator[tuple[str, Callable[[], Faults]]]:
    """Programs whose tests cannot pass."""
    from memjax.evaluation.question_sets.sandbox import Limits, missing_protection, run_program

    tempfile.tempdir = str(folder)
    print(f"without: {', '.join(missing_protection()) or 'nothing'}", flush=True)

    def attempt(source: str) -> Faults:
        faults: Faults = []
        if run_program(source, "assert False", Limits(cpu_seconds=1, seconds=3)).passed:
            faults.append(("wrong", "passed"))
        if left := list(folder.iterdir()):
            faults.append(("other", f"left {left}"))
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(folder) in path.read_text(errors="replace") and path.parent.name != str(os.getpid()):
                    faults.append(("other", "a process stays"))
        return faults

    for name, source in _CHEATS.items():
        yield name, lambda source=source: attempt(source)


def main() -> None:
    """Makes the attempts of one process."""
    kind, seed, count, folder, lab = sys.argv[1:]
    attempts = {"flips": flips, "data": data, "config": config, "sandbox": sandbox}[kind]
    for name, attempt in attempts(int(seed), int(count), pathlib.Path(folder), pathlib.Path(lab)):
        print(json.dumps({"begin": name}), flush=True)
        # Nothing catches it: the process ends, and its last line says where.
        signal.alarm(int(QUICKLY) + 20)
        try:
            faults = attempt()
        except Exception:
            faults = [("tracebacks", traceback.format_exc())]
        signal.alarm(0)
        print(json.dumps({"end": name, "faults": faults}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
    main()
