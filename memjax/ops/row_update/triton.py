"""The row update as Triton kernels: one sort of the picks, then one pass over them that updates the rows in place.

After the sort the picks of a row are neighbours: a segment. A program takes a chunk of picks, sums its segments on the
tensor cores (a matrix of weights, one row a segment, times the vectors of the picks), applies the rule and writes the
rows. Every chunk is the same work, however often its rows were picked. A segment that the border of a chunk cuts is
left as a partial sum in each of its chunks; the partial sums are the picks of the next round, which is shorter by far,
until one chunk holds all. Sums are always formed in the same order and without atomics: two runs give the same bits.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Bool, Float, Int

from memjax.ops import tiles, triton_call
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import RowRule, RowStep, TableState
from memjax.ops.row_update.segments import sorted_picks

SEGMENTS = 16
"""Segments that are summed and updated at a time: the rows of the smallest product on tensor cores."""

UNSHARED_COLUMNS = 256
"""Columns of a program where no columns share a state (sgd, adam)."""


@triton.jit
def mix(value):
    """The hash of `rounding.mix`."""
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def random_bits(ints_ptr, row, first_column, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr, IN_PAIRS: tl.constexpr):
    """The bits of `rounding.random_bits`: two neighbouring columns share a hash."""
    seed = tl.load(ints_ptr + 2).to(tl.uint32, bitcast=True)
    step = tl.load(ints_ptr).to(tl.uint32, bitcast=True)
    by_row = mix(mix(mix(seed) ^ step) ^ row.to(tl.uint32))
    if IN_PAIRS:
        pair = ((first_column >> 1) + tl.arange(0, COLUMNS // 2)).to(tl.uint32)
        words = mix(by_row[:, None] ^ pair[None, :])
        return tl.interleave(words & 0xFFFF, words >> 16)
    column = (first_column + tl.arange(0, COLUMNS)).to(tl.uint32)
    words = mix(by_row[:, None] ^ (column >> 1)[None, :])
    return tl.where((column & 1)[None, :] == 1, words >> 16, words & 0xFFFF)


@triton.jit
def three_parts(value):
    """bfloat16 numbers whose sum is the float32 value, all 24 bits of it."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product(left, right, total, INTERPRETED: tl.constexpr):
    """total + left @ right of bfloat16 matrices, in float32."""
    if INTERPRETED:  # Triton's interpreter would multiply the bits of bfloat16 as integers
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    return tl.dot(left, right, total)


@triton.jit
def sum_segments(member, weight, vectors, total, INTERPRETED: tl.constexpr):
    """total and the sums of weight * vector over the members of each segment, in float32."""
    if vectors.dtype == tl.bfloat16:
        high, middle, low = three_parts(tl.where(member, weight[None, :], 0.0))
        total = product(low, vectors, total, INTERPRETED)
        total = product(middle, vectors, total, INTERPRETED)
        return product(high, vectors, total, INTERPRETED)
    high, middle, low = three_parts(weight[:, None] * vectors)
    ones = tl.where(member, 1.0, 0.0).to(tl.bfloat16)
    total = product(ones, low, total, INTERPRETED)
    total = product(ones, middle, total, INTERPRETED)
    return product(ones, high, total, INTERPRETED)


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
    PARTIAL: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PICKS: tl.constexpr,
    TILES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    KIND: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    ROUND: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Sums and updates the segments of TILES * PICKS sorted picks, over WIDTH columns, in place.

    Where PARTIAL, the picks are partial sums of the round before, and those of weight zero do not exist.
    """
    blocks: tl.constexpr = (DIM + WIDTH - 1) // WIDTH
    # Programs of the same picks run side by side: their rows lie in the same pages.
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    inner = tl.arange(0, COLUMNS)
    columns = block * WIDTH + inner
    inside = (inner < WIDTH) & (columns < DIM)
    lr = tl.load(floats_ptr)
    if tl.load(ints_ptr + 1) != 0:
        # The sum of a segment that goes on in the next tile, and whether it has begun before this chunk.
        carry = tl.zeros((COLUMNS,), tl.float32)
        begun_outside = chunk >= 0
        chunk_end = tl.minimum((chunk + 1) * TILES * PICKS, NUM_PICKS)
        for tile in range(TILES):
            begin = (chunk * TILES + tile) * PICKS
            if begin < NUM_PICKS:
                pick = begin + tl.arange(0, PICKS)
                exists = pick < NUM_PICKS
                row = tl.load(rows_ptr + pick, mask=exists, other=-1)
                before = tl.load(rows_ptr + pick - 1, mask=exists & (pick > 0), other=-1)
                weight = tl.load(weights_ptr + pick, mask=exists, other=0.0).to(tl.float32)
                if PARTIAL:
                    source = pick.to(tl.int64)
                    wanted = weight != 0
                else:
                    source = tl.load(sources_ptr + pick, mask=exists, other=0).to(tl.int64)
                    wanted = exists
                vectors = tl.load(
                    vectors_ptr + source[:, None] * DIM + columns[None, :],
                    mask=wanted[:, None] & inside[None, :],
                    other=0.0,
                    eviction_policy="evict_last",
                )
                starts = exists & ((row != before) | (pick == begin))
                number = tl.cumsum(starts.to(tl.int32), 0) - 1
                num_segments = tl.sum(starts.to(tl.int32), 0)
                end = tl.minimum(begin + PICKS, NUM_PICKS)
                first_row, last_row = tl.load(rows_ptr + begin), tl.load(rows_ptr + end - 1)
                goes_on_from = (begin > 0) & (tl.load(rows_ptr + tl.maximum(begin - 1, 0)) == first_row)
                goes_on = (end < NUM_PICKS) & (tl.load(rows_ptr + tl.minimum(end, NUM_PICKS - 1)) == last_row)
                begun_outside = goes_on_from & begun_outside
                outside_segment = tl.where(begun_outside, 0, -1)
                unfinished_segment = tl.where(goes_on, num_segments - 1, -1)
                at_chunk_end = (end == chunk_end).to(tl.int32)
                next_carry = tl.zeros((COLUMNS,), tl.float32)

                for group in tl.static_range(0, PICKS, SEGMENTS):
                    if group < num_segments:
                        segment = group + tl.arange(0, SEGMENTS)
                        member = (number[None, :] == segment[:, None]) & wanted[None, :]
                        target = tl.max(tl.where(member, row[None, :], -1), axis=1)
                        outside = segment == outside_segment
                        unfinished = segment == unfinished_segment
                        complete = (target >= 0) & (segment != outside_segment) & (segment != unfinished_segment)
                        mask = complete[:, None] & inside[None, :]
                        target = target.to(tl.int64)
                        place = target[:, None] * DIM + columns[None, :]
                        old = tl.load(table_ptr + place, mask=mask, other=0.0, eviction_policy="evict_first")

                        gradient = tl.where((segment == 0)[:, None], carry[None, :], 0.0)
                        gradient = sum_segments(member, weight, vectors, gradient, INTERPRETED)
                        if goes_on & (end < chunk_end):
                            next_carry += tl.sum(tl.where(unfinished[:, None], gradient, 0.0), axis=0)
                        # Cut by a border of the chunk: side 0 for what has begun before it, else side 1.
                        cut = tl.where(unfinished, at_chunk_end, outside.to(tl.int32)) != 0
                        if tl.max(cut.to(tl.int32), 0) > 0:
                            slot = (2 * chunk + tl.where(outside, 0, 1)).to(tl.int64)
                            tl.store(
                                partial_ptr + slot[:, None] * DIM + columns[None, :],
                                gradient,
                                mask=cut[:, None] & inside[None, :],
                            )

                        old = old.to(tl.float32)
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
                            state = second_ptr + target * blocks + block
                            old_second = tl.load(state, mask=complete, other=0.0)
                            square = tl.sum(gradient * gradient, axis=1) / WIDTH
                            if KIND == "rowwise_adagrad":
                                second = old_second + square
                            else:
                                second = tl.where(old_second == 0, square, BETA2 * old_second + (1 - BETA2) * square)
                            new = old - (lr / (tl.sqrt(second) + EPS))[:, None] * gradient
                            tl.store(state, second, mask=complete)

                        if ROUND:
                            first_column = tl.load(ints_ptr + 3) + block * WIDTH
                            random = random_bits(ints_ptr, target, first_column, SEGMENTS, COLUMNS, IN_PAIRS)
                            bits = (new.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
                            # Adding to the words of a NaN could turn it into a number.
                            new = tl.where(new == new, bits.to(tl.float32, bitcast=True), new)
                        tl.store(
                            table_ptr + place,
                            new.to(table_ptr.dtype.element_ty),
                            mask=mask,
                            eviction_policy="evict_first",
                        )
                carry = next_carry
                begun_outside = begun_outside & (num_segments == 1)


def row_update(
    table: Float[Array, "n d"], state: TableState, gradients: Sequence[RowGradient], rule: RowRule, step: RowStep
) -> tuple[Float[Array, "n d"], TableState]:
    """The reference's update, in place where the table and the state are donated."""
    dim = table.shape[1]
    width = rule.state_columns if rule.kind.startswith("rowwise_") else min(UNSHARED_COLUMNS, dim)
    tile = tiles.row_update(width)
    blocks = tiles.ceil_div(dim, width)
    chunk_size = tile.rows * tile.repeats

    count = (step.step + 1).astype(jnp.float32)
    floats = jnp.stack([step.lr.astype(jnp.float32), 1 - rule.beta1**count, 1 - rule.beta2**count])
    seed = jax.lax.bitcast_convert_type(step.seed, jnp.int32)
    ints = jnp.stack([step.step, step.ok.astype(jnp.int32), seed, step.first_column])
    moments = [state.get(name, jnp.zeros(1, jnp.float32)) for name in ("first_moment", "second_moment")]
    constants: dict[str, Any] = {
        "DIM": dim,
        "WIDTH": width,
        "COLUMNS": tile.columns,
        "PICKS": tile.rows,
        "TILES": tile.repeats,
        "SEGMENTS": SEGMENTS,
        "KIND": rule.kind,
        "BETA1": rule.beta1,
        "BETA2": rule.beta2,
        "EPS": rule.eps,
        "ROUND": rule.stochastic_rounding and table.dtype == jnp.bfloat16,
        "IN_PAIRS": dim % 2 == 0 and width % 2 == 0,
        "INTERPRETED": triton_call.is_interpreted(),
    }

    rows, sources, weights = sorted_picks(gradients)
    vectors, partial = jnp.concatenate([gradient.vectors for gradient in gradients]), False
    while True:
        chunks = tiles.ceil_div(rows.shape[0], chunk_size)
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
                jax.ShapeDtypeStruct((2 * chunks, dim), jnp.float32),
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
        rows, weights = cut_segments(rows, chunk_size)
        sources, vectors, partial = rows, sums, True


def cut_segments(rows: Int[Array, " m"], chunk_size: int) -> tuple[Int[Array, " s"], Float[Array, " s"]]:
    """Row and weight (one, or zero where there is none) of the partial sums on both sides of every chunk."""
    begin = jnp.arange(0, rows.shape[0], chunk_size)
    end = jnp.minimum(begin + chunk_size, rows.shape[0])
    first, last = rows[begin], rows[end - 1]
    from_before: Bool[Array, " c"] = (begin > 0) & (rows[begin - 1] == first)
    goes_on: Bool[Array, " c"] = (end < rows.shape[0]) & (rows[end % rows.shape[0]] == last)
    cut = jnp.stack([from_before, goes_on & ~(from_before & (first == last))], axis=1)
    return jnp.stack([first, last], axis=1).reshape(-1), cut.reshape(-1).astype(jnp.float32)
