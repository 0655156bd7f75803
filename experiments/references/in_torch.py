"""Runs exported memory models in torch, without memjax; `memory_models.py` compares the results with memjax.

    python experiments/references/in_torch.py FOLDER    # in an environment with torch, transformers and accelerate

FOLDER holds `<model>/` as written by `to-hf`, and `<model>.npz` with tokens and memjax's logits. Results are written to
its `found.json`, and each model, saved by transformers after a few training steps, to `<model>-saved/`.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

TRUST = {"trust_remote_code": True}
SEEN = []
"""Layers that called the attention function below, and the argument that they passed on."""


def recorded_attention(module, *arguments, instances=None, **kwargs):
    """A registered attention function, like those of serving programs."""
    SEEN.append((module.layer_idx, instances))
    return sdpa_attention_forward(module, *arguments, **kwargs)


def compare(folder: pathlib.Path, prompts: list[str]) -> dict:
    """Results of all tests of a folder's model."""
    expected = np.load(folder.with_name(f"{folder.name}.npz"))  # not with_suffix: names hold versions
    tokens, is_narrow = torch.tensor(expected["tokens"]).long(), "widened" in expected

    def distance(model: torch.nn.Module, logits: np.ndarray) -> float:
        with torch.no_grad():
            found = model(tokens).logits.double().numpy()
        return float(np.abs(found - logits).max() / np.abs(logits).max())

    load = lambda **kwargs: AutoModelForCausalLM.from_pretrained(folder, **TRUST, **kwargs)

    def in_float32(**kwargs) -> float:
        model = load(**kwargs)
        if is_narrow:
            model.model.tables.float()
        return distance(model, expected["widened" if is_narrow else "logits"])

    model = load()
    found = {
        "logits": max(in_float32(), in_float32(attn_implementation="eager")),
        "cpu_tables": in_float32(table_device="cpu", device_map={"": "cpu"}),
        "narrow": distance(model, expected["logits"]) if is_narrow else None,
        "texts": texts(model, AutoTokenizer.from_pretrained(folder, **TRUST), prompts),
        "unlike_cached": unlike_without_cache(model, tokens[:, :8]),
        "foreign_attention": foreign_attention(folder, tokens, model),
        "program": unlike_its_program(model, tokens),
    }
    torch.manual_seed(0)
    loss = lambda: model.eval()(tokens, labels=tokens).loss.item()
    before = loss()
    train(model, tokens, folder)
    found["loss"] = [before, loss()]
    saved = folder.with_name(f"{folder.name}-saved")
    model.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved, **TRUST).state_dict()
    state = model.state_dict()
    differ = sum(not torch.equal(state[name], again[name]) for name in state.keys() & again.keys())
    return {**found, "saved_differ": differ + len(state.keys() ^ again.keys())}


def texts(model: torch.nn.Module, tokenizer, prompts: list[str]) -> list[list[int]]:
    """Greedy continuations of each prompt alone, and of all in a left-padded batch."""
    tokenizer.padding_side = "left"
    found = []
    for group in [*([prompt] for prompt in prompts), prompts]:
        inputs = tokenizer(group, return_tensors="pt", padding=True)
        written = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
        found += written.tolist()
    return found


def unlike_without_cache(model: torch.nn.Module, tokens: torch.Tensor) -> int:
    """Number of tokens that differ if generated with a static cache or without a cache."""
    wanted = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 24, "min_new_tokens": 24}
    first = model.generate(tokens, **wanted)
    static = model.generate(tokens, **wanted, cache_implementation="static", disable_compile=True)
    return int((first != static).sum() + (first != model.generate(tokens, **wanted, use_cache=False)).sum())


def unlike_its_program(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Relative error of the logits of a torch.export program, at other sizes than it was exported with."""
    sizes = {"input_ids": dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC), "use_cache": None}
    made = torch.export.export(model, (), {"input_ids": tokens, "use_cache": False}, dynamic_shapes=sizes, strict=False)
    others = tokens[:, :20].repeat(2, 1)
    with torch.no_grad():
        found, wanted = made.module()(input_ids=others, use_cache=False).logits, model(others).logits
    return float((found - wanted).abs().max() / wanted.abs().max())


def foreign_attention(folder: pathlib.Path, tokens: torch.Tensor, model: torch.nn.Module) -> bool:
    """Whether every layer calls a registered attention function, and passes on the caller's arguments."""
    AttentionInterface.register("recorded", recorded_attention)
    transformers.AttentionMaskInterface.register("recorded", transformers.masking_utils.sdpa_mask)
    config = AutoConfig.from_pretrained(folder, **TRUST)
    body = AutoModel.from_config(config, attn_implementation="recorded", **TRUST)
    body.load_state_dict(model.model.state_dict())
    SEEN.clear()
    with torch.no_grad():
        found = body(tokens, use_cache=False, instances="handed in", return_dict=False)[0]
        wanted = model.model(tokens, use_cache=False).last_hidden_state
    return torch.allclose(found, wanted, atol=1e-4) and [(n, "handed in") for n in range(len(body.layers))] == SEEN


def train(model: torch.nn.Module, tokens: torch.Tensor, folder: pathlib.Path) -> None:
    """Trains a few steps with the Trainer."""
    arguments = TrainingArguments(
        str(folder.with_name("trainer")), max_steps=3, per_device_train_batch_size=len(tokens), learning_rate=1e-3,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def main() -> None:
    """Tests all models of the folder."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    place = pathlib.Path(sys.argv[1])
    prompts = json.loads((place / "prompts.json").read_text())
    found = {file.stem: compare(place / file.stem, prompts) for file in sorted(place.glob("*.npz"))}
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    (place / "found.json").write_text(json.dumps({"versions": versions, "models": found}))


if __name__ == "__main__":
    main()
