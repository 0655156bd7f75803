"""The guarantees, and the results that support them: of campaigns, of tests, and on a GPU."""

import json
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

from lab import ROOT, Case
from records import RECORDS

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
ON_GPU = "bits-on-gpu"
"""Prefix of result files of runs that should be equal."""

_STEP, _EXACT = "tests/training/test_step.py", "tests/training/test_step_float64.py"
_LOADER, _SEARCH = "tests/data/test_loader.py", "tests/ops/test_product_key_search.py"
_EXPORT = "tests/interop/huggingface/test_convert.py::test_a_model_with_memory_goes_out_with_its_table_once"
PROMISES = {
    "R1": ("kill -9 at any time, or a second process, loses at most the steps since the last checkpoint", "kills two"),
    "R2": ("flipped bits in a checkpoint are detected, or change nothing", "flips"),
    "R3": ("so are files that are truncated, removed, or from another step", "flips"),
    "R4": ("an interrupted run ends bitwise equal to an uninterrupted one", "kills signals two disk"),
    "R5": ("with `run.deterministic`, the same holds on a GPU", ON_GPU),
    "R6": (
        "a checkpoint is restored bit for bit on another mesh",
        "tests/checkpoint/test_checkpoints.py::test_every_dtype_comes_back_bit_for_bit_on_another_mesh "
        "tests/runs/test_load.py::test_a_mesh_gets_the_same_model_split_by_columns",
    ),
    "R7": (
        "bfloat16 tables, as trained on GPUs, are read on machines that compute in float32",
        "tests/runs/test_load.py::test_a_table_saved_in_bfloat16_is_widened_where_the_machine_computes_in_float32",
    ),
    "R8": (
        "a signal in any phase saves the run, if there is anything to save, and ends it; also a signal to one of two "
        "processes",
        "signals tests/end_to_end/test_two_processes.py",
    ),
    "R9": ("floods of twenty signals do not damage the checkpoint", "signals"),
    "R10": ("a full, read-only or limited disk is a one-line error, and the run resumes once it is fixed", "disk"),
    "R11": ("the last step is saved before the report", "kills signals"),
    "R12": (
        "a NaN, even in a single shard's gradient, changes nothing and ends the run",
        f"{_STEP}::test_a_nan_in_one_perturbation_leaves_everything_as_it_was",
    ),
    "R13": (
        "micro-batches give the gradient of the whole batch",
        f"{_EXACT}::test_row_updates_of_micro_batches_on_a_mesh_are_plain_sgd_on_the_whole_batch",
    ),
    "R14": (
        "every mesh gives the same initial model and the same losses",
        f"{_EXACT}::test_every_mesh_draws_the_same_model_and_gives_the_same_losses",
    ),
    "R15": (
        "a different number of data workers is refused, with both numbers",
        f"{_LOADER}::test_a_place_in_other_data_is_refused",
    ),
    "R16": ("damaged data is an error that names the place, or is counted", " ".join(RECORDS)),
    "R17": (
        "ids beyond the vocabulary are refused",
        "tests/data/prepared/test_prepare.py::test_ids_past_the_vocabulary_are_refused_before_they_are_used",
    ),
    "R18": (
        "a different tokenizer or different data is refused",
        f"{_LOADER}::test_a_place_with_another_tokenizer_is_refused "
        f"{_LOADER}::test_other_text_of_as_many_records_is_refused_on_resume",
    ),
    "R19": (
        "NaN scores give NaN, with indices within the table",
        f"{_SEARCH}::test_nan_in_gives_nan_out_and_slots_stay_distinct",
    ),
    "R20": (
        "the product-key search finds the best of all slots",
        f"{_SEARCH}::test_slots_are_the_best_of_all_pairs",
    ),
    "R21": (
        "settings survive YAML, the command line and checkpoints",
        "tests/config/test_run.py::test_yaml_gives_back_an_equal_config",
    ),
    "R22": (
        "hostile files are refused, and nothing in them is executed",
        "settings tokenizers huggingface official documents runs table_files patch_files facts http",
    ),
    "R23": (
        "scores do not depend on the batch",
        "tests/inference/test_scoring.py::test_scores_are_those_of_whole_forward_passes_at_any_batch_size",
    ),
    "R24": ("log-likelihoods equal those of whole forward passes", "tests/evaluation/test_harness.py"),
    "R25": ("an exported model is re-imported bit for bit", f"{_EXPORT}_and_comes_back_bit_for_bit"),
    "R26": ("a shared table is counted, saved and exported once", f"{_EXPORT}_and_comes_back_bit_for_bit"),
    "R27": (
        "planned memory is at most 5 % too low and 15 % too high",
        "tests/training/plan/test_memory.py::test_prediction_is_at_most_5_percent_below_and_15_above_what_a_gpu_needs",
    ),
    "R28": ("an unreachable tracker causes only a one-line warning", "tests/monitoring/trackers/test_tracker.py"),
    "R29": ("invalid settings end with code 2 and a hint", "settings tests/config/test_load_errors.py"),
    "R30": ("runs of earlier versions load and resume", "tests/end_to_end/test_golden_runs.py"),
}
"""The guarantees, each with the campaigns that attack it, the tests that enforce it, or results on a GPU."""


def promises(done: list[Case], tests: dict[str, dict[str, int]]) -> str:
    """The guarantees with their results, as a Markdown table."""
    lines = ["| | Guarantee | Results |", "|---|---|---|"]
    for number, (claim, where) in PROMISES.items():
        words = where.split()
        mine = [case for case in done if case.campaign in words]
        campaigns = [word for word in words if word != ON_GPU and not word.startswith("tests/")]
        shown = [f"{name} {sum(case.tried for case in mine if case.campaign == name):,}" for name in campaigns]
        if shown:
            faults = sum(case.faults for case in mine)
            shown = [f"{', '.join(shown)} tried: {faults} {'fault' if faults == 1 else 'faults'}"]
        shown += [_tested(word, tests.get(word)) for word in words if word.startswith("tests/")]
        shown += [on_gpu() for word in words if word == ON_GPU]
        lines.append(f"| {number} | {claim} | {'; '.join(shown)} |")
    return "\n".join(lines)


def _tested(name: str, counts: dict[str, int] | None) -> str:
    file, _, test = name.partition("::")
    shown = f"`{test or file.rpartition('/')[2]}`"
    if counts is None:
        return f"{shown}: not run"
    return f"{shown}: {counts['passed']} passed, {counts['failed']} failed"


def on_gpu() -> str:
    """Summary of `bits-on-gpu*.json`, the results of runs that should be equal."""
    keys, shown = ("steps compared", "steps that differ", "arrays that differ"), []
    for path in sorted(RESULTS.glob(f"{ON_GPU}*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, found in result.items():
            if isinstance(found, dict) and found.keys() >= set(keys):
                text = "{}: {:,} steps compared, {} differ, {} arrays differ".format(name, *map(found.get, keys))
                shown.append(f"{text} ({result['device']})")
    return "; ".join(shown) or "not tried"


def run_tests(jobs: int) -> dict[str, dict[str, int]]:
    """Runs the tests that enforce guarantees; returns the numbers that passed and failed, by name."""
    names = sorted({word for _, where in PROMISES.values() for word in where.split() if word.startswith("tests/")})
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "tests.xml"
        command = ["-m", "pytest", "-q", "-n", str(jobs), "-m", "slow or not slow", f"--junitxml={file}", *names]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        cases = [(case, case.get("classname", "")) for case in ElementTree.parse(file).iter("testcase")]
    found = {}
    for name in names:
        place, _, test = name.removesuffix(".py").replace(".py::", "::").replace("/", ".").partition("::")
        named = lambda case, test=test: test in ("", case.get("name", "").partition("[")[0])
        mine = [case for case, owner in cases if owner == place and named(case)]
        failed = sum(any(part.tag in ("failure", "error") for part in case) for case in mine)
        skipped = sum(any(part.tag == "skipped" for part in case) for case in mine)
        found[name] = {"passed": len(mine) - failed - skipped, "failed": failed, "skipped": skipped}
    return found
