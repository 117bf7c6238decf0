"""A headless Chromium for tests of pages: the system's own, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def browser() -> Iterator[Browser]:
    """Yields a browser; skips the test where there is no Chromium."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=_QUIET)
        try:
            yield started
        finally:
            started.close()


def watched_page(
    own: Browser, *, width: int = 1280, height: int = 900, dark: bool = False
) -> tuple[Page, list[str]]:
    """Returns a page without network beyond this machine, and the list of what went wrong in it.

    The list grows with each console error, uncaught exception and request to another machine.
    """
    context = own.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    page, faults = context.new_page(), []
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))

    def watch(url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:", "http://127.0.0.1", "http://localhost")):
            faults.append(f"request to {url}")

    page.on("request", lambda request: watch(request.url))
    return page, faults


def screenshot(page: Page, path: Path) -> None:
    """Saves the whole page as a PNG file, to be looked at."""
    page.screenshot(path=path, full_page=True)
