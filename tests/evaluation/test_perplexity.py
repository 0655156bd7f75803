"""Scores of texts equal a NumPy loop over log-softmaxes and count every token once."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from drawn import drawn
from memjax.config.data import BiographiesConfig, DataConfig
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.data.dataset import open_dataset
from memjax.data.packing import Batch
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.evaluation import perplexity
from memjax.evaluation.perplexity import TextScore, bits_per_byte, validation_loss
from memjax.models.decoder import Decoder
from memjax.models.parts import split_decoder

TEXTS = ["A short one.", "", "Ünïcödé 字 is longer in bytes than in letters.", "x" * 8, "the quick brown fox " * 4]
LENGTH = 8
TOKENIZER = ByteTokenizer()


forward = nnx.jit(lambda model, tokens: model(tokens))


@functools.cache
def tiny() -> Decoder:
    config = ModelConfig(
        dim=16,
        num_layers=1,
        num_heads=2,
        ffn_dim=32,
        vocab_size=259,
        dtype="float32",
        memory=MemoryConfig(layers=(0,), num_keys=8, num_heads=2, top_k=4, key_dim=8, table_dtype="float32"),
    )
    return drawn(config)


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def by_hand(model: Decoder, texts: list[str], stride: int) -> float:
    """Sums the nats of all tokens, each predicted in the first window that reaches it."""
    nats = 0.0
    for text in texts:
        ids = [1, *(byte + 3 for byte in text.encode())]
        for i in range(1, len(ids)):
            start = 0
            while i > start + LENGTH:
                start += stride
            window = np.zeros((1, LENGTH), np.int32)
            context = ids[start : start + LENGTH]
            window[0, : len(context)] = context
            nats -= log_softmax(forward(model, jnp.asarray(window))[0, i - start - 1])[ids[i]]
    return nats


@pytest.mark.parametrize("stride", [None, 1, 3, LENGTH])
def test_bits_per_byte_equals_a_loop_over_tokens(stride):
    model = tiny()
    score = bits_per_byte(model, TOKENIZER, TEXTS, sequence_length=LENGTH, batch_size=4, stride=stride)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    nats = by_hand(model, TEXTS, LENGTH // 2 if stride is None else stride)
    assert (score.bytes, score.tokens) == (num_bytes, num_bytes)
    np.testing.assert_allclose(score.bits_per_byte, nats / math.log(2) / num_bytes, rtol=1e-5)
    np.testing.assert_allclose(score.loss_per_token, nats / num_bytes, rtol=1e-5)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary():
    model = nnx.clone(tiny())
    assert model.head is not None
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel[...])
    for stride in (1, 2, 3, 5, LENGTH):
        score = bits_per_byte(model, TOKENIZER, TEXTS, sequence_length=LENGTH, batch_size=4, stride=stride)
        np.testing.assert_allclose(score.loss_per_token, math.log(259), rtol=1e-6)


def test_the_size_of_the_batch_changes_nothing():
    model = tiny()
    scores = [bits_per_byte(model, TOKENIZER, TEXTS, sequence_length=LENGTH, batch_size=size) for size in (4, 64)]
    np.testing.assert_allclose(*(score.bits_per_byte for score in scores), rtol=1e-6)


def test_a_text_alone_is_one_document():
    score = functools.partial(bits_per_byte, tiny(), TOKENIZER, sequence_length=LENGTH)
    assert score(TEXTS[0]) == score(TEXTS[:1])


def test_max_bytes_cuts_between_characters():
    def score(texts: list[str], limit: int | None) -> TextScore:
        return bits_per_byte(tiny(), TOKENIZER, texts, sequence_length=LENGTH, batch_size=4, max_bytes=limit)

    assert score(["ab", "éé", "cd"], 5) == score(["ab", "é"], None)
    assert score(["ab", "éé", "cd"], 6) == score(["ab", "éé"], None)
    assert score(["ab", "cd"], 100).bytes == 4


def test_nothing_to_score_and_gaps_are_refused(as_users_call):
    with pytest.raises(ValueError, match="no text to score"):
        bits_per_byte(tiny(), TOKENIZER, ["", ""], sequence_length=LENGTH)
    for stride in (0, LENGTH + 1):
        with pytest.raises(ValueError, match=f"stride={stride} must be in"):
            bits_per_byte(tiny(), TOKENIZER, TEXTS, sequence_length=LENGTH, stride=stride)
    stride: Any = 2.5
    with pytest.raises(ValueError, match=r"stride=2\.5 must be a whole number"):
        bits_per_byte(tiny(), TOKENIZER, TEXTS, sequence_length=LENGTH, stride=stride)
    for name, value in (("batch_size", 0), ("max_bytes", -1)):
        with pytest.raises(ValueError, match=f"{name}={value} must be positive"):
            bits_per_byte(tiny(), TOKENIZER, TEXTS, sequence_length=LENGTH, **{name: value})


def batches(packing: Literal["none", "first_fit"] = "none") -> list[Batch]:
    data = DataConfig(
        sequence_length=96, batch_size=8, packing=packing, biographies=BiographiesConfig(num_people=6, seed=1)
    )
    return list(open_dataset(data, TOKENIZER).validation_batches(3))


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["nested"]])
def test_anything_but_text_is_refused(as_users_call, text):
    with pytest.raises(TypeError, match=f"a document must be a string, found {type(text).__name__}"):
        bits_per_byte(tiny(), TOKENIZER, ["a text", text], sequence_length=LENGTH)


def test_max_bytes_that_hold_no_character_are_named():
    with pytest.raises(ValueError, match="or its first character is longer than max_bytes=2"):
        bits_per_byte(tiny(), TOKENIZER, ["字"], sequence_length=LENGTH, max_bytes=2)


def test_validation_loss_is_the_mean_over_learned_tokens():
    model, nats, count = tiny(), 0.0, 0
    for batch in batches():
        logs = log_softmax(forward(model, jnp.asarray(batch["tokens"])))
        for row, place in np.argwhere(batch["loss_mask"] > 0):
            nats -= logs[row, place, batch["targets"][row, place]]
            count += 1
    np.testing.assert_allclose(validation_loss(model, batches()), nats / count, rtol=1e-5)


def test_packing_does_not_change_the_validation_loss():
    np.testing.assert_allclose(
        validation_loss(tiny(), batches("first_fit")), validation_loss(tiny(), batches()), rtol=1e-5
    )


def num_compiled(function) -> int:
    return function._cache_size()


def test_validation_compiles_once_and_runs_on_a_mesh(mesh):
    parts, params, tables = split_decoder(tiny())
    alone = validation_loss(parts.merge(params, tables), batches())
    compiled = num_compiled(perplexity._batch_loss)
    assert validation_loss(parts.merge(params, tables), batches()) == alone
    assert num_compiled(perplexity._batch_loss) == compiled
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "memory"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params, tables = jax.device_put(params, whole), jax.device_put(tables, columns)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(validation_loss(parts.merge(params, tables), batches()), alone, rtol=1e-5)


def test_zero_batches_have_no_loss():
    assert math.isnan(validation_loss(tiny(), []))


@pytest.mark.parametrize("name", ["tokens", "targets"])
def test_validation_data_of_another_tokenizer_are_refused(name):
    batch = batches()[0]
    ids = np.array(batch[name])
    ids[-1, -1] = 259
    with pytest.raises(ValueError, match=rf"the {name} of a batch hold 259; the model knows 0\.\.258"):
        validation_loss(tiny(), [batch | {name: ids}])
