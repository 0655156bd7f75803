"""A run with experts, as a user makes it: trained, resumed, used for generation, and exported."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memjax
from memjax import train
from memjax.inference.streaming import generate
from memjax.interop.huggingface.convert import to_hf
from memjax.models.decoder import Decoder
from memjax.sharding.mesh import make_mesh
from memjax.training import main

SETTINGS = """
--model.dim 16 --model.num_layers 1 --model.num_heads 2 --model.ffn_dim 24 --model.vocab_size 259 --model.memory null
--model.experts.num_experts 3 --model.experts.routing expert_choice --model.experts.capacity_factor 2
--data.source text --data.sequence_length 16 --data.batch_size 8 --data.packing concat --data.validation_fraction 0.2
--data.tokenizer.kind byte --optim.lr 0.03 --optim.warmup_steps 2 --optim.table.warmup_steps 0
--train.steps 12 --checkpoint.every 6 --checkpoint.no-keep_best --eval.every null --eval.batches 1
"""


@pytest.mark.slow
def test_a_run_with_experts_learns_resumes_exactly_and_writes_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    corpus, folder = tmp_path / "corpus.txt", tmp_path / "run"
    corpus.write_text("\n".join(f"line {number} of a small corpus" for number in range(50)))
    arguments = [*SETTINGS.split(), "--data.path", str(corpus), "--run.dir", str(folder)]

    def run():
        assert train.main(arguments) == 0
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    rows = run()
    assert "experts    3 in block 0; experts choose" in capsys.readouterr().out
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.5
    assert "eval/validation/loss" in rows[-1]
    shutil.rmtree(folder / "checkpoints" / "12")
    (folder / "summary.json").unlink()
    again = run()
    assert "resumed from step 6" in capsys.readouterr().out
    told = [name for name in rows[-1] if name.startswith(("moe/L0/", "train/", "eval/"))]
    assert {"moe/L0/load_balance_loss", "train/grad_norm", "eval/validation/loss"} <= set(told)
    assert [[row.get(name) for name in told] for row in again] == [[row.get(name) for name in told] for row in rows]

    model, tokenizer = memjax.load(folder)
    prompt = [tokenizer.bos_id, *tokenizer.encode("line")]
    text = list(generate(model, prompt, max_tokens=3))
    # The reference: no cache, all tokens at once.
    logits = np.asarray(nnx.jit(Decoder.__call__)(model, jnp.asarray([prompt + text])))[0]
    assert text == list(logits[len(prompt) - 1 : -1].argmax(axis=-1))
    to_hf(folder, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "memjax"
