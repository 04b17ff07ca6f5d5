"""Tests run offline, on one thread, at the smallest scale, unless the environment says otherwise."""

import os
import shutil
import signal

# before torch or transformers are imported; chapters under test inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SAE_LIB_SCALE", "smoke")

import jaxtyping
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for a background job: the tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def as_a_user():
    """The library as users run it: without the shape checker, so that its own errors are what speaks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def page():
    """A page of a real browser, where one is installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("no Chromium is installed")
        page = browser.new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page
        browser.close()
