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
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import parallel
from experiments.bench_models import Ours, Setup, Theirs, gpt_of_size, n_parameters, quotient, torch
from grassmann import Config

MPIEXEC = find_spec("mpi4py") and shutil.which(
    "mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
NETWORKS = 1, 10, 100  # Gb/s
SIZES = (4, 128), (6, 224), (7, 448), (14, 1024)  # layers and width: 0.7M to 100M parameters

def one_step(setup: Setup, config: Config, calls: int) -> tuple[float, float]:
    """Median seconds of a training step, ours or the GPT's, and of a sum over all ranks, if several."""
    run, steps, sums = (Theirs if config.mixer == "attention" else Ours)(setup, config), [], [math.nan]
    for _ in range(calls + 1):
        start = time.perf_counter()
        run.step()
        steps.append(time.perf_counter() - start)
    if parallel.size > 1:
        for _ in range(calls):
            start = time.perf_counter()
            parallel.add_up(0.0, run.params)
            sums.append(time.perf_counter() - start)
    return median(steps[1:]), median(sums[1:] or sums)

def ranks(setup: Setup) -> list[dict]:
    """Milliseconds per training step: one thread, two threads, two processes with half the batch each

    By turns, each in new processes; PyTorch's GPTs on two threads. The sum is that of all gradients, in
    shared memory; "/ GPT" is the time over that of a GPT.
    """
    own = setup.config()
    ways = {"one thread": ([], 1, own), "two threads": ([], 2, own)}
    if MPIEXEC:
        ways["two processes"] = [MPIEXEC, "-n", "2"], 1, own
    gpts = {"GPT, equal width": setup.gpt_config(),
            "GPT, equal parameters": gpt_of_size(setup, n_parameters(own))} if torch else {}
    ways |= {name: ([], 2, config) for name, config in gpts.items()}
    times = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 if setup.quick else 7):
            for way, (launcher, threads, config) in ways.items():
                work = replace(setup, threads=threads), config, 2 if setup.quick else 40
                (file := Path(folder, "work")).write_bytes(pickle.dumps(work))
                command = [*launcher, sys.executable, "-m", "experiments.bench_ranks", file]
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
                if run.returncode:
                    raise ValueError(f"{way}: {command[0]} ended with code {run.returncode}")
                times[way].append([*map(float, run.stdout.split())])
    steps = {way: [step for step, _ in found] for way, found in times.items()}
    added = {way: median(seconds for _, seconds in found) for way, found in times.items()}
    return [{"with": way, "ms": 1e3 * median(steps[way]), "of which the sum": 1e3 * added[way],
             "x one thread": quotient(steps["one thread"], steps[way]),
             **{f"/ {gpt}": quotient(steps[way], steps[gpt]) for gpt in gpts}} for way in ways]

def machines(setup: Setup, n: int = 8) -> list[dict]:
    """Adding up the gradients on 8 machines, each with a batch of its own, by size and network (Gb/s)

    By arithmetic: 2 (n-1)/n times their bytes go through every machine's link, while nothing is
    computed; only the step is measured, here. "x one": how many machines' work 8 of them do.
    "tokens": of so many a machine and step on, the sum takes at most a fifth of the time.
    """
    rows, tokens = [], setup.training.batch_size * setup.config().context
    for n_layer, d_model in SIZES[:2] if setup.quick else SIZES:
        config = setup.config(n_layer=n_layer, d_model=d_model)
        n_params = n_parameters(config)
        calls = 2 if setup.quick else 3 + 10**8 // n_params
        step, _ = one_step(setup, config, calls)
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
