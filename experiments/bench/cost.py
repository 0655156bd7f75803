"""What a larger table costs: `python experiments/bench/cost.py [--only PART ...] [--out FOLDER] [--small]`.

Memory+ of one size with 64 k, 1 M and 16 M slots: milliseconds of a training step (`steps`), and milliseconds and
joules per token in texts of 512 to 1,500 tokens at batch 1 and 64 (`tokens`), with the dense model and a dense one of
four times its arithmetic. Joules are those of the whole GPU, from its own counter. `plot` draws the existing record as
SVG and PNG; it runs automatically after the other parts. The record is written after each part, and keeps the rows of
other parts.

With --small (for CPUs, which report no energy), small models only show that everything runs.
"""

import json
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import cases
import timing
from train_step import SMALL, SMALL_MEMORY

PARTS = ("tokens", "steps", "plot")
KEY = ("part", "model", "batch")
COLUMNS = ("part", "model", "slots", "batch", "ms a step", "ms a token", "of dense", "joules a token", "watts")
COLUMNS += ("FLOPs of dense", "compile s", "note")
DENSE, DENSE_X4 = "dense", "dense, 4 x the arithmetic"
KEYS = {"Memory+ 16 M": 4096, "Memory+ 1 M": 1024, "Memory+ 64 k": 256}
"""Models with a memory, and their keys per half; the most important first."""


def cases_of(small: bool) -> dict[str, cases.Row]:
    """The case of each measured part."""
    preset = lambda name: str(cases.ROOT / f"configs/{name}.yaml")
    shrink, shrink_memory = (SMALL.split(), SMALL_MEMORY.split()) if small else ([], [])
    shared = [*shrink, "--model.param_dtype", "float32" if small else "bfloat16"]

    def model(name: str, file: str, *settings: str) -> cases.Row:
        return {"model": name, "preset": preset(file), "settings": [*shared, *settings]}

    dense = model(DENSE, "373m_dense")
    # 26 blocks of twice the width have 4.04 times the arithmetic of 24, including the logits.
    wide = ["--model.dim", "256"] if small else ["--model.num_layers", "26"]
    memories = [
        model(name, "373m_memory_plus_1m", *shrink_memory, "--model.memory.num_keys", str(keys // (16 if small else 1)))
        for name, keys in list(KEYS.items())[: 1 if small else None]
    ]
    batch = ["--data.batch_size", "2" if small else "4", "--data.sequence_length", "32" if small else "4096"]
    batch += ["--train.remat", "none", "--data.document_mask", "false"]
    vocab_size = 512 if small else 32_000
    texts = {"new": 32, "prompt": 16, "batches": [1], "warm seconds": 0, "least seconds": 0}
    if not small:
        texts = {"new": 960, "prompt": 512, "batches": [1, 64], "warm seconds": 1, "least seconds": 2.5}
    windows = {"windows": 2, "steps": 2} if small else {"windows": 5, "steps": 8}
    return {
        "tokens": {
            "kind": "tokens",
            "models": [dense, *memories, model(DENSE_X4, "1.3b_dense", *wide)],
            "vocab_size": vocab_size,
            **texts,
        },
        "steps": {
            "kind": "steps",
            "models": [one | {"settings": one["settings"] + batch} for one in (*memories, dense)],
            "documents": False,
            "count_rows": False,
            "profile": None,
            **windows,
        },
    }


def compare(rows: list[cases.Row]) -> None:
    """Adds each model's time and arithmetic relative to the dense one."""
    dense = {(row["part"], row.get("batch")): row for row in rows if row.get("model") == DENSE}
    for row in rows:
        base = dense.get((row["part"], row.get("batch")), {})
        column = "ms a step" if row["part"] == "steps" else "ms a token"
        row["of dense"] = row[column] / base[column] if column in row and column in base else None
        row["FLOPs of dense"] = row["FLOPs"] / base["FLOPs"] if "FLOPs" in row and "FLOPs" in base else None


def plot(rows: list[cases.Row], out: pathlib.Path, stem: str) -> None:
    """Draws times of steps and tokens against slots, and joules per token by model, as SVG and PNG."""
    from matplotlib.figure import Figure

    batches = sorted({row["batch"] for row in rows if row.get("batch") and "ms a token" in row})
    # A panel for each kind of measurement: part, batch, column, label.
    has_steps = any("ms a step" in row for row in rows)
    panels = [("steps", None, "ms a step", "ms a training step")] if has_steps else []
    panels += [("tokens", batch, "ms a token", f"ms a token, batch {batch}") for batch in batches]
    energy = [row for row in rows if row.get("joules a token")]
    figure = Figure(figsize=(10, 3.4 + (3 if energy else 0)), layout="constrained")
    top, *bottom = figure.subfigures(2 if energy else 1, 1, squeeze=False)[:, 0]
    for axes, (part, batch, column, label) in zip(top.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        over_slots(axes, [row for row in rows if row["part"] == part and row.get("batch") == batch], column, label)
    if energy:
        for axes, batch in zip(bottom[0].subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
            of_batch = sorted((row for row in energy if row["batch"] == batch), key=in_order, reverse=True)
            drawn = axes.barh(
                [row["model"] for row in of_batch], [row["joules a token"] for row in of_batch], height=0.6
            )
            axes.bar_label(drawn, fmt="{:.3g}", padding=3)
            axes.margins(x=0.2)
            axes.set_title(f"joules a token, batch {batch}", fontsize=10)
    out.mkdir(parents=True, exist_ok=True)
    for suffix in ("svg", "png"):
        figure.savefig(out / f"{stem}.{suffix}", dpi=120, metadata={"Date": None} if suffix == "svg" else None)


def in_order(row: cases.Row) -> tuple[bool, int]:
    """Sort key: dense, then the memories by slots, then the larger dense model."""
    return row["model"] == DENSE_X4, row["slots"]


def over_slots(axes: Any, rows: list[cases.Row], column: str, label: str) -> None:
    """Plots a column of the memory models against slots, with the dense model as a line; the axis begins at zero."""
    points = sorted((row["slots"], row[column]) for row in rows if row.get("slots") and row.get(column))
    axes.set_title(label, fontsize=10)
    axes.set_xlabel("slots")
    axes.grid(alpha=0.3)
    if points:
        axes.semilogx(*zip(*points, strict=True), marker="o", base=2, label="Memory+")
        axes.set_xticks([slots for slots, _ in points], [name_of(slots) for slots, _ in points])
        axes.minorticks_off()
        for slots, value in points:
            axes.annotate(f"{value:.3g}", (slots, value), xytext=(0, 6), textcoords="offset points", ha="center")
    dense = [row[column] for row in rows if row.get("model") == DENSE and row.get(column)]
    for value in dense:
        axes.axhline(value, color="gray", linestyle="--", label=f"dense, {value:.3g}")
    axes.margins(x=0.15)
    axes.set_ylim(0, 1.25 * max([value for _, value in points] + dense, default=1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=9)


def name_of(slots: int) -> str:
    """A number of slots in short form."""
    return next((f"{slots >> bits} {unit}" for bits, unit in ((20, "M"), (10, "k")) if slots >> bits), str(slots))


def main() -> None:
    parser = cases.parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--seconds", type=float, default=300, help="time limit: no part starts later, or runs longer")
    arguments = parser.parse_args()
    command = cases.command("cost", arguments)
    out, started = arguments.out.resolve(), time.monotonic()
    stem = arguments.stem
    for part, case in cases_of(arguments.small).items():
        left = arguments.seconds - (time.monotonic() - started)
        if part not in arguments.only or left <= 0:
            continue
        rows, environment = cases.run("cost_case.py", case, left)
        for row in rows:
            if "model" not in row:
                print(f"{part}: {row['note']}", flush=True)
        record = {"command": command, **environment, "rows": [row for row in rows if "model" in row]}
        stem = cases.stem("cost", arguments, record)
        compare(record["rows"])
        cases.write(out, stem, record, title="What a larger table costs on", columns=COLUMNS, key=KEY)
    if stem is None:
        parser.error("--only plot needs the record's name: --stem cost-DEVICE")
    record = json.loads((out / f"{stem}.json").read_text())
    plot(record["rows"], out, stem)
    print(f"\n{timing.table(record['rows'], timing.filled(record['rows'], COLUMNS))}", flush=True)


if __name__ == "__main__":
    main()
