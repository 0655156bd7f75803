"""Parses the bytes or fields of a record into segments, for every file format."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from memjax.config.data import DataConfig
from memjax.data.sources.records import Record, Segment


class MalformedError(ValueError):
    """A record cannot be used; the message says why and what to do, and the caller adds the place."""


@dataclasses.dataclass(frozen=True, slots=True)
class Keys:
    """The fields that hold the text of a record."""

    text: str = "text"
    """Field of a whole document, all of it learned; takes precedence over the other two."""
    prompt: str = "prompt"
    """Field of a prompt, which is context only."""
    answer: str = "answer"
    """Field of its answer, which is learned."""

    @classmethod
    def of(cls, config: DataConfig) -> "Keys":
        """The fields that the config names."""
        return cls(config.text_key, config.prompt_key, config.answer_key)


def text_record(line: bytes) -> Record:
    """A line of plain text as a document; MalformedError if it is not text."""
    if b"\0" in line:
        raise MalformedError(
            "holds a NUL byte, which is not valid in text; save the file as UTF-8 text or remove the line"
        )
    return (Segment(_decode(line), True),)


def json_record(line: bytes, keys: Keys) -> Record:
    """The record of a JSON object with a text, or with a prompt (context only) and an answer (learned).

    Raises:
        MalformedError: the line is not a JSON object, or its fields cannot be used.
    """
    return fields_record(json_fields(line, or_else=", or set data.source=text to read lines of plain text"), keys)


def json_fields(line: bytes, *, or_else: str = "") -> dict[str, Any]:
    """The fields of a JSON object; for a line that looks like plain text, the error ends with `or_else`.

    Raises:
        MalformedError: the line is not a JSON object.
    """
    try:
        fields = json.loads(_decode(line))
    except MalformedError:
        raise
    except (ValueError, RecursionError) as error:
        way_out = "; write one whole JSON object per line"
        if not line.lstrip().startswith((b"{", b"[")):
            way_out += or_else
        raise MalformedError(f"not JSON ({error}){way_out}") from error
    if not isinstance(fields, dict):
        raise MalformedError(f"a JSON {_kind(fields)}, not an object; write one JSON object per line")
    return fields


def fields_record(fields: Mapping[str, Any], keys: Keys) -> Record:
    """The record made from the fields of a JSON object or table row.

    Raises:
        MalformedError: fields are missing or cannot be used.
    """
    if keys.text in fields:
        return (Segment(_text(fields, keys.text), True),)
    if keys.prompt not in fields or keys.answer not in fields:
        names = sorted(name[:40] for name in fields)
        shown = f"{names[:20]}{' and others' if len(names) > 20 else ''}"
        raise MalformedError(
            f"has the fields {shown}, but neither {keys.text!r} nor both {keys.prompt!r} and "
            f"{keys.answer!r}; rename them, or for a training set data.text_key, or data.prompt_key and "
            "data.answer_key, to fields it has"
        )
    prompt, answer = _text(fields, keys.prompt), _text(fields, keys.answer)
    gap = "" if prompt[-1].isspace() or answer[0].isspace() else " "
    return Segment(prompt, False), Segment(gap + answer, True)


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        kind = ", but UTF-16 or a binary file" if b"\0" in line else ""
        raise MalformedError(
            f"not UTF-8 (byte {error.start + 1} of the line){kind}; save it as text in UTF-8, JSON lines or Parquet"
        ) from error


def _text(fields: Mapping[str, Any], key: str) -> str:
    text = fields[key]
    if isinstance(text, bytes):  # from a binary column
        text = _decode(text)
    if not isinstance(text, str):
        kind = _kind(text)
        article = "an" if kind in ("array", "object") else "a"
        raise MalformedError(f"field {key!r} is {article} {kind}, not a string; write the text as a string")
    if not text:
        raise MalformedError(f"field {key!r} is an empty string; give it a text or remove the line")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MalformedError(
                f"field {key!r} holds half of a surrogate pair ({text[error.start]!a}); write both halves"
            ) from error
    return text


def _kind(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number" if isinstance(value, int | float) else type(value).__name__)
