"""How fast it is, and against what: prints a table for each section.

  python -m experiments.bench                          everything, a quarter of an hour on two cores
  python -m experiments.bench --data shakespeare       on Tiny Shakespeare, as in README.md
  python -m experiments.bench --quick                  fewer turns, and no race
  python -m experiments.bench --only step ops          some sections
  python -m experiments.bench --only ranks machines    on several processes, and machines
  python -m experiments.bench --gpu                    on a CUDA GPU; --report writes it down

What is compared runs by turns, A B A B …, so that a machine that speeds up or slows down does so
for both: times are medians over the turns, and "x ours" is the median of the quotients within a
turn. (But for `race`, whose seconds are sums and whose last two runs have the machine for
themselves.) Both sides have the same threads, batches and optimiser. The other side is PyTorch as
it is usually written (pip install -r experiments/requirements.txt); without it there is a dash.
"""

import cli  # noqa: I001  (before NumPy)

import cProfile
import math
import multiprocessing
import os
import platform
import pstats
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

import grassmann
from experiments import bench_gpu, bench_ranks
from experiments.bench_models import (Model, Ours, Setup, Theirs, alternate, cell, gpt_of_size,
                                      multiply_adds, n_parameters, products, quotient, torch)
from text import read_corpus
from training import in_threads

# ---- sections: each returns the rows of its table ------------------------------------------------

def step(setup: Setup) -> list[dict]:
    """Milliseconds per training step: batch, forward, backward, clipping, AdamW

    Our default model against nanoGPT's laptop recipe and itself in PyTorch; the paper's layer
    (offsets averaged, normalised, positions) as it is usually written; and what offsets cost.
    """
    default, rows = setup.config(), []
    one = setup.config(taps=False, normalize=True, positions=True)  # 1, 2, 4, 8 back, one a layer
    six = replace(one, offsets=((1, 2, 4, 8, 12, 16),) * one.n_layer)
    back_1, back_16 = (replace(default, offsets=[range(1, m + 1)] * one.n_layer) for m in (1, 16))
    gpts = {"GPT, equal width": setup.gpt_config(),
            "GPT, equal parameters": gpt_of_size(setup, n_parameters(default))}
    for what, config, others in (
        ("default", default, gpts | {"the same": default}),
        ("one offset per layer", one, {"as usually written": one}),
        ("six offsets per layer", six, {"as usually written": six}),
        ("16 taps in each layer", back_16, {"ours, 1 in each": back_1}),
    ):
        runs = {"ours": Ours(setup, config).step}
        for name, other in others.items():
            side = Ours if name.startswith("ours") else torch and Theirs
            runs[name] = side and side(setup, other).step
        times = alternate(setup, runs, 25, 4)
        rows += [{
            "ours": what, "parameters": n_parameters(config), "ms": 1e3 * median(times["ours"]),
            "against": name, "its parameters": n_parameters(other),
            "its ms": 1e3 * median(times[name]), "x ours": quotient(times[name], times["ours"]),
        } for name, other in others.items()]
    return rows

def race(setup: Setup, iters: int = 2000) -> list[dict]:
    """Validation loss (nats per character) and seconds of training, against nanoGPT's laptop recipe

    As many steps of our defaults and of the GPT, as published (learning rate 1e-3) and at its best
    rate (4e-3), on the same batches, by turns of 50. Then two runs of ours whose number of steps,
    and so the schedule, is chosen for a part of the GPT's time. Validation is not on the clock.
    """
    def train(*entrants: tuple[str, type, float, int]) -> list[dict]:
        rows, runs = [], []
        for name, side, lr, steps in entrants:
            own = replace(setup, training=replace(setup.training, iters=steps, lr=lr))
            runs.append(side(own, setup.config() if side is Ours else setup.gpt_config()))
            rows.append({"run": name, "learning rate": lr, "steps": steps, "seconds": 0.0})
        for k in range(0, max(row["steps"] for row in rows), 50):
            for run, row in zip(runs, rows, strict=True):
                start = time.perf_counter()
                for _ in range(k, min(k + 50, row["steps"])):
                    run.step()
                row["seconds"] += time.perf_counter() - start
        return [row | {"loss": run.validate()} for run, row in zip(runs, rows, strict=True)]

    if setup.quick:
        return [{"run": "skipped by --quick: it takes minutes"}]
    lr, gpts = setup.training.lr, [("GPT, as published", Theirs, 1e-3, iters),
                                   ("GPT, at its best learning rate", Theirs, 4e-3, iters)]
    rows = train(("ours, as many steps", Ours, lr, iters), *(gpts if torch else []))
    if torch:
        steps = iters * rows[1]["seconds"] / rows[0]["seconds"]
        rows += train(("ours, in a fifth of the GPT's time", Ours, lr, max(1, round(0.2 * steps))))
        rows += train(("ours, in the GPT's time", Ours, lr, max(1, round(steps))))
    return rows

def product_loop(shards: list[list], array: Callable) -> Callable[[], list]:
    """A function that computes products of these shapes, each with the two of its gradients, every
    shard in a thread of its own. (PyTorch gets one shard, and has threads within a product.)"""
    rng = np.random.default_rng(0)
    work = [[[array(rng.standard_normal(shape, np.float32)) for shape in ((m, k), (k, n), (m, n))]
             for m, k, n in shapes] for shapes in shards]

    def multiply(shard: list) -> None:
        for x, W, dy in shard:
            _ = x @ W, dy @ W.T, x.T @ dy

    return lambda: list(in_threads(multiply, work, len(work)))

def efficiency(setup: Setup) -> list[dict]:
    """Rate of matrix products in the shapes of a step, GFLOP/s, and what part of it a step has"""
    windows = range(setup.training.batch_size)
    shards = np.array_split(windows, min(setup.threads, len(windows)))  # as in training.py
    sides = {"ours": (setup.config(), Ours, np.asarray, shards), "GPT, equal width": (
        setup.gpt_config(), torch and Theirs, torch and torch.from_numpy, [windows])}
    runs, gigaflop = {}, {}
    for what, (config, side, array, shards) in sides.items():
        shapes = [products(config, len(rows) * config.context) for rows in shards]
        runs[what, "products"] = side and product_loop(shapes, array)
        runs[what, "step"] = side and side(setup, config).step
        gigaflop[what, "products"] = 6e-9 * sum(math.prod(s) for shard in shapes for s in shard)
        gigaflop[what, "step"] = 2e-9 * multiply_adds(config, len(windows))
    times = alternate(setup, runs, 15, 2)
    rates = {key: [gigaflop[key] / seconds for seconds in times[key]] for key in times}
    return [{"what": what, "GFLOP per step": gigaflop[what, "step"],
             "ms per step": 1e3 * median(times[what, "step"]),
             "rate": median(rates[what, "products"]),
             "of the rate": quotient(rates[what, "step"], rates[what, "products"])}
            for what in sides]

def ops(setup: Setup) -> list[dict]:
    """Where the time of our step goes, on one thread: milliseconds in each op, less those in it"""
    endings = ("_forward", "_backward", "get_batch", "loss_and_grads", "clip_grads", "adamw_step")
    run, steps = Ours(replace(setup, threads=1), setup.config()), []
    run.step()  # to warm up
    for _ in range(2 if setup.quick else 30):
        profile, spent = cProfile.Profile(builtins=False), Counter()
        profile.runcall(run.step)
        stats = pstats.Stats(profile).stats  # the keys are (file, line, name)
        ops = {f for f in stats if f[0] == grassmann.__file__ and f[2].endswith(endings)}
        for function, (_, _, own, _, callers) in stats.items():
            seconds = {function: own} if function in ops else {f: t[3] for f, t in callers.items()}
            spent.update({op: seconds[op] for op in ops & seconds.keys()})  # adds
        steps.append(spent)
    ms = {op: 1e3 * median(spent[op] for spent in steps) for op in ops}
    return [{"op": op[2], "calls": stats[op][1], "ms": ms[op], "share": ms[op] / sum(ms.values())}
            for op in sorted(ops, key=ms.get, reverse=True)]

def gpt_writer(setup: Setup, text: np.ndarray, cache: bool) -> Callable[[], None]:
    """Each call writes one character and reads the whole context again; or, with a cache of keys
    and values, the last character. At the end of the context the cache starts over with half."""
    config = setup.gpt_config()
    model, context = Model(config), config.context
    tokens, past, read = torch.from_numpy(text.astype(np.int64))[None, -context:], None, context

    @torch.inference_mode()
    def write() -> None:
        nonlocal tokens, past, read
        if not cache:
            logits = model(tokens)
        elif read < context:
            logits, read = model(tokens[:, -1:], past, read), read + 1
        else:
            past, read = [{} for _ in range(config.n_layer)], context // 2
            logits = model(tokens[:, -read:], past)
        token = torch.multinomial(torch.softmax(logits[:, -1] / 0.8, -1), 1)
        tokens = torch.cat([tokens, token], 1)[:, -context:]

    return write

def generation(setup: Setup, positions: tuple[int, ...] = (100, 20_000)) -> list[dict]:
    """Characters written per second on one thread, after as many as the position says"""
    if torch:
        torch.set_num_threads(1)
    rows, config, memory = [], setup.config(), setup.config(memory=True)
    calls = 2 * (config.context - config.context // 2 + 1)  # twice from a full cache to a full one
    for position in positions[:1] if setup.quick else positions:
        text = np.resize(setup.corpus.train, position)
        runs = {name: grassmann.generate(grassmann.init_params(own), own, text, 10**9, temperature=0.8).__next__
                for name, own in (("ours", config), ("with memory", memory))}
        for name, cache in (("GPT re-reading", False), ("GPT with cache", True)):
            runs[name] = torch and gpt_writer(setup, text, cache)
        times = alternate(setup, runs, 20, calls)
        row = {name: median(1 / t for t in seconds) for name, seconds in times.items()}
        ratios = {f"ours / {name}": quotient(times[name], times["ours"]) for name in [*times][1:]}
        rows.append({"position": position} | row | ratios)
    return rows

def length(setup: Setup, tokens: int = 32_768, longest_table: int = 2048) -> list[dict]:
    """Microseconds per token of a training step by the length of its windows, on at most 2 threads

    Every step has the same number of tokens, from 512 windows of 64 to 2 of 16,384. Beside our
    model the same with a memory, and with attention (mixer="attention"), as far as its length x
    length tables go; and what it takes, with a memory, to read such a text as `sample.py` reads a
    prompt, on one thread. How many times as long as the shortest each takes.
    """
    def read(L: int) -> None:
        for text in np.resize(setup.corpus.train, (tokens // L, L)):
            grassmann.stream_read(params, config, grassmann.stream_init(params, config), text)

    tokens = tokens // 8 if setup.quick else tokens
    columns, config = ("grassmann", "memory", "attention", "reading"), setup.config(memory=True)
    params = grassmann.init_params(config)
    lengths, runs = [2**k for k in range(6, 20, 2) if 2**k <= tokens // 2], {}
    for L in lengths:
        training = replace(setup.training, batch_size=tokens // L)
        own = replace(setup, training=training, threads=min(2, setup.threads))
        runs[L, "grassmann"] = Ours(own, setup.config(context=L)).step
        runs[L, "memory"] = Ours(own, setup.config(memory=True, context=L)).step
        attention = Ours(own, setup.config(mixer="attention", context=L)).step
        runs[L, "attention"] = attention if longest_table >= L else None
        runs[L, "reading"] = partial(read, L)
    times = alternate(setup, runs, 5, 1)
    return [{"length": L, "windows": tokens // L,
             **{mixer: 1e6 / tokens * median(times[L, mixer]) for mixer in columns},
             **{f"{mixer} x": quotient(times[L, mixer], times[lengths[0], mixer]) for mixer in columns}}
            for L in lengths]

def training_memory(setup: Setup, ours: bool) -> float:
    """What 30 training steps and a validation add to the peak memory of this process, in MiB."""
    def peak() -> float:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10

    if not ours:
        torch.optim.AdamW([torch.zeros(1)])  # the first optimiser imports another 60 MB of PyTorch
    before = peak()
    run = Ours(setup, setup.config()) if ours else Theirs(setup, setup.gpt_config())
    for _ in range(30):
        run.step()
    run.validate()
    return peak() - before

def memory(setup: Setup, repeats: int = 3) -> list[dict]:
    """Peak memory (MiB) of training above the imports': 30 steps, a validation, in a new process"""
    def measure(ours: bool) -> float:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(training_memory, setup, ours).result()

    if platform.system() != "Linux":
        return [{"what": "measured on Linux only"}]
    sides = {"ours": True} | ({"GPT, equal width": False} if torch else {})
    return [{"what": what, "MiB": median(measure(ours) for _ in range(repeats))}
            for what, ours in sides.items()]

SECTIONS = {f.__name__: f for f in (
    step, race, efficiency, ops, generation, length, memory, bench_ranks.ranks, bench_ranks.machines)}

# ---- the table -----------------------------------------------------------------------------------

def header(setup: Setup, data: str | None) -> dict[str, object]:
    """What the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    info = {"text": data or "pydoc_data.topics", "threads": setup.threads,
            "cores": len(cli.available_cores()), "processor": name[1] if name else platform.processor(),
            "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "unknown",
            "Python": platform.python_version(), "NumPy": np.__version__}
    if torch:
        from threadpoolctl import threadpool_info  # the same requirements.txt has it

        info["PyTorch"] = f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
        info["BLAS"] = [f"{blas['internal_api']} {blas['version']} {blas.get('architecture')}"
                        for blas in threadpool_info() if blas["user_api"] == "blas"]
    return info

def print_table(rows: list[dict]) -> None:
    lines = [[*rows[0]]] + [[cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
        print(first.ljust(widths[0]), *cells, sep="  ")

def main() -> None:
    cli.plain_output()
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--data", help="a UTF-8 text file, or 'shakespeare' (default: the text of train_char.py)")
    add("--threads", type=cli.number(int, 1, 1024), default=len(cli.available_cores()),
        help="CPU threads (default: all cores)")
    add("--quick", action="store_true", help="fewer turns, and no race")
    add("--gpu", action="store_true", help="measure gpu.py on a CUDA GPU instead")
    add("--report", action="store_true", help="with --gpu: write experiments/results/gpu-CARD.md")
    add("--rehearse", action="store_true", help="with --gpu: tiny, on the tests' stand-in, into out/")
    add("--only", nargs="+", choices=[*SECTIONS, *bench_gpu.SECTIONS], help="some sections")
    args = parser.parse_args()
    with cli.short_errors(parser, args.data, "not enough memory for this model"):
        if not set(args.only or []) <= (bench_gpu.SECTIONS if args.gpu else SECTIONS).keys():
            raise ValueError(f"--only {' '.join(args.only)}: not all are sections "
                             f"{'of' if args.gpu else 'without'} --gpu")
        if (args.report or args.rehearse) and not args.gpu:
            raise ValueError("--report and --rehearse need --gpu")
        if args.gpu:
            folder = "out" if args.rehearse else "experiments/results" if args.report else None
            folder = folder and bench_gpu.ROOT / folder
            return bench_gpu.main(args.only, args.data, folder, args.rehearse)
        setup = Setup(read_corpus(args.data, 16_384), args.threads, args.quick)
        for name, value in header(setup, args.data).items():
            print(f"{name:10s} {value}")
        for name in args.only or SECTIONS:
            section = SECTIONS[name]
            print(f"\n{name}: {section.__doc__.splitlines()[0]}\n", flush=True)
            print_table(section(setup))

if __name__ == "__main__":
    main()
