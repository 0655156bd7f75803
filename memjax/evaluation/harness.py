"""Runs the language model evaluation harness (lm-eval) on a memjax model, in this process."""

import difflib
import importlib.metadata
import itertools
import json
import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from memjax.config.problems import did_you_mean
from memjax.config.sampling import SamplingConfig
from memjax.errors import ConfigError, DataError
from memjax.evaluation.model import EvalModel
from memjax.inference.scoring import ScoreRequest, request
from memjax.io.console import format_table

_MOST_TOKENS = 256
"""Default of max_gen_toks."""
_RESAMPLES = 1000
"""Bootstrap samples for the standard error of metrics without a formula for it."""
_FEWSHOT_SEED = 1234
"""lm-eval's default, so that the few-shot examples are the usual ones."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_KNOWN = ("until", "max_gen_toks", "do_sample", *_SAMPLING, "num_beams")
"""Supported generation settings; lm-eval's aliases of `max_gen_toks` are accepted too."""


class HarnessModel(LM):
    """Adapts a model to lm-eval: `lm_eval.simple_evaluate(model=HarnessModel(model), tasks=[...])`.

    Every text starts with the begin token, as in training.
    """

    def __init__(self, model: EvalModel):
        super().__init__()
        self.eval_model = model

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation given its context, and whether greedy decoding would produce it."""
        pairs: list[tuple[Any, ...]] = [one.args for one in requests]
        return [*self.eval_model.score([request(self.eval_model.tokenizer, *pair) for pair in pairs])]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows that overlap by at most one token; 0 for an empty text."""
        tokenizer = self.eval_model.tokenizer
        texts = tokenizer.encode_batch([one.args[0] for one in requests])
        scores = self.eval_model.score([ScoreRequest([tokenizer.bos_id], text) for text in texts])
        return [one.log_likelihood for one in scores]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until one of the task's stop strings."""
        asked: list[tuple[Any, ...]] = [one.args for one in requests]
        by_rule: dict[str, list[int]] = defaultdict(list)
        for number, (_, rule) in enumerate(asked):
            by_rule[json.dumps(rule, sort_keys=True)].append(number)
        texts: dict[int, str] = {}
        for rule, numbers in by_rule.items():
            with self.eval_model.progress(f"{len(numbers):,} texts") as show:
                prompts = [asked[number][0] for number in numbers]
                written = self.eval_model.write(prompts, **_writing(json.loads(rule)), show=show)
            texts |= {number: one.text for number, one in zip(numbers, written, strict=True)}
        return [texts[number] for number in range(len(requests))]


def task_report(
    model: EvalModel,
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    zero_tables: bool = True,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluates a model on tasks; returns lm-eval's results, with versions and hashes of the tasks, as JSON values.

    At most `limit` documents per task are asked, each after `shots` examples (None: the task's own number), and `keep`
    is called with every document and its answer. With zero_tables, `zeroed` holds the results with the tables zeroed,
    which frees the model's own tables. See `load_tasks` for `folder`. If a task's own code raises an error, only its
    results are missing, and `failed` holds the message by its name.

    Raises:
        ConfigError: a task is unknown.
        DataError: a task cannot be loaded, or needs something that memjax does not support, or all of them fail.
    """
    measured = _measure(model, load_tasks(tasks, folder), limit, shots, keep)
    if not measured["results"]:
        raise DataError("; ".join(measured["failed"].values()))
    if zero_tables and (zeroed := model.zeroed()):
        sound = {name: task for name, task in load_tasks(tasks, folder).items() if name not in measured["failed"]}
        again = _measure(zeroed, sound, limit, shots, lambda _: None)
        measured["zeroed"] = again["results"]
        measured["failed"] |= again["failed"]
    return {"lm_eval": importlib.metadata.version("lm-eval"), **model.description(), **measured}


def format_task_report(report: Mapping[str, Any]) -> str:
    """The report as a table."""
    zeroed = report.get("zeroed")
    rows = [["Tasks", "shots", "metric", "value", "standard error", *["tables zeroed"] * bool(zeroed)]]
    for task, results in report["results"].items():
        for metric, value in _numbers(results):
            name, _, kind = metric.partition(",")
            error = results.get(f"{name}_stderr,{kind}")
            cells = [_shown(number) if isinstance(number, float | int) else "" for number in (value, error)]
            cells += [_shown(zeroed[task][metric]) if task in zeroed else ""] if zeroed else []
            shown = name if kind == "none" else f"{name} ({kind})"  # a task may report a metric for several filters
            rows.append([task, str(report["n-shot"].get(task, "")), shown, *cells])
    return format_table(rows)


def _shown(number: float | int) -> str:
    """The number with four decimals, or, if very large (an untrained model's perplexity), four significant digits."""
    return f"{number:.4f}" if abs(number) < 1e6 else f"{number:.4g}"


def load_tasks(tasks: Sequence[str], folder: str | None = None, *, section: str = "") -> dict[str, TaskDict]:
    """Loads tasks for lm-eval's evaluator, by the names of tasks, groups and tags; `tasks` may hold patterns of names.
    What a group or tag among them holds comes with it alone.

    If `folder` is given, only the tasks in its YAML files are known. `section`, with its dot, is the prefix of settings
    in messages.

    Raises:
        ConfigError: a task is unknown, or there is no such folder.
        DataError: a task cannot be loaded, or needs something that memjax does not support.
    """
    if folder is not None and not os.path.isdir(folder):
        raise ConfigError(f"{section}task_folder={folder} is not a folder; name one with YAML files of tasks")
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    names = manager.match_tasks(list(tasks))
    for task in tasks:
        if not manager.match_tasks([task]):
            close, known = difflib.get_close_matches(task, manager.all_tasks, n=3), manager.all_tasks
            more = f" and {len(known) - 8:,} more" if len(known) > 8 else ""
            hint = did_you_mean(close) or f"; known are {', '.join(known[:8]) or 'none'}{more}"
            raise ConfigError(f"{section}tasks={task} is not known{hint}")
    try:
        loaded = {name: manager.load([name]) for name in names}
    except Exception as error:  # a task's file or data can fail in any way
        raise DataError(
            f"--{section}tasks {','.join(tasks)}: cannot be loaded ({error}); correct the task's YAML file. Its "
            "data must be on this machine: name files there, or fetch them once with HF_HUB_OFFLINE=0"
        ) from error
    for task in itertools.chain.from_iterable(found["tasks"].values() for found in loaded.values()):
        if getattr(task, "UNSAFE_CODE", False):
            raise DataError(f"--{section}tasks {task.task_name}: runs programs of the model; for those see --questions")
        if task.OUTPUT_TYPE == "generate_until":
            _writing(task.get_config("generation_kwargs") or {})
    # A pattern matches groups and their tasks, which are to be asked once.
    members = lambda found: itertools.chain(found["tasks"], found.get("groups", ()))
    inside = {member for name, found in loaded.items() for member in members(found) if member != name}
    return {name: found for name, found in loaded.items() if name not in inside}


def _measure(
    model: EvalModel, tasks: Mapping[str, TaskDict], limit: int | None, shots: int | None, keep: Callable[..., None]
) -> dict[str, Any]:
    """The results of all tasks, and the messages of those that failed."""
    measured: dict[str, Any] = {"results": {}, "failed": {}}
    for name, loaded in tasks.items():
        try:
            results = _measure_one(model, name, loaded, limit, shots)
        except DataError as error:
            measured["failed"][name] = str(error)
            continue
        for task, samples in results.pop("samples").items():
            for sample in samples:
                keep({"task": task, **sample})
        for key, value in results.items():
            measured[key] = measured.get(key, {}) | value if isinstance(value, dict) else value
    return measured


def _measure_one(model: EvalModel, name: str, loaded: TaskDict, limit: int | None, shots: int | None) -> dict[str, Any]:
    for task in loaded["tasks"].values():
        if shots is not None:
            task.set_config("num_fewshot", shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_FEWSHOT_SEED)
    try:
        # lm-eval's process pool would fork this process, which is unsafe with JAX's threads.
        with mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}):
            results = evaluator.evaluate(HarnessModel(model), loaded, limit=limit, bootstrap_iters=_RESAMPLES)
    except Exception as error:
        if _asked_the_model(error):
            raise
        raise DataError(
            f"tasks={name}: cannot be measured ({type(error).__name__}: {error}); correct the template, "
            "metric or Python code of the task that raises this"
        ) from error
    # Configs of tasks hold functions, which become text.
    return json.loads(json.dumps(results, default=str))


def _asked_the_model(error: Exception) -> bool:
    """Whether an error in lm-eval's evaluator came from the model rather than from a task's code or data."""
    modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return __name__ in modules[1:]  # the first frame is the evaluator's caller


def _writing(rule: dict[str, Any]) -> dict[str, Any]:
    """Converts a task's generation settings to arguments of `EvalModel.write`, with the meaning lm-eval gives them.

    A temperature or top_p of 0 is greedy decoding, a top_k of 0 or -1 keeps all tokens, max_gen_toks=0 generates
    nothing, and null is the default.

    Raises:
        DataError: a setting is unknown, and ignoring it would change the task; or it is not supported.
    """
    try:
        given = normalize_gen_kwargs({name: value for name, value in rule.items() if value is not None}, _MOST_TOKENS)
        sampling = _sampling(given)
    except (TypeError, ValueError) as error:
        raise DataError(f"generation_kwargs: {json.dumps(rule)} is not supported: {error}") from error
    stop, max_tokens = tuple(given.get("until", ())), given.get("max_gen_toks", _MOST_TOKENS)
    if max_tokens < 0:
        raise DataError(f"generation_kwargs: max_gen_toks={max_tokens} must not be negative")
    if not all(isinstance(one, str) for one in stop):
        raise DataError(f"generation_kwargs: until={json.dumps(rule['until'])} must be strings")
    return {"max_tokens": max_tokens, "stop": stop, "sampling": sampling}


def _sampling(given: Mapping[str, Any]) -> SamplingConfig:
    if unknown := set(given) - set(_KNOWN):
        raise DataError(f"generation_kwargs: {', '.join(sorted(unknown))} unknown; known are {', '.join(_KNOWN)}")
    if given.get("num_beams", 1) != 1:
        raise DataError(f"generation_kwargs: num_beams={given['num_beams']} must be 1: beam search is not supported")
    if not isinstance(given["do_sample"], bool):
        raise DataError(f"generation_kwargs: do_sample={given['do_sample']!r} must be true or false")
    penalty = float(given.get("repetition_penalty", 1.0))
    if not given["do_sample"]:
        return SamplingConfig(repetition_penalty=penalty)
    top_k, top_p = int(given.get("top_k", 0)), float(given.get("top_p", 1.0))
    return SamplingConfig(
        # The default of transformers, if the task sets none.
        temperature=0.0 if top_p == 0 else float(given.get("temperature", 1.0)),
        top_k=None if top_k in (0, -1) else top_k,
        top_p=1.0 if top_p == 0 else top_p,
        min_p=float(given.get("min_p", 0.0)),
        repetition_penalty=penalty,
    )


def _numbers(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics; their keys are NAME,FILTER."""
    for metric, value in results.items():
        if "," in metric and "_stderr," not in metric and isinstance(value, float | int):
            yield metric, value
