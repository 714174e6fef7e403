"""The texts of the comparison, as tokens: characters, or byte pairs, the subwords of the field.

A text is cut in three: nine tenths to train on; the next twentieth (`val`) to choose learning rates
and orders of n-grams; the last twentieth (`test`) to report the loss of what was chosen.
"""

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


def read_text(data, pieces=0, context=1):
    """The text that --data names, or "bible": characters, or byte pairs, `pieces` different ones.

    Raises UserError if the text is missing or too short.
    """
    text = king_james() if data == "bible" else load_text(data)
    name = NAMES.get(data, str(data))
    corpus = corpus_of(text, context)
    n_test = len(corpus.val) // 2
    n_val = len(corpus.val) - n_test
    test = text[-n_test:]
    n_bytes = len(test.encode("utf-8", "surrogatepass"))
    if not pieces:
        tokens = corpus.train, corpus.val[:n_val], corpus.val[n_val:]
        per_token = n_bytes / n_test
        return Text(name, corpus.sha256, len(corpus.vocab), corpus.vocab, *tokens, per_token)

    train = text[: -n_val - n_test]
    val = text[-n_val - n_test : -n_test]
    tokens = byte_pairs((train, val, test), pieces)
    sha256 = hashlib.sha256(np.concatenate(tokens).tobytes()).hexdigest()
    per_token = n_bytes / len(tokens[-1])
    return Text(f"{name} in {pieces:,} byte pairs", sha256, pieces, [], *tokens, per_token)


def byte_pairs(parts, size):
    """The parts as tokens of a byte pair encoding learned from the first part.

    See Sennrich and others, arXiv 1508.07909.
    """
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
    encoded = []
    for part in parts:
        ids = tokenizer.encode(part).ids
        if tokenizer.decode(ids) != part:
            raise ValueError("the byte pairs do not give the text again")
        encoded.append(np.array(ids, np.uint16))
    return tuple(encoded)


def king_james():
    """The King James Bible, a verse a line, from Debian's package bible-kjv. Raises UserError."""
    command = ["bible", "-f", "Gen1:1-Rev22:21"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        raise UserError(
            "questions 5, 6 and 10 read the King James Bible: apt install bible-kjv"
        ) from None
    return re.sub(r"^\S+ ", "", done.stdout, flags=re.MULTILINE)
