"""Times training steps: `python experiments/bench/train_step.py [--only PART ...] [--out FOLDER] [--small]`.

Dense against Memory+ of one size on one device, a PyTorch counterpart of the dense model, table sizes, documents that
share rows, cases that test the planner, XLA flags, and one device against several. The settings are those of the size's
presets except for the batch (4 x 4,096 tokens per device), `train.remat: none` and rows of one text; tokens are random.
Each case runs in its own process, so that an out-of-memory error is a row and the rest continues. The record is written
after every case, and keeps the rows of other runs; --resume skips cases that it contains.
`--only devices --devices 1 8` measures one device and eight: see devices.py.

With --small (for CPUs), a few small cases only show that everything runs.
"""

import argparse
import importlib.util
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import cases
import devices
import timing

from memjax.config.load import load
from memjax.config.run import RunConfig

ROOT = cases.ROOT

COLUMNS = ("part", "case", "mesh", "attention", "ms", "tokens/s", "MFU", "peak GB", "compiled GB")
COLUMNS += ("predicted GB", "predicted / peak", "compile s", "distinct rows", *devices.COLUMNS[1:], "last loss", "note")

SMALL = """
--model.dim 128 --model.num_layers 2 --model.num_heads 2 --model.ffn_dim 64 --model.vocab_size 512 --model.dtype float32
"""
SMALL_MEMORY = "--model.memory.layers 1 --model.memory.num_heads 2 --model.memory.top_k 4 --model.memory.key_dim 16 "
SMALL_MEMORY += "--optim.table.state_columns 64"
# The paper's largest table, with a small dense model: 128 GiB of rows on each of two devices.
HUGE = "--model.num_layers 4 --model.memory.layers 2 --model.memory.value_dim 2048 --data.batch_size 4"
# Learning rates with a visible effect within the timed steps.
FAST = "--optim.lr 1e-3 --optim.warmup_steps 10 --optim.table.warmup_steps 10 --mesh.memory 2"
BFLOAT16 = ["--model.param_dtype", "bfloat16"]

XLA_FLAGS = {
    "default flags": "",
    "Triton matrix products": "--xla_gpu_enable_triton_gemm=true",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "cuBLASLt": "--xla_gpu_enable_cublaslt=true",
    "autotune level 1": "--xla_gpu_autotune_level=1",
}

# Few layers, to compile fast; in the first three, most of the peak is activations and logits.
PLANNED = {
    "long rows, nothing again": ("dense", "--model.num_layers 4"),
    "long rows, attention in chunks": ("dense", "--model.num_layers 2 --train.attention chunked"),
    "a large vocabulary": ("dense", "--model.num_layers 2 --model.vocab_size {vocab}"),
    "memory, nothing again": ("memory", "--model.num_layers 4 --model.memory.layers {layers}"),
    "memory, blocks again": ("memory", "--model.num_layers 4 --model.memory.layers {layers} --train.remat block"),
}

PARTS = ("dense", "memory", "torch", "documents", "sizes", "remat", "planner", "xla", "devices", "largest")

Row = cases.Row


def cases_of(arguments: argparse.Namespace) -> dict[str, list[Row]]:
    """The cases of every part."""
    small = arguments.small
    dense, memory_plus = (str(ROOT / f"configs/{arguments.size}_{kind}.yaml") for kind in ("dense", "memory_plus_1m"))
    length = 64 if small else 4096
    batch = arguments.batch or (2 if small else 4)

    def case(name: str, preset: str, *settings: str, **more: Any) -> Row:
        common = ["--data.batch_size", str(batch), "--data.sequence_length", str(length), "--train.remat", "none"]
        common += [] if more.get("documents") else ["--data.document_mask", "false"]
        shrink = f"{SMALL} {SMALL_MEMORY if preset == memory_plus else ''}".split() if small else []
        windows = {"windows": 2, "steps": 2} if small else {"windows": 5, "steps": 10}
        found = {"case": name, "kind": "step", "preset": preset, "batch": batch, "length": length}
        found |= {
            "settings": [*common, *shrink, *settings, *arguments.settings],
            "xla_flags": "",
            "documents": False,
            "devices": 1,
        }
        return found | {"count_rows": False, "profile": None, "traces": None} | windows | more

    def memory_case(name: str, num_keys: int, *settings: str, **more: Any) -> Row:
        keys = ["--model.memory.num_keys", str(num_keys)]
        return case(name, memory_plus, *keys, *settings, **more)

    def planned(name: str, kind: str, settings: str) -> Row:
        words = settings.format(vocab=1024 if small else 128_000, layers="1" if small else "1,2").split()
        rows = batch if kind == "memory" else 4 * batch
        words += ["--data.batch_size", str(rows)]
        preset = dense if kind == "dense" else memory_plus
        return case(name, preset, *words, batch=rows, windows=2, steps=2 if small else 4)

    model = load(RunConfig, pathlib.Path(dense), [*(SMALL.split() if small else []), *arguments.settings]).model
    names = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size", "rope_theta", "norm_eps")
    shape = {name: getattr(model, name) for name in names}
    largest = [16] if small else [1024, 2048, 4096, 6928]
    documents = {"documents": True}
    fast = [*BFLOAT16, *FAST.split(), "--data.batch_size", str(2 * batch)]
    found = {
        "dense": [case("dense, float32 parameters", dense), case("dense, bfloat16 parameters", dense, *BFLOAT16)],
        "memory": [
            memory_case("Memory+, float32 parameters", largest[0], count_rows=True),
            memory_case("Memory+, bfloat16 parameters", largest[0], *BFLOAT16),
        ],
        "torch": [case("PyTorch dense, bfloat16 parameters", dense, kind="torch", shape=shape)],
        "documents": [
            case(f"dense, rows of documents, {name}", dense, "--train.attention", name, **documents)
            for name in ("cudnn", "chunked")
        ],
        "sizes": [memory_case(f"Memory+, {keys**2:,} slots", keys, count_rows=True) for keys in largest],
        "remat": [case(f"dense, remat {name}", dense, "--train.remat", name) for name in ("dots", "block")],
        "planner": [planned(name, kind, settings) for name, (kind, settings) in PLANNED.items()],
        "xla": [case(f"dense, {name}", dense, xla_flags=flags) for name, flags in XLA_FLAGS.items()],
        "devices": devices.cases_of(case, arguments.devices, batch, small=small),
        "largest": [
            memory_case("67,108,864 x 1,024 on two devices", 8192, *fast, devices=2, steps=20),
            memory_case("67,108,864 x 2,048 on two devices", 8192, *fast, *HUGE.split(), devices=2, steps=20),
        ],
    }
    if small:
        found = {part: found[part][:1] for part in ("dense", "memory", "torch", "planner")} | {
            "devices": found["devices"]
        }
    for part, of_part in found.items():
        for number, one in enumerate(of_part):
            one["part"] = part
            if arguments.profile:
                one |= {"traces": "operations", "profile": str(arguments.out / "profiles" / f"{part}-{number}")}
    return found


def run(case: Row, seconds: float) -> tuple[list[Row], Row]:
    """The rows of a case, and the environment of its process."""
    if case["kind"] == "torch" and importlib.util.find_spec("torch") is None:
        return [{"note": "PyTorch is not installed"}], {}
    script = "torch_peer.py" if case["kind"] == "torch" else "step_case.py"
    return cases.run(script, case, seconds, xla_flags=case["xla_flags"])


def main() -> None:
    parser = cases.parser(__doc__)
    parser.add_argument("--size", default="373m", help="presets configs/SIZE_dense.yaml and SIZE_memory_plus_1m.yaml")
    parser.add_argument("--batch", type=int, help="sequences per device")
    parser.add_argument("--only", nargs="*", help=f"parts: {' '.join(PARTS)}")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--profile", action="store_true", help="also trace three steps of every case")
    parser.add_argument("--seconds", type=float, default=570, help="time limit: no case starts later, or runs longer")
    parser.add_argument("--settings", default=[], type=str.split, help="settings for all cases, as train takes them")
    parser.add_argument("--resume", action="store_true", help="skip cases that the files of --stem contain")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], help="numbers of devices for part devices")
    arguments = parser.parse_args()
    command = cases.command("train_step", arguments)
    arguments.out = arguments.out.resolve()
    started, record = time.monotonic(), {"command": command, "rows": []}
    parts = cases_of(arguments)
    if unknown := set(arguments.only or []) - set(parts):
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    if arguments.resume and not arguments.stem:
        parser.error("--resume needs the --stem of the files")
    old = cases.read(arguments.out / f"{arguments.stem}.json").get("rows", []) if arguments.resume else []
    done = {(row["part"], row["case"]) for row in old if "ms" in row}
    wanted = [case for part in arguments.only or parts for case in parts[part] if arguments.cases in case["case"]]
    print(timing.table([], COLUMNS), flush=True)
    for case in [case for case in wanted if (case["part"], case["case"]) not in done]:
        left = arguments.seconds - (time.monotonic() - started)
        rows, environment = run(case, left) if left > 0 else ([{"note": "no time left"}], {})
        record |= environment
        same = {name: case[name] for name in ("part", "case", *devices.SAME) if name in case}
        record["rows"] += [same | row | {"commit": environment.get("commit")} for row in rows]
        stem = cases.stem("train_step", arguments, record)
        key = ("part", "case")
        what = {"title": "Training steps on", "columns": COLUMNS, "key": key, "compare": devices.compare}
        cases.write(arguments.out, stem, record, **what)
        print("\n".join(timing.table(record["rows"][-len(rows) :], COLUMNS).splitlines()[2:]), flush=True)


if __name__ == "__main__":
    main()
