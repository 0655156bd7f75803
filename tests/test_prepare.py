"""The prepare command in this process, and the training that reads what it wrote."""

import gzip
import json

import jax
import pytest

from memjax import prepare, train
from memjax.sharding.mesh import make_mesh
from memjax.training import main

MODEL = """
--model.dim 16 --model.num_layers 1 --model.num_heads 2 --model.ffn_dim 24 --model.vocab_size 259 --model.memory null
--optim.warmup_steps 1 --optim.table.warmup_steps 1
--data.sequence_length 16 --data.batch_size 4 --data.packing concat --data.tokenizer.kind byte
--data.validation_fraction 0 --train.steps 6 --train.grad_accum_steps 2 --eval.batches 2 --checkpoint.every 3
"""


@pytest.fixture
def mixture(tmp_path):
    """Command-line arguments for 40 texts, one of them broken, and 20 questions."""
    rows = [json.dumps({"text": f"text {i} of a packed file"}) for i in range(39)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join([*rows, "{"]).encode()))
    rows = [json.dumps({"prompt": f"question {i}?", "answer": f"{i}"}) for i in range(20)]
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    parts = f"[{{name: a, path: {tmp_path}/a.jsonl.gz, weight: 2}}, {{name: b, path: {tmp_path}/b.jsonl}}]"
    return ["--data.source", "mixture", "--data.mixture", parts, "--run.dir", str(tmp_path / "run")]


def test_a_malformed_record_ends_it_with_3(mixture, tmp_path, capsys):
    assert prepare.main([*MODEL.split(), *mixture]) == 3
    assert f"{tmp_path}/a.jsonl.gz:40: not JSON" in capsys.readouterr().err


def test_generated_data_and_none_are_refused_with_2(capsys):
    assert prepare.main([]) == 2
    assert "data.source=biographies is generated as it is read" in capsys.readouterr().err
    assert prepare.main(["wiki_text"]) == 2
    assert "data.path is null: source=jsonl needs a file" in capsys.readouterr().err


def test_ctrl_c_ends_it_with_130(mixture, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("memjax.data.prepared.prepare._prepare", interrupted)
    assert prepare.main([*MODEL.split(), *mixture]) == 130
    assert "the same command repeats the unfinished part" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_a_mixture_reads_prepared_data_and_reports_each_part(mixture, tmp_path, monkeypatch, capsys):
    arguments = [*MODEL.split(), *mixture, "--data.malformed", "skip"]
    assert prepare.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "prepared 39 records" in printed
    assert f"prepared   {tmp_path}/run/prepared/mixture-a: 39 records" in printed
    assert f"1 malformed records skipped, such as\n           {tmp_path}/a.jsonl.gz:40: not JSON" in printed
    assert prepare.main(arguments) == 0
    assert "preparing" not in capsys.readouterr().out

    monkeypatch.setattr(main, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "preparing" not in printed
    assert "a.jsonl.gz:40: not JSON" in printed
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        learned = {name: row[f"data/{name}/target_tokens"] for name in "ab"}
        assert sum(learned.values()) == row["train/target_tokens"]
        together = sum(row[f"data/{name}/loss"] * learned[name] for name in "ab" if learned[name])
        assert together / row["train/target_tokens"] == pytest.approx(row["train/loss"], rel=1e-5)
        assert all(row[f"data/{name}/loss"] is None for name in "ab" if not learned[name])
    assert len({row["data/a/loss"] for row in rows}) == 6
    assert any(row["data/b/target_tokens"] for row in rows)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["data/malformed"] == 1

    others = [
        "--run.dir",
        f"{tmp_path}/other",
        "--data.prepared",
        f"{tmp_path}/run/prepared",
        "--data.text_key",
        "body",
    ]
    assert train.main([*arguments, *others]) == 3
    assert "text='body' here, 'text' in the prepared data" in capsys.readouterr().err
