"""JSON that somebody else may have written: its shape is checked before anything in it is used."""

import json
from typing import Any

import pydantic

_SHOWN = 5
"""Problems of a document that a message lists."""
_LETTERS = 300


def check_shape(document: Any, shape: Any) -> None:
    """Compares a JSON value with the type that it should have, such as a dataclass; unknown names are let pass.

    Raises:
        ValueError: it has another shape; the message is a line.
    """
    try:
        pydantic.TypeAdapter(shape).validate_json(json.dumps(document), strict=True)
    except pydantic.ValidationError as error:
        raise ValueError(listed(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def line_of(error: BaseException) -> str:
    """What an error says, in one line that is not too long for a message around it."""
    text = " ".join(str(error).split())
    return text[:_LETTERS] if text else type(error).__name__


def listed(error: pydantic.ValidationError) -> str:
    """The first problems of a document in one line, each with its place."""
    problems = error.errors(include_input=False, include_url=False)
    lines = [f"{'.'.join(map(str, one['loc']))[:200] or 'it'}: {one['msg'][:200]}" for one in problems[:_SHOWN]]
    more = [f"and {len(problems) - _SHOWN:,} more"] if len(problems) > _SHOWN else []
    return "; ".join([*lines, *more])
