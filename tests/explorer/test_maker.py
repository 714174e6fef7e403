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

ROOT, LINES = PAGE.parents[1], "".join(f"line {k} of the text\n" for k in range(400))


def make(folder, *args, stdout=subprocess.PIPE, **how):
    command, env = (
        [sys.executable, "-m", "explorer", *map(str, args)],
        os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, cwd=folder, env=env, encoding="utf-8", **how
    )


def save(path, text=LINES, mixer="grassmann", **extra):
    """A checkpoint of a small model, as after a run on LINES, and the text as it is now."""
    config = G.Config(
        len(vocabulary(LINES)), n_layer=1, d_model=8, rank=4, context=8, n_head=2, mixer=mixer
    )
    (data := path.with_name("text.txt")).write_text(text, encoding="utf-8")
    run = {
        "vocab": vocabulary(LINES),
        "most_common": 0,
        "best": [10, 1.5],
        "settings": {"data": [str(data)]},
    }
    save_checkpoint(
        path, G.init_params(config), config, **run | {"text_sha256": text_sha256(LINES)} | extra
    )
    return path


def model_in(page):
    return json.loads(
        re.search(r'id="model-data">(.*?)</script>', page.read_text(encoding="utf-8"))[1]
    )


def test_the_model_in_the_repository_predicts_its_passage_and_makes_its_page(tmp_path):
    params, config, extra = load_checkpoint(ROOT / "explorer/shakespeare.npz")
    tokens = encode(PAGE.with_name("passage.txt").read_text(encoding="utf-8"), extra["vocab"])
    assert G.validation_loss(params, config, tokens) == pytest.approx(1.3225, abs=1e-3)
    assert (
        "/" not in str(extra["settings"])
        and (ROOT / "explorer/shakespeare.npz").stat().st_size <= 3_000_000
    )
    done = make(tmp_path, "--out", "page.html")  # where nothing was trained yet
    assert done.returncode == 0 and "there is no out/best.npz yet" in done.stderr
    assert (tmp_path / "page.html").read_bytes() == PAGE.read_bytes(), (
        "tests/explorer/ship.py makes it again"
    )


def test_it_opens_on_the_most_surprising_word_of_the_held_out_text(tmp_path):
    text, page = LINES[len(LINES) - len(LINES) // 10 :].lstrip(), tmp_path / "a.html"
    maker.write(page, save(tmp_path / "best.npz"), None)
    model, (params, config, extra) = model_in(page), load_checkpoint(tmp_path / "best.npz")
    assert len(model["text"]) > 700 and text.startswith(model["text"] + "\n")
    tokens = encode(text[:200], extra["vocab"])
    p = np.exp(G.forward(params, config, tokens[None])[0].astype(float))
    bits = np.log2(p.sum(-1))[:-1] - np.log2(p[np.arange(199), tokens[1:]])
    words = [range(*word.span()) for word in re.finditer(r"\S+", text[:200]) if word.start() >= 40]
    word = max(words, key=lambda word: sum(bits[t - 1] for t in word))
    assert model["at"] == max(word, key=lambda t: bits[t - 1])
    for other in ({"text": LINES + "x"}, {"text_sha256": None}):  # then the model writes
        maker.write(page, save(tmp_path / "best.npz", **other), None)
        assert len(model_in(page)["text"]) == 400


def test_what_is_refused_leaves_everything_as_it_was(tmp_path, monkeypatch):
    path, page = save(tmp_path / "best.npz"), tmp_path / "explorer.html"
    before, full = path.read_bytes(), lambda *paths: (_ for _ in ()).throw(OSError("full"))
    (tmp_path / "link").hardlink_to(path), (tmp_path / "folder").mkdir(), page.write_text("old")
    for other, reason in (
        ("best.npz", "a checkpoint"),
        ("new.NPZ", "a checkpoint"),
        ("link", "a checkpoint"),
        ("folder", "not a file"),
        ("none/x.html", "no folder"),
    ):
        with pytest.raises(G.UserError, match=f"--out .*{other}.* {reason}"):
            maker.write(tmp_path / other, path, None)
    with pytest.raises(G.UserError, match="'€'"):
        maker.write(page, path, "line €")
    for best in ("x", [1], {}, [1, None], [1, -1], [1, 10**400], True):
        with pytest.raises(G.UserError, match=r"its best validation loss is .*; expected"):
            maker.write(page, save(tmp_path / "odd.npz", best=best), None)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        maker.write(page, path, None)
    assert (
        page.read_text() == "old" and path.read_bytes() == before and not [*tmp_path.glob("*.tmp")]
    )


def test_another_mixer_and_a_full_or_closed_standard_output_are_a_sentence_at_most(
    tmp_path, monkeypatch
):
    for mixer, name in (("attention", "attention"), ("mine.py", "a layer of your own")):
        with monkeypatch.context() as own:
            own.setitem(G.MIXERS, mixer, G.MIXERS.get(mixer, G.MIXERS["grassmann"]))
            save(tmp_path / "best.npz", mixer=mixer)
        done = make(tmp_path, "best.npz")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"the explorer cannot show best.npz: its mixer is {name}, and only" in done.stderr
    (tmp_path / "out").mkdir()
    save(tmp_path / "out" / "last.npz")  # of a run that was stopped
    done = make(tmp_path, stdout=None, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (
        0,
        "there is no out/best.npz yet; using out/last.npz\n",
    )
    assert model_in(tmp_path / "out" / "explorer.html")["about"].startswith("last.npz: ")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = make(tmp_path, "out/last.npz", stdout=full)
        assert done.stderr == "python -m explorer: standard output: No space left on device\n"
