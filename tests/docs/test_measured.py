"""The README's figures of speed are those of the committed results."""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def test_every_figure_of_the_speed_table_was_measured():
    results = json.loads((ROOT / "experiments/bench/results/ops-nvidia-h200.json").read_text())
    measured = {f"{row['ms']:.3f}" for row in results["rows"]} | {f"{results['F_ms']:.3f}"}
    section = (ROOT / "README.md").read_text().split("## Speed")[1].split("\n## ")[0]
    figures = re.findall(r"\d+\.\d{3}", section)
    assert len(figures) >= 15
    assert set(figures) <= measured
    assert f"{results['copy_bytes_per_second'] / 1e12:.2f} TB/s" in section
