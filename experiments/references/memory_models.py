"""Compares the torch code in exported folders of models with memory layers with memjax."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from checks import Check, relative

import memjax
from memjax.config.data import DataConfig
from memjax.config.memory import MemoryConfig, PEERConfig
from memjax.config.model import ExpertsConfig, ModelConfig, RopeScalingConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.inference.text import continue_texts
from memjax.interop.huggingface.convert import from_hf, to_hf
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts, split_decoder
from memjax.runs.load import load_as_saved
from memjax.runs.write import write_run

HERE = pathlib.Path(__file__).resolve().parent
FIXTURES = HERE.parents[1] / "tests" / "fixtures" / "runs"
PROMPTS = ["The capital of France is", "naïve café", "1 + 1 =", "A"]
LENGTH = 128

SIZES: dict[str, Any] = {
    "dim": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_dim": 48,
    "vocab_size": 259,
}
KEYS: dict[str, Any] = {"num_keys": 8, "num_heads": 2, "top_k": 4, "key_dim": 8, "table_dtype": "float32"}
PLUS = MemoryConfig(layers=(0, 2), **KEYS)
BESIDE = {"placement": "parallel", "output_gate": True, "value_dim": 24, "table_dtype": "bfloat16"}
SCALINGS = (
    RopeScalingConfig(kind="llama3", factor=8.0, original_length=32),
    RopeScalingConfig(kind="linear", factor=4.0),
    RopeScalingConfig(kind="dynamic", factor=4.0, original_length=48),
    RopeScalingConfig(kind="yarn", factor=4.0, original_length=32),
    RopeScalingConfig(
        kind="longrope", factor=4.0, original_length=64, short_factor=(1.0, 1.5, 2.0, 3.0), long_factor=(4.0,) * 4
    ),
)
MODELS: dict[str, ModelConfig] = {
    "Memory, a table for each layer": ModelConfig(
        **SIZES,
        memory=MemoryConfig(
            layers=(0, 2), **{**KEYS, "qk_norm": False, "score_scale": 1.0}, gate="none", shared_table=False
        ),
    ),
    "Memory+, one table": ModelConfig(**SIZES, memory=PLUS),
    "Memory, other width than the model": ModelConfig(
        **SIZES, memory=MemoryConfig(layers=(1,), **KEYS, gate="none", value_dim=16), sliding_window=20
    ),
    "Memory+ and feed-forward layers, output gate, bfloat16 table": ModelConfig(
        **SIZES, memory=MemoryConfig(layers=(0, 2), **{**KEYS, **BESIDE}), tie_embeddings=True
    ),
    "PEER": ModelConfig(**SIZES, memory=None, peer=PEERConfig(layers=(0, 2), **KEYS)),
    "experts, 2 of 4 a token": ModelConfig(
        **SIZES, memory=None, experts=ExpertsConfig(num_experts=4, ffn_dim=16, renormalize=True)
    ),
    "Memory+, PEER and experts, biases, head norms, a layer without positions": ModelConfig(
        **SIZES, memory=MemoryConfig(layers=(0,), **KEYS), peer=PEERConfig(layers=(1,), **KEYS),
        experts=ExpertsConfig(layers=(2,), routing="expert_choice", num_experts=3), head_dim=12, attention_bias=True,
        attention_out_bias=False, qk_norm="per_head", rope_free_layers=(1,),
    ),
    "Memory+ parallel to feed-forward layers, PEER and experts, norms of outputs and over all heads": ModelConfig(
        **SIZES, memory=MemoryConfig(layers=(0,), **{**KEYS, **BESIDE, "table_dtype": "float32"}),
        peer=PEERConfig(layers=(1,), **KEYS), experts=ExpertsConfig(layers=(2,), num_experts=3), attention_bias=True,
        qk_norm="all_heads", norm_placement="post",
    ),
    **{
        f"Memory+, {scaling.kind} scaling": ModelConfig(**SIZES, memory=PLUS, rope_scaling=scaling)
        for scaling in SCALINGS
    },
}  # fmt: skip


def memory_models(folder: pathlib.Path, pythons: Sequence[str]) -> Iterator[Check]:
    """Exports random and trained models, and runs them in environments with torch."""
    names = {f"random-{number:02d}": name for number, name in enumerate(MODELS)}
    written: dict[str, list[str]] = {}
    for short, name in names.items():
        model = _random_model(MODELS[name])
        write_run(folder / f"{short}-run", model, ByteTokenizer(), RunConfig(model=MODELS[name], data=_DATA))
        written[short] = _export(folder, short)
    for archive in sorted(FIXTURES.glob("*.tar.xz")):
        short = archive.name.removesuffix(".tar.xz")
        if short != "dense":
            names[short] = f"a trained {short.replace('_', ' ')} run"
            with tarfile.open(archive) as files:
                files.extractall(folder / f"{short}-run", filter="data")
            written[short] = _export(folder, short)
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    yield Check(
        "memory in torch", f"{len(names)} models", "memjax", "tensors with other bits, out and back in",
        float(sum(_unlike(folder / f"{short}-run", folder / short) for short in names)), 0.0,
    )  # fmt: skip
    for number, python in enumerate(pythons):
        yield from _in_environment(folder, folder / f"torch-{number}", python, names, written)


_DATA = DataConfig(sequence_length=LENGTH)


def _random_model(config: ModelConfig) -> Decoder:
    parts, rng = DecoderParts.of(config), np.random.default_rng(0)

    def parameter(leaf: Any) -> jax.Array:
        # Of the size of trained parameters; biases and norms away from their initial 0 and 1.
        noise = rng.normal(size=leaf.shape)
        return jnp.asarray(noise * leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 1 + noise / 8, leaf.dtype)

    tables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), parts.abstract_tables)
    return parts.merge(jax.tree.map(parameter, parts.abstract_params), tables)


def _export(folder: pathlib.Path, short: str) -> list[str]:
    """Exports a run, writes its logits beside it, and returns memjax's greedy texts."""
    to_hf(folder / f"{short}-run", folder / short)
    loaded = memjax.load(folder / f"{short}-run")
    vocab_size = loaded.model.config.vocab_size
    length = 32 if short.startswith(("memory", "peer")) else 120
    tokens = np.random.default_rng(1).integers(0, vocab_size, (2, length)).astype(np.int32)
    logits: dict[str, Any] = {"logits": np.asarray(loaded.model(jnp.asarray(tokens)))}
    memory = loaded.model.config.memory
    if memory is not None and memory.table_dtype == "bfloat16":
        logits["widened"] = np.asarray(_widened(loaded.model)(jnp.asarray(tokens)))
    np.savez(folder / f"{short}.npz", tokens=tokens, **logits)
    return [text.text for text in continue_texts(loaded.model, loaded.tokenizer, PROMPTS, max_tokens=64)]


def _widened(model: Decoder) -> Decoder:
    """The model with its tables converted to float32."""
    _, params, tables = split_decoder(model)
    assert model.config.memory is not None
    memory = dataclasses.replace(model.config.memory, table_dtype="float32")
    parts = DecoderParts.of(dataclasses.replace(model.config, memory=memory))
    return parts.merge(params, jax.tree.map(lambda table: table.astype(jnp.float32), tables))


def _unlike(run: pathlib.Path, exported: pathlib.Path) -> int:
    """Number of arrays that differ between a run and its re-imported export."""
    back = exported.with_name(f"{exported.name}-back")
    from_hf(exported, back)
    ours, theirs = (jax.tree.leaves(split_decoder(load_as_saved(place).model)[1:]) for place in (run, back))
    same = lambda a, b: a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    return abs(len(ours) - len(theirs)) + sum(not same(*pair) for pair in zip(ours, theirs, strict=False))


def _in_environment(
    folder: pathlib.Path, place: pathlib.Path, python: str, names: dict[str, str], written: dict[str, list[str]]
) -> Iterator[Check]:
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*-run", "*-back", "torch-*"))
    # A separate cache, so that no module of an earlier run is reused.
    environment = {**os.environ, "HF_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, str(HERE / "in_torch.py"), str(place)], check=True, env=environment)
    found = json.loads((place / "found.json").read_text())
    models, version = found["models"], f"transformers {found['versions']['transformers']}"
    check = functools.partial(Check, "memory in torch", reference=version)
    for short, name in names.items():
        figure = models[short]["logits"]
        yield check(what=name, measure="logits, float32", figure=figure, bound=1e-5)
        if (narrow := models[short]["narrow"]) is not None:
            expected = np.load(place / f"{short}.npz")
            # Sums of rows are rounded to bfloat16; near a tie, the last bit of float32 decides the direction.
            rounding = relative(expected["logits"], expected["widened"])
            yield check(what=name, measure="logits, sums of rows in bfloat16", figure=narrow, bound=rounding)
    tokenizer = ByteTokenizer()
    differ = total = 0
    for short, texts in written.items():
        for ids, text in zip(models[short]["texts"], texts * 2, strict=True):
            total += 1
            differ += tokenizer.decode(_until_end(ids, tokenizer)) != text
    back = sum(_not_read_again(place / f"{short}-saved") for short in names)
    all_of = lambda key: [models[short][key] for short in names]
    for measure, figure, bound in (
        ('logits with table_device="cpu"', max(all_of("cpu_tables")), 1e-5),
        (f"greedy texts of 64 tokens that differ of {total}, half of them padded", differ, 0),
        ("tokens that a static cache or none picks otherwise", sum(all_of("unlike_cached")), 0),
        ("logits of programs by torch.export, of other batches and lengths", max(all_of("program")), 1e-5),
        ("whose layers do not all call a registered attention function", all_of("foreign_attention").count(False), 0),
        ("whose loss 3 steps of the Trainer do not reduce", sum(not b < a for a, b in all_of("loss")), 0),
        ("tensors that save_pretrained and from_pretrained change", sum(all_of("saved_differ")), 0),
        ("whose saved folder from-hf does not read", back, 0),
    ):
        yield check(what=f"all {len(names)}", measure=measure, figure=float(figure), bound=float(bound))


def _until_end(ids: list[int], tokenizer: ByteTokenizer) -> list[int]:
    """The ids before the first EOS token, after which batches are padded."""
    return ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids


def _not_read_again(saved: pathlib.Path) -> bool:
    """Whether memjax fails to read the model that transformers saved (tokenizer aside)."""
    from_hf(saved, saved.with_name(f"{saved.name}-run"), tokenizer="byte")
    again = load_as_saved(saved.with_name(f"{saved.name}-run")).model
    return not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(split_decoder(again)[1:]))
