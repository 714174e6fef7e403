"""Question 6 of compare.py: two tasks that ask for a token far back, their table and figure.

Both tasks give x, y, distance, each (batch, length): distance is that from an asking token to its
answer, 0 for all others. Those repeat themselves, y = x, which is soon learned: what remains of the
loss is the question.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import grassmann
from grassmann import Array, Config, Params, Rng

ANSWERS, ASK, VOCAB_SIZE = 8, 16, 17  # tokens: 0 to 7 are answers, 8 to 15 filler, 16 asks
DISTANCES = (1, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 200)  # from, to


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


TASKS = {"recall": recall, "brackets": brackets}


def accuracy(params: Params, config: Config, x: Array, y: Array, distance: Array) -> list[float]:
    """For each of DISTANCES: how often the likeliest of the eight answers is right."""
    chunks = np.array_split(x, math.ceil(len(x) / 8))
    answers = [grassmann.forward(params, config, c)[..., :ANSWERS].argmax(-1) for c in chunks]
    right = np.concatenate(answers) == y
    asked = [(near <= distance) & (distance <= far) for near, far in DISTANCES]
    return [float(right[here].mean()) if here.any() else math.nan for here in asked]


def reach(offsets: Sequence[Sequence[int]]) -> int:
    """How many tokens back a Grassmann model sees: what its layers see, added up."""
    return sum(map(max, offsets))


def table(rows: list) -> list[dict[str, str]]:
    """One line per task and model: how often it is right, by distance."""
    lines = []
    for row in rows:
        (task, _, label), result = row.label.partition(", "), row.results[0]
        cells = {"task": task, "model": label, "learning rate": f"{result['spec']['lr']:g}"}
        shares = zip(DISTANCES, result["curve"][-1][1], strict=True)
        lines.append(cells | {f"{near} to {far}": f"{share:.0%}" for (near, far), share in shares})
    return lines


def plot(path: Path, answers: list) -> None:
    """Accuracy against distance, and how far the Grassmann models can see at all."""
    figure, middles = Figure(figsize=(12, 4.2), layout="constrained"), np.prod(DISTANCES, 1) ** 0.5
    ((_, rows),) = answers
    for task, axes in zip(TASKS, figure.subplots(1, len(TASKS), sharey=True), strict=True):
        for k, row in enumerate(row for row in rows if row.label.startswith(task)):
            label, result, color = row.label.removeprefix(f"{task}, "), row.results[0], f"C{k}"
            axes.semilogx(middles, result["curve"][-1][1], "o-", base=2, color=color, label=label)
            if far := reach(result["spec"]["offsets"]):  # attention has none
                label = f"{label}: sees {far} back"
                axes.axvline(far + 0.5, color=color, ls="--", lw=1, label=label)
        axes.axhline(1 / ANSWERS, color="gray", ls=":", label="chance")
        axes.set(title=task, xlabel="distance, tokens", ylabel="accuracy", ylim=(0, 1.05))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=110)
