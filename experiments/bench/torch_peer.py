"""Times training of a `torch.compile`d Llama of a case's shape: `torch_peer.py CASE RESULT`.

Parameters and moments in bfloat16, fused AdamW, causal attention by `scaled_dot_product_attention`: PyTorch's
counterpart of the dense model in train_step.py, which starts this file if PyTorch can be imported.
"""

import json
import pathlib
import statistics
import sys
import time
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from memjax.monitoring.metrics import peak_flops


def rotary(length: int, head_dim: int, theta: float, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [length, head_dim / 2] in bfloat16."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, device=device), frequencies)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [b, n, s, h] by its positions."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    """Attention and SwiGLU, each after a norm."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int, eps: float):
        super().__init__()
        self.heads, self.kv_heads, head_dim = heads, kv_heads, dim // heads
        self.attention_norm, self.mixer_norm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        inputs = self.attention_norm(x)
        split = lambda layer, heads: layer(inputs).view(batch, length, heads, -1).transpose(1, 2)
        query, key = rotate(split(self.query, self.heads), cos, sin), rotate(split(self.key, self.kv_heads), cos, sin)
        value = split(self.value, self.kv_heads)
        grouped = self.heads != self.kv_heads
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        inputs = self.mixer_norm(x)
        return x + self.down(F.silu(self.gate(inputs)) * self.up(inputs))


class Llama(nn.Module):
    """Maps tokens to the mean loss of their targets."""

    def __init__(self, shape: dict[str, Any]):
        super().__init__()
        dim, heads, kv_heads = shape["dim"], shape["num_heads"], shape["num_kv_heads"] or shape["num_heads"]
        self.head_dim, self.theta = dim // heads, shape["rope_theta"]
        self.embed = nn.Embedding(shape["vocab_size"], dim)
        self.blocks = nn.ModuleList(
            [Block(dim, heads, kv_heads, shape["ffn_dim"], shape["norm_eps"]) for _ in range(shape["num_layers"])]
        )
        self.norm = nn.RMSNorm(dim, shape["norm_eps"])
        self.head = nn.Linear(dim, shape["vocab_size"], bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Measures the case's row."""
    shape, batch, length = case["shape"], case["batch"], case["length"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.manual_seed(0)
    model = Llama(shape).to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens, targets = (torch.randint(shape["vocab_size"], (batch, length), device=device) for _ in range(2))
    cos, sin = rotary(length, model.head_dim, model.theta, device)
    run = torch.compile(model) if device == "cuda" else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        run(tokens, targets, cos, sin).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()

    started = time.perf_counter()
    step()
    wait()
    compile_seconds = time.perf_counter() - started
    step()
    wait()
    times = []
    for _ in range(case["windows"]):
        started = time.perf_counter()
        for _ in range(case["steps"]):
            step()
        wait()
        times.append((time.perf_counter() - started) / case["steps"])
    seconds = statistics.median(times)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - shape["vocab_size"] * shape["dim"]
    flops = 6 * matrices + 6 * shape["num_layers"] * length * shape["dim"]
    row = {
        "tokens": batch * length,
        "ms": seconds * 1e3,
        "tokens/s": round(batch * length / seconds),
        "compile s": compile_seconds,
        "dense parameters": parameters,
        "attention": "sdpa",
        "torch": torch.__version__,
    }
    if device == "cuda":
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        if peak := peak_flops(types.SimpleNamespace(device_kind=torch.cuda.get_device_name())):
            row["MFU"] = row["tokens/s"] * flops / peak
    return row


def main() -> None:
    """Writes the case's row as JSON."""
    case, result = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    try:
        row = measure(case)
    except torch.OutOfMemoryError:
        row = {"note": "out of memory"}
    result.write_text(json.dumps({"rows": [row]}))


if __name__ == "__main__":
    main()
