import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops import dispatch
from memjax.ops.embedding_bag.api import embedding_bag
from memjax.ops.embedding_dot.api import embedding_dot
from memjax.ops.grouped_matmul.api import grouped_matmul
from memjax.ops.product_key_search.api import product_key_search
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.api import row_update
from memjax.ops.row_update.rules import RowRule, row_step

TABLE, INDICES, WEIGHTS, VECTORS = jnp.ones((4, 2)), jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1)), jnp.ones((3, 2))
CALLS = {
    "embedding_bag": lambda name: embedding_bag(TABLE, INDICES, WEIGHTS, implementation=name),
    "embedding_dot": lambda name: embedding_dot(TABLE, INDICES, VECTORS, implementation=name),
    "product_key_search": lambda name: product_key_search(
        jnp.ones((3, 1, 4)), jnp.ones((1, 2, 4, 2)), 2, implementation=name
    ),
    "row_update": lambda name: row_update(
        TABLE, {}, [RowGradient(INDICES, WEIGHTS, VECTORS)], RowRule(kind="sgd"), row_step(1.0, 0), implementation=name
    ),
    "grouped_matmul": lambda name: grouped_matmul(
        jnp.ones((3, 2)), jnp.ones((2, 2, 4)), jnp.asarray([1, 2], jnp.int32), implementation=name
    ),
}
every_operation = pytest.mark.parametrize("operation", CALLS)


@every_operation
def test_unknown_implementation_is_refused_with_the_known_ones(operation):
    with pytest.raises(ValueError, match=rf"^{operation}: implementation='cuda' is unknown; known: .*xla, reference"):
        CALLS[operation]("cuda")


@every_operation
def test_named_implementation_that_cannot_run_is_refused_with_the_reason(operation, monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda *_: "needs a device that is not here")
    with pytest.raises(
        NotImplementedError, match=f"^{operation}: implementation='reference' cannot run: needs a device"
    ):
        CALLS[operation]("reference")


def test_triton_without_a_gpu_is_refused_with_the_reason(monkeypatch):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="implementation='triton' cannot run: needs an NVIDIA GPU, found cpu"):
        CALLS["embedding_bag"]("triton")
    assert dispatch.choose("embedding_bag", None) == "xla"


@every_operation
def test_default_is_the_fastest_that_can_run(operation):
    assert dispatch.choose(operation, None) == ("triton" if jax.default_backend() == "gpu" else "xla")
    assert dispatch.choose(operation, None, jnp.float64) == "xla"
    got, expected = (jax.tree.leaves(CALLS[operation](name))[0] for name in (None, "reference"))
    np.testing.assert_allclose(got, expected)


@every_operation
@pytest.mark.parametrize("name", dispatch.IMPLEMENTATIONS)
def test_every_operation_has_every_implementation(operation, name):
    if name == "triton":
        pytest.importorskip("triton")
    assert callable(getattr(dispatch.load(operation, name), operation))
