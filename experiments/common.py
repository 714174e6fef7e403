"""What the programs of the laboratory share: a model in training, a clock, a writer of tables."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType

import numpy as np

import grassmann
from charlm import processes
from charlm.training import Training, step_on_batch, train_step
from grassmann import Array, Config


class Learner:
    """A model in training on a text, or on batches x, y (B, L) that a function of the step returns."""

    def __init__(
        self,
        config: Config,
        training: Training,
        text: Array | Callable,
        threads: int = 1,
        model: ModuleType = grassmann,
    ):
        self.config, self.training, self.text, self.threads, self.model = (
            config,
            training,
            text,
            threads,
            model,
        )
        self.params = model.init_params(config, training.seed)
        self.optimizer, self.k = model.adamw_init(self.params), 0

    def step(self) -> float:
        """Make one step. Returns the loss before it."""
        state = self.model, self.params, self.config, self.training, self.optimizer, self.k
        if callable(self.text):
            loss = step_on_batch(*state, *self.text(self.k), self.threads)
        else:
            loss = train_step(*state, self.text, self.threads)
        self.k += 1
        return loss


# ---- the clock -----------------------------------------------------------------------------------


def alternate(runs: dict, rounds: int, calls: int) -> dict:
    """Seconds per call for each of `runs`, one number a round; nan for a run that is None (no PyTorch).

    In a round each run has its turn: first a call that is not timed, which fills the caches and lets the
    other run's threads fall asleep, then `calls` timed calls. The first round is left out.
    """
    times = {name: [] if run else [math.nan] * (rounds + 1) for name, run in runs.items()}
    for _ in range(rounds + 1):
        for name in filter(runs.get, runs):
            runs[name]()
            start = time.perf_counter()
            for _ in range(calls):
                runs[name]()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: seconds[1:] for name, seconds in times.items()}


def quotient(theirs: list[float], ours: list[float]) -> float:
    """The median over rounds of theirs / ours."""
    return median(a / b for a, b in zip(theirs, ours, strict=True))


def machine() -> str:
    """What times depend on: versions, and the processor's name."""
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    for line in info.read_text().splitlines() if info.exists() else []:
        name = line.partition(":")[2].strip() if line.startswith("model name") else name
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    return f"{versions}, {blas['name']} {blas['version']}, {len(processes.available_cores())} cores, {name}"


# ---- the table -----------------------------------------------------------------------------------


def cell(value: object) -> str:
    """A value as a table shows it: whole numbers in full, other numbers with four digits, a dash for nan."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:,.{max(0, 4 - len(str(int(value))))}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(rows: list[dict]) -> str:
    """A table with the rows' keys as its heading. A row may lack some keys."""
    names = dict.fromkeys(name for row in rows for name in row)
    lines = [names, *([cell(row.get(name, "")) for name in names] for row in rows)]
    first, *others = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([first, "|---" * len(names) + "|", *others])
