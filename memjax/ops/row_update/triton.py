"""The row update as Triton kernels: one sort of the picks, then one pass over them in the order of their rows.

After the sort the picks of a row are neighbours: a run. `stream_kernel` walks over a chunk of picks with several rows of
vectors in flight, sums each run in registers and, where it ends, applies the rule and writes the row back in place. A run
that crosses a chunk's end leaves pieces, one for each chunk it touches, and `join_kernel` sums those and updates its row.
So hot rows are shared out over programs, sums are always formed in the same order, and there are no atomics: two runs of
the program give the same bits.
"""

from collections.abc import Sequence

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
"""Picks that one program walks over."""

UNSHARED_COLUMNS = 256
"""Columns of a program where no columns share a state (sgd, adam)."""


@triton.jit
def mix(value):
    """The hash of `rounding.mix`."""
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def add_within_run(left_sum, left_starts, right_sum, right_starts):
    """Combines neighbours of a scan that begins anew at every run."""
    return tl.where(right_starts != 0, right_sum, left_sum + right_sum), left_starts | right_starts


@triton.jit
def update_rows(
    row,
    write,
    gradient,
    block,
    table_ptr,
    first_ptr,
    second_ptr,
    floats_ptr,
    ints_ptr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Applies the rule to the rows marked by `write`, in one block of columns."""
    blocks: tl.constexpr = (DIM + WIDTH - 1) // WIDTH
    inner = tl.arange(0, COLUMNS)
    columns = block * WIDTH + inner
    mask = write[:, None] & ((inner < WIDTH) & (columns < DIM))[None, :]
    # 64-bit: row * DIM passes 2**31 in tables that fit on one GPU.
    place = row.to(tl.int64)[:, None] * DIM + columns[None, :]
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
        state = second_ptr + row.to(tl.int64) * blocks + block
        before = tl.load(state, mask=write, other=0.0)
        square = tl.sum(gradient * gradient, axis=1) / WIDTH
        if KIND == "rowwise_adagrad":
            second = before + square
        else:
            second = tl.where(before == 0, square, BETA2 * before + (1 - BETA2) * square)
        new = old - (lr / (tl.sqrt(second) + EPS))[:, None] * gradient
        tl.store(state, second, mask=write)
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


@triton.jit
def stream_kernel(
    table_in_ptr,
    first_in_ptr,
    second_in_ptr,
    rows_ptr,
    tokens_ptr,
    weights_ptr,
    vectors_ptr,
    floats_ptr,
    ints_ptr,
    table_ptr,
    first_ptr,
    second_ptr,
    heads_ptr,
    tails_ptr,
    NUM_PICKS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Updates the rows whose runs lie inside a chunk.

    heads[chunk] becomes the sum of a run that began in an earlier chunk, tails[chunk] that of a run that begins here and
    goes on in the next.
    """
    blocks: tl.constexpr = (DIM + WIDTH - 1) // WIDTH
    # Programs of the same picks run side by side: their rows lie in the same pages.
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if tl.load(ints_ptr + 1) != 0:
        begin = chunk * CHUNK
        end = tl.minimum(begin + CHUNK, NUM_PICKS)
        row_before = tl.load(rows_ptr + begin - 1, mask=begin > 0, other=-1)
        inner = tl.arange(0, COLUMNS)
        columns = block * WIDTH + inner
        inside = (inner < WIDTH) & (columns < DIM)
        index = tl.arange(0, ROWS)
        carried = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, CHUNK, ROWS):
            pick = begin + start + index
            valid = pick < end
            row = tl.load(rows_ptr + pick, mask=valid, other=-1)
            previous = tl.load(rows_ptr + pick - 1, mask=valid & (pick > 0), other=-1)
            following = tl.load(rows_ptr + pick + 1, mask=valid & (pick + 1 < NUM_PICKS), other=-1)
            token = tl.load(tokens_ptr + pick, mask=valid, other=0).to(tl.int64)
            weight = tl.load(weights_ptr + pick, mask=valid, other=0.0).to(tl.float32)
            vector = tl.load(
                vectors_ptr + token[:, None] * DIM + columns[None, :], mask=valid[:, None] & inside[None, :], other=0.0
            )
            gradient = weight[:, None] * vector.to(tl.float32)
            starts = row != previous
            # The first pick goes on with the run that the pick before this tile belongs to.
            gradient += tl.where(((index == 0) & ~starts)[:, None], carried[None, :], 0.0)
            flags = tl.broadcast_to(starts.to(tl.int32)[:, None], (ROWS, COLUMNS))
            gradient, _ = tl.associative_scan((gradient, flags), 0, add_within_run)
            carried = tl.sum(tl.where((index == ROWS - 1)[:, None], gradient, 0.0), axis=0)

            ends = valid & (row != following)
            last = valid & (pick == end - 1)
            head = row == row_before
            update_rows(
                row,
                ends & ~head,
                gradient,
                block,
                table_ptr,
                first_ptr,
                second_ptr,
                floats_ptr,
                ints_ptr,
                DIM,
                WIDTH,
                COLUMNS,
                KIND,
                BETA1,
                BETA2,
                EPS,
                ROUND,
            )
            piece = chunk.to(tl.int64) * DIM + columns[None, :] + tl.zeros((ROWS, 1), tl.int64)
            is_head = (head & (ends | last))[:, None] & inside[None, :]
            tl.store(heads_ptr + piece, gradient, mask=is_head)
            is_tail = (last & ~ends & ~head)[:, None] & inside[None, :]
            tl.store(tails_ptr + piece, gradient, mask=is_tail)


@triton.jit
def join_kernel(
    table_in_ptr,
    first_in_ptr,
    second_in_ptr,
    rows_ptr,
    heads_ptr,
    tails_ptr,
    floats_ptr,
    ints_ptr,
    table_ptr,
    first_ptr,
    second_ptr,
    NUM_PICKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Updates the row of the run that begins in a chunk and goes on in the next, where there is one."""
    blocks: tl.constexpr = (DIM + WIDTH - 1) // WIDTH
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    begin = chunk * CHUNK
    after = begin + CHUNK
    row = tl.load(rows_ptr + after - 1, mask=after < NUM_PICKS, other=-1)
    row_after = tl.load(rows_ptr + after, mask=after < NUM_PICKS, other=-2)
    row_before = tl.load(rows_ptr + begin - 1, mask=begin > 0, other=-1)
    if (tl.load(ints_ptr + 1) != 0) & (row == row_after) & (row != row_before):
        inner = tl.arange(0, COLUMNS)
        columns = block * WIDTH + inner
        inside = (inner < WIDTH) & (columns < DIM)
        total = tl.load(tails_ptr + chunk.to(tl.int64) * DIM + columns, mask=inside, other=0.0)
        other = chunk + 1 + tl.arange(0, PIECES)
        # A while loop, because Triton's interpreter cannot take the bounds of a range from memory.
        found = PIECES
        while found == PIECES:
            first_row = tl.load(rows_ptr + other * CHUNK, mask=other * CHUNK < NUM_PICKS, other=-1)
            same = first_row == row
            found = tl.sum(same.to(tl.int32), axis=0)
            pieces = tl.load(
                heads_ptr + other.to(tl.int64)[:, None] * DIM + columns[None, :],
                mask=same[:, None] & inside[None, :],
                other=0.0,
            )
            total += tl.sum(pieces, axis=0)
            other += PIECES
        only = tl.zeros((1,), tl.int32)
        update_rows(
            only + row,
            only == 0,
            total[None, :],
            block,
            table_ptr,
            first_ptr,
            second_ptr,
            floats_ptr,
            ints_ptr,
            DIM,
            WIDTH,
            COLUMNS,
            KIND,
            BETA1,
            BETA2,
            EPS,
            ROUND,
        )


def row_update(
    table: Float[Array, "n d"], state: TableState, gradients: Sequence[RowGradient], rule: RowRule, step: RowStep
) -> tuple[Float[Array, "n d"], TableState]:
    """The reference's update, in place where the table and the state are donated."""
    dim = table.shape[1]
    width = rule.state_columns if rule.kind.startswith("rowwise_") else min(UNSHARED_COLUMNS, dim)
    tile = tiles.row_update(width)
    rows, tokens, weights = sorted_picks(gradients)
    vectors = jnp.concatenate([gradient.vectors for gradient in gradients])
    chunks = triton.cdiv(rows.shape[0], CHUNK)

    count = (step.step + 1).astype(jnp.float32)
    floats = jnp.stack([step.lr.astype(jnp.float32), 1 - rule.beta1**count, 1 - rule.beta2**count])
    seed = jax.lax.bitcast_convert_type(step.seed, jnp.int32)
    ints = jnp.stack([step.step, step.ok.astype(jnp.int32), seed, step.first_column])
    nothing = jnp.zeros(1, jnp.float32)
    held = [table, *(state.get(name, nothing) for name in ("first_moment", "second_moment"))]
    pieces = jax.ShapeDtypeStruct((chunks, dim), jnp.float32)
    shared = {
        "grid": (chunks * triton.cdiv(dim, width),),
        "aliases": {0: 0, 1: 1, 2: 2},
        "NUM_PICKS": rows.shape[0],
        "CHUNK": CHUNK,
        "DIM": dim,
        "WIDTH": width,
        "COLUMNS": tile.columns,
        "KIND": rule.kind,
        "BETA1": rule.beta1,
        "BETA2": rule.beta2,
        "EPS": rule.eps,
        "ROUND": rule.stochastic_rounding and table.dtype == jnp.bfloat16,
    }
    shapes = lambda: [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in held]
    *held, heads, tails = triton_call.launch(
        stream_kernel,
        *held,
        rows,
        tokens,
        weights,
        vectors,
        floats,
        ints,
        out=[*shapes(), pieces, pieces],
        num_warps=tile.num_warps,
        ROWS=tile.rows,
        **shared,
    )
    held = triton_call.launch(
        join_kernel, *held, rows, heads, tails, floats, ints, out=shapes(), num_warps=1, PIECES=16, **shared
    )
    named = dict(zip(("first_moment", "second_moment"), held[1:], strict=True))
    return held[0], {name: named[name] for name in state}
