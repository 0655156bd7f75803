import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.models.token_ids import check_ids

IDS = {
    "a list": lambda ids: ids,
    "an array of NumPy": np.array,
    "narrow integers": lambda ids: np.array(ids, np.int16),
    "an array of JAX": jnp.array,
}


@pytest.mark.parametrize("as_given", IDS.values(), ids=IDS)
def test_ids_without_an_embedding_are_refused_by_value(as_given):
    check_ids(as_given([0, 3, 258]), 259, "ids")
    for wrong in (-1, 259, 300):
        with pytest.raises(ValueError, match=rf"ids hold {wrong}; the model knows 0\.\.258: take the tokenizer"):
            check_ids(as_given([5, wrong, 7]), 259, "ids")


def test_no_ids_and_traced_ones_pass():
    check_ids([], 259, "ids")
    check_ids(np.zeros((0, 4), np.int32), 259, "ids")
    jax.eval_shape(lambda ids: check_ids(ids, 259, "ids"), jax.ShapeDtypeStruct((3,), jnp.int32))
