"""The row update as Triton kernels: one sort of the picks, then one pass over them that updates the rows in place.

After the sort, the picks of a row are adjacent: a segment. A program walks through a chunk of picks, over one block of
columns; where a segment ends, it applies the rule to its sum and writes the row. Every chunk is the same amount of
work, however often its rows were picked. A segment that crosses the border of a chunk leaves a partial sum in each of
its chunks; the partial sums are the picks of the next, much shorter round, until one chunk holds them all. Sums are
always formed in the same order and without atomics, so two runs give the same bits.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Bool, Float, Int

from memjax.ops import triton_call
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update import tiles
from memjax.ops.row_update.rules import RowRule, RowStep, TableState
from memjax.ops.row_update.segments import sorted_picks
from memjax.ops.tiles import ceil_div

CHUNK = 128
"""Picks per program; a multiple of the tile's rows."""

UNSHARED_COLUMNS = 256
"""Columns per program if no columns share a state (sgd, adam)."""


@triton.jit
def mix(value):
    """The hash of `rounding.mix`."""
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def round_up_or_down(values, hashed_row, first_column, COLUMNS: tl.constexpr, IN_PAIRS: tl.constexpr):
    """`rounding.round_stochastically` by the bits of `rounding.random_bits`: float32 with the low half cleared."""
    inner = tl.arange(0, COLUMNS)
    if IN_PAIRS:
        # first_column is even. Written so that the compiler sees which neighbours in a thread share a hash.
        words, odd = mix(hashed_row ^ ((first_column >> 1) + (inner >> 1)).to(tl.uint32)), inner & 1
    else:
        column = first_column + inner
        words, odd = mix(hashed_row ^ (column >> 1).to(tl.uint32)), column & 1
    random = tl.where(odd == 1, words >> 16, words & 0xFFFF)
    bits = (values.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    # Adding to the bits of a NaN could turn it into a number; infinity has zeros there, so nothing carries.
    return tl.where(values == values, bits.to(tl.float32, bitcast=True), values)


@triton.jit
def store_halves(halves_ptr, values, mask, DIM: tl.constexpr):
    """Stores float32 values as high and low halves: being 16 bits wide like the table, they keep its layout."""
    bits = values.to(tl.uint32, bitcast=True)
    tl.store(halves_ptr, (bits >> 16).to(tl.uint16), mask=mask)
    tl.store(halves_ptr + DIM, bits.to(tl.uint16), mask=mask)


@triton.jit
def load_halves(halves_ptr, mask, DIM: tl.constexpr):
    """Inverse of `store_halves`."""
    high, low = tl.load(halves_ptr, mask=mask, other=0), tl.load(halves_ptr + DIM, mask=mask, other=0)
    return ((high.to(tl.uint32) << 16) | low.to(tl.uint32)).to(tl.float32, bitcast=True)


@triton.jit
def updated(
    old, old_second, gradient, lr, floats_ptr, first_ptr, second_ptr, place, second_place, inside, WIDTH: tl.constexpr,
    KIND: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """`RowRule.apply` for WIDTH columns of a row: returns them, and writes their state.

    Adam has a second moment for each column, at `place`. Other rules have one for all columns: it was read before, and
    is written to second_place.
    """
    if KIND == "sgd":
        new = old - lr * gradient
    elif KIND == "adam":
        first = tl.load(first_ptr + place, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(second_ptr + place, mask=inside, other=0.0).to(tl.float32)
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient * gradient
        corrected = tl.sqrt(second / tl.load(floats_ptr + 2))
        new = old - lr * first / tl.load(floats_ptr + 1) / (corrected + EPS)
        tl.store(first_ptr + place, first.to(first_ptr.dtype.element_ty), mask=inside)
        tl.store(second_ptr + place, second.to(second_ptr.dtype.element_ty), mask=inside)
    else:
        square = tl.sum(gradient * gradient, axis=0) / WIDTH
        second = old_second
        if KIND == "rowwise_adam":
            second = tl.where(second == 0, square, BETA2 * second + (1 - BETA2) * square)
        else:
            second = second + square
        new = old
        if KIND != "rowwise_norm":
            new = old - lr / (tl.sqrt(second) + EPS) * gradient
        tl.store(second_ptr + second_place, second)
    return new


@triton.jit
def update_kernel(
    table_in_ptr,
    first_in_ptr,
    second_in_ptr,
    rows_ptr,
    sources_ptr,
    weights_ptr,
    vectors_ptr,
    floats_ptr,
    ints_ptr,
    table_ptr,
    first_ptr,
    second_ptr,
    partial_ptr,
    NUM_PICKS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    PARTIAL: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    ROUND: tl.constexpr,
    IN_PAIRS: tl.constexpr,
):
    """Sums CHUNK sorted picks by row and updates the rows in place, over WIDTH columns.

    Rows from NUM_ROWS on, such as those of padding, are left alone.
    With PARTIAL, the picks are the previous round's partial sums, and those of weight zero do not exist.
    """
    blocks: tl.constexpr = (DIM + WIDTH - 1) // WIDTH
    # Programs with the same picks run side by side, because their rows lie in the same pages.
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    inner = tl.arange(0, COLUMNS)
    columns = block * WIDTH + inner
    num_columns = tl.minimum(DIM - block * WIDTH, WIDTH)
    inside = inner < num_columns
    nth, end = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, NUM_PICKS)
    partial_ptr += 4 * chunk.to(tl.int64) * DIM + columns
    if tl.load(ints_ptr + 1) != 0:
        lr = tl.load(floats_ptr)
        seed, step = tl.load(ints_ptr + 2), tl.load(ints_ptr)
        hashed_step = mix(mix(seed.to(tl.uint32, bitcast=True)) ^ step.to(tl.uint32, bitcast=True))
        first_column = tl.load(ints_ptr + 3) + block * WIDTH
        total = tl.zeros((COLUMNS,), tl.float32)
        row = tl.load(rows_ptr + nth)
        # Which of the chunk's partial sums: 0 while the open segment began before this chunk, else 1.
        side = tl.where((nth > 0) & (tl.load(rows_ptr + tl.maximum(nth - 1, 0)) == row), 0, 1)
        picked = 0
        while nth < end:
            # All loads for STRIDE picks are issued before any is waited for.
            rows, weights, vectors, olds, old_seconds = (row,), (), (), (), ()
            for ahead in tl.static_range(STRIDE):
                pick = nth + ahead
                exists = pick < NUM_PICKS
                weight = tl.load(weights_ptr + pick, mask=exists, other=0.0).to(tl.float32)
                if PARTIAL:
                    source, exists = pick.to(tl.int64), weight != 0
                else:
                    source = tl.load(sources_ptr + pick, mask=exists, other=0).to(tl.int64)
                mask = inner < tl.where(exists, num_columns, 0)
                if PARTIAL:
                    vector = load_halves(vectors_ptr + source * 2 * DIM + columns, mask, DIM)
                else:
                    vector = tl.load(vectors_ptr + source * DIM + columns, mask=mask, other=0.0)
                next_row = tl.load(rows_ptr + pick + 1, mask=pick + 1 < NUM_PICKS, other=-1)
                # Compared as unsigned, so that -1, after the last pick, is not a row either.
                last = (next_row != row) & (row.to(tl.uint32, bitcast=True) < NUM_ROWS)
                place = row.to(tl.int64) * DIM + columns
                mask = inner < tl.where(last, num_columns, 0)
                old = tl.load(table_ptr + place, mask=mask, other=0.0)
                old_second = 0.0
                if KIND != "sgd" and KIND != "adam":
                    old_second = tl.load(second_ptr + row.to(tl.int64) * blocks + block, mask=last, other=0.0)
                row = next_row
                rows, weights, vectors = rows + (row,), weights + (weight,), vectors + (vector,)
                olds, old_seconds = olds + (old,), old_seconds + (old_second,)

            for ahead in tl.static_range(STRIDE):
                total += weights[ahead] * vectors[ahead].to(tl.float32)
                if PARTIAL:
                    picked += (weights[ahead] != 0).to(tl.int32)
                else:
                    picked = 1
                if (rows[ahead] != rows[ahead + 1]) & (rows[ahead].to(tl.uint32, bitcast=True) < NUM_ROWS):
                    if side == 0:
                        store_halves(partial_ptr, total, inside, DIM)
                    elif picked > 0:
                        place = rows[ahead].to(tl.int64) * DIM + columns
                        second_place = rows[ahead].to(tl.int64) * blocks + block
                        new = updated(
                            olds[ahead].to(tl.float32), old_seconds[ahead], total, lr, floats_ptr, first_ptr,
                            second_ptr, place, second_place, inside, WIDTH, KIND, BETA1, BETA2, EPS,
                        )  # fmt: skip
                        if ROUND:
                            hashed_row = mix(hashed_step ^ rows[ahead].to(tl.uint32))
                            new = round_up_or_down(new, hashed_row, first_column, COLUMNS, IN_PAIRS)
                        if KIND != "rowwise_norm":
                            tl.store(table_ptr + place, new.to(table_ptr.dtype.element_ty), mask=inside)
                    total = tl.zeros((COLUMNS,), tl.float32)
                    side = 1
                    picked = 0
            nth += STRIDE
        if (end < NUM_PICKS) & (tl.load(rows_ptr + end - 1) == tl.load(rows_ptr + tl.minimum(end, NUM_PICKS - 1))):
            store_halves(partial_ptr + side * 2 * DIM, total, inside, DIM)


def row_update(
    table: Float[Array, "n d"],
    state: TableState,
    gradients: Sequence[RowGradient],
    rule: RowRule,
    step: RowStep,
    *,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "n d"], TableState]:
    """The reference's update, in place if table and state are donated; a program sums `chunk` picks."""
    dim = table.shape[1]
    width = rule.state_columns if rule.kind.startswith("rowwise_") else min(UNSHARED_COLUMNS, dim)
    tile = tiles.row_update(width)
    blocks = ceil_div(dim, width)

    count = (step.step + 1).astype(jnp.float32)
    floats = jnp.stack([step.lr.astype(jnp.float32), 1 - rule.beta1**count, 1 - rule.beta2**count])
    seed = jax.lax.bitcast_convert_type(step.seed, jnp.int32)
    ints = jnp.stack([step.step, step.ok.astype(jnp.int32), seed, step.first_column])
    moments = [state.get(name, jnp.zeros(1, jnp.float32)) for name in ("first_moment", "second_moment")]
    constants: dict[str, Any] = {
        "DIM": dim,
        "WIDTH": width,
        "COLUMNS": tile.columns,
        "CHUNK": chunk,
        "STRIDE": tile.rows,
        "KIND": rule.kind,
        "BETA1": rule.beta1,
        "BETA2": rule.beta2,
        "EPS": rule.eps,
        "ROUND": rule.stochastic_rounding and table.dtype == jnp.bfloat16,
        "NUM_ROWS": table.shape[0],
        "IN_PAIRS": dim % 2 == 0 and width % 2 == 0,
    }

    rows, sources, weights = sorted_picks(gradients)
    vectors, partial = jnp.concatenate([gradient.vectors for gradient in gradients]), False
    while True:
        chunks = ceil_div(rows.shape[0], chunk)
        table, *moments, sums = triton_call.launch(
            update_kernel,
            table,
            *moments,
            rows,
            sources,
            weights,
            vectors,
            floats,
            ints,
            out=[
                *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (table, *moments)),
                jax.ShapeDtypeStruct((2 * chunks, 2 * dim), jnp.uint16),
            ],
            grid=(chunks * blocks,),
            num_warps=tile.num_warps,
            aliases={0: 0, 1: 1, 2: 2},
            NUM_PICKS=rows.shape[0],
            PARTIAL=partial,
            **constants,
        )
        if chunks == 1:
            named: TableState = dict(zip(("first_moment", "second_moment"), moments, strict=True))
            return table, {name: named[name] for name in state}
        rows, weights = cut_segments(rows, chunk)
        sources, vectors, partial = rows, sums, True


def cut_segments(rows: Int[Array, " m"], chunk_size: int) -> tuple[Int[Array, " s"], Float[Array, " s"]]:
    """Row and weight (one, or zero if there is none) of the partial sums at both ends of every chunk."""
    begin = jnp.arange(0, rows.shape[0], chunk_size)
    end = jnp.minimum(begin + chunk_size, rows.shape[0])
    first, last = rows[begin], rows[end - 1]
    from_before: Bool[Array, " c"] = (begin > 0) & (rows[begin - 1] == first)
    goes_on: Bool[Array, " c"] = (end < rows.shape[0]) & (rows[end % rows.shape[0]] == last)
    cut = jnp.stack([from_before, goes_on & ~(from_before & (first == last))], axis=1)
    return jnp.stack([first, last], axis=1).reshape(-1), cut.reshape(-1).astype(jnp.float32)
