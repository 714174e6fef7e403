"""One result to cite: average or taps, normalised or rescaled, and attention, with equal care.

  python -m experiments.cite --data shakespeare     trains what is missing, an hour on one core
  python -m experiments.cite --jobs 0               only the table and the picture

Three texts: the characters of Tiny Shakespeare (--data takes a file of it, too) and of Python's
documentation, and 512 byte pairs of the King James Bible (`apt install bible-kjv`). Two budgets,
250 and 1,000 steps. The models have two layers and equal size. Each has the best of three learning
rates, chosen by the first of four seeds on one half of the held-out text (validation). The losses
are those on the other half (test).

Runs go into experiments/results/cite.jsonl, a line each; the same command goes on from there. It
writes cite.md beside them, and docs/figures/cite.svg.
"""

from charlm import command_line

command_line.prepare()  # before NumPy


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
from experiments.figures import RESULTS
from experiments.texts import read_text

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
RATES = (3e-3, 6e-3, 12e-3)
SEEDS = range(4)
BUDGETS = (250, 1000)
TEXTS = ("shakespeare", 0), (None, 0), ("bible", 512)


class Study:
    """The runs, in an order in which all models get a seed before one gets the next."""

    def __init__(self, path, data):
        self.lab = Laboratory(path, data)
        self.texts = []
        for name, pieces in TEXTS:
            source = data if name == "shakespeare" else name
            self.texts.append(read_text(source, pieces, SMALL["context"]))

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


def main():
    command_line.plain_output()
    parser = command_line.Parser(__doc__)
    parser.add_argument("--data", default="shakespeare", help="Tiny Shakespeare, or a file of it")
    args = parser.parse_args()
    path = RESULTS / "cite.jsonl"
    with command_line.short_errors(parser, path):
        Study(path, args.data).train()


if __name__ == "__main__":
    main()
