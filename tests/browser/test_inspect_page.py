"""The page of `inspect` in a headless Chromium: clicks and searches, at two widths, light and dark.

Not run by default, since not every machine has a browser. To run it: `pip install playwright`, have Chromium on the
path or `playwright install chromium`, then `python -m pytest tests/browser -m browser -n 0`.
"""

from typing import Any

import numpy as np
import pytest

from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.knowledge.page import document, render
from memjax.knowledge.trace import trace
from memjax.models.parts import DecoderParts

pytestmark = pytest.mark.browser

PROMPT = "Who <b>is</b> it?"


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    import jax

    memory = MemoryConfig(layers=(0, 2), num_keys=8, num_heads=1, top_k=3, key_dim=8, gate="none")
    config = ModelConfig(dim=16, num_layers=3, num_heads=2, ffn_dim=16, vocab_size=259, memory=memory)
    parts, tokenizer = DecoderParts.of(config), ByteTokenizer()
    model = parts.merge(*parts.init(jax.random.key(0)))
    found = trace(model, tokenizer.prompt(tokenizer.encode(PROMPT)), tokenizer.encode(" Ada"))
    changed = {"shared": {int(found.layers["L0"].slots[-1, 0])}}
    return document(found, tokenizer, config, changed=changed, title=PROMPT)


@pytest.fixture
def open_page(browser, values, tmp_path):
    """open_page(width, scheme): opens the page; the test fails if the page loads anything or reports an error."""
    (tmp_path / "page.html").write_text(render(values), encoding="utf-8")
    troubles: list[str] = []

    def opened(width: int = 1200, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("request", lambda request: troubles.extend([request.url] * (not request.url.startswith("file:"))))
        page.goto((tmp_path / "page.html").as_uri())
        return page

    yield opened
    assert troubles == []


def test_every_token_is_shown_as_text_and_the_last_one_of_the_prompt_is_chosen(open_page, values):
    page = open_page()
    assert page.inner_text("h1") == PROMPT
    tokens = page.locator(".token")
    assert tokens.count() == len(values["tokens"])
    pressed = [number for number in range(tokens.count()) if tokens.nth(number).get_attribute("aria-pressed") == "true"]
    assert pressed == [values["asked"]]
    assert page.locator(".layers .card h2").all_inner_texts() == [
        f"{layer['name']} adds {layer['total'][values['asked']]:+.3f}".replace("-", "\N{MINUS SIGN}")
        for layer in values["layers"]
    ]


def test_a_click_on_a_token_shows_its_slots_and_one_on_a_slot_its_other_readers(open_page, values):
    page = open_page()
    page.locator(".token").nth(2).click()
    layer = values["layers"][0]
    order = np.argsort(-np.abs(layer["added"][2]), kind="stable")
    slots = [f"{layer['name']}:{layer['slots'][2][pick]}" for pick in order]
    card = page.locator(".layers .card").first
    assert card.locator("button.slot").all_inner_texts() == slots
    card.locator("button.slot").first.click()
    number = int(slots[0].partition(":")[2])
    readers = sum(slot == number for picks in layer["slots"] for slot in picks)
    expected = f"{slots[0]} is read at {readers} of {len(values['tokens'])} tokens"
    assert page.inner_text("#slot h2") == expected


def test_a_search_marks_tokens_and_slots_and_patches_are_marked(open_page, values):
    page = open_page()
    page.fill("#search", "who")
    assert page.locator(".token.found").count() == 0  # bytes are tokens
    page.fill("#search", "W")
    assert page.locator(".token.found").count() == 1
    layer = values["layers"][0]
    page.locator(".token").nth(len(values["tokens"]) - 1).click()
    page.fill("#search", f"{layer['name']}:{layer['changed'][0]}")
    assert page.locator("tr.found.changed").count() == 1


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_and_text_has_contrast(open_page, width, scheme):
    page = open_page(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cards = page.locator(".layers .card").evaluate_all("cards => cards.map(card => card.getBoundingClientRect().left)")
    assert len(set(cards)) == (1 if width == 400 else 2), "side by side where there is room"
    luminance = """name => {
      const [r, g, b] = getComputedStyle(document.body)[name].match(/[0-9.]+/g).map(Number);
      return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
    }"""
    ink, paper = page.evaluate(luminance, "color"), page.evaluate(luminance, "backgroundColor")
    assert (ink < 0.3 and paper > 0.9) if scheme == "light" else (ink > 0.7 and paper < 0.2)
