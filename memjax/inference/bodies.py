"""Parse JSON request bodies field by field and report all problems at once."""

import json
from collections.abc import Mapping
from typing import Any

_MOST_SHOWN = 8
"""Maximum number of problems listed per body."""


class RefusedError(Exception):
    """A refused request: an HTTP status and an error object in OpenAI's format."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        kind = "authentication_error" if status == 401 else kind
        self.document = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        RefusedError: the body is not a JSON object in UTF-8, names a field twice, or holds NaN or infinity.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=unique_names)
    except UnicodeDecodeError as error:
        raise RefusedError(f"the body is not UTF-8 (byte {error.start}); send a JSON object in UTF-8") from None
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise RefusedError(f"the body is not JSON ({why}); send an object such as {_EXAMPLE}") from None
    if not isinstance(found, dict):
        raise RefusedError(f"the body is {_kind(found)}, not a JSON object; send one such as {_EXAMPLE}")
    return found


_EXAMPLE = '{"prompt": "Once", "max_tokens": 16}'


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the pairs, for `json.loads`; raises a ValueError if a name appears twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} appears twice")
        found[name] = value
    return found


class Fields:
    """Reads the fields of a body and collects all problems."""

    def __init__(self, body: Mapping[str, Any], known: Mapping[str, Any]):
        self.problems: list[tuple[str, str]] = []
        self._values = {**known, **{name: value for name, value in body.items() if value is not None and name in known}}
        for name in body:
            if name not in known:
                self.refuse(
                    _short(name), f"{shown(name)} is not a field of this request; known: {', '.join(sorted(known))}"
                )

    def refuse(self, name: str, message: str) -> None:
        """Records a problem with a field."""
        self.problems.append((name, message))

    def value(self, name: str) -> Any:
        """The value of a field, unchecked."""
        return self._values[name]

    def wrong(self, name: str, rule: str) -> None:
        """Records that a field breaks a rule."""
        self.refuse(name, f"{name}={shown(self._values[name])} must be {rule}")

    def flag(self, name: str) -> bool:
        """The boolean; False if the value is invalid."""
        if not isinstance(self._values[name], bool):
            self.wrong(name, "true or false")
        return self._values[name] is True

    def integer(self, name: str, low: int, high: int | None, rule: str) -> Any:
        """The whole number; None if it is absent or invalid."""
        value = self._values[name]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            self.wrong(name, rule)
            return None
        return value

    def number(self, name: str, low: float, high: float, rule: str, *, above: bool = False) -> float:
        """The number; `high` if the value is invalid."""
        value = self._values[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared before conversion: an integer may be too large for a float.
        if not is_number or not (low < value if above else low <= value) or not value <= high:
            self.wrong(name, rule)
            return high
        return float(value)

    def text(self, name: str) -> str | None:
        """The string; None if it is absent or invalid."""
        value = self._values[name]
        if value is not None and not isinstance(value, str):
            self.wrong(name, "a string")
            return None
        return value

    def finish(self) -> None:
        """Raises a RefusedError if anything was refused."""
        if self.problems:
            lines = [message for _, message in self.problems[:_MOST_SHOWN]]
            if len(self.problems) > _MOST_SHOWN:
                lines.append(f"and {len(self.problems) - _MOST_SHOWN:,} more")
            raise RefusedError("\n".join(lines), param=self.problems[0][0])


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value of a request as short JSON on one line, with control characters escaped."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return "a number of more than 70 digits"
    if isinstance(value, list | dict) and len(value) > 8:
        return f"{_kind(value)} with {len(value):,} entries"
    if isinstance(value, str):
        return json.dumps(_short(value))
    try:
        return _short(json.dumps(value))
    except (ValueError, RecursionError):
        return _kind(value)


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
