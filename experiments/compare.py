"""Does geometry replace attention? Both, and variants of both, trained alike on one text.

  python -m experiments.compare --quick              three models of the first question, minutes
  python -m experiments.compare --data shakespeare   all questions, on Tiny Shakespeare: a day

The same for every model of a question: the number of parameters (within 2%, but where a question says so),
the batches, the optimiser, the schedule, the validation. Every model gets the learning rate that is
best for it in runs as long as those that count, without which no comparison is fair; where a question
takes those of another text, size or length instead, it says so. What is chosen is chosen on one part of
the text and reported on another. Runs use one thread each; steps are timed when all is done and quiet.

Writes into --out: compare.md (the tables), a figure per question, timing.json (measured again on
another machine, or once deleted), and runs.jsonl, a line per finished run. After an interruption
the same command goes on; other settings or another text are other runs. (It can't know that
grassmann.py itself has changed: choose another --out.)
"""

import cli  # noqa: I001  (before NumPy)

import bisect
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
from experiments.ngram import best_ngram
from experiments.texts import Text, read_text
from experiments.variants import PRODUCTS, variant
from grassmann import Array, Config, Params, param_shapes
from training import Training, train_step

# Settings are fields of Config and Training with train_char.py's defaults, and what else is here.
# As in nanoGPT's laptop recipe, a run is short and has no dropout: it does not overfit.
QUICK_STEPS = 1500
BASE = {"iters": 2000, "dropout": 0.0, "product": "wedge", "landmarks": (), "W_red_scale": None,
        "larger": (),  # kinds of matrices that start as W_red does, from N(0, 1/d) instead of N(0, 0.02²); W_out N(0, 1/(2Nd))
        "test": True}  # choose on one half of what is held out, report on the other
ON_THE_WAY = 2**16  # tokens to validate on before the end, all that a short text has
LEARNING_RATES, SURVEY_RATES = (2e-3, 4e-3), (1e-3, 2e-3, 4e-3, 8e-3)  # tried first, see best_lr
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
    text: tuple[str | None, int] | None = None  # as `read_text` takes it; None: that of --data
    rates: tuple[float, ...] = LEARNING_RATES
    rates_of: "Question | None" = None  # the rates are those that were best there
    survey: bool = False  # rates from runs of a tenth of the steps (not of tasks), no test: older, and cheaper
    tasks: bool = False  # of tasks.py in place of the text: accuracy, not loss
    ngrams: bool = False  # the first row is what counting alone does

def survey(*what, rates: tuple[float, ...] = SURVEY_RATES, **how) -> Question:
    """A question as it was asked first, until a better one has its answer."""
    return Question(*what, survey=True, rates=rates, **how)

def mixer(name: str, **more) -> tuple[str, dict]:
    return name, {"mixer": name, **more}

WIDE = {"ratio": 4}  # d_ff = 4 d_model, as usual with attention and in the paper
ATTENTION = mixer("attention", positions=True)
ROTARY_TAPS = mixer("rotary attention with taps", **WIDE)
BEST_ATTENTION = ("attention with taps and our gate",
                  {"mixer": "rotary attention with taps and our gate", "larger": ("W_out",)})
BEST_CONVOLUTION = ("convolution with our gate",
                    {"mixer": "gated convolution with our gate", "larger": ("W_in", "W_out")})
GRASSMANN = ("Grassmann", {})
NO_PRODUCT = ("no product, rank 64", {"mixer": "sum", "rank": 64})
ONE = ("one offset per layer", {"taps": False})
UNIT = ("one per layer, normalised", {"taps": False, "normalize": True})
PAPER = {"block": "paper", "taps": False, "normalize": True, "positions": True, **WIDE}
SIX = {"offsets": ((1, 2, 4, 8, 12, 16),) * Config.n_layer}  # the paper's, all in every layer
NEAR = ((1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 4, 6, 8, 10, 12, 16))
FAR = ((1, 2, 3, 4), (1, 2, 3, 4, 8, 16), (1, 2, 3, 4, 5, 6, 16, 32), (1, 2, 4, 8, 12, 16, 32, 64))
MEMORY, HYBRID = ("with memory", {"memory": True}), mixer("hybrid")
SMALL = {"vocab_size": tasks.VOCAB_SIZE, "context": 256, "batch_size": 8, "d_model": 64, "rank": 16}
KEYS = SMALL | {"vocab_size": tasks.KEYS_VOCAB_SIZE, "context": 128, "iters": 4000}
UP_TO_212 = ((1, 2, 3, 4), (4, 8, 12, 16), (16, 32, 48, 64), (64, 128))  # they reach every distance
CONTROLS = Question(
    1, "Grassmann or attention", "Which predicts text better at equal size, when attention has rotary "
    "positions, a short convolution (taps) before it, larger first weights, and our gate around it?",
    [ATTENTION, mixer("rotary attention", **WIDE), ROTARY_TAPS,
     ("the same, larger W_qkv", {"mixer": "rotary attention with taps", "larger": ("W_qkv",), **WIDE}),
     mixer("gated convolution"), ("the same, larger W_in", {"mixer": "gated convolution", "larger": ("W_in",)}),
     BEST_ATTENTION, BEST_CONVOLUTION, GRASSMANN, HYBRID], seeds=3, ngrams=True)
FEATURES = Question(
    2, "Is it the geometry?", "Other features of a token and its partner, at equal size: products that are "
    "no wedge, none at all; learned planes and trivectors, which are determinants of dot products; "
    "rotations in the token's plane; and whether the gate is worth its parameters.",
    [GRASSMANN, ("no product", {"product": "concatenation"}), NO_PRODUCT,
     mixer("MLP on [z ; s]"), ("symmetric product", {"product": "symmetric"}), mixer("outer product"),
     ("elementwise product", {"product": "elementwise"}), mixer("one-sided product", rank=64),
     mixer("wedge without a gate"),
     mixer("learned planes", rank=64), mixer("learned planes and z·s", rank=64), mixer("learned trivectors", rank=64),
     mixer("learned planes and trivectors", rank=64), mixer("rotors", rank=64)], seeds=3)
LAYER = Question(
    3, "The paper's layer", "One offset per layer, or the average of all in every layer? Normalised or not? "
    "In the paper's block?",
    [BEST_ATTENTION, ("the paper's model", PAPER), UNIT, ONE, ("average of six, normalised", UNIT[1] | SIX),
     GRASSMANN], seeds=3)
SUBWORDS = [BEST_ATTENTION, BEST_CONVOLUTION, GRASSMANN, ("the paper's model", PAPER)]

def on_bible(title: str, settings: dict, rates_of: Question | None = None, seeds: int = 1) -> Question:
    return Question(5, title, "Does the lead last as models grow, and as training does? On the King James Bible, "
                    f"which is four times as long; {'one seed' if seeds == 1 else 'three seeds'}.",
                    [BEST_ATTENTION, BEST_CONVOLUTION, GRASSMANN], settings, text=("bible", 0), rates_of=rates_of,
                    seeds=seeds)

TENTH = {"n_layer": 3, "d_model": 64, "rank": 16}  # 0.1 million
LONGER = on_bible("0.1 million, 8,000 steps", TENTH | {"iters": 8000}, seeds=3)
MILLION = on_bible("1 million", {"n_layer": 5, "d_model": 144, "rank": 32})
QUESTIONS = [
    CONTROLS, FEATURES, LAYER,
    Question(4, "A second text", "The same on Python's documentation; rates of the first text.",
             [ATTENTION, BEST_ATTENTION, BEST_CONVOLUTION, GRASSMANN, NO_PRODUCT], text=(None, 0), rates_of=CONTROLS,
             seeds=3),
    on_bible("0.1 million", TENTH, seeds=3),
    on_bible("0.3 million", {"n_layer": 4, "d_model": 96, "rank": 20}), MILLION, LONGER,
    on_bible("0.1 million, 32,000 steps, rates of 8,000", TENTH | {"iters": 32_000}, LONGER),
    on_bible("1 million, 8,000 steps, rates of 2,000", MILLION.settings | {"iters": 8000}, MILLION),
    Question(6, "Subwords: 1,024 byte pairs", "The paper's regime: what of this holds on pieces of words? One seed.",
             SUBWORDS, text=("shakespeare", 1024)),
    Question(6, "Subwords: 4,096 byte pairs", "The same on the King James Bible; one seed.",
             SUBWORDS, text=("bible", 4096)),
    Question(7, "Context 256", "With as many windows a step as at 64; the rates of that, one seed.",
             [BEST_ATTENTION, GRASSMANN, MEMORY, HYBRID], {"context": 256}, rates_of=CONTROLS),
    Question(8, "A far token", f"How far back can an answer lie? Accuracy against distance, {1 / tasks.ANSWERS:.1%} by "
             "chance. The mean of three seeds, in brackets the lowest; rates from 0.001.",
             [(f"recall, {label}", changes | {"data": "recall"})
              for label, changes in (ATTENTION, GRASSMANN, MEMORY, HYBRID)],
             SMALL, tasks=True, seeds=3, rates=(1e-3,)),
    Question(9, "How much a memory holds", "2, 4, 8 or 16 keys, each under a name: which one is it "
             "that is asked for? To answer with the most frequent of them is right in 56, 41, 32 and "
             "26% of the cases. Context 128, 4,000 steps; the sizes differ; one seed, rates from 0.001 and 0.002.",
             [(f"keys, {label}", changes | {"data": "keys"}) for label, changes in (
                 BEST_ATTENTION, ("with memory, rank 16", MEMORY[1]), mixer("a memory that is no plane"),
                 mixer("two memories, one forgets"),
                 ("with memory, rank 32", MEMORY[1] | {"rank": 32}))],
             KEYS, same_size=False, tasks=True, rates=(1e-3, 2e-3)),
    Question(10, "Rank", "How many dimensions do the planes need? One seed.",
             [("rank 32", {}), *((f"rank {r}", {"rank": r}) for r in (8, 16, 64))]),
    survey(11, "What each default is worth",
           "One thing changed at a time, its parameters not made up for by others.",
           [("default", {}), ("d_ff = 4 d_model", WIDE), ("no taps, one offset", {"taps": False}),
            ("positions", {"positions": True}), ("paper's block", {"block": "paper"}),
            ("offsets 1 to 4 in every layer", {"offsets": ((1, 2, 3, 4),) * Config.n_layer}), ("rank 48", {"rank": 48}),
            ("W_red from N(0, 0.02²)", {"W_red_scale": 0.02}), ("dropout 0.1", {"dropout": 0.1})],
           same_size=False),
    survey(12, "Planes between words and lines", "Is the end of the previous word or line worth a "
           "partner? Context 256, which holds several lines.",
           [GRASSMANN, ("+ previous word", {"landmarks": ("word",)}),
            ("+ last two words", {"landmarks": ("word", "second word")}),
            ("+ previous word and line", {"landmarks": ("word", "line")}),
            ("+ two offsets, near", {"offsets": NEAR}), ("+ two offsets, far", {"offsets": FAR})],
           {"context": 256, "batch_size": 3}),  # as many tokens as the others
    survey(13, "Brackets", "Which bracket does this one close? Rates of 1e-3 to 8e-3, one seed.",
           [(f"brackets, {label}", changes | {"data": "brackets"})
            for label, changes in (ATTENTION, GRASSMANN, ("Grassmann, far offsets", {"offsets": UP_TO_212}))],
           SMALL, tasks=True),
    survey(13, "Keys without taps", "Question 9 for plain attention, at one rate.",
           [("keys, attention", ATTENTION[1] | {"data": "keys"})],
           KEYS, same_size=False, tasks=True, rates=(2e-3,)),
]
QUICK = [BEST_ATTENTION, BEST_CONVOLUTION, GRASSMANN]  # of question 1, and one seed

# ---- one run -------------------------------------------------------------------------------------

class Run:
    """A run from its settings. `spec` is all that its result depends on, and gives it again."""

    def __init__(self, settings: dict):
        settings = dict(settings)
        if ratio := settings.pop("ratio", None):
            settings["d_ff"] = ratio * settings.get("d_model", Config.d_model)
        self.config, training = (
            kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings})
            for kind in (Config, Training))
        warmup = min(training.warmup_iters, training.iters // 10)  # the short runs too have a peak
        self.training = replace(training, warmup_iters=warmup)
        everything = settings | asdict(self.config) | asdict(self.training)
        for name in ("memory", "test", "larger"):  # as in runs from before there were any
            if not everything.get(name):
                everything.pop(name, None)
        self.spec = dict(sorted(everything.items()))

def count_params(run: Run) -> int:
    """Parameters that act: with taps for landmarks, but no rows of W_plu that only meet zeros."""
    config, r = run.config, run.config.rank
    total = sum(math.prod(shape) for shape in param_shapes(config).values())
    *_, coordinates = PRODUCTS[run.spec["product"]]
    idle = (r * (r - 1) // 2 - coordinates(r)) * config.d_model
    return total + config.n_layer * (len(run.spec["landmarks"]) * r - idle)

def matched(run: Run, target: int) -> Run:
    """The run with a model as wide as `target` parameters allow: d_model the multiple of n_head
    that comes closest while d_ff keeps its ratio to it; d_ff, N (2 d_model + 1) a unit, the rest.
    """
    ratio, n_head = run.config.d_ff // run.config.d_model, run.config.n_head
    widths = range(n_head, math.isqrt(target) + 2 * n_head, n_head)

    def sized(d_model: int) -> Run:
        return Run(run.spec | {"d_model": d_model, "d_ff": ratio * d_model})

    k = bisect.bisect(widths, target, hi=len(widths) - 1, key=lambda d: count_params(sized(d)))
    best = min(map(sized, widths[max(0, k - 1) : k + 1]), key=lambda size: abs(count_params(size) - target))
    unit = best.config.n_layer * (2 * best.config.d_model + 1)
    more = round((target - count_params(best)) / unit)
    return Run(best.spec | {"d_ff": max(1, best.config.d_ff + more)})

def batch(run: Run, text: Text, step: int) -> tuple[Array, Array]:
    """x, y (B, L) of a step: the same for all models with this data and seed."""
    size, seed = (run.training.batch_size, run.config.context), run.training.seed
    if task := tasks.TASKS.get(run.spec["data"]):
        return task(np.random.default_rng((seed, step)), *size)[:2]
    return grassmann.get_batch(text.train, *size, seed, step)

def steps(run: Run, text: Text, threads: int = 1) -> Iterator[tuple[Params, float]]:
    """Train for ever: parameters and loss after every step."""
    params, scale = grassmann.init_params(run.config, run.training.seed), run.spec["W_red_scale"]
    mixers.scale_features(params)
    for name in params:
        if name.endswith(".W_red") and scale:
            params[name] *= scale * math.sqrt(run.config.d_model)  # instead of 1/sqrt(d_model)
        if name.split(".")[-1] in run.spec.get("larger", ()):
            params[name] /= 0.02 * math.sqrt(run.config.d_model)
    state = run.config, run.training, grassmann.adamw_init(params)
    for step in itertools.count():
        x, y = batch(run, text, step)
        yield params, train_step(grassmann, params, *state, step, x, y, threads)

def evaluate(run: Run, text: Text, params: Params, test: bool, most: int | None = None) -> float | list[float]:
    """The loss on what is held out to choose on, or for the test, or on at most so many tokens of it; on a
    task the list of `accuracy`.
    """
    if task := tasks.TASKS.get(name := run.spec["data"]):
        rng = np.random.default_rng((run.training.seed, run.training.iters + test))  # never trained on
        held_out = task(rng, 512, run.config.context)
        return tasks.accuracy(params, run.config, *held_out, tasks.GROUPS[name])
    tokens = text.test if test else text.val
    if not run.spec.get("test"):
        tokens = np.concatenate([text.val, text.test])
    return grassmann.validation_loss(params, run.config, tokens[:most])

def cost(run: Run) -> int:
    """How long a step takes, in a unit of its own."""
    return run.training.batch_size * run.config.context * count_params(run)

def train(label: str, run: Run, text: Text, tick: Callable[[int], object]) -> dict:
    """Train on one thread, with a tick(cost) after every step: a line of runs.jsonl. Its curve is a
    [step, what `evaluate` says] every spec["eval_every"] steps, on a part of a long text, and at the end,
    which a loss that is not finite brings early; `test` is what it says on the test part then.
    """
    iters, step_cost, curve = run.training.iters, cost(run), []
    result = {"label": label, "spec": run.spec, "parameters": count_params(run), "curve": curve,
              "bytes_per_token": text.bytes_per_token}
    with variant(run.spec["product"], run.spec["landmarks"], text.vocab):
        for step, (params, loss) in enumerate(steps(run, text), 1):
            last = step == iters or not math.isfinite(loss)
            if last or step % run.spec["eval_every"] == 0:
                curve.append([step, evaluate(run, text, params, False, None if last else ON_THE_WAY)])
            tick(step_cost)
            if last:
                break
        if run.spec.get("test"):
            result["test"] = evaluate(run, text, params, True)
    return result

# ---- all runs ------------------------------------------------------------------------------------

def digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

class Runs:
    """The finished runs, lines of a file, and those that were asked for and are missing, both by
    the digest of the spec. Raises ValueError and OSError.
    """

    def __init__(self, path: Path):
        self.path, self.finished, self.missing = path, {}, {}
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

    def ask(self, label: str, run: Run, text: Text) -> dict | None:
        """A finished run; or None, and it is missing."""
        key = digest(run.spec)
        if key not in self.finished:
            self.missing.setdefault(key, (label, run, text))
        return self.finished.get(key)

    def train_missing(self, jobs: int) -> None:
        """Train what is missing, `jobs` runs at a time, the longest first, and write it down."""
        costs = {key: cost(run) * run.training.iters for key, (_, run, _) in self.missing.items()}
        todo = [self.missing.pop(key) for key in sorted(costs, key=costs.get, reverse=True)]
        n, jobs = len(todo), min(jobs, len(todo))
        print(f"{cli.plural(n, 'run')} to train, {jobs} at a time", flush=True)
        form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
        with tqdm(total=sum(costs.values()), smoothing=0, bar_format=form, disable=None) as bar:
            results = (train_in_processes(todo, jobs, bar) if jobs > 1 else
                       (train(*each, bar.update) for each in todo))
            with closing(results):
                for k, result in enumerate(results, 1):
                    self.add(result)
                    bar.set_description_str(f"{k} of {n} runs")

    def add(self, result: dict) -> None:
        """Write a finished run down, for good."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.finished[digest(result["spec"])] = result

def train_in_processes(todo: list, jobs: int, bar: tqdm) -> Iterator[dict]:
    """The results as they come. After an error or Ctrl-C no process stays behind."""
    context = multiprocessing.get_context("spawn")
    progress = context.RawArray("Q", len(todo))  # a number per run, which one process writes
    pool = ProcessPoolExecutor(jobs, context, start_worker, (progress,))
    try:
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers leave Ctrl-C to this process
        waiting = {pool.submit(train_in_worker, k, *each) for k, each in enumerate(todo)}
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

def train_in_worker(k: int, label: str, run: Run, text: Text) -> dict:
    def tick(amount: int) -> None:
        progress[k] += amount

    return train(label, run, text, tick)

# ---- the answers ---------------------------------------------------------------------------------

@dataclass
class Row:
    label: str  # of a model in a table
    results: list[dict]  # its lines of runs.jsonl, one per seed
    ms: float = math.nan  # of a step

Answers = list[tuple[Question, list[Row]]]

def final(result: dict, test: bool = True) -> float:
    """The smaller the better: the loss at the end, inf if it diverged; or -accuracy. On the test part
    (a survey has none), or on what rates are chosen on.
    """
    step, value = result["curve"][-1]
    if test:
        value = result.get("test", value)
    if isinstance(value, list):
        return -np.nanmean(value)
    return value if step == result["spec"]["iters"] and math.isfinite(value) else math.inf

def best_lr(ask: Callable, rates: tuple[float, ...], enough: float = -math.inf) -> float | None:
    """The best of these learning rates. While that is the smallest or the largest so far, one more is
    tried beyond it, unless it is good `enough`. ask(lr) gives a run, or None if it is missing: then
    the best is None, too.
    """
    runs = {lr: ask(lr) for lr in rates}
    while all(runs.values()):
        losses = {lr: final(run, test=False) for lr, run in runs.items()}
        best = min(runs, key=losses.get)
        if best not in (min(runs), max(runs)) or not 1e-4 < best < 0.1 or losses[best] <= enough:
            return best
        other = best / 2 if best == min(runs) else best * 2
        runs[other] = ask(other)
    return None

@dataclass
class Laboratory:
    """What all questions share: the text of --data, the runs, and how much is asked for."""

    data: str | None
    runs: Runs
    quick: bool = False
    seeds: int | None = None
    texts: dict[tuple, Text] = field(default_factory=dict)

    def text(self, question: Question) -> Text:
        which = question.text or (self.data, 0)
        if which not in self.texts:
            self.texts[which] = read_text(*which, context=question.settings.get("context", Config.context))
        return self.texts[which]

    def ask(self, question: Question, label: str, changes: dict, **more) -> dict | None:
        """The run of a model of a question, as large as the others. None: it is missing."""
        text = self.text(question)
        settings = BASE | {"data": text.sha256, "vocab_size": text.vocab_size} | question.settings | more
        settings["test"] = not question.survey
        run, plain = Run(settings | changes), Run(settings)
        if question.same_size:
            run = matched(run, count_params(plain))
        return self.runs.ask(label, run, text)

    def steps(self, question: Question) -> int:
        iters = (BASE | question.settings)["iters"]
        return min(iters, QUICK_STEPS) if self.quick else iters

    def rate(self, question: Question, label: str, changes: dict) -> float | None:
        """The learning rate that is best in runs to the end (survey of texts: to a tenth of it), with one seed."""
        question = question.rates_of or question
        iters = self.steps(question)
        short = max(1, iters // 10) if question.survey and not question.tasks else iters

        def search(lr: float) -> dict | None:
            every = short if question.survey else max(1, iters // 10)
            return self.ask(question, f"{label}, lr {lr:g}", changes, lr=lr, iters=short, eval_every=every)

        enough = -math.inf if not question.tasks else math.inf if question.survey else -0.99
        return best_lr(search, question.rates, enough)

    def answer(self, question: Question) -> list[Row]:
        """Ask for what a question needs: the search of learning rates, then, for the best, the runs."""
        rows, iters = [], self.steps(question)
        for label, changes in QUICK if self.quick else question.models:
            if lr := self.rate(question, label, changes):
                every = iters if question.survey and question.tasks else max(1, iters // 10)
                how = {"lr": lr, "iters": iters, "eval_every": every}
                seeds = range(self.seeds or (1 if self.quick else question.seeds))
                runs = [self.ask(question, f"{label}, seed {k}", changes, seed=k, **how) for k in seeds]
                rows.append(Row(label, runs))
        return rows

    def counting(self, question: Question) -> Row:
        """The n-gram of the best order, in the networks' windows, a run like any other."""
        text, window = self.text(question), question.settings.get("context", Config.context)
        spec = {"data": text.sha256, "ngrams": True, "iters": 1, "window": window}
        if digest(spec) not in self.runs.finished:
            order, val, test = best_ngram(text, window)
            self.runs.add({"label": f"{order}-gram, counted", "spec": spec, "curve": [[1, val]], "test": test,
                           "bytes_per_token": text.bytes_per_token})
        result = self.runs.finished[digest(spec)]
        return Row(result["label"], [result])

WARM, TIMED = 3, 30  # steps of each model, when their time is measured

def add_times(rows: list[Row], text: Text, path: Path) -> None:
    """The milliseconds of a step, kept in a file as long as the machine is the same."""
    specs, known = [row.results[0]["spec"] for row in rows], {}
    with suppress(FileNotFoundError, ValueError):  # a damaged file is measured again
        known = json.loads(path.read_text(encoding="utf-8"))
    if known.get("machine") != machine():
        known = {"machine": machine(), "ms": {}}
    if digest(specs) not in known["ms"]:
        known["ms"][digest(specs)] = measure([Run(spec) for spec in specs], text)
        path.write_text(json.dumps(known), encoding="utf-8")
    for row, ms in zip(rows, known["ms"][digest(specs)], strict=True):
        row.ms = ms

def measure(runs: list[Run], text: Text) -> list[float]:
    """Milliseconds of a step on all cores: medians, the models by turns."""
    trained = [steps(run, text, len(cli.available_cores())) for run in runs]
    seconds = [[] for _ in runs]
    for _ in range(WARM + TIMED):
        for run, one_more, own in zip(runs, trained, seconds, strict=True):
            with variant(run.spec["product"], run.spec["landmarks"], text.vocab):
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
    return f"{versions}, {blas['name']} {blas['version']}, {len(cli.available_cores())} cores, {name}"

# ---- tables and figures --------------------------------------------------------------------------

def markdown(rows: list[dict[str, str]]) -> str:
    """A table; the keys of its rows are the heading."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [rows[0], *map(dict.values, rows)]]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])

def loss_table(question: Question, rows: list[Row], counted: Row | None = None) -> list[dict[str, str]]:
    """One line per model, means over its runs; gaps are those to the first that was trained."""
    part = "validation" if question.survey else "test"
    unit = "token" if question.text and question.text[1] else "character"
    first, table = fmean(map(final, rows[0].results)), []
    first = first if first < math.inf else math.nan  # no gap to that
    for row in [counted, *rows] if counted else rows:
        losses, result = [*map(final, row.results)], row.results[0]
        loss, spread = fmean(losses), f" ({min(losses):.3f} to {max(losses):.3f})"
        trained = row is not counted
        table.append({
            "model": row.label,
            "learning rate": f"{result['spec']['lr']:g}" if trained else "",
            f"{part} loss, nats per {unit}": f"{loss:.3f}{spread if len(losses) > 1 else ''}",
            "bits per byte": f"{loss / math.log(2) / result.get('bytes_per_token', 1):.3f}",
            **({} if question.survey else {
                "validation": f"{fmean(final(each, test=False) for each in row.results):.3f}"}),
            "parameters": f"{result['parameters']:,}" if trained else "",
            "ms per step": f"{row.ms:.1f}" if trained else "",
            f"gap to {rows[0].label}": "" if row is rows[0] else f"{100 * np.expm1(loss - first):+.1f}%",
        })
    return table

def report(lab: Laboratory, answers: Answers) -> str:
    """compare.md"""
    iters = min(BASE["iters"], QUICK_STEPS) if lab.quick else BASE["iters"]
    explanation = f"""\
Unless a question says otherwise: {iters:,} steps of {Training.batch_size * Config.context:,} tokens, no \
dropout (so short a run does not overfit), models of one size. Of a text nine tenths are trained on; of \
the rest the first half (validation) chooses learning rates and the order of the n-gram, the second \
(test) is what is reported. Learning rates: the best of {LEARNING_RATES[0]:g} and {LEARNING_RATES[1]:g} in \
runs of full length, of one seed; while it is the smallest or the largest tried, half or twice of it is \
tried, too. A survey (validation loss) has rates from a tenth of the steps, but of tasks from all, one seed where nothing \
else is said, and all that is held out is its validation. A loss with two more in brackets is the mean of several seeds, with the \
lowest and the highest; inf: diverged. Gap: how much higher the perplexity per token is. Parameters: \
those that act. Milliseconds: medians on all cores, by turns; what is not in grassmann.py is not \
written for speed."""
    command = shlex.join(["python", "-m", "experiments.compare", *sys.argv[1:]])
    parts = ["# Does geometry replace attention?", f"`{command}`", f"{machine()}.", explanation]
    for question, rows in answers:
        text = lab.text(question)
        counted = lab.counting(question) if question.ngrams else None
        table = tasks.table(rows) if question.tasks else loss_table(question, rows, counted)
        told = "" if question.tasks else f" {text.name}: {len(text.train):,} tokens to train on."
        parts += [f"## {question.number}. {question.title}", question.asks + told, markdown(table)]
    return "\n\n".join(parts) + "\n"

def plot(path: Path, answers: Answers) -> None:
    """A row per table: what is in it, a dot per run; and the validation loss against seconds."""
    height = [1.2 + 0.3 * max(6, len(rows)) for _, rows in answers]
    figure = Figure(figsize=(12, sum(height)), layout="constrained")
    grid = figure.subplots(len(answers), 2, squeeze=False, height_ratios=height)
    for (question, rows), (left, right) in zip(answers, grid, strict=True):
        for k, row in enumerate(rows):
            values = [*map(final, row.results)]
            left.plot(values, [k] * len(values), "o", color=f"C{k % 10}", alpha=0.7)
            steps, losses = np.transpose(row.results[0]["curve"])
            right.plot(steps * row.ms / 1e3, losses, lw=1, color=f"C{k % 10}", label=row.label,
                       ls="-" if k < 10 else "--")
        left.set(yticks=range(len(rows)), yticklabels=[row.label for row in rows],
                 title=f"{question.number}. {question.title}",
                 xlabel=f"{'validation' if question.survey else 'test'} loss, nats; a dot per seed")
        left.invert_yaxis()
        right.set(xlabel="seconds of training", ylabel="validation loss, nats")
        right.legend(fontsize=7, ncols=2)
        for axes in (left, right):
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)

def plot_sizes(path: Path, answers: Answers) -> None:
    """Bits against parameters after the fewest steps, and against steps; a colour per model, a line per size."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, rows in enumerate(zip(*(rows for _, rows in answers), strict=True)):
        look = {"marker": "o", "color": f"C{k}"}
        points = sorted((row.results[0]["parameters"], row.results[0]["spec"]["iters"],
                         fmean(map(final, row.results)) / math.log(2)) for row in rows)
        shortest = min(steps for _, steps, _ in points)
        left.semilogx(*zip(*[(size, bits) for size, steps, bits in points if steps == shortest], strict=True), **look,
                      label=rows[0].label)
        for size, longer in itertools.groupby(points, key=lambda point: point[0]):
            _, steps, bits = zip(*longer, strict=True)
            if len(steps) > 1:
                right.semilogx(steps, bits, **look)
                if k == 0:
                    right.annotate(f"  {size / 1e6:.1f} million", (steps[0], bits[0]))
    left.set(xlabel="parameters", ylabel="test loss, bits per character", title=f"after {shortest:,} steps")
    right.set(xlabel="steps", title="longer")
    left.legend()
    left.set_xticks([size for size, steps, _ in points if steps == shortest])
    left.xaxis.set_major_formatter(lambda size, _: f"{size / 1e6:.1f} million")
    right.set_xticks(sorted({steps for _, steps, _ in points}))
    right.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)

# ---- the program ---------------------------------------------------------------------------------

def compare(args) -> None:
    """Answer the questions. Raises ValueError and OSError."""
    asked = [q for q in QUESTIONS if q.number in ([1] if args.quick else args.only)]
    args.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(args.out / "runs.jsonl")
    lab = Laboratory(args.data, runs, args.quick, args.seeds)
    while True:  # learning rates, and what depends on those
        answers = [(q, lab.answer(q)) for q in asked]
        if not runs.missing:
            break
        runs.train_missing(args.jobs)
    for question, rows in answers:
        if not question.tasks:
            add_times(rows, lab.text(question), args.out / "timing.json")
    text = report(lab, answers)
    (args.out / "compare.md").write_text(text, encoding="utf-8")
    for number, group in itertools.groupby(answers, key=lambda each: each[0].number):
        group = list(group)
        draw = tasks.plot if group[0][0].tasks else plot_sizes if number == 5 else plot
        draw(args.out / f"compare_{number}.png", group)
    print(text)
    print(f"written to {args.out}: " + ", ".join(sorted(p.name for p in args.out.glob("compare*"))))

def main() -> None:
    cli.plain_output()
    parser, number = cli.Parser(__doc__), cli.number
    add = parser.add_argument
    add("--data", help="a UTF-8 text file, or 'shakespeare' (default: Python's own documentation)")
    add("--out", type=Path, default="compare", help="folder to write into (default: compare)")
    which = parser.add_mutually_exclusive_group().add_argument
    which("--quick", action="store_true", help=f"question 1 in short: three models, {QUICK_STEPS:,} steps, one seed")
    numbers = sorted({question.number for question in QUESTIONS})
    which("--only", type=int, choices=numbers, default=numbers, nargs="+", metavar="QUESTION",
          help=f"some of 1 to {numbers[-1]}")
    add("--seeds", type=number(int, 1, 1000), help="per model (default: what a question says)")
    add("--jobs", type=number(int, 1, 1024), default=len(cli.available_cores()),
        help="runs at a time, which changes no result (default: one per core)")
    args = parser.parse_args()
    stopped = f"\nstopped; what is finished is in {args.out}, the same command goes on from there\n"
    with cli.short_errors(parser, args.out, stopped=stopped):
        compare(args)

if __name__ == "__main__":
    main()
