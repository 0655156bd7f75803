"""Validates the structure of JSON documents from untrusted sources."""

import json
from typing import Any, TypeVar

import pydantic

from memjax.errors import shown

T = TypeVar("T")

_MOST_CHARACTERS = 300


def read_as(shape: type[T], document: Any) -> T:
    """Converts a JSON value to a type such as a dataclass; unknown names are ignored.

    Raises:
        ValueError: it has a different structure; the message is a single line.
    """
    try:
        # From JSON, pydantic in strict mode still converts lists to tuples and 1 to 1.0.
        return pydantic.TypeAdapter(shape).validate_json(json.dumps(document), strict=True)
    except pydantic.ValidationError as error:
        raise ValueError(listed(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def line_of(error: BaseException) -> str:
    """An error's message as one short line, for use in another message."""
    text = " ".join(str(error).split())
    return text[:_MOST_CHARACTERS] if text else type(error).__name__


def listed(error: pydantic.ValidationError) -> str:
    """The first problems of a document as one line, each with its place."""
    problems = error.errors(include_input=False, include_url=False)
    lines = [f"{'.'.join(map(str, one['loc']))[:200] or 'it'}: {one['msg'][:200]}" for one in problems]
    return "; ".join(shown(lines, 5))
