"""The page is a single file that shows any text as plain text."""

import html.parser
import json
import re

import pytest

from memjax.data.tokenizers.base import ByteTokenizer
from memjax.knowledge.page import document, render, text_of
from memjax.knowledge.trace import trace

HOSTILE = "</script><script>alert(1)</script><!-- @DATA@ \" ' & \u2028"


class Outline(html.parser.HTMLParser):
    """Collects the elements of a page and the text of its scripts."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts, self.inside = [], [], None

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        if self.inside in ("title", "h1"):
            self.elements.append((f"{self.inside} text", data))


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    return found


@pytest.fixture(scope="module")
def values(model_of):
    model, tokenizer = model_of("peer"), ByteTokenizer()
    found = trace(model, tokenizer.prompt(tokenizer.encode(HOSTILE)), tokenizer.encode("yes"))
    changed = {"experts_2_inputs": {int(found.layers["L2"].slots[0, 0])}}
    return document(found, tokenizer, model.config, changed=changed, title=HOSTILE)


def test_hostile_text_stays_text(values):
    found = outline(render(values))
    assert [tag for tag, _ in found.elements].count("script") == 2
    assert ("title text", HOSTILE) in found.elements or "".join(
        text for tag, text in found.elements if tag == "title text"
    ) == HOSTILE
    assert json.loads(found.scripts[0]) == values
    assert "innerHTML" not in found.scripts[1]


def test_the_data_hold_every_token_layer_and_slot(values):
    assert "".join(token["text"] for token in values["tokens"][1:]).startswith("</script>")
    assert values["tokens"][0]["text"] == "<bos>"
    assert values["tokens"][values["asked"]]["next"] == "y"
    assert [layer["name"] for layer in values["layers"]] == ["L0", "L2"]
    for layer in values["layers"]:
        for part in ("slots", "weights", "added", "effect"):
            assert [len(row) for row in layer[part]] == [6] * len(values["tokens"])
    assert values["layers"][1]["tables"] == ["experts_2_inputs", "experts_2_outputs"]
    assert values["layers"][1]["changed"] == [values["layers"][1]["slots"][0][0]]
    assert values["layers"][0]["changed"] == []


def test_nothing_is_loaded_from_elsewhere(values):
    page = render(values | {"title": "a title"})
    assert not re.search(r"(?:https?:)?//[a-z]", page)
    found = outline(page)
    assert not [
        attrs for tag, attrs in found.elements if isinstance(attrs, dict) and ("src" in attrs or "href" in attrs)
    ]
    policy = next(attrs["content"] for tag, attrs in found.elements if tag == "meta" and "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    assert {"tokens", "layers", "slot", "search", "order", "data"} <= {
        attrs.get("id") for _, attrs in found.elements if isinstance(attrs, dict)
    }


def test_tokens_are_shown_by_name_text_or_number():
    tokenizer = ByteTokenizer()
    assert [text_of(tokenizer, token) for token in (1, 68, 200)] == ["<bos>", "A", "<0xC5>"]
