"""Times generation: `python experiments/bench/inference.py [--only PART ...] [--out FOLDER] [--small]`.

Dense against Memory+ of one size, in bfloat16, at several batch sizes and prompt lengths: the time to the first token
of a batch of prompts (prefill, on the host), and the milliseconds of each further token, greedy: "ms a token" for
steady decoding, as in servers, and "streamed ms" from the first token on, with the growing chunks of a stream. A
model's cases of one length run in their own process, long prompts last. If transformers can be imported, the `generate`
of a Llama of the same shape is timed, with a dynamic and with a (compiled) static cache. `tables` are 16 M slots, and
1 M in other formats and in host memory, with random rows. `attention` times decode attention alone, with every
implementation and tile, and `lookup` times what a memory layer does between its matrix products, with every tile; these
come last, so request them with `--only attention lookup`. The record is written after every process, and keeps the rows
of other runs.

With --small (for CPUs), a few small cases only show that everything runs.
"""

import argparse
import importlib.util
import itertools
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import cases
import timing
from train_step import SMALL, SMALL_MEMORY

from memjax.config.load import load
from memjax.config.run import RunConfig

COLUMNS = (
    "model",
    "batch",
    "prompt",
    "first token ms",
    "ms a token",
    "streamed ms",
    "tokens/s",
    "of dense",
    "of transformers",
)
COLUMNS += ("compile s", "peak GB", "note")
KEY = ("model", "batch", "prompt")

PARTS = ("dense", "memory", "transformers", "tables", "attention", "lookup")
TABLES = (
    ("Memory+ 16M", 4096, "bfloat16", "device"),
    ("Memory+, host", 1024, "bfloat16", "host"),
    ("Memory+, int8", 1024, "int8", "device"),
    ("Memory+, int4", 1024, "int4", "device"),
    ("Memory+, int8, host", 1024, "int8", "host"),
    ("Memory+, int4, host", 1024, "int4", "host"),
    ("Memory+ 16M, host", 4096, "bfloat16", "host"),
    ("Memory+ 16M, int8, host", 4096, "int8", "host"),
)
"""Name, keys per half, row format and place."""


def processes(arguments: argparse.Namespace) -> list[tuple[str, str, cases.Row]]:
    """Parts, scripts and their cases, in the order in which they run; long prompts come last."""
    small = arguments.small
    dense, memory_plus = (
        str(cases.ROOT / f"configs/{arguments.size}_{kind}.yaml") for kind in ("dense", "memory_plus_1m")
    )
    words = [*SMALL.split(), "--model.param_dtype", "float32"] if small else ["--model.param_dtype", "bfloat16"]
    memory_words = [*words, *SMALL_MEMORY.split(), "--model.memory.num_keys", "16"] if small else words
    model = load(RunConfig, pathlib.Path(dense), SMALL.split() if small else []).model
    names = ("dim", "num_layers", "num_heads", "kv_heads", "ffn_dim", "vocab_size", "rope_theta", "norm_eps")
    shape = {name: getattr(model, name) for name in names}
    lengths = (16,) if small else (512, 4096)
    # Steady decoding uses the longest chunks.
    counts = {"new": 8, "chunk": 4, "rounds": 1} if small else {"new": 96, "chunk": 32, "rounds": arguments.rounds}

    def of_length(length: int) -> list[tuple[str, str, cases.Row]]:
        shared = {"sizes": [(batch, length) for batch in ((1, 2) if small else (1, 8, 64))], **counts}

        def memjax(part: str, name: str, preset: str, settings: list[str], **more: str) -> tuple[str, str, cases.Row]:
            profile = str(arguments.out / "profiles" / name.replace(" ", "-")) if arguments.profile else None
            case = {"kind": "engine", "model": name, "preset": preset, "settings": settings, "profile": profile}
            return part, "inference_case.py", case | shared | more

        def of_table(name: str, num_keys: int, table_format: str, place: str) -> tuple[str, str, cases.Row]:
            settings = [*memory_words, "--model.memory.num_keys", str(16 if small else num_keys)]
            return memjax("tables", name, memory_plus, settings, format=table_format, place=place)

        def transformers(cache: str) -> tuple[str, str, cases.Row]:
            case = {"model": f"transformers, {cache} cache", "cache": cache, "shape": shape}
            return "transformers", "inference_peer.py", case | shared

        return [
            memjax("dense", "dense", dense, words),
            transformers("static"),
            memjax("memory", "Memory+", memory_plus, memory_words),
            transformers("dynamic"),
            *(of_table(*table) for table in TABLES if length == lengths[0]),
        ]

    sizes = [(1, 16), (2, 16)] if small else [(batch, length) for length in lengths for batch in (1, 8, 64)]
    attention = {"kind": "attention", "model": "decode attention", "heads": model.num_heads, "width": model.head_width}
    attention |= {"small": small, "sizes": sizes, **counts}
    lookup = {"kind": "lookup", "model": "lookup", "small": small, "preset": memory_plus, "settings": memory_words}
    lookup |= {"sizes": [1] if small else [1, 64], "rounds": arguments.rounds}
    alone = [("attention", "inference_case.py", attention), ("lookup", "inference_case.py", lookup)]
    return [*itertools.chain(*map(of_length, lengths)), *alone]


def compare(rows: list[cases.Row]) -> None:
    """Adds each row's time per token relative to the dense model, and to the faster cache of transformers."""
    found = {tuple(row.get(name) for name in KEY): row.get("ms a token") for row in rows}
    for row in rows:
        own, size = row.get("ms a token"), (row.get("batch"), row.get("prompt"))
        dense = found.get(("dense", *size))
        peers = [found.get((f"transformers, {cache} cache", *size)) for cache in ("dynamic", "static")]
        peer = min((time for time in peers if time), default=None)
        row["of dense"] = own / dense if own and dense and row["model"].startswith("Memory+") else None
        row["of transformers"] = own / peer if own and peer and not row["model"].startswith("transformers") else None


def main() -> None:
    parser = cases.parser(__doc__)
    parser.add_argument("--size", default="373m", help="presets configs/SIZE_dense.yaml and SIZE_memory_plus_1m.yaml")
    parser.add_argument("--only", nargs="*", help=f"parts: {' '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5, help="texts per size, of which the median counts")
    parser.add_argument("--profile", action="store_true", help="also trace a chunk of every size")
    parser.add_argument(
        "--seconds", type=float, default=240, help="time limit: no process starts later, or runs longer"
    )
    arguments = parser.parse_args()
    command = cases.command("inference", arguments)
    arguments.out = arguments.out.resolve()
    if unknown := set(arguments.only or []) - set(PARTS):
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    started, record = time.monotonic(), {"command": command, "rows": []}
    print(timing.table([], COLUMNS), flush=True)
    for part, script, case in processes(arguments):
        if part not in (arguments.only or PARTS):
            continue
        left = arguments.seconds - (time.monotonic() - started)
        if script == "inference_peer.py" and importlib.util.find_spec("transformers") is None:
            rows, environment = [{"note": "transformers is not installed"}], {}
        elif left <= 0:
            rows, environment = [{"note": "no time left"}], {}
        else:
            # The script prints its rows as it goes.
            rows, environment = cases.run(script, case | {"seconds": left}, left)
        record |= environment
        record["rows"] += [{"model": case["model"]} | row for row in rows]
        compare(record["rows"])
        stem = cases.stem("inference", arguments, record)
        cases.write(arguments.out, stem, record, title="Generation on", columns=COLUMNS, key=KEY)
    print(f"\n{timing.table(record['rows'], COLUMNS)}", flush=True)


if __name__ == "__main__":
    main()
