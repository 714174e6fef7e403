"""text.py: any Unicode, any file, and the download of Tiny Shakespeare from a server of our own."""

import hashlib
import os
import random
import signal
import sys
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from kill_and_resume import MODEL

import text
from checkpoint import load_checkpoint
from grassmann import generate
from text import decode, encode, load_text, vocabulary

# Often one of those that break programs: line ends, NUL, combining marks, a byte order mark, astral
# planes, emoji with joiners, lone surrogates.
ODD = "\r\n\0\t e\u0301\u0308\ufeff\u2028\u200d\x85🙂👩\U0001f3fd\ud800\udbff\udfff\ufffe\U0010ffff"

def random_texts(seed):
    """Two hundred texts of up to 30 characters, each odd or any code point at all."""
    rng = random.Random(seed)
    kinds = lambda: [rng.choice(ODD), chr(rng.randrange(0x110000))]  # noqa: E731
    lengths = [0, *(rng.randrange(1, 31) for _ in range(199))]
    return ["".join(rng.choice(kinds()) for _ in range(length)) for length in lengths]

@pytest.mark.parametrize("strings", [
    random_texts(0), ["a" * n + "e\u0301🙂\r\n\ud800" * 3 + "b" for n in (2**20 - 1, 2**21 - 2)],
    ["".join(map(chr, range(0x110000 - n, 0x110000))) for n in (255, 256, 65536, 0x110000)]])
def test_every_text_survives_the_round_trip(strings):
    """With vocabularies of all sizes, up to all code points; where pieces of a long text meet."""
    for string in strings:
        vocab = vocabulary(string)
        assert vocab == sorted({ord(c) for c in string})
        tokens = encode(string, vocab) if string else np.zeros(0, np.int32)
        assert np.issubdtype(tokens.dtype, np.integer) and tokens.shape == (len(string),)
        assert decode(tokens, vocab) == decode(iter(tokens.tolist()), vocab) == string

def test_characters_outside_the_vocabulary_are_named():
    for string, other in zip(random_texts(1)[1:], random_texts(2)[1:], strict=True):
        vocab, missing = vocabulary(string), sorted({*other} - {*string})
        if missing:
            named = " ".join(map(repr, missing[:10]))
            with pytest.raises(ValueError) as error:
                encode(other, vocab)
            assert str(error.value) == f"not in the model's vocabulary: {named}"
    assert encode("", []).tolist() == vocabulary("") == []

def test_any_bytes_are_read_or_refused(tmp_path):
    """As they are, but for a byte order mark in front."""
    path, mark = tmp_path / "text", b"\xef\xbb\xbf"
    contents = [b"one\r\ntwo\rthree\n", mark + mark + b"twice", b"in the" + mark + b"middle",
                b"", b"a\0b", b"lone \xed\xa0\x80", b"a pair \xed\xa0\xbd\xed\xb9\x82", b"cut \xc3",
                *(random.Random(k).randbytes(k % 21) for k in range(60)),
                *(string.encode("utf-8", "surrogatepass") for string in random_texts(3))]
    for content in contents:
        path.write_bytes(content)
        try:
            string = load_text(str(path))
        except ValueError as error:
            assert f"{path} is not UTF-8 text" in str(error)
            with pytest.raises(UnicodeDecodeError):
                content.decode("utf-8", "surrogatepass")
        else:
            assert string.encode("utf-8", "surrogatepass") == content.removeprefix(mark)

def test_several_files_and_folders(tmp_path, capsys, monkeypatch):
    """In order; of a folder all text below it, by name, but nothing that is hidden and no run's log."""
    files = {"in/b.txt": b"b", "in/a/z.txt": b"z\n", "in/a/c.txt": b"c", "one.txt": b"1",
             "in/.git/config": b"no", "in/.hidden": b"no", "in/picture.png": b"\x89PNG",
             "in/out/last.npz": b"PK\xff", "in/out/log.csv": b"no", "in/out/previous-1/log.csv": b"no"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    one, folder = str(tmp_path / "one.txt"), str(tmp_path / "in")
    assert load_text([one, folder]) == "1\nc\nz\nb\n" and load_text([one]) == load_text(one) == "1"
    assert f"{folder}: 3 of 4 files are UTF-8 text, the others are left out\n" == capsys.readouterr().out
    assert load_text(f"{folder}/.git") == "no"  # (but if it is named)
    assert capsys.readouterr().out == ""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no UTF-8 text in .*empty"):
        load_text([one, str(tmp_path / "empty")])
    monkeypatch.setattr(text, "MOST_BYTES", 1)
    with pytest.raises(ValueError, match=r"z\.txt is larger than"):  # not left out in silence
        load_text(folder)

def test_the_default_text(monkeypatch):
    string = load_text(None)
    assert len(string) > 100_000 and string[-1] == "\n" and 90 < len(vocabulary(string)) < 300
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="without its documentation; give a text: --data FILE"):
        load_text(None)

def test_memory_for_a_large_text(tmp_path):
    """A small multiple of the file's: text 1, tokens 1 (few characters), copies for a while."""
    (tmp_path / "text").write_text("All work and no play makes Jack a dull boy\n" * 500_000)
    tracemalloc.start()
    corpus = text.read_corpus(str(tmp_path / "text"), 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1 < peak / (len(corpus.train) + len(corpus.val)) < 5

@pytest.mark.parametrize("string", [
    "one\r\ntwo three\r\n" * 20, "👩\u200d🚀 e\u0301 \U0001f3fd\U0010ffff Ω\n" * 20, "a" * 100,
    "zero \0 and \ud800 half \udfff\n" * 20, "acbc" * 20])
def test_training_and_sampling_on_odd_texts(program, plain, tmp_path, string):
    """What an ASCII terminal cannot show is printed escaped."""
    (tmp_path / "text").write_bytes(string.encode("utf-8", "surrogatepass"))
    out, prompt = tmp_path / "out", string[:5]
    ascii = {"encoding": None, "env": plain | {"PYTHONIOENCODING": "ascii"}}
    options = [*MODEL, "--iters", 10, "--lr", 0.1, "--warmup-iters", 0]  # to matter to the next one
    options += ["--data", tmp_path / "text", "--out", out]
    training = program("train_char.py", *options, **ascii)
    assert (training.returncode, training.stderr) == (0, b"") and training.stdout.isascii()
    params, config, extra = load_checkpoint(out / "best.npz")
    assert extra["vocab"] == vocabulary(string)
    tokens = generate(params, config, encode(prompt, extra["vocab"]), 60, seed=1)
    expected = prompt + decode(tokens, extra["vocab"]) + "\n"
    how = ["--length", 60, "--temperature", 1, "--seed", 1, "--prompt", os.fsencode(prompt)]
    sampling = program("sample.py", out / "best.npz", *how, **ascii)
    assert (sampling.stdout, sampling.stderr) == (expected.encode("ascii", "backslashreplace"), b"")

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"

@pytest.fixture
def serve(tmp_path, monkeypatch):
    """serve(body, status, length) starts a server that answers so: a list of what it is asked."""
    servers = []
    monkeypatch.setattr(text.sys, "platform", "linux")
    for variable, value in (("HOME", tmp_path), ("XDG_CACHE_HOME", tmp_path), ("no_proxy", "*")):
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setattr(text, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())

    def serve(body, status=200, length=None):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            log_message = lambda *args: None  # noqa: E731

            def do_GET(self):
                asked.append(self.path)
                if status:
                    self.send_response(status)
                    self.send_header("Content-Length", str(length or len(body)))
                    self.end_headers()
                self.wfile.write(body)

        servers.append(server := ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setattr(text, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/it")
        return asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()

def test_download_once_and_again_if_it_is_damaged(serve, tmp_path, monkeypatch, capsys):
    asked, cached = serve(PLAY), tmp_path / "grassmann" / "shakespeare.txt"
    for damaged in (None, b"", PLAY[:-1], PLAY.replace(b"further", b"farther")):
        if damaged is not None:
            cached.write_bytes(damaged)
        for said in ("downloading http", ""):
            assert load_text("shakespeare") == PLAY.decode()
            assert capsys.readouterr().out.startswith(said) and cached.read_bytes() == PLAY
    assert len(asked) == 4 and [*cached.parent.iterdir()] == [cached]
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert text.shakespeare() == tmp_path / ".cache" / "grassmann" / "shakespeare.txt"
    monkeypatch.setattr(text.Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(ValueError, match=r"no home folder .* --data FILE"):
        load_text("shakespeare")  # as in some containers

@pytest.mark.parametrize("answer, message", [
    ((PLAY + b"!",), "wrong SHA-256"), ((b"",), "wrong SHA-256"), ((PLAY[:30], 200, 99), "30 by"),
    ((PLAY, 404), "404"), ((b"", 500), "500"), ((b"", 0), "not be"), ((b"220 FTP\r\n", 0), "220")])
def test_bad_downloads(serve, call, refused, tmp_path, answer, message):
    """They end in one sentence that says what to do instead, and leave nothing in the cache."""
    asked = serve(*answer)
    sentence = refused(call("train_char.py", "--data", "shakespeare", "--out", tmp_path / "out"))
    assert message in sentence and "--data FILE" in sentence
    assert len(asked) == 1 and not list(tmp_path.iterdir())

def test_a_cache_that_cannot_be_written(serve, tmp_path, monkeypatch):
    serve(PLAY)
    (tmp_path / "grassmann").write_text("mine")
    with pytest.raises(ValueError, match=r"cannot write .*shakespeare\.txt: File exists"):
        load_text("shakespeare")

def test_ctrl_c_during_the_download(call, monkeypatch, tmp_path):
    """Before there is anything to save, it ends the program, without a word."""
    monkeypatch.setattr(text.urllib.request, "urlopen", lambda url, timeout: signal.raise_signal(2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    process = call("train_char.py", "--data", "shakespeare", "--out", tmp_path / "out")
    assert (process.returncode, process.stderr) == (130, "") and not (tmp_path / "out").exists()
