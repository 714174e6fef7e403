"""text.py: any Unicode, any file, and the download of Tiny Shakespeare."""

import hashlib
import io

import numpy as np
import pytest
from kill_and_resume import MODEL, TEXT

from charlm import text
from charlm.text import decode, encode, load_text, plain_text, read_corpus, vocabulary

# Line ends, NUL, combining marks, a byte order mark, astral planes, joiners, lone surrogates.
ODD = "\r\n\0\t e\u0301\u0308\ufeff\u2028\u200d\x85🙂👩\U0001f3fd\ud800\udbff\udfff\ufffe\U0010ffff"


def test_every_text_survives_the_round_trip():
    """With vocabularies of all sizes, and in a long text."""
    for string in [
        ODD,
        "a" * (2**20 - 1) + ODD,
        *("".join(map(chr, range(n))) for n in (255, 256, 257, 65537)),
    ]:
        vocab, other = vocabulary(string), "\U000e0001"
        assert vocab == sorted({ord(c) for c in string})
        tokens = encode(string, vocab)
        assert np.issubdtype(tokens.dtype, np.integer) and decode(tokens, vocab) == string
        with pytest.raises(ValueError, match=r"not in the model's vocabulary: '.U000e0001'$"):
            encode(string + other, vocab)
    with pytest.raises(ValueError, match="NFC"):
        encode("fu\u0308r", vocabulary("f\u00fcr"))


def test_several_files_and_folders(tmp_path, capsys, monkeypatch):
    """In order; of a folder all text below it, by name, except hidden files and those of a run.

    What is too large or not UTF-8 is left out, and a line says so. A byte order mark in front
    goes, CRLF is LF.
    """
    files = {
        "in[2]/b.txt": b"b",
        "in[2]/a/z.txt": b"z\n",
        "in[2]/a/c.md": "\ufeffc\r\n\ufeff\rd".encode(),
        "one.txt": b"1",
        "in[2]/.git/config": b"no",
        "in[2]/picture.png": b"\x89PNG",
        "in[2]/log.csv": b"l",
        "in[2]/large": bytes(99),
        "in[2]/out/last.npz": b"PK\xff",
        "in[2]/out/log.csv": b"no",
        "in[2]/out/log.csv.tmp": b"no",
        "in[2]/out/previous-1/best.npz": b"",
        "in[2]/out/previous-1/log.csv": b"no",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "in[2]" / "endless").symlink_to("/dev/zero")
    monkeypatch.setattr(text, "MOST_BYTES", 19)
    one, folder = str(tmp_path / "one.txt"), str(tmp_path / "in[2]")
    assert (
        load_text([one, folder]) == "1\nc\n\ufeff\rd\nz\nb\nl\n"
        and load_text([one]) == load_text(one) == "1"
    )
    said = capsys.readouterr().out
    assert said.startswith(f"{folder}: files read: 4 (*.md 56%, ") and said.count("\n") == 1
    assert (
        f"; left out: 2, the first: {folder}/large is larger " in said
        and f"--data '{folder}/**/*.md'" in said
    )
    assert (
        load_text([f"{folder}/a/**/*.md"]) == "c\n\ufeff\rd"
        and load_text([f"{folder}/.git"]) == "no"
    )
    monkeypatch.setattr(text, "MOST_FILES", 7)
    for name, said in {
        "no": "cannot",
        "no*": "UTF",
        "out/previous-1": "no",
        "large": "larger",
        "": "than 7",
    }.items():
        with pytest.raises(ValueError, match=said):
            load_text([one, f"{folder}/{name}"])
    monkeypatch.setattr(text, "MOST_BYTES", 1)  # of one file, and of all
    assert load_text(f"{tmp_path}/*/*.*") == "b"


def test_training_and_sampling_on_an_odd_text(program, plain, tmp_path):
    """What an ASCII terminal cannot show is printed escaped; a prompt is UTF-8 in any locale."""
    (tmp_path / "text").write_bytes((ODD * 20).encode("utf-8", "surrogatepass"))
    out, how = (
        tmp_path / "out",
        {"encoding": None, "env": plain | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}},
    )
    training = program(
        "train_char.py", *MODEL, "--iters", 2, "--data", tmp_path / "text", "--out", out, **how
    )
    assert (training.returncode, training.stderr) == (0, b"") and training.stdout.isascii()
    sampling = program(
        "sample.py",
        out / "best.npz",
        "--length",
        0,
        "--seed",
        1,
        "--prompt",
        "👩\u200d".encode(),
        **how,
    )
    assert (sampling.stdout, sampling.stderr) == (b"\\U0001f469\\u200d\n", b"")


def test_tiny_shakespeare(call, refused, tmp_path, monkeypatch, capsys):
    """It is downloaded once, or again if damaged. A bad download is one line and leaves no file."""

    def answer(url, timeout):
        if isinstance(answers[0], BaseException):
            raise answers.pop(0)
        return io.BytesIO(answers.pop(0))

    answers = [
        TEXT.encode() + b"!",
        OSError("no route"),
        text.http.client.BadStatusLine("220"),
        KeyboardInterrupt(),
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(text, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    monkeypatch.setattr(text.urllib.request, "urlopen", answer)
    for _ in range(3):
        sentence = refused(
            call("train_char.py", "--data", "shakespeare", "--out", tmp_path / "out")
        )
        assert "could not be downloaded (" in sentence and "--data FILE" in sentence
    process = call("train_char.py", "--data", "shakespeare", "--out", tmp_path / "out")
    assert (process.returncode, process.stderr) == (130, "") and not list(tmp_path.iterdir())
    cached = tmp_path / "grassmann" / "shakespeare.txt"
    for _ in range(2):
        answers.append(TEXT.encode())
        for said in ("downloading http", ""):
            assert load_text(["shakespeare"]) == TEXT and capsys.readouterr().out.startswith(said)
        assert not answers and [*cached.parent.iterdir()] == [cached]
        cached.write_bytes(TEXT.encode()[:-1])


def test_a_file_that_comes_twice_is_used_once(tmp_path, capsys):
    one, copy = tmp_path / "one.txt", tmp_path / "copy.txt"
    for path in (one, copy):
        path.write_text("one\n")
    assert load_text([str(one), str(copy), str(tmp_path)]) == "one\n"
    assert "files that come twice" in capsys.readouterr().out


def lines_about(text: str, tmp_path, capsys) -> str:
    """What is said of this text."""
    (tmp_path / "text").write_text(text)
    read_corpus(str(tmp_path / "text"), 8)
    return capsys.readouterr().out


def test_held_out_text_that_is_trained_on_is_told(tmp_path, capsys):
    """A text of two equal halves; then one whose last tenth is half a copy, half new."""
    letters = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 12800)))
    assert lines_about(letters, tmp_path, capsys) == ""
    said = lines_about(2 * letters, tmp_path, capsys)
    assert said.startswith("100% of the held-out text, in pieces of 64 characters, also stands in")
    said = lines_about(letters[:-640] + letters[100:740], tmp_path, capsys)
    assert said.startswith("50% of the held-out text")
    assert lines_about(letters[:-576] + letters[100:676], tmp_path, capsys) == ""


def test_characters_that_are_only_held_out_are_told(tmp_path, capsys):
    said = lines_about("".join(map(str, range(500))) + "xxy", tmp_path, capsys)
    assert said == "held-out characters that the training text never has: 3 (2 different)\n"


@pytest.mark.parametrize("code", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
def test_wide_text_without_a_mark_gets_its_own_advice(code):
    with pytest.raises(ValueError, match=f"iconv -f {code} -t UTF-8 'my text' > 'my text-utf8"):
        plain_text("H\u00e4llo, plain words\n".encode(code), "my text")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x1f\x8b\x08\x00", "is a gzip file, not text; unpack it"),
        (b"PK\3\4rest", "is a zip file"),
        (b"%PDF-1.7", "is a PDF file"),
        (b"\x7fELF\x02\0\xff\xff\xfe", "probably not text at all"),
        (b"na\xefve", "iconv -f WINDOWS-1252"),
        ("\ufeffH".encode("utf-16"), "iconv -f UTF-16 -t"),
    ],
)
def test_what_is_no_text_gets_the_right_advice(content, said):
    with pytest.raises(ValueError, match=said):
        plain_text(content, "file")


def test_standard_input_is_a_text(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa\r\nb")))
    assert load_text(["-"]) == "a\nb"
