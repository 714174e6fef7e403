"""The texts of the comparison, as tokens: characters, or byte pairs, the subwords of the field.

A text is cut in three: nine tenths to train on; the next twentieth (`val`) to choose learning rates and
orders of n-grams; the last twentieth (`test`) to report the loss of what was chosen.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from dataclasses import dataclass

import numpy as np

from charlm.text import corpus_of, load_text
from grassmann import Array, UserError

NAMES = {
    None: "Python's documentation",
    "shakespeare": "Tiny Shakespeare",
    "bible": "the King James Bible",
}


@dataclass(frozen=True)
class Text:
    name: str  # for a reader
    sha256: str  # by which runs recognise the text
    vocab_size: int
    vocab: list[int]  # code points; [] for byte pairs
    train: Array
    val: Array
    test: Array
    bytes_per_token: float  # of `test`, in UTF-8


def read_text(data: str | None, pieces: int = 0, context: int = 1) -> Text:
    """The text that --data names, or "bible", as characters, or as byte pairs with `pieces` different tokens.

    Raises UserError if the text is missing or too short.
    """
    text, name = king_james() if data == "bible" else load_text(data), NAMES.get(data, str(data))
    corpus = corpus_of(text, context)
    n_val, n_test = len(corpus.val) - len(corpus.val) // 2, len(corpus.val) // 2
    parts = text[: -n_val - n_test], text[-n_val - n_test : -n_test], text[-n_test:]
    size, sha256, vocab = len(corpus.vocab), corpus.sha256, corpus.vocab
    tokens = corpus.train, corpus.val[:n_val], corpus.val[n_val:]
    if pieces:
        tokens, size, vocab = byte_pairs(parts, pieces), pieces, []
        sha256 = hashlib.sha256(np.concatenate(tokens).tobytes()).hexdigest()
        name += f" in {pieces:,} byte pairs"
    n_bytes = len(parts[-1].encode("utf-8", "surrogatepass"))
    return Text(name, sha256, size, vocab, *tokens, n_bytes / len(tokens[-1]))


def byte_pairs(parts: tuple[str, ...], size: int) -> tuple[Array, ...]:
    """The parts as tokens of a byte pair encoding (Sennrich, arXiv 1508.07909) learned from the first part."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError(
            "byte pairs need the library that experiments/requirements.txt lists"
        ) from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([parts[0]], trainer)
    tokens = [tokenizer.encode(part).ids for part in parts]
    if any(tokenizer.decode(ids) != part for ids, part in zip(tokens, parts, strict=True)):
        raise ValueError("the byte pairs do not give the text again")
    return tuple(np.array(ids, np.uint16) for ids in tokens)


def king_james() -> str:
    """The King James Bible, a verse a line, from Debian's package bible-kjv. Raises UserError."""
    try:
        verses = subprocess.run(
            ["bible", "-f", "Gen1:1-Rev22:21"],
            stdin=subprocess.DEVNULL,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        raise UserError(
            "questions 5, 6 and 10 read the King James Bible: apt install bible-kjv"
        ) from None
    return re.sub(r"^\S+ ", "", verses, flags=re.MULTILINE)
