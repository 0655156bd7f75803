"""Row formats: how many bytes a row takes, how rows are encoded and decoded, and how a kernel reads them.

Formats are hashable: a format is part of a table's static structure, so programs are compiled for it. `register` makes
one available to settings by its name; `memjax.ops.table.Table` takes any format, registered or not.
"""

import dataclasses
import importlib
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

SMALLEST_GROUP = 16
"""Minimum number of columns that share a scale, unless a row has fewer: scales of fewer cost more than codes save."""

SCALE_DTYPE = np.dtype(ml_dtypes.bfloat16)
"""Type of scales. Codes are chosen for the rounded scale, so its eight bits of precision cost next to nothing."""


class Encoded(NamedTuple):
    """Rows in their stored form."""

    payload: Num[np.ndarray, "b p"]
    scales: Num[np.ndarray, "b g"] | None


@runtime_checkable
class RowFormat(Protocol):
    """Interface of a format; `Plain` and `Scaled` implement it."""

    @property
    def name(self) -> str:
        """Name in settings and messages."""
        ...

    @property
    def payload_dtype(self) -> np.dtype:
        """Type of the stored numbers or codes."""
        ...

    @property
    def has_scales(self) -> bool:
        """Whether rows have scales, and are therefore read-only."""
        ...

    def payload_columns(self, width: int) -> int:
        """Numbers of `payload_dtype` that store a row of `width` columns."""
        ...

    def width(self, payload_columns: int) -> int:
        """Columns of a row that is stored in `payload_columns` numbers."""
        ...

    def groups(self, width: int) -> int:
        """Scales per row; 0 for none.

        Raises:
            ValueError: rows of this width cannot be stored in the format.
        """
        ...

    def encode(self, rows: Float[np.ndarray, "b d"]) -> Encoded:
        """Encodes rows; runs on the host, block by block.

        Raises:
            ValueError: the format has no code for one of the numbers.
        """
        ...

    def decode(
        self, payload: Num[Array, "*b p"], scales: Num[Array, "*b g"] | None, dtype: DTypeLike
    ) -> Float[Array, "*b d"]:
        """Decodes stored rows to `dtype`."""
        ...

    def reader(self) -> Any:
        """The `triton.jit` function by which kernels read a tile of rows; see `row_formats/triton.py`."""
        ...


def row_bytes(row_format: RowFormat, width: int) -> int:
    """Bytes of a row of `width` columns, scales included."""
    payload = row_format.payload_columns(width) * row_format.payload_dtype.itemsize
    return payload + row_format.groups(width) * SCALE_DTYPE.itemsize


@dataclasses.dataclass(frozen=True)
class Plain:
    """Plain floating-point numbers: the format of training, and of any array."""

    name: str
    """Name of the dtype."""

    has_scales = False

    @property
    def payload_dtype(self) -> np.dtype:
        return jnp.dtype(self.name)

    def payload_columns(self, width: int) -> int:
        return width

    def width(self, payload_columns: int) -> int:
        return payload_columns

    def groups(self, width: int) -> int:
        return 0

    def encode(self, rows: Float[np.ndarray, "b d"]) -> Encoded:
        """The rows, rounded to the type."""
        return Encoded(np.ascontiguousarray(rows, self.payload_dtype), None)

    def decode(
        self, payload: Float[Array, "*b d"], scales: Num[Array, "*b g"] | None, dtype: DTypeLike
    ) -> Float[Array, "*b d"]:
        return payload.astype(dtype)

    def reader(self) -> Any:
        return _reader("read_plain")


@dataclasses.dataclass(frozen=True)
class Zeros(Plain):
    """Reads as zeros, whatever is stored: a plain table can be zeroed without a second copy."""

    def decode(
        self, payload: Float[Array, "*b d"], scales: Num[Array, "*b g"] | None, dtype: DTypeLike
    ) -> Float[Array, "*b d"]:
        return jnp.zeros(payload.shape, dtype)

    def reader(self) -> Any:
        return _reader("read_zeros")


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Codes of a few bits: `group` neighbouring columns share a scale, and a value is code x scale.

    If `group` does not divide a row's width, the largest smaller group that does is used.
    """

    name: str
    group: int = 128
    """Maximum number of columns that share a scale."""

    payload_dtype = np.dtype(np.int8)
    has_scales = True
    codes_per_byte: ClassVar[int] = 1

    def payload_columns(self, width: int) -> int:
        """Bytes, of `codes_per_byte` codes each."""
        return width // self.codes_per_byte

    def width(self, payload_columns: int) -> int:
        """One column per code."""
        return payload_columns * self.codes_per_byte

    def groups(self, width: int) -> int:
        """Scales per row."""
        step = self.codes_per_byte
        sizes = [size for size in range(step, min(self.group, width) + 1, step) if width % size == 0]
        if not sizes or sizes[-1] < min(SMALLEST_GROUP, width):
            raise ValueError(
                f"{self.name} cannot store rows of {width} columns: {max(SMALLEST_GROUP, step)} to {self.group} "
                f"neighbouring columns share a scale, and no {'even ' if step == 2 else ''}number of them divides "
                f"{width}; use bfloat16, or a width that is a multiple of 16"
            )
        return width // sizes[-1]

    def encode(self, rows: Float[np.ndarray, "b d"]) -> Encoded:
        """Scales each group by its largest magnitude, and rounds to the nearest codes."""
        groups = self.groups(rows.shape[1])
        grouped = np.asarray(rows, np.float32).reshape(len(rows), groups, -1)
        largest = np.abs(grouped).max(axis=2, initial=0.0)
        if not np.isfinite(largest).all():
            raise ValueError(f"{self.name} has no code for NaN or infinity, and one of the rows holds such a number")
        codes, scales = self._code(grouped, largest)
        return Encoded(self._pack(codes.reshape(rows.shape)), scales)

    def decode(
        self, payload: Int[Array, "*b p"], scales: Float[Array, "*b g"] | None, dtype: DTypeLike
    ) -> Float[Array, "*b d"]:
        """Codes times scales."""
        assert scales is not None
        codes = self._unpack(payload).astype(dtype)
        grouped = codes.reshape(*scales.shape, -1) * scales[..., None].astype(dtype)
        return grouped.reshape(codes.shape)

    def reader(self) -> Any:
        """Loads bytes, decodes them and multiplies by scales."""
        return _reader(f"read_{type(self).__name__.lower()}")

    def _code(self, grouped: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes of [row, group, column] and their scales."""
        raise NotImplementedError

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        """Codes in their stored form."""
        return codes

    def _unpack(self, payload: Array) -> Array:
        """The numbers that the stored codes stand for."""
        return payload


class Int8(Scaled):
    """Whole numbers from -127 to 127."""

    def _code(self, grouped: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scales = (largest / 127).astype(SCALE_DTYPE)
        return _whole_numbers(grouped, scales, -127, 127).astype(np.int8), scales


class Float8(Scaled):
    """Floating-point numbers with 4 bits of exponent and 3 of mantissa (e4m3), stored as their bits."""

    def _code(self, grouped: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        top = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
        scales = (largest / top).astype(SCALE_DTYPE)
        # Numbers above the largest would become NaN.
        codes = np.clip(_divided(grouped, scales), -top, top).astype(ml_dtypes.float8_e4m3fn)
        return codes.view(np.int8), scales

    def _unpack(self, payload: Array) -> Array:
        return jax.lax.bitcast_convert_type(payload, jnp.float8_e4m3fn)


class Int4(Scaled):
    """Whole numbers from -8 to 7, two in a byte: the even column in its lower half, the odd one in its upper half."""

    codes_per_byte = 2

    _SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
    """Candidate values of the largest code, as shares of a group's largest number. A smaller share makes the steps
    between codes finer but clips that number; the best one is chosen group by group."""

    def _code(self, grouped: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        signed = np.where(grouped.max(axis=2) == largest, largest, -largest)
        best = np.full(largest.shape, np.inf, np.float32)
        codes, scales = np.zeros(grouped.shape, np.int8), np.zeros(largest.shape, SCALE_DTYPE)
        for share in self._SHARES:
            # There is one more negative code than there are positive ones; the number of largest magnitude gets it.
            trial = (share * signed / -8).astype(SCALE_DTYPE)
            found = _whole_numbers(grouped, trial, -8, 7)
            error = np.square(found * trial[..., None].astype(np.float32) - grouped).sum(axis=2)
            better = error < best
            best, scales = np.where(better, error, best), np.where(better, trial, scales)
            codes = np.where(better[..., None], found, codes)
        return codes.astype(np.int8), scales

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        return (codes[:, 1::2] << 4) | (codes[:, ::2] & 15)

    def _unpack(self, payload: Array) -> Array:
        even, odd = jax.lax.shift_right_arithmetic(payload << 4, jnp.int8(4)), payload >> 4
        return jnp.stack([even, odd], axis=-1).reshape(*payload.shape[:-1], -1)


def _divided(grouped: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Numbers divided by their scales; 0 where the scale is 0."""
    wide = scales[..., None].astype(np.float32)
    return np.divide(grouped, wide, out=np.zeros_like(grouped), where=wide != 0)


def _whole_numbers(grouped: np.ndarray, scales: np.ndarray, low: int, high: int) -> np.ndarray:
    """The nearest codes, as floating-point numbers."""
    return np.clip(np.rint(_divided(grouped, scales)), low, high)


def _reader(name: str) -> Any:
    return getattr(importlib.import_module("memjax.ops.row_formats.triton"), name)


_FORMATS: dict[str, RowFormat] = {}


def register(row_format: RowFormat) -> RowFormat:
    """Makes a format available to settings by its name, replacing any other of that name."""
    _FORMATS[row_format.name] = row_format
    return row_format


def names() -> list[str]:
    """Names of all registered formats."""
    return list(_FORMATS)


def find(name: str) -> RowFormat:
    """The format registered under a name; ValueError if there is none."""
    if name not in _FORMATS:
        raise ValueError(f"table format {name!r} is unknown; known: {', '.join(_FORMATS)}")
    return _FORMATS[name]


for _each in (
    *(Plain(name) for name in ("float32", "bfloat16", "float16", "float64")),
    Int8("int8"),
    Float8("float8_e4m3"),
    Int4("int4", group=64),
):
    register(_each)
