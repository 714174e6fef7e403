"""One result to cite: average or taps, normalised or rescaled, and attention, with equal care.

  python -m experiments.cite           trains what is missing: an hour and a half on one core
  python -m experiments.cite --draw    only the tables and the picture

Three texts: the characters of Tiny Shakespeare (--data takes a file of it, too) and of Python's
documentation, and 512 byte pairs of the King James Bible (`apt install bible-kjv`). Two budgets,
250 and 1,000 steps. The models have two layers and equal size. Each has the best of four learning
rates, chosen by the first of four seeds on one half of the held-out text (validation). The losses
are those on the other half (test).

Runs go into experiments/results/cite.jsonl, a line each; the same command goes on from there. It
writes cite.md beside them, and docs/figures/cite.svg.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import math
from dataclasses import replace
from statistics import fmean, stdev

import matplotlib.pyplot as plt

from experiments.common import markdown
from experiments.compare import (
    ATTENTION,
    BASE,
    WIDE,
    Laboratory,
    Trial,
    count_params,
    digest,
    final,
    matched,
    train,
)
from experiments.figures import BLUE, FOLDER, ORANGE, RESULTS, STYLE
from experiments.texts import NAMES, read_text

SMALL = {"n_layer": 2, "d_model": 64, "rank": 16, "batch_size": 8, "context": 64}
SIX = {"normalize": True, "offsets": ((1, 2, 4, 8, 12, 16),) * SMALL["n_layer"]}
# A bivector that is not normalised has a length of about sqrt(r (r - 1)) = 15 at first. An average
# of six unit bivectors is sqrt(6) times shorter than one unit bivector.
MODELS = {
    "average, normalised": {"taps": False, **SIX},
    "average, rescaled": {"taps": False, "mixer": "rescaled by 38", **SIX},
    "taps, normalised": {"taps": True, **SIX},
    "taps, rescaled": {"taps": True, "mixer": "rescaled by 15", **SIX},
    "attention": ATTENTION[1],
    "rotary attention": {"mixer": "rotary attention", **WIDE},
}
RATES = (3e-3, 6e-3, 12e-3, 24e-3)
SEEDS = range(4)
BUDGETS = (250, 1000)
STUDENT = 3.182  # half a 95% interval of a mean of four, in standard errors
DIFFERENCES = (
    ("taps, normalised", "average, normalised"),
    ("taps, rescaled", "average, rescaled"),
    ("average, rescaled", "average, normalised"),
    ("taps, rescaled", "taps, normalised"),
    ("average, rescaled", "rotary attention"),
    ("taps, normalised", "rotary attention"),
    ("average, rescaled", "attention"),
)
TEXTS = ("shakespeare", 0), (None, 0), ("bible", 512)


class Study:
    """The runs, in an order in which all models get a seed before one gets the next."""

    def __init__(self, path, data):
        self.lab = Laboratory(path, data)
        self.texts = []
        for name, pieces in TEXTS:
            source = data if name == "shakespeare" else name
            text = read_text(source, pieces, SMALL["context"])
            if name == "shakespeare":
                text = replace(text, name=NAMES[name])  # not the name of a file of it
            self.texts.append(text)

    def trial(self, text, iters, name, lr, seed):
        settings = BASE | SMALL | {"iters": iters, "eval_every": iters, "lr": lr, "seed": seed}
        settings |= {"data": text.sha256, "vocab_size": text.vocab_size}
        size = count_params(Trial(settings | MODELS["average, normalised"]))
        return matched(Trial(settings | MODELS[name]), size)

    def run(self, *what):
        """The finished run, or None."""
        return self.lab.finished.get(digest(self.trial(*what).spec))

    def cells(self):
        for iters in BUDGETS:
            for text in self.texts:
                for name in MODELS:
                    yield text, iters, name

    def best_rate(self, cell):
        """The rate with the lowest validation loss of the first seed. None: a run is missing."""
        runs = {lr: self.run(*cell, lr, 0) for lr in RATES}
        if not all(runs.values()):
            return None
        return min(RATES, key=lambda lr: final(runs[lr], test=False))

    def seeds(self, cell):
        """The finished runs at the best rate."""
        lr = self.best_rate(cell)
        runs = [self.run(*cell, lr, seed) for seed in SEEDS] if lr else []
        return [run for run in runs if run]

    def train(self):
        """Train what is missing: first the rates, then seed by seed."""
        for seed in SEEDS:
            for cell in self.cells():
                rates = (self.best_rate(cell),) if seed else RATES
                for lr in rates:
                    self.train_one(*cell, lr, seed)

    def train_one(self, text, iters, name, lr, seed):
        what = text, iters, name, lr, seed
        if self.run(*what):
            return
        label = f"{name}, lr {lr:g}, seed {seed}"
        result = train((label, self.trial(*what), text))
        self.lab.add(result)
        print(f"{text.name}, {iters} steps, {label}: {result['test']:.3f}", flush=True)


def columns(study):
    for text in study.texts:
        for iters in BUDGETS:
            yield f"{text.name}, {iters:,} steps", (text, iters)


def losses(study, column, name):
    """Test losses, a seed each."""
    return [final(run) for run in study.seeds((*column, name))]


def loss_table(study):
    """Test losses in nats per token, ± the standard deviation of the seeds, and the rates."""
    rows = []
    for name in MODELS:
        row = {"model": name}
        for heading, column in columns(study):
            values = losses(study, column, name)
            rate = study.best_rate((*column, name))
            row[heading] = f"{fmean(values):.3f} ± {stdev(values):.3f} ({rate:g})"
        rows.append(row)
    return rows


def difference_table(study):
    """Mean differences of runs with equal seeds, so with equal batches, and 95% intervals."""
    rows = []
    for name, other in DIFFERENCES:
        row = {"test loss of": name, "minus": other}
        for heading, column in columns(study):
            pairs = zip(losses(study, column, name), losses(study, column, other), strict=True)
            apart = [a - b for a, b in pairs]
            half = STUDENT * stdev(apart) / math.sqrt(len(apart))
            row[heading] = f"{fmean(apart):+.3f} ± {half:.3f}"
        rows.append(row)
    return rows


def picture(study):
    """A panel for each text, a dot for each seed."""
    figure, panels = plt.subplots(1, len(TEXTS), figsize=(9.4, 3.2), sharey=True)
    names = [*MODELS]
    for axes, text in zip(panels, study.texts, strict=True):
        for iters, color, shift in zip(BUDGETS, (ORANGE, BLUE), (-0.12, 0.12), strict=True):
            for k, name in enumerate(names):
                values = losses(study, (text, iters), name)
                axes.plot(values, [k + shift] * len(values), "o", ms=5, alpha=0.7, color=color)
            axes.plot([], [], "o", color=color, label=f"{iters:,} steps")
        axes.set_title(text.name.replace(" in ", "\nin "), size=10)
        axes.set_xlabel("test loss, nats per token")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[1].legend(frameon=False, fontsize=9, loc="center right")
    return figure


def write(study):
    """The tables beside the runs, and the picture."""
    parts = [
        "# One result to cite",
        "`python -m experiments.cite`",
        "Test loss in nats per token: mean of four seeds ± their standard deviation. In brackets "
        "the learning rate, the best of four on the validation half, with the first seed.",
        markdown(loss_table(study)),
        "Differences of runs with equal seeds: their mean, and half of its 95% interval.",
        markdown(difference_table(study)),
    ]
    page = "\n\n".join(parts) + "\n"
    (RESULTS / "cite.md").write_text(page, encoding="utf-8")
    print(page)
    with plt.rc_context(STYLE):
        picture(study).savefig(FOLDER / "cite.svg", metadata={"Date": None})


def main():
    command_line.plain_output()
    parser = command_line.Parser(__doc__)
    parser.add_argument("--data", default="shakespeare", help="Tiny Shakespeare, or a file of it")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    path = RESULTS / "cite.jsonl"
    with command_line.short_errors(parser, path):
        study = Study(path, args.data)
        if not args.draw:
            study.train()
        write(study)


if __name__ == "__main__":
    main()
