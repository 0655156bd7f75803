"""A small model that the tests of questions and tasks ask, and a computation that shares nothing with the library's."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.config.data import DataConfig
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts
from memjax.runs.load import LoadedModel


@dataclasses.dataclass
class ByHand:
    """Log-probabilities from whole forward passes, without a cache, a batch or padding in front."""

    logits: Callable[[Sequence[int]], np.ndarray]

    def score(self, context: Sequence[int], continuation: Sequence[int], max_length: int) -> tuple[float, bool]:
        """Token after token, each from the last tokens before it that its window may hold."""
        ids = [*context, *continuation]
        nats, is_greedy = 0.0, True
        for start in range(len(context), len(ids), max_length):
            stop = min(start + max_length, len(ids))
            window = ids[max(0, stop - 1 - max_length) : stop]
            logits = self.logits(window[:-1]).astype(np.float64)
            for place in range(start - stop, 0):
                row = logits[place]
                nats += row[window[place]] - row.max() - np.log(np.exp(row - row.max()).sum())
                is_greedy &= row.argmax() == window[place]
        return nats, bool(is_greedy)

    def write(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest token, and again, until the end of text."""
        ids = list(prompt)
        for _ in range(count):
            token = int(self.logits(ids)[-1].argmax())
            if token == ByteTokenizer().eos_id:
                break
            ids.append(token)
        return ids[len(prompt) :]


@pytest.fixture(scope="session")
def model() -> Decoder:
    config = ModelConfig(
        dim=16,
        num_layers=1,
        num_heads=2,
        ffn_dim=32,
        vocab_size=259,
        dtype="float32",
        memory=MemoryConfig(layers=(0,), num_keys=8, num_heads=2, top_k=4, key_dim=8),
    )
    parts, rng = DecoderParts.of(config), np.random.default_rng(1)
    # Drawn by NumPy: compiling the initialisation would take longer than all that is tested.
    fill = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype))
    return parts.assemble(fill(parts.abstract_params), fill(parts.abstract_tables))


@pytest.fixture(scope="session")
def by_hand(model) -> ByHand:
    forward = nnx.jit(lambda model, tokens: model(tokens))

    def logits(tokens: Sequence[int]) -> np.ndarray:
        # Tokens see nothing behind them, so what is there changes nothing, and one program will do.
        padded = np.full((1, 64), 7, np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(model, jnp.asarray(padded)))[0, : len(tokens)]

    return ByHand(logits)


@pytest.fixture
def found(model) -> LoadedModel:
    """The model as `memjax.load` gives it."""
    config = RunConfig(model=model.config, data=DataConfig(sequence_length=32))
    return LoadedModel(model, ByteTokenizer(), config, 0)
