"""A headless Chromium before two servers: the demo model without keys, and an engine of fakes with keys.

The browser and its loop live as long as one module's tests: asyncio allows no second loop beside it.
"""

import asyncio
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.masks import Mask
from server.engines.base import GenerateRequest
from server.engines.fake import FakeEngine
from server.engines.transformers import TransformersEngine
from tests.clients.conftest import serving
from tests.server.keying import key_file

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make install")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAUSE_SECONDS = 0.02  # between two tokens of the fake engine: what streams can be seen to


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}: apt-get install chromium")
    # Chromium refuses to run as root in its sandbox; the pages are ours.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """The demo model's address."""
    with serving(TransformersEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo")) as address:
        yield address


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that wants keys: `free` has no floor, that of `bound` is `balanced`."""

    async def pause(_request: GenerateRequest, _index: int) -> None:
        await asyncio.sleep(PAUSE_SECONDS)

    path: Path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys = key_file(path, free={"floor": "off"}, bound={"floor": "balanced"})
    engine = FakeEngine(before_token=pause)
    with ThreadPoolExecutor(1) as elsewhere:  # the browser's loop runs in this thread
        elsewhere.submit(asyncio.run, engine.use_mask(Mask.load(MASK_FILE))).result()
    with serving(engine, keys=keys) as address:
        yield address


@pytest.fixture
def pages(browser: Any) -> Iterator[Any]:
    """Opens an address in a tab of its own; whatever the page writes to its console fails the test."""
    said: list[str] = []
    contexts: list[Any] = []

    def open_page(address: str, refused: bool = False, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": 1360, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: said.append(str(error)))
        # Chromium itself logs an answer of 401 as an error, whatever the page makes of it.
        page.on("console", lambda one: None if refused and "401" in one.text else said.append(one.text))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said, said
