"""Padding changes nothing: the same documents in rows with more padding train the same model."""

import jax
import numpy as np
import pytest

from memjax.sharding.mesh import put_batch
from memjax.sharding.rules import MICRO_BATCHES
from memjax.training.step import make_train_step

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]

# A memory layer and a PEER layer, whose three tables the same optimizer trains.
SIZES = """
--model.memory.layers 0
--model.peer.layers 1 --model.peer.num_keys 8 --model.peer.num_heads 2
--model.peer.top_k 3 --model.peer.key_dim 8 --model.peer.table_dtype float64
--optim.table.state_columns 16
"""
LONG = 48


def longer(batch, length, *, token):
    """Pads the batch's rows to the given length; padding is non-zero, so that any use of it would show."""
    fill = {"segments": 0, "loss_mask": 0, "tokens": token, "targets": token + 2, "positions": 3}
    return {
        name: np.pad(rows, [(0, 0), (0, length - rows.shape[1])], constant_values=fill[name])
        for name, rows in batch.items()
    }


def documents(tiny, steps):
    """Batches with rows of 24 tokens, each joined from three of the fixture's rows as separate documents."""
    found = []
    for parts in zip(*[iter(tiny.batches(3 * steps))] * 3, strict=True):
        joined = {name: np.concatenate([part[name][:8] for part in parts], axis=1) for name in parts[0]}
        # Move the padding of all three to the end of the row.
        order = np.argsort(joined["segments"] == 0, axis=1, kind="stable")
        shifted = [np.where(part["segments"][:8] > 0, part["segments"][:8] + 2 * n, 0) for n, part in enumerate(parts)]
        joined["segments"] = np.concatenate(shifted, axis=1)
        found.append({name: np.take_along_axis(rows, order, axis=1) for name, rows in joined.items()})
    return found


def trained(tiny, runs, optimizer, settings=SIZES):
    """Trains on each list of batches from the same initial state; returns (losses, state) of each."""
    length = runs[0][0]["tokens"].shape[1]
    own = f"--data.sequence_length {length} --optim.table.optimizer {optimizer} --optim.lr 1e-3 --optim.table.lr 1e-3"
    config = tiny.config(settings, own, "--data.batch_size 8", wide=True)
    mesh, program, found = tiny.mesh(1, 1), tiny.program_of(config), []
    with jax.set_mesh(mesh):
        step = make_train_step(program, mesh)
        for batches in runs:
            state, losses = tiny.quick_state(program, mesh), []
            for batch in batches:
                state, row = step(state, put_batch(mesh, tiny.micro_batches(batch, 1), MICRO_BATCHES))
                losses.append(float(row["train/loss"]))
            found.append((np.array(losses), tiny.to_numpy(state)))
    return found


def differences(one, other):
    """The largest differences in losses, tables, their optimizer state and read counters."""
    largest = lambda this, that: max(
        float(np.abs(a - b).max(initial=0)) for a, b in zip(jax.tree.leaves(this), jax.tree.leaves(that), strict=True)
    )
    names = ("tables", "table_state", "reads")
    pairs = {"losses": (one[0], other[0])} | {name: (getattr(one[1], name), getattr(other[1], name)) for name in names}
    return {name: largest(*pair) for name, pair in pairs.items() if jax.tree.leaves(pair[0])}


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adam", "rowwise_adagrad", "sgd"])
def test_rows_that_end_in_more_padding_train_the_same_tables_and_states(tiny, optimizer):
    """They agree up to rounding, as sums over 48 tokens are formed in another order than sums over 24.

    Rounding errors grow with steps and rates: at fifty times these rates they reach 1e-10 in tables, but so they do if
    only the rows of a batch are reordered.
    """
    batches = documents(tiny, 60)
    (short,) = trained(tiny, [batches], optimizer)
    first, long = trained(
        tiny, [[longer(batch, LONG, token=7) for batch in some] for some in (batches[:1], batches)], optimizer
    )
    assert max(differences(short, long).values()) < 1e-12
    assert np.abs(first[1].tables["shared"] - long[1].tables["shared"]).max() > 1e-6


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adam"])
@pytest.mark.parametrize("settings", [SIZES, "--model.memory.gate none --model.memory.shared_table false"])
def test_the_content_of_padding_changes_no_bit(tiny, optimizer, settings):
    runs = [[longer(batch, LONG, token=token) for batch in documents(tiny, 12)] for token in (7, 90)]
    assert set(differences(*trained(tiny, runs, optimizer, settings)).values()) == {0.0}
