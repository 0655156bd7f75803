"""A decoder drawn in loops is the decoder that draws itself."""

import jax
import numpy as np
from flax import nnx

from memjax.config import MemoryConfig, ModelConfig
from memjax.memory.table import TableRows
from memjax.models.decoder import Decoder
from memjax.models.drawing import draw_decoder

MEMORY = MemoryConfig(layers=(1, 3, 4), num_keys=4, num_heads=2, top_k=2, key_dim=8)
CONFIG = ModelConfig(dim=16, num_layers=6, num_heads=2, ffn_dim=24, vocab_size=259, memory=MEMORY)


def by_itself(key):
    _, tables, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(key)), TableRows, nnx.Param)
    return params, tables


def test_numbers_are_those_that_the_decoder_draws_itself():
    key = jax.random.key(3)
    got, expected = jax.jit(lambda key: draw_decoder(CONFIG, key))(key), jax.jit(by_itself)(key)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    kernels = [np.asarray(got[0]["blocks"][layer]["attention"]["key"]["kernel"][...]) for layer in range(6)]
    assert all((this != other).any() for number, this in enumerate(kernels) for other in kernels[:number])


def test_a_kind_of_block_is_compiled_once_however_many_there_are():
    def loops(config):
        compiled = jax.jit(lambda key: draw_decoder(config, key)).lower(jax.random.key(0)).compile()
        return str(compiled.as_text()).count(" while(")

    more = ModelConfig(dim=16, num_layers=12, num_heads=2, ffn_dim=24, vocab_size=259, memory=MEMORY)
    assert 0 < loops(CONFIG) == loops(more)
