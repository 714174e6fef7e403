"""A real browser, headless, and pages of models in it. Without one these tests are skipped."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import grassmann as G
from charlm.text import vocabulary
from explorer.__main__ import page

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--disable-component-update",
    "--disable-background-networking",
]
PAGE = Path(__file__).resolve().parents[2] / "explorer" / "explorer.html"
KINDS = {
    "default": {},
    "paper": {"block": "paper", "taps": False, "normalize": True, "positions": True, "context": 21},
    "average": {"taps": False, "offsets": ((1, 3), (2, 5))},
    "memory": {"memory": True},
    "sizes": {
        "n_layer": 3,
        "d_model": 21,
        "rank": 7,
        "d_ff": 9,
        "offsets": ((1,), (4, 2, 30), (9,)),
        "normalize": True,
    },
}


def random_model(letters="abcdefgh ijklm\nnopq", **sizes):
    """A small model that knows these letters; its weights are large enough to matter."""
    vocab, rng = vocabulary(letters), np.random.default_rng(1)
    config = G.Config(len(vocab), **{"context": 40, "n_layer": 2, "d_model": 24, "rank": 6} | sizes)
    params = G.init_params(config)
    for name, value in params.items():
        if name != "E" and not name.endswith(".w"):
            value += (0.3 * rng.standard_normal(value.shape)).astype(np.float32)
    params["E"] *= 30
    return SimpleNamespace(params=params, config=config, vocab=vocab)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, driven by selenium; its log of messages and requests is kept."""
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="no browser: selenium is not installed"
    )
    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    program, chromedriver = next(filter(None, programs), None), shutil.which("chromedriver")
    if program is None or chromedriver is None:
        pytest.skip("no browser: Chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def explore(browser, tmp_path):
    """explore(file or a model, text, …): the page, opened and read to its end."""

    def explore(what=PAGE, text="a", hash="", wait=True, size=(1280, 800)):
        if isinstance(what, SimpleNamespace):
            model, what, extra = (
                what,
                tmp_path / "explorer.html",
                {"vocab": what.vocab, "most_common": 0},
            )
            what.write_text(
                page(model.params, model.config, extra, "test.npz", text), encoding="utf-8"
            )
        screen = {
            "width": size[0],
            "height": size[1],
            "deviceScaleFactor": 1,
            "mobile": size[0] < 500,
        }
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(f"{what.as_uri()}{hash}")
        return Page(browser, "explorer.done()" if wait else "true")

    return explore


class Page:
    """An open page: run JavaScript in it, type, read what stands there."""

    def __init__(self, browser, condition):
        self.browser = browser
        self.wait(condition)

    def js(self, code, *args):
        """The value of an expression, or what statements return."""
        code = code if "return " in code or ";" in code else f"return {code}"
        return self.browser.execute_script(code, *args)

    def text(self, selector):
        return self.js("document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector):
        return self.js(
            "[...document.querySelectorAll(arguments[0])].map(node => node.textContent.trim())",
            selector,
        )

    def click(self, selector, wait="explorer.done()"):
        self.js("document.querySelector(arguments[0]).click()", selector)
        self.wait(wait)

    def type(self, text):
        self.js("box.value = arguments[0]; box.oninput()", text)
        self.wait()

    def wait(self, condition="explorer.done()"):
        self.browser.set_script_timeout(60)
        self.browser.execute_async_script(f"""
            const done = arguments[0];
            const look = () => {condition} ? done() : setTimeout(look, 5);
            look()""")

    def bits(self):
        return np.array(
            self.js("const r = explorer.shown(); return r.tokens.map((_, t) => r.bits(t)).slice(1)")
        )
