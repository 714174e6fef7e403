"""Interpolated n-grams (Witten and Bell), a row of compare.py: what counting alone can do."""

import numpy as np

from experiments.texts import Text
from grassmann import Array


def ngram_loss(
    train: Array, test: Array, order: int, vocab_size: int, window: int | None = None
) -> float:
    """Mean nats per token of `test`, without its first `order - 1` tokens, from counts in `train`.

        P_n(c | context) = (N(context c) + T(context) P_{n-1}(c | shorter context)) / (N(context) + T(context))

    N is the number of occurrences in the training text. T is the number of different tokens that follow the
    context there. P_0 is uniform. With `window`, contexts begin no earlier than the window, as in a network's
    validation. Raises ValueError if a context of that order does not fit into a number of 63 bits.
    """
    if order * np.log2(vocab_size) > 63:
        raise ValueError(f"{order}-grams of {vocab_size} tokens are too many to number")
    p, before = np.full(len(test) - order + 1, 1 / vocab_size), np.arange(order - 2, len(test) - 1)
    before = before % window + 1 if window else before + 1  # tokens that may be looked at
    for n in range(1, order + 1):
        contexts, grams = numbered(train, n, vocab_size)
        seen, counts = np.unique(grams, return_counts=True)  # grams = context * V + token
        per_context, first = np.unique(seen // vocab_size, return_index=True)
        different = np.diff(np.append(first, len(seen)))  # T
        total = np.add.reduceat(counts, first)  # N(context)
        contexts, grams = (x[order - n :] for x in numbered(test, n, vocab_size))
        N_gram = look_up(grams, seen, counts)
        N, T = look_up(contexts, per_context, total), look_up(contexts, per_context, different)
        p = np.where((N > 0) & (n - 1 <= before), (N_gram + T * p) / np.maximum(N + T, 1), p)
    return float(-np.log(p).mean())


def numbered(tokens: Array, n: int, vocab_size: int) -> tuple[Array, Array]:
    """For every n-gram, its first n-1 tokens as one number, and all n tokens as another; (len - n + 1) each."""
    grams = np.zeros(len(tokens) - n + 1, np.int64)
    for k in range(n):
        grams = grams * vocab_size + tokens[k : len(tokens) - n + 1 + k]
    return grams // vocab_size, grams


def look_up(keys: Array, known: Array, values: Array) -> Array:
    """values[i] where a key is known[i], else 0; `known` is sorted."""
    place = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.where(known[place] == keys, values[place], 0)


def best_ngram(text: Text, window: int) -> tuple[int, float, float]:
    """The order with the lowest validation loss; this loss, and the test loss of the order. Orders are 1 to 7, or as
    far as contexts fit into a number."""
    orders = range(1, min(7, int(63 / np.log2(text.vocab_size))) + 1)
    losses = {n: ngram_loss(text.train, text.val, n, text.vocab_size, window) for n in orders}
    best = min(losses, key=losses.get)
    return best, losses[best], ngram_loss(text.train, text.test, best, text.vocab_size, window)
