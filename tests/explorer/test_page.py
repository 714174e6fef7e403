"""The page: what it draws, what its controls do, what it survives."""

import itertools
import re
from urllib.parse import quote

import numpy as np
import pytest
from conftest import PAGE, random_model

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
    for t, i in itertools.product((1, 5, 17, 60, 150), range(config.n_layer)):
        page.js("choose(arguments[0]);", t)
        card, offsets, taps = (
            f".card:nth-child({i + 1})",
            config.offsets[i],
            params[f"blocks.{i}.mix.taps"],
        )
        p = np.exp(logits[t] - logits[t].max())
        shown = [numbers(row)[-1] / 100 for row in page.texts("#next td:last-child")[:10]]
        np.testing.assert_allclose(shown, np.sort(p / p.sum())[:-11:-1], atol=0.006)
        assert f"surprise of {bits[t - 1]:.2f} bits" in page.text("#chosen")
        z, s, alpha = (blocks[i]["mix"][name][0].astype(float) for name in ("z", "s", "alpha"))
        terms = np.array(
            [
                [np.linalg.norm(taps[k] * z[u - n]) if n <= u else 0 for k, n in enumerate(offsets)]
                for u in range(len(TEXT))
            ]
        )
        shares = 100 * terms / terms.sum(1, keepdims=True).clip(1e-9)
        arcs = [share for n, share in zip(offsets, shares[t], strict=True) if n <= t]
        np.testing.assert_allclose(numbers(*page.texts(f"{card} .mid")), arcs, atol=0.51)
        drawn, area = numbers(page.text(f"{card} .numbers")), np.linalg.norm(G.plucker(z[t], s[t]))
        lengths = np.linalg.norm(z[t]), np.linalg.norm(s[t]), area
        np.testing.assert_allclose(drawn[[0, 1, 3]], lengths, rtol=1e-3, atol=0.01)
        angle, kept = np.degrees(np.arctan2(area, z[t] @ s[t])), 100 * alpha[t].mean()
        means = np.stack([offsets, shares.mean(0)], 1).ravel()  # "1 back 56%, 2 back 44%"
        np.testing.assert_allclose(
            drawn[[2, 4, *range(7, len(drawn))]], [angle, kept, *means], atol=0.51
        )
        if t > 1:
            angles = F.principal_angles(*F.plane(z[t - 1 : t + 1], s[t - 1 : t + 1]))
            np.testing.assert_allclose(
                numbers(*page.texts(f"{card} .dial + text")), np.degrees(angles), atol=0.51
            )
    assert (
        page.js("choose(0); return $('cards').textContent").count(
            "here s is 0, so there is no plane"
        )
        == 4
    )


def test_the_planes_of_words_are_those_of_python_and_what_is_said_agrees_with_the_numbers(
    explore, shipped
):
    page, (params, config, vocab, _), kinds = explore(hash="#tab=flow&scale=words"), shipped, set()
    page.wait("all('#paths .card').length === 4")
    text, cards = page.js("page.text"), page.texts("#paths .card")
    for i, block in enumerate(seen(params, config, text, vocab)[0]):
        p = G.plucker(*(block["mix"][name][0].astype(float) for name in ("z", "s")))
        planes = F.nearest_plane(
            np.stack([p[slice(*word.span())].sum(0) for word in re.finditer(r"\S+", text)])
        )
        steps, points = (
            F.distance(planes[:-1], planes[1:]),
            page.js("path(shown(), arguments[0], 'words').points", i),
        )
        np.testing.assert_allclose([point["step"] for point in points], steps, atol=1e-3)
        apart = F.distance(planes[:, None], planes)[~np.eye(len(planes), dtype=bool)].mean()
        assert np.mean([point["noise"] for point in points]) == pytest.approx(apart, abs=0.03)
        step, _, ratio, error = numbers(cards[i].split("mean step")[1])
        found = re.search(r"neighbours are ([\d.]+)% (nearer|farther)", cards[i])
        assert (step, ratio) == pytest.approx((steps.mean(), steps.mean() / apart), abs=0.02)
        if found:
            assert float(found[1]) == pytest.approx(abs(100 * (ratio - 1)), abs=0.1 + 1e-9)
        assert not found or (found[2] == "nearer") == (ratio < 1)
        assert found or abs(ratio - 1) <= max(2 * error, 0.01) + 1.5e-3
        kinds.add(found[2] if found else "no")
    assert kinds == {"no", "farther"}
    page.click(
        "[value='blocks of 256']",
        "$('paths').textContent.includes('the text is too short: 1 of at least 8 steps')",
    )
    assert "±" not in page.text("#paths") and page.texts("#paths svg") == []
    for scale, expected in {"characters": 9, "words": 3, "lines": 2, "blocks of 64": 0}.items():
        assert len(page.js("pieces('ab c\\n\\ndef', arguments[0])", scale)) == expected
    assert page.js("pieces(arguments[0], 'lines')", "ab\u2028cd\nef") == [
        [0, 5],
        [6, 8],
    ]  # as in Python


def test_a_step_on_a_path_is_named_and_chosen(explore, browser):
    page = explore(hash=f"{ON_TEXT}&tab=flow&scale=words&at=0")
    page.wait("all('#paths .point').length === 4")
    words, named = [*re.finditer(r"\S+", TEXT)], "#paths .card:nth-child(3) .point"
    assert page.text(named) == ""  # no step leads to the first word
    svg = browser.find_elements("css selector", "#paths svg")[2]
    for k, clicks in ((7, 0), (12, 1), (7, 0)):
        away = (words[k].start() + 0.5) / len(TEXT) - 0.5  # from the middle, of the width
        pointer = ActionChains(browser).move_to_element_with_offset(
            svg, round(away * svg.rect["width"]), 0
        )
        (pointer.click() if clicks else pointer).perform()
        step, noise = page.js(
            f"const p = path(shown(), 2, 'words').points[{k - 1}]; return [p.step, p.noise]"
        )
        assert (
            page.text(named)
            == f"“{words[k - 1][0]}” → “{words[k][0]}”: {step:.2f}, to other planes {noise:.2f}"
        )
    assert page.js("[state.at, box.selectionStart]") == [words[12].start(), words[12].start() + 1]


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


@pytest.mark.parametrize("part", ["1", "6", "wedge", "gate", "mixer"])
def test_what_is_switched_off_is_off(explore, shipped, part):
    params, config, vocab, (_, whole, before) = shipped
    page, top = explore(hash=ON_TEXT), "$('next').getBoundingClientRect().top"
    place = page.js(top)
    page.click(f"[data-keys='3-{part}']")
    assert page.js(top) == place
    _, bits, after = seen(without(part, params, config), config, TEXT, vocab)
    np.testing.assert_allclose(page.bits(), bits, atol=2e-3)
    assert f"{whole.mean():.2f} → {bits.mean():.2f} bits" in page.text("#loss")
    changed = page.js("cells.map(cell => cell.classList.contains('changed'))")
    assert changed == (before.argmax(-1) != after.argmax(-1)).tolist()
    assert re.match(
        rf"Off: layer 3 (offset )?{part}. Underlined: {sum(changed)} of", page.text("#changes")
    )
    page.js("choose(40);")
    for logits, said in zip(
        (before[40], after[40]), page.text("#guess").split(": ")[1].split("→"), strict=True
    ):
        assert said.split()[0] == chr(vocab[logits.argmax()]).translate({10: "↵", 32: "␣"})
        assert float(said.split()[1].rstrip("%")) == pytest.approx(
            100 / np.exp(logits - logits.max()).sum(), abs=0.6
        )
    page.click("#jump")
    assert changed[page.js("explorer.state.at")] or not any(changed)
    page.click("#mend")
    np.testing.assert_allclose(page.bits(), whole, atol=2e-3)


def test_what_a_memory_reads_its_switch_and_what_it_holds(explore):
    model, text = random_model(memory=True, offsets=((1, 3), (2,))), "abc efgh\nabqponm lk"
    page, (blocks, whole, _) = (
        explore(model, text),
        seen(model.params, model.config, text, model.vocab),
    )
    for t, i in itertools.product((0, 5, 18), range(2)):
        z, k, v = (x[0].astype(float) for x in blocks[i]["mix"]["memory"][:3])
        read = np.abs(k[: t + 1] @ z[t]) * np.linalg.norm(v[: t + 1], axis=1)
        page.js("choose(arguments[0]);", t)
        places, shares = np.transpose(
            page.js("shown().look(arguments[0], arguments[1]).reads", t, i)
        )
        np.testing.assert_allclose(shares, (read / read.sum())[places.astype(int)], atol=1e-3)
        assert sorted(places) == [*range(t + 1)] and (np.diff(shares) <= 0).all()
        drawn = re.findall(
            r"\(([\d.]+)%\)", page.texts("#cards .card")[i].split("memory: reads ")[1]
        )
        np.testing.assert_allclose(numbers(*drawn), 100 * shares[:4], atol=0.51)
    page.click("[data-keys='2-memory']")
    off = model.params | {"blocks.1.mix.W_mem": 0 * model.params["blocks.1.mix.W_mem"]}
    np.testing.assert_allclose(
        page.bits(), bits := seen(off, model.config, text, model.vocab)[1], atol=2e-3
    )
    assert np.abs(bits - whole).max() > 0.1 and page.text("#changes").startswith(
        "Off: layer 2 memory."
    )
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
    assert page.js(displayed) == [True, n, "Start again"] and counter.startswith(f"characters {n}")
    assert (
        "model remembers 896" in counter
        and f"keep by now {2 * 4 * 128 * (len(TEXT) + n):,}" in counter
    )
    page.js("$('fast').checked = true; $('length').value = 70")
    for button, length in (
        ("#start", 70),
        ("#more", 140),
        ("#start", 70),
    ):  # #more goes on where it ended
        page.click(
            button,
            f"$('written').textContent.length === {length} && $('start').textContent !== 'Stop'",
        )
        assert page.text("#written") == page.js("write(shown().letters(), arguments[0])", length)
    page.type("To be, or €")  # another text: nothing to go on with
    assert page.js(displayed) == [False, 0, "Start"] and page.text("#prompt") == "To be, or "
    assert page.text("#write .note") == "Left out, since the model has never seen them: €"


def test_a_number_that_is_left_out_or_broken(explore):
    for field, value, same, other in (
        ("temperature", "", 0.8, 0),
        ("top-k", 1.5, 1, 2),
        ("top-k", "", 65, 1),
    ):
        page, write = (
            explore(),
            "$(arguments[0]).value = arguments[1]; return write(intact.letters(), 40)",
        )
        written = [page.js(write, field, given) for given in (value, same, other)]
        assert written[0] == written[1] != written[2]


def test_a_first_minute_in_four_clicks_or_none_without_a_message_or_a_request(explore, browser):
    page, at = explore(), explore().js("page.at")
    assert page.js("state.at") == at and "four clicks" in page.text("#guide p")
    for place, off, tab in (
        (at - 1, 0, "layers"),
        (at, 0, "layers"),
        (at, 4, "touch"),
        (at, 0, "write"),
    ):
        page.click("#step")
        assert page.js("[state.at, state.off.size, form.tab.value]") == [place, off, tab]
        assert ("→" in page.text("#loss")) == bool(page.texts("#cells .better")) == (off > 0)
        assert place == at or f"{page.bits()[at - 1]:.1f} bits" in page.text("#guide p")
        page.wait(f"!{off} || $('on-touched').textContent.length === 120")
    assert page.text("#on-intact") != page.text("#on-touched")
    page.click("#step", "$('written').textContent.length > 5 && $('guide').hidden")  # Done
    page.js(
        "draw_paths(); box.value = 'To be, or not to be. '.repeat(200); box.oninput()"
    )  # while paths are measured
    page.wait()
    log = " ".join(entry["message"] for entry in browser.get_log("performance"))
    requested = set(
        re.findall(r'"method":"Network.requestWillBeSent".*?"documentURL":"([^"#]*)', log)
    )
    assert browser.get_log("browser") == [] and requested <= {"about:blank", PAGE.as_uri()}
    assert page.js("performance.getEntriesByType('resource').length") == 0
    assert explore(hash="#at=3").js("$('guide').hidden")
    explore().click("#skip", "$('guide').hidden")


def test_on_a_phone_the_tabs_are_on_the_first_screen_and_controls_stay_in_place(explore, browser):
    place, size = (
        "document.querySelector(arguments[0]).getBoundingClientRect()[arguments[1]]",
        (360, 640),
    )
    page = explore(size=size)
    assert page.js(place, "#tabs", "bottom") <= page.js(place, "#guide", "top")
    page, switch = explore(hash="#tab=touch", size=size), "[data-keys='3-wedge']"
    page.js("document.querySelector(arguments[0]).scrollIntoView({ block: 'center' });", switch)
    before, top = page.js(place, switch, "top"), browser.find_element("id", "top")
    page.click(switch)
    assert (
        page.js(place, switch, "top") == pytest.approx(before, abs=2)
        and page.js(place, "#top", "top") == 0
    )
    assert top.rect["width"] == size[0] == page.js("document.documentElement.scrollWidth")
    assert top.rect["height"] <= 0.23 * size[1] and "→" in top.text and "Likeliest next" in top.text


def test_a_term_explains_itself_beside_it_and_names_a_section_of_the_lesson(explore, browser):
    page = explore(hash="#tab=layers")
    terms, gloss = (
        browser.find_elements("css selector", "#layers .term"),
        browser.find_element("id", "gloss"),
    )
    for term in (terms[0], terms[2], terms[4]):  # the third is opened without closing the second
        term.send_keys(Keys.ENTER)
        assert term.get_attribute("title") in gloss.text and "tutorial.md" in gloss.text
        assert (
            0 <= gloss.rect["y"] - term.rect["y"] <= 60
            and gloss.rect["x"] + gloss.rect["width"] <= 1280
        )
        if term == terms[0]:
            browser.switch_to.active_element.send_keys(Keys.ESCAPE)
            assert not gloss.is_displayed() and browser.switch_to.active_element == term
    lesson = re.findall(
        r"^## \d+\. (.+)$",
        (PAGE.parents[1] / "tutorial.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    named = page.js("all('.term').map(term => term.dataset.lesson.replace(/\\s+/g, ' '))")
    assert (
        len(named) > 10 and set(named) <= set(lesson) and not page.texts("a")
    )  # Markdown would open at its top


def test_keys_and_pointer_choose_characters_and_a_line_end_is_as_visible_as_a_letter(
    explore, browser
):
    page = explore(hash=f"{ON_TEXT}&at=9")
    style = """const { outlineStyle, color } = getComputedStyle(cells[9], '::before');
        return [outlineStyle, color]"""
    assert all(
        here != there
        for here, there in zip(page.js(style), page.js(f"choose(3); {style}"), strict=True)
    )
    page, box = explore(hash="#text=Good%20morrow"), browser.find_element("id", "text")
    for keys, at in (((Keys.END,), 10), ((Keys.ARROW_LEFT, Keys.ARROW_LEFT), 8), (("x",), 9)):
        box.send_keys(*keys)
        page.wait(f"state.at === {at}")
    assert page.text("#cells") == "Good morrxow" and page.text("#chosen").startswith(
        "“x”, character 10 of 12"
    )
    ActionChains(browser).move_to_element(
        browser.find_elements("css selector", "#cells span")[5]
    ).perform()
    page.wait("state.hover === 5")
    assert page.text("#after") == "After Good␣m comes"
    ActionChains(browser).click().perform()
    page.wait("state.at === 5")
    browser.find_element("css selector", "[value=layers]").send_keys(Keys.ARROW_RIGHT)
    assert page.js("[document.activeElement.value, form.tab.value, $('touch').hidden]") == [
        "touch",
        "touch",
        False,
    ]


def test_tab_reaches_every_control_and_each_has_a_name(explore, browser):
    page, reached = explore(hash="#tab=write"), set()
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.add(page.js("document.activeElement.id || document.activeElement.value"))
    assert {
        "text",
        "write",
        "start",
        "temperature",
        "top-k",
        "seed",
        "fast",
        "length",
        "output",
    } <= reached
    assert (
        page.js("""all("button, input, textarea, select, [role], svg").filter(node => !(
            node.ariaLabel
            || node.matches("[aria-labelledby], label *, [role=status], #step")
            || node.textContent.trim())).length""")
        == 0
    )


def test_the_address_is_the_state(explore, browser):
    page = explore()
    page.type("Love all, trust a few.\n")
    for control in (
        "[aria-label='gate of all layers']",
        "[data-keys='2-gate']",
        "[value=flow]",
        "[value=lines]",
    ):
        page.click(control)
    assert page.js("all('[data-keys$=gate]').map(gate => gate.ariaChecked[0])") == [
        "t",
        "f",
        "t",
        "f",
        "f",
    ]
    page.js("choose(7);")
    page.wait("location.hash.includes('lines') && location.hash.includes('at=7')")
    address, now = (
        browser.current_url,
        "[[...state.off].sort(), state.at, form.tab.value, form.scale.value, box.value]",
    )
    browser.get("about:blank")
    browser.get(address)
    assert page.js(now) == [
        ["1-gate", "3-gate", "4-gate"],
        7,
        "flow",
        "lines",
        "Love all, trust a few.\n",
    ]
    page = explore(hash="#at=-3&off=9-9,x&tab=nowhere&scale=toString&text=%E0%A4%A")
    assert page.js(now)[:4] == [[], 0, "layers", "words"]
    page = explore(hash="#at=329&tab=layers")  # the eye and the caret are led to their place
    for action in ("", "box.focus();"):  # as by the tabulator
        assert page.js(f"""{action} const places = [$("pane"), cells[329]];
            const [a, b] = places.map(x => x.getBoundingClientRect());
            return [state.at, box.selectionStart, a.top <= b.top && b.bottom <= a.bottom]""") == [
            329,
            330,
            True,
        ]


def test_hostile_text_neither_runs_nor_hangs_and_none_is_no_error(explore, browser):
    text = "<script>hit = 1</script><img src=x onerror=hit=1>"
    text += "\"'&amp;</textarea>\u202e\U0001f600\u0301 end"
    page = explore(random_model(text), text)
    page.click("#step")  # which names characters, too
    page.js(
        "box.value = arguments[0] + '\\0\\ud83d<b>'; box.oninput()", text
    )  # with half a character
    page.wait()
    for t, c in enumerate(text):
        page.js("choose(arguments[0]);", t)
        if c.isascii() and c != " ":
            assert f"{c} comes" in page.text("#after") and f"“{c}”," in page.text("#chosen")
            assert page.texts("#after code *") == []
    page.click("[value=touch]")
    page.click("[data-keys='1-wedge']", "$('on-touched').textContent.length >= 120")
    assert (
        page.js("typeof hit") == "undefined"
        and not page.texts("img, #page script")
        and "Left" in page.text("#note")
    )
    page.type("e<" * 50000)
    assert page.js("shown().rows.length") == 5000 and "No more than 5,000" in page.text("#note")
    assert (
        page.js("const r = shown(); r.rows[3] = null; return r.look(4, 0).before.area") == 0
    )  # not read yet
    page.type("")
    assert page.text("#after") == page.text("#next") == "" and browser.get_log("browser") == []


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
    (tmp_path / "damaged.html").write_text(html, encoding="utf-8")
    page = explore(tmp_path / "damaged.html", wait=False)
    shown = page.js("['broken', 'page'].map(id => document.getElementById(id).checkVisibility())")
    assert changes and shown == [True, False] and "python -m explorer" in page.text("#broken")


def busy(browser):
    """Seconds that the page's own thread was busy so far. Other processes may be busy, too."""
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    found = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return next(entry["value"] for entry in found if entry["name"] == "TaskDuration")


def least_seconds(browser, code, tries=5):
    """The least seconds of several tries, each until everything is drawn."""
    times = [busy(browser)]
    for _ in range(tries):
        browser.execute_script(f"{code}; document.body.offsetHeight")
        times.append(busy(browser))
    return np.diff(times).min()


def seconds_of_a_loop(browser):
    """Seconds for 200 times the default model's multiply-adds, in a plain loop."""
    browser.execute_script("""
        W = new Float32Array(677440).fill(0.5);
        v = new Float32Array(128).fill(0.25);
        loop = () => {
            let sum = 0;
            for (let t = 0; t < 200; t++)
                for (let i = 0; i < W.length; i++) sum += W[i] * v[i & 127];
            return sum;
        };
        loop()""")
    return least_seconds(browser, "loop()", tries=10)


def test_a_page_is_there_and_writes_in_good_time(explore, browser):
    page = explore()
    page.js("letters = explorer.shown().letters(); write(letters, 1000)")
    assert least_seconds(browser, "write(letters, 200)", tries=30) < 2 * seconds_of_a_loop(browser)


@pytest.mark.parametrize(
    "kind", [{}, {"memory": True}, {"positions": True}], ids=["default", "memory", "positions"]
)
@pytest.mark.parametrize(
    "place, edit",
    [
        (0, "letter + text"),
        (250, "text.slice(0, 250) + letter + text.slice(250)"),
        (498, "text + letter"),
    ],
    ids=str,
)
def test_a_new_picture_at_once(explore, browser, kind, place, edit):
    """If all depends on earlier characters, the changed place is drawn first, the rest follows."""
    page = explore(random_model(TEXT, n_layer=4, d_model=128, rank=32, **kind), (TEXT * 5)[:500])
    choose = f"steps = 0; choose({place});"
    page.js(f"""step = model.stream_step;
        model.stream_step = (...x) => (steps++, step.apply(model, x));
        {choose}""")
    code = (
        f"const text = box.value, letter = 'ae'[text.length % 2]; box.value = {edit}; box.oninput()"
    )
    # the first picture; another letter each time, so that nothing stays
    code += "; clearTimeout(timers.slow)"
    assert least_seconds(browser, code) < seconds_of_a_loop(browser)
    page.js("refresh();")
    page.wait()
    page.js(choose)
    before = page.text("#cards")
    page.js("box.setRangeText(':', arguments[0], arguments[0] + 1); box.oninput()", place)
    assert page.text("#cards") != before and page.text("#chosen").startswith("“:”")
    page.wait()
    assert kind or page.js("steps <= model.reach + 8")  # no more than the edit can reach
