"""Clipping of tables in the compiled step, against gradients inferred from unclipped steps."""

import jax
import numpy as np
import pytest

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]

# AdamW's first step is g / (|g| + eps), which reveals the size of g if eps is large; an SGD step is g.
SETTINGS = "--optim.lr 1.0 --optim.eps 1.0 --optim.weight_decay 0 --optim.key_lr_factor 1 --optim.table.lr 1.0"
FLAT = "--optim.schedule constant --optim.table.schedule constant --optim.warmup_steps 0 --optim.table.warmup_steps 0"


def moved(run):
    """What a step subtracted from the dense parameters and from the table."""
    before, after = (jax.tree.leaves((state.params, state.tables)) for state in (run.before, run.after))
    *dense, table = (old - new for old, new in zip(before, after, strict=True))
    return dense, table


@pytest.fixture(scope="module")
def gradients(tiny):
    """The batch's unclipped gradients, inferred from a step without clipping."""
    config = tiny.config(SETTINGS, FLAT, "--optim.max_grad_norm null --optim.table.optimizer dense_sgd", wide=True)
    dense, table = moved(tiny.train(config, tiny.batches(1)))
    return [move / (1 - np.abs(move)) for move in dense], table


def norm(arrays) -> float:
    return float(np.sqrt(sum(np.sum(array**2) for array in arrays)))


@pytest.mark.parametrize(
    ("clip", "more", "mesh"),
    [
        ("joint", "--optim.table.optimizer sgd --train.grad_accum_steps 2 --mesh.data 2 --mesh.memory 2", (2, 2)),
        (
            "separate",
            "--optim.table.optimizer sgd --train.grad_accum_steps 4 --mesh.row_grad_reduce all_reduce",
            (1, 1),
        ),
    ],
)
def test_the_step_is_that_of_clipped_gradients(tiny, gradients, clip, more, mesh):
    dense, table = gradients
    norms = norm(dense), norm([table])
    limit = sum(norms) / 2  # at least one of the two norms exceeds it
    config = tiny.config(SETTINGS, FLAT, f"--optim.clip_tables {clip} --optim.max_grad_norm {limit}", more, wide=True)
    run = tiny.train(config, tiny.batches(1), mesh)
    factors = [limit / np.hypot(*norms)] * 2 if clip == "joint" else [min(1, limit / each) for each in norms]
    assert min(factors) < 0.95
    found_dense, found_table = moved(run)
    np.testing.assert_allclose(found_table, factors[1] * table, rtol=1e-6, atol=1e-9)
    for found, gradient in zip(found_dense, dense, strict=True):
        clipped = factors[0] * gradient
        np.testing.assert_allclose(found, clipped / (1 + np.abs(clipped)), rtol=1e-6, atol=1e-9)
    reported = [run.metrics[0][f"train/{name}"] for name in ("grad_norm", "grad_norm_tables")]
    np.testing.assert_allclose(reported, norms, rtol=1e-6)
