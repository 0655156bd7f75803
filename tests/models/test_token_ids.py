import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.models.token_ids import check_ids, check_vocabulary

IDS = {
    "a list": lambda ids: ids,
    "an array of NumPy": np.array,
    "narrow integers": lambda ids: np.array(ids, np.int16),
    "an array of JAX": jnp.array,
}


@pytest.mark.parametrize("as_given", IDS.values(), ids=IDS)
def test_ids_without_an_embedding_are_refused_by_value(as_given):
    check_ids(as_given([0, 3, 258]), 259, "ids")
    for wrong, way_out in ((-1, "mask padding and use id 0"), (259, "use the tokenizer"), (300, "use the tokenizer")):
        with pytest.raises(ValueError, match=rf"ids hold {wrong}; the model knows 0\.\.258: {way_out}"):
            check_ids(as_given([5, wrong, 7]), 259, "ids")


def test_zero_ids_and_traced_ids_pass():
    check_ids([], 259, "ids")
    check_ids(np.zeros((0, 4), np.int32), 259, "ids")
    jax.eval_shape(lambda ids: check_ids(ids, 259, "ids"), jax.ShapeDtypeStruct((3,), jnp.int32))


def test_a_tokenizer_has_no_more_tokens_than_the_model():
    for tokens in (31_999, 32_000):
        check_vocabulary(tokens, 32_000)
    with pytest.raises(ValueError, match=r"the tokenizer has 32,001 tokens, the model 32,000: use the tokenizer"):
        check_vocabulary(32_001, 32_000)
