"""Text to tokens and back: reading files, Tiny Shakespeare, vocabularies.

A token is a Unicode code point of the text, numbered by its place in the vocabulary.
"""

from __future__ import annotations

import glob
import hashlib
import http.client
import os
import shlex
import sys
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
MOST_BYTES = 1 << 30  # of a file, and as many characters of a folder
MOST_FILES = 100_000  # in a folder
PIECE = 64  # characters, a power of two; such pieces of held-out text are looked for in the rest
# How files begin that are often taken for text.
NO_TEXT = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\3\4": "zip",
    b"%PDF": "PDF",
}
# What the programs write into a run's folder.
WRITTEN = ("best.npz", "last.npz", "log.csv", "loss.png", "explorer.html")

# ---- a text as tokens ----------------------------------------------------------------------------


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
    """The text that --data names, as tokens. Raises UserError, also if it is too short."""
    names = [data] if isinstance(data, str) else data
    name = " ".join(names or ["the documentation of this Python"])
    corpus = corpus_of(load_text(data), context, name)
    for line in what_leaks(corpus):
        print(line)
    return corpus


def corpus_of(text: str, context: int, name: str = "the text") -> Corpus:
    """A text as tokens. Raises UserError if it is too short for the context."""
    n_val = len(text) // 10
    needed = max(20, context * 10 // 9 + 1)
    require(
        len(text) - n_val > context and n_val >= 2,
        f"{name} has {len(text):,} characters, a context of {context} needs {needed}",
    )
    vocab = vocabulary(text)
    tokens = encode(text, vocab)
    most_common = int(np.bincount(tokens[: 1 << 20]).argmax())
    return Corpus(text_sha256(text), vocab, tokens[:-n_val], tokens[-n_val:], most_common, name)


def what_leaks(corpus: Corpus) -> list[str]:
    """What a reader of the validation loss must know: copies, and characters never trained on."""
    lines = []
    share = share_of_copies(corpus.train, corpus.val)
    if share >= 0.5:
        lines.append(
            f"{100 * share:.0f}% of the held-out text, in pieces of {PIECE} characters, also "
            "stands in the training text: the validation loss will be too low"
        )
    new = np.bincount(corpus.train, minlength=len(corpus.vocab)) == 0
    count = int(new[corpus.val].sum())
    if count:
        lines.append(
            f"held-out characters that the training text never has: {count:,} "
            f"({int(new.sum()):,} different)"
        )
    return lines


def share_of_copies(train: Array, val: Array) -> float:
    """The share of val's consecutive pieces of PIECE characters that stand anywhere in train."""
    pieces = val[: len(val) // PIECE * PIECE].reshape(-1, PIECE)
    if len(pieces) == 0:
        return 0.0
    pieces = pieces[:: -(-len(pieces) // 10_000)]  # at most 10,000, evenly spread
    wanted = np.array([window_hashes(piece)[0] for piece in pieces])
    found = np.zeros(len(wanted), bool)
    block = 1 << 20  # windows at once, so that the memory does not grow with the text
    for start in range(0, len(train) - PIECE + 1, block):
        hashes = window_hashes(train[start : start + block + PIECE - 1])
        found |= np.isin(wanted, hashes[np.isin(hashes, wanted)])
    return float(found.mean())


def window_hashes(tokens: Array) -> Array:
    """A hash of each window of PIECE tokens: Σ_k tokens_{i+k} B^k modulo 2^64, by doubling."""
    hashes = tokens.astype(np.uint64) + np.uint64(1)
    power = np.full(1, 0x9E3779B97F4A7C15, np.uint64)  # an array: it wraps around silently
    width = 1
    while width < PIECE:
        hashes = hashes[:-width] + power * hashes[width:]
        power = power * power
        width *= 2
    return hashes


def text_sha256(text: str) -> str:
    """The hash by which a checkpoint recognises its text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def vocabulary(text: str) -> list[int]:
    """The code points that occur in a text, in order. Token k is the k-th code point."""
    return sorted(map(ord, set(text)))


def encode(text: str, vocab: list[int]) -> Array:
    """Text -> tokens, in the smallest integer type.

    Raises UserError, which names the unknown characters.
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    known = np.array(vocab, np.uint32)
    # A table from code points to tokens is faster than a search for each character.
    table = np.searchsorted(known, np.arange(known[-1] + 1))
    table = table.astype(np.min_scalar_type(len(known) - 1))
    tokens = table[np.minimum(points, known[-1])]
    unknown = [chr(c) for c in np.unique(points[known[tokens] != points])]
    if unknown:
        shown = " ".join(map(repr, unknown[:10]))
        hint = why_unknown(text, unknown, vocab)
        raise UserError(f"not in the model's vocabulary: {shown}{hint}")
    return tokens


def why_unknown(text: str, unknown: list[str], vocab: list[int]) -> str:
    """What to say of unknown characters, if there is something to say."""
    if set(unicodedata.normalize("NFC", text)) <= set(map(chr, vocab)):
        return "; with composed accents (NFC) it is known"
    # Python reads a byte of a command line that is not UTF-8 as such a character.
    if any("\udc80" <= c <= "\udcff" for c in unknown):
        return "; this is not UTF-8"
    return ""


def decode(tokens: Iterable[int], vocab: list[int]) -> str:
    """Tokens -> text."""
    return "".join(chr(vocab[token]) for token in tokens)


def start_token(vocab: list[int], most_common: int) -> int:
    """What a sample without a prompt starts from: a line end, or else the most common character."""
    return vocab.index(10) if 10 in vocab else most_common


def visible(text: str) -> str:
    """The text for a terminal: control characters are escaped, except line ends and tabs."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


# ---- reading ------------------------------------------------------------------------------------


def load_text(data: str | Sequence[str] | None) -> str:
    """Files, folders, folder/**/*.py, "shakespeare" or - (standard input) as one text.

    None: Python's documentation. What comes twice is used once. Raises UserError.
    """
    if data is None:
        return documentation()
    texts = []
    for name in [data] if isinstance(data, str) else data:
        texts += read_named(name)
    once = list(dict.fromkeys(texts))
    if len(once) < len(texts):
        print(f"files that come twice, by name or by contents, are used once: {len(once)} are left")
    texts = once
    if len(texts) == 1:
        return texts[0]
    return "".join(text if text.endswith("\n") else text + "\n" for text in texts)


def documentation() -> str:
    """The text that Python ships: its help on its language. Raises UserError."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python came without its documentation; give a text: --data FILE"
        ) from None
    return "\n\n".join(text.strip() for _, text in sorted(topics.items())) + "\n"


def read_named(name: str) -> list[str]:
    """The texts that one word of --data stands for. Raises UserError."""
    require(name != "", "--data needs the name of a file or a folder")
    if name == "-":
        try:
            return [plain_text(sys.stdin.buffer.read(), "standard input")]
        except UserError as error:  # without the command, which needs a file
            raise UserError(str(error).partition(", or: ")[0]) from None
    path = shakespeare() if name == "shakespeare" else Path(name)
    if path.is_dir() or ("*" in name and not path.exists()):
        return read_folder(name)
    return [read_file(path)]


def read_folder(name: str) -> list[str]:
    """The UTF-8 files below a folder, or the files that match a pattern, in order of their names.

    Prints what it has read, and what it has left out. Raises UserError if there is no text.
    """
    texts: list[str] = []
    left_out: list[str] = []
    kinds: Counter[str] = Counter()  # characters in each kind of file
    for path in find_files(name):
        try:
            require(kinds.total() < MOST_BYTES, f"{path} comes after {MOST_BYTES >> 30} GB of text")
            text = read_file(path)
        except UserError as error:
            left_out.append(str(error))
            continue
        texts.append(text)
        kinds[f"*{path.suffix}" if path.suffix else path.name] += len(text)
    require(len(texts) > 0, "; ".join([f"there is no UTF-8 text in {name}", *left_out[:1]]))

    total = max(1, kinds.total())
    shares = ", ".join(f"{kind} {100 * n / total:.0f}%" for kind, n in kinds.most_common(3))
    line = f"{name}: files read: {len(texts)} ({shares})"
    if left_out:
        line += f"; left out: {len(left_out)}, the first: {left_out[0].partition('; ')[0]}"
    if len(kinds) > 1 and "*" not in name:
        [(kind, _)] = kinds.most_common(1)
        line += f"; one kind alone: --data {shlex.quote(f'{name}/**/{kind}')}"
    print(visible(line))
    return texts


def find_files(name: str) -> list[Path]:
    """The files below a folder, or the files that match a pattern, in order of their names.

    Leaves out hidden files, as glob does, and the files of a training run. Raises UserError.
    """
    start, star, rest = name.partition("*")
    pattern = glob.escape(start) + (star + rest or f"{os.sep}**{os.sep}*")
    found = list(islice(glob.iglob(pattern, recursive=True), MOST_FILES + 1))
    require(
        len(found) <= MOST_FILES,
        f"{name} has more than {MOST_FILES:,} files; give a smaller folder",
    )
    paths = sorted(map(Path, found))
    return [path for path in paths if os.path.isfile(path) and not of_a_run(path)]


def of_a_run(path: Path) -> bool:
    """Has a training run written this file?"""
    if path.name.removesuffix(".tmp") not in WRITTEN:
        return False
    return path.with_name("best.npz").exists() or path.with_name("last.npz").exists()


def read_file(path: Path) -> str:
    """The text of a UTF-8 file, without its byte order mark, and with \\n for \\r\\n.

    Raises UserError.
    """
    try:
        # A device says that it is empty, and may never end.
        fine = not path.is_char_device() and path.stat().st_size <= MOST_BYTES
        require(fine, f"{path} is larger than {MOST_BYTES >> 30} GB, or endless")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return plain_text(content, str(path))


def plain_text(content: bytes, name: str) -> str:
    """The bytes of a file as text. Raises UserError, which says how to make it UTF-8."""
    for start, kind in NO_TEXT.items():
        rule = f"{name} is a {kind} file, not text; unpack it, or export its text as UTF-8"
        require(not content.startswith(start), rule)
    code = wide_code(content)
    try:
        text = content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        binary = f"{name} is not UTF-8 text; it holds zero bytes, so it is probably not text at all"
        require(code != "" or 0 not in content, binary)
        code = code or "WINDOWS-1252"
    if code:
        path = Path(name)
        old, new = shlex.quote(name), shlex.quote(f"{path.stem}-utf8.txt")
        raise UserError(
            f"{name} is not UTF-8 text; save it as UTF-8 in an editor, or: "
            f"iconv -f {code} -t UTF-8 {old} > {new}"
        )
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def wide_code(content: bytes) -> str:
    """The name of UTF-16 or UTF-32, if this is such a text, or "". Its zero bytes give it away."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) and content[2:4] != bytes(2):
        return "UTF-16"
    zeros = [2 * content[k::4].count(0) > len(content[k::4]) for k in range(4)]
    if 3 * content.count(0) >= len(content) > 0:
        for code, places in {
            "UTF-32LE": (2, 3),
            "UTF-32BE": (0, 1),
            "UTF-16LE": (1, 3),
            "UTF-16BE": (0, 2),
        }.items():
            if all(zeros[k] for k in places):
                return code
    return ""


def shakespeare() -> Path:
    """Tiny Shakespeare, from the cache or the network. Raises UserError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "grassmann" / "shakespeare.txt"
    if path.exists() and is_shakespeare(path.read_bytes()):
        return path
    print(f"downloading {SHAKESPEARE_URL}", flush=True)
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            content = response.read(10**7)
        require(is_shakespeare(content), f"{len(content)} bytes of something else came")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)  # an unfinished file has another hash
    except (OSError, http.client.HTTPException, UserError) as error:
        raise UserError(
            f"Tiny Shakespeare could not be downloaded ({error}); download it in a browser and "
            "give it with --data FILE, or leave --data out for the text that Python ships"
        ) from None
    return path


def is_shakespeare(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256
