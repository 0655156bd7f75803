"""Compares layers, losses and optimizers with torch, in float64 if the reference supports it."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from checks import Check, relative
from flax import nnx
from transformers import (
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from memjax.config.model import ModelConfig, RopeScalingConfig
from memjax.config.optim import OptimConfig, ScheduleConfig
from memjax.models import dot_product
from memjax.models.decoder import Decoder
from memjax.models.loss import token_losses
from memjax.models.moe import MoE, router_statistics
from memjax.models.norm import RMSNorm
from memjax.models.rotary import rotate
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.api import row_update
from memjax.ops.row_update.rules import RowRule, row_step
from memjax.training.optimizer import make_optimizer, make_schedule


def layers() -> Iterator[Check]:
    """All checks below, in float64."""
    with jax.enable_x64(True):
        yield from attention()
        yield from norms_and_rope()
        yield cross_entropy()
        yield from experts()
        yield schedules()
        yield adamw()
        yield from table_rules()


def attention() -> Iterator[Check]:
    """Compares outputs and gradients of causal attention with scaled_dot_product_attention."""
    rng = np.random.default_rng(0)
    for heads, groups, window in ((4, 4, None), (6, 2, None), (5, 1, None), (4, 2, 7)):
        query = rng.normal(size=(2, 33, heads, 8))
        key, value = (rng.normal(size=(2, 33, groups, 8)) for _ in range(2))
        weight = rng.normal(size=query.shape)

        def ours(query, key, value, window=window, weight=weight):
            arguments = {"segments": None, "window": window, "implementation": "chunked"}
            out = dot_product.self_attention(query, key, value, **arguments)
            return (out * weight).sum(), out

        (_, out), gradients = jax.value_and_grad(ours, (0, 1, 2), has_aux=True)(*map(jnp.asarray, (query, key, value)))
        tensors = [torch.tensor(array, requires_grad=True) for array in (query, key, value)]
        first = [tensor.transpose(1, 2) for tensor in tensors]
        distance = torch.arange(33)[:, None] - torch.arange(33)
        seen = (distance >= 0) & (distance < (window or 99))
        theirs = F.scaled_dot_product_attention(*first, attn_mask=seen, enable_gqa=True).transpose(1, 2)
        (theirs * torch.tensor(weight)).sum().backward()
        pairs = [(out, theirs.detach()), *zip(gradients, (tensor.grad for tensor in tensors), strict=True)]
        figure = max(relative(one, other) for one, other in pairs)
        what = f"attention, {heads} heads, {groups} of keys" + (f", window {window}" if window else "")
        yield Check("layers", what, "torch", "output and gradients, float64", figure, 1e-12)


def norms_and_rope() -> Iterator[Check]:
    """Compares RMSNorm and rotary positions, up to large positions, in float32."""
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(3, 5, 16)), rng.normal(size=16)
    norm = RMSNorm(16, epsilon=1e-5, dtype=jnp.float32, param_dtype=jnp.float32)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    theirs = LlamaRMSNorm(16, eps=1e-5)
    theirs.weight.data = torch.tensor(scale, dtype=torch.float32)
    found = norm(jnp.asarray(x, jnp.float32)).normed
    expected = theirs(torch.tensor(x, dtype=torch.float32)).detach()
    yield Check("layers", "RMSNorm", "transformers", "output, float32", relative(found, expected), 1e-6)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for name, fields, scaling in (
        ("plain", {"rope_type": "default"}, None),
        ("llama3 scaling", {**llama3, "original_max_position_embeddings": 8192}, RopeScalingConfig()),
    ):
        config = LlamaConfig(
            hidden_size=64, num_attention_heads=1, rope_parameters={"rope_theta": 500000.0, **fields},
            max_position_embeddings=131072,
        )  # fmt: skip
        for last in (512, 131072):
            positions = np.linspace(0, last - 1, 64).astype(np.int32)[None]
            heads = rng.normal(size=(1, 64, 1, 64)).astype(np.float32)
            cos, sin = LlamaRotaryEmbedding(config)(torch.tensor(heads), torch.tensor(positions))
            expected = apply_rotary_pos_emb(torch.tensor(heads), torch.tensor(heads), cos, sin, unsqueeze_dim=2)[0]
            found = rotate(jnp.asarray(heads), jnp.asarray(positions), 500000.0, scaling)
            # In float32, the error of an angle grows with its number of turns: both round, and may differ by as much.
            what = f"rotary positions to {last:,}, {name}"
            yield Check(
                "layers", what, "transformers", "output, float32", relative(found, expected), max(1e-6, last * 4e-7)
            )


def cross_entropy() -> Check:
    """Compares losses of tokens."""
    rng = np.random.default_rng(0)
    config = ModelConfig(dim=16, num_layers=1, vocab_size=50, memory=None, dtype="float64", param_dtype="float64")
    model = Decoder(config, rngs=nnx.Rngs(0))
    hidden, targets = rng.normal(size=(2, 7, 16)), rng.integers(0, 50, (2, 7))
    found = token_losses(model, jnp.asarray(hidden), jnp.asarray(targets, jnp.int32))
    logits = torch.tensor(hidden) @ torch.tensor(np.asarray(model.output_matrix()))
    expected = F.cross_entropy(logits.reshape(-1, 50), torch.tensor(targets).reshape(-1), reduction="none")
    return Check("layers", "cross entropy", "torch", "losses, float64", relative(found, expected.reshape(2, 7)), 1e-13)


def experts() -> Iterator[Check]:
    """Compares token-choice experts with Mixtral's (renormalised weights) and Qwen 2's (not renormalised)."""
    sizes = {"hidden_size": 16, "num_experts_per_tok": 3}
    qwen = Qwen2MoeConfig(
        **sizes, moe_intermediate_size=24, shared_expert_intermediate_size=8, num_experts=4, norm_topk_prob=False
    )
    blocks = [("Mixtral", _mixtral(2)), ("Mixtral", _mixtral(3)), ("Qwen 2", Qwen2MoeSparseMoeBlock(qwen))]
    for kind, theirs in blocks:
        torch.manual_seed(0)
        theirs, rng = theirs.double(), np.random.default_rng(0)
        named = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, parameter in named.items():  # memjax has no shared expert
                parameter.copy_(torch.randn_like(parameter) / 4 * ("shared" not in name))
        float64 = {"dtype": jnp.float64, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        top_k = theirs.gate.top_k
        ours = MoE(16, 24, num_experts=4, top_k=top_k, renormalize=kind == "Mixtral", **float64)
        turned = lambda tensor: jnp.asarray(tensor.detach().numpy().swapaxes(-1, -2))
        gate, up = named["experts.gate_up_proj"].chunk(2, dim=1)
        ours.router.kernel[...], ours.down[...] = turned(named["gate.weight"]), turned(named["experts.down_proj"])
        ours.gate[...], ours.up[...] = turned(gate), turned(up)
        x, weight = rng.normal(size=(2, 2, 9, 16))

        def loss(model, x, weight=weight):
            out, routing = model(x)
            return (out * weight).sum(), (out, routing)

        (of_model, of_x), (out, routing) = nnx.grad(loss, argnums=(0, 1), has_aux=True)(ours, jnp.asarray(x))
        inputs = torch.tensor(x, requires_grad=True)
        expected = theirs(inputs)
        expected = expected[0] if isinstance(expected, tuple) else expected
        (expected * torch.tensor(weight)).sum().backward()
        of_gate, of_up = named["experts.gate_up_proj"].grad.chunk(2, dim=1)
        pairs = [(out, expected.detach()), (of_x, inputs.grad)]
        pairs += [(of_model["gate"][...], turned(of_gate)), (of_model["up"][...], turned(of_up))]
        pairs.append((of_model["down"][...], turned(named["experts.down_proj"].grad)))
        pairs.append((of_model["router"]["kernel"][...], turned(named["gate.weight"].grad)))
        what, figure = f"experts, {top_k} of 4 a token", max(relative(*pair) for pair in pairs)
        # Their routers compute the softmax in float32.
        yield Check("layers", what, f"transformers' {kind}", "output and gradients", figure, 1e-6)
        if kind == "Mixtral":
            balance = router_statistics(routing, jnp.ones(18, bool)).balance
            wanted = load_balancing_loss_func((torch.tensor(np.asarray(routing.logits)),), 4, top_k)
            # Theirs counts a token once for each of its experts.
            figure = relative(balance * top_k, wanted)
            yield Check("layers", what, f"transformers' {kind}", "load-balance loss", figure, 1e-6)


def _mixtral(top_k: int) -> MixtralSparseMoeBlock:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 4}
    return MixtralSparseMoeBlock(MixtralConfig(**sizes, num_experts_per_tok=top_k))


def schedules() -> Check:
    """Compares learning rates of all steps of short runs; memjax's first step has the rate of their second."""
    largest, count = 0.0, 0
    for steps in (5, 20, 101):
        for warmup in (0, 1, steps // 4):
            for fraction in (0.0, 0.05, 1.0, None):
                optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
                if fraction is None:
                    theirs = get_constant_schedule_with_warmup(optimizer, warmup)
                    config = ScheduleConfig(lr=0.3, warmup_steps=warmup, schedule="constant")
                else:
                    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=fraction)
                    config = ScheduleConfig(lr=0.3, warmup_steps=warmup, final_fraction=fraction)
                ours = make_schedule(config, steps)
                wanted = [0.3 * theirs.lr_lambdas[0](step + 1) for step in range(steps)]
                largest = max(largest, relative([float(np.asarray(ours(step))) for step in range(steps)], wanted))
                count += 1
    return Check("optimizers", f"{count} schedules", "transformers", "rates of every step, float64", largest, 1e-14)


def adamw() -> Check:
    """Compares 50 steps of the dense optimizer with clipping."""
    rng = np.random.default_rng(0)
    first = {"matrix": rng.normal(size=(5, 7)), "bias": rng.normal(size=7)}
    config = OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.1, max_grad_norm=1.0)
    params = nnx.State({name: nnx.Param(jnp.asarray(array)) for name, array in first.items()})
    optimizer = make_optimizer(config, 50, params)
    state = optimizer.init(params)
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in first.items()}
    groups = [{"params": [tensors["matrix"]], "weight_decay": 0.1}, {"params": [tensors["bias"]], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(config.beta1, config.beta2), eps=config.eps)
    for _ in range(50):
        gradients = {name: rng.normal(size=array.shape) for name, array in first.items()}
        wrapped = jax.tree.map(
            lambda _, array: jnp.asarray(array), params, nnx.State(gradients_like(params, gradients))
        )
        updates, state = optimizer.update(wrapped, state, params)
        params = jax.tree.map(lambda param, update: param + update, params, updates)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        theirs.step()
    found = nnx.to_pure_dict(params)
    figure = max(relative(found[name], tensor.detach()) for name, tensor in tensors.items())
    # The learning rate is computed in float32.
    return Check("optimizers", "AdamW with clipping", "torch", "parameters after 50 steps, float64", figure, 1e-7)


def gradients_like(params: nnx.State, gradients: dict[str, np.ndarray]) -> dict[str, nnx.Param]:
    """The gradients in the structure of the parameters."""
    return {name: nnx.Param(jnp.asarray(gradients[name])) for name in params}


def table_rules() -> Iterator[Check]:
    """Compares 25 updates of repeatedly read rows with torch's optimizers on the same gradients."""
    rules = {
        "lazy adam": (
            RowRule(kind="adam", beta1=0.9, beta2=0.99, eps=1e-30, moment_dtype=jnp.float64),
            torch.optim.SparseAdam,
            {"eps": 1e-30},
        ),
        "rowwise_adagrad, one column a state": (
            RowRule(kind="rowwise_adagrad", eps=1e-10, state_columns=1),
            torch.optim.Adagrad,
            {"eps": 1e-10},
        ),
        "sgd": (RowRule(kind="sgd"), torch.optim.SGD, {}),
    }
    for name, (rule, optimizer, settings) in rules.items():
        rng = np.random.default_rng(0)
        first = rng.normal(size=(20, 8))
        table, state = jnp.asarray(first), rule.init(20, 8, jnp.float64)
        tensor = torch.nn.Parameter(torch.tensor(first))
        if optimizer is torch.optim.SparseAdam:
            settings = {**settings, "betas": (0.9, 0.99)}
        theirs = optimizer([tensor], lr=0.1, **settings)
        for step in range(25):
            rows = rng.integers(0, 20, (6, 3))
            weights, vectors = rng.normal(size=(6, 3)), rng.normal(size=(6, 8))
            gradient = RowGradient(jnp.asarray(rows, jnp.int32), jnp.asarray(weights), jnp.asarray(vectors))
            table, state = row_update(table, state, [gradient], rule, row_step(0.1, step))
            each = torch.tensor((weights[:, :, None] * vectors[:, None]).reshape(-1, 8))
            tensor.grad = torch.sparse_coo_tensor(torch.tensor(rows.reshape(1, -1)), each, (20, 8)).coalesce()
            theirs.step()
        yield Check("optimizers", f"tables: {name}", f"torch's {optimizer.__name__}", "rows after 25 steps, float64",
                    relative(table, tensor.detach()), 1e-13)  # fmt: skip
