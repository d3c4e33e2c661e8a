"""Chromium, for tests of pages."""

import contextlib
import importlib.util
import shutil

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

needs_browser = pytest.mark.skipif(
    not importlib.util.find_spec("playwright") or not BROWSER,
    reason="needs Playwright (pip install playwright) and Chromium",
)

DEVICES = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}


@contextlib.contextmanager
def opened(browser, address, **options):
    """A tab with the page, which may ask no other machine for anything."""
    asked = set()
    context = browser.new_context(**options)
    tab = context.new_page()
    tab.set_default_timeout(60_000)
    tab.on("request", lambda request: asked.add(request.url))
    tab.goto(address)
    yield tab
    context.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
