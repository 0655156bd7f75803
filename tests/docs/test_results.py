"""The site's charts and sample outputs match the committed results."""

import importlib
import json
import pathlib
import re
import statistics
import xml.etree.ElementTree
from collections import defaultdict

import pytest

from memjax.runs.folder import RunFolder
from memjax.training.finish import describe_summary

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
MEASURED = ROOT / "experiments" / "bench" / "results"


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("results")


def words(picture: str) -> list[str]:
    """Lists the text elements of a picture, in order."""
    return [
        element.text or ""
        for element in xml.etree.ElementTree.fromstring(picture).iter()
        if element.tag.endswith("text")
    ]


def means(experiment: str, metric: str) -> dict[tuple[int, str], str]:
    values = defaultdict(list)
    for row in json.loads((ROOT / "experiments" / experiment / "results" / "full.json").read_text())["runs"]:
        if row["stage"] == "full":
            values[row["facts"], row["family"]].append(row[metric])
    return {key: f"{statistics.mean(group):.1%}" for key, group in values.items()}


def test_the_curve_of_the_first_page_shows_the_means_of_six_models(results):
    recall = means("001_fact_capacity", "recall")
    families = ("dense_x1", "dense_x2", "dense_x4", "memory_plus_small", "memory_plus", "memory_plus_large")
    shown = [figure for word in words(results.facts_curve()) for figure in re.findall(r"\d+\.\d%", word)]
    assert shown == [recall[360_000, family] for family in families]


@pytest.mark.parametrize(
    ("chart", "experiment", "metric"),
    [("facts_bars", "001_fact_capacity", "recall"), ("real_facts_bars", "002_real_facts", "exact_match")],
)
def test_bars_of_experiments_show_the_mean_of_every_family(results, chart, experiment, metric):
    expected = means(experiment, metric)
    shown = [word for word in words(getattr(results, chart)()) if word.endswith("%")]
    assert sorted(shown) == sorted(expected.values())


def test_a_bar_is_as_long_as_its_value(results):
    picture = xml.etree.ElementTree.fromstring(results.step_bars())
    lengths = [float(element.attrib["width"]) for element in picture.iter() if element.tag.endswith("rect")]
    figures = [float(word.replace(",", "")) for word in words(results.step_bars()) if re.fullmatch(r"\d+,\d+", word)]
    assert len(lengths) == len(figures) == 5
    assert lengths == pytest.approx([figure / figures[0] * lengths[0] for figure in figures], rel=1e-3)


def test_bars_of_speed_were_measured(results):
    operations = {f"{row['ms']:.3f} ms" for row in json.loads((MEASURED / "ops-nvidia-h200.json").read_text())["rows"]}
    inference = json.loads((MEASURED / "inference-nvidia-h200.json").read_text())["rows"]
    tokens = {f"{row['ms a token']:.3f} ms" for row in inference if row["prompt"] == 512}
    for chart, measured, count in ((results.operation_bars(), operations, 11), (results.generation_bars(), tokens, 6)):
        shown = [word for word in words(chart) if word.endswith(" ms")]
        assert len(shown) == count
        assert set(shown) <= measured


def test_the_page_on_results_names_figures_of_the_results():
    text = " ".join((DOCS / "results.md").read_text().split())
    memory = json.loads((MEASURED / "inference-memory-nvidia-h200.json").read_text())["rows"]
    ratios = [row["of dense"] for row in memory if row["model"] == "Memory+" and row["prompt"] == 512]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times as long as the dense model" in text
    speed = json.loads((MEASURED / "ops-nvidia-h200.json").read_text())["copy_bytes_per_second"]
    assert f"{speed / 1e12:.2f} TB/s" in text
    upcycled = json.loads((ROOT / "experiments" / "003_upcycle_facts" / "result.json").read_text())["measured"]
    assert f"learned {upcycled['memory']['recall']:.0%} of".replace("%", " %") in text
    assert upcycled["half_text_faster"]["recall"] > 0.99
    assert upcycled["half_text_faster"]["bits_per_byte"] < upcycled["base"]["bits_per_byte"]


def test_statements_about_forgetting_match_the_results():
    rows = json.loads((ROOT / "experiments/005_continual_learning/results/full.json").read_text())["runs"]
    tried = [row for row in rows if row["how"] == "together" and row["seed"] == 0 and not row.get("larger")]
    least = {
        family: min(row["old_lost"] for row in tried if row["family"] == family and row["paraphrases"] >= 0.7)
        for family in ("sparse", "full", "lora")
    }
    shares = [f"{least[family]:.0%}".replace("%", " %") for family in ("sparse", "full", "lora")]
    for page in (ROOT / "README.md", DOCS / "knowledge.md"):
        text = " ".join(page.read_text().split())
        said = re.search(r"(\d+ %) of the old \w+[,;][^%]* full finetuning,? (\d+ %)[^%]* LoRA,? (\d+ %)", text)
        assert said is not None, page.name
        assert list(said.groups()) == shares, page.name
    (larger,) = [row for row in rows if row["family"] == "sparse" and row.get("larger")]
    told = f"in one of 965m parameters rows learn {larger['paraphrases']:.0%} and lose {larger['old_lost']:.0%}"
    assert told.replace("%", " %") in " ".join((ROOT / "README.md").read_text().split())
    adam = [row for row in tried if row["optimizer"] == "rowwise_adam" and 0.09 < row["old_lost"] < 0.11]
    learned = {row["rows_given"]: row["paraphrases"] for row in adam if row["family"] in ("sparse", "all_rows")}
    told = [f"{learned[rows]:.0%}".replace("%", " %") for rows in (200, 1000, 0)]
    page = " ".join((DOCS / "knowledge.md").read_text().split())
    assert f"200 rows learned {told[0]} of the new ones, 1,000 rows {told[1]} and all rows {told[2]}." in page
    (less,) = [row for row in tried if row["family"] == "lora" and row["lr"] == 3.3e-05]
    page = " ".join((DOCS / "results.md").read_text().split())
    assert f"with {100 * less['paraphrases']:.0f} % learned, it still lost {100 * less['old_lost']:.0f} %" in page


def test_statements_about_knowing_match_the_results():
    folder = ROOT / "experiments/006_knowing_and_guessing"
    auroc = defaultdict(list)
    for row in json.loads((folder / "results/full.json").read_text())["runs"]:
        if row["stage"] == "people":
            auroc[row["family"]].append(row["guessing"]["signals"]["answer"]["known"])
    of_families = [statistics.mean(seeds) for seeds in auroc.values()]
    said = f"none reaches it ({min(of_families):.3f} to {max(of_families):.3f})"
    assert said in " ".join((folder / "README.md").read_text().split())


def test_the_table_beside_the_paper_has_the_means_of_the_experiments(results):
    lines = [re.split(r" *\| *", line)[1:-1] for line in results.paper_table().splitlines()[2:]]
    recall, exact = means("001_fact_capacity", "recall"), means("002_real_facts", "exact_match")
    shown = {row[0]: row[-2:] for row in lines}
    assert list(shown) == list(results.PAPER)
    assert shown["dense"] == [recall[360_000, "dense_x1"], exact[120_000, "dense_x1"]]
    assert shown["MoE"] == [recall[360_000, "moe"], ""]
    assert shown["Memory+, 4 million"] == [recall[360_000, "memory_plus_large"], exact[120_000, "memory_plus_large"]]
    assert shown["Memory+, 64 million"] == ["", ""]


def test_the_output_of_the_quick_start_is_that_of_its_summary(tmp_path):
    summary = json.loads((DOCS / "quickstart" / "summary.json").read_text())
    closing = describe_summary(summary, RunFolder(pathlib.Path("runs/quickstart")))
    assert (DOCS / "quickstart" / "output.txt").read_text().endswith(f"\n{closing}\n")
