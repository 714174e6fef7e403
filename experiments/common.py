"""What the programs of the laboratory share: a model in training, a clock, a writer of tables."""

import math
import platform
import time
from pathlib import Path
from statistics import median

import numpy as np

import grassmann
from charlm import processes
from charlm.training import train_step


class Learner:
    """A model in training on a text, or on batches x, y (B, L) that text(step) returns."""

    def __init__(
        self,
        config,
        training,
        text,
        threads=1,
        model=grassmann,
    ):
        self.config = config
        self.training = training
        self.text = text
        self.threads = threads
        self.model = model
        self.params = model.init_params(config, training.seed)
        self.optimizer = model.adamw_init(self.params)
        self.k = 0  # steps made

    def step(self):
        """Make one step. Returns the loss before it."""
        state = self.model, self.params, self.config, self.training, self.optimizer, self.k
        loss, _ = train_step(*state, self.text, self.threads)
        self.k += 1
        return loss


# ---- the clock -----------------------------------------------------------------------------------


def alternate(runs, rounds, calls):
    """Seconds per call for each of `runs`, one number a round; nan for a run that is None.

    In a round each run has its turn: first a call that is not timed, which fills the caches and
    lets the other run's threads fall asleep, then `calls` timed calls. The first round is left out.
    """
    times = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            times[name].append(seconds_per_call(run, calls) if run else math.nan)
    return {name: seconds[1:] for name, seconds in times.items()}


def seconds_per_call(run, calls):
    run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def quotient(theirs, ours):
    """The median over rounds of theirs / ours."""
    return median(a / b for a, b in zip(theirs, ours, strict=True))


def machine():
    """What times depend on: versions, and the processor's name."""
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
    cores = len(processes.available_cores())
    return f"{versions}, {blas['name']} {blas['version']}, {cores} cores, {name}"


# ---- the table -----------------------------------------------------------------------------------


def cell(value):
    """A value as a table shows it: a float with four digits, a dash for nan."""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "–"
    before = len(str(int(value)))  # digits before the point
    return f"{value:,.{max(0, 4 - before)}f}"


def markdown(rows):
    """A table with the rows' keys as its heading. A row may lack some keys."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [table_line(names), "|---" * len(names) + "|"]
    for row in rows:
        lines.append(table_line(cell(row.get(name, "")) for name in names))
    return "\n".join(lines)


def table_line(cells):
    return "| " + " | ".join(cells) + " |"
