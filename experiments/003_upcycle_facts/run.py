"""Adds a memory beside two feed-forward layers of a dense model, and teaches it 1,000 facts: see README.md."""

import argparse
import json
import lzma
import pathlib
import random
from typing import Any, NamedTuple

from memjax import train
from memjax.config.memory import MemoryConfig
from memjax.io.files import write_atomic

HERE = pathlib.Path(__file__).parent
NUM_FACTS, HELD_OUT_BYTES = 1_000, 200_000
MEMORY = MemoryConfig(
    layers=(1, 2), placement="parallel", num_keys=96, num_heads=2, top_k=8, key_dim=128, output_gate=True
)

TRAININGS = (
    ("memory", 3.0, ()),
    ("all", 8.0, ("--optim.freeze_dense", "false", "--optim.lr", "3e-3", "--train.steps", "300")),
    ("half_text", 1.0, ("--optim.freeze_dense", "false", "--optim.lr", "1e-3", "--train.steps", "700")),
    ("half_text_faster", 1.0, ("--optim.freeze_dense", "false", "--optim.lr", "2e-3", "--train.steps", "900")),
)
"""Name, weight of the facts relative to the text, and settings that differ from facts.yaml."""


class Fact(NamedTuple):
    prompt: str
    answer: str
    attribute: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=pathlib.Path, required=True, help="training text: JSON lines with `text`")
    parser.add_argument("--held_out", type=pathlib.Path, required=True, help="held-out text, likewise")
    parser.add_argument(
        "--questions", type=pathlib.Path, required=True, help="EntityQuestions' training part, .jsonl.xz"
    )
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the runs")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    facts = write_facts(arguments.questions, work / "facts.jsonl")
    text = shorten(arguments.text, work / "text.jsonl", 12_000_000)

    from memjax.interop.upcycle import upcycle_run

    run(HERE / "base.yaml", work / "base", "--data.path", str(text))
    if not (work / "upcycled").exists():
        upcycle_run(work / "base", work / "upcycled", MEMORY)
    for name, weight, settings in TRAININGS:
        parts = [
            {"name": "facts", "path": str(work / "facts.jsonl"), "weight": weight},
            {"name": "text", "path": str(text), "weight": 1.0},
        ]
        mixture = ["--data.mixture", json.dumps(parts), "--data.path", "null"]
        config = over(work / "upcycled/config.yaml", HERE / "facts.yaml", work / f"{name}.yaml")
        run(config, work / name, "--train.init_from", str(work / "upcycled"), *mixture, *settings)
    trained = [name for name, *_ in TRAININGS]
    measured = {name: measure(work / name, facts, arguments.held_out) for name in ("base", "upcycled", *trained)}
    seconds = {name: read_seconds(work / name) for name in ("base", *trained)}
    before = measured["base"]["bits_per_byte"]
    rise = {name: measured[name]["bits_per_byte"] / before - 1 for name in trained}
    result = {"facts": NUM_FACTS, "training_seconds": seconds, "measured": measured, "rise": rise}
    write_atomic(HERE / "result.json", json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def write_facts(source: pathlib.Path, target: pathlib.Path) -> list[Fact]:
    """Draws facts evenly from all questions with a single answer, and writes them as training records."""
    with lzma.open(source, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    single = {row["question"]: row for row in found if len(row["answers"]) == 1}
    drawn = random.Random(0).sample(sorted(single), NUM_FACTS)
    facts = [Fact(f"{name} Answer:", f" {single[name]['answers'][0]}", single[name]["relation"]) for name in drawn]
    rows = [json.dumps({"prompt": fact.prompt, "answer": fact.answer}, ensure_ascii=False) for fact in facts]
    target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return facts


def shorten(source: pathlib.Path, target: pathlib.Path, size: int) -> pathlib.Path:
    """Copies the first lines of a file, about `size` bytes."""
    with source.open(encoding="utf-8") as lines:
        target.write_text("".join(lines.readlines(size)), encoding="utf-8")
    return target


def over(base: pathlib.Path, changes: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Writes a config that extends the base with the changes."""
    target.write_text(f"extends: {json.dumps(str(base.resolve()))}\n{changes.read_text()}")
    return target


def run(config: pathlib.Path, folder: pathlib.Path, *settings: str) -> None:
    """Trains, unless the run is finished."""
    if code := train.main([str(config), "--run.dir", str(folder), *settings]):
        raise SystemExit(f"{folder} ended with {code}")


def read_seconds(folder: pathlib.Path) -> float:
    """Seconds spent in training steps."""
    return round(json.loads((folder / "summary.json").read_text())["training_seconds"], 1)


def measure(folder: pathlib.Path, facts: list[Fact], held_out: pathlib.Path) -> dict[str, Any]:
    """Share of questions answered exactly, and bits per byte of held-out text."""
    import memjax
    from memjax.evaluation.perplexity import bits_per_byte
    from memjax.evaluation.recall import recall

    model, tokenizer = memjax.load(folder)
    with held_out.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    bits = bits_per_byte(model, tokenizer, texts, sequence_length=128, max_bytes=HELD_OUT_BYTES)
    accuracy = recall(model, tokenizer, facts).accuracy  # pyright: ignore[reportArgumentType]  # nobody is asked about
    return {"recall": accuracy, "bits_per_byte": bits.bits_per_byte}


if __name__ == "__main__":
    main()
