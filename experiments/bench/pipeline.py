"""Tokens per second for which one thread builds batches, by kind of data and packing: `pipeline.py [--before COMMIT]`.

Facts are sentences of about ten tokens, and articles consist of many; a row has 256 tokens, a batch 128 rows. This code
and an older commit are timed in alternating processes, and the best round of each counts. `tokens/s` by the wall clock
depends on how many cores are idle, since the tokenizer runs on all of them; `tokens/CPU s` counts the time of all.
"""

import argparse
import json
import os
import pathlib
import shlex
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import cases
import generate_cpu
import numpy as np
import timing

from memjax.config.data import BiographiesConfig, DataConfig
from memjax.data.dataset import train_tokenizer
from memjax.data.sources.biographies import statements
from memjax.io.files import write_atomic

BEFORE = "7568fb7"  # records went through Grain one by one
CLOCKS = ("tokens/s", "tokens/CPU s")


def make_data(folder: pathlib.Path, small: bool) -> None:
    """Writes facts, articles and a tokenizer."""
    facts = [f"{fact.prompt}{fact.answer}." for fact in statements(BiographiesConfig(num_people=20_000))]
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(4.5, 1.0, 20 if small else 2000).astype(int) + 1
    articles = [" ".join(facts[i] for i in rng.integers(len(facts), size=size)) for size in sizes]
    for name, texts in (("facts", facts), ("articles", articles)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(DataConfig(source="jsonl", path=str(folder / "articles.jsonl")), 8192).save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/bench/results"))
    parser.add_argument("--rounds", type=int, default=3, help="processes per commit, of which the best counts")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per measurement")
    parser.add_argument("--before", default=BEFORE, help="an older commit (needs a Git checkout), or '' for none")
    parser.add_argument("--small", action="store_true", help="few articles")
    arguments = parser.parse_args()
    rows: dict[str, cases.Row] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        make_data(folder, arguments.small)
        codes = {"now": cases.ROOT}
        if arguments.before:
            codes["before"] = generate_cpu.checkout(arguments.before, folder / "code")
        for _ in range(arguments.rounds):
            for when, code in codes.items():
                case, result = str(cases.HERE / "pipeline_case.py"), folder / "result.json"
                generate_cpu.run(code, case, str(folder), str(result), str(arguments.seconds))
                for name, speeds in json.loads(result.read_text()).items():
                    row = rows.setdefault(name, {"data": name})
                    for clock, speed in speeds.items():
                        row[f"{clock}, {when}"] = max(row.get(f"{clock}, {when}", 0), round(speed))
    columns = ["data"]
    for clock in CLOCKS:
        columns += [f"{clock}, {when}" for when in reversed(codes)]
        if "before" in codes:
            columns.append(f"ratio of {clock}")
            for row in rows.values():
                row[columns[-1]] = round(row[f"{clock}, now"] / row[f"{clock}, before"], 2)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        **timing.environment(),
        "before": arguments.before or None,
    }
    record |= {"processors": os.cpu_count(), "rows": list(rows.values())}
    timing.write_record(arguments.out / "pipeline-cpu.json", record)
    heading = f"# The input pipeline in one thread, on {os.cpu_count()} CPU cores\n\n"
    write_atomic(arguments.out / "pipeline-cpu.md", heading + timing.table(record["rows"], columns) + "\n")
    print(timing.table(record["rows"], columns))


if __name__ == "__main__":
    main()
