"""A real browser, headless, and pages of models in it. Without one these tests are skipped."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import grassmann as G
from explorer.__main__ import page
from text import vocabulary

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update "
         "--disable-background-networking --disable-sync --window-size=1280,900")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, driven by selenium; its log of messages and requests is kept."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no browser: selenium is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if program is None or chromedriver is None:
        pytest.skip("no browser: Chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def explore(browser, tmp_path):
    """explore(file or parameters, …): the page, opened; see `Page`."""

    def explore(what, config=None, vocab=None, text="", hash=""):
        path = what
        if config is not None:
            path = tmp_path / "explorer.html"
            extra = {"vocab": vocab, "most_common": 0, "best": None}
            path.write_text(page(what, config, extra, "test.npz", text, "../tutorial.md"), encoding="utf-8")
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(f"{path.resolve().as_uri()}{hash}")
        return Page(browser)

    return explore


class Page:
    """An open page: run JavaScript in it, type, read what stands there."""

    def __init__(self, browser):
        self.browser = browser

    def js(self, code, *args):
        return self.browser.execute_script(code, *args)

    def logits(self, text):
        """(T, V), float64."""
        return np.array(self.js("return explorer.logits(arguments[0])", text))

    def text(self, selector):
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def click(self, selector):
        self.js("document.querySelector(arguments[0]).click()", selector)

    def type(self, text):
        """Put a text into the box, all at once, and wait until it is read."""
        self.js("const box = document.getElementById('text'); box.value = arguments[0];"
                "box.dispatchEvent(new Event('input'))", text)
        self.wait()

    def wait(self, condition="explorer.done()"):
        self.browser.set_script_timeout(60)
        done = self.browser.execute_async_script(
            f"const done = arguments[0], look = () => {condition} ? done(true) : setTimeout(look, 5); look()")
        assert done

    def bits(self):
        """The surprise at every character but the first."""
        return np.array(self.js("const r = explorer.shown(); return r.tokens.map((_, t) => r.bits(t)).slice(1)"))


@pytest.fixture
def random_model():
    """random_model(…): small, with names for its letters; weights large enough to matter."""
    def random_model(**sizes):
        vocab = vocabulary("abcdefgh ijklm\nnopq")
        config = G.Config(len(vocab), **{"context": 40, "n_layer": 2, "d_model": 24, "rank": 6} | sizes)
        params, rng = G.init_params(config), np.random.default_rng(1)
        for name, value in params.items():
            if name != "E" and not name.endswith(".w"):
                value += (0.3 * rng.standard_normal(value.shape)).astype(np.float32)
        params["E"] *= 30
        return SimpleNamespace(params=params, config=config, vocab=vocab)

    return random_model


@pytest.fixture(params=["default", "paper", "average", "normalized taps", "positions", "sizes", "memory"])
def variant(request, random_model):
    """A small random model of every kind."""
    kinds = {
        "default": {}, "paper": {"block": "paper", "taps": False, "normalize": True, "positions": True},
        "average": {"taps": False, "offsets": ((1, 3), (2, 5))}, "normalized taps": {"normalize": True},
        "positions": {"positions": True, "context": 21}, "memory": {"memory": True},
        "sizes": {"n_layer": 3, "d_model": 21, "rank": 7, "d_ff": 10, "offsets": ((1,), (4, 2, 30), (9,))},
    }
    return random_model(**kinds[request.param])
