"""The page: what it draws, what its controls do, what it survives."""

import itertools
import re
from urllib.parse import quote

import numpy as np
import pytest
from conftest import PAGE, random_model
from numpy.testing import assert_allclose

import experiments.flow as F
import grassmann as G
from charlm.checkpoint import load_checkpoint
from charlm.text import encode

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="no browser: selenium is not installed"
)
ActionChains, Keys = webdriver.ActionChains, webdriver.Keys

SPEECH = """MENENIUS:
You are a fair viol, your sense the strings,
Who, fingered, make man his lawful music;
"""
TEXT = SPEECH * 2
ON_TEXT = f"#text={quote(TEXT)}"


def seen(params, config, text, vocab):
    """What Python computes: cache of the blocks, surprise in bits (T-1), logits (T, V)."""
    logits, cache = G.model_forward(params, config, (tokens := encode(text, vocab))[None])
    log_p = logits[0] - np.log(np.exp(logits[0]).sum(-1, keepdims=True))
    return cache["blocks"], -log_p[np.arange(len(tokens) - 1), tokens[1:]] / np.log(2), logits[0]


@pytest.fixture(scope="module")
def shipped():
    params, config, extra = load_checkpoint(PAGE.with_name("shakespeare.npz"))
    return params, config, extra["vocab"], seen(params, config, TEXT, extra["vocab"])


def numbers(*texts):
    return np.array([float(x) for text in texts for x in re.findall(r"\d+\.?\d*", text)])


def test_numbers_on_the_page_are_those_of_python(explore, shipped):
    params, config, _, (blocks, bits, logits) = shipped
    page = explore(hash=ON_TEXT)
    assert page.text("#loss") == f"Loss: {bits.mean():.2f} bits a character."
    for t, i in itertools.product((5, 60), range(config.n_layer)):
        page.js("choose(arguments[0]);", t)
        p = np.exp(logits[t] - logits[t].max())
        shown = [numbers(row)[-1] / 100 for row in page.texts("#next td:last-child")[:10]]
        assert_allclose(shown, np.sort(p / p.sum())[:-11:-1], atol=0.006)
        assert f"surprise of {bits[t - 1]:.2f} bits" in page.text("#chosen")

        card = f".card:nth-child({i + 1})"
        offsets = config.offsets[i]
        z, s, alpha = (blocks[i]["mix"][name][0].astype(float) for name in ("z", "s", "alpha"))
        terms = np.zeros((len(TEXT), len(offsets)))
        for k, n in enumerate(offsets):
            terms[n:, k] = np.linalg.norm(params[f"blocks.{i}.mix.taps"][k] * z[:-n], axis=1)
        shares = 100 * terms / terms.sum(1, keepdims=True).clip(1e-9)
        arcs = shares[t, np.array(offsets) <= t]
        assert_allclose(numbers(*page.texts(f"{card} .mid")), arcs, atol=0.51)
        drawn = numbers(page.text(f"{card} .numbers"))
        area = np.linalg.norm(G.plucker(z[t], s[t]))
        lengths = [np.linalg.norm(z[t]), np.linalg.norm(s[t]), area]
        assert_allclose(drawn[[0, 1, 3]], lengths, rtol=1e-3, atol=0.01)
        angle = np.degrees(np.arctan2(area, z[t] @ s[t]))
        kept = 100 * alpha[t].mean()
        assert_allclose(drawn[[2, 4]], [angle, kept], atol=0.51)
        assert_allclose(drawn[7::2], offsets)  # "1 back 56%, 2 back 44%"
        assert_allclose(drawn[8::2], shares.mean(0), atol=0.51)
        last, now = F.plane(z[t - 1 : t + 1], s[t - 1 : t + 1])
        angles = np.degrees(F.principal_angles(last, now))
        assert_allclose(numbers(*page.texts(f"{card} .dial + text")), angles, atol=0.51)


def test_the_first_character_has_no_plane(explore):
    cards = explore(hash=ON_TEXT).js("choose(0); return $('cards').textContent")
    assert cards.count("here s is 0, so there is no plane") == 4


def test_the_planes_of_words_are_those_of_python(explore, shipped):
    """And what is said of them agrees with the numbers."""
    params, config, vocab, _ = shipped
    page = explore(hash="#tab=flow&scale=words")
    page.wait("all('#paths .card').length === 4")
    text = page.js("page.text")
    cards = page.texts("#paths .card")
    kinds = []
    for i, block in enumerate(seen(params, config, text, vocab)[0]):
        z, s = (block["mix"][name][0].astype(float) for name in ("z", "s"))
        p = G.plucker(z, s)
        words = [slice(*word.span()) for word in re.finditer(r"\S+", text)]
        planes = F.nearest_plane(np.stack([p[word].sum(0) for word in words]))
        steps = F.distance(planes[:-1], planes[1:])
        points = page.js("path(shown(), arguments[0], 'words').points", i)
        assert_allclose([point["step"] for point in points], steps, atol=1e-3)
        apart = F.distance(planes[:, None], planes)[~np.eye(len(planes), dtype=bool)].mean()
        step, _, ratio, error = numbers(cards[i].split("mean step")[1])
        assert step == pytest.approx(steps.mean(), abs=0.02)
        assert ratio == pytest.approx(steps.mean() / apart, abs=0.02)
        found = re.search(r"neighbours are ([\d.]+)% (nearer|farther)", cards[i])
        kinds.append(found[2] if found else "no")
        if found:
            sign = -1 if found[2] == "nearer" else 1
            assert 1 + sign * float(found[1]) / 100 == pytest.approx(ratio, abs=0.0011)
        else:
            assert abs(ratio - 1) <= max(2 * error, 0.01) + 1.5e-3
    assert {*kinds} == {"no", "farther"}


def test_a_path_of_few_steps_is_not_judged(explore):
    page = explore(hash="#tab=flow&scale=words")
    short = "the text is too short: 1 of at least 8 steps"
    page.click("[value='blocks of 256']", f"$('paths').textContent.includes('{short}')")
    assert page.texts("#paths svg") == []


def test_the_pieces_of_a_text(explore):
    page = explore()
    for scale, expected in {"characters": 9, "words": 3, "lines": 2, "blocks of 64": 0}.items():
        assert len(page.js("pieces('ab c\\n\\ndef', arguments[0])", scale)) == expected


def test_a_step_on_a_path_is_named_and_chosen(explore, browser):
    page = explore(hash=f"{ON_TEXT}&tab=flow&scale=words&at=0")
    page.wait("all('#paths .point').length === 4")
    words = [*re.finditer(r"\S+", TEXT)]
    named = "#paths .card:nth-child(3) .point"
    assert page.text(named) == ""  # no step leads to the first word
    svg = browser.find_elements("css selector", "#paths svg")[2]
    for k in (7, 12):
        away = (words[k].start() + 0.5) / len(TEXT) - 0.5  # from the middle, of the width
        pointer = ActionChains(browser)
        pointer.move_to_element_with_offset(svg, round(away * svg.rect["width"]), 0)
        pointer.click().perform()
        step = page.js(f"path(shown(), 2, 'words').points[{k - 1}].step")
        assert f"“{words[k - 1][0]}” → “{words[k][0]}”: {step:.2f}, " in page.text(named)
        assert page.js("state.at") == words[k].start()


def without(part, params, config, prefix="blocks.2.mix."):
    """The parameters of the same model with a part of layer 3 switched off."""
    params = {name: a.copy() for name, a in params.items()}
    if part.isdigit():
        params[f"{prefix}taps"][config.offsets[2].index(int(part))] = 0
    zero = {"wedge": ["W_plu"], "gate": ["W_gate", "b_gate"], "mixer": ["W_plu", "b_plu", "W_gate"]}
    for name in zero.get(part, ()):
        params[prefix + name] *= 0
    params[f"{prefix}b_gate"] -= 1e9 * (part == "mixer")  # α = 0: g alone, which is nothing
    return params


@pytest.mark.parametrize("part", ["6", "wedge", "gate", "mixer"])
def test_what_is_switched_off_is_off(explore, shipped, part):
    params, config, vocab, (_, whole, before) = shipped
    page = explore(hash=ON_TEXT)
    page.click(f"[data-keys='3-{part}']")
    _, bits, after = seen(without(part, params, config), config, TEXT, vocab)
    assert_allclose(page.bits(), bits, atol=2e-3)
    assert f"{whole.mean():.2f} → {bits.mean():.2f} bits" in page.text("#loss")
    changed = page.js("cells.map(cell => cell.classList.contains('changed'))")
    assert changed == (before.argmax(-1) != after.argmax(-1)).tolist()
    assert re.match(
        rf"Off: layer 3 (offset )?{part}. Underlined: {sum(changed)} of", page.text("#changes")
    )
    page.js("choose(40);")
    guesses = page.text("#guess").split(": ")[1].split("→")
    for logits, guess in zip((before[40], after[40]), guesses, strict=True):
        letter, percent = guess.split()
        assert letter == chr(vocab[logits.argmax()]).translate({10: "↵", 32: "␣"})
        share = 100 / np.exp(logits - logits.max()).sum()
        assert float(percent.rstrip("%")) == pytest.approx(share, abs=0.6)
    page.click("#jump")
    assert changed[page.js("explorer.state.at")] or not any(changed)
    page.click("#mend")
    assert_allclose(page.bits(), whole, atol=2e-3)


def test_what_a_memory_reads_its_switch_and_what_it_holds(explore):
    model = random_model(memory=True, offsets=((1, 3), (2,)))
    text = "abc efgh\nabqponm lk"
    page = explore(model, text)
    blocks, _, _ = seen(model.params, model.config, text, model.vocab)
    for t, i in itertools.product((0, 18), range(2)):
        z, k, v = (x[0].astype(float) for x in blocks[i]["mix"]["memory"][:3])
        read = np.abs(k[: t + 1] @ z[t]) * np.linalg.norm(v[: t + 1], axis=1)
        page.js("choose(arguments[0]);", t)
        card = page.texts("#cards .card")[i].split("memory: reads ")[1]
        drawn = numbers(*re.findall(r"\(([\d.]+)%\)", card))
        shares = 100 * np.sort(read / read.sum())[::-1]
        assert_allclose(drawn, shares[:4], atol=0.51)
    page.click("[data-keys='2-memory']")
    model.params["blocks.1.mix.W_mem"] *= 0
    _, bits, _ = seen(model.params, model.config, text, model.vocab)
    assert_allclose(page.bits(), bits, atol=2e-3)
    assert page.text("#changes").startswith("Off: layer 2 memory.")
    page.click("#start", "$('counter').textContent.length > 0")
    assert f"this model remembers {(3 + 2) * 6 + 2 * 36}" in page.text("#counter")


def test_writing_starts_stops_goes_on_and_begins_again(explore):
    page = explore(hash=f"{ON_TEXT}&tab=write")
    displayed = (
        "[$('more').checkVisibility(), $('written').textContent.length, $('start').textContent]"
    )
    assert page.text("#prompt") == TEXT[-60:] and page.js(displayed) == [False, 0, "Start"]
    page.click("#start", "$('written').textContent.length > 20")
    page.click("#start")  # Stop
    n, counter = len(page.text("#written")), page.text("#counter")
    assert page.js(displayed) == [True, n, "Start again"]
    assert counter.startswith(f"characters {n}")
    assert "model remembers 896" in counter
    assert f"keep by now {2 * 4 * 128 * (len(TEXT) + n):,}" in counter
    page.js("$('fast').checked = true; $('length').value = 70")
    stopped = "$('start').textContent !== 'Stop'"
    for button, length in (("#start", 70), ("#more", 140), ("#start", 70)):
        page.click(button, f"$('written').textContent.length === {length} && {stopped}")
        assert page.text("#written") == page.js("write(shown().letters(), arguments[0])", length)
    page.type("To be, or €")  # another text: nothing to go on with
    assert page.js(displayed) == [False, 0, "Start"] and page.text("#prompt") == "To be, or "
    assert page.text("#write .note") == "Left out, since the model has never seen them: €"


def test_a_number_that_is_left_out_or_broken(explore):
    write = "$(arguments[0]).value = arguments[1]; return write(intact.letters(), 40)"
    for field, value, same in (("temperature", "", 0.8), ("top-k", 1.5, 1), ("top-k", "", 65)):
        page = explore()
        assert page.js(write, field, value) == page.js(write, field, same)


def test_a_first_minute_in_four_clicks(explore):
    page = explore()
    at = page.js("page.at")
    assert page.js("state.at") == at
    for place, off, tab in (
        (at - 1, 0, "layers"),
        (at, 0, "layers"),
        (at, 4, "touch"),
        (at, 0, "write"),
    ):
        page.click("#step")
        assert page.js("[state.at, state.off.size, form.tab.value]") == [place, off, tab]
        assert ("→" in page.text("#loss")) == (off > 0)
        page.wait(f"!{off} || $('on-touched').textContent.length === 120")
    assert page.text("#on-intact") != page.text("#on-touched")
    page.click("#step", "$('written').textContent.length > 5 && $('guide').hidden")  # Done


def test_the_guide_can_be_left_out(explore):
    assert explore(hash="#at=3").js("$('guide').hidden")
    explore().click("#skip", "$('guide').hidden")


def test_no_message_and_no_request(explore, browser):
    page = explore(hash="#tab=flow")
    page.type("To be, or not to be. " * 200)  # while paths are measured
    log = " ".join(entry["message"] for entry in browser.get_log("performance"))
    sent = r'"method":"Network.requestWillBeSent".*?"documentURL":"([^"#]*)'
    assert {*re.findall(sent, log)} <= {"about:blank", PAGE.as_uri()}
    assert browser.get_log("browser") == []
    assert page.js("performance.getEntriesByType('resource').length") == 0


PHONE = (360, 640)


def test_on_a_phone_the_tabs_are_on_the_first_screen(explore):
    page = explore(size=PHONE)
    place = "document.querySelector(arguments[0]).getBoundingClientRect()[arguments[1]]"
    assert page.js(place, "#tabs", "bottom") <= page.js(place, "#guide", "top")
    assert page.js("document.documentElement.scrollWidth") == PHONE[0]


def test_on_a_phone_a_switch_stays_in_place_below_a_fixed_head(explore):
    page = explore(hash="#tab=touch", size=PHONE)
    place = "document.querySelector(arguments[0]).getBoundingClientRect()[arguments[1]]"
    switch = "[data-keys='3-wedge']"
    page.js("document.querySelector(arguments[0]).scrollIntoView({ block: 'center' });", switch)
    before = page.js(place, switch, "top")
    page.click(switch)
    assert page.js(place, switch, "top") == pytest.approx(before, abs=2)
    assert page.js(place, "#top", "top") == 0
    assert page.js(place, "#top", "height") <= 0.23 * PHONE[1]


def test_a_term_explains_itself_beside_it(explore, browser):
    page = explore(hash="#tab=layers")
    terms = browser.find_elements("css selector", "#layers .term")
    gloss = browser.find_element("id", "gloss")
    for term in (terms[2], terms[0]):  # the second is opened without closing the first
        term.send_keys(Keys.ENTER)
        assert term.get_attribute("title") in gloss.text
        assert 0 <= gloss.rect["y"] - term.rect["y"] <= 60
        assert gloss.rect["x"] + gloss.rect["width"] <= page.js("innerWidth")
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not gloss.is_displayed()
    assert browser.switch_to.active_element == terms[0]


def test_a_term_names_a_section_of_the_lesson(explore):
    lesson = (PAGE.parents[1] / "tutorial.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \d+\. (.+)$", lesson, re.MULTILINE)
    named = explore().js("all('.term').map(term => term.dataset.lesson.replace(/\\s+/g, ' '))")
    assert len(named) > 10
    assert {*named} - {*sections} == set()


def test_keys_and_pointer_choose_characters(explore, browser):
    page = explore(hash="#text=Good%20morrow")
    box = browser.find_element("id", "text")
    for keys, at in (((Keys.END,), 10), ((Keys.ARROW_LEFT, Keys.ARROW_LEFT), 8), (("x",), 9)):
        box.send_keys(*keys)
        page.wait(f"state.at === {at}")
    assert page.text("#cells") == "Good morrxow"
    assert page.text("#chosen").startswith("“x”, character 10 of 12")
    cell = browser.find_elements("css selector", "#cells span")[5]
    ActionChains(browser).move_to_element(cell).perform()
    page.wait("state.hover === 5")
    assert page.text("#after") == "After Good␣m comes"
    ActionChains(browser).click().perform()
    page.wait("state.at === 5")


def test_tab_reaches_every_control(explore, browser):
    page = explore(hash="#tab=write")
    reached = set()
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.add(page.js("document.activeElement.id"))
    controls = "text write start temperature top-k seed fast length output"
    assert {*controls.split()} - reached - {"write"} == set()


def test_every_control_has_a_name(explore):
    unnamed = """all("button, input, textarea, select, [role], svg").filter(node => !(
        node.ariaLabel
        || node.matches("[aria-labelledby], label *, [role=status], #step")
        || node.textContent.trim())).length"""
    assert explore(hash="#tab=write").js(unnamed) == 0


def test_the_address_is_the_state(explore, browser):
    page = explore()
    text = "Love all, trust a few.\n"
    page.type(text)
    for control in (
        "[aria-label='gate of all layers']",
        "[data-keys='2-gate']",
        "[value=flow]",
        "[value=lines]",
    ):
        page.click(control)
    page.js("choose(7);")
    page.wait("location.hash.includes('lines') && location.hash.includes('at=7')")
    address = browser.current_url
    browser.get("about:blank")
    browser.get(address)
    found = page.js(
        "[[...state.off].sort(), state.at, form.tab.value, form.scale.value, box.value]"
    )
    assert found == [["1-gate", "3-gate", "4-gate"], 7, "flow", "lines", text]


def test_a_wrong_address_opens_the_page_as_usual(explore):
    page = explore(hash="#at=-3&off=9-9,x&tab=nowhere&scale=toString&text=%E0%A4%A")
    found = page.js("[[...state.off], state.at, form.tab.value, form.scale.value]")
    assert found == [[], 0, "layers", "words"]


@pytest.mark.parametrize("action", ["", "box.focus();"], ids=["opened", "focused"])
def test_the_chosen_place_is_in_sight(explore, action):
    page = explore(hash="#at=329&tab=layers")
    page.js(action + ";")
    inside = """const places = [$("pane"), cells[329]];
        const [a, b] = places.map(x => x.getBoundingClientRect());
        return a.top <= b.top && b.bottom <= a.bottom"""
    assert page.js(inside)


HOSTILE = "<script>hit = 1</script><img src=x onerror=hit=1>"
HOSTILE += "\"'&amp;</textarea>\u202e\U0001f600\u0301 end"


def test_hostile_text_does_not_run(explore):
    page = explore(random_model(HOSTILE), HOSTILE)
    page.click("#step")  # which names characters, too
    for t, c in enumerate(HOSTILE):
        page.js("choose(arguments[0]);", t)
        if c.isascii() and c != " ":
            assert f"{c} comes" in page.text("#after")
    page.click("[value=touch]")
    page.click("[data-keys='1-wedge']", "$('on-touched').textContent.length >= 120")
    assert page.js("typeof hit") == "undefined"
    assert page.texts("img, #page script") == []


def test_characters_that_the_model_does_not_know_are_left_out(explore):
    page = explore()
    page.js("box.value = 'a\\0\\ud83d<b>'; box.oninput()")  # with half a character
    page.wait()
    assert page.js("shown().tokens.length") == 2
    assert page.js("$('note').textContent.startsWith('Left out')")


def test_a_long_text_is_cut_and_none_is_no_error(explore, browser):
    page = explore()
    page.type("e " * 50000)
    assert page.js("shown().rows.length") == 5000
    assert "No more than 5,000" in page.text("#note")
    page.type("")
    assert page.text("#after") == page.text("#next") == ""
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(
    "pattern, damage",
    [
        ('(?<=id="weights">)(.)(.)', r"\2\1"),
        ("(?s)class Reader.*", ""),
        ('"d_model": 128', '"d_model": 64'),
    ],
)
def test_a_damaged_page_says_so(explore, tmp_path, pattern, damage):
    html, changes = re.subn(pattern, damage, PAGE.read_text(encoding="utf-8"), count=1)
    assert changes
    (tmp_path / "damaged.html").write_text(html, encoding="utf-8")
    page = explore(tmp_path / "damaged.html", wait=False)
    shown = page.js("['broken', 'page'].map(id => document.getElementById(id).checkVisibility())")
    assert shown == [True, False]
    assert "python -m explorer" in page.text("#broken")


@pytest.mark.parametrize(
    "kind", [{}, {"memory": True}, {"positions": True}], ids=["default", "memory", "positions"]
)
@pytest.mark.parametrize("place", [0, 250, 498])
def test_the_changed_place_is_drawn_at_once_and_the_rest_follows(explore, kind, place):
    page = explore(random_model(TEXT, n_layer=4, **kind), (TEXT * 5)[:500])
    page.js(f"""step = model.stream_step;
        model.stream_step = (...x) => (steps++, step.apply(model, x));
        steps = 0;
        choose({place});""")
    before = page.text("#cards")
    edit = "box.setRangeText(':', arguments[0], arguments[0] + 1); box.oninput();"
    after = page.js(f"{edit} return $('cards').textContent", place)
    assert after != before
    assert page.text("#chosen").startswith("“:”")
    page.wait()
    assert kind or page.js("steps <= model.reach + 8")  # no more than the edit can reach
