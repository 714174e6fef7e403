"""Text in, tokens, text out: any Unicode, any file, and the download of Tiny Shakespeare from a server of our own."""

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from kill_and_resume import ROOT
from test_cli import MODEL, as_root, refused

import text
from grassmann import generate, load_checkpoint
from text import decode, encode, load_text, vocabulary

# Any code point, and often one of those that break programs: line ends, NUL, combining marks, a byte order mark,
# astral planes, emoji with joiners, lone surrogates.
ODD = "\r\n\0\t e\u0301\u0308\ufeff\u2028\u200d\x85🙂👩\U0001f3fd\ud800\udbff\udc00\udfff\ufffe\U0010ffff"


def random_texts(seed: int, count: int = 200) -> list[str]:
    """Texts of up to 30 characters, each odd or any code point at all; the same ones for the same seed."""
    rng = random.Random(seed)
    texts = [""]
    while len(texts) < count:
        characters = [rng.choice(ODD) if rng.random() < 0.5 else chr(rng.randrange(0x110000)) for _ in range(30)]
        texts.append("".join(characters[: rng.randrange(1, 31)]))
    return texts


def written(folder, content):
    """A file with this text, or these bytes."""
    path = folder / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


# ---- tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("string", random_texts(0), ids=ascii)
def test_every_text_survives_the_round_trip(string):
    vocab = vocabulary(string)
    assert vocab == sorted({ord(c) for c in string})
    tokens = encode(string, vocab) if string else np.zeros(0, np.int32)
    assert np.issubdtype(tokens.dtype, np.integer) and tokens.shape == (len(string),)
    assert decode(tokens, vocab) == string
    assert decode(tokens.tolist(), vocab) == decode(iter(tokens), vocab) == string


@pytest.mark.parametrize("string, other", list(zip(random_texts(1)[1:], random_texts(2)[1:], strict=True)), ids=ascii)
def test_characters_outside_the_vocabulary_are_named(string, other):
    vocab, missing = vocabulary(string), sorted(set(other) - set(string))
    if not missing:
        assert decode(encode(other, vocab), vocab) == other
        return
    with pytest.raises(ValueError) as error:
        encode(other, vocab)
    message = str(error.value)
    assert message.isascii() and message.isprintable()
    assert message == "not in the vocabulary: " + " ".join(map(ascii, missing[:10]))


def test_an_empty_text_needs_no_vocabulary():
    for vocab in ([], [65]):
        assert encode("", vocab).tolist() == []
    assert vocabulary("") == [] and decode([], [65]) == ""


def test_equal_looking_texts_stay_different():
    """Tokens are code points, not characters as the eye counts them: nothing is normalised."""
    composed, decomposed = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    assert len(encode(composed, vocabulary(composed))) == 1
    assert len(encode(decomposed, vocabulary(decomposed))) == 2


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 65535, 65536, 65537, 0x110000])
def test_vocabularies_of_all_sizes(count):
    """Up to all code points that there are."""
    string = "".join(map(chr, range(0x110000 - count, 0x110000)))
    vocab = vocabulary(string)
    tokens = encode(string[::-1], vocab)
    assert len(vocab) == count and tokens.tolist() == list(range(count))[::-1]
    assert decode(tokens, vocab) == string[::-1]


@pytest.mark.parametrize("before", [2**20 - 1, 2**20, 2**21 - 2])
def test_long_texts(before):
    """Whatever pieces a long text is worked through in, nothing is lost where they meet."""
    string = "a" * before + "e\u0301🙂\r\n\ud800" * 3 + "b" * 10
    vocab = vocabulary(string)
    assert vocab == sorted({ord(c) for c in string})
    assert decode(encode(string, vocab), vocab) == string
    with pytest.raises(ValueError, match=r"'\\ud800'"):
        encode(string, [point for point in vocab if point != 0xD800])


# ---- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("string", random_texts(3, 60), ids=ascii)
def test_every_text_can_be_read(tmp_path, string):
    """As it is written, but for a byte order mark in front."""
    assert load_text(str(written(tmp_path, string))) == string.removeprefix("\ufeff")


@pytest.mark.parametrize("content, string", [
    (b"one\r\ntwo\rthree\n", "one\r\ntwo\rthree\n"),
    (b"\xef\xbb\xbfmark", "mark"),
    (b"\xef\xbb\xbf\xef\xbb\xbfmark", "\ufeffmark"),
    (b"in the\xef\xbb\xbf middle", "in the\ufeff middle"),
    (b"a\0b", "a\0b"),
    (b"lone \xed\xa0\x80 surrogate", "lone \ud800 surrogate"),
    (b"a pair \xed\xa0\xbd\xed\xb9\x82 of them", "a pair \ud83d\ude42 of them"),
    (b"", ""),
])  # fmt: skip
def test_bytes_and_what_they_mean(tmp_path, content, string):
    assert load_text(str(written(tmp_path, content))) == string


@pytest.mark.parametrize("content", [random.Random(k).randbytes(k % 21) for k in range(60)], ids=repr)
def test_any_bytes_are_read_or_refused(tmp_path, content):
    path = written(tmp_path, content)
    try:
        string = load_text(str(path))
    except ValueError as error:
        assert "is not UTF-8 text" in str(error) and str(path) in str(error)
        with pytest.raises(UnicodeDecodeError):
            content.decode("utf-8", "surrogatepass")
    else:
        assert string.encode("utf-8", "surrogatepass") == content.removeprefix(b"\xef\xbb\xbf")


def test_the_default_text():
    string = load_text(None)
    assert len(string) > 100_000 and string.endswith("\n") and string == load_text(None)
    vocab = vocabulary(string)
    assert 90 < len(vocab) < 300 and decode(encode(string, vocab), vocab) == string


PEAK = """
import re, sys
sys.path.insert(0, sys.argv[1])
import text, train_char
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
parser = train_char.build_parser()
before, arguments = peak(), parser.parse_args(sys.argv[3:])
if sys.argv[2] == "text":
    string = text.load_text(arguments.data)
    tokens = text.encode(string, text.vocabulary(string))
else:
    run = train_char.runs.make_run(arguments, parser)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads its own peak memory from /proc")
@pytest.mark.parametrize("what", ["text", "run"])
def test_memory_for_a_large_text(tmp_path, what):
    """Loading takes a small multiple of the file's size: text 1, tokens 1 (with few characters), copies for a while.

    (getrusage would count the memory of the test process too, whose fork the child is.)
    """
    size = 30_000_000
    path = written(tmp_path, b"All work and no play makes Jack a dull boy\n" * (size // 43))
    command = [sys.executable, "-c", PEAK, ROOT, what, *MODEL.split(), "--data", path, "--out", tmp_path / "out"]
    factor = int(subprocess.run(command, capture_output=True, check=True).stdout) / size
    assert 1 < factor < 5


# ---- training on them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("string", [
    "one\r\ntwo three\r\n" * 20,
    "👩\u200d🚀 e\u0301 \U0001f3fd\U0010ffff Ω\n" * 20,
    "a" * 100,
    "zero \0 and \ud800 half \udfff\n" * 20,
    "acbc" * 20,
], ids=["CRLF", "emoji", "one character", "NUL and surrogates", "no newline"])  # fmt: skip
def test_training_and_sampling_on_odd_texts(tmp_path, string):
    """What an ASCII terminal cannot show is printed escaped."""
    path, out, env = written(tmp_path, string), tmp_path / "out", os.environ | {"PYTHONIOENCODING": "ascii"}
    options = f"{MODEL} --iters 10 --lr 0.1 --warmup-iters 0".split()  # enough for one character to matter to the next
    command = [sys.executable, ROOT / "train_char.py", *options, "--data", path, "--out", out]
    training = subprocess.run(command, capture_output=True, env=env)
    assert (training.returncode, training.stderr) == (0, b"") and training.stdout.isascii()
    params, config, extra = load_checkpoint(out / "best.npz")
    assert extra["vocab"] == vocabulary(string)

    start = "\n" if "\n" in string else max(set(string), key=string.count)
    for prompt, encoding in ((string[:5], "ascii"), (string[:5], "utf-8"), ("", "ascii")):
        tokens = generate(params, config, encode(prompt or start, extra["vocab"]), 60, seed=1)
        expected = prompt + decode(tokens, extra["vocab"]) + "\n"
        command = [sys.executable, ROOT / "sample.py", out / "best.npz", "--length", "60", "--temperature", "1"]
        command += ["--seed", "1", "--prompt", os.fsencode(prompt)]
        sampling = subprocess.run(command, capture_output=True, env=env | {"PYTHONIOENCODING": encoding})
        assert sampling.stderr == b""
        assert sampling.stdout.replace(os.linesep.encode(), b"\n") == expected.encode(encoding, "backslashreplace")


# ---- Tiny Shakespeare ---------------------------------------------------------------------------------

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """serve(answer) starts a server that lets `answer(handler)` answer; returns the list of paths asked for."""
    servers = []
    for variable in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(text, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())

    def start(answer):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                answer(self)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setattr(text, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(body, length=None, status=200):
    """An answer with this body, whatever length it claims to have."""

    def answer(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def cached_files(tmp_path):
    return [path for path in tmp_path.rglob("*") if path.is_file()]


def test_download_once(serve, tmp_path, capsys):
    asked = serve(send(PLAY))
    assert load_text("shakespeare") == PLAY.decode()
    assert asked == ["/input.txt"] and "downloading http" in capsys.readouterr().out
    (cached,) = cached_files(tmp_path)
    assert (cached.name, cached.read_bytes()) == ("shakespeare.txt", PLAY)
    assert load_text("shakespeare") == PLAY.decode()
    assert len(asked) == 1 and capsys.readouterr().out == ""


def test_a_damaged_copy_is_downloaded_again(serve, tmp_path):
    asked = serve(send(PLAY))
    load_text("shakespeare")
    (cached,) = cached_files(tmp_path)
    for damaged in (b"", PLAY[:-1], PLAY.replace(b"further", b"farther")):
        cached.write_bytes(damaged)
        assert load_text("shakespeare") == PLAY.decode()
        assert cached.read_bytes() == PLAY
    assert len(asked) == 4


def test_the_cache_is_where_xdg_says(serve, tmp_path, monkeypatch):
    serve(send(PLAY))
    monkeypatch.setattr(text.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert text.shakespeare() == tmp_path / "cache" / "grassmann" / "shakespeare.txt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert text.shakespeare() == tmp_path / ".cache" / "grassmann" / "shakespeare.txt"


def test_nobody_is_at_home(monkeypatch):
    """A user without a home folder, as in some containers."""

    def nowhere(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(text.Path, "expanduser", nowhere)
    with pytest.raises(ValueError, match=r"no home folder .* --data FILE"):
        load_text("shakespeare")


BAD_ANSWERS = {
    "other text": (send(PLAY + b"!"), "wrong SHA-256"),
    "empty": (send(b""), "wrong SHA-256"),
    "cut connection": (send(PLAY[:30], length=len(PLAY)), ""),
    "not found": (send(PLAY, status=404), "404"),
    "server error": (send(b"", status=500), "500"),
    "not HTTP": (lambda handler: handler.wfile.write(b"220 welcome to FTP\r\n"), "could not be downloaded"),
    "nothing": (lambda handler: None, "could not be downloaded"),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_bad_downloads(serve, tmp_path, kind):
    """They raise one sentence that says what to do instead, and leave nothing in the cache."""
    answer, message = BAD_ANSWERS[kind]
    asked = serve(answer)
    with pytest.raises(ValueError) as error:
        load_text("shakespeare")
    assert message in str(error.value) and "--data FILE" in str(error.value)
    assert len(asked) == 1 and cached_files(tmp_path) == []


def test_no_server(serve, monkeypatch, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        monkeypatch.setattr(text, "SHAKESPEARE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/")
        with pytest.raises(ValueError, match=r"could not be downloaded \(.*refused.*--data FILE"):
            load_text("shakespeare")
    assert cached_files(tmp_path) == []


def test_a_cache_that_cannot_be_written(serve, tmp_path, monkeypatch):
    serve(send(PLAY))
    monkeypatch.setattr(text.sys, "platform", "linux")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot write .*shakespeare\.txt: Not a directory"):
        load_text("shakespeare")
    if not as_root:
        (tmp_path / "locked").mkdir(mode=0o555)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "locked"))
        with pytest.raises(ValueError, match=r"cannot write .*shakespeare\.txt: Permission denied"):
            load_text("shakespeare")


def start_download(tmp_path, proxy):
    """train_char.py --data shakespeare, which reaches the internet only through a proxy on this machine."""
    env = os.environ | {"https_proxy": f"http://127.0.0.1:{proxy.getsockname()[1]}", "no_proxy": "", "NO_PROXY": ""}
    env |= dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"), str(tmp_path))
    command = [sys.executable, ROOT / "train_char.py", "--data", "shakespeare", "--out", tmp_path / "out"]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_program_without_a_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        process = start_download(tmp_path, proxy)
        connection, _ = proxy.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 503 no network\r\n\r\n")
        process.stdout, process.stderr = process.communicate()
    assert "could not be downloaded" in refused(process) and not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_during_the_download(tmp_path):
    """Before there is anything to save, Ctrl-C ends the program without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        process = start_download(tmp_path, proxy)
        connection, _ = proxy.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate()
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in errors
