"""The row update as Triton kernels: one sort of the picks, then one pass over (distinct row, block of columns).

After the sort the picks of a row are neighbours: a segment. `update_kernel` sums the picks of a few segments side by
side in registers, applies the rule and writes the rows back in place. A segment of more than CHUNK picks would keep
one program busy while the others are done, so `partial_kernel` has summed it before, in pieces of at most CHUNK
picks. Sums are always formed in the same order and without atomics: two runs give the same bits.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float

from memjax.ops import tiles, triton_call
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import RowRule, RowStep, TableState
from memjax.ops.row_update.segments import sorted_picks

CHUNK = 128
"""Picks of a row that one program sums by itself."""

UNSHARED_COLUMNS = 256
"""Columns of a program where no columns share a state (sgd, adam)."""


@triton.jit
def mix(value):
    """The hash of `rounding.mix`."""
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def partial_kernel(
    segment_ptr,
    starts_ptr,
    tokens_ptr,
    weights_ptr,
    vectors_ptr,
    partial_ptr,
    NUM_PICKS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sum of the picks of a long segment inside one chunk of the sorted picks.

    At most two long segments meet in a chunk: the one of its first pick (side 0) and the one of its last (side 1).
    """
    chunk, side = tl.program_id(0) // 2, tl.program_id(0) % 2
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, NUM_PICKS) - 1
    segment = tl.load(segment_ptr + tl.where(side == 0, first, last))
    begin, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
    wanted = (end - begin > CHUNK) & ((side == 0) | (begin > first))
    if wanted:
        inner = tl.arange(0, COLUMNS)
        inside = inner < WIDTH
        columns = tl.program_id(1) * WIDTH + inner
        inside = inside & (columns < DIM)
        begin, end = tl.maximum(begin, first), tl.minimum(end, last + 1)
        total = tl.zeros((COLUMNS,), tl.float32)
        # `while`, because Triton's interpreter cannot take the bounds of a range from memory.
        while begin < end:
            pick = begin + tl.arange(0, ROWS)
            valid = pick < end
            token = tl.load(tokens_ptr + pick, mask=valid, other=0).to(tl.int64)
            weight = tl.load(weights_ptr + pick, mask=valid, other=0.0).to(tl.float32)
            vector = tl.load(
                vectors_ptr + token[:, None] * DIM + columns[None, :], mask=valid[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            total += tl.sum(weight[:, None] * vector, axis=0)
            begin += ROWS
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * DIM + columns, total, mask=inside)


@triton.jit
def update_kernel(
    table_in_ptr,
    first_in_ptr,
    second_in_ptr,
    rows_ptr,
    starts_ptr,
    tokens_ptr,
    weights_ptr,
    vectors_ptr,
    partial_ptr,
    floats_ptr,
    ints_ptr,
    table_ptr,
    first_ptr,
    second_ptr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    CHUNK: tl.constexpr,
    KIND: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    ROUND: tl.constexpr,
):
    """New rows and state of ROWS segments, over WIDTH columns. Table and state are updated in place."""
    blocks: tl.constexpr = (DIM + WIDTH - 1) // WIDTH
    # Programs of the same segments run side by side: their rows lie in the same pages.
    number, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    distinct = tl.load(ints_ptr + 4)
    ok = tl.load(ints_ptr + 1) != 0
    if ok & (number * ROWS < distinct):
        segment = number * ROWS + tl.arange(0, ROWS)
        exists = segment < distinct
        begin = tl.load(starts_ptr + segment, mask=exists, other=0)
        count = tl.load(starts_ptr + segment + 1, mask=exists, other=0) - begin
        row = tl.load(rows_ptr + begin, mask=exists, other=0).to(tl.int64)
        inner = tl.arange(0, COLUMNS)
        columns = block * WIDTH + inner
        inside = (inner < WIDTH) & (columns < DIM)
        mask = exists[:, None] & inside[None, :]
        place = row[:, None] * DIM + columns[None, :]
        gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
        short = tl.where(count <= CHUNK, count, 0)
        longest = tl.max(short, axis=0)
        nth = 0
        while nth < longest:
            # Two picks of every row in flight.
            one, two = nth < short, nth + 1 < short
            token_one = tl.load(tokens_ptr + begin + nth, mask=one, other=0).to(tl.int64)
            token_two = tl.load(tokens_ptr + begin + nth + 1, mask=two, other=0).to(tl.int64)
            weight_one = tl.load(weights_ptr + begin + nth, mask=one, other=0.0).to(tl.float32)
            weight_two = tl.load(weights_ptr + begin + nth + 1, mask=two, other=0.0).to(tl.float32)
            vector_one = tl.load(
                vectors_ptr + token_one[:, None] * DIM + columns[None, :],
                mask=one[:, None] & inside[None, :],
                other=0.0,
            )
            vector_two = tl.load(
                vectors_ptr + token_two[:, None] * DIM + columns[None, :],
                mask=two[:, None] & inside[None, :],
                other=0.0,
            )
            gradient += weight_one[:, None] * vector_one.to(tl.float32)
            gradient += weight_two[:, None] * vector_two.to(tl.float32)
            nth += 2

        if tl.max(count, axis=0) > CHUNK:
            for member in range(0, ROWS):
                chosen = tl.arange(0, ROWS) == member
                member_begin = tl.sum(tl.where(chosen, begin, 0), axis=0)
                member_count = tl.sum(tl.where(chosen, count, 0), axis=0)
                if member_count > CHUNK:
                    total = tl.zeros((COLUMNS,), tl.float32)
                    last_chunk = (member_begin + member_count - 1) // CHUNK
                    start = member_begin // CHUNK
                    while start <= last_chunk:
                        chunk = start + tl.arange(0, PIECES)
                        piece = (2 * chunk + tl.where(member_begin > chunk * CHUNK, 1, 0)).to(tl.int64)
                        values = tl.load(
                            partial_ptr + piece[:, None] * DIM + columns[None, :],
                            mask=(chunk <= last_chunk)[:, None] & inside[None, :],
                            other=0.0,
                        )
                        total += tl.sum(values, axis=0)
                        start += PIECES
                    gradient += tl.where(chosen[:, None], total[None, :], 0.0)

        # Only now: held over the sums, the old rows would take registers from the loads in flight.
        old = tl.load(table_ptr + place, mask=mask, other=0.0).to(tl.float32)
        lr = tl.load(floats_ptr)
        if KIND == "sgd":
            new = old - lr * gradient
        elif KIND == "adam":
            first = tl.load(first_ptr + place, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(second_ptr + place, mask=mask, other=0.0).to(tl.float32)
            first = BETA1 * first + (1 - BETA1) * gradient
            second = BETA2 * second + (1 - BETA2) * gradient * gradient
            corrected = tl.sqrt(second / tl.load(floats_ptr + 2))
            new = old - lr * first / tl.load(floats_ptr + 1) / (corrected + EPS)
            tl.store(first_ptr + place, first.to(first_ptr.dtype.element_ty), mask=mask)
            tl.store(second_ptr + place, second.to(second_ptr.dtype.element_ty), mask=mask)
        else:
            state = second_ptr + row * blocks + block
            before = tl.load(state, mask=exists, other=0.0)
            square = tl.sum(gradient * gradient, axis=1) / WIDTH
            if KIND == "rowwise_adagrad":
                second = before + square
            else:
                second = tl.where(before == 0, square, BETA2 * before + (1 - BETA2) * square)
            new = old - (lr / (tl.sqrt(second) + EPS))[:, None] * gradient
            tl.store(state, second, mask=exists)

        if ROUND:
            seed = tl.load(ints_ptr + 2).to(tl.uint32, bitcast=True)
            step = tl.load(ints_ptr).to(tl.uint32, bitcast=True)
            by_row = mix(mix(mix(seed) ^ step) ^ row.to(tl.uint32))
            column = (tl.load(ints_ptr + 3) + columns).to(tl.uint32)
            words = mix(by_row[:, None] ^ (column >> 1)[None, :])
            random = tl.where((column & 1)[None, :] == 1, words >> 16, words & 0xFFFF)
            bits = new.to(tl.uint32, bitcast=True)
            finite = (bits & 0x7F800000) != 0x7F800000
            bits = tl.where(finite, (bits + random) & 0xFFFF0000, bits)
            new = bits.to(tl.float32, bitcast=True)
        tl.store(table_ptr + place, new.to(table_ptr.dtype.element_ty), mask=mask)


def row_update(
    table: Float[Array, "n d"], state: TableState, gradients: Sequence[RowGradient], rule: RowRule, step: RowStep
) -> tuple[Float[Array, "n d"], TableState]:
    """The reference's update, in place where the table and the state are donated."""
    dim = table.shape[1]
    width = rule.state_columns if rule.kind.startswith("rowwise_") else min(UNSHARED_COLUMNS, dim)
    tile = tiles.row_update(width)
    blocks = tiles.ceil_div(dim, width)
    rows, tokens, weights = sorted_picks(gradients)
    vectors = jnp.concatenate([gradient.vectors for gradient in gradients])
    picks = rows.shape[0]

    begins = jnp.concatenate([jnp.ones(1, bool), rows[1:] != rows[:-1]])
    segment = jnp.cumsum(begins.astype(jnp.int32)) - 1
    # Segments that do not exist are empty, at the end.
    starts = jnp.full(picks + 1, picks, jnp.int32)
    starts = starts.at[jnp.where(begins, segment, picks + 1)].set(jnp.arange(picks, dtype=jnp.int32), mode="drop")

    shared: dict[str, Any] = {"DIM": dim, "WIDTH": width, "COLUMNS": tile.columns, "CHUNK": CHUNK}
    chunks = tiles.ceil_div(picks, CHUNK)
    (partial,) = triton_call.launch(
        partial_kernel,
        segment,
        starts,
        tokens,
        weights,
        vectors,
        out=[jax.ShapeDtypeStruct((2 * chunks, dim), jnp.float32)],
        grid=(2 * chunks, blocks),
        num_warps=1,
        NUM_PICKS=picks,
        ROWS=16,
        **shared,
    )

    count = (step.step + 1).astype(jnp.float32)
    floats = jnp.stack([step.lr.astype(jnp.float32), 1 - rule.beta1**count, 1 - rule.beta2**count])
    seed = jax.lax.bitcast_convert_type(step.seed, jnp.int32)
    ints = jnp.stack([step.step, step.ok.astype(jnp.int32), seed, step.first_column, segment[-1] + 1])
    nothing = jnp.zeros(1, jnp.float32)
    moments = [state.get(name, nothing) for name in ("first_moment", "second_moment")]
    updated = triton_call.launch(
        update_kernel,
        table,
        *moments,
        rows,
        starts,
        tokens,
        weights,
        vectors,
        partial,
        floats,
        ints,
        out=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (table, *moments)],
        grid=(tiles.ceil_div(min(picks, table.shape[0]), tile.rows) * blocks,),
        num_warps=tile.num_warps,
        aliases={0: 0, 1: 1, 2: 2},
        ROWS=tile.rows,
        PIECES=16,
        KIND=rule.kind,
        BETA1=rule.beta1,
        BETA2=rule.beta2,
        EPS=rule.eps,
        ROUND=rule.stochastic_rounding and table.dtype == jnp.bfloat16,
        **shared,
    )
    table, *moments = updated
    named: TableState = dict(zip(("first_moment", "second_moment"), moments, strict=True))
    return table, {name: named[name] for name in state}
