"""Questions 8 and 9 of compare.py: tasks that ask for a token far back, and their tables.

A task returns x, y, group, each (batch, length). For a token that asks, `group` is the distance to
its answer, or the number of keys to remember. For all other tokens `group` is 0 and y = x. The
model soon learns to repeat these tokens, so the rest of the loss comes from the questions.
"""

import math

import numpy as np

import grassmann

# Tokens: 0 to 7 are answers, 8 to 15 filler. In `recall` 16 asks. In `keys` 16 + k names slot k,
# before its key and when it is asked for.
ANSWERS = 8
ASK = 16
VOCAB_SIZE = 17
SLOTS = 16
KEYS_VOCAB_SIZE = 32
# Groups of the tables, from and to: distances, and numbers of keys at once.
DISTANCES = (
    (1, 2),
    (3, 4),
    (5, 8),
    (9, 16),
    (17, 32),
    (33, 64),
    (65, 128),
    (129, 159),
)
NUMBERS = (2, 2), (4, 4), (8, 8), (16, 16)


def recall(rng, batch, length):
    """What was the key? The text is filler with one key. Some tokens after the key ask for it."""
    x = rng.integers(ANSWERS, ASK, (batch, length))
    place = rng.integers(0, length // 4, (batch, 1))
    key = rng.integers(0, ANSWERS, (batch, 1))
    distance = np.arange(length) - place
    asks = (distance > 0) & (rng.random(x.shape) < 1 / 8)
    np.put_along_axis(x, place, key, 1)
    x[asks] = ASK
    y = np.where(asks, key, x)
    return x, y, np.where(asks, distance, 0)


def keys(rng, batch, length):
    """What was the key of this slot? 2, 4, 8 or 16 slots get a key each, and are asked for later.

    In the first quarter of the text, each key follows the token that names its slot. After it, half
    of the tokens name a slot again, which asks for its key.
    """
    x = rng.integers(ANSWERS, ASK, (batch, length))
    y = x.copy()
    group = np.zeros((batch, length), int)
    quarter = length // 4
    numbers = [n for n, _ in NUMBERS]
    for row in range(batch):
        n = numbers[row % len(numbers)]
        slots = ASK + rng.permutation(SLOTS)[:n]
        answers = rng.integers(0, ANSWERS, n)
        places = 2 * rng.permutation(quarter // 2)[:n]
        x[row, places] = slots
        x[row, places + 1] = answers
        y[row] = x[row]

        later = rng.random(length - quarter) < 1 / 2
        asks = quarter + np.flatnonzero(later)
        which = rng.integers(0, n, len(asks))
        x[row, asks] = slots[which]
        y[row, asks] = answers[which]
        group[row, asks] = n
    return x, y, group


TASKS = {"recall": recall, "keys": keys}
GROUPS = {"recall": DISTANCES, "keys": NUMBERS}


def accuracy(params, config, x, y, group, groups=DISTANCES):
    """For each of the groups: how often the likeliest of the eight answers is right."""
    answers = []
    for chunk in np.array_split(x, math.ceil(len(x) / 8)):
        logits = grassmann.forward(params, config, chunk)
        answers.append(logits[..., :ANSWERS].argmax(-1))
    right = np.concatenate(answers) == y
    shares = []
    for low, high in groups:
        asked = (low <= group) & (group <= high)
        shares.append(float(right[asked].mean()) if asked.any() else math.nan)
    return shares


def table(rows):
    """A line per task and model: how often it is right, the mean of the seeds, and the lowest."""
    lines = []
    for row in rows:
        task, _, label = row.label.partition(", ")
        rate = row.results[0]["spec"]["lr"]
        line = {"task": task, "model": label, "learning rate": f"{rate:g}"}
        for k, (low, high) in enumerate(GROUPS[task]):
            name = f"{low} to {high}" if low < high else f"{low} keys"
            shares = [result["test"][k] for result in row.results]
            mean = f"{np.mean(shares):.0%}"
            least = f"{min(shares):.0%}"
            line[name] = mean if least == mean else f"{mean} ({least})"
        lines.append(line)
    return lines
