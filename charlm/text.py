"""Text to tokens and back: reading files, Tiny Shakespeare, vocabularies.

A token is a Unicode code point of the text, numbered by its place in the vocabulary.
"""

from __future__ import annotations

import glob
import hashlib
import http.client
import os
import shlex
import unicodedata
import urllib.request
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from grassmann import Array, UserError, require

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MOST_BYTES, MOST_FILES = (
    1 << 30,
    100_000,
)  # bytes of a file, and characters of a folder; files in a folder
WRITTEN = (
    "best.npz",
    "last.npz",
    "log.csv",
    "loss.png",
    "explorer.html",
)  # by the programs, into a run's folder


@dataclass(frozen=True)
class Corpus:
    """A text as tokens: the last tenth is held out for validation."""

    sha256: str  # of the text
    vocab: list[int]  # its code points, in order
    train: Array
    val: Array
    most_common: int  # the most common token of the first million
    name: str = ""  # where the text comes from


def read_corpus(data: str | Sequence[str] | None, context: int) -> Corpus:
    """The text that --data names, as tokens. Raises UserError, also if it is too short for the context."""
    name = data if isinstance(data, str) else " ".join(data or ["the documentation of this Python"])
    return corpus_of(load_text(data), context, name)


def corpus_of(text: str, context: int, name: str = "") -> Corpus:
    """A text as tokens. Raises UserError if it is too short for the context."""
    n_val = len(text) // 10
    require(
        len(text) - n_val > context and n_val >= 2,
        f"{name or 'the text'} has {len(text):,} characters, "
        f"a context of {context} needs {max(20, context * 10 // 9 + 1)}",
    )
    tokens = encode(text, vocab := vocabulary(text))
    most_common = int(np.bincount(tokens[: 1 << 20]).argmax())
    return Corpus(text_sha256(text), vocab, tokens[:-n_val], tokens[-n_val:], most_common, name)


def text_sha256(text: str) -> str:
    """The hash by which a checkpoint recognises its text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def load_text(data: str | Sequence[str] | None) -> str:
    """Files, folders, folder/**/*.py or "shakespeare" as one text; None: Python's documentation. Raises UserError."""
    if data is None:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise UserError(
                "this Python came without its documentation; give a text: --data FILE"
            ) from None
        return "\n\n".join(text.strip() for _, text in sorted(topics.items())) + "\n"
    texts = []
    for name in [data] if isinstance(data, str) else data:
        require(name != "", "--data needs the name of a file or a folder")
        path = shakespeare() if name == "shakespeare" else Path(name)
        several = path.is_dir() or ("*" in name and not path.exists())
        texts += read_folder(name) if several else [read_file(path)]
    return (
        texts[0] if len(texts) == 1 else "".join(t if t.endswith("\n") else t + "\n" for t in texts)
    )


def read_folder(name: str) -> list[str]:
    """The UTF-8 files below a folder, or the files that match a pattern, in order of their names. Leaves out hidden
    files and the files of a training run. Prints what it has read. Raises UserError if there is no text."""
    start, star, rest = name.partition("*")
    pattern = glob.escape(start) + (
        star + rest or f"{os.sep}**{os.sep}*"
    )  # glob leaves out hidden files
    found, texts, kinds, left_out = (
        [*islice(glob.iglob(pattern, recursive=True), MOST_FILES + 1)],
        [],
        Counter(),
        [],
    )
    require(
        len(found) <= MOST_FILES,
        f"{name} has more than {MOST_FILES:,} files; give a smaller folder",
    )
    for path in sorted(map(Path, found)):
        ran = any((path.parent / checkpoint).exists() for checkpoint in ("best.npz", "last.npz"))
        if not os.path.isfile(path) or (ran and path.name.removesuffix(".tmp") in WRITTEN):
            continue
        try:
            require(kinds.total() < MOST_BYTES, f"{path} comes after {MOST_BYTES >> 30} GB of text")
            texts.append(read_file(path))
            kinds[f"*{path.suffix}" if path.suffix else path.name] += len(texts[-1])
        except UserError as error:
            left_out.append(str(error))
    require(len(texts) > 0, "; ".join([f"there is no UTF-8 text in {name}", *left_out[:1]]))
    shares = ", ".join(
        f"{kind} {100 * n / max(1, kinds.total()):.0f}%" for kind, n in kinds.most_common(3)
    )
    first = (
        f"; left out: {len(left_out)}, the first: {left_out[0].partition('; ')[0]}"
        if left_out
        else ""
    )
    kind = (
        ""
        if "*" in name
        else f"; one kind alone: --data {shlex.quote(f'{name}/**/{kinds.most_common(1)[0][0]}')}"
    )
    print(visible(f"{name}: files read: {len(texts)} ({shares}){first}{kind * (len(kinds) > 1)}"))
    return texts


def read_file(path: Path) -> str:
    """The text of a UTF-8 file, without its byte order mark, and with \\n for \\r\\n. Raises UserError."""
    try:
        fine = (
            not path.is_char_device() and path.stat().st_size <= MOST_BYTES
        )  # a device may never end
        require(fine, f"{path} is larger than {MOST_BYTES >> 30} GB, or endless")
        return (
            path.read_bytes()
            .decode("utf-8", "surrogatepass")
            .removeprefix("\ufeff")
            .replace("\r\n", "\n")
        )
    except UnicodeDecodeError as error:
        code = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        convert = f"iconv -f {code} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(f'{path.stem}-utf8.txt')}"
        raise UserError(
            f"{path} is not UTF-8 text; save it as UTF-8 in an editor, or: {convert}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def shakespeare() -> Path:
    """Tiny Shakespeare, from the cache or the network. Raises UserError."""
    path = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "grassmann"
        / "shakespeare.txt"
    )
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHAKESPEARE_SHA256:
        return path
    print(f"downloading {SHAKESPEARE_URL}", flush=True)
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            text = response.read(10**7)
        require(
            hashlib.sha256(text).hexdigest() == SHAKESPEARE_SHA256,
            f"{len(text)} bytes of something else came",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)  # an unfinished file has another hash
    except (OSError, http.client.HTTPException, UserError) as error:
        raise UserError(
            f"Tiny Shakespeare could not be downloaded ({error}); download it in a browser and give it "
            "with --data FILE, or leave --data out for the text that Python ships"
        ) from None
    return path


def vocabulary(text: str) -> list[int]:
    """The code points that occur in a text, in order. Token k is the k-th code point."""
    return sorted(map(ord, set(text)))


def encode(text: str, vocab: list[int]) -> Array:
    """Text -> tokens, in the smallest integer type. Raises UserError, which names the unknown characters."""
    points, known = (
        np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32),
        np.array(vocab, np.uint32),
    )
    table = np.searchsorted(known, np.arange(known[-1] + 1)).astype(
        np.min_scalar_type(len(known) - 1)
    )
    tokens = table[
        np.minimum(points, known[-1])
    ]  # faster than a search for each character of the text
    unknown = [chr(c) for c in np.unique(points[known[tokens] != points])]
    composed = unknown and {*unicodedata.normalize("NFC", text)} <= {*map(chr, vocab)}
    broken = any(
        "\udc80" <= c <= "\udcff" for c in unknown
    )  # so Python reads a byte that is not UTF-8
    hint = (
        "; with composed accents (NFC) it is known"
        if composed
        else "; this is not UTF-8"
        if broken
        else ""
    )
    require(
        not unknown, f"not in the model's vocabulary: {' '.join(map(repr, unknown[:10]))}{hint}"
    )
    return tokens


def decode(tokens: Iterable[int], vocab: list[int]) -> str:
    """Tokens -> text."""
    return "".join(chr(vocab[token]) for token in tokens)


def start_token(vocab: list[int], most_common: int) -> int:
    """What a sample without a prompt starts from: a line end, or the most common character if there is no line end."""
    return vocab.index(10) if 10 in vocab else most_common


def visible(text: str) -> str:
    """The text for a terminal: control characters are escaped, except line ends and tabs."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
