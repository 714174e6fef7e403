"""Sections of the benchmark on several processes: two of them on this machine, and n machines by
arithmetic. As a program it is what `ranks` starts, with mpiexec or without."""

import cli  # noqa: F401, I001  (before NumPy)

import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import grassmann
import parallel
from grassmann import Array, Config, param_shapes
from training import Training, train_step

if TYPE_CHECKING:  # it comes with PyTorch, which takes seconds
    from experiments.bench_models import Setup

MPIEXEC = find_spec("mpi4py") and shutil.which(
    "mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
NETWORKS = 1, 10, 100  # Gb/s
SIZES = (4, 128), (6, 224), (7, 448), (14, 1024)  # layers and width: 0.7M to 100M parameters

def one_step(config: Config, t: Training, tokens: Array, threads: int, calls: int) -> tuple:
    """Median seconds of a training step, and of a sum of gradients over all ranks, if several."""
    params, steps, sums = grassmann.init_params(config), [], [math.nan]
    state = grassmann.adamw_init(params)
    for k in range(calls + 1):
        start = time.perf_counter()
        x, y = grassmann.get_batch(tokens, t.batch_size, config.context, t.seed, k)
        loss = train_step(grassmann, params, config, t, state, k, x, y, threads)
        steps.append(time.perf_counter() - start)
    if parallel.size > 1:
        for _ in range(calls):
            start = time.perf_counter()
            parallel.add_up(loss, params)
            sums.append(time.perf_counter() - start)
    return median(steps[1:]), median(sums[1:] or sums)

def ranks(setup: "Setup") -> list[dict]:
    """Milliseconds per training step: one thread, two threads, two processes with half the batch each

    By turns, each in new processes. The sum is that of all gradients, in shared memory.
    """
    ways = {"one thread": ([], 1), "two threads": ([], 2)}
    if MPIEXEC:
        ways["two processes"] = [MPIEXEC, "-n", "2"], 1
    found = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2 if setup.quick else 7):
            for way, (launcher, threads) in ways.items():
                work = setup.config(), setup.training, setup.corpus.train, threads, 2 if setup.quick else 40
                (file := Path(folder, "work")).write_bytes(pickle.dumps(work))
                command = [*launcher, sys.executable, "-m", "experiments.bench_ranks", file]
                printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True,
                                         cwd=Path(__file__).parents[1]).stdout
                found[way].append([*map(float, printed.split())])
    rows, (one, *_) = [], found.values()
    for way, times in found.items():
        quotients = (a / b for (a, _), (b, _) in zip(one, times, strict=True))
        step, added = (1e3 * median(column) for column in zip(*times, strict=True))
        rows.append({"with": way, "ms": step, "of which the sum": added, "x one thread": median(quotients)})
    return rows

def machines(setup: "Setup", n: int = 8) -> list[dict]:
    """Adding up the gradients on 8 machines, each with a batch of its own, by size and network (Gb/s)

    By arithmetic: 2 (n-1)/n times their bytes go through every machine's link, while nothing is
    computed; only the step is measured, here. "x one": how many machines' work 8 of them do.
    "tokens": of so many a machine and step on, the sum takes at most a fifth of the time.
    """
    rows, tokens = [], setup.training.batch_size * setup.config().context
    for n_layer, d_model in SIZES[:2] if setup.quick else SIZES:
        config = setup.config(n_layer=n_layer, d_model=d_model)
        n_params = sum(map(math.prod, param_shapes(config).values()))
        calls = 2 if setup.quick else 3 + 10**8 // n_params
        step, _ = one_step(config, setup.training, setup.corpus.train, setup.threads, calls)
        for gigabits in NETWORKS:
            added = 2 * (n - 1) / n * 32e-9 * n_params / gigabits  # seconds
            rows.append({"parameters": n_params, "ms a step": 1e3 * step, "network": gigabits,
                         "ms the sum": 1e3 * added, "x one": n * step / (step + added),
                         "tokens": round(tokens * 4 * added / step)})
    return rows

if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        step, added = one_step(*pickle.load(file))
    if parallel.rank == 0:
        print(step, added)
