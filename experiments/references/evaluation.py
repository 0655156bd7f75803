"""Compares scores, texts, samples and metrics with lm-eval's own models, transformers' samplers and torchmetrics."""

import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import torch
from checks import Check, relative
from conversions import PROMPTS, odd_texts
from torchmetrics.functional.text import squad
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import memjax
from memjax.config.data import DataConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.config.sampling import SamplingConfig
from memjax.data.tokenizers.bpe import train_bpe
from memjax.evaluation.model import EvalModel
from memjax.evaluation.perplexity import bits_per_byte
from memjax.evaluation.question_sets import metrics
from memjax.inference.sampling import Mode, Rules, pick
from memjax.interop.huggingface.convert import to_hf
from memjax.models.parts import DecoderParts
from memjax.runs.load import LoadedModel
from memjax.runs.write import write_run

LENGTH = 64
"""Context length in most comparisons."""


def evaluation(folder: pathlib.Path) -> Iterator[Check]:
    """All checks below, with one random model and a trained BPE."""
    found = random_run(folder)
    yield from harness(found, folder)
    yield from bytes_of_texts(found, folder / "hf")
    yield from filters()
    yield draws()
    yield answers()


def random_run(folder: pathlib.Path) -> LoadedModel:
    """Writes a random model as a run, and exports it to `hf`."""
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    tokenizer = train_bpe([f"{prompt} the quick brown fox {i}" for prompt in PROMPTS for i in range(9)], 400)
    model = ModelConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=96, vocab_size=400, memory=None)
    parts = DecoderParts.of(model)
    params, tables = parts.init(jax.random.key(2))
    decoder = parts.merge(jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, params), tables)
    write_run(folder / "run", decoder, tokenizer, RunConfig(model=model, data=DataConfig(sequence_length=512)))
    to_hf(folder / "run", folder / "hf")
    return memjax.load(folder / "run")


def both(found: LoadedModel, folder: pathlib.Path, batch_size: int, length: int = LENGTH, **how: Any) -> list[Any]:
    """memjax's model for lm-eval, and lm-eval's `hf` model of the exported folder."""
    from lm_eval.models.huggingface import HFLM

    from memjax.evaluation.harness import HarnessModel

    how |= {"device": "cpu", "dtype": "float32", "batch_size": batch_size, "max_length": length}
    ours = HarnessModel(EvalModel.of(found, max_length=length, batch_size=batch_size))
    of_folder: Any = HFLM  # its decorator hides its parameters
    return [ours, of_folder(str(folder / "hf"), **how)]


def harness(found: LoadedModel, folder: pathlib.Path) -> Iterator[Check]:
    """Compares all request types of lm-eval, and a whole task."""
    from lm_eval.api.instance import Instance

    def ask(model: Any, kind: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
        instances = [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]
        return getattr(model, kind)(instances, disable_tqdm=True)

    texts = [text for text in odd_texts(400) if "<" not in text]
    pairs: list[tuple[Any, ...]] = [(a, f" {b}") for a, b in zip(texts[:60], PROMPTS * 4, strict=True)]
    pairs += [(f"{prompt} ", "x y z") for prompt in PROMPTS] + [("", "from nothing"), (" ", "a")]
    rolling: list[tuple[Any, ...]] = [(text,) for text in texts[60:90]]
    rolling += [(" ".join(texts[:count]),) for count in (3, 9, 30)]
    for batch_size in (1, 7):
        models = both(found, folder, batch_size)
        ours, theirs = (ask(model, "loglikelihood", pairs) for model in models)
        what, lm_eval = f"lm-eval, batches of {batch_size}", "lm-eval's hf"
        figure = relative([score for score, _ in ours], [score for score, _ in theirs])
        yield Check("evaluation", what, lm_eval, f"log-likelihoods of {len(pairs)} continuations", figure, 1e-6)
        differ = sum(bool(a) != bool(b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
        yield Check("evaluation", what, lm_eval, "greedy flags that differ", float(differ), 0.0)
        # Otherwise theirs also scores the BOS token, which is not part of the text.
        models = both(found, folder, batch_size, add_bos_token=False)
        ours, theirs = (ask(model, "loglikelihood_rolling", rolling) for model in models)
        measure = f"log-likelihoods of {len(rolling)} texts of up to {len(rolling[-1][0]):,} characters"
        yield Check("evaluation", what, lm_eval, measure, relative(ours, theirs), 1e-6)
    rules = [
        {"until": until, "max_gen_toks": 24, "do_sample": False}
        for until in (["e", " the"], ["\n", ".", "a "], ["zzz"], [])
    ]
    asked = [(f"{text} {prompt}", rule) for rule in rules for text, prompt in zip(texts, PROMPTS, strict=False)]
    ours, theirs = (ask(model, "generate_until", asked) for model in both(found, folder, 7))
    differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
    yield Check("evaluation", "lm-eval", lm_eval, f"greedy texts of {len(asked)} that differ", float(differ), 0.0)
    rng, words = np.random.default_rng(0), [text[:24] for text in odd_texts(300) if text.strip() and "<" not in text]
    rows = [
        {"question": str(rng.choice(words)), "choices": [str(word) for word in rng.choice(words, 4)], "answer": n % 4}
        for n in range(40)
    ]
    write_task(folder, "made", rows)
    for length, shots in itertools.product((LENGTH, 512), (0, 2)):
        figure = accuracies_differ("made", both(found, folder, 7, length), folder, shots)
        what = f"lm-eval, 40 questions, {shots} shots, {length} tokens"
        yield Check("evaluation", what, lm_eval, "acc and acc_norm", figure, 0.0)


def write_task(folder: pathlib.Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Writes multiple-choice questions as a custom lm-eval task."""
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metric = lambda metric: {"metric": metric, "aggregation": "mean", "higher_is_better": True}
    task = {
        "task": name, "dataset_path": "json", "output_type": "multiple_choice", "validation_split": "validation",
        "dataset_kwargs": {"data_files": {"validation": str(folder / f"{name}.jsonl")}},
        "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [metric("acc"), metric("acc_norm")],
    }  # fmt: skip
    (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(task))


def accuracies_differ(task: str, models: list[Any], folder: pathlib.Path, shots: int) -> float:
    """The larger of the differences in accuracy, plain and normalised by length."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    evaluate: Any = simple_evaluate  # its decorator hides its parameters
    found = []
    for model in models:
        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        measured = evaluate(
            model, tasks=[task], num_fewshot=shots, task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
        )
        found.append([measured["results"][task][name] for name in ("acc,none", "acc_norm,none")])
    return float(np.abs(np.subtract(*found)).max())


def bytes_of_texts(found: LoadedModel, exported: pathlib.Path) -> Iterator[Check]:
    """Compares bits per byte with torch, scoring each token in the first window that contains it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    texts = [text for text in odd_texts(40) if "<" not in text]
    texts += [" ".join(texts[:9]), ""]
    figures, counts = [], 0
    for window, stride, cut, batch_size in (
        (16, None, None, 4), (16, 16, None, 4), (16, 1, None, 64), (33, 7, None, 5), (512, None, None, 2),
        (64, 63, 500, 8), (64, None, 1001, 1), (1, 1, 300, 8), (100, 3, 700, 16),
    ):  # fmt: skip
        ours = bits_per_byte(
            found.model, found.tokenizer, texts, sequence_length=window, stride=stride, max_bytes=cut,
            batch_size=batch_size,
        )  # fmt: skip
        step, nats, num_bytes, num_tokens = stride or max(1, window // 2), 0.0, 0, 0
        left = sum(len(text.encode()) for text in texts) if cut is None else cut
        for text in texts:
            kept = text.encode()[:left].decode(errors="ignore")
            left -= len(text.encode())
            ids = [found.tokenizer.bos_id, *found.tokenizer.encode(kept)]
            num_bytes, num_tokens = num_bytes + len(kept.encode()), num_tokens + len(ids) - 1
            first = lambda place, window=window, step=step: max(0, math.ceil((place + 1 - window) / step))
            for number in {first(place) for place in range(len(ids) - 1)}:
                seen = torch.tensor([ids[number * step : number * step + window]])
                with torch.no_grad():
                    scores = model(seen).logits[0].double().log_softmax(-1)
                for place in range(len(ids) - 1):
                    if first(place) == number:
                        nats -= scores[place - number * step, ids[place + 1]].item()
            if left <= 0:
                break
        figures.append(abs(ours.bits_per_byte / (nats / math.log(2) / num_bytes) - 1))
        counts += (ours.bytes, ours.tokens) != (num_bytes, num_tokens)
    what = f"{len(figures)} settings of window, stride, cut and batch"
    yield Check("evaluation", what, "torch", "bits per byte", max(figures), 1e-6)
    yield Check("evaluation", what, "torch", "settings with other numbers of bytes or tokens", float(counts), 0.0)


def _filtered(logits: np.ndarray, seen: list[int], sampling: SamplingConfig) -> np.ndarray:
    """Probabilities of the next token after transformers' processors."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    processors.append(TopPLogitsWarper(sampling.top_p))
    scores = processors(torch.tensor([seen]), torch.tensor(logits[None]))
    return scores.double().softmax(-1)[0].numpy()


def _draws(logits: np.ndarray, seen: list[int], sampling: SamplingConfig, count: int) -> np.ndarray:
    """How often memjax samples each token, over `count` rows."""
    rules = Rules.of([(sampling, number) for number in range(count)])
    of_rows = jnp.zeros((count, len(logits)), bool).at[:, jnp.array(seen)].set(True)
    rows = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
    picked = pick(rows, of_rows, rules, jnp.zeros(count, jnp.int32), mode=Mode.of([sampling]))
    return np.bincount(np.asarray(picked), minlength=len(logits))


SEEN = [3, 5, 8]


def filters() -> Iterator[Check]:
    """Compares which tokens can be sampled, and their probabilities, under all combinations of settings."""
    rng, differ, chances, total = np.random.default_rng(0), 0, [], 0
    for temperature, top_k, top_p, penalty in itertools.product(
        (0.5, 1.0, 2.0), (None, 1, 5, 30), (1.0, 0.9, 0.3), (1.0, 1.3, 0.8)
    ):
        sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
        logits = (3 * rng.normal(size=40)).astype(np.float32)
        expected = _filtered(logits, SEEN, sampling)
        drawn = _draws(logits, SEEN, sampling, 2000)
        differ += int((drawn[expected == 0] > 0).any())  # and every likely token must be drawn:
        differ += int((drawn[expected > 0.02] == 0).any())
        chances.append(scipy.stats.chisquare(*_pooled(drawn, expected)).pvalue if (expected > 0.01).sum() > 1 else 1.0)
        total += 1
    measure = f"of {total} settings, those that draw a token which they exclude, or never a likely one"
    yield Check("evaluation", "sampling", "transformers' processors", measure, float(differ), 0.0)
    # Among 108 settings, the smallest p is about 0.01 by chance.
    worst = 1 - min(chances)
    yield Check("evaluation", "sampling", "transformers' processors", "1 - least p of a chi-squared", worst, 1 - 1e-5)


def _pooled(drawn: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observed and expected counts, with rare tokens pooled."""
    wanted, rare = expected * drawn.sum(), expected * drawn.sum() < 10
    counts, means = np.append(drawn[~rare], drawn[rare].sum()), np.append(wanted[~rare], wanted[rare].sum())
    some = means > 0
    return counts[some], means[some] * counts[some].sum() / means[some].sum()


def draws() -> Check:
    """Compares 40,000 samples with one setting."""
    sampling = SamplingConfig(temperature=0.8, top_k=20, top_p=0.95, repetition_penalty=1.2)
    logits = (2 * np.random.default_rng(1).normal(size=50)).astype(np.float32)
    counts, means = _pooled(_draws(logits, SEEN, sampling, 40000), _filtered(logits, SEEN, sampling))
    statistic = float(((counts - means) ** 2 / means).sum())
    measure = f"chi-squared of {len(counts) - 1} degrees, 40,000 draws"
    return Check(
        "evaluation", "sampling", "transformers' processors", measure, statistic,
        float(scipy.stats.chi2.ppf(0.999, len(counts) - 1)),
    )  # fmt: skip


def answers() -> Check:
    """Compares exact match and F1 of generated answers with SQuAD 1.1's."""
    rng, differ = np.random.default_rng(0), 0
    parts = [
        "The", "the", "a", "An", "Beatles", "beatles", "U.S.", "US", ",", "-", "Spider-Man", "spider", "man", "1,000",
        "  ", "\t", "\u2013", "\u2019s", "'s", "12", "of", "(old)", "_", "日本", "\u00a0", "$5", "a-the", "theatre",
    ]  # fmt: skip
    total = 2000
    for _ in range(total):
        given, *accepted = (" ".join(rng.choice(parts, rng.integers(1, 6))) for _ in range(3))
        if not any(map(metrics.normalised, (given, *accepted))):
            continue  # without words, F1 follows SQuAD 2: 1 if neither has any
        wanted = squad(
            {"prediction_text": given, "id": "0"}, {"answers": {"answer_start": [0, 0], "text": accepted}, "id": "0"}
        )
        match, f1 = metrics.best(metrics.exact_match, given, accepted), metrics.best(metrics.f1, given, accepted)
        differ += abs(100 * match - wanted["exact_match"]) > 1e-4 or abs(100 * f1 - wanted["f1"]) > 1e-4
    measure = f"of {total:,} answers, those with another exact match or F1"
    return Check("evaluation", "SQuAD 1.1", "torchmetrics", measure, float(differ), 0.0)
