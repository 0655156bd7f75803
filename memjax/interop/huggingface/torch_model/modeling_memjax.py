"""A decoder with memory layers exported by memjax, in torch for transformers 4.57 and later.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Part of memjax, under the Apache License 2.0. Exported folders contain a copy, so that they do not need memjax.
Parameters have the same names as in the folder's safetensors files; those that Llama also has are named and laid out as
in transformers.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_memjax import MemjaxConfig

# Names that differ between versions of transformers.
CACHE = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"
MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
GATHERED = 1 << 24
"""Most elements of gathered table rows in memory at once."""


def wide(dtype):
    """The type in which sums are computed."""
    return torch.promote_types(dtype, torch.float32)


class MemjaxRMSNorm(nn.Module):
    """Root mean square norm over the last axis, in float32 or wider."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.variance_epsilon = eps

    def forward(self, x):
        """x scaled to length sqrt(dim), times the weight."""
        y = x.to(wide(x.dtype))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (y * self.weight.to(y.dtype)).to(x.dtype)


def rotations(model, head_dim, positions, dtype):
    """Cosines and sines [batch, 1, sequence, head_dim / 2] that rotate the pairs of a head at the positions."""
    half, theta, scaling = head_dim // 2, model["rope_theta"], model["rope_scaling"]
    exponents = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    frequencies, factor = theta**-exponents, 1.0
    if scaling is not None:
        # Per row, because the frequencies may depend on its length.
        lengths = (positions.amax(dim=1) + 1)[:, None, None, None].float()
        frequencies = scaled(frequencies, theta, scaling, exponents, lengths)
        factor = attention_factor(scaling)
    angles = positions[:, None, :, None].float() * frequencies
    return tuple((turn(angles) * factor).to(dtype) for turn in (torch.cos, torch.sin))


def scaled(frequencies, theta, scaling, exponents, lengths):
    """Rotary frequencies scaled for longer texts than those of the original training."""
    kind, factor, original, half = scaling["kind"], scaling["factor"], scaling["original_length"], len(exponents)
    if kind == "linear":
        return frequencies / factor
    if kind == "dynamic":
        growth = 1 + factor * ((lengths / original).clamp(min=1) - 1)
        return (theta * growth ** (half / max(half - 1, 1))) ** -exponents
    if kind == "longrope":
        short, long = (exponents.new_tensor(scaling[name]) for name in ("short_factor", "long_factor"))
        return frequencies / torch.where(lengths > original, long, short)
    if kind == "llama3":  # frequencies with few turns within the original length are divided
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / factor)
    if kind != "yarn":
        raise ValueError(f"rope_scaling.kind={kind!r} must be linear, dynamic, longrope, llama3 or yarn")
    # Frequencies with beta_fast turns are kept, those with beta_slow turns divided, with a ramp in between.
    ends = [
        half * math.log(original / (2 * math.pi * scaling[beta])) / math.log(theta)
        for beta in ("beta_fast", "beta_slow")
    ]
    if scaling["truncate"]:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], 2 * half - 1)
    numbers = torch.arange(half, dtype=torch.float64)
    slow = ((numbers - first) / ((last - first) or 0.001)).clamp(0, 1)
    return (theta ** (-numbers / half) * (1 - slow + slow / factor)).to(frequencies)


def attention_factor(scaling):
    """The factor of cosines and sines."""
    if scaling["kind"] not in ("yarn", "longrope"):
        return 1.0
    if scaling["attention_factor"] is not None:
        return scaling["attention_factor"]
    growth = math.log(max(scaling["factor"], 1))
    if scaling["kind"] == "longrope":
        return math.sqrt(1 + growth / math.log(scaling["original_length"])) if growth else 1.0
    mscale, all_dim = scaling["mscale"], scaling["mscale_all_dim"]
    return (1 + 0.1 * mscale * growth) / (1 + 0.1 * all_dim * growth) if mscale and all_dim else 1 + 0.1 * growth


def rotate(x, cos, sin):
    """Rotates the pairs (x[i], x[i + head_dim / 2])."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention by its formula, with the signature that transformers expects."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = scores.softmax(dim=-1, dtype=wide(scores.dtype)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class MemjaxAttention(nn.Module):
    """Causal attention through the function that the config names, with grouped queries and rotary positions."""

    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        model, dim, width = config.model, config.hidden_size, config.head_dim
        self.config, self.layer_idx, self.head_dim = config, layer_idx, width
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_rotated = layer_idx not in model["rope_free_layers"]
        bias, out_bias = model["attention_bias"], model["attention_out_bias"]
        self.q_proj = nn.Linear(dim, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(dim, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(dim, config.num_key_value_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * width, dim, bias=bias if out_bias is None else out_bias)
        self.norms_all_heads, has_norm = model["qk_norm"] == "all_heads", model["qk_norm"] != "none"
        heads = (config.num_attention_heads, config.num_key_value_heads) if self.norms_all_heads else (1, 1)
        self.q_norm = MemjaxRMSNorm(heads[0] * width, config.rms_norm_eps) if has_norm else None
        self.k_norm = MemjaxRMSNorm(heads[1] * width, config.rms_norm_eps) if has_norm else None

    def forward(self, x, turns, attention_mask, cache, **kwargs):
        """The output, and the attention weights if the attention function returns them."""
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if self.norms_all_heads:
            parts = [self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]]
        query, key, value = (part.view(*x.shape[:-1], -1, self.head_dim) for part in parts)
        if self.q_norm is not None and not self.norms_all_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if self.is_rotated:
            query, key = rotate(query, *turns), rotate(key, *turns)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs)
        name = self.config._attn_implementation
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        scaling, window = self.head_dim**-0.5, self.config.sliding_window
        out, weights = attend(
            self, query, key, value, attention_mask, scaling=scaling, dropout=0.0, sliding_window=window, **kwargs
        )
        return self.o_proj(out.reshape(*x.shape[:-1], -1)), weights


class MemjaxMLP(nn.Module):
    """SwiGLU: W2 (silu(W1 x) * W3 x)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        """The layer's output."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MemjaxTable(nn.Module):
    """A table of values, of which each token reads a weighted sum of a few rows."""

    def __init__(self, config, section, width):
        super().__init__()
        self.stays_on_cpu = config.table_device == "cpu"
        # The saved type, or that of the rest of the model if it is narrower.
        saved, rest = section["table_dtype"], torch.get_default_dtype()
        saved = rest if saved == "auto" else getattr(torch, saved)
        dtype = saved if saved.itemsize < rest.itemsize else rest
        self.weight = nn.Parameter(torch.empty(section["num_keys"] ** 2, width, dtype=dtype))
        self.init_scale = section["value_init_scale"]

    def _apply(self, function, recurse=True):
        """Handles `.to`, `.cuda` and the like; a table that stays on the CPU changes its type, but never its device."""
        moved = function(self.weight.new_empty(0))
        if not self.stays_on_cpu or moved.device.type in ("cpu", "meta"):
            return super()._apply(function, recurse)
        here = lambda rows: torch.empty_like(rows, device="cpu") if rows.is_meta else rows.cpu()
        return super()._apply(lambda rows: here(rows).to(moved.dtype), recurse)

    def forward(self, slots, factors):
        """The sums [tokens, width] of rows times factors [tokens, picks], computed on the table's device."""
        place, rows = factors.device, self.weight
        slots, factors = slots.to(rows.device), factors.to(rows.device)
        if rows.dtype == wide(rows.dtype):
            bag = F.embedding_bag(slots, rows, mode="sum", per_sample_weights=factors.to(rows.dtype))
        else:  # embedding_bag would round the factors to 16 bits
            bag = self._by_tokens("tkd,tk->td", slots, factors).to(rows.dtype)
        return bag.to(place)

    def _by_tokens(self, product, slots, factors):
        """Products of gathered rows and another factor, in float32 or wider, a few tokens at a time."""
        at_once = max(1, GATHERED // (slots.shape[1] * self.weight.shape[1]))
        dtype = wide(self.weight.dtype)
        with torch.autocast(self.weight.device.type, enabled=False):
            parts = [
                torch.einsum(product, F.embedding(some, self.weight).to(dtype), factor.to(dtype))
                for some, factor in zip(slots.split(at_once), factors.split(at_once), strict=True)
            ]
        return torch.cat(parts)


class MemjaxExpertInputs(MemjaxTable):
    """The input vectors of experts, with which tokens are compared."""

    def forward(self, slots, factors):
        """The inner products [tokens, picks] of rows and the tokens' vectors [tokens, width]."""
        found = self._by_tokens("tkd,td->tk", slots.to(self.weight.device), factors.to(self.weight.device))
        return found.to(factors.device)


class MemjaxProductKeys(nn.Module):
    """Finds the best slots of each head: slot i * num_keys + j scores <q1, keys1[i]> + <q2, keys2[j]>."""

    def __init__(self, dim, section):
        super().__init__()
        self.num_heads, self.top_k, self.num_keys = section["num_heads"], section["top_k"], section["num_keys"]
        self.qk_norm, self.score_scale = section["qk_norm"], section["score_scale"]
        half = section["key_dim"] // 2
        self.query_kernel = nn.Parameter(torch.empty(dim, self.num_heads * 2 * half))
        self.query_bias = nn.Parameter(torch.zeros(self.num_heads * 2 * half))
        self.keys = nn.Parameter(torch.empty(self.num_heads, 2, self.num_keys, half))

    def forward(self, x):
        """Slots and softmax weights [tokens, heads * top_k] of the tokens [tokens, dim]."""
        queries = torch.addmm(self.query_bias, x, self.query_kernel)
        keys, dtype = self.keys.to(queries.dtype), wide(queries.dtype)
        queries = queries.unflatten(-1, (self.num_heads, 2, -1))
        if self.qk_norm:
            queries, keys = unit_length(queries), unit_length(keys)
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.einsum("thcd,hcnd->thcn", queries.to(dtype), keys.to(dtype))
        # The best slots are pairs of the best halves.
        count = min(self.top_k, self.num_keys)
        scores, found = scores.topk(count, dim=-1)
        pairs = scores[:, :, 0, :, None] + scores[:, :, 1, None, :]
        scores, order = pairs.flatten(2).topk(self.top_k, dim=-1)
        first, second = found[:, :, 0].gather(-1, order // count), found[:, :, 1].gather(-1, order % count)
        weights = (self.score_scale * scores).softmax(dim=-1)
        return (first * self.num_keys + second).flatten(1), weights.flatten(1)


def unit_length(vectors):
    """Vectors divided by their Euclidean length."""
    y = vectors.to(wide(vectors.dtype))
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-12)).to(vectors.dtype)


class MemjaxMemory(nn.Module):
    """The memory layer of arXiv:2412.09764; with a gate, W2 (y * silu(W1 x)) of the value y that it reads."""

    def __init__(self, dim, section):
        super().__init__()
        width, gated = section["value_dim"] or dim, section["gate"] == "silu"
        self.keys = MemjaxProductKeys(dim, section)
        self.gate_proj = nn.Linear(dim, width) if gated else None
        self.value_proj = nn.Linear(width, dim) if gated or width != dim else None
        self.output_gate = nn.Linear(dim, 1) if section["output_gate"] else None
        self.scale = nn.Parameter(torch.zeros(dim)) if section["placement"] == "parallel" else None

    def forward(self, x, table):
        """The layer's output."""
        bag = table(*self.keys(x.flatten(0, -2)))
        y = bag.view(*x.shape[:-1], -1).to(x.dtype)
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        if self.value_proj is not None:
            y = self.value_proj(y)
        if self.output_gate is not None:
            y = y * self.output_gate(x).sigmoid()
        return y if self.scale is None else y * self.scale.to(y.dtype)


class MemjaxPEER(nn.Module):
    """PEER (arXiv:2407.04153): the sum of weight * gelu(<x, u>) * v over the experts (u, v) that the keys select."""

    def __init__(self, dim, section):
        super().__init__()
        self.keys = MemjaxProductKeys(dim, section)

    def forward(self, x, inputs, outputs):
        """The layer's output."""
        tokens = x.flatten(0, -2)
        slots, weights = self.keys(tokens)
        bag = outputs(slots, weights * F.gelu(inputs(slots, tokens)))
        return bag.view(x.shape).to(x.dtype)


class MemjaxExperts(nn.Module):
    """A mixture of SwiGLU experts: every token goes through its likeliest ones."""

    def __init__(self, dim, section, hidden_dim):
        super().__init__()
        count = section["num_experts"]
        self.top_k = section["top_k"] if section["routing"] == "token_choice" else 1
        self.renormalize = section["renormalize"]
        self.router = nn.Linear(dim, count, bias=False)
        self.gate, self.up = (nn.Parameter(torch.empty(count, dim, hidden_dim)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(count, hidden_dim, dim))

    def forward(self, x):
        """The layer's output."""
        tokens, dtype = x.flatten(0, -2), wide(x.dtype)
        weights, picks = self.router(tokens).softmax(dim=-1, dtype=dtype).topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(tokens, dtype=dtype)
        for expert in range(len(self.gate)):
            token, place = (picks == expert).nonzero(as_tuple=True)
            rows = tokens[token]
            hidden = F.silu(rows @ self.gate[expert]) * (rows @ self.up[expert])
            found = (hidden @ self.down[expert]).to(dtype) * weights[token, place, None]
            out = out.index_add(0, token, found)
        return out.view(x.shape).to(x.dtype)


class MemjaxLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mixer(norm(x)); a memory may be parallel to the feed-forward layer.

    With norm_placement post: x + norm(attention(x)), then x + norm(mixer(x)).
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        model, dim = config.model, config.hidden_size
        kind, self.table_names = kind_of(model, layer_idx)
        self.is_post = model["norm_placement"] == "post"
        self.input_layernorm = None if self.is_post else MemjaxRMSNorm(dim, config.rms_norm_eps)
        self.self_attn = MemjaxAttention(config, layer_idx)
        self.post_attention_layernorm = MemjaxRMSNorm(dim, config.rms_norm_eps)
        self.post_feedforward_layernorm = MemjaxRMSNorm(dim, config.rms_norm_eps) if self.is_post else None
        parallel = kind == "memory" and model["memory"]["placement"] == "parallel"
        self.mlp = MemjaxMLP(dim, model["ffn_dim"]) if kind == "dense" or parallel else None
        experts = model["experts"]
        hidden_dim = experts and (experts["ffn_dim"] or model["ffn_dim"])
        self.experts = MemjaxExperts(dim, experts, hidden_dim) if kind == "experts" else None
        self.memory = MemjaxMemory(dim, model["memory"]) if kind == "memory" else None
        self.peer = MemjaxPEER(dim, model["peer"]) if kind == "peer" else None

    def forward(self, x, turns, attention_mask, cache, tables, **kwargs):
        """The layer's output, and the attention weights."""
        inputs = x if self.is_post else self.input_layernorm(x)
        attended, weights = self.self_attn(inputs, turns, attention_mask, cache, **kwargs)
        x = x + (self.post_attention_layernorm(attended) if self.is_post else attended)
        inputs = x if self.is_post else self.post_attention_layernorm(x)
        tables = [tables[name] for name in self.table_names]
        mixers = ((self.mlp, ()), (self.experts, ()), (self.memory, tables), (self.peer, tables))
        outs = [mixer(inputs, *read) for mixer, read in mixers if mixer is not None]
        return (x + self.post_feedforward_layernorm(sum(outs)) if self.is_post else sum(outs, start=x)), weights


def kind_of(model, layer):
    """The kind of layer after a block's attention, and the names of the tables that it reads."""
    memory, peer, experts = (model[name] for name in ("memory", "peer", "experts"))
    if memory and layer in memory["layers"]:
        return "memory", ("shared" if memory["shared_table"] else f"layer_{layer}",)
    if peer and layer in peer["layers"]:
        name = "experts" if peer["shared_table"] else f"experts_{layer}"
        return "peer", (f"{name}_inputs", f"{name}_outputs")
    return "experts" if experts and (experts["layers"] is None or layer in experts["layers"]) else "dense", ()


def tables_of(config):
    """The tables by name."""
    tables, model = nn.ModuleDict(), config.model
    for layer in range(config.num_hidden_layers):
        kind, names = kind_of(model, layer)
        for name in names:
            section = model[kind]
            width = (kind == "memory" and section["value_dim"]) or config.hidden_size
            if name not in tables:
                made = MemjaxExpertInputs if name.endswith("_inputs") else MemjaxTable
                tables[name] = made(config, section, width)
    return tables


class MemjaxPreTrainedModel(PreTrainedModel):
    """Base class of both models."""

    config_class = MemjaxConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemjaxLayer", "MemjaxTable", "MemjaxExpertInputs"]  # noqa: RUF012  transformers names it so
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, name, *args, config=None, device_map=None, **kwargs):
        """As in transformers, except that tables on the CPU are not loaded to another device first."""
        on_cpu = kwargs.get("table_device", getattr(config, "table_device", "cuda")) == "cpu"
        if device_map is None or not on_cpu:
            return super().from_pretrained(name, *args, config=config, device_map=device_map, **kwargs)
        if isinstance(device_map, dict) and device_map.keys() == {""}:  # another way to name one device
            (device_map,) = device_map.values()
        if isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            raise ValueError(f"device_map={device_map!r} must name one device, such as cuda, where table_device is cpu")
        return super().from_pretrained(name, *args, config=config, **kwargs).to(device_map)

    def _init_weights(self, module):
        """Initialises parameters much as memjax does."""
        draw = lambda parameter, std: nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std)
        if isinstance(module, nn.Linear):
            draw(module.weight, module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            draw(module.weight, self.config.model["embedding_init_std"] or module.embedding_dim**-0.5)
        elif isinstance(module, MemjaxTable):
            nn.init.normal_(module.weight, std=module.init_scale * module.weight.shape[1] ** -0.5)
        elif isinstance(module, MemjaxRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, MemjaxProductKeys):
            bound = (2 * module.keys.shape[-1]) ** -0.5
            nn.init.xavier_uniform_(module.query_kernel)
            nn.init.zeros_(module.query_bias)
            nn.init.uniform_(module.keys, -bound, bound)
        elif isinstance(module, MemjaxMemory) and module.scale is not None:
            nn.init.zeros_(module.scale)
        elif isinstance(module, MemjaxExperts):
            for matrices in (module.gate, module.up, module.down):
                draw(matrices, matrices.shape[1] ** -0.5)


class MemjaxModel(MemjaxPreTrainedModel):
    """The decoder without its output matrix."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MemjaxLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = MemjaxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.tables = tables_of(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        cache=None,
        **kwargs,
    ):
        """The normed hidden states; the arguments are those of every decoder in transformers.

        Older versions call the cache past_key_values. Other arguments are passed to the attention function.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("one of input_ids and inputs_embeds must be given, and only one")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        places = kwargs.get("cache_position")
        if places is None:
            past = 0 if cache is None else cache.get_seq_length()
            places = kwargs["cache_position"] = torch.arange(x.shape[1], device=x.device) + past
        position_ids = places[None] if position_ids is None else position_ids
        mask = self._mask(x, attention_mask, cache, places, position_ids)
        turns = rotations(self.config.model, self.config.head_dim, position_ids, x.dtype)
        states, attentions = [x], []
        for layer in self.layers:
            x, weights = layer(x, turns, mask, cache, self.tables, position_ids=position_ids, **kwargs)
            states.append(x)
            attentions.append(weights)
        x = states[-1] = self.norm(x)
        wants = lambda given, name: getattr(self.config, name, False) if given is None else given
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=tuple(states) if wants(output_hidden_states, "output_hidden_states") else None,
            attentions=tuple(attentions) if wants(output_attentions, "output_attentions") else None,
            **{CACHE: cache if use_cache else None},
        )

    def _mask(self, x, attention_mask, cache, places, position_ids):
        """The attention mask in the form that the attention function expects."""
        if isinstance(attention_mask, dict):  # with a static cache, generation has made the masks of all layer types
            return attention_mask[self.config.layer_types[0]]
        create = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        given = {"config": self.config, "attention_mask": attention_mask, "position_ids": position_ids}
        given |= {
            "input_embeds": x,
            "inputs_embeds": x,
            "cache_position": places,
            "past_key_values": cache,
            "cache": cache,
        }
        return create(**{name: value for name, value in given.items() if name in MASK_ARGUMENTS})


class MemjaxForCausalLM(MemjaxPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  transformers names it so

    def __init__(self, config):
        super().__init__(config)
        self.model = MemjaxModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        """Logits, and with labels the loss of the next tokens; see `MemjaxModel.forward`."""
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        cache = past_key_values if cache is None else cache
        out = self.model(input_ids, cache=cache, use_cache=use_cache, **given, **{**kwargs, "return_dict": True})
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            **{CACHE: getattr(out, CACHE)},
        )
