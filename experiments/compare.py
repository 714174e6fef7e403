"""Does geometry replace attention? Both, and variants of both, trained alike on one text.

  python -m experiments.compare --quick              questions 1, 3 and 5 in ten to twenty minutes
  python -m experiments.compare --data shakespeare   all of them, on Tiny Shakespeare: some hours

The same for every model of a question: the number of parameters (within 2%, but where a question says so),
the batches, the optimiser, the schedule, the validation. Every model gets the learning rate that is
best for it in short runs, without which no comparison is fair (with --quick, its mixer's plain
model gets it for all). Runs use one thread each; steps are timed when all is done and quiet.

Writes into --out: compare.md (the tables), a figure per question, timing.json (measured again on
another machine, or once deleted), and runs.jsonl, a line per finished run. After an interruption
the same command goes on; other settings or another text are other runs. (It can't know that
grassmann.py itself has changed: choose another --out.)
"""

import cli  # noqa: I001  (before NumPy)

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableSequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean, median

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import grassmann
from experiments import mixers, tasks
from experiments.variants import PRODUCTS, variant
from grassmann import Array, Config, Params, param_shapes
from text import Corpus, read_corpus
from training import Training, train_step

# Settings are fields of Config and Training with train_char.py's defaults, and what else is here.
# As in nanoGPT's laptop recipe, a run is short and has no dropout: it does not overfit.
BASE = {"iters": 2000, "dropout": 0.0, "product": "wedge", "landmarks": (), "W_red_scale": None}
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # tried first, see best_lr
QUICK_STEPS, QUICK_QUESTIONS = 1500, (1, 3, 5)
mixers.install()  # in every process: Config then takes their names

# ---- the questions -------------------------------------------------------------------------------

@dataclass(frozen=True)
class Question:
    """Models to compare, (label, settings that differ from BASE); gaps are those to the first."""

    number: int
    title: str
    asks: str
    models: list[tuple[str, dict]]
    settings: dict = field(default_factory=dict)  # of all of them; they set the size, too
    same_size: bool = True  # make all models as large as BASE and `settings` say
    seeds: int = 1  # runs of every model
    large: bool = False  # one seed, fewer learning rates, and not in the quick set
    tasks: bool = False  # of tasks.py in place of the text: accuracy, not loss; one seed
    rates: tuple[float, ...] = ()  # in place of LEARNING_RATES


ATTENTION = ("attention", {"mixer": "attention", "positions": True})
GRASSMANN = ("Grassmann", {})
ONE = ("one per layer", {"taps": False})
UNIT = ("one per layer, normalised", {"taps": False, "normalize": True})
PAPER = {"block": "paper", "taps": False, "normalize": True, "positions": True}
SIX = {"offsets": ((1, 2, 4, 8, 12, 16),) * Config.n_layer}  # the paper's, all in every layer
NEAR = ((1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 4, 6, 8, 10, 12, 16))
FAR = ((1, 2, 3, 4), (1, 2, 3, 4, 8, 16), (1, 2, 3, 4, 5, 6, 16, 32), (1, 2, 4, 8, 12, 16, 32, 64))
MEMORY, HYBRID = ("with memory", {"memory": True}), ("hybrid", {"mixer": "hybrid"})
SMALL = {"vocab_size": tasks.VOCAB_SIZE, "context": 256, "batch_size": 8, "d_model": 64, "rank": 16}
UP_TO_212 = ((1, 2, 3, 4), (4, 8, 12, 16), (16, 32, 48, 64), (64, 128))  # they reach every distance
QUESTIONS = [
    Question(1, "Grassmann or attention",
             "Which predicts text better, at equal size and at equal time?",
             [ATTENTION, GRASSMANN], {"d_model": 144}, seeds=3),  # 0.8M parameters
    Question(2, "The paper's block",
             "What does LayerNorm after each half, as in the paper, cost against pre-norm?",
             [ATTENTION, ("attention, paper's block", ATTENTION[1] | {"block": "paper"}),
              GRASSMANN, ("Grassmann, paper's block", {"block": "paper"}),
              ("the paper's model", PAPER)]),
    Question(3, "One offset per layer, or all in every layer",
             "Does an average over offsets blur who is meant?",
             [ATTENTION, UNIT, ONE,
              ("average of six, normalised", UNIT[1] | SIX), ("average of six", ONE[1] | SIX),
              ("taps for the six", SIX)]),
    Question(4, "Normalised or not", "Does the length of a bivector carry information?",
             [ATTENTION, ("taps", {}), ("taps, normalised", {"normalize": True}), ONE, UNIT]),
    Question(5, "Positions", "Does a model with offsets need to be told where it is?",
             [ATTENTION, GRASSMANN, ("Grassmann, positions", {"positions": True})]),
    Question(5, "Rank", "How many dimensions do the planes need?",
             [ATTENTION, *((f"rank {r}", {"rank": r}) for r in (4, 8, 16, 32, 64))]),
    Question(5, "Is it the geometry?",
             "What is left with another product, or none, in place of the wedge?",
             [ATTENTION, ("wedge", {}), ("symmetric product", {"product": "symmetric"}),
              ("elementwise product", {"product": "elementwise"}),
              ("no product", {"product": "concatenation"})]),
    Question(7, "Planes between words and lines", "Is the end of the previous word or line worth a "
             "partner? Context 256, which holds several lines.",
             [ATTENTION, GRASSMANN, ("+ previous word", {"landmarks": ("word",)}),
              ("+ last two words", {"landmarks": ("word", "second word")}),
              ("+ previous word and line", {"landmarks": ("word", "line")}),
              ("+ two offsets, near", {"offsets": NEAR}), ("+ two offsets, far", {"offsets": FAR})],
             {"context": 256, "batch_size": 3}),  # as many tokens as the others
    Question(8, "What each default is worth",
             "One thing changed at a time, its parameters not made up for by others.",
             [("default", {}), ("d_ff = 4 d_model", {"d_ff": 4 * Config.d_model}),
              ("no taps, one offset", {"taps": False}), ("normalised", {"normalize": True}),
              ("positions", {"positions": True}), ("paper's block", {"block": "paper"}),
              ("offsets 1 to 4 in every layer", {"offsets": ((1, 2, 3, 4),) * Config.n_layer}),
              ("rank 16", {"rank": 16}), ("rank 48", {"rank": 48}),
              ("W_red from N(0, 0.02²)", {"W_red_scale": 0.02}), ("dropout 0.1", {"dropout": 0.1})],
             same_size=False),
    Question(9, "Grassmann or attention, larger", "Is it the same with more layers, width, context "
             "and training? 6,000 steps of 1,536 characters, dropout 0.2 against overfitting, one "
             "seed.", [ATTENTION, GRASSMANN], {"n_layer": 6, "d_model": 256, "context": 128,
                                               "dropout": 0.2, "iters": 6000}, large=True),
    Question(6, "Where attention wins", "How far back can an answer lie? Accuracy against "
             f"distance, {1 / tasks.ANSWERS:.1%} by chance.",
             [(f"{task}, {label}", changes | {"data": task}) for task in ("recall", "brackets")
              for label, changes in (ATTENTION, GRASSMANN,
                                     ("Grassmann, far offsets", {"offsets": UP_TO_212}))],
             SMALL, tasks=True),
    Question(10, "Memory", "Recall, with a bivector in every layer that all tokens write, and with "
             "attention in one layer of the four (hybrid); at the rate that question 6 found.",
             [(f"recall, {label}", changes | {"data": "recall"})
              for label, changes in (ATTENTION, GRASSMANN, MEMORY, HYBRID)],
             SMALL, large=True, tasks=True, rates=(1e-3,)),
    Question(10, "How much a memory holds", "2, 4, 8 or 16 keys, each under a name: which one is it "
             "that is asked for? To answer with the most frequent of them is right in 56, 41, 33 and "
             "26% of the cases. Context 128, 4,000 steps, one learning rate; the sizes differ.",
             [(f"keys, {label}", changes | {"data": "keys"}) for label, changes in (
                 ATTENTION, ("with memory, rank 16", MEMORY[1]),
                 ("with memory, rank 32", MEMORY[1] | {"rank": 32}))],
             SMALL | {"vocab_size": tasks.KEYS_VOCAB_SIZE, "context": 128, "iters": 4000},
             same_size=False, large=True, tasks=True, rates=(2e-3,)),
]

# ---- one run -------------------------------------------------------------------------------------

class Run:
    """A run from its settings. `spec` is all that its result depends on, and gives it again."""

    def __init__(self, settings: dict):
        self.config, training = (
            kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings})
            for kind in (Config, Training))
        warmup = min(training.warmup_iters, training.iters // 10)  # the short runs too have a peak
        self.training = replace(training, warmup_iters=warmup)
        everything = settings | asdict(self.config) | asdict(self.training)
        if not self.config.memory:  # as in runs from before there was one
            del everything["memory"]
        self.spec = dict(sorted(everything.items()))

def count_params(run: Run) -> int:
    """Parameters that act: with taps for landmarks, but no rows of W_plu that only meet zeros."""
    config, r = run.config, run.config.rank
    total = sum(math.prod(shape) for shape in param_shapes(config).values())
    if config.mixer == "attention":
        return total
    *_, coordinates = PRODUCTS[run.spec["product"]]
    idle = (r * (r - 1) // 2 - coordinates(r)) * config.d_model
    return total + config.n_layer * (len(run.spec["landmarks"]) * r - idle)

def matched(run: Run, target: int) -> Run:
    """The run with a model as wide as `target` parameters allow: d_model the multiple of n_head
    that comes closest while d_ff keeps its ratio to it; d_ff, N (2 d_model + 1) a unit, the rest.
    """
    ratio, n_head = run.config.d_ff // run.config.d_model, run.config.n_head
    widths = range(n_head, math.isqrt(target) + n_head, n_head)
    sizes = [Run(run.spec | {"d_model": d, "d_ff": ratio * d}) for d in widths]
    best = min(sizes, key=lambda size: abs(count_params(size) - target))
    unit = best.config.n_layer * (2 * best.config.d_model + 1)
    more = round((target - count_params(best)) / unit)
    return Run(best.spec | {"d_ff": max(1, best.config.d_ff + more)})

def batch(run: Run, corpus: Corpus, step: int) -> tuple[Array, Array]:
    """x, y (B, L) of a step: the same for all models with this data and seed."""
    size, seed = (run.training.batch_size, run.config.context), run.training.seed
    if task := tasks.TASKS.get(run.spec["data"]):
        return task(np.random.default_rng((seed, step)), *size)[:2]
    return grassmann.get_batch(corpus.train, *size, seed, step)

def steps(run: Run, corpus: Corpus, threads: int = 1) -> Iterator[tuple[Params, float]]:
    """Train for ever: parameters and loss after every step."""
    params, scale = grassmann.init_params(run.config, run.training.seed), run.spec["W_red_scale"]
    for name in params:
        if name.endswith(".W_red") and scale:
            params[name] *= scale * math.sqrt(run.config.d_model)  # instead of 1/sqrt(d_model)
    state = run.config, run.training, grassmann.adamw_init(params)
    for step in itertools.count():
        x, y = batch(run, corpus, step)
        yield params, train_step(grassmann, params, *state, step, x, y, threads)

def evaluate(run: Run, corpus: Corpus, params: Params) -> float | list[float]:
    """The validation loss; on a task the list of `accuracy`."""
    if task := tasks.TASKS.get(name := run.spec["data"]):
        rng = np.random.default_rng((run.training.seed, run.training.iters))  # a step never trained
        sample = task(rng, 512, run.config.context)
        return tasks.accuracy(params, run.config, *sample, tasks.GROUPS[name])
    return grassmann.validation_loss(params, run.config, corpus.val)

def cost(run: Run) -> int:
    """How long a step takes, in a unit of its own."""
    return run.training.batch_size * run.config.context * count_params(run)

def train(label: str, run: Run, corpus: Corpus, tick: Callable[[int], object]) -> dict:
    """Train on one thread, with a tick(cost) after every step: a line of runs.jsonl. Its curve is a
    [step, what `evaluate` says] every spec["eval_every"] steps and at the end, which a loss that is
    not finite brings early.
    """
    iters, step_cost, curve = run.training.iters, cost(run), []
    with variant(run.spec["product"], run.spec["landmarks"], corpus.vocab):
        for step, (params, loss) in enumerate(steps(run, corpus), 1):
            last = step == iters or not math.isfinite(loss)
            if last or step % run.spec["eval_every"] == 0:
                curve.append([step, evaluate(run, corpus, params)])
            tick(step_cost)
            if last:
                break
    return {"label": label, "spec": run.spec, "parameters": count_params(run), "curve": curve}

# ---- all runs ------------------------------------------------------------------------------------

def digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

class Runs:
    """The finished runs, lines of a file, and those that were asked for and are missing, both by
    the digest of the spec. Raises ValueError and OSError.
    """

    def __init__(self, path: Path, corpus: Corpus):
        self.path, self.corpus, self.finished, self.missing = path, corpus, {}, {}
        path.touch()
        whole, newline, torn = path.read_bytes().rpartition(b"\n")
        if torn:  # the program was killed as it wrote
            os.truncate(path, len(whole + newline))
        for k, line in enumerate(whole.splitlines(), 1):
            try:
                result = json.loads(line)
                self.finished[digest(result["spec"])] = result
            except (ValueError, LookupError, TypeError):
                raise ValueError(f"{path}: line {k} is damaged, delete it") from None

    def ask(self, label: str, run: Run) -> dict | None:
        """A finished run; or None, and it is missing."""
        key = digest(run.spec)
        if key not in self.finished:
            self.missing.setdefault(key, (label, run))
        return self.finished.get(key)

    def train_missing(self, jobs: int) -> None:
        """Train what is missing, `jobs` runs at a time, the longest first, and write it down."""
        costs = {key: cost(run) * run.training.iters for key, (_, run) in self.missing.items()}
        todo = [self.missing.pop(key) for key in sorted(costs, key=costs.get, reverse=True)]
        n, jobs = len(todo), min(jobs, len(todo))
        print(f"{cli.plural(n, 'run')} to train, {jobs} at a time", flush=True)
        form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
        with tqdm(total=sum(costs.values()), smoothing=0, bar_format=form, disable=None) as bar:
            results = (train_in_processes(todo, self.corpus, jobs, bar) if jobs > 1 else
                       (train(label, run, self.corpus, bar.update) for label, run in todo))
            with closing(results), self.path.open("a", encoding="utf-8") as file:
                for k, result in enumerate(results, 1):
                    file.write(json.dumps(result) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                    self.finished[digest(result["spec"])] = result
                    bar.set_description_str(f"{k} of {n} runs")

def train_in_processes(todo: list, corpus: Corpus, jobs: int, bar: tqdm) -> Iterator[dict]:
    """The results as they come. After an error or Ctrl-C no process stays behind."""
    context = multiprocessing.get_context("spawn")
    progress = context.RawArray("Q", len(todo))  # a number per run, which one process writes
    pool = ProcessPoolExecutor(jobs, context, start_worker, (progress,))
    try:
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers leave Ctrl-C to this process
        waiting = {pool.submit(train_in_worker, k, *each, corpus) for k, each in enumerate(todo)}
        signal.signal(signal.SIGINT, usual)
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(sum(progress) - bar.n)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise ValueError("a run was killed; fewer --jobs need less memory") from None
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(cancel_futures=True)

def start_worker(counters: MutableSequence[int]) -> None:
    """A process that trains runs ends with its parent, however that ended."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    global progress
    progress = counters
    threading.Thread(target=end_with_parent, daemon=True).start()
    cli.plain_output()

def train_in_worker(k: int, label: str, run: Run, corpus: Corpus) -> dict:
    def tick(amount: int) -> None:
        progress[k] += amount

    return train(label, run, corpus, tick)

# ---- the answers ---------------------------------------------------------------------------------

@dataclass
class Row:
    label: str  # of a model in a table
    results: list[dict]  # its lines of runs.jsonl, one per seed
    ms: float = math.nan  # of a step

Answers = list[tuple[Question, list[Row]]]

def final(result: dict) -> float:
    """The smaller the better: the validation loss at the end, inf if it diverged; or -accuracy."""
    step, value = result["curve"][-1]
    if isinstance(value, list):
        return -np.nanmean(value)
    return value if step == result["spec"]["iters"] and math.isfinite(value) else math.inf

def best_lr(ask: Callable, rates: tuple[float, ...], beyond: bool) -> float | None:
    """The best of these learning rates. While that is the smallest or the largest so far, one more
    is tried `beyond` it. ask(lr) gives a run, or None if it is missing: then the best is None, too.
    """
    runs = {lr: ask(lr) for lr in rates}
    while all(runs.values()):
        best = min(runs, key=lambda lr: final(runs[lr]))
        if not beyond or best not in (min(runs), max(runs)) or not 1e-4 < best < 0.1:
            return best
        other = best / 2 if best == min(runs) else best * 2
        runs[other] = ask(other)
    return None

def answer(question: Question, runs: Runs, quick: bool, seeds: int | None) -> list[Row]:
    """Ask for what a question needs: the search of learning rates, then, for the best, the runs.

    Rates are tried at a tenth of the steps; with --quick, that says little: at a quarter, and only
    for the plain model of each mixer, whose rate its variants take. A task is often learned all at
    once, after a long time of nothing: all runs go to the end.
    """
    text = {"data": runs.corpus.sha256, "vocab_size": len(runs.corpus.vocab)}
    settings = BASE | text | question.settings
    iters = min(settings["iters"], QUICK_STEPS) if quick else settings["iters"]
    every, short = (max(1, iters // part) for part in (10, 4 if quick else 10))
    if question.tasks:
        every = short = iters
    rates = question.rates or (LEARNING_RATES[:2] if question.large else LEARNING_RATES)
    n = 1 if question.large or question.tasks else seeds or (1 if quick else question.seeds)

    def ask(label: str, changes: dict, **more) -> dict | None:
        run, plain = Run(settings | more | changes), Run(settings | more)
        return runs.ask(label, matched(run, count_params(plain)) if question.same_size else run)

    rows = []
    for label, changes in question.models:
        plain = ATTENTION if "mixer" in changes else GRASSMANN
        name, tried = plain if quick and not question.tasks else (label, changes)

        def search(lr: float, name: str = name, tried: dict = tried) -> dict | None:
            return ask(f"{name}, lr {lr:g}", tried, lr=lr, iters=short, eval_every=short)

        if lr := best_lr(search, rates, beyond=not question.tasks):
            how = {"lr": lr, "iters": iters, "eval_every": every}
            results = [ask(f"{label}, seed {k}", changes, seed=k, **how) for k in range(n)]
            rows.append(Row(label, results))
    return rows

WARM, TIMED = 3, 30  # steps of each model, when their time is measured

def add_times(rows: list[Row], corpus: Corpus, path: Path) -> None:
    """The milliseconds of a step, kept in a file as long as the machine is the same."""
    specs, known = [row.results[0]["spec"] for row in rows], {}
    with suppress(FileNotFoundError, ValueError):  # a damaged file is measured again
        known = json.loads(path.read_text(encoding="utf-8"))
    if known.get("machine") != machine():
        known = {"machine": machine(), "ms": {}}
    if digest(specs) not in known["ms"]:
        known["ms"][digest(specs)] = measure([Run(spec) for spec in specs], corpus)
        path.write_text(json.dumps(known), encoding="utf-8")
    for row, ms in zip(rows, known["ms"][digest(specs)], strict=True):
        row.ms = ms

def measure(runs: list[Run], corpus: Corpus) -> list[float]:
    """Milliseconds of a step on all cores: medians, the models by turns."""
    trained = [steps(run, corpus, cli.available_cores()) for run in runs]
    seconds = [[] for _ in runs]
    for _ in range(WARM + TIMED):
        for run, one_more, own in zip(runs, trained, seconds, strict=True):
            with variant(run.spec["product"], run.spec["landmarks"], corpus.vocab):
                started = time.perf_counter()
                next(one_more)
                own.append(time.perf_counter() - started)
    return [1e3 * median(own[WARM:]) for own in seconds]

def machine() -> str:
    """Versions, and the processor's name."""
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    for line in info.read_text().splitlines() if info.exists() else []:
        name = line.partition(":")[2].strip() if line.startswith("model name") else name
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    return f"{versions}, {blas['name']} {blas['version']}, {cli.available_cores()} cores, {name}"

# ---- tables and figures --------------------------------------------------------------------------

def markdown(rows: list[dict[str, str]]) -> str:
    """A table; the keys of its rows are the heading."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [rows[0], *map(dict.values, rows)]]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])

def loss_table(rows: list[Row]) -> list[dict[str, str]]:
    """One line per model, means over its runs; gaps are those to the first."""
    ends = [row.ms * r["spec"]["iters"] for row in rows for r in row.results if final(r) < math.inf]
    deadline, first = min(ends, default=math.nan), fmean(map(final, rows[0].results))
    first = first if first < math.inf else math.nan  # no gap to that
    table = []
    for row in rows:
        curves, losses = [np.transpose(r["curve"]) for r in row.results], [*map(final, row.results)]
        loss, spread = fmean(losses), f" ({min(losses):.3f} to {max(losses):.3f})"
        then = [np.interp(deadline / row.ms, *curve, left=math.nan) for curve in curves]
        gap = f"{100 * np.expm1(loss - first):+.1f}%"
        table.append({
            "model": row.label,
            "learning rate": f"{row.results[0]['spec']['lr']:g}",
            "validation loss, nats": f"{loss:.3f}{spread if len(losses) > 1 else ''}",
            "bits per character": f"{loss / math.log(2):.3f}",
            "perplexity per character": f"{np.exp(loss):.3f}",
            "parameters": f"{row.results[0]['parameters']:,}",
            "ms per step": f"{row.ms:.1f}",
            "loss at equal time": f"{fmean(then):.3f}",
            f"gap to {rows[0].label}": "" if row is rows[0] else gap,
        })
    return table

def report(args, corpus: Corpus, answers: Answers) -> str:
    """compare.md"""
    names = {None: "Python's documentation", "shakespeare": "Tiny Shakespeare"}
    data = names.get(args.data) or Path(args.data).name
    iters = min(BASE["iters"], QUICK_STEPS) if args.quick else BASE["iters"]
    search = ("a quarter of the steps, for the plain model of each mixer" if args.quick
              else "a tenth of the steps")
    explanation = f"""\
{len(corpus.train):,} characters of {data} to train on, {len(corpus.val):,} to validate, \
{len(corpus.vocab)} different ones. Unless a question says otherwise: {iters:,} steps of \
{Training.batch_size * Config.context:,} characters, no dropout (so short a run does not overfit). \
A loss with two more in brackets is the mean of several seeds, with the lowest and the highest; \
inf: diverged. Learning rates: the best at {search}. Milliseconds: on all cores, by turns. Loss at \
equal time: what the validation loss was, interpolated, when the fastest run of the table had \
finished. Gap: how much higher the perplexity per character is. Parameters: those that act. \
Products in place of the wedge and partners at words and lines are not written for speed."""
    command = shlex.join(["python", "-m", "experiments.compare", *sys.argv[1:]])
    parts = ["# Does geometry replace attention?", f"`{command}`", f"{machine()}.", explanation]
    for question, rows in answers:
        table = markdown(tasks.table(rows) if question.tasks else loss_table(rows))
        parts += [f"## {question.number}. {question.title}", question.asks, table]
    return "\n\n".join(parts) + "\n"

def plot(path: Path, answers: Answers) -> None:
    """The validation loss against tokens and against seconds, a row per table, a line per run."""
    figure = Figure(figsize=(12, 3.6 * len(answers)), layout="constrained")
    grid = figure.subplots(len(answers), 2, squeeze=False)
    for (question, rows), (left, right) in zip(answers, grid, strict=True):
        for k, row in enumerate(rows):
            style = {"color": f"C{k}" if k < 10 else "black", "marker": ".", "lw": 1}
            for result in row.results:
                spec, (steps, losses) = result["spec"], np.transpose(result["curve"])
                label = row.label if result is row.results[0] else None
                millions = steps * spec["batch_size"] * spec["context"] / 1e6
                left.plot(millions, losses, label=label, **style)
                right.plot(steps * row.ms / 1e3, losses, label=label, **style)
        left.set(title=f"{question.number}. {question.title}", ylabel="validation loss, nats")
        for axes, unit in ((left, "million characters"), (right, "seconds of training")):
            axes.set(xlabel=unit)
            axes.grid(alpha=0.3)
        right.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    figure.savefig(path, dpi=110)

# ---- the program ---------------------------------------------------------------------------------

def compare(args) -> None:
    """Answer the questions. Raises ValueError and OSError."""
    numbers = args.only or (QUICK_QUESTIONS if args.quick else range(1, 11))
    asked = [q for q in QUESTIONS if q.number in numbers and not (args.quick and q.large)]
    if not asked:
        raise ValueError("question 9 is not for --quick")
    longest = max((BASE | q.settings).get("context", Config.context) for q in QUESTIONS)
    corpus = read_corpus(args.data, longest)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(args.out / "runs.jsonl", corpus)
    while True:  # learning rates, and what depends on those
        answers = [(q, answer(q, runs, args.quick, args.seeds)) for q in asked]
        if not runs.missing:
            break
        runs.train_missing(args.jobs)
    for question, rows in answers:
        if not question.tasks:
            add_times(rows, corpus, args.out / "timing.json")
    text = report(args, corpus, answers)
    (args.out / "compare.md").write_text(text, encoding="utf-8")
    for number, group in itertools.groupby(answers, key=lambda each: each[0].number):
        group = list(group)
        draw = tasks.plot if group[0][0].tasks else plot
        draw(args.out / f"compare_{number}.png", group)
    print(text)
    print(f"written to {args.out}: " + ", ".join(sorted(p.name for p in args.out.glob("compare*"))))


def main() -> None:
    cli.plain_output()
    parser, number = cli.Parser(__doc__), cli.number
    add = parser.add_argument
    add("--data", help="a UTF-8 text file, or 'shakespeare' (default: Python's own documentation)")
    add("--out", type=Path, default="compare", help="folder to write into (default: compare)")
    add("--quick", action="store_true", help=f"one seed, {QUICK_STEPS:,} steps, questions 1, 3, 5")
    add("--only", type=number(int, 1, 10), nargs="+", metavar="QUESTION", help="some of 1 to 10")
    add("--seeds", type=number(int, 1, 1000), help="per model (default: 3 in question 1, else 1)")
    add("--jobs", type=number(int, 1, 1024), default=cli.available_cores(),
        help="runs at a time, which changes no result (default: one per core)")
    args = parser.parse_args()
    stopped = f"\nstopped; what is finished is in {args.out}, the same command goes on from there\n"
    with cli.short_errors(parser, args.out, stopped=stopped):
        compare(args)


if __name__ == "__main__":
    main()
