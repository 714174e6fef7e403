"""Questions 8 and 9 of compare.py: tasks that ask for a token far back, and their tables.

A task returns x, y, group, each (batch, length). For a token that asks, `group` is the distance to its
answer, or the number of keys to remember. For all other tokens `group` is 0 and y = x. The model soon
learns to repeat these tokens, so the rest of the loss comes from the questions.
"""

import math

import numpy as np

import grassmann
from grassmann import Array, Config, Params, Rng

ANSWERS, ASK, VOCAB_SIZE = 8, 16, 17  # tokens: 0 to 7 are answers, 8 to 15 filler, 16 asks
SLOTS, KEYS_VOCAB_SIZE = (
    16,
    32,
)  # in `keys` 16 + k names slot k, before its key and when it is asked
DISTANCES = (1, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 159)  # from, to
NUMBERS = (2, 2), (4, 4), (8, 8), (16, 16)  # of keys at once


def recall(rng: Rng, batch: int, length: int) -> tuple[Array, Array, Array]:
    """What was the key? The text is filler with one key. Some tokens after the key ask for it."""
    x = rng.integers(ANSWERS, ASK, (batch, length))
    place, key = rng.integers(0, length // 4, (batch, 1)), rng.integers(0, ANSWERS, (batch, 1))
    distance = np.arange(length) - place
    asks = (distance > 0) & (rng.random(x.shape) < 1 / 8)
    np.put_along_axis(x, place, key, 1)
    x[asks] = ASK
    return x, np.where(asks, key, x), np.where(asks, distance, 0)


def keys(rng: Rng, batch: int, length: int) -> tuple[Array, Array, Array]:
    """What was the key of this slot? 2, 4, 8 or 16 slots get a key each, and are asked for later.

    In the first quarter of the text, each key follows the token that names its slot. After it, half of
    the tokens name a slot again, which asks for its key.
    """
    x, many = rng.integers(ANSWERS, ASK, (batch, length)), np.zeros((batch, length), int)
    y, quarter = x.copy(), length // 4
    for row, n in enumerate(np.resize([n for n, _ in NUMBERS], batch)):
        slots, answers = rng.permutation(SLOTS)[:n], rng.integers(0, ANSWERS, n)
        places = 2 * rng.permutation(quarter // 2)[:n]
        x[row, places], x[row, places + 1] = ASK + slots, answers
        y[row] = x[row]
        asks = quarter + np.flatnonzero(rng.random(length - quarter) < 1 / 2)
        which = rng.integers(0, n, len(asks))
        x[row, asks], y[row, asks] = ASK + slots[which], answers[which]
        many[row, asks] = n
    return x, y, many


TASKS = {"recall": recall, "keys": keys}
GROUPS = {"recall": DISTANCES, "keys": NUMBERS}


def accuracy(
    params: Params, config: Config, x: Array, y: Array, group: Array, groups=DISTANCES
) -> list[float]:
    """For each of the groups: how often the likeliest of the eight answers is right."""
    chunks = np.array_split(x, math.ceil(len(x) / 8))
    answers = [grassmann.forward(params, config, c)[..., :ANSWERS].argmax(-1) for c in chunks]
    right = np.concatenate(answers) == y
    asked = [(low <= group) & (group <= high) for low, high in groups]
    return [float(right[here].mean()) if here.any() else math.nan for here in asked]


def table(rows: list) -> list[dict[str, str]]:
    """One line per task and model: how often it is right, the mean of the seeds, and the lowest if it differs."""
    lines = []
    for row in rows:
        task, _, label = row.label.partition(", ")
        cells = {"task": task, "model": label, "learning rate": f"{row.results[0]['spec']['lr']:g}"}
        for (low, high), shares in zip(
            GROUPS[task], zip(*(result["test"] for result in row.results), strict=True), strict=True
        ):
            mean, least = f"{np.mean(shares):.0%}", f"{min(shares):.0%}"
            cells[f"{low} to {high}" if low < high else f"{low} keys"] = (
                mean if least == mean else f"{mean} ({least})"
            )
        lines.append(cells)
    return lines
