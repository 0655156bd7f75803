"""Stochastic rounding to bfloat16 with random bits that depend on nothing but seed, step, row and column.

The same element gets the same bits on every mesh, replica and implementation, so copies of a table stay bit-equal.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


def mix(value: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijective hash of 32 bits (two rounds of xor-shift and multiply), good enough to decide roundings."""
    value = (value ^ (value >> 16)) * jnp.uint32(0x7FEB352D)
    value = (value ^ (value >> 15)) * jnp.uint32(0x846CA68B)
    return value ^ (value >> 16)


def random_bits(
    seed: UInt32[Array, ""], step: Int[Array, ""], rows: Int[Array, " u"], columns: Int[Array, " d"]
) -> UInt32[Array, "u d"]:
    """16 random bits for each element of the given rows and columns of the whole table.

    The columns 2 i and 2 i + 1 share one hash, of which the even one takes the low half: hashes are the cost of
    rounding.
    """
    start = mix(mix(seed) ^ step.astype(jnp.uint32))
    by_row = mix(start ^ rows.astype(jnp.uint32))
    columns = columns.astype(jnp.uint32)[None, :]
    words = mix(by_row[:, None] ^ (columns >> 1))
    return jnp.where(columns & 1, words >> 16, words & jnp.uint32(0xFFFF))


def round_stochastically(values: Float[Array, "u d"], bits: UInt32[Array, "u d"]) -> Float[Array, "u d"]:
    """Rounds float32 values to bfloat16 by 16 random bits, so that the expected result is the value itself."""
    words = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    rounded = (words + bits) & jnp.uint32(0xFFFF0000)
    # Adding to the bits of a NaN could turn it into a number; infinity has zeros there, so nothing carries.
    words = jnp.where(jnp.isnan(values), words, rounded)
    return jax.lax.bitcast_convert_type(words, jnp.float32).astype(jnp.bfloat16)


def round_to(
    values: Float[Array, "u d"], dtype, stochastic: bool, seed, step, rows: Int[Array, " u"], columns: Int[Array, " d"]
) -> Float[Array, "u d"]:
    """Values in the table's type; only bfloat16 is rounded stochastically."""
    if stochastic and dtype == jnp.bfloat16:
        return round_stochastically(values, random_bits(seed, step, rows, columns))
    return values.astype(dtype)
