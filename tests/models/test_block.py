"""The names of a block's parts in a profile."""

import jax
import jax.numpy as jnp

from memjax.models.parts import DecoderParts


def test_operations_of_a_block_carry_its_name_and_that_of_their_part(tiny_config):
    parts = DecoderParts.of(tiny_config().model)

    def loss(params, tables, tokens):
        return jnp.sum(parts.merge(params, tables).hidden(tokens).states)

    shapes = parts.abstract_params, parts.abstract_tables, jax.ShapeDtypeStruct((2, 8), jnp.int32)
    lowered = jax.jit(jax.grad(loss)).lower(*shapes).as_text(debug_info=True)
    for layer in ("L0", "L1"):
        for part in ("attention", "memory"):
            assert (
                f"jvp({layer})/{part}/" in lowered or f"jvp({layer}/{part})" in lowered or f"{layer}/{part}" in lowered
            )
