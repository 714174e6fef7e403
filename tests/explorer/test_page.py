"""The page that lies in the repository: what it draws, what its controls do, what it survives."""

import itertools
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

import grassmann as G
from checkpoint import load_checkpoint, save_checkpoint
from text import encode, load_text, text_sha256

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "explorer" / "explorer.html"
TEXT = "MENENIUS:\nYou are a fair viol, your sense the strings,\nWho, fingered, make man his lawful music;\n" * 2


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(ROOT / "shakespeare.npz")


def seen(params, config, tokens, off=lambda params, config: (params, config)):
    """What Python sees: cache of the blocks, surprise in bits (T-1), logits (T, V)."""
    params, config = off({name: a.copy() for name, a in params.items()}, config)
    logits, cache = G.model_forward(params, config, np.array([tokens]))
    log_p = logits[0] - np.log(np.exp(logits[0]).sum(-1, keepdims=True))
    return cache["blocks"], -log_p[np.arange(len(tokens) - 1), tokens[1:]] / np.log(2), logits[0]


def basis(z, s):
    return np.linalg.qr(np.stack([z, s], 1).astype(float))[0]


def angles(A, B):
    """The principal angles between planes, by their sines where they are small."""
    cosine = np.linalg.svd(A.T @ B, compute_uv=False).clip(0, 1)
    sine = np.linalg.svd(B - A @ (A.T @ B), compute_uv=False)[::-1]
    return np.arctan2(sine, cosine)


# ---- the model in the repository -------------------------------------------------------------------

def test_shakespeare_npz_predicts_a_passage_that_it_was_not_trained_on(shipped):
    params, config, extra = shipped
    assert (ROOT / "shakespeare.npz").stat().st_size <= 3_000_000
    assert str(Path.home()) not in str(extra) and "/" not in str(extra["settings"])
    passage = """PETRUCHIO:
Good Lord, how bright and goodly shines the moon!

KATHARINA:
The moon! the sun: it is not moonlight now.

PETRUCHIO:
I say it is the moon that shines so bright.

KATHARINA:
I know it is the sun that shines so bright.
"""
    tokens = encode(passage, extra["vocab"]).astype(int)
    assert G.validation_loss(params, config, tokens) == pytest.approx(1.2704, abs=1e-3)


def test_shakespeare_npz_has_the_validation_loss_that_it_says(shipped):
    params, config, extra = shipped
    base = {"linux": "~/.cache"}.get(sys.platform, "~/Library/Caches")
    path = Path(base).expanduser() / "grassmann" / "shakespeare.txt"
    if not path.exists():
        pytest.skip("Tiny Shakespeare is not in the cache")
    text = load_text(str(path))
    assert text_sha256(text) == extra["text_sha256"]
    held_out = encode(text[-(len(text) // 10):], extra["vocab"])
    assert G.validation_loss(params, config, held_out) == pytest.approx(extra["best"][1], abs=1e-3)


def test_the_page_is_what_the_maker_makes_of_it(tmp_path):
    out = ROOT / "explorer" / "test.html"
    try:
        make(ROOT / "shakespeare.npz", "--text", "@explorer/passage.txt", "--out", out)
        assert out.read_bytes() == PAGE.read_bytes(), "tests/explorer/ship.py makes it anew"
    finally:
        out.unlink(missing_ok=True)
    assert PAGE.stat().st_size <= 3_000_000


def make(*args):
    command = [sys.executable, "-m", "explorer", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_page_of_ones_own_and_what_has_none(tmp_path):
    config = G.Config(3, n_layer=1, d_model=4, rank=2, context=4)
    more = {"vocab": [97, 98, 99], "most_common": 0}
    save_checkpoint(tmp_path / "best.npz", G.init_params(config), config, **more)
    done = make(tmp_path / "best.npz")
    assert done.returncode == 0 and (tmp_path / "explorer.html").exists()
    done = make(tmp_path / "best.npz", "--text", "abz")
    assert done.returncode == 2 and "'z'" in done.stderr
    config = G.Config(3, n_layer=1, d_model=4, context=4, mixer="attention", n_head=2)
    save_checkpoint(tmp_path / "attention.npz", G.init_params(config), config, **more)
    done = make(tmp_path / "attention.npz")
    assert done.returncode == 2 and "mixes by attention" in done.stderr and done.stderr.count("\n") == 1


def test_every_link_leads_to_a_section_of_the_tutorial():
    headings = re.findall(r"^#+ (.+)$", (ROOT / "tutorial.md").read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r'href="\.\./tutorial\.md#([^"]+)"', PAGE.read_text(encoding="utf-8"))
    assert links and set(links) <= anchors


def test_a_term_explains_itself_and_leads_to_the_lesson_in_another_tab(explore, browser):
    from selenium.webdriver import Keys
    page = explore(PAGE)
    terms = browser.find_elements("css selector", "header a[title], #layers a[title], #key a[title]")
    for term in terms:
        if not term.is_displayed():
            continue
        assert "\n" not in term.get_attribute("title")
        term.send_keys(Keys.ENTER)
        link = browser.find_element("css selector", "#gloss a")
        assert page.text("#gloss span") == term.get_attribute("title") and link.is_displayed()
        assert page.js("return document.activeElement.id") == "gloss"  # so that it is read aloud
        assert link.get_attribute("href") == term.get_attribute("href")
        box, place = browser.find_element("id", "gloss").rect, term.rect
        assert 0 <= box["y"] - place["y"] <= 60 and box["x"] + box["width"] <= 1280
        browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        assert not link.is_displayed() and page.js("return document.activeElement === arguments[0]", term)
    for term in terms[:2]:  # one after the other, without closing it
        term.send_keys(Keys.ENTER)
        gloss = browser.find_element("id", "gloss").rect
        assert gloss["x"] <= term.rect["x"] + 2 and 0 <= gloss["y"] - term.rect["y"] <= 60
    said = " ".join(page.js("return [...document.querySelectorAll('a[title]')].map(node => node.title)"))
    for word in ("State", "Plane", "Wedge", "Partner", "share", "Gate", "Principal angles", "2.22", "±", "Grassmannian"):
        assert word in said
    tabs = len(browser.window_handles)
    terms[0].send_keys(Keys.ENTER)
    browser.find_element("css selector", "#gloss a").send_keys(Keys.ENTER)
    assert len(browser.window_handles) == tabs + 1 and browser.current_url.startswith(PAGE.as_uri())
    first, *others = browser.window_handles
    for other in others:
        browser.switch_to.window(other)
        browser.close()
    browser.switch_to.window(first)


# ---- what is drawn ---------------------------------------------------------------------------------

def test_logits_equal_those_of_the_checkpoint(explore, shipped):
    params, config, extra = shipped
    page, tokens = explore(PAGE), encode(TEXT * 12, extra["vocab"])[:2000]
    logits = G.forward(params, config, tokens[None])[0]
    assert np.abs(page.logits((TEXT * 12)[:2000]) - logits).max() <= 1e-4 * np.abs(logits).max()


@pytest.mark.parametrize("t", [0, 1, 5, 17, 20, 33, 60, 77, 100, 150])
def test_numbers_on_the_page_are_those_of_python(explore, shipped, t):
    params, config, extra = shipped
    page, tokens = explore(PAGE, hash=f"#text={quote(TEXT)}&at={t}"), encode(TEXT, extra["vocab"])
    page.wait()
    blocks, bits, logits = seen(params, config, tokens)
    if t:
        assert f"surprise of {bits[t - 1]:.2f} bits" in page.text("#chosen")
    assert page.text("#loss") == f"Loss: {bits.mean():.2f} bits a character."
    p = np.exp(logits[t] - logits[t].max())
    p /= p.sum()
    likeliest = page.js("return [...document.querySelectorAll('#next tr')].map(row => row.textContent)")
    for row, k in zip(likeliest[:10], np.argsort(-p), strict=False):
        shown = float(re.search(r"([\d.]+)%", row)[1]) / 100
        assert shown == pytest.approx(p[k], abs=0.006)
    for i, block in enumerate(blocks):
        z, s, alpha = (block["mix"][name][0].astype(float) for name in ("z", "s", "alpha"))
        look = page.js("return explorer.shown().look(arguments[0], arguments[1])", t, i)
        area = np.linalg.norm(G.plucker(z[t], s[t]))
        angle = np.arctan2(area, z[t] @ s[t])
        np.testing.assert_allclose([look["z"], look["s"], look["area"], look["alpha"]],
            [np.linalg.norm(z[t]), np.linalg.norm(s[t]), area, alpha[t].mean()], rtol=1e-3, atol=1e-3)
        drawn = page.js("return [...document.querySelectorAll('.card')[arguments[0]].querySelectorAll('b')]"
                        ".map(node => node.textContent.trim())", i)
        if t:
            assert look["angle"] == pytest.approx(angle, abs=1e-3)
            assert float(drawn[2].rstrip("°")) == pytest.approx(np.degrees(angle), abs=0.6)
        assert float(drawn[0]) == pytest.approx(np.linalg.norm(z[t]), abs=0.02)
        assert drawn[4] == f"{100 * alpha[t].mean():.0f}%"
        terms = np.array([np.linalg.norm(params[f"blocks.{i}.mix.taps"][k] * z[t - n]) if n <= t else 0
                          for k, n in enumerate(config.offsets[i])])
        np.testing.assert_allclose(look["share"], terms / max(terms.sum(), 1e-9), atol=1e-3)
        lengths = np.array([[np.linalg.norm(params[f"blocks.{i}.mix.taps"][k] * z[u - n]) if n <= u else 0
                             for k, n in enumerate(config.offsets[i])] for u in range(len(tokens))])
        means = 100 * (lengths / lengths.sum(1, keepdims=True).clip(1e-9)).mean(0)
        card = page.js("return document.querySelectorAll('.card')[arguments[0]].textContent", i)
        said = re.findall(r"(\d+) back ([\d.]+)%", card.split("shares, mean over the text:")[1])
        assert [int(n) for n, _ in said] == list(config.offsets[i])
        assert [float(x) for _, x in said] == pytest.approx(means, abs=0.51)
        assert ("here s is 0, so no plane; the mixer adds own state and a bias" in card) == (t == 0)
        if t > 1:
            expected = angles(basis(z[t - 1], s[t - 1]), basis(z[t], s[t]))
            np.testing.assert_allclose(look["angles"], expected, atol=1e-3)
            dials = page.js("return [...document.querySelectorAll('.card')[arguments[0]].querySelectorAll('.dial + text')]"
                            ".map(node => node.textContent)", i)
            assert [float(x.rstrip("°")) for x in dials] == pytest.approx(np.degrees(expected), abs=0.6)


def test_the_planes_of_words_and_their_steps_are_those_of_python(explore, shipped):
    params, config, extra = shipped
    page, tokens = explore(PAGE, hash=f"#text={quote(TEXT)}&tab=flow&scale=words"), encode(TEXT, extra["vocab"])
    page.wait("document.querySelectorAll('#paths .card').length === 4")
    blocks, _, _ = seen(params, config, tokens)
    for i, block in enumerate(blocks):
        z, s = (block["mix"][name][0].astype(float) for name in ("z", "s"))
        planes = []
        for word in re.finditer(r"\S+", TEXT):
            A = sum(np.outer(z[t], s[t]) - np.outer(s[t], z[t]) for t in range(*word.span()))
            planes.append(np.linalg.svd(A)[0][:, :2])
        steps = [np.linalg.norm(angles(A, B)) for A, B in itertools.pairwise(planes)]
        points = page.js("return path(explorer.shown(), arguments[0], 'words').points", i)
        np.testing.assert_allclose([p["step"] for p in points], steps, atol=1e-3)
        apart = [np.linalg.norm(angles(A, B)) for k, A in enumerate(planes) for B in planes[:k]]
        assert np.mean([p["noise"] for p in points]) == pytest.approx(np.mean(apart), abs=0.03)
        card = page.js("return document.querySelectorAll('#paths .card')[arguments[0]].textContent", i)
        assert float(re.search(r"mean step ([\d.]+)", card)[1]) == pytest.approx(np.mean(steps), abs=1e-3)
        assert "no flow" in card


def test_a_step_on_a_path_is_named_and_chosen(explore, browser):
    from selenium.webdriver import ActionChains
    page = explore(PAGE, hash=f"#text={quote(TEXT)}&tab=flow&scale=words&at=0")
    page.wait("document.querySelectorAll('#paths .point').length === 4")
    words, named = [*re.finditer(r"\S+", TEXT)], "#paths .card:nth-child(3) .point"
    assert page.text(named) == ""  # no step leads to the first word
    svg = browser.find_elements("css selector", "#paths svg")[2]
    for k, choose in ((7, False), (12, True), (7, False)):
        away = (words[k].start() + 0.5) / len(TEXT) - 0.5  # from the middle, of the width
        ActionChains(browser).move_to_element_with_offset(svg, round(away * svg.rect["width"]), 0).perform()
        point = page.js("return path(shown(), 2, 'words').points[arguments[0]]", k - 1)
        assert page.text(named) == f"“{words[k - 1][0]}” → “{words[k][0]}”: {point['step']:.2f}, others {point['noise']:.2f}"
        if choose:
            ActionChains(browser).click().perform()
            assert page.js("return [explorer.state.at, $('text').selectionStart]") == [words[k].start(), words[k].start() + 1]
    assert page.js("return explorer.state.at") == words[12].start()


def test_what_is_said_of_a_path_agrees_with_its_numbers(explore):
    page = explore(PAGE, hash="#tab=flow&scale=words")
    page.wait("document.querySelectorAll('#paths .card').length === 4")
    said = page.js("return [...document.querySelectorAll('#paths .card')].map(card => card.textContent)")
    for card in said:
        ratio, error = map(float, re.search(r"ratio ([\d.]+) ± ([\d.]+)", card).groups())
        if found := re.search(r"neighbours ([\d.]+)% (nearer|farther)", card):
            assert float(found[1]) == pytest.approx(abs(100 * (ratio - 1)), abs=0.1 + 1e-9)
            assert (found[2] == "nearer") == (ratio < 1)
        else:
            assert abs(ratio - 1) <= max(2 * error, 0.01) + 1.5e-3
    assert any("farther" in card for card in said)
    page.click("[value='blocks of 256']")
    page.wait("document.querySelector('#paths').textContent.includes('blocks of 256')")
    page.wait("document.querySelectorAll('#paths .card').length === 4")
    assert "blocks of 256: too short a text: 1 of at least 8 steps" in page.text("#paths")
    assert "±" not in page.text("#paths") and page.js("return document.querySelectorAll('#paths svg').length") == 0


def test_every_scale_finds_its_pieces(explore):
    page = explore(PAGE)
    for scale, expected in {"characters": 9, "words": 3, "lines": 2, "blocks of 64": 0}.items():
        assert len(page.js("return pieces('ab c\\n\\ndef', arguments[0])", scale)) == expected
        page.click(f"[name=scale][value='{scale}']")
        assert page.js("return form.scale.value") == scale


def test_a_slow_path_is_a_flow_and_a_random_one_is_not(explore):
    """Planes that turn by little from step to step, and the same planes shuffled."""
    page = explore(PAGE)
    angle = np.linspace(0, np.pi / 2, 60)
    rows = [[np.r_[np.cos(a), 0, np.sin(a), 0].tolist(), [0, 1, 0, 0]] for a in angle]
    code = """const rows = arguments[0].map(([z, s]) => ({ layers: [{ z, s }] }));
        return path({ tokens: rows.map(() => 1), rows }, 0, "characters").ratio"""
    assert page.js(code, rows) < 0.2
    assert page.js(code, [rows[k] for k in np.random.default_rng(0).permutation(60)]) == pytest.approx(1, abs=0.2)


# ---- touching --------------------------------------------------------------------------------------

def without(part, layer=2):
    """The same model in Python with a part switched off."""
    def off(params, config):
        prefix = f"blocks.{layer}.mix."
        if part == "wedge":
            params[f"{prefix}W_plu"] *= 0
        elif part == "gate":
            params[f"{prefix}W_gate"] *= 0
            params[f"{prefix}b_gate"] *= 0
        elif part == "mixer":
            params[f"{prefix}W_gate"] *= 0
            params[f"{prefix}b_gate"] *= 0
            params[f"{prefix}b_gate"] -= 1e9  # α = 0: g alone, which is nothing
            params[f"{prefix}W_plu"] *= 0
            params[f"{prefix}b_plu"] *= 0
        else:
            params[f"{prefix}taps"][config.offsets[layer].index(int(part))] = 0
        return params, config
    return off


@pytest.mark.parametrize("part", ["1", "6", "wedge", "gate", "mixer"])
def test_what_is_switched_off_is_off(explore, shipped, part):
    params, config, extra = shipped
    page, tokens = explore(PAGE, hash=f"#text={quote(TEXT)}"), encode(TEXT, extra["vocab"])
    top = "return document.getElementById('next').getBoundingClientRect().top"
    page.wait()
    place = page.js(top)
    page.click(f"[data-keys='3-{part}']")
    page.wait()
    assert page.js(top) == place
    _, whole, before = seen(params, config, tokens)
    _, bits, after = seen(params, config, tokens, without(part))
    np.testing.assert_allclose(page.bits(), bits, atol=2e-3)
    assert f"{whole.mean():.2f} → {bits.mean():.2f} bits" in page.text("#loss")
    changed = page.js("return [...document.querySelectorAll('#cells span')].map(x => x.classList.contains('changed'))")
    assert changed == (before.argmax(-1) != after.argmax(-1)).tolist()
    label = f"offset {part}" if part.isdigit() else part
    assert page.text("#changes").startswith(f"Off: layer 3 {label}. At {sum(changed)} of")
    said = " ".join(page.js("choose(arguments[0]); return $('guess').textContent", 40).split())
    letters = []
    for logits in (before[40], after[40]):
        p, k = np.exp(logits - logits.max()), logits.argmax()
        letters.append((chr(extra["vocab"][k]).replace("\n", "↵").replace(" ", "␣"), 100 * p[k] / p.sum()))
    found = re.fullmatch(r"Here likeliest: (.) ([\d.]+)% → (.) ([\d.]+)%", said)
    assert [found[1], found[3]] == [letters[0][0], letters[1][0]]
    assert [float(found[2]), float(found[4])] == pytest.approx([letters[0][1], letters[1][1]], abs=0.6)
    page.click("#jump")
    assert changed[page.js("return explorer.state.at")] or not any(changed)
    page.click("#mend")
    page.wait()
    np.testing.assert_allclose(page.bits(), whole, atol=2e-3)
    assert page.text("#loss") == f"Loss: {whole.mean():.2f} bits a character."


def test_what_a_memory_reads_its_switch_and_what_it_holds(explore, random_model):
    model, text = random_model(memory=True, offsets=((1, 3), (2,))), "abc efgh\nabqponm lk"
    page, tokens = explore(model.params, model.config, model.vocab, text), encode(text, model.vocab)
    blocks, whole, _ = seen(model.params, model.config, tokens)
    for t, i in itertools.product((0, 5, 18), range(2)):
        z, a, b = (x[0].astype(float) for x in blocks[i]["mix"]["memory"][:3])
        read = np.array([np.linalg.norm((z[t] @ a[k]) * b[k] - (z[t] @ b[k]) * a[k]) for k in range(t + 1)])
        page.js("choose(arguments[0])", t)
        places, shares = np.transpose(page.js("return explorer.shown().look(arguments[0], arguments[1]).reads", t, i))
        np.testing.assert_allclose(shares, (read / read.sum())[places.astype(int)], atol=1e-3)
        assert sorted(places) == [*range(t + 1)] and (np.diff(shares) <= 0).all()
        drawn = page.js("return document.querySelectorAll('.card')[arguments[0]].textContent", i).split("memory: reads ")[1]
        found = [float(x) for x in re.findall(r"\(([\d.]+)%\)", drawn)]
        assert found == pytest.approx(100 * shares[:4], abs=0.51)
    page.click("[data-keys='2-memory']")
    page.wait()
    off = model.params | {"blocks.1.mix.W_mem": 0 * model.params["blocks.1.mix.W_mem"]}
    _, bits, _ = seen(off, model.config, tokens)
    np.testing.assert_allclose(page.bits(), bits, atol=2e-3)
    assert np.abs(bits - whole).max() > 0.1 and page.text("#changes").startswith("Off: layer 2 memory.")
    page.click("#start")
    page.wait("document.getElementById('counter').textContent.length > 0")
    assert f"this model remembers {(3 + 2) * 6 + 2 * 15}" in page.text("#counter")


def test_a_switch_for_all_layers_and_both_continuations(explore):
    page = explore(PAGE, hash=f"#text={quote(TEXT)}&tab=touch")
    page.click("[aria-label='offset 1 of all layers at once']")
    assert page.js("return [...explorer.state.off].join()") == "1-1,2-1,3-1,4-1"
    assert page.text("#changes").startswith("Off: layer 1 offset 1, layer 2 offset 1,")
    assert page.js("return document.querySelector(\"[data-keys='4-1']\").getAttribute('aria-checked')") == "false"
    page.wait("document.getElementById('on-touched').textContent.length === 120")
    assert page.text("#on-intact") != page.text("#on-touched")
    assert page.js("return document.querySelectorAll('#cells .better').length") > 0


def test_writing_starts_stops_and_counts(explore):
    page = explore(PAGE, hash=f"#text={quote(TEXT)}&tab=write")
    page.click("#start")
    page.wait("document.getElementById('written').textContent.length > 20")
    page.click("#start")
    written = page.text("#written")
    assert page.text("#start") == "Start anew"
    assert page.text("#written") == written == page.js("return write(shown().letters(), arguments[0])", len(written))
    count = int(re.match(r"characters (\d+)", page.text("#counter"))[1])
    assert count == len(written)
    assert "this model remembers 896" in page.text("#counter")
    assert f"would keep by now {2 * 4 * 128 * (len(TEXT) + count):,}" in page.text("#counter")


def test_writing_ends_goes_on_and_begins_anew(explore, browser):
    page = explore(PAGE, hash=f"#text={quote(TEXT)}&tab=write")
    page.js("$('fast').checked = true; $('length').value = 70")
    assert page.text("#prompt") == TEXT[-60:]
    displayed = "return [$('more').checkVisibility(), $('written').textContent.length, $('start').textContent]"
    assert page.js(displayed) == [False, 0, "Start"]
    for length in (70, 140):  # the second time it goes on where it ended
        page.click("#start" if length == 70 else "#more")
        page.wait(f"$('written').textContent.length >= {length} && $('start').textContent !== 'Stop'")
        assert page.js(displayed) == [True, length, "Start anew"]
    assert page.text("#written") == page.js("return write(shown().letters(), 140)")
    page.click("#start")
    page.wait("$('start').textContent !== 'Stop'")
    assert page.js(displayed) == [True, 70, "Start anew"]
    page.type("To be, or €")  # another text: nothing to go on with
    assert page.js(displayed) == [False, 0, "Start"]
    assert page.text("#prompt") == "To be, or "
    assert browser.find_element("css selector", "#write .note").text == "Skipped, as the model has never seen them: €"


def test_on_a_phone_the_text_stays_small_and_controls_in_place(explore, browser):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True})
    try:
        page = explore(PAGE, hash="#tab=touch")
        page.wait()
        switch, place = "[data-keys='3-wedge']", "return document.querySelector(arguments[0]).getBoundingClientRect().top"
        page.js(f"document.querySelector(\"{switch}\").scrollIntoView({{block: 'center'}})")
        before = page.js(place, switch)
        page.click(switch)
        page.wait()
        assert page.js(place, switch) == pytest.approx(before, abs=2)
        top = browser.find_element("id", "top")
        assert page.js(place, "#top") == 0 and top.rect["height"] <= 0.2 * 844
        assert top.rect["width"] == 390 and "→" in top.text and "Here likeliest" in top.text
        assert page.js("return document.documentElement.scrollWidth") == 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_line_end_is_as_visible_as_a_letter(explore):
    page = explore(PAGE, hash=f"#text={quote(TEXT)}&at=9")
    page.wait()
    style = "return ['outlineWidth', 'outlineStyle', 'color'].map(x => getComputedStyle(cells[9], '::before')[x])"
    chosen = page.js(style)
    assert chosen[:2] == ["2px", "solid"]
    page.js("choose(3)")
    assert page.js(style)[1] == "none" and page.js(style)[2] != chosen[2]


def test_keys_and_pointer_choose_characters(explore, browser):
    from selenium.webdriver import ActionChains, Keys
    page = explore(PAGE, hash="#text=Good%20morrow")
    box = browser.find_element("id", "text")
    box.send_keys(Keys.END)
    page.wait("explorer.state.at === 10")
    box.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    page.wait("explorer.state.at === 8")
    assert page.text("#chosen").startswith("“r”, character 9 of 11")
    box.send_keys("x")
    page.wait("explorer.state.at === 9")
    assert page.text("#cells") == "Good morrxow"
    fifth = browser.find_elements("css selector", "#cells span")[5]
    ActionChains(browser).move_to_element(fifth).perform()
    page.wait("explorer.state.hover === 5")
    assert page.text("#after") == "After Good␣m comes"
    ActionChains(browser).click().perform()
    page.wait("explorer.state.at === 5")
    browser.find_element("css selector", "[value=layers]").send_keys(Keys.ARROW_RIGHT)
    assert page.js("return [document.activeElement.value, form.tab.value, $('touch').hidden]") == ["touch", "touch", False]


def test_tab_reaches_every_control_and_each_has_a_name(explore, browser):
    from selenium.webdriver import ActionChains, Keys
    page, reached = explore(PAGE, hash="#tab=write"), set()
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.add(page.js("return document.activeElement.id || document.activeElement.value"))
    assert {"text", "write", "start", "temperature", "top-k", "seed", "fast", "length", "output"} <= reached
    nameless = page.js("""return [...document.querySelectorAll("button, input, textarea, select, [role], svg")].filter(
        node => !(node.getAttribute("aria-label") || node.getAttribute("aria-labelledby") || node.closest("label")
                  || node.textContent.trim() || node.getAttribute("role") === "status")).map(node => node.outerHTML)""")
    assert nameless == []


def test_the_address_is_the_state(explore, browser):
    page = explore(PAGE)
    page.type("Love all, trust a few.\n")
    page.click("[data-keys='2-gate']")
    page.click("[data-keys='4-16']")
    page.click("[value=flow]")
    page.click("[value=lines]")
    page.js("choose(7)")
    page.wait("location.hash.includes('lines') && location.hash.includes('at=7')")
    state = "return [[...state.off].sort(), state.at, form.tab.value, form.scale.value, $('text').value, page.text.length > 0]"
    before, address = page.js(state), browser.current_url
    assert before[:5] == [["2-gate", "4-16"], 7, "flow", "lines", "Love all, trust a few.\n"]
    browser.get("about:blank")
    browser.get(address)
    assert page.js(state) == before
    page = explore(PAGE, hash="#at=-3&off=9-9,x&tab=nowhere&scale=toString&text=%E0%A4%A")
    assert page.js(state)[:4] == [[], 0, "layers", "words"]


# ---- what it survives ------------------------------------------------------------------------------

def test_no_message_and_no_request(explore, browser):
    page = explore(PAGE)
    for tab in ("touch", "flow", "write", "layers"):
        page.click(f"[value={tab}]")
        page.wait()
    page.click("[data-keys='1-1']")
    page.wait()
    page.js("draw_paths(); const box = document.getElementById('text');"  # an edit while paths are measured
            "box.value = 'To be, or not to be. '.repeat(200); box.oninput()")
    page.wait()
    assert browser.get_log("browser") == []
    log = " ".join(entry["message"] for entry in browser.get_log("performance"))
    requested = set(re.findall(r'"method":"Network.requestWillBeSent".*?"documentURL":"([^"#]*)', log))
    assert requested <= {"about:blank", PAGE.as_uri()}
    assert page.js("return performance.getEntriesByType('resource').length") == 0


def test_hostile_text_neither_runs_nor_hangs(explore, browser):
    text = "<script>hit = 1</script><img src=x onerror=hit=1>\"'&amp;</textarea>\u202e\U0001f600\u0301\0 end"
    vocab = sorted({ord(c) for c in text if c != "\0"})
    config = G.Config(len(vocab), n_layer=1, d_model=8, rank=4, context=32)
    page = explore(G.init_params(config), config, vocab, hash="")
    page.type(text)
    page.js("box.value += '\\ud83d<b>'; box.oninput()")  # half a character
    page.wait()
    for t, c in enumerate(text.replace("\0", "")):
        page.js("choose(arguments[0]); document.querySelector('[value=layers]').click()", t)
        if c.isascii() and c != " ":
            assert f"{c} comes" in page.text("#after") and f"“{c}”," in page.text("#chosen")
            assert page.js("return document.querySelectorAll('#after code *').length") == 0
    page.click("[value=touch]")
    page.click("[data-keys='1-wedge']")
    page.wait("document.getElementById('on-touched').textContent.length >= 120")
    assert page.js("return [typeof hit, document.querySelectorAll('img, #page script').length]") == ["undefined", 0]
    assert "Skipped" in page.text("#note")
    page.js("box.value = 'e<'.repeat(50000); box.oninput()")
    assert "No more than 5,000" in page.text("#note")
    page.wait()
    assert page.js("return [box.value.length, explorer.shown().rows.length]") == [5000, 5000]
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("damage", [
    lambda html: html.replace('id="weights">A', 'id="weights">B') if 'id="weights">A' in html
        else re.sub(r'(id="weights">)(.)', r"\1A", html, count=1),
    lambda html: re.sub(r'(id="weights">.{1000}).*?<', r"\1<", html, count=1, flags=re.DOTALL),
    lambda html: html[: len(html) // 2],
    lambda html: html.replace('"d_model": 128', '"d_model": 64'),
    lambda html: html.replace('"config"', '"confog"'),
    lambda html: html.replace("class Model {", "class Model {{"),
])
def test_a_damaged_page_says_so(explore, tmp_path, damage):
    whole = PAGE.read_text(encoding="utf-8")
    (tmp_path / "damaged.html").write_text(damage(whole), encoding="utf-8")
    assert damage(whole) != whole
    page = explore(tmp_path / "damaged.html")
    assert page.js("return [document.getElementById('broken').hidden, document.getElementById('page')?.hidden]") == [False, True]
    assert "python -m explorer" in page.text("#broken")


def least_seconds(browser, code, tries=5):
    """The least of several, of the page's own thread, each until all is drawn: others may be busy here."""
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    times = []
    for _ in range(tries):
        before = metrics(browser)
        browser.execute_script(f"{code}; document.body.offsetHeight")
        times.append(metrics(browser) - before)
    return min(times)


def seconds_of_a_loop(browser, page):
    """What 200 times the default model's multiply-adds take in a plain loop: so fast is this machine."""
    page.js("""W = new Float32Array(677440).fill(0.5); v = new Float32Array(128).fill(0.25);
        loop = () => { let sum = 0; for (let t = 0; t < 200; t++) for (let i = 0; i < W.length; i++)
            sum += W[i] * v[i & 127]; return sum; }; loop()""")
    return least_seconds(browser, "loop()", tries=10)


LETTER = "'ae'[box.value.length % 2]"  # another one each time, so that nothing stays
EDITS = {"at the end": f"box.value + {LETTER}", "at the start": f"{LETTER} + box.value",
         "at the end, anew": f"box.value.slice(0, -2) + {LETTER} + box.value.at(-1) + {LETTER}",
         "in the middle": f"box.value.slice(0, 250) + {LETTER} + box.value.slice(250)"}


def test_speed(explore, browser):
    explore(PAGE)
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    page = explore(PAGE)
    assert metrics(browser) < 1
    page.wait()
    page.js("letters = explorer.shown().letters(); write(letters, 1000)")
    loop = seconds_of_a_loop(browser, page)
    assert least_seconds(browser, "write(letters, 200)", tries=30) < 2 * loop
    page.type((TEXT * 5)[:500])
    for edit in EDITS.values():
        assert least_seconds(browser, f"box.value = {edit}; box.oninput()") < loop
        assert page.js("return explorer.done()")


@pytest.mark.parametrize("kind", [{"memory": True}, {"positions": True}])
@pytest.mark.parametrize("edit", EDITS)
def test_a_new_picture_at_once_where_all_that_follows_is_read_anew(explore, browser, kind, edit):
    """What depends on all that came before: the changed place is drawn first, the rest follows."""
    vocab = sorted({*map(ord, TEXT)})
    config = G.Config(len(vocab), **kind)
    page = explore(G.init_params(config), config, vocab, (TEXT * 5)[:500])
    page.wait()
    place = {"at the start": 0, "in the middle": 250}.get(edit, 498)
    page.js("choose(arguments[0])", place)
    code = f"box.value = {EDITS[edit]}; box.oninput(); clearTimeout(timers.slow)"  # the first picture
    assert least_seconds(browser, code) < seconds_of_a_loop(browser, page)
    page.js("refresh()")
    page.wait()
    page.js("choose(arguments[0])", place)
    before = page.text("#cards")
    page.js("box.setRangeText(':', arguments[0], arguments[0] + 1); box.oninput()", place)
    assert page.text("#cards") != before and page.text("#chosen").startswith("“:”")


def metrics(browser):
    found = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return next(entry["value"] for entry in found if entry["name"] == "TaskDuration")


def test_a_link_leads_the_eye_and_the_caret_to_its_place(explore):
    page = explore(PAGE, hash="#at=329&tab=layers")
    page.wait()
    look = ("const [pane, cell] = [$('pane'), document.querySelector('.chosen')].map(x => x.getBoundingClientRect());"
            "return [explorer.state.at, $('text').selectionStart, pane.top <= cell.top && cell.bottom <= pane.bottom]")
    assert page.js(look) == [329, 330, True]
    page.js("$('text').focus()")  # as by the tabulator
    page.wait("document.activeElement === $('text')")
    assert page.js(look) == [329, 330, True]

def test_what_is_not_read_yet_or_empty_is_no_error(explore):
    page = explore(PAGE, hash=f"#text={quote(TEXT)}")
    page.wait()
    assert page.js("const r = explorer.shown(); r.rows[3] = null; return r.look(4, 0).before.area") == 0
    page.type("")
    assert page.text("#after") == page.text("#next") == ""

def test_lines_end_where_those_of_python_do(explore):
    page = explore(PAGE)
    assert page.js("return pieces(arguments[0], 'lines')", "ab\u2028cd\nef") == [[0, 5], [6, 8]]

@pytest.mark.parametrize(("field", "value", "same", "other"), [
    ("temperature", "", "0.8", "0"), ("top-k", "1.5", "1", "2"), ("top-k", "", "65", "1")])
def test_a_number_that_is_left_out_or_broken(explore, field, value, same, other):
    page = explore(PAGE)
    page.wait()
    written = {given: page.js("$(arguments[0]).value = arguments[1]; return write(intact.letters(), 40)", field, given)
               for given in (value, same, other)}
    assert written[value] == written[same] != written[other]
