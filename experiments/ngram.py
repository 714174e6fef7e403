"""What a loss is worth: counting, compressors and a model on the same held-out text.

  python -m experiments.ngram                              Python's documentation
  python -m experiments.ngram --model out/best.npz         and a model that was trained on it

Counting is interpolated n-grams (Witten and Bell). A compressor's bits are those that the held-out
text adds to the compressed training text. compare.py has the n-gram as a row.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import gzip
import lzma
import math
from pathlib import Path

import numpy as np

import grassmann
from charlm.text import decode, read_corpus
from charlm.trained import load_trained
from experiments.common import markdown
from grassmann import require


def ngram_loss(train, test, order, vocab_size, window=None):
    """Mean nats per token of `test`, without its first `order - 1` tokens, from counts in `train`.

        P_n(c | context) = (N(context c) + T P_{n-1}(c | shorter)) / (N(context) + T)

    `shorter` is the context without its first token. N is the number of occurrences in the training
    text. T is the number of different tokens that follow the context there. P_0 is uniform. With
    `window`, contexts begin no earlier than the window, as in a network's validation. Raises
    ValueError if a context of that order does not fit into a number of 63 bits.
    """
    if order * np.log2(vocab_size) > 63:
        raise ValueError(f"{order}-grams of {vocab_size} tokens are too many to number")
    before = np.arange(order - 2, len(test) - 1)
    if window:
        before = before % window
    before = before + 1  # tokens that may be looked at
    p = np.full(len(before), 1 / vocab_size)
    for n in range(1, order + 1):
        grams, counts = np.unique(numbered(train, n, vocab_size), return_counts=True)
        contexts, first = np.unique(grams // vocab_size, return_index=True)
        total = np.add.reduceat(counts, first)  # N(context)
        different = np.diff(first, append=len(grams))  # T(context)

        asked = numbered(test[order - n :], n, vocab_size)
        asked_context = asked // vocab_size
        N_gram = look_up(asked, grams, counts)
        N = look_up(asked_context, contexts, total)
        T = look_up(asked_context, contexts, different)
        mixed = (N_gram + T * p) / np.maximum(N + T, 1)
        p = np.where((N > 0) & (n - 1 <= before), mixed, p)
    return float(-np.log(p).mean())


def numbered(tokens, n, vocab_size):
    """Every n-gram as one number: that of its first n-1 tokens, times vocab_size, plus the last."""
    places = len(tokens) - n + 1
    grams = np.zeros(places, np.int64)
    for k in range(n):
        grams = grams * vocab_size + tokens[k : k + places]
    return grams


def look_up(keys, known, values):
    """values[i] where a key is known[i], else 0; `known` is sorted."""
    place = np.searchsorted(known, keys)
    place = place.clip(max=len(known) - 1)
    return np.where(known[place] == keys, values[place], 0)


def best_ngram(text, window):
    """The order with the lowest validation loss, this loss, and the test loss.

    Orders are 1 to 7, or as far as contexts fit into a number.
    """
    size = text.vocab_size
    last = min(7, int(63 / np.log2(size)))
    losses = {}
    for n in range(1, last + 1):
        losses[n] = ngram_loss(text.train, text.val, n, size, window)
    best = min(losses, key=losses.get)
    test = ngram_loss(text.train, text.test, best, size, window)
    return best, losses[best], test


# ---- the program ---------------------------------------------------------------------------------


def compressed(compress, corpus):
    """Nats per character that the held-out text adds to the compressed training text."""
    seen, new = (
        decode(tokens, corpus.vocab).encode("utf-8", "surrogatepass")
        for tokens in (corpus.train, corpus.val)
    )
    more = len(compress(seen + new)) - len(compress(seen))
    return 8 * more * math.log(2) / len(corpus.val)


def yardsticks(corpus, model):
    """A row for each: nats and bits per character of the held-out text."""
    losses = {
        "gzip": compressed(gzip.compress, corpus),
        "xz": compressed(lzma.compress, corpus),
        "5-gram, counted": ngram_loss(corpus.train, corpus.val, 5, len(corpus.vocab)),
    }
    if model:
        params, config, extra = load_trained(grassmann, model)
        require(extra["vocab"] == corpus.vocab, f"{model} was trained on another text")
        losses[str(model)] = grassmann.validation_loss(params, config, corpus.val)
    return [
        {"what": name, "nats per character": loss, "bits per character": loss / math.log(2)}
        for name, loss in losses.items()
    ]


def main():
    command_line.plain_output()
    parser = command_line.Parser(__doc__)
    parser.add_argument("--data", help="a text, as train_char.py takes it")
    parser.add_argument("--model", type=Path, help="a model that was trained on this text")
    args = parser.parse_args()
    with command_line.short_errors(parser, args.data):
        print(markdown(yardsticks(read_corpus(args.data, 1), args.model)))


if __name__ == "__main__":
    main()
