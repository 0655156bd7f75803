"""The browser that shows the pages."""

import importlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as engine:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        launched = engine.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()
