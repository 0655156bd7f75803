"""Formats and places of tables: every implementation of bag and dot agrees with a NumPy decoder of the bytes."""

import ctypes
import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import triton
import triton.language as tl

from memjax.ops.embedding_bag.api import embedding_bag
from memjax.ops.embedding_dot.api import embedding_dot
from memjax.ops.row_formats import formats
from memjax.ops.row_formats.formats import Encoded, Float8, Int4, Int8, register, row_bytes
from memjax.ops.table import Table

every_implementation = pytest.mark.parametrize("implementation", ["triton", "xla", "reference"])
# Groups that divide tiles, groups that tiles divide, and neither; rows of a single group.
SHAPES = [("int8", 256, 128), ("int8", 48, 16), ("int8", 100, 128), ("float8_e4m3", 192, 64), ("float8_e4m3", 40, 20)]
SHAPES += [("int4", 128, 64), ("int4", 1024, 64), ("int4", 72, 24), ("int4", 20, 128)]
SHAPES += [("bfloat16", 24, 0), ("float16", 72, 0), ("float32", 12, 0)]
KINDS = {"int8": Int8, "float8_e4m3": Float8, "int4": Int4}
every_shape = pytest.mark.parametrize(("name", "width", "group"), SHAPES)


def make(name, width, group, *, rows=9, seed=0):
    row_format = KINDS[name](name, group=group) if group else formats.find(name)
    numbers = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return Table.encoded(jnp.asarray(numbers), row_format), numbers


def decoded_by_hand(name, payload, scales, group):
    """Decodes the rows from their bytes, one number at a time."""
    if scales is None:
        return np.asarray(payload, np.float64)
    per_byte = 2 if name == "int4" else 1
    out = np.zeros((payload.shape[0], payload.shape[1] * per_byte))
    for row, column in np.ndindex(out.shape):
        byte = int(payload[row, column // per_byte]) % 256
        if name == "int4":
            half = byte >> 4 if column % 2 else byte % 16
            code = half - 16 if half >= 8 else half
        elif name == "int8":
            code = byte - 256 if byte >= 128 else byte
        else:
            sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
            size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
            code = -size if sign else size
        out[row, column] = code * float(scales[row, column // group])
    return out


def group_of(table):
    return 0 if table.scales is None else table.shape[1] // table.scales.shape[1]


def by_hand(table):
    scales = None if table.scales is None else np.asarray(table.scales, np.float64)
    return decoded_by_hand(table.format.name, np.asarray(table.rows), scales, group_of(table))


@cache
def compiled(operation, implementation):
    return jax.jit(partial(operation, implementation=implementation))


def check(table, rows, implementation):
    rng = np.random.default_rng(1)
    indices = rng.integers(len(rows), size=(3, 5)).astype(np.int32)
    weights, vectors = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=(3, rows.shape[1]))
    vectors = vectors.astype(np.float32)
    bag = compiled(embedding_bag, implementation)(table, indices, weights)
    dot = compiled(embedding_dot, implementation)(table, indices, vectors)
    assert bag.dtype == table.dtype
    assert dot.dtype == jnp.float32
    rounding = float(jnp.finfo(table.dtype).eps)
    expected = np.einsum("tk,tkd->td", weights, rows[indices])
    np.testing.assert_allclose(np.asarray(bag, np.float64), expected, rtol=rounding, atol=max(1e-5, rounding))
    np.testing.assert_allclose(dot, np.einsum("td,tkd->tk", vectors, rows[indices]), rtol=1e-5, atol=1e-4)


@every_implementation
@every_shape
def test_bag_and_dot_read_what_the_bytes_mean(implementation, name, width, group):
    table, _ = make(name, width, group)
    assert table.shape == (9, width)
    check(table, by_hand(table), implementation)


@every_shape
def test_rows_come_back_within_half_a_step_of_their_format(name, width, group):
    table, numbers = make(name, width, group, rows=40)
    rows = by_hand(table)
    if not group:
        bits = float(jnp.finfo(table.rows.dtype).eps)
        return np.testing.assert_allclose(rows, numbers, rtol=bits)
    largest = np.abs(numbers.reshape(40, -1, group_of(table))).max(axis=2).repeat(group_of(table), axis=1)
    # Scales are rounded to eight bits. The best int4 scale may clip its largest number by a quarter.
    bound = {"int8": largest * 0.51 / 127 + largest / 256, "int4": largest * 0.26}
    bound["float8_e4m3"] = np.maximum(np.abs(numbers) / 16, largest * 2.0**-10 / 448) + largest / 256
    assert np.all(np.abs(rows - numbers) <= bound[name])
    error = np.sqrt(np.mean((rows - numbers) ** 2))
    assert error < {"int8": 0.008, "float8_e4m3": 0.03, "int4": 0.12}[name]


@pytest.mark.parametrize("name", list(KINDS))
def test_every_code_is_decoded_alike_everywhere(name):
    payload = np.arange(256, dtype=np.uint8).view(np.int8).reshape(4, 64)
    if name == "float8_e4m3":
        payload = np.where((payload & 127) == 127, 0, payload).astype(np.int8)  # NaN is never written
    columns = formats.find(name).width(64)
    group = columns // formats.find(name).groups(columns)
    scales = np.random.default_rng(0).uniform(0.5, 2, (4, columns // group)).astype(ml_dtypes.bfloat16)
    table = Table(jnp.asarray(payload), jnp.asarray(scales), format=formats.find(name), value_dtype="float32")
    expected = decoded_by_hand(name, payload, scales.astype(np.float64), group)
    for implementation in ("triton", "xla", "reference"):
        every_row, ones = np.arange(4, dtype=np.int32)[:, None], np.ones((4, 1), np.float32)
        bag = compiled(embedding_bag, implementation)(table, every_row, ones)
        np.testing.assert_allclose(bag, expected, rtol=1e-6)


@pytest.mark.parametrize("name", list(KINDS))
def test_rows_of_zeros_stay_zeros(name):
    table = Table.encoded(jnp.zeros((3, 64)), formats.find(name))
    np.testing.assert_array_equal(by_hand(table), np.zeros((3, 64)))
    check(table, np.zeros((3, 64)), "triton")


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_without_a_code_are_refused(name, number):
    with pytest.raises(ValueError, match=f"{name} has no code for NaN or infinity"):
        formats.find(name).encode(np.array([[0.0] * 15 + [number]], np.float32))


def test_widths_that_cannot_be_grouped_are_refused_by_name():
    for name, width in (("int8", 2 * 149), ("int4", 33), ("float8_e4m3", 1009)):
        with pytest.raises(ValueError, match=f"{name} cannot store rows of {width} columns"):
            formats.find(name).encode(np.ones((2, width), np.float32))
    assert formats.find("int8").groups(5) == formats.find("int4").groups(6) == 1


def test_bytes_of_a_row_count_its_scales():
    assert row_bytes(formats.find("bfloat16"), 1024) == 2048
    assert row_bytes(formats.find("int8"), 1024) == 1024 + 16
    assert row_bytes(formats.find("int4"), 1024) == 512 + 32
    for name, width, group in SHAPES:
        table, numbers = make(name, width, group)
        stored = sum(np.asarray(part).nbytes for part in (table.rows, table.scales) if part is not None)
        assert row_bytes(table.format, width) * len(numbers) == stored


def test_unknown_formats_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"table format 'int3' is unknown; known: .*int8, float8_e4m3, int4"):
        formats.find("int3")


@triton.jit
def read_signs(
    rows_ptr, scales_ptr, row, first, valid, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr
):
    """Reads one bit per column."""
    columns = first + tl.arange(0, COLUMNS)
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    byte = tl.load(rows_ptr + row[:, None] * (WIDTH // 8) + (columns // 8)[None, :], mask=mask, other=0).to(tl.int32)
    return tl.where(mask, 1.0 - 2.0 * ((byte >> (columns % 8)[None, :]) & 1), 0.0)


@dataclasses.dataclass(frozen=True)
class Signs:
    """A format from outside the package: +1 or -1, eight per byte."""

    name: str = "signs"
    payload_dtype = np.dtype(np.uint8)
    has_scales = False

    def payload_columns(self, width):
        return width // 8

    def width(self, payload_columns):
        return payload_columns * 8

    def groups(self, width):
        return 0

    def encode(self, rows):
        return Encoded(np.packbits(rows < 0, axis=1, bitorder="little"), None)

    def decode(self, payload, scales, dtype):
        bits = (payload[..., None] >> jnp.arange(8, dtype=jnp.uint8).reshape((1,) * payload.ndim + (8,))) & 1
        return 1 - 2 * bits.reshape(*payload.shape[:-1], -1).astype(dtype)

    def reader(self):
        return read_signs


@every_implementation
def test_a_foreign_format_is_read_like_any_other(implementation, monkeypatch):
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))
    signs = register(Signs())
    assert formats.find("signs") is signs
    numbers = np.random.default_rng(0).normal(size=(9, 48)).astype(np.float32)
    table = Table(jnp.asarray(signs.encode(numbers).payload), format=signs, value_dtype="float32")
    check(table, np.where(numbers < 0, -1.0, 1.0), implementation)


@every_shape
def test_kernels_read_rows_at_an_address_in_host_memory(name, width, group):
    table, _ = make(name, width, group)
    payload = np.array(table.rows)
    address = np.frombuffer(bytes(ctypes.c_uint64(payload.ctypes.data)), np.uint32)
    pinned = dataclasses.replace(table, rows=jnp.asarray(address), place="host", pinned=table.shape)
    assert pinned.shape == table.shape
    check(pinned, by_hand(table), "triton")


def test_addresses_are_for_kernels_alone():
    table, _ = make("int8", 64, 64)
    pinned = dataclasses.replace(table, rows=jnp.zeros(2, jnp.uint32), place="host", pinned=(9, 64))
    for operation, vectors in ((embedding_bag, jnp.ones((3, 2))), (embedding_dot, jnp.ones((3, 64)))):
        for implementation in ("xla", "reference", None):
            with pytest.raises(NotImplementedError, match="only the Triton kernels read pinned host memory"):
                operation(pinned, jnp.zeros((3, 2), jnp.int32), vectors, implementation=implementation)


@every_implementation
def test_weights_and_vectors_are_differentiable_through_codes(implementation):
    table, _ = make("int8", 32, 16)
    rows = by_hand(table)
    indices, weights = jnp.array([[1, 5, 5]]), jnp.ones((1, 3))
    loss = lambda weights: embedding_bag(table, indices, weights, implementation=implementation).sum()
    np.testing.assert_allclose(jax.grad(loss)(weights), rows[np.asarray(indices)].sum(axis=-1), rtol=1e-4, atol=1e-5)
    loss = lambda vectors: embedding_dot(table, indices, vectors, implementation=implementation).sum()
    np.testing.assert_allclose(jax.grad(loss)(jnp.ones((1, 32))), rows[np.asarray(indices)].sum(axis=1), atol=1e-5)


@pytest.mark.parametrize("operation", [embedding_bag, embedding_dot])
def test_gradients_of_read_only_tables_are_refused(operation):
    indices, per_token = jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2 if operation is embedding_bag else 64))
    coded, _ = make("int8", 64, 64)
    host = dataclasses.replace(Table.of(jnp.ones((9, 64))), place="host")
    through_scales = lambda scales: operation(dataclasses.replace(coded, scales=scales), indices, per_token).sum()
    with pytest.raises(TypeError, match="a table of int8 in device memory is read-only"):
        jax.grad(through_scales)(coded.scales)
    with pytest.raises(TypeError, match="a table of float32 in host memory is read-only"):
        jax.grad(lambda table: operation(table, indices, per_token).sum())(host)


@pytest.mark.parametrize("operation", [embedding_bag, embedding_dot])
def test_a_plain_table_is_its_array(operation):
    indices, per_token = jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2 if operation is embedding_bag else 64))
    rows = jnp.ones((9, 64))
    program = lambda table: jax.jit(operation).lower(table, indices, per_token).as_text()
    assert program(rows) == program(Table.of(rows)).replace("table.rows", "table")
    gradient = jax.grad(lambda table: operation(table, indices, per_token).sum())
    np.testing.assert_array_equal(gradient(Table.of(rows)).rows, gradient(rows))


@every_implementation
def test_tables_are_mapped_over(implementation):
    tables = [make("int4", 32, 16, seed=seed)[0] for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tables)
    indices, weights = jnp.asarray([[[1, 2]], [[3, 4]]]), jnp.ones((2, 1, 2))
    mapped = jax.vmap(compiled(embedding_bag, implementation))(stacked, indices, weights)
    for number, table in enumerate(tables):
        expected = by_hand(table)[np.asarray(indices[number])].sum(axis=1)
        np.testing.assert_allclose(mapped[number], expected, rtol=1e-5, atol=1e-5)
