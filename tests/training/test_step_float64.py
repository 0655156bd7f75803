"""The training step in double precision, where two ways of computing a number must agree to the last digits.

In float32, rounding decides between slots with nearly equal scores, and runs diverge; here there are no near ties.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.memory import sharded
from memjax.sharding.mesh import put_batch
from memjax.sharding.rules import MICRO_BATCHES
from memjax.training.step import make_train_step

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]

STEPS = 4


def moved(trained, what: str) -> np.ndarray:
    """The change of a run's tables (or parameters), as one vector."""
    before, after = (jax.tree.leaves(getattr(state, what)) for state in (trained.before, trained.after))
    return np.concatenate([(new - old).ravel() for old, new in zip(before, after, strict=True)])


def difference(this, other, what: str = "tables") -> float:
    """The relative difference of two changes; relative to the tables themselves, it would be a weaker test."""
    return float(np.linalg.norm(moved(this, what) - moved(other, what)) / np.linalg.norm(moved(other, what)))


def plain_bag(table, indices, weights, perturbation=None, **_):
    """The bag in plain JAX, differentiated without our custom rule."""
    out = jnp.einsum("tk,tkd->td", weights, table[indices])
    return out if perturbation is None else out + perturbation


@pytest.fixture(scope="module")
def sgd(tiny, float64):
    """sgd(settings, mesh): the result of a few steps with a large rate for the tables, cached."""

    @functools.cache
    def run(settings: str, mesh_shape: tuple[int, int] = (1, 1)):
        mesh = "--mesh.data {} --mesh.memory {}".format(*mesh_shape)
        config = tiny.config("--optim.table.lr 10.0 --optim.table.optimizer", settings, mesh, wide=True)
        with pytest.MonkeyPatch.context() as patch:
            if config.optim.table.is_dense:
                patch.setattr(sharded, "bag", plain_bag)
            return tiny.train(config, tiny.batches(STEPS), mesh_shape)

    return run


@pytest.mark.parametrize(
    ("share", "settings", "mesh_shape"),
    [
        ("true", "sgd", (1, 1)),
        ("true", "sgd --train.grad_accum_steps 2 --mesh.row_grad_reduce all_reduce", (2, 4)),
        ("false", "sgd --train.grad_accum_steps 2 --mesh.row_grad_reduce all_gather", (1, 1)),
        # Enough micro-batches for row gradients to be summed as they arrive.
        ("true", "sgd --train.grad_accum_steps 8", (1, 1)),
    ],
)
def test_row_updates_of_micro_batches_on_a_mesh_are_plain_sgd_on_the_whole_batch(
    tiny, sgd, share, settings, mesh_shape
):
    rows, plain = (
        sgd(f"{way} --model.memory.shared_table {share}", *where)
        for way, where in ((settings, (mesh_shape,)), ("dense_sgd", ()))
    )
    assert len(plain.after.tables) == (1 if share == "true" else 2)
    assert difference(rows, plain) <= 1e-12
    assert difference(rows, plain, "params") <= 1e-12
    np.testing.assert_allclose(rows.losses, plain.losses, rtol=1e-12)
    # Batches, and the micro-batches they are split into, have unequal numbers of target tokens.
    assert [row["train/target_tokens"] for row in rows.metrics] == [b["loss_mask"].sum() for b in tiny.batches(STEPS)]


def adam(rows, state, gradient, step, optim):
    """Adam for each element, with bias correction by the number of the step."""
    first, second = state.get("first", 0 * rows), state.get("second", 0 * rows)
    first = optim.beta1 * first + (1 - optim.beta1) * gradient
    second = optim.beta2 * second + (1 - optim.beta2) * gradient**2
    scaled = first / (1 - optim.beta1**step) / (np.sqrt(second / (1 - optim.beta2**step)) + optim.eps)
    return rows - optim.lr * scaled, {"first": first, "second": second}


def rowwise_adam(rows, state, gradient, step, optim):
    """One second moment per `state_columns` adjacent columns, initialised by the first non-zero gradient."""
    width = optim.state_columns
    second = state.get("second", np.zeros((rows.shape[0], rows.shape[1] // width))).copy()
    new = rows.copy()
    for row in range(rows.shape[0]):
        for block in range(second.shape[1]):
            columns = slice(block * width, (block + 1) * width)
            square = np.mean(gradient[row, columns] ** 2)
            old = second[row, block]
            second[row, block] = square if old == 0 else optim.beta2 * old + (1 - optim.beta2) * square
            new[row, columns] -= optim.lr * gradient[row, columns] / (np.sqrt(second[row, block]) + optim.eps)
    return new, {"second": second}


@pytest.mark.parametrize(("kind", "rule"), [("adam", adam), ("rowwise_adam", rowwise_adam)])
def test_rows_follow_their_rule_on_the_gradient_of_the_whole_table(tiny, monkeypatch, kind, rule):
    config = tiny.config(
        f"--optim.table.optimizer {kind} --optim.table.lr 0.05 --optim.table.state_columns 64",
        # Enough slots that each step reads only some of them.
        "--model.memory.num_keys 24",
        wide=True,
    )
    program, mesh = tiny.program_of(config), tiny.mesh(1, 1)

    @jax.jit
    def oracle(params, tables, batch):
        """The mean loss of the target tokens, the slots read, and the loss's gradient by plain autodiff."""

        def loss(tables):
            model = program.parts.merge(params, tables)
            hidden, reads, *_ = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
            every = jax.nn.log_softmax(model.logits(hidden))
            picked = jnp.sum(every * jax.nn.one_hot(batch["targets"], tiny.vocab, dtype=every.dtype), axis=-1)
            mask = batch["loss_mask"]
            return -jnp.sum(picked * mask) / mask.sum(), [read.indices for (read,) in reads.values()]

        return jax.value_and_grad(loss, has_aux=True)(tables)

    with jax.set_mesh(mesh):
        step, state = make_train_step(program, mesh), tiny.quick_state(program, mesh)
        expected, moments = tiny.to_numpy(state.tables["shared"]), {}
        untouched = np.ones(len(expected), bool)
        for number, batch in enumerate(tiny.batches(3), start=1):
            with monkeypatch.context() as patch:
                patch.setattr(sharded, "bag", plain_bag)
                (loss, read), gradients = oracle(state.params, state.tables, batch)
            state, metrics = step(state, put_batch(mesh, tiny.micro_batches(batch, 1), MICRO_BATCHES))
            assert abs(metrics["train/loss"] - loss) <= 1e-12 * abs(loss)

            token_mask = batch["segments"].ravel() > 0
            touched = np.unique(np.concatenate([np.ravel(slots[token_mask]) for slots in read]))
            untouched[touched] = False
            gradient = np.asarray(gradients["shared"])
            assert not gradient[np.setdiff1d(np.arange(len(expected)), touched)].any()
            new, new_moments = rule(expected, moments, gradient, number, config.optim.table)
            # Lazy updates: rows that were not read keep their values and moments.
            old = {name: moments.get(name, np.zeros_like(array)) for name, array in new_moments.items()}
            expected[touched] = new[touched]
            for name, array in new_moments.items():
                old[name][touched] = array[touched]
            moments = old

    assert 0 < untouched.sum() < len(expected)
    before, found = tiny.to_numpy(tiny.quick_state(program, mesh).tables["shared"]), np.asarray(state.tables["shared"])
    np.testing.assert_array_equal(found[untouched], before[untouched])
    assert np.linalg.norm(found - expected) <= 1e-12 * np.linalg.norm(expected - before)


def test_every_mesh_draws_the_same_model_and_gives_the_same_losses(tiny):
    """Dense parameters are split over all devices, by default."""
    batches, runs = tiny.batches(4) * 5, {}
    for mesh_shape in ((1, 1), (1, 2), (4, 1), (2, 4)):
        config = tiny.config(
            "--model.num_layers 1 --model.memory.layers 0",
            "--model.memory.value_dim 512 --optim.table.state_columns 64 --optim.table.lr 0.01",
            "--mesh.row_grad_reduce all_gather --mesh.data {} --mesh.memory {}".format(*mesh_shape),
            wide=True,
        )
        runs[mesh_shape] = tiny.train(config, batches, mesh_shape, start=tiny.drawn_state)
        places = {leaf.sharding for leaf in jax.tree.leaves(runs[mesh_shape].live.params) if leaf.ndim >= 2}
        assert mesh_shape == (1, 1) or not any(place.is_fully_replicated for place in places)
    alone = runs.pop((1, 1))
    assert alone.losses[-1] < alone.losses[0] - 0.1, "a model that does not learn proves little"
    for mesh_shape, run in runs.items():
        drawn = zip(jax.tree.leaves(alone.before), jax.tree.leaves(run.before), strict=True)
        assert all(this.tobytes() == other.tobytes() for this, other in drawn), f"{mesh_shape} draws another model"
        worst = np.abs(run.losses - alone.losses).max()
        assert worst <= 1e-7, f"{mesh_shape}: losses differ by {worst}"
        assert difference(run, alone) <= 1e-7
        assert difference(run, alone, "params") <= 1e-7
