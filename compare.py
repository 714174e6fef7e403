"""Does geometry replace attention? Both, and variants of both, trained on one text under the same conditions.

  python compare.py --quick                     questions 1, 3 and 5, one seed: ten to twenty minutes on two cores
  python compare.py                             all questions, full length: some hours, unattended
  python compare.py --only 3 4                  some of the questions
  python compare.py --data shakespeare          on Tiny Shakespeare

The same for every model of a question: the number of parameters (within 2%, but for question 8), the batches and
their order, the optimiser, the schedule, the number of tokens, and the validation (grassmann.validation_loss).
Every model gets the learning rate that is best for it in short runs, without which no comparison is fair (with
--quick, its mixer's plain model gets it for all). Runs use one thread each, several at a time; the time of a step
is measured when all are done and the machine is idle.

Writes into --out: compare.md (the tables of the questions asked), a figure per question, timing.json (measured
again on another machine, or once it is deleted), and one file per finished run in runs/. It resumes after an
interruption and runs what is missing; other settings or another text are other runs. (It can't know that
grassmann.py itself has changed: then choose another --out.)
"""

import cpu  # noqa: I001  (before NumPy)

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
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean, median

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import grassmann
from grassmann import Array, Config, param_shapes
from runs import MODEL_DEFAULTS, PACE_DEFAULTS, resolved
from cli import Parser, number, plain_output, short_errors
from text import encode, load_text, vocabulary
from variants import PRODUCTS, look_back_to, multiply_by, swapped

# What every model is trained with unless its question says otherwise: train_char.py's defaults, at the length of
# nanoGPT's laptop recipe and as there without dropout, since so short a run does not overfit. `product`,
# `landmarks` and `W_red_scale` (None: as in init_params) are what train_char.py does not offer.
BASE = MODEL_DEFAULTS | PACE_DEFAULTS | {"iters": 2000, "dropout": 0.0}
BASE |= {"product": "wedge", "landmarks": (), "W_red_scale": None}
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # tried first, see best_lr
QUICK_STEPS, QUICK_QUESTIONS = 1500, (1, 3, 5)

# ---- the questions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Models to compare with each other: (label, what differs from BASE); the gaps are those to the first."""

    number: int
    title: str
    asks: str
    rows: list[tuple[str, dict]]
    size: dict = field(default_factory=dict)  # what differs for all of them, and sets the number of parameters
    same_size: bool = True  # make all models as large as BASE and `size` say; if not, leave them as they are
    seeds: int = 1  # runs of every model
    large: bool = False  # one seed, fewer learning rates, and not in the quick set


ATTENTION = ("attention", {"mixer": "attention", "positions": True})
GRASSMANN = ("Grassmann", {})
SIX = ((1, 2, 4, 8, 12, 16),) * BASE["n_layer"]  # the paper's offsets, all of them in every layer
MORE_NEAR = ((1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 4, 6, 8, 10, 12, 16))
MORE_FAR = ((1, 2, 3, 4), (1, 2, 3, 4, 8, 16), (1, 2, 3, 4, 5, 6, 16, 32), (1, 2, 4, 8, 12, 16, 32, 64))
QUESTIONS = [
    Question(1, "Grassmann or attention", "Which predicts text better, at equal size and at equal time?",
             [ATTENTION, GRASSMANN], {"d_model": 144}, seeds=3),  # 0.8M parameters
    Question(2, "The paper's block", "What does LayerNorm after each half, as in the paper, cost against pre-norm?", [
        ATTENTION, ("attention, paper's block", ATTENTION[1] | {"block": "paper"}),
        GRASSMANN, ("Grassmann, paper's block", {"block": "paper"}),
        ("the paper's model", {"block": "paper", "taps": False, "normalize": True, "positions": True})]),
    Question(3, "One offset per layer, or all in every layer", "Does an average over offsets blur who is meant?", [
        ATTENTION,
        ("one per layer, normalised", {"taps": False, "normalize": True}), ("one per layer", {"taps": False}),
        ("average of six, normalised", {"taps": False, "normalize": True, "offsets": SIX}),
        ("average of six", {"taps": False, "offsets": SIX}), ("taps for the six", {"offsets": SIX})]),
    Question(4, "Normalised or not", "Does the length of a bivector carry information?", [
        ATTENTION, ("taps", {}), ("taps, normalised", {"normalize": True}),
        ("one per layer", {"taps": False}), ("one per layer, normalised", {"taps": False, "normalize": True})]),
    Question(5, "Positions", "Does a model with offsets need to be told where it is?",
             [ATTENTION, GRASSMANN, ("Grassmann, positions", {"positions": True})]),
    Question(5, "Rank", "How many dimensions do the planes need?",
             [ATTENTION, *((f"rank {r}", {"rank": r}) for r in (4, 8, 16, 32, 64))]),
    Question(5, "Is it the geometry?", "What is left with another product, or none, in place of the wedge?", [
        ATTENTION, ("wedge", {}), ("symmetric product", {"product": "symmetric"}),
        ("elementwise product", {"product": "elementwise"}), ("no product", {"product": "concatenation"})]),
    Question(7, "Planes between words and lines", "Is the end of the previous word or line worth a "
             "partner? Context 256, which holds several lines.", [
        ATTENTION, GRASSMANN, ("+ previous word", {"landmarks": ("word",)}),
        ("+ last two words", {"landmarks": ("word", "second word")}),
        ("+ previous word and line", {"landmarks": ("word", "line")}),
        ("+ two offsets, near", {"offsets": MORE_NEAR}), ("+ two offsets, far", {"offsets": MORE_FAR})],
        {"context": 256, "batch_size": 3}),  # as many tokens as the others
    Question(8, "What each default is worth", "One thing changed at a time, its "
             "parameters not made up for by others.", [
        ("default", {}), ("d_ff = 4 d_model", {"d_ff": 4 * BASE["d_model"]}), ("no taps, one offset", {"taps": False}),
        ("normalised", {"normalize": True}), ("positions", {"positions": True}), ("paper's block", {"block": "paper"}),
        ("offsets 1 to 4 in every layer", {"offsets": ((1, 2, 3, 4),) * BASE["n_layer"]}),
        ("rank 16", {"rank": 16}), ("rank 48", {"rank": 48}), ("W_red from N(0, 0.02²)", {"W_red_scale": 0.02}),
        ("dropout 0.1", {"dropout": 0.1})], same_size=False),
    Question(9, "Grassmann or attention, larger", "Is it the same with more layers, width, context and training? "
             "6,000 steps of 1,536 characters, dropout 0.2 against overfitting, one seed.", [ATTENTION, GRASSMANN],
             {"n_layer": 6, "d_model": 256, "context": 128, "dropout": 0.2, "iters": 6000}, large=True),
]  # fmt: skip

# Question 6 has tasks of its own, see `recall` and `brackets`.
FAR = ((1, 2, 3, 4), (4, 8, 12, 16), (16, 32, 48, 64), (64, 128))  # reaches every distance up to 212
RECALL_SIZE = {"context": 256, "n_layer": 4, "d_model": 64, "rank": 16, "batch_size": 8, "iters": 2000}
RECALL_ROWS = (ATTENTION, GRASSMANN, ("Grassmann, far offsets", {"offsets": FAR}))

# ---- models of equal size -----------------------------------------------------------------------------


def model(settings: dict, vocab_size: int) -> Config:
    """The configuration that train_char.py would make of these settings."""
    return config_of(resolved(settings) | {"vocab_size": vocab_size})


def config_of(spec: dict) -> Config:
    """The configuration in a run's description."""
    return Config(**{f.name: spec[f.name] for f in fields(Config)})


def count_params(config: Config, product: str = "wedge", landmarks: tuple[str, ...] = ()) -> int:
    """Parameters that do something: all of them, with a tap per landmark and layer, but the rows of W_plu for
    which the product has no coordinate.
    """
    total = sum(math.prod(shape) for shape in param_shapes(config).values())
    if config.mixer == "attention":
        return total
    idle = config.rank * (config.rank - 1) // 2 - PRODUCTS[product][2](config.rank)
    return total + config.n_layer * (len(landmarks) * config.rank - idle * config.d_model)


def matched(config: Config, target: int, *variant) -> Config:
    """The same model, as wide as `target` parameters allow; `variant` is its product and landmarks.

    d_model becomes the multiple of n_head that comes closest while the feed-forward network keeps its usual
    ratio of d_ff to d_model; d_ff then makes up for the rest, at N (2 d_model + 1) parameters a unit.
    """
    ratio = config.d_ff // config.d_model
    widths = range(config.n_head, math.isqrt(target) + config.n_head, config.n_head)
    sizes = [replace(config, d_model=d, d_ff=ratio * d) for d in widths]
    best = min(sizes, key=lambda size: abs(count_params(size, *variant) - target))
    rest = target - count_params(best, *variant)
    return replace(best, d_ff=max(1, best.d_ff + round(rest / (best.n_layer * (2 * best.d_model + 1)))))


# ---- one run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """What all runs share, and how many there are."""

    out: Path
    quick: bool
    seeds: int | None  # runs of every model, if not as many as the question says
    text: str  # its SHA-256
    vocab: list[int]
    train_tokens: Array
    val_tokens: Array


def make_spec(settings: dict, overrides: dict, vocab_size: int, data: str, same_size: bool = True) -> dict:
    """A run in full, all that its result depends on; same_size: with as many parameters as `settings` makes."""
    s = settings | overrides
    config = model(s, vocab_size)
    if same_size:
        config = matched(config, count_params(model(settings, vocab_size)), s["product"], s["landmarks"])
    warmup = min(s["warmup_iters"], s["iters"] // 10)  # the short runs too have a peak
    return {**s, **asdict(config), "warmup_iters": warmup, "data": data}


def variant(study: Study, spec: dict) -> dict[str, Callable]:
    """The functions to swap for a run."""
    more = look_back_to(spec["landmarks"], study.vocab) if spec["landmarks"] else {}
    return multiply_by(spec["product"]) | more


def begin(spec: dict) -> tuple[dict, dict]:
    """Parameters and optimiser of a run before its first step."""
    params = grassmann.init_params(config_of(spec), spec["seed"])
    if spec["W_red_scale"]:
        for name in params:
            if name.endswith(".W_red"):
                params[name] *= spec["W_red_scale"] * math.sqrt(spec["d_model"])  # instead of 1/sqrt(d_model)
    return params, grassmann.adamw_init(params)


def train_step(spec: dict, params: dict, optimizer: dict, step: int, x: Array, y: Array, threads: int = 1) -> float:
    """One step as train_char.py does it, in place: the loss."""
    lr = grassmann.learning_rate(step, spec["iters"], spec["lr"], spec["lr"] / 10, spec["warmup_iters"])
    loss, grads = grassmann.loss_and_grads(params, config_of(spec), x, y, (spec["seed"], step), threads)
    if spec["grad_clip"]:
        grassmann.clip_grads(grads, spec["grad_clip"])
    grassmann.adamw_step(params, grads, optimizer, step, lr, weight_decay=spec["weight_decay"])
    return loss


def train(study: Study, spec: dict) -> list:
    """Train on one thread: a [step, validation loss] every spec["eval_every"] steps and at the end.

    On a task of question 6 the second is not the loss but the list of `accuracy`. A loss that is not finite
    ends the run.
    """
    config, size, curve = config_of(spec), (spec["batch_size"], spec["context"]), []
    if spec["data"] in TASKS:

        def batch(step: int, windows: int = size[0]) -> tuple:
            return TASKS[spec["data"]](np.random.default_rng((spec["seed"], step)), windows, size[1])

        def evaluate() -> list[float]:
            return accuracy(params, config, *batch(spec["iters"], 512))  # a step that is never trained
    else:

        def batch(step: int) -> tuple:
            return grassmann.get_batch(study.train_tokens, *size, spec["seed"], step)

        def evaluate() -> float:
            return grassmann.validation_loss(params, config, study.val_tokens)

    with swapped(variant(study, spec)):
        params, optimizer = begin(spec)
        for step in range(spec["iters"]):
            loss = train_step(spec, params, optimizer, step, *batch(step)[:2])
            last = step + 1 == spec["iters"] or not math.isfinite(loss)
            if last or (step + 1) % spec["eval_every"] == 0:
                curve.append([step + 1, evaluate()])
            if last:
                return curve


def write(path: Path, text: str) -> None:
    """Whatever happens, `path` is the old file or the new one, whole. Raises OSError."""
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def digest(document) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def perform(study: Study, label: str, spec: dict) -> None:
    """Train a run, and write its file."""
    parameters = count_params(config_of(spec), spec["product"], spec["landmarks"])
    run = {"label": label, "spec": spec, "parameters": parameters, "curve": train(study, spec)}
    write(study.out / "runs" / f"{digest(spec)}.json", json.dumps(run))


def read(path: Path) -> dict:
    """What `write` wrote. Raises ValueError and OSError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged; delete it, and what it held is done again") from None


# ---- all runs -----------------------------------------------------------------------------------------


def complete(study: Study, jobs: int, questions: Callable):
    """questions(ask), once every run that it asks for is finished.

    ask(label, spec) gives a finished run, or else None and makes a note of it. What is noted is trained, several
    runs at a time, and the questions are put again: the first time they ask for the searches of learning rates, then
    for what depends on these.
    """
    while True:
        missing = {}

        def ask(label: str, spec: dict, missing: dict = missing) -> dict | None:
            path = study.out / "runs" / f"{digest(spec)}.json"
            if path.exists():
                return read(path)
            missing.setdefault(path, (label, spec))
            return None

        answers = questions(ask)
        if not missing:
            return answers
        perform_all(study, list(missing.values()), jobs)


def cost(spec: dict) -> int:
    """How long a run takes, in a unit of its own."""
    return spec["iters"] * spec["batch_size"] * spec["context"] * count_params(config_of(spec))


def perform_all(study: Study, runs: list[tuple[str, dict]], jobs: int) -> None:
    """Train these runs, `jobs` at a time, the longest first."""
    runs, jobs = sorted(runs, key=lambda run: -cost(run[1])), min(jobs, len(runs))
    print(f"{len(runs)} runs to train, {jobs} at a time", flush=True)
    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
    with tqdm(total=sum(cost(spec) for _, spec in runs), smoothing=0, bar_format=form, disable=None) as bar:

        def done(k: int, spec: dict) -> None:
            bar.set_description_str(f"{k} of {len(runs)} runs", refresh=False)
            bar.update(cost(spec))

        if jobs == 1:
            for k, run in enumerate(runs, 1):
                perform(study, *run)
                done(k, run[1])
            return
        with processes(jobs) as pool:
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # those that start now ignore Ctrl-C from birth
            futures = {pool.submit(perform, study, *run): run[1] for run in runs}
            signal.signal(signal.SIGINT, handler)
            for k, future in enumerate(as_completed(futures), 1):
                future.result()
                done(k, futures[future])


@contextmanager
def processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes to train runs in; after an error or Ctrl-C none of them stays behind."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker)
    try:
        yield pool
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise ValueError("a run was killed, perhaps for lack of memory: fewer --jobs need less") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """A process that trains runs leaves Ctrl-C to its parent, and ends with it, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---- the answers --------------------------------------------------------------------------------------

Answer = namedtuple("Answer", "label lr runs ms")  # one line of a table: a model, a run per seed, time of a step


def final(run: dict) -> float:
    """The validation loss at the end of a run, infinite if it diverged."""
    step, loss = run["curve"][-1]
    return loss if step == run["spec"]["iters"] and math.isfinite(loss) else math.inf


def best_lr(ask: Callable, rates: tuple[float, ...]) -> float | None:
    """The best of these learning rates. While that is the smallest or the largest so far, one more is tried
    beyond it. ask(lr) gives a run, or None as long as it is not finished; then the best is None too.
    """
    runs = {lr: ask(lr) for lr in rates}
    while all(runs.values()):
        best = min(runs, key=lambda lr: final(runs[lr]))
        if best not in (min(runs), max(runs)) or not 1e-4 < best < 0.1:
            return best
        beyond = best / 2 if best == min(runs) else best * 2
        runs[beyond] = ask(beyond)
    return None


def steps(study: Study, settings: dict) -> int:
    """How many steps a run has."""
    return min(QUICK_STEPS, settings["iters"]) if study.quick else settings["iters"]


def answer(study: Study, question: Question, ask: Callable) -> list[Answer]:
    """Ask for what a question needs. (The time of a step comes later.)

    Learning rates are tried at a tenth of the steps. In the quick set only the plain model of each mixer is
    tried, and its variants take its learning rate; a tenth of so few steps says little, so there it is a quarter.
    """
    settings = BASE | question.size
    iters = settings["iters"] = steps(study, settings)
    short = max(1, iters // (4 if study.quick else 10))
    rates = LEARNING_RATES[:2] if question.large else LEARNING_RATES
    answers = []

    def run(label: str, overrides: dict, **how) -> dict | None:
        spec = make_spec(settings, overrides | how, len(study.vocab), study.text, question.same_size)
        return ask(label, spec)

    for label, overrides in question.rows:
        tried = (ATTENTION if "mixer" in overrides else GRASSMANN) if study.quick else (label, overrides)

        def search(lr: float, tried: tuple = tried) -> dict | None:
            return run(f"{tried[0]}, lr {lr:g}", tried[1], lr=lr, iters=short, eval_every=short, seed=0)

        runs, lr = [], best_lr(search, rates)
        if lr is not None:
            how = {"lr": lr, "eval_every": max(1, iters // 10)}
            seeds = range(1 if question.large else study.seeds or question.seeds)
            runs = [run(f"{label}, seed {seed}", overrides, seed=seed, **how) for seed in seeds]
        answers.append(Answer(label, lr, runs, math.nan))
    return answers


WARM, TIMED = 3, 30  # steps of each model, when their time is measured


def timed(study: Study, answers: list[Answer]) -> list[Answer]:
    """The answers with the milliseconds of a step on all cores: medians, the models by turns, kept in timing.json."""
    path, threads, here = study.out / "timing.json", cpu.available_cores(), machine()
    specs = [a.runs[0]["spec"] for a in answers]
    known = read(path) if path.exists() else {}
    if known.get("machine") != here:
        known = {"machine": here, "ms": {}}
    if digest(specs) not in known["ms"]:
        models, seconds = [], [[] for _ in specs]
        for step in range(WARM + TIMED):
            for k, spec in enumerate(specs):
                with swapped(variant(study, spec)):
                    models += [begin(spec)] if step == 0 else []
                    started = time.perf_counter()
                    x, y = grassmann.get_batch(study.train_tokens, spec["batch_size"], spec["context"], 0, step)
                    train_step(spec, *models[k], step, x, y, threads)
                    seconds[k].append(time.perf_counter() - started)
        known["ms"][digest(specs)] = [1e3 * median(s[WARM:]) for s in seconds]
        write(path, json.dumps(known))
    return [a._replace(ms=ms) for a, ms in zip(answers, known["ms"][digest(specs)], strict=True)]


def markdown(rows: list) -> str:
    """A table from its rows, the first of which is the heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def loss_at(ms: float, run: dict, ms_per_step: float) -> float:
    """A run's validation loss after so many milliseconds of training; nan before its first validation."""
    steps, losses = zip(*run["curve"], strict=True)
    return float(np.interp(ms / ms_per_step, steps, losses, left=math.nan))


def table(answers: list[Answer]) -> str:
    """One line per model, means over its runs; gaps are those to the first."""
    whole = [a.ms * run["spec"]["iters"] for a in answers for run in a.runs if final(run) < math.inf]
    deadline, first = min(whole, default=math.nan), fmean(map(final, answers[0].runs))
    first = first if first < math.inf else math.nan  # no gap to that
    rows = []
    for a in answers:
        losses = [final(run) for run in a.runs]
        loss, spread = fmean(losses), f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        cells = {
            "model": a.label,
            "learning rate": f"{a.lr:g}",
            "validation loss, nats": f"{loss:.3f}{spread}",
            "bits per character": f"{loss / math.log(2):.3f}",
            "perplexity per character": f"{np.exp(loss):.3f}",
            "parameters": f"{a.runs[0]['parameters']:,}",
            "ms per step": f"{a.ms:.1f}",
            "loss at equal time": f"{fmean(loss_at(deadline, run, a.ms) for run in a.runs):.3f}",
            f"gap to {answers[0].label}": "" if a is answers[0] else f"{100 * np.expm1(loss - first):+.1f}%",
        }
        rows.append(cells)
    return markdown([list(rows[0]), *(row.values() for row in rows)])


def machine() -> str:
    """Versions, and the processor's name."""
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    for line in info.read_text().splitlines() if info.exists() else []:
        name = line.partition(":")[2].strip() if line.startswith("model name") else name
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, {blas['name']} {blas['version']}"
    return f"{versions}, {cpu.available_cores()} cores, {name}"


EXPLANATION = """{train:,} characters of {data} to train on, {val:,} to validate, {vocab} different ones. Unless a \
question says otherwise: {iters:,} steps of {tokens:,} characters, no dropout (so short a run does not overfit). A \
loss with two more in brackets is the mean of several seeds, with the lowest and the highest; inf: diverged. Learning \
rates: the best {search}. Milliseconds: on all cores, by turns. Loss at equal time: what the validation loss was, \
interpolated, when the fastest run of the table had finished. Gap: how much higher the perplexity per character is. \
Parameters: those that act. Products in place of the wedge and partners at words and lines are not written for speed."""


def report(args, study: Study, answers: list[tuple[Question, list[Answer]]], recalled: list[dict]) -> str:
    """compare.md"""
    tuned = "at a quarter of the steps, for the plain model of each mixer" if args.quick else "at a tenth of the steps"
    data = {None: "Python's documentation", "shakespeare": "Tiny Shakespeare"}.get(args.data) or Path(args.data).name
    parts = ["# Does geometry replace attention?", f"`{shlex.join(['python', 'compare.py', *sys.argv[1:]])}`",
             machine() + ".", EXPLANATION.format(
        train=len(study.train_tokens), val=len(study.val_tokens), data=data, vocab=len(study.vocab), search=tuned,
        iters=steps(study, BASE), tokens=BASE["batch_size"] * BASE["context"],
    )]  # fmt: skip
    for question, rows in answers:
        parts += [f"## {question.number}. {question.title}", question.asks, table(rows)]
    if recalled:
        head = ["task", "model", "learning rate", *(f"{low} to {high - 1}" for low, high in itertools.pairwise(EDGES))]
        rows = [[r["task"], r["label"], f"{r['lr']:g}", *(f"{a:.0%}" for a in r["accuracy"])] for r in recalled]
        asks = f"How far back can an answer lie? Accuracy against distance, {1 / ANSWERS:.1%} by chance."
        parts += ["## 6. Where attention wins", asks, markdown([head, *rows])]
    return "\n\n".join(parts) + "\n"


def plot(path: Path, answers: list[tuple[Question, list[Answer]]]) -> None:
    """compare_N.png: the validation loss against tokens and against seconds, a row per table, a line per run."""
    figure = Figure(figsize=(12, 3.6 * len(answers)), layout="constrained")
    for (question, rows), (left, right) in zip(answers, figure.subplots(len(answers), 2, squeeze=False), strict=True):
        for k, a in enumerate(rows):
            for run in a.runs:
                steps, losses = map(np.array, zip(*run["curve"], strict=True))
                style = {"color": f"C{k}" if k < 10 else "black", "marker": ".", "lw": 1}
                style["label"] = a.label if run is a.runs[0] else None
                left.plot(steps * run["spec"]["batch_size"] * run["spec"]["context"] / 1e6, losses, **style)
                right.plot(steps * a.ms / 1e3, losses, **style)
        left.set(title=f"{question.number}. {question.title}", ylabel="validation loss, nats")
        for axes, unit in ((left, "million characters"), (right, "seconds of training")):
            axes.set(xlabel=unit)
            axes.grid(alpha=0.3)
        right.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    figure.savefig(path, dpi=110)


# ---- question 6: a token far back ---------------------------------------------------------------------

ANSWERS, ASK, TOKENS = 8, 16, 17  # tokens: 0 to 7 are answers, 8 to 15 filler, 16 asks
EDGES = (1, 3, 5, 9, 17, 33, 65, 129, 201)  # of the distances: 1 and 2, 3 and 4, 5 to 8, …


def recall(rng: np.random.Generator, batch: int, length: int) -> tuple[Array, Array, Array]:
    """What was the key? Filler with one key among it; after that some tokens ask, and the answer is the key.

    x, y, distance (batch, length): distance is that from an asking token to its answer, 0 for all others.
    They repeat themselves, y = x, which is soon learned: what remains of the loss is the question.
    """
    x = rng.integers(ANSWERS, ASK, (batch, length))
    place, key = rng.integers(0, length // 4, (batch, 1)), rng.integers(0, ANSWERS, (batch, 1))
    distance = np.arange(length) - place
    asks = (distance > 0) & (rng.random(x.shape) < 1 / 8)
    np.put_along_axis(x, place, key, 1)
    x[asks] = ASK
    return x, np.where(asks, key, x), np.where(asks, distance, 0)


def brackets(rng: np.random.Generator, batch: int, length: int) -> tuple[Array, Array, Array]:
    """Which bracket does this one close? Eight kinds open, one token closes; x, y, distance as in `recall`."""
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


def accuracy(params: dict, config: Config, x: Array, y: Array, distance: Array) -> list[float]:
    """For the distances between two EDGES each: how often the likeliest of the eight answers is right."""
    chunks = np.array_split(x, math.ceil(len(x) / 8))
    guess = np.concatenate([grassmann.forward(params, config, c)[..., :ANSWERS].argmax(-1) for c in chunks])
    bins = [(low <= distance) & (distance < high) for low, high in itertools.pairwise(EDGES)]
    return [float((guess == y)[b].mean()) if b.any() else math.nan for b in bins]


def reach(offsets: tuple[tuple[int, ...], ...]) -> int:
    """How many tokens back a Grassmann model sees: what its layers see, added up. (0: attention, which sees all.)"""
    return sum(max(layer) for layer in offsets)


def answer_recall(study: Study, ask: Callable) -> list[dict]:
    """The best run of every model on every task. Such a task is often learned all at once, after a long time
    of nothing, so that short runs would not tell the learning rates apart: all run to the end.
    """
    iters = steps(study, RECALL_SIZE)
    results, settings = [], BASE | RECALL_SIZE | {"iters": iters, "eval_every": iters}
    for task, (label, overrides) in itertools.product(TASKS, RECALL_ROWS):
        specs = [make_spec(settings, overrides | {"lr": lr}, TOKENS, task) for lr in LEARNING_RATES]
        runs = [ask(f"{task}, {label}, lr {spec['lr']:g}", spec) for spec in specs]
        if all(runs):
            best = max(runs, key=lambda run: np.nanmean(run["curve"][-1][1]))
            result = {"task": task, "label": label, "lr": best["spec"]["lr"], "reach": reach(best["spec"]["offsets"])}
            results.append(result | {"accuracy": best["curve"][-1][1]})
    return results


def plot_recall(path: Path, results: list[dict]) -> None:
    """compare_6.png: accuracy against distance, and how far the Grassmann models can see at all."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    middles = [math.sqrt(low * (high - 1)) for low, high in itertools.pairwise(EDGES)]
    for task, axes in zip(TASKS, figure.subplots(1, len(TASKS), sharey=True), strict=True):
        for k, result in enumerate(r for r in results if r["task"] == task):
            axes.plot(middles, result["accuracy"], "o-", color=f"C{k}", label=result["label"])
            if result["reach"]:  # attention sees everything
                label = f"{result['label']}: sees {result['reach']} back"
                axes.axvline(result["reach"] + 0.5, color=f"C{k}", ls="--", lw=1, label=label)
        axes.axhline(1 / ANSWERS, color="gray", ls=":", label="chance")
        axes.set_xscale("log", base=2)
        axes.set(title=task, xlabel="distance, tokens", ylabel="accuracy", ylim=(0, 1.05))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=110)


# ---- the program --------------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", help="a UTF-8 text file, or 'shakespeare' (default: Python's own documentation, pydoc_data.topics)")
    add("--out", type=Path, default=Path("compare"), help="folder for tables, figures and runs (default: compare)")
    add("--quick", action="store_true", help=f"one seed, {QUICK_STEPS:,} steps, questions 1, 3 and 5")
    add("--only", type=number(int, 1, 9), nargs="+", metavar="QUESTION", help="some of the questions 1 to 9")
    add("--seeds", type=number(int, 1, 1000), help="runs of every model (default: 3 in question 1, else 1)")
    add("--jobs", type=number(int, 1, 1024), default=cpu.available_cores(),
        help="runs at a time, which changes no result (default: one per core)")  # fmt: skip
    return parser


def make_study(args) -> Study:
    """Read the text. Raises ValueError and OSError."""
    text = load_text(args.data)
    n_val, context = len(text) // 10, max((BASE | question.size)["context"] for question in QUESTIONS)
    if n_val < 2 or len(text) - n_val <= context:
        raise ValueError(f"the text has {len(text)} characters, a context of {context} needs {context * 10 // 9 + 1}")
    vocab = vocabulary(text)
    tokens, sha256 = encode(text, vocab), hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    seeds = args.seeds or (1 if args.quick else None)
    return Study(args.out, args.quick, seeds, sha256, vocab, tokens[:-n_val], tokens[-n_val:])


def compare(args) -> None:
    """Answer the questions. Raises ValueError and OSError."""
    study, numbers = make_study(args), args.only or (QUICK_QUESTIONS if args.quick else range(1, 10))
    selected = [q for q in QUESTIONS if q.number in numbers and not (args.quick and q.large)]
    if not selected and 6 not in numbers:
        raise ValueError("question 9 is not for --quick")

    def everything(ask: Callable) -> tuple[list, list]:
        return [answer(study, q, ask) for q in selected], answer_recall(study, ask) if 6 in numbers else []

    answers, recalled = complete(study, args.jobs, everything)
    answers = [(question, timed(study, rows)) for question, rows in zip(selected, answers, strict=True)]
    text = report(args, study, answers, recalled)
    write(args.out / "compare.md", text)
    for n in sorted({question.number for question in selected}):
        plot(args.out / f"compare_{n}.png", [entry for entry in answers if entry[0].number == n])
    if recalled:
        plot_recall(args.out / "compare_6.png", recalled)
    print(text)
    print(f"written to {args.out}: " + ", ".join(sorted(p.name for p in args.out.glob("compare*"))))


def main() -> None:
    plain_output()
    parser = build_parser()
    args = parser.parse_args()
    stopped = f"\nstopped; what is finished is in {args.out}, the same command goes on from there\n"
    with short_errors(parser, args.out, stopped=stopped):
        compare(args)


if __name__ == "__main__":
    main()
