"""Text to tokens and back: reading files, Tiny Shakespeare, vocabularies.

A token is a Unicode code point of the text, numbered by its place in the vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shlex
import sys
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Array = np.ndarray

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MOST_BYTES = 1 << 30  # of one file; a device like /dev/zero never ends

@dataclass(frozen=True)
class Corpus:
    """A text as tokens: the last tenth is held out for validation."""

    sha256: str  # of the text
    vocab: list[int]  # its code points, in order
    train: Array
    val: Array
    most_common: int  # token

def read_corpus(data: str | Sequence[str] | None, context: int) -> Corpus:
    """The text behind --data as tokens. Raises ValueError, also if it is too short for the context."""
    return corpus_of(load_text(data), context)

def corpus_of(text: str, context: int) -> Corpus:
    """A text as tokens. Raises ValueError if it is too short for the context."""
    n_val = len(text) // 10
    if len(text) - n_val <= context or n_val < 2:
        least = max(20, context * 10 // 9 + 1)
        raise ValueError(f"the text has {len(text):,} characters, a context of {context} needs {least}")
    vocab = vocabulary(text)
    tokens = encode(text, vocab)
    most_common = int(np.bincount(tokens[: 1 << 20]).argmax())
    return Corpus(text_sha256(text), vocab, tokens[:-n_val], tokens[-n_val:], most_common)

def text_sha256(text: str) -> str:
    """By which a checkpoint knows its text again."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

def load_text(data: str | Sequence[str] | None) -> str:
    """The text behind --data: files, folders, "shakespeare", or Python's documentation if None.

    Of a folder all files below that are UTF-8 text are read, in order of their names, but for what is
    hidden and what train_char.py wrote. Raises ValueError.
    """
    if data is None:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise ValueError("this Python came without its documentation; give a text: --data FILE") from None
        return "\n\n".join(text.strip() for _, text in sorted(topics.items())) + "\n"
    texts = []
    for name in [data] if isinstance(data, str) else data:
        path, before = shakespeare() if name == "shakespeare" else Path(name), len(texts)
        if not path.is_dir():
            texts.append(read_file(path))
            continue
        below = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
        runs = {file.parent for file in below if file.name == "last.npz"}
        files = [path / file for file in below
                 if not any(part[0] == "." for part in file.parts) and runs.isdisjoint(file.parents)]
        for file in files:
            with contextlib.suppress(UnicodeError):  # in a folder there may be other things
                texts.append(read_file(file))
        if len(texts) == before:
            raise ValueError(f"there is no UTF-8 text in {path}")
        if len(texts) - before < len(files):
            print(f"{path}: {len(texts) - before} of {len(files)} files are UTF-8 text, the others are left out")
    return texts[0] if len(texts) == 1 else "".join(t if t.endswith("\n") else t + "\n" for t in texts)

def read_file(path: Path) -> str:
    """A UTF-8 file, without a byte order mark. Raises ValueError; UnicodeError (which is one) if it is not UTF-8."""
    try:
        content = bytearray()
        with path.open("rb") as file:
            while len(content) <= MOST_BYTES and (piece := file.read(1 << 20)):
                content += piece
        if len(content) > MOST_BYTES:
            raise ValueError(f"{path} is larger than {MOST_BYTES >> 30} GB")
        return content.decode("utf-8", "surrogatepass").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place = f"byte {error.start} is {error.object[error.start]:#04x}"
        code = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise UnicodeError(f"{path} is not UTF-8 text ({place}); save it as UTF-8 in an editor, or: "
                           f"iconv -f {code} -t UTF-8 {shlex.quote(str(path))} > new.txt") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None

def shakespeare() -> Path:
    """Tiny Shakespeare, from the cache or the network. Raises ValueError."""
    base = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA", "~")}.get(sys.platform)
    advice = ("download it in a browser and give it with --data FILE, or leave --data out for the "
              "text that Python ships")
    try:
        cache = Path(base or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "grassmann"
    except RuntimeError:
        raise ValueError(f"there is no home folder to keep Tiny Shakespeare in; {advice}") from None
    path = cache / "shakespeare.txt"
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHAKESPEARE_SHA256:
        return path
    print(f"downloading {SHAKESPEARE_URL}", flush=True)
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            text = response.read(10**7)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"Tiny Shakespeare could not be downloaded ({error}); {advice}") from None
    if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError(f"the {len(text)} bytes that came are not Tiny Shakespeare (wrong SHA-256); {advice}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_bytes(text)
        unfinished.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    return path

def code_points(text: str) -> Array:
    """The Unicode code points of a text, lone surrogates included, as uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)

def vocabulary(text: str) -> list[int]:
    """The code points that occur in a text, in order; token k stands for the k-th of them."""
    return sorted(map(ord, set(text)))

def encode(text: str, vocab: list[int]) -> Array:
    """Text -> tokens, integers as small as they can be. Raises ValueError, naming what is unknown."""
    known, tokens = np.array(vocab, np.uint32), np.empty(len(text), np.min_scalar_type(len(vocab)))
    for k in range(0, len(text), 1 << 20):
        points = code_points(text[k : k + (1 << 20)])
        ids = np.searchsorted(known, points).clip(0, len(known) - 1)
        if (known[ids] != points).any():
            missing = sorted({chr(c) for c in points[known[ids] != points]})
            raise ValueError(f"not in the model's vocabulary: {' '.join(map(repr, missing[:10]))}")
        tokens[k : k + len(ids)] = ids
    return tokens

def decode(tokens: Iterable[int], vocab: list[int]) -> str:
    """Tokens -> text."""
    return "".join(chr(vocab[token]) for token in tokens)

def start_token(vocab: list[int], most_common: int) -> int:
    """What to begin with where nothing is given: a line end, or the most common character if there is none."""
    return vocab.index(10) if 10 in vocab else most_common

def visible(text: str) -> str:
    """For a terminal: control characters escaped, but for line ends and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
