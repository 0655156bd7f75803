"""Times transformers' `generate` on a Llama of a case's shape: `inference_peer.py CASE RESULT`.

Random weights in bfloat16, attention by `scaled_dot_product_attention`, greedy. With a static cache, transformers
compiles the model itself if there is a GPU. Started by inference.py if transformers can be imported.
"""

import json
import pathlib
import statistics
import sys
import time
from typing import Any

import torch
import transformers


def build(shape: dict[str, Any], device: str, longest: int) -> Any:
    """A Llama of the shape, whose texts do not end early."""
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["dim"],
        intermediate_size=shape["ffn_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["kv_heads"],
        rms_norm_eps=shape["norm_eps"],
        rope_theta=shape["rope_theta"],
        max_position_embeddings=longest,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(device, torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def measure(model: Any, case: dict[str, Any], batch: int, length: int, device: str) -> dict[str, Any]:
    """The time to the first token of `batch` prompts, and of each further token: medians over texts."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    options = {"do_sample": False} | ({"cache_implementation": "static"} if case["cache"] == "static" else {})

    def seconds(new: int, seed: int) -> float:
        torch.manual_seed(seed)
        prompts = torch.randint(3, model.config.vocab_size, (batch, length), device=device)
        wait()
        started = time.perf_counter()
        model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, **options)
        wait()
        return time.perf_counter() - started

    new = case["new"]
    started = time.perf_counter()
    for seed in range(2):
        seconds(1 + new, seed)
        seconds(1, seed)
    compile_seconds = time.perf_counter() - started
    firsts = [seconds(1, 2 + seed) for seed in range(case["rounds"])]
    wholes = [seconds(1 + new, 2 + seed) for seed in range(case["rounds"])]
    milliseconds = (statistics.median(wholes) - statistics.median(firsts)) / new * 1e3
    return {
        "first token ms": statistics.median(firsts) * 1e3,
        "ms a token": milliseconds,
        "tokens/s": round(batch / milliseconds * 1e3),
        "compile s": compile_seconds,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def main() -> None:
    """Writes the case's rows as JSON, and prints each."""
    case, result = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    longest = max(length for _, length in case["sizes"]) + case["new"] + 1
    rows = []
    with torch.inference_mode():
        model = build(case["shape"], device, longest)
        for batch, length in case["sizes"]:
            try:
                row = measure(model, case, batch, length, device)
            except torch.OutOfMemoryError:
                row = {"note": "out of memory"}
            except Exception as error:
                row = {"note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            rows.append({"batch": batch, "prompt": length} | row)
            result.write_text(json.dumps({"rows": rows}))
            print({"model": case["model"]} | rows[-1], flush=True)


if __name__ == "__main__":
    main()
