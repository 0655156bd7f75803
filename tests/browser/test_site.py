"""The site in a headless Chromium: it fits a phone, shows pictures in both schemes, copies code and finds guides.

Not run by default; test_inspect_page.py says what it needs besides the extra `docs`.
"""

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.browser

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ("index", "quickstart", "results", "recipes", "notebooks/train_and_look", "configuration")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "-n", "-W", "docs", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_is_wider_than_the_window_and_no_word_of_a_picture_is_cut(site, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    for name in PAGES:
        page.goto((site / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        cut = page.evaluate("""() => [...document.querySelectorAll('.picture svg')].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(text => {
                const box = text.getBoundingClientRect();
                return box.left < frame.left - 1 || box.right > frame.right + 1;
            }).map(text => text.textContent);
        })""")
        assert cut == [], name


def test_the_first_screen_has_the_sentence_the_picture_the_curve_and_how_to_install(site, browser):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto((site / "index.html").as_uri())
    shown = ".landing p >> nth=0", ".landing svg >> nth=0", ".landing svg >> nth=1", "pre:has-text('memjax train')"
    for selector in shown:
        box = page.locator(selector).first.bounding_box()
        assert box["y"] + box["height"] <= 900, selector


def test_blocks_of_code_have_a_button_that_copies_them(site, browser):
    page = browser.new_page()
    page.goto((site / "quickstart.html").as_uri())
    assert page.locator("button.copybtn").count() == page.locator("div.highlight pre").count()


@pytest.mark.parametrize(
    ("words", "page_name"),
    [
        ("sweep", "watching"),
        ("bits per byte", "evaluation"),
        ("tensorboard", "watching"),
        ("notebook", "notebooks/"),
        ("edit fact", "knowledge"),
        ("orbax", "recipes"),
    ],
)
def test_a_search_finds_the_guide_among_the_first_three(site, browser, words, page_name):
    page = browser.new_page()
    page.goto(f"{(site / 'search.html').as_uri()}?q={words.replace(' ', '+')}")
    page.wait_for_selector("ul.search li a")
    page.wait_for_function("!document.querySelector('#search-progress')?.textContent.includes('...')")
    found = [link.get_attribute("href") for link in page.locator("ul.search li > a").all()[:3]]
    assert any(page_name in address for address in found), found
