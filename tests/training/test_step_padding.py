"""Padding changes nothing: the same documents in longer rows, filled up with padding, train the same model."""

import jax
import numpy as np
import pytest

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]

# A memory layer and an expert lookup, whose three tables the same optimizer trains.
SIZES = """
--model.memory.layers 0
--model.expert_lookup.layers 1 --model.expert_lookup.num_keys 8 --model.expert_lookup.num_heads 2
--model.expert_lookup.top_k 3 --model.expert_lookup.key_dim 8 --model.expert_lookup.table_dtype float64
"""


def longer(batch, length):
    """The batch in rows of the given length; what stands in padding is no zero, so that it would show."""
    fill = {"segments": 0, "loss_mask": 0, "tokens": 7, "targets": 9, "positions": 3}
    return {
        name: np.pad(rows, [(0, 0), (0, length - rows.shape[1])], constant_values=fill[name])
        for name, rows in batch.items()
    }


def trained_in_rows_of(tiny, length, optimizer, steps):
    settings = f"--data.sequence_length {length} --optim.table.optimizer {optimizer} --optim.table.lr 0.05"
    config = tiny.config(SIZES, settings, "--optim.table.state_columns 16 --train.accumulate 2", wide=True)
    batches = [longer(batch, length) for batch in tiny.batches(6)] * -(-steps // 6)
    return tiny.train(config, batches[:steps])


def differences(one, other):
    """The largest in losses, tables and their optimizer's state."""
    largest = lambda this, that: max(
        float(np.abs(a - b).max(initial=0)) for a, b in zip(jax.tree.leaves(this), jax.tree.leaves(that), strict=True)
    )
    pairs = {"losses": (one.losses, other.losses)}
    pairs |= {
        name: (getattr(one.after, name), getattr(other.after, name)) for name in ("tables", "table_state", "reads")
    }
    return {name: largest(*pair) for name, pair in pairs.items() if jax.tree.leaves(pair[0])}


@pytest.mark.parametrize(
    "optimizer",
    ["adam", "rowwise_adam", "rowwise_adagrad", "sgd"],
)
def test_rows_that_end_in_more_padding_train_the_same_tables_and_states(tiny, optimizer):
    short, long = (trained_in_rows_of(tiny, length, optimizer, steps=6) for length in (8, 16))
    assert differences(short, long) == pytest.approx(dict.fromkeys(differences(short, long), 0), abs=1e-12)
    assert not np.array_equal(short.before.tables["shared"], short.after.tables["shared"])
