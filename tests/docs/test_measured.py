"""The README's speed figures match the committed results."""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def test_every_figure_of_the_speed_table_was_measured():
    results = json.loads((ROOT / "experiments/bench/results/ops-nvidia-h200.json").read_text())
    measured = {f"{row['ms']:.3f}" for row in results["rows"]} | {f"{results['F_ms']:.3f}"}
    section = (ROOT / "README.md").read_text().split("## Speed")[1].split("Whole training steps")[0]
    figures = re.findall(r"\d+\.\d{3}", section)
    assert len(figures) >= 15
    assert set(figures) <= measured
    assert f"{results['copy_bytes_per_second'] / 1e12:.2f} TB/s" in section


def test_speeds_of_whole_steps_were_measured():
    rows = json.loads((ROOT / "experiments/bench/results/step-nvidia-h200.json").read_text())["rows"]
    speed = {row["case"]: row["tokens/s"] for row in rows if "tokens/s" in row}
    section = (ROOT / "docs/speed.md").read_text().split("Whole training steps")[1].split("\n\n")[0]
    told = [int(figure.replace(",", "")) for figure in re.findall(r"\d{3},\d{3}", section)]
    dense, torch = speed["dense, bfloat16 parameters"], speed["PyTorch dense, bfloat16 parameters"]
    slots = ("1,048,576 slots, bfloat16 parameters", "16,777,216 slots", "47,997,184 slots")
    on_two = {
        row["mesh"]: row["tokens/s per GPU"]
        for row in rows
        if row["case"] in ("whole step, 1 of 2", "whole step, 2 of 2")
    }
    pair = [on_two["data 1 x memory 2"], on_two["data 1 x memory 1"]]
    assert told == [dense, *(speed[f"Memory+, {name}"] for name in slots), *pair]
    text = " ".join(section.split())
    again = speed["dense, bfloat16 parameters, once more"] / speed["PyTorch dense, bfloat16 parameters, once more"]
    assert f"{again:.2f} to {dense / torch:.2f} of a compiled PyTorch" in text
    assert f"{pair[0] / pair[1]:.0%} of the".replace("%", " %") in text


def test_speeds_of_generation_were_measured():
    rows = json.loads((ROOT / "experiments/bench/results/inference-nvidia-h200.json").read_text())["rows"]
    found = {(row["model"], row["batch"]): row for row in rows if row["prompt"] == 512}
    table = (ROOT / "README.md").read_text().split("Generation of the dense")[1].split("\n\n")[1]
    for batch in (1, 8, 64):
        ours, theirs = found["dense", batch], found["transformers, static cache", batch]
        steady = f"{ours['ms a token']:.3f} | {theirs['ms a token']:.3f}"
        assert f"| batch {batch} | {steady} | {ours['first token ms']:.1f} | {theirs['first token ms']:.1f} |" in table


def test_speeds_of_generation_with_a_memory_were_measured():
    rows = json.loads((ROOT / "experiments/bench/results/inference-memory-nvidia-h200.json").read_text())["rows"]
    of_model = {(row["model"], row["batch"]): row for row in rows if row["prompt"] == 512}
    (one, eight, many), large = ([of_model[name, size] for size in (1, 8, 64)] for name in ("Memory+", "Memory+ 16M"))
    text = (
        f"took {one['ms a token']:.3f} at batch 1, {eight['ms a token']:.3f} at batch 8 and {many['ms a token']:.3f} "
        f"at batch 64, {one['of dense']:.2f}, {eight['of dense']:.2f} and {many['of dense']:.2f} of the dense model; "
    )
    times = "{:.3f}, {:.3f} and {:.3f}: ".format(*(row["ms a token"] for row in large))
    text += f"with 16 million slots {times}" + "{:.2f}, {:.2f} and {:.2f}.".format(*(row["of dense"] for row in large))
    page = " ".join((ROOT / "docs/speed.md").read_text().split())
    assert text in page
    tables = json.loads((ROOT / "experiments/bench/results/inference-tables-nvidia-h200.json").read_text())["rows"]
    host = [f"{row['of dense']:.2f}" for row in tables if row["model"] == "Memory+, host" and row["batch"] in (1, 64)]
    assert f"it took {host[0]} of the dense model at batch 1 and {host[1]} at batch 64" in page


def test_speeds_of_the_server_were_measured():
    rows = json.loads((ROOT / "experiments/bench/results/serving-nvidia-h200.json").read_text())["rows"]
    (host,) = (row for row in rows if "host" in row["model"])
    staying, leaving = sorted((row for row in rows if row is not host), key=lambda row: row["hang_ups"])
    page = " ".join((ROOT / "docs/serve.md").read_text().split())
    engines = "speed of the engine generating 64 texts greedily at once", "engine's speed", "engine's speed"
    for row, engine in zip((staying, leaving, host), engines, strict=True):
        speed = f"it generated {row['tokens/s']:,.0f} tokens/s, {row['of engine']:.2f} of the {engine}"
        first = f"95 % of the first tokens came within {row['first token p95 ms'] / 1e3:.2f} s."
        assert f"{speed}, and {first}" in page
    again = json.loads((ROOT / "experiments/bench/results/serving-again-nvidia-h200.json").read_text())["rows"][0]
    assert {again[name] == staying[name] for name in ("model", "clients", "prompt", "new", "hang_ups")} == {True}
    speed = f"{again['tokens/s']:,.0f} tokens/s, {again['of engine']:.2f} of the engine's speed"
    assert f"repeated later, it generated {speed}" in page
