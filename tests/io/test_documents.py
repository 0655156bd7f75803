import dataclasses

import pytest
from pydantic import PositiveInt

from memjax.io.documents import read_as


@dataclasses.dataclass
class Shape:
    size: PositiveInt
    names: dict[str, list[str]]
    step: int | None = None


def test_unknown_names_pass_and_defaults_may_be_absent():
    assert read_as(Shape, {"size": 1, "names": {"a": ["b"]}, "more": 5}) == Shape(1, {"a": ["b"]})


def deep(depth):
    return [deep(depth - 1)] if depth else 1


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (5, "it: "),
        ({"names": {}}, "size: Field required"),
        ({"size": "1", "names": {}}, "size: Input should be a valid integer"),
        ({"size": True, "names": {}}, "size: Input should be a valid integer"),
        ({"size": 0, "names": {}}, "size: Input should be greater than 0"),
        ({"size": 1, "names": {"a": [None]}}, "names.a.0: Input should be a valid string"),
        ({"size": 1, "names": {"a": [5] * 100}}, "; and 95 more"),
        ({"size": 1, "names": {"x" * 5000: 5}}, "x" * 190),
        ({"size": 1, "names": deep(500)}, "recursion limit"),
    ],
)
def test_an_invalid_document_is_reported_in_one_line(document, message):
    with pytest.raises(ValueError, match=message) as error:
        read_as(Shape, document)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 3000
