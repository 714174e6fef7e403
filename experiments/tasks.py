"""Questions 8, 9 and 13 of compare.py: tasks that ask for a token far back, their tables and figures.

A task gives x, y, group, each (batch, length). For an asking token `group` is the distance to its
answer, or how many keys there are to remember; for all others it is 0. Those repeat themselves,
y = x, which is soon learned: what remains of the loss is the question.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import grassmann
from grassmann import Array, Config, Params, Rng

ANSWERS, ASK, VOCAB_SIZE = 8, 16, 17  # tokens: 0 to 7 are answers, 8 to 15 filler, 16 asks
SLOTS, KEYS_VOCAB_SIZE = 16, 32  # in `keys` 16 + k names slot k, before its key and when it is asked
DISTANCES = (1, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 200)  # from, to
NUMBERS = (2, 2), (4, 4), (8, 8), (16, 16)  # of keys at once

def recall(rng: Rng, batch: int, length: int) -> tuple[Array, Array, Array]:
    """What was the key? Filler with one key among it; some tokens after it ask for the key."""
    x = rng.integers(ANSWERS, ASK, (batch, length))
    place, key = rng.integers(0, length // 4, (batch, 1)), rng.integers(0, ANSWERS, (batch, 1))
    distance = np.arange(length) - place
    asks = (distance > 0) & (rng.random(x.shape) < 1 / 8)
    np.put_along_axis(x, place, key, 1)
    x[asks] = ASK
    return x, np.where(asks, key, x), np.where(asks, distance, 0)

def brackets(rng: Rng, batch: int, length: int) -> tuple[Array, Array, Array]:
    """Which bracket does this one close? Eight kinds open, one token closes."""
    x = rng.integers(0, ANSWERS, (batch, length))
    y, distance, closes = x.copy(), np.zeros_like(x), rng.random(x.shape) < 0.5
    for row in range(batch):
        still_open = []
        for t in range(length):
            if closes[row, t] and still_open:
                opener = still_open.pop()
                x[row, t], y[row, t], distance[row, t] = ASK, x[row, opener], t - opener
            else:
                still_open.append(t)
    return x, y, distance

def keys(rng: Rng, batch: int, length: int) -> tuple[Array, Array, Array]:
    """What was the key of this slot? 2, 4, 8 or 16 slots get a key each, and are asked for later.

    A key follows the token that names its slot, all of them within the first quarter of the text;
    half of the tokens after that are names again, which ask.
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

TASKS = {"recall": recall, "brackets": brackets, "keys": keys}
GROUPS = {"recall": DISTANCES, "brackets": DISTANCES, "keys": NUMBERS}

def accuracy(
    params: Params, config: Config, x: Array, y: Array, group: Array, groups: tuple = DISTANCES
) -> list[float]:
    """For each of the groups: how often the likeliest of the eight answers is right."""
    chunks = np.array_split(x, math.ceil(len(x) / 8))
    answers = [grassmann.forward(params, config, c)[..., :ANSWERS].argmax(-1) for c in chunks]
    right = np.concatenate(answers) == y
    asked = [(low <= group) & (group <= high) for low, high in groups]
    return [float(right[here].mean()) if here.any() else math.nan for here in asked]

def reach(offsets: Sequence[Sequence[int]]) -> int:
    """How many tokens back a Grassmann model sees: what its layers see, added up."""
    return sum(map(max, offsets))

def shares_of(row) -> list[list[float]]:
    """How often the model was right in each group, a list per seed."""
    return [result.get("test", result["curve"][-1][1]) for result in row.results]

def table(rows: list) -> list[dict[str, str]]:
    """One line per task and model: how often it is right, by distance or number of keys; the mean of the
    seeds, and the lowest where that is another."""
    lines = []
    for row in rows:
        task, _, label = row.label.partition(", ")
        cells = {"task": task, "model": label, "learning rate": f"{row.results[0]['spec']['lr']:g}"}
        for (low, high), shares in zip(GROUPS[task], zip(*shares_of(row), strict=True), strict=True):
            mean, least = f"{np.mean(shares):.0%}", f"{min(shares):.0%}"
            cells[f"{low} to {high}" if low < high else f"{low} keys"] = (
                mean if least == mean else f"{mean} ({least})")
        lines.append(cells)
    return lines

def plot(path: Path, answers: list) -> None:
    """Accuracy against distance, and how far the Grassmann models can see at all; or against keys."""
    rows = [row for _, some in answers for row in some]
    found = [task for task in TASKS if any(row.label.startswith(task) for row in rows)]
    figure = Figure(figsize=(6 * len(found), 4.2), layout="constrained")
    for task, axes in zip(found, figure.subplots(1, len(found), sharey=True, squeeze=False)[0], strict=True):
        groups = GROUPS[task]
        for k, row in enumerate(row for row in rows if row.label.startswith(task)):
            label, color = row.label.removeprefix(f"{task}, "), f"C{k}"
            middles, spec = np.prod(groups, 1) ** 0.5, row.results[0]["spec"]
            line, *_ = axes.semilogx(middles, np.transpose(shares_of(row)), "o-", base=2, color=color, lw=1)
            line.set_label(label)
            if spec["mixer"] == "grassmann" and not spec.get("memory"):  # others see all
                label = f"{label}: sees {reach(spec['offsets'])} back"
                axes.axvline(reach(spec["offsets"]) + 0.5, color=color, ls="--", lw=1, label=label)
        unit, look = "distance, tokens", {"color": "gray", "ls": ":"}
        if groups is DISTANCES:
            axes.axhline(1 / ANSWERS, **look, label="chance")
        else:
            unit, rng = "keys to remember", np.random.default_rng(0)
            often = [rng.multinomial(n, [1 / ANSWERS] * ANSWERS, 100_000).max(1).mean() / n for n, _ in groups]
            axes.plot([n for n, _ in groups], often, **look, label="the most frequent key")
        axes.set(title=task, xlabel=unit, ylabel="accuracy", ylim=(0, 1.05))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=110)
