"""python -m explorer: how a page is made, on which text it opens, and what it refuses."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import PAGE

import explorer.__main__ as maker
import grassmann as G
from charlm.checkpoint import load_checkpoint, save_checkpoint
from charlm.text import encode, text_sha256, vocabulary

ROOT = PAGE.parents[1]
SHIPPED = PAGE.with_name("shakespeare.npz")
LINES = "".join(f"line {k} of the text\n" for k in range(400))


def make(folder, *args, stdout=subprocess.PIPE, **how):
    command = [sys.executable, "-m", "explorer", *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    streams = {"stdout": stdout, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.run(command, cwd=folder, env=env, **streams, **how)


def save(path, text=LINES, mixer="grassmann", **extra):
    """A checkpoint of a small model, as after a run on LINES, and the text as it is now."""
    data = path.with_name("text.txt")
    data.write_text(text, encoding="utf-8")
    vocab = vocabulary(LINES)
    config = G.Config(len(vocab), n_layer=1, d_model=8, rank=4, context=8, n_head=2, mixer=mixer)
    run = {
        "vocab": vocab,
        "most_common": 0,
        "best": [10, 1.5],
        "settings": {"data": [str(data)]},
        "text_sha256": text_sha256(LINES),
    }
    save_checkpoint(path, G.init_params(config), config, **run | extra)
    return path


def model_in(page):
    source = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="model-data">(.*?)</script>', source)[1])


def test_the_model_in_the_repository_predicts_its_passage():
    params, config, extra = load_checkpoint(SHIPPED)
    tokens = encode(PAGE.with_name("passage.txt").read_text(encoding="utf-8"), extra["vocab"])
    assert G.validation_loss(params, config, tokens) == pytest.approx(1.3225, abs=1e-3)
    assert "/" not in str(extra["settings"])
    assert SHIPPED.stat().st_size <= 3_000_000


def test_the_page_in_the_repository_is_that_of_its_model(tmp_path):
    done = make(tmp_path, "--out", "page.html")  # where nothing was trained yet
    assert "there is no out/best.npz yet" in done.stderr
    made = (tmp_path / "page.html").read_bytes()
    assert made == PAGE.read_bytes(), "tests/explorer/ship.py makes it again"


def test_it_opens_on_the_most_surprising_word_of_the_held_out_text(tmp_path):
    page = tmp_path / "a.html"
    maker.write(page, save(tmp_path / "best.npz"), None)
    model = model_in(page)
    text = LINES[len(LINES) - len(LINES) // 10 :].lstrip()
    assert len(model["text"]) > 700
    assert text.startswith(model["text"] + "\n")
    params, config, extra = load_checkpoint(tmp_path / "best.npz")
    tokens = encode(text[:200], extra["vocab"])
    p = np.exp(G.forward(params, config, tokens[None])[0].astype(float))
    bits = np.log2(p.sum(-1))[:-1] - np.log2(p[np.arange(199), tokens[1:]])
    words = [range(*word.span()) for word in re.finditer(r"\S+", text[:200]) if word.start() >= 40]
    word = max(words, key=lambda word: sum(bits[t - 1] for t in word))
    assert model["at"] == max(word, key=lambda t: bits[t - 1])


@pytest.mark.parametrize("other", [{"text": LINES + "x"}, {"text_sha256": None}])
def test_without_the_text_of_the_run_the_model_writes(tmp_path, other):
    page = tmp_path / "a.html"
    maker.write(page, save(tmp_path / "best.npz", **other), None)
    assert len(model_in(page)["text"]) == 400


@pytest.mark.parametrize(
    "out, reason",
    [
        ("best.npz", "a checkpoint"),
        ("new.NPZ", "a checkpoint"),
        ("link", "a checkpoint"),
        ("folder", "not a file"),
        ("none/x.html", "no folder"),
    ],
)
def test_a_place_that_is_taken_is_refused(tmp_path, out, reason):
    path = save(tmp_path / "best.npz")
    before = path.read_bytes()
    (tmp_path / "link").hardlink_to(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(G.UserError, match=f"--out .*{out}.* {reason}"):
        maker.write(tmp_path / out, path, None)
    assert path.read_bytes() == before


@pytest.mark.parametrize("best", ["x", [1], [1, None], [1, -1], [1, 10**400], True])
def test_a_loss_that_is_not_one_is_refused(tmp_path, best):
    path = save(tmp_path / "odd.npz", best=best)
    with pytest.raises(G.UserError, match=r"its best validation loss is .*; expected"):
        maker.write(tmp_path / "a.html", path, None)


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError("full")

    page = tmp_path / "explorer.html"
    page.write_text("old")
    path = save(tmp_path / "best.npz")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        maker.write(page, path, None)
    assert page.read_text() == "old"
    assert [*tmp_path.glob("*.tmp")] == []


@pytest.mark.parametrize(
    "mixer, name", [("attention", "attention"), ("mine.py", "a layer of your own")]
)
def test_another_mixer_is_one_sentence(tmp_path, monkeypatch, mixer, name):
    with monkeypatch.context() as own:
        own.setitem(G.MIXERS, mixer, G.MIXERS.get(mixer, G.MIXERS["grassmann"]))
        save(tmp_path / "best.npz", mixer=mixer)
    done = make(tmp_path, "best.npz")
    assert done.stderr.count("\n") == 1
    assert f"the explorer cannot show best.npz: its mixer is {name}, and only" in done.stderr


def test_a_run_that_was_stopped_and_a_closed_standard_output(tmp_path):
    (tmp_path / "out").mkdir()
    save(tmp_path / "out" / "last.npz")
    done = make(tmp_path, stdout=None, preexec_fn=lambda: os.close(1))
    assert done.stderr == "there is no out/best.npz yet; using out/last.npz\n"
    assert model_in(tmp_path / "out" / "explorer.html")["about"].startswith("last.npz: ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_standard_output_is_one_sentence(tmp_path):
    save(tmp_path / "last.npz")
    with open("/dev/full", "w") as full:
        done = make(tmp_path, "last.npz", stdout=full)
    assert done.stderr == "python -m explorer: standard output: No space left on device\n"
