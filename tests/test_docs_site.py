"""The documentation site: built without a warning, and opened in a browser."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or ""

if not all(map(importlib.util.find_spec, ("material", "mkdocstrings", "mkdocs_jupyter"))):
    pytest.skip("mkdocs is missing: run make docs", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=REPOSITORY, check=True, env=environment, timeout=300)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: run make docs")
    if not BROWSER:
        pytest.skip("no chromium: apt install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_site_works_in_a_browser(site: str, browser: Any, width: int) -> None:
    allowed = ["clipboard-read", "clipboard-write"]
    page = browser.new_page(viewport={"width": width, "height": 900}, permissions=allowed)
    page.set_default_timeout(120_000)  # of a loaded machine
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{site}/index.html")
    page.get_by_role("article").get_by_role("link", name="Prune your own model").click()
    page.wait_for_url("**/own-model.html")
    assert page.get_by_role("heading", level=1).inner_text().startswith("Prune your own model")

    page.locator("[data-clipboard-target]").first.click(force=True)
    page.get_by_text("Copied to clipboard").wait_for()
    assert "import timm" in page.evaluate("navigator.clipboard.readText()")

    if width < 1000:
        page.locator("label.md-header__button[for=__search]").click()
    page.get_by_role("textbox", name="Search").press_sequentially("unpack")
    page.locator(".md-search-result__link").first.wait_for()
    assert any("unpack" in text.lower() for text in page.locator(".md-search-result__link").all_inner_texts())

    page.goto(f"{site}/guide/quickstart.html")
    assert page.get_by_text("PruneWrapper(").first.is_visible()

    page.goto(f"{site}/reference/run.html")
    assert page.get_by_role("heading", name="fuse", exact=False).first.is_visible()
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0  # nothing is cut off
    assert not errors
