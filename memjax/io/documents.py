"""JSON documents from untrusted sources: their structure is validated before they are used."""

import json
from typing import Any, TypeVar

import pydantic

T = TypeVar("T")

_SHOWN = 5
"""Problems of a document that a message lists."""
_MOST_CHARACTERS = 300


def read_as(shape: type[T], document: Any) -> T:
    """A JSON value as the type that it should be of, such as a dataclass; unknown names are ignored.

    Raises:
        ValueError: it has another shape; the message is a line.
    """
    try:
        # JSON is what pydantic reads strictly and yet turns lists into tuples and 1 into 1.0 from.
        return pydantic.TypeAdapter(shape).validate_json(json.dumps(document), strict=True)
    except pydantic.ValidationError as error:
        raise ValueError(listed(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def line_of(error: BaseException) -> str:
    """The message of an error in one short line, for use in another message."""
    text = " ".join(str(error).split())
    return text[:_MOST_CHARACTERS] if text else type(error).__name__


def listed(error: pydantic.ValidationError) -> str:
    """The first problems of a document in one line, each with its place."""
    problems = error.errors(include_input=False, include_url=False)
    lines = [f"{'.'.join(map(str, one['loc']))[:200] or 'it'}: {one['msg'][:200]}" for one in problems[:_SHOWN]]
    more = [f"and {len(problems) - _SHOWN:,} more"] if len(problems) > _SHOWN else []
    return "; ".join([*lines, *more])
