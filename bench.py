"""How fast it is, and against what: python bench.py prints a table and writes it as JSON.

  python bench.py                               everything, 10 to 15 minutes on two idle cores
  python bench.py --data shakespeare            on Tiny Shakespeare, as in the README
  python bench.py --quick                       fewer repeats, and no race
  python bench.py --only step generation        some sections
  python bench.py --gpu                         on a CUDA GPU instead: gpu.py against PyTorch (bench_gpu.py)

What is compared runs by turns, A B A B …, so that a machine that speeds up or slows down does so for both:
times are medians over the turns, and "x ours" is the median of the quotients within a turn. (But for `race`, whose
seconds are sums and whose last two runs have the machine for themselves.) Both sides have the same number of
threads, the same batches and the same optimiser. The other side is PyTorch as it is usually written, and compiled
only on a GPU (pip install -r requirements-bench.txt); without it, its cells say so.
"""

import cpu  # noqa: I001  (before NumPy)

import json
import math
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import bench_gpu
import grassmann
from bench_models import NEEDS_TORCH, Ours, Setup, Theirs, alternate, gpt, gpt_of_size, make_setup, middle
from bench_models import multiply_adds, n_parameters, products, quotient, torch, torch_grassmann
from grassmann import Array
from cli import Parser, number, plain_output, short_errors
from runs import check_memory


# ---- sections: each returns the rows of its table -----------------------------------------------------


def step(setup: Setup) -> list[dict]:
    """Milliseconds per training step: batch, forward, backward, clipping, AdamW

    Our default model against the GPT of nanoGPT's laptop recipe, at equal width and at equal parameters, and against
    itself in PyTorch. Then the paper's layer (offsets averaged, normalised, positions), against the same in PyTorch
    as it is usually written.
    """
    default = setup.config()
    equal = gpt_of_size(setup, n_parameters(default))
    one = setup.config(taps=False, normalize=True, positions=True)  # and so one offset per layer: 1, 2, 4, 8
    six = replace(one, offsets=[(1, 2, 4, 8, 12, 16)] * one.n_layer)
    rows = []
    for what, config, others in (
        ("default", default, {
            "GPT, equal width": (gpt, setup.gpt_config()), "GPT, equal parameters": (gpt, equal),
            "the same": (torch_grassmann, default),
        }),
        ("one offset per layer", one, {"as usually written": (torch_grassmann, one)}),
        ("six offsets per layer", six, {"as usually written": (torch_grassmann, six)}),
    ):  # fmt: skip
        theirs = {name: Theirs(setup, make(other)).step if torch else None for name, (make, other) in others.items()}
        times = alternate({"ours": Ours(setup, config).step} | theirs, *((3, 1) if setup.quick else (25, 4)))
        for name, (make, other) in others.items():
            rows.append({
                "ours": what, "parameters": n_parameters(config), "ms": middle(times["ours"], 1e3), "PyTorch": name,
                "its parameters": n_parameters(other, bias=make is not gpt), "its ms": middle(times[name], 1e3),
                "x ours": quotient(times[name], times["ours"]),
            })  # fmt: skip
    return rows


@dataclass
class Racer:
    """A training run that takes part in the race."""

    model: Ours | Theirs
    lr: float
    iters: int
    seconds: float = 0.0
    curve: list = field(default_factory=list)  # [step, seconds, validation loss]

    def advance(self, steps: int) -> None:
        """So many steps, on the clock; then a validation where one is due, off the clock."""
        s, model, start = self.model.setup.settings, self.model, time.perf_counter()
        for k in range(model.k, min(model.k + steps, self.iters)):
            model.step(grassmann.learning_rate(k, self.iters, self.lr, self.lr / 10, s["warmup_iters"]))
        self.seconds += time.perf_counter() - start
        if model.k % s["eval_every"] == 0 or model.k == self.iters:
            self.curve.append([model.k, self.seconds, model.validate()])


def race(setup: Setup, iters: int = 2000) -> list[dict]:
    """Validation loss (nats per character) and seconds of training, against nanoGPT's laptop recipe

    2,000 steps of the GPT as published (learning rate 1e-3, falling to a tenth) and at its best learning rate
    (4e-3), and of our defaults, by turns of 50 steps; the same batches. Then two runs of ours whose number of
    steps, and with it the schedule, is chosen beforehand from the seconds per step: for a fifth of the GPT's
    time, and for all of it. Validation is the whole split, every target once, and not on the clock.
    """
    if setup.quick:
        return [{"run": "skipped by --quick: it takes minutes"}]

    def ours(steps: int) -> Racer:
        return Racer(Ours(setup, setup.config()), setup.settings["lr"], steps)

    def finish(*runs: Racer) -> None:
        for _ in tqdm(range(0, max(run.iters for run in runs), 50), leave=False, disable=None):
            for run in runs:
                if run.model.k < run.iters:
                    run.advance(50)

    runs = {"ours, as many steps": ours(iters)}
    if torch:
        for name, lr in (("GPT, as published", 1e-3), ("GPT, at its best learning rate", 4e-3)):
            runs[name] = Racer(Theirs(setup, gpt(setup.gpt_config())), lr, iters)
    finish(*runs.values())
    if torch:
        goal = runs["GPT, as published"]
        for name, share in (("ours, in a fifth of the GPT's time", 0.2), ("ours, in the GPT's time", 1.0)):
            runs[name] = ours(max(1, round(iters * share * goal.seconds / runs["ours, as many steps"].seconds)))
            finish(runs[name])
    return [{
        "run": name, "learning rate": run.lr, "steps": run.iters, "seconds": run.seconds,
        "of the GPT's": run.seconds / goal.seconds if torch else NEEDS_TORCH, "loss": run.curve[-1][2],
        "minus the GPT's": run.curve[-1][2] - goal.curve[-1][2] if torch else NEEDS_TORCH, "curve": run.curve,
    } for name, run in runs.items()]  # fmt: skip


def product_loop(shards: list[list[tuple[int, int, int]]], threads: int, side: str) -> Callable[[], None]:
    """A function that computes products of these shapes, each with the two products of its gradients.

    NumPy: the shards are dealt out to so many threads, as in the training step. PyTorch: each product on all threads.
    """
    rng = np.random.default_rng(0)

    def operands(shapes: list[tuple[int, int, int]]) -> list[list[Array]]:
        pairs = [((m, k), (k, n), (m, n)) for m, k, n in shapes]
        return [[rng.standard_normal(shape, np.float32) for shape in three] for three in pairs]

    def multiply(work: list) -> None:
        for x, W, dy in work:
            _ = x @ W, dy @ W.T, x.T @ dy

    work = [operands(shapes) for shapes in shards]
    if side == "PyTorch":
        work = [[[torch.from_numpy(a) for a in three] for three in shard] for shard in work]
    return lambda: list(grassmann.in_threads(multiply, work, threads if side == "NumPy" else 1))


def efficiency(setup: Setup) -> list[dict]:
    """Rate of float32 matrix products (GFLOP/s, a multiply-add is 2), and the part of it that a step achieves

    The rate is measured at the shapes of the step and at large squares. "of the rate" is the time that the
    step's multiply-adds take at the first of these rates, over the time that the step takes.
    """
    batch_size, large = setup.settings["batch_size"], 1024 if setup.quick else 2048
    contestants, gigaflops, work = {}, {}, {}
    for side, config in (("NumPy", setup.config()), ("PyTorch", setup.gpt_config())):
        shards = np.array_split(range(batch_size), min(setup.threads, batch_size) if side == "NumPy" else 1)
        own = [products(config, len(windows) * config.context) for windows in shards]  # as in loss_and_grads
        work[side], there = multiply_adds(config, batch_size), side == "NumPy" or torch
        for what, shapes in (("own", own), ("large", [[(large, large, large)]] * len(own))):
            contestants[side, what] = product_loop(shapes, setup.threads, side) if there else None
            gigaflops[side, what] = 6e-9 * sum(math.prod(shape) for shard in shapes for shape in shard)
        model = Ours(setup, config) if side == "NumPy" else Theirs(setup, gpt(config)) if torch else None
        contestants[side, "step"] = model and model.step
    times = alternate(contestants, *((2, 1) if setup.quick else (15, 2)))
    rows = []
    for side, what in (("NumPy", "ours"), ("PyTorch", "GPT, equal width")):
        ideal = [2e-9 * work[side] / gigaflops[side, "own"] * seconds for seconds in times[side, "own"]]
        rows.append({
            "what": what, "multiply-adds per step": work[side], "ms per step": middle(times[side, "step"], 1e3),
            "rate, own shapes": middle(gigaflops[side, "own"] / seconds for seconds in times[side, "own"]),
            "rate, large": middle(gigaflops[side, "large"] / seconds for seconds in times[side, "large"]),
            "of the rate": quotient(ideal, times[side, "step"]),
        })  # fmt: skip
    return rows


@contextmanager
def exclusive_times():
    """Let every op of grassmann.py keep time; gives a dict from name to [calls, seconds].

    The seconds are exclusive: while an op has called another, only the other's clock runs.
    """
    rest = ("get_batch", "loss_and_grads", "clip_grads", "adamw_step")
    ops = {k: f for k, f in vars(grassmann).items() if k.endswith(("_forward", "_backward")) or k in rest}
    spent, inner = {name: [0, 0.0] for name in ops}, [0.0]  # inner: seconds within called ops, innermost last

    def timed(name: str, op: Callable) -> Callable:
        def call(*args, **kwargs):
            inner.append(0.0)
            start = time.perf_counter()
            result = op(*args, **kwargs)
            seconds = time.perf_counter() - start
            spent[name][0] += 1
            spent[name][1] += seconds - inner.pop()
            inner[-1] += seconds
            return result

        return call

    try:
        vars(grassmann).update({name: timed(name, op) for name, op in ops.items()})
        yield spent
    finally:
        vars(grassmann).update(ops)


def ops(setup: Setup) -> list[dict]:
    """Where the time of our step goes, on one thread: milliseconds in each op without the ops that it calls"""
    model, steps = Ours(setup, setup.config(), threads=1), []
    for _ in range(4 if setup.quick else 31):
        with exclusive_times() as spent:
            model.step()
        steps.append(spent)
    ms = {name: middle((spent[name][1] for spent in steps[1:]), 1e3) for name in spent}  # the first one warms up
    rows = [{"op": name, "calls": spent[name][0], "ms": ms[name], "share": ms[name] / sum(ms.values())} for name in ms]
    return sorted((row for row in rows if row["calls"]), key=lambda row: -row["ms"])


def our_writer(setup: Setup, text: Array) -> Callable[[], None]:
    """Reads the text; each call draws one character and reads it."""
    config = setup.config()
    params, rng = grassmann.init_params(config), np.random.default_rng(0)
    state = grassmann.stream_init(params, config)
    for token in text:
        logits, state = grassmann.stream_step(params, config, state, token)

    def write() -> None:
        nonlocal logits, state
        logits, state = grassmann.stream_step(params, config, state, grassmann.sample(logits, 0.8, None, rng))

    return write


def gpt_writer(setup: Setup, text: Array, cache: bool) -> Callable[[], None]:
    """The same by the GPT: each call reads the whole context again; or, with a KV cache, only the last character.

    The cache ends where the positions end, at the context; then it starts over with the last half of it.
    """
    config = setup.gpt_config()
    model, context = gpt(config), config.context
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
    """Characters written per second, one at a time, on one thread, sampling included

    Ours has streamed as many characters as the position says. The GPT re-reads its context for each character, or
    keeps keys and values until the context is full; what came before the context does not matter to it.
    """
    rows, context = [], setup.settings["context"]
    if torch:
        torch.set_num_threads(1)
    for position in positions[:1] if setup.quick else positions:
        text = np.resize(setup.train_tokens, position)
        contestants = {"ours": our_writer(setup, text)}
        for name, cache in (("GPT re-reading", False), ("GPT with cache", True)):
            contestants[name] = gpt_writer(setup, text, cache) if torch else None
        calls = 2 * (context - context // 2 + 1)  # from a full cache to a full cache, twice
        times = alternate(contestants, 2 if setup.quick else 20, calls)
        row = {"position": position} | {name: middle(1 / t for t in seconds) for name, seconds in times.items()}
        rows.append(row | {f"ours / {name}": quotient(times[name], times["ours"]) for name in list(times)[1:]})
    return rows


def length(setup: Setup, tokens: int = 32_768, longest_table: int = 2048) -> list[dict]:
    """Microseconds per token of a training step against the length of the windows, on at most 2 threads

    Every step has the same number of tokens, from 512 windows of 64 to 2 of 16,384. Beside our model the same
    with attention (mixer="attention"), as far as its length x length tables go.
    """

    def contestant(mixer: str, length: int) -> Callable | None:
        config, windows = setup.config(mixer=mixer, context=length), tokens // length
        try:
            check_memory(config, windows, threads)
        except ValueError:
            return None
        if length >= len(setup.train_tokens) or (mixer == "attention" and length > longest_table):
            return None
        return Ours(setup, config, windows, threads).step

    threads, tokens = min(2, setup.threads), tokens // 8 if setup.quick else tokens
    lengths = [64 * 2**k for k in range(20) if 128 * 2**k <= tokens]
    mixers = ("grassmann", "attention")
    contestants = {(L, mixer): contestant(mixer, L) for L in lengths for mixer in mixers}
    times, none = alternate(contestants, 1 if setup.quick else 3, 1), "does not fit"
    return [{
        "length": L, "windows": tokens // L, **{mixer: middle(times[L, mixer], 1e6 / tokens, none) for mixer in mixers},
        "x ours": quotient(times[L, "attention"], times[L, "grassmann"], none),
    } for L in lengths]  # fmt: skip


def offsets(setup: Setup) -> list[dict]:
    """Milliseconds per training step against the number of offsets (taps) in every layer: 1, 2, … characters back"""
    numbers = [m for m in (1, 2, 4, 8, 16) if m < setup.settings["context"]]
    configs = {m: setup.config(offsets=[range(1, m + 1)] * setup.settings["n_layer"]) for m in numbers}
    steps = {m: Ours(setup, config).step for m, config in configs.items()}
    times = alternate(steps, *((3, 1) if setup.quick else (25, 4)))
    return [{
        "offsets": m, "parameters": n_parameters(configs[m]), "ms": middle(times[m], 1e3),
        "x one offset": quotient(times[m], times[1]),
    } for m in numbers]  # fmt: skip


def peak_memory() -> float:
    """The most memory that this process has held so far, in MB."""
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if peak:  # Linux, where ru_maxrss of a new process starts from its parent's
        return int(peak[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def training_memory(setup: Setup, side: str) -> float:
    """What 30 training steps and a validation add to the peak memory of this process."""
    if side != "ours":
        torch.optim.AdamW([torch.zeros(1)])  # the first optimiser imports another 60 MB of PyTorch
    before = peak_memory()
    model = Ours(setup, setup.config()) if side == "ours" else Theirs(setup, gpt(setup.gpt_config()))
    for _ in range(30):
        model.step()
    model.validate()
    return peak_memory() - before


def memory(setup: Setup, repeats: int = 3) -> list[dict]:
    """Peak memory (MB) of training above what the imports take: 30 steps and a validation in a new process"""
    if sys.platform == "win32":
        return [{"what": "not measured on Windows"}]
    rows = []
    for side in ("ours", "GPT, equal width"):
        peaks = []
        for _ in range(repeats if side == "ours" or torch else 0):
            try:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    peaks.append(process.submit(training_memory, setup, side).result())
            except BrokenProcessPool:
                raise ValueError("memory: the process that trains was killed, perhaps for lack of it") from None
        rows.append({"what": side, "MB": middle(peaks)})
    return rows


# ---- the table ----------------------------------------------------------------------------------------

SECTIONS = {section.__name__: section for section in (step, race, efficiency, ops, generation, length, offsets, memory)}


def header(setup: Setup, data: str | None) -> dict:
    """What the numbers depend on."""
    versions = {"Python": platform.python_version(), "NumPy": np.__version__, "PyTorch": "not installed"}
    if torch:
        versions["PyTorch"] = f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    try:
        from threadpoolctl import threadpool_info

        for blas in (library for library in threadpool_info() if library["user_api"] == "blas"):
            versions["BLAS"] = f"{blas['internal_api']} {blas['version']}, {blas.get('architecture')}"
    except ImportError:
        versions["BLAS"] = "threadpoolctl, which would name it, is not installed"
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    machine = {"processor": name[1] if name else platform.processor(), "cores": cpu.available_cores()}
    text = f"{data or 'pydoc_data.topics'}, {len(setup.train_tokens) + len(setup.val_tokens):,} characters"
    blas = [f"{name}={value}" for name, value in os.environ.items() if re.match("(OPENBLAS|MKL|BLIS|OMP)_", name)]
    machine["settings"] = " ".join(sorted(blas))  # cpu.py's, and what the environment brought along
    if hasattr(os, "getloadavg"):
        machine["load"] = f"{os.getloadavg()[0]:.1f} programs were running before; above 0.5 they disturb the numbers"
    return versions | machine | {"threads": setup.threads, "text": text, "quick": setup.quick}


def cell(value) -> str:
    """Whole numbers in full, others with four digits."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.{max(0, 4 - len(str(int(abs(value)))))}f}"


def print_table(rows: list[dict]) -> None:
    columns = [name for name, value in rows[0].items() if not isinstance(value, list)]  # curves are for the JSON file
    lines = [columns] + [[cell(row[name]) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        print(first.ljust(widths[0]), *(text.rjust(w) for text, w in zip(others, widths[1:], strict=True)), sep="  ")


def main() -> None:
    plain_output()
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", help="a UTF-8 text file, or 'shakespeare' (default: the text of train_char.py)")
    add("--threads", type=number(int, 1, 1024), default=cpu.available_cores(), help="CPU threads (default: all cores)")
    add("--quick", action="store_true", help="fewer repeats, and no race")
    add("--gpu", action="store_true", help="measure training steps on a CUDA GPU instead (bench_gpu.py)")
    add("--only", nargs="+", metavar="SECTION",
        help=f"{', '.join(SECTIONS)}; with --gpu laptop-float32 and others, see bench_gpu.py")  # fmt: skip
    add("--json", type=Path, default=Path("bench.json"), help="where the numbers go (default: bench.json)")
    args = parser.parse_args()
    sections = bench_gpu.SECTIONS if args.gpu else SECTIONS
    with short_errors(parser, args.json, "not enough memory for this model"):  # --json keeps the sections so far
        for name in args.only or ():
            if name not in sections:
                raise ValueError(f"argument --only: {name} is none of {', '.join(sections)}")
        card = bench_gpu.card() if args.gpu else {}
        setup = make_setup(args.data, args.threads, args.quick)
        results = {"header": header(setup, args.data) | card, "sections": {}}
        args.json.open("a").close()  # before the work: is it writable?
        for name, value in results["header"].items():
            print(f"{name:10s} {value}")
        for name in args.only or sections:
            print(f"\n{name}: {sections[name].__doc__.splitlines()[0]}", end="\n" * (2 - args.gpu), flush=True)
            results["sections"][name] = sections[name](setup)
            args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
            if not args.gpu:
                print_table(results["sections"][name])
        if args.gpu:
            print()
            print_table([row for rows in results["sections"].values() for row in rows])


if __name__ == "__main__":
    main()
