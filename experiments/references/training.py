"""Compares 30 training steps with torch: its autograd, its optimizers, and loops written out here."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import torch.nn.functional as F
from checks import Check, relative
from transformers import AutoModelForCausalLM

from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.interop.huggingface.convert import to_hf
from memjax.models.parts import split_decoder
from memjax.runs.load import load_as_saved
from memjax.runs.write import write_run
from memjax.sharding.mesh import put_batch
from memjax.sharding.rules import MICRO_BATCHES
from memjax.training.program import TrainProgram
from memjax.training.step import make_train_step

STEPS, SEQUENCES, LENGTH = 30, 6, 24
EPS = 1e-30
"""Negligible, because torch's SparseAdam adds epsilon before bias correction, and memjax after it, like dense Adam."""

SIZES = f"""
--model.dim 16 --model.num_layers 2 --model.num_heads 2 --model.ffn_dim 24 --model.vocab_size 259
--data.batch_size {SEQUENCES} --data.sequence_length {LENGTH} --train.steps {STEPS}
--optim.schedule constant --optim.warmup_steps 0 --optim.lr 0.00390625 --optim.key_lr_factor 0.25
--optim.table.schedule constant --optim.table.warmup_steps 0 --optim.table.lr 0.03125 --optim.weight_decay 0.1
"""
LOOKUP = "num_keys 8 num_heads 2 top_k 3 key_dim 8"
FLOAT64 = """--model.dtype float64 --model.param_dtype float64 --optim.table.moment_dtype float64
--model.rope_free_layers 0,1"""
"""Without rotary positions, whose angles transformers always computes in float32."""


def _section(name: str, settings: str) -> str:
    words = f"{LOOKUP} table_dtype float64 {settings}".split()
    return " ".join(f"--model.{name}.{key} {value}" for key, value in zip(words[::2], words[1::2], strict=True))


MEMORY = _section("memory", "layers 0,1 gate none shared_table false")
MEMORY_PLUS = _section("memory", "layers 0,1 output_gate true")
PEER = f"--model.memory null {_section('peer', 'layers 0,1')}"
EXPERTS = """--model.memory null --model.experts.num_experts 4 --model.experts.top_k 2 --model.experts.ffn_dim 16
--model.experts.aux_loss_weight 0 --model.experts.z_loss_weight 0"""
RUNS: dict[str, tuple[str, str, str, float]] = {
    "dense, 2 micro-batches": (
        "transformers' Llama and torch's AdamW",
        "float32",
        "--model.memory null --train.grad_accum_steps 2",
        1e-5,
    ),
    "dense, tied embeddings, 2 micro-batches": (
        "transformers' SmolLM 3 and torch's AdamW",
        "float64",
        "--model.memory null --model.tie_embeddings true --train.grad_accum_steps 2",
        1e-6,
    ),
    "Memory, tables by sgd": ("torch's AdamW and SGD", "float64", f"{MEMORY} --optim.table.optimizer sgd", 1e-12),
    "Memory+, tables by lazy adam, 2 micro-batches": (
        "torch's AdamW and SparseAdam",
        "float64",
        f"{MEMORY_PLUS} --optim.table.optimizer adam --optim.table.eps {EPS} --train.grad_accum_steps 2",
        1e-12,
    ),
    "Memory+, tables by rowwise_adam": ("torch's AdamW and the formula", "float64", MEMORY_PLUS, 1e-12),
    "Memory+, tables by dense_adam": (
        "torch's AdamW and Adam",
        "float64",
        f"{MEMORY_PLUS} --optim.table.optimizer dense_adam",
        1e-12,
    ),
    "PEER, tables by lazy adam": (
        "torch's AdamW and SparseAdam",
        "float64",
        f"{PEER} --optim.table.optimizer adam --optim.table.eps {EPS}",
        1e-12,
    ),
    "PEER, tables by rowwise_adam": ("torch's AdamW and the formula", "float64", PEER, 1e-12),
    "experts, 2 of 4 a token": ("torch's AdamW", "float64", EXPERTS, 1e-12),
}
"""For each model: the reference, the dtype, the settings, and the bound of the difference."""


class Outcome(NamedTuple):
    """The result of training."""

    losses: list[float]
    weights: dict[str, np.ndarray]
    """Parameters and tables by their exported names."""


def training(folder: pathlib.Path) -> Iterator[Check]:
    """Compares losses of every step, and the final parameters and tables."""
    for number, (name, (reference, dtype, settings, bound)) in enumerate(RUNS.items()):
        with jax.enable_x64(dtype == "float64"):
            place = folder / str(number)
            place.mkdir()
            found, start = _in_memjax(place, f"{SIZES} {FLOAT64 if dtype == 'float64' else ''} {settings}")
        expected = _in_torch(place / "start", start)
        figure = relative(found.losses, expected.losses)
        yield Check("training", name, reference, f"losses of {STEPS} steps, {dtype}", figure, bound)
        pairs = [(found.weights[key], expected.weights[key]) for key in expected.weights]
        figure = max(relative(*pair) for pair in pairs)
        measure = f"parameters and tables after {STEPS} steps, {dtype}"
        yield Check("training", name, reference, measure, figure, 1000 * bound)


def _batches(accumulate: int) -> list[dict[str, np.ndarray]]:
    """Batches with one document per row, some with padding at the end; not all tokens are learned."""
    rng, shape, found = np.random.default_rng(0), (SEQUENCES, LENGTH), []
    for _ in range(STEPS):
        tokens, positions = rng.integers(3, 259, (SEQUENCES, LENGTH + 1)), np.arange(LENGTH)[None]
        token_mask = positions < rng.integers(LENGTH // 2, LENGTH + 1, (SEQUENCES, 1))
        learned = token_mask & (rng.random(shape) < 0.8)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": token_mask, "positions": positions}
        rows: dict[str, np.ndarray] = {
            name: np.broadcast_to(array, shape).astype(np.int32) for name, array in batch.items()
        }
        rows["loss_mask"] = learned.astype(np.float32)
        found.append({name: array.reshape(accumulate, -1, LENGTH) for name, array in rows.items()})
    return found


def _in_memjax(folder: pathlib.Path, settings: str) -> tuple[Outcome, RunConfig]:
    """Trains in memjax, and exports the first and the last model to `start` and `end`."""
    config = load(RunConfig, None, settings.split())
    program, losses = TrainProgram.of(config), []
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("data", "memory"), axis_types=axes, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state, step = program.init(jax.random.key(0), mesh), make_train_step(program, mesh)
        state = dataclasses.replace(state, params=jax.tree.map(lambda leaf: leaf + 0.02, state.params))
        _export(folder, "start", program, state, config)
        for batch in _batches(config.train.grad_accum_steps):
            state, metrics = step(state, put_batch(mesh, batch, MICRO_BATCHES))
            losses.append(float(metrics["train/loss"]))
        _export(folder, "end", program, state, config)
    model = _load(folder / "end")
    return Outcome(losses, _weights(model)), config


def _export(folder: pathlib.Path, name: str, program: TrainProgram, state: Any, config: RunConfig) -> None:
    write_run(folder / f"{name}-run", program.parts.merge(state.params, state.tables), ByteTokenizer(), config)
    assert split_decoder(load_as_saved(folder / f"{name}-run").model)[1]
    to_hf(folder / f"{name}-run", folder / name)


def _load(folder: pathlib.Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=True, attn_implementation="eager", use_cache=False
    )


def _weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().double().numpy().copy() for name, parameter in model.named_parameters()}


def _in_torch(folder: pathlib.Path, config: RunConfig) -> Outcome:
    """Trains in torch, from the exported first model."""
    model, optim = _load(folder), config.optim
    tables = {name: table for name, table in model.named_parameters() if ".tables." in name}
    dense = {name: parameter for name, parameter in model.named_parameters() if name not in tables}
    is_address = lambda name: name.rpartition(".")[2] in ("query_kernel", "query_bias", "keys")
    groups = [
        {
            "params": [parameter],
            "lr": optim.lr * (optim.key_lr_factor if is_address(name) else 1),
            "weight_decay": optim.weight_decay if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in dense.items()
    ]
    adamw = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    of_tables, losses, reads = _TableOptimizer(config, tables), [], _recorded_reads(model)
    for batch in _batches(config.train.grad_accum_steps):
        learned, total = float(batch["loss_mask"].sum()), 0.0
        adamw.zero_grad(), model.zero_grad(), of_tables.touched.clear()  # pyright: ignore[reportUnusedExpression]
        for tokens, targets, mask, real in zip(
            *(torch.tensor(batch[name]) for name in ("tokens", "targets", "loss_mask", "segments")), strict=True
        ):
            logits = model(input_ids=tokens.long()).logits
            each = F.cross_entropy(logits.flatten(0, 1), targets.long().flatten(), reduction="none")
            loss = (each * mask.flatten()).sum() / learned
            loss.backward()
            total += loss.item()
            for name, slots in reads:
                of_tables.touched.setdefault(name, []).append(slots[real.flatten() > 0].flatten())
            reads.clear()
        # torch's own clipping divides by the norm + 1e-6.
        norm = torch.stack([parameter.grad.square().sum() for parameter in dense.values()]).sum().sqrt()
        for parameter in dense.values():
            parameter.grad *= min(1.0, (optim.max_grad_norm or float("inf")) / norm.item())
        adamw.step()
        of_tables.step()
        losses.append(total)
    return Outcome(losses, _weights(model))


def _recorded_reads(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A list to which every table read appends the table's name and the slots."""
    reads: list[tuple[str, torch.Tensor]] = []
    for name, module in model.named_modules():
        if ".tables." in name:
            record = lambda _, inputs, name=f"{name}.weight": reads.append((name, inputs[0]))
            module.register_forward_pre_hook(record)
    return reads


class _TableOptimizer:
    """The optimizer of the tables, one of torch's if it has an equivalent."""

    def __init__(self, config: RunConfig, tables: dict[str, torch.nn.Parameter]):
        self.tables, self.settings = tables, config.optim.table
        self.touched: dict[str, list[torch.Tensor]] = {}
        rules = self.settings
        betas = {"lr": rules.lr, "betas": (rules.beta1, rules.beta2), "eps": rules.eps}
        self.optimizer: torch.optim.Optimizer | None = None
        if tables and rules.optimizer == "adam":
            self.optimizer = torch.optim.SparseAdam(list(tables.values()), **betas)
        elif tables and rules.optimizer == "dense_adam":
            self.optimizer = torch.optim.Adam(list(tables.values()), **betas)
        elif tables and rules.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(list(tables.values()), lr=rules.lr)
        self.second = {name: torch.zeros(len(table), 1, dtype=table.dtype) for name, table in tables.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Updates the tables from their gradients and the rows that were read."""
        for name, table in self.tables.items():
            rows, gradient = torch.cat(self.touched[name]).unique(), table.grad
            assert gradient is not None
            if isinstance(self.optimizer, torch.optim.SparseAdam):
                table.grad = torch.sparse_coo_tensor(rows[None], gradient[rows], gradient.shape, is_coalesced=True)
            elif self.optimizer is None:  # rowwise_adam, for rows that share a single second moment
                square, old = gradient[rows].square().mean(dim=1, keepdim=True), self.second[name][rows]
                beta2 = self.settings.beta2
                new = torch.where(old == 0, square, beta2 * old + (1 - beta2) * square)
                self.second[name][rows] = new
                table[rows] -= self.settings.lr * gradient[rows] / (new.sqrt() + self.settings.eps)
        if self.optimizer is not None:
            self.optimizer.step()
