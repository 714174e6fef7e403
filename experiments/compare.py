"""Does geometry replace attention? Trains both, and variants of both, in the same way on one text.

  python -m experiments.compare --data shakespeare            all questions, Tiny Shakespeare: a day
  python -m experiments.compare --data shakespeare --only 1   one of them

All models of a question have the same number of parameters (within 2%, unless the question says
so), batches, optimiser, schedule and validation. The learning rate is tuned for every model in runs
of full length, unless a question takes the rates of another question. Rates are chosen on one part
of the held-out text, and losses are reported on the other part. Each run uses one thread.

Writes into --out: compare.md (the tables), figures of questions 1, 5 and 7, timing.json (delete it
to measure again), and runs.jsonl, a line per finished run. After an interruption the same command
goes on. Other settings or another text are other runs. (If grassmann.py itself has changed, choose
another --out.)
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import hashlib
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

import grassmann
from charlm import processes
from charlm.training import Training
from experiments import mixers, tasks
from experiments.common import Learner, alternate, machine, markdown
from experiments.ngram import best_ngram
from experiments.texts import read_text
from grassmann import Config, UserError, default_offsets, param_shapes, require

# Settings are the fields of Config and Training, with train_char.py's defaults, and the settings
# here. As in nanoGPT's laptop recipe, runs are short and have no dropout: they do not overfit.
# `larger` names matrices that start from N(0, 1/d), as W_red does, instead of N(0, 0.02²); W_out
# starts from N(0, 1/(2Nd)).
BASE = {"iters": 2000, "dropout": 0.0, "larger": ()}
ON_THE_WAY = 2**16  # tokens that a curve is measured on, all that a short text has
LEARNING_RATES = (2e-3, 4e-3)  # tried first, see best_lr
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
    seeds: int | tuple[int, ...] = 1  # runs of every model, or of each
    text: tuple[str | None, int] | None = None  # as `read_text` takes it; None: that of --data
    rates: tuple[float, ...] = LEARNING_RATES  # tried first
    spacing: float = 2.0  # the next rate beyond them is so many times as large or as small
    rates_of: "Question | None" = None  # the rates are those that were best there
    tasks: bool = False  # of tasks.py in place of the text: accuracy, not loss
    ngrams: bool = False  # the first row is what counting alone does


def mixer(name, **more):
    """A model with this mixer, which is its label, too."""
    return name, {"mixer": name, **more}


WIDE = {"ratio": 4}  # d_ff = 4 d_model, as usual with attention and in the paper
ATTENTION = mixer("attention", positions=True)
TAPS = "rotary attention with taps"
BEST_ATTENTION = (
    "attention with taps and our gate",
    {"mixer": f"{TAPS} and our gate", "larger": ("W_out",)},
)
BEST_CONVOLUTION = (
    "convolution with our gate",
    {"mixer": "gated convolution with our gate", "larger": ("W_in", "W_out")},
)
GRASSMANN = ("Grassmann", {})
NO_PRODUCT = ("no product, rank 64", {"mixer": "sum", "rank": 64})
UNIT = ("one per layer, normalised", {"taps": False, "normalize": True})
PAPER = {"block": "paper", "taps": False, "normalize": True, "positions": True, **WIDE}
SIX = {"offsets": ((1, 2, 4, 8, 12, 16),) * Config.n_layer}  # the paper's, all in every layer
TAPPED = ("six with taps, normalised", {"normalize": True, **SIX})
OURS = tuple(default_offsets(Config.n_layer, Config.context, True))
AVERAGED = ("our offsets, averaged", {"taps": False, "offsets": OURS})
MEMORY = ("with memory", {"memory": True})
BIVECTOR = {"mixer": "bivector memory"}
HYBRID = mixer("hybrid")
SMALL = {
    "vocab_size": tasks.VOCAB_SIZE,
    "context": 160,
    "batch_size": 8,
    "n_layer": 2,
    "d_model": 64,
    "rank": 16,
}
KEYS = SMALL | {"vocab_size": tasks.KEYS_VOCAB_SIZE, "context": 128, "iters": 1500}
CONTROLS = Question(
    1,
    "Grassmann or attention",
    "Which predicts text better at equal size, when attention has rotary positions, a short "
    "convolution (taps) before it, larger first weights, and our gate around it?",
    [
        ATTENTION,
        mixer("rotary attention", **WIDE),
        mixer(TAPS, **WIDE),
        ("the same, larger W_qkv", {"mixer": TAPS, "larger": ("W_qkv",), **WIDE}),
        ("narrow FFN, larger W_out", {"mixer": TAPS, "larger": ("W_out",)}),
        ("the same with a shortcut", {"mixer": f"{TAPS} and a shortcut", "larger": ("W_out",)}),
        ("our gate, usual first weights", {"mixer": f"{TAPS} and our gate"}),
        BEST_ATTENTION,
        mixer("gated convolution"),
        ("the same, larger W_in", {"mixer": "gated convolution", "larger": ("W_in",)}),
        BEST_CONVOLUTION,
        GRASSMANN,
        HYBRID,
    ],
    seeds=3,
    ngrams=True,
)
SUBWORDS = [BEST_ATTENTION, BEST_CONVOLUTION, GRASSMANN, ("the paper's model", PAPER)]


def on_bible(title, settings, more=(), **how):
    return Question(
        5,
        title,
        "Does the lead last as models grow, and as training does? On the King James Bible, "
        "which is four times as long.",
        [BEST_ATTENTION, BEST_CONVOLUTION, GRASSMANN, *more],
        settings,
        text=("bible", 0),
        **how,
    )


TENTH = {"n_layer": 3, "d_model": 64, "rank": 16}  # 0.1 million
OTHERS = ("no product, rank 32", {"mixer": "sum", "rank": 32}), HYBRID
LONGER = on_bible("0.1 million, 8,000 steps", TENTH | {"iters": 8000}, OTHERS, seeds=3)
MILLION = on_bible("1 million", {"n_layer": 5, "d_model": 144, "rank": 32})


def dispute(title, rates, text=None):
    """Offsets, size of the message, block: each as the paper has it, and not."""
    rows = [ATTENTION]
    for block, where in (("prenorm", ""), ("paper", ", paper's block")):
        for label, offsets, factor in (("one per layer", {}, 31), ("average of six", SIX, 76)):
            unit = UNIT[1] | offsets | {"block": block}
            rescaled = unit | {"mixer": f"rescaled by {factor}"}
            rows.append((f"{label}, normalised{where}", unit))
            rows.append((f"{label}, normalised x {factor}{where}", rescaled))
    return Question(
        10,
        title,
        "One offset per layer or the average of six; unit bivectors, or unit bivectors multiplied "
        "so that at first the message is about as long as without normalising, with one offset; "
        "two blocks. Rates in steps of the square root of 2.",
        rows,
        seeds=3,
        text=text,
        rates=rates,
        spacing=math.sqrt(2),
    )


QUESTIONS = [
    CONTROLS,
    Question(
        2,
        "Is it the geometry?",
        "Other features of a token and its partner, at equal size: other products, none at all; "
        "learned planes, which are determinants of dot products. And is the gate worth its "
        "parameters?",
        [
            GRASSMANN,
            NO_PRODUCT,
            mixer("symmetric product"),
            mixer("outer product"),
            mixer("wedge without a gate"),
            ("the same with a shortcut", {"mixer": "wedge with a shortcut"}),
            mixer("learned planes", rank=64),
        ],
        seeds=3,
    ),
    Question(
        3,
        "The paper's layer",
        "One offset per layer, or all in every layer, averaged or with taps? Normalised "
        "or not? In the paper's block?",
        [
            BEST_ATTENTION,
            ("the paper's model", PAPER),
            UNIT,
            ("one offset per layer", {"taps": False}),
            ("average of six, normalised", UNIT[1] | SIX),
            TAPPED,
            AVERAGED,
            GRASSMANN,
        ],
        seeds=3,
    ),
    *(
        Question(
            4,
            f"A second text, dropout {dropout:g}",
            "Python's documentation, which is read 3.7 times, at the rates of the first text.",
            [ATTENTION, BEST_ATTENTION, BEST_CONVOLUTION, GRASSMANN, NO_PRODUCT],
            {"dropout": dropout},
            text=(None, 0),
            rates_of=CONTROLS,
            seeds=3,
        )
        for dropout in (0.0, 0.1)
    ),
    on_bible("0.1 million", TENTH, seeds=3),
    on_bible("0.3 million", {"n_layer": 4, "d_model": 96, "rank": 20}),
    MILLION,
    LONGER,
    on_bible(
        "0.1 million, 32,000 steps, rates of 8,000",
        TENTH | {"iters": 32_000, "eval_every": 500},
        OTHERS,
        rates_of=LONGER,
        seeds=(3, 1, 3, 1, 1),
    ),
    on_bible(
        "1 million, 8,000 steps, rates of 2,000",
        MILLION.settings | {"iters": 8000},
        rates_of=MILLION,
    ),
    Question(
        6,
        "Subwords: 1,024 byte pairs",
        "The paper's regime: what of this holds on pieces of words?",
        SUBWORDS,
        text=("shakespeare", 1024),
        seeds=3,
    ),
    Question(
        6,
        "Subwords: 4,096 byte pairs",
        "On the King James Bible.",
        [*SUBWORDS, TAPPED],
        text=("bible", 4096),
        seeds=3,
    ),
    Question(
        7,
        "Context 256",
        "With as many windows a step as at 64, at the rates of context 64.",
        [BEST_ATTENTION, GRASSMANN, MEMORY, HYBRID],
        {"context": 256},
        rates_of=CONTROLS,
        seeds=3,
    ),
    Question(
        8,
        "A far token",
        "How far back can an answer lie? Accuracy against distance, 12.5% by chance. Two layers, "
        "900 steps; the mean of five seeds, in brackets the lowest.",
        [
            (f"recall, {label}", changes | {"data": "recall", "lr": lr})
            for (label, changes), lr in (
                (ATTENTION, 2e-3),
                (GRASSMANN, 2e-3),
                (MEMORY, 1e-3),
                (MEMORY, 2e-3),
                (MEMORY, 3e-3),
            )
        ],
        SMALL | {"iters": 900},
        tasks=True,
        seeds=5,
    ),
    Question(
        9,
        "How much a memory holds",
        "2, 4, 8 or 16 keys, each under a name: which one is asked for? Guessing the most "
        "frequent: 56, 41, 32, 26%. Mean of three seeds, in brackets the lowest; 1,500 steps; "
        "sizes differ.",
        [
            (f"keys, {label}", changes | {"data": "keys"})
            for label, changes in (
                BEST_ATTENTION,
                ("with memory, rank 16", MEMORY[1]),
                ("with a bivector, rank 16", BIVECTOR),
                ("with a bivector, rank 23", BIVECTOR | {"rank": 23}),
            )
        ],
        KEYS,
        same_size=False,
        tasks=True,
        seeds=3,
        rates=(1e-3, 2e-3, 4e-3),
    ),
    dispute("The dispute", (2.83e-3, 4e-3, 5.66e-3)),
    dispute(
        "The dispute in subwords: 4,096 byte pairs", (2e-3, 2.83e-3, 4e-3), text=("bible", 4096)
    ),
]

# ---- one run -------------------------------------------------------------------------------------


class Trial:
    """A run from its settings. Its result depends only on `spec`: Trial(spec) is the run again."""

    def __init__(self, settings):
        settings = dict(settings)
        ratio = settings.pop("ratio", None)
        if ratio:
            settings["d_ff"] = ratio * settings.get("d_model", Config.d_model)
        self.config = Config(**known(Config, settings))
        training = Training(**known(Training, settings))
        warmup = min(training.warmup_iters, training.iters // 10)  # short runs reach the peak, too
        self.training = replace(training, warmup_iters=warmup)
        everything = settings | asdict(self.config) | asdict(self.training)
        for name in ("memory", "larger"):  # as in runs from before these settings existed
            if not everything.get(name):
                everything.pop(name, None)
        self.spec = dict(sorted(everything.items()))


def known(kind, settings):
    """The settings that a dataclass has fields for."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in settings.items() if name in names}


def count_params(trial):
    return sum(math.prod(shape) for shape in param_shapes(trial.config).values())


def matched(trial, target):
    """The trial with a model of about `target` parameters.

    First d_model becomes the multiple of n_head that comes closest, with the same ratio d_ff /
    d_model. Then d_ff takes the rest: one more is N (2 d_model + 1) parameters.
    """
    ratio = trial.config.d_ff // trial.config.d_model
    n_head = trial.config.n_head

    def sized(d_model):
        return Trial(trial.spec | {"d_model": d_model, "d_ff": ratio * d_model})

    d_model = n_head
    while count_params(sized(d_model + n_head)) <= target:
        d_model += n_head
    smaller = sized(d_model)
    larger = sized(d_model + n_head)
    missing = target - count_params(smaller)
    best = larger if count_params(larger) - target < missing else smaller
    unit = best.config.n_layer * (2 * best.config.d_model + 1)
    more = round((target - count_params(best)) / unit)
    return Trial(best.spec | {"d_ff": max(1, best.config.d_ff + more)})


def learner(trial, text, threads=1):
    """The model before its first step. All models with this data and seed read the same batches."""
    task = tasks.TASKS.get(trial.spec["data"])

    def batch(step):
        rng = np.random.default_rng((trial.training.seed, step))
        x, y, _ = task(rng, trial.training.batch_size, trial.config.context)
        return x, y

    source = batch if task else text.train
    new = Learner(trial.config, trial.training, source, threads)
    mixers.scale_features(new.params)
    larger = trial.spec.get("larger", ())
    for name in new.params:
        if name.split(".")[-1] in larger:
            new.params[name] /= 0.02 * math.sqrt(trial.config.d_model)
    return new


def evaluate(trial, text, params, test, most=None):
    """The validation loss, or the test loss, on at most `most` tokens.

    For a task, the list that `accuracy` returns.
    """
    name = trial.spec["data"]
    if name in tasks.TASKS:
        never_trained_on = trial.training.iters + test
        rng = np.random.default_rng((trial.training.seed, never_trained_on))
        x, y, group = tasks.TASKS[name](rng, 512, trial.config.context)
        return tasks.accuracy(params, trial.config, x, y, group, tasks.GROUPS[name])
    tokens = text.test if test else text.val
    return grassmann.validation_loss(params, trial.config, tokens[:most])


def train(what):
    """Train a label's trial on a text, on one thread. Returns a line of runs.jsonl.

    Its curve is a [step, what `evaluate` says] now and then, on the first part of a long text. The
    last is at the end. A loss that is not finite ends a run early.
    """
    label, trial, text = what
    new = learner(trial, text)
    iters = trial.training.iters
    curve = []
    for step in range(1, iters + 1):
        last = not math.isfinite(new.step()) or step == iters
        if last or step % trial.spec["eval_every"] == 0:
            curve.append([step, evaluate(trial, text, new.params, False, ON_THE_WAY)])
        if last:
            break
    return {
        "label": label,
        "spec": trial.spec,
        "parameters": count_params(trial),
        "curve": curve,
        "validation": evaluate(trial, text, new.params, False),
        "bytes_per_token": text.bytes_per_token,
        "test": evaluate(trial, text, new.params, True),
    }


def train_all(todo, jobs):
    """Yields results as they come. After an error or Ctrl-C no process is left.

    If the system kills a process because memory is full, this waits for ever. Then press Ctrl-C,
    and use fewer --jobs.
    """
    if jobs == 1:
        yield from map(train, todo)
        return
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers leave Ctrl-C to this process
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        signal.signal(signal.SIGINT, usual)
        yield from pool.imap_unordered(train, todo)


# ---- the answers ---------------------------------------------------------------------------------


def digest(spec):
    document = json.dumps(spec, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()[:16]


@dataclass
class Row:
    label: str  # of a model in a table
    results: list[dict]  # its lines of runs.jsonl, one per seed
    ms: float = math.nan  # of a step


def final(result, test=True):
    """The result of a run, smaller is better: the final test or validation loss.

    inf if the run diverged. For a task, minus the accuracy.
    """
    step, value = result["curve"][-1]
    value = result["test"] if test else result.get("validation", value)
    if isinstance(value, list):
        return -np.nanmean(value)
    finished = step == result["spec"]["iters"] and math.isfinite(value)
    return value if finished else math.inf


def best_lr(ask, rates, spacing=2.0, enough=-math.inf):
    """The best learning rate.

    If it is the smallest or the largest rate so far, one more is tried beyond it, unless its loss
    is good `enough`. ask(lr) returns a run, or None if the run is missing. Then the best is None,
    too.
    """
    runs = {lr: ask(lr) for lr in rates}
    while all(runs.values()):
        losses = {lr: final(run, test=False) for lr, run in runs.items()}
        best = min(runs, key=losses.get)
        smallest = best == min(runs)
        inside = not smallest and best != max(runs)
        if inside or not 1e-4 < best < 0.1 or losses[best] <= enough:
            return best
        beyond = best / spacing if smallest else best * spacing
        other = float(f"{beyond:.3g}")
        runs[other] = ask(other)
    return None


class Laboratory:
    """What all questions share: texts, finished runs, and missing runs that were asked for.

    Finished runs are lines of a file. They are found by the digest of their spec. Raises UserError
    and OSError.
    """

    def __init__(self, path, data=None):
        self.path = path
        self.data = data
        self.texts = {}
        self.finished = {}
        self.missing = {}
        path.touch()
        for k, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                result = json.loads(line)
                self.finished[digest(result["spec"])] = result
            except (ValueError, LookupError, TypeError):
                raise UserError(f"{path}: line {k} is damaged, delete it") from None

    def text(self, question):
        which = question.text or (self.data, 0)
        if which not in self.texts:
            context = question.settings.get("context", Config.context)
            self.texts[which] = read_text(*which, context)
        return self.texts[which]

    def ask(self, question, label, changes, **more):
        """The run of a question's model, as large as its other models. None if it is missing."""
        text = self.text(question)
        settings = BASE | question.settings
        of_text = {
            "data": text.sha256,
            "vocab_size": text.vocab_size,
            "eval_every": max(1, settings["iters"] // 10),
        }
        settings = BASE | of_text | question.settings | more
        trial = Trial(settings | changes)
        if question.same_size:
            trial = matched(trial, count_params(Trial(settings)))
        key = digest(trial.spec)
        if key not in self.finished:
            self.missing.setdefault(key, (label, trial, text))
        return self.finished.get(key)

    def rate(self, question, label, changes):
        """The best learning rate in runs of full length, with one seed."""
        question = question.rates_of or question

        def search(lr):
            return self.ask(question, f"{label}, lr {lr:g}", changes, lr=lr)

        enough = -0.99 if question.tasks else -math.inf
        return best_lr(search, question.rates, question.spacing, enough)

    def answer(self, question):
        """Ask for the runs of a question: first learning rates, then the runs with the best rates.

        Returns rows of finished runs.
        """
        rows = []
        seeds = np.broadcast_to(question.seeds, len(question.models))
        for (label, changes), n in zip(question.models, seeds, strict=True):
            lr = changes.get("lr") or self.rate(question, label, changes)
            if lr:
                asked = []
                for seed in range(n):
                    name = f"{label}, seed {seed}"
                    asked.append(self.ask(question, name, changes, lr=lr, seed=seed))
                finished = [run for run in asked if run]
                if finished:
                    rows.append(Row(label, finished))
        return rows

    def counting(self, question):
        """The n-gram of the best order, in the networks' windows, as a run."""
        text = self.text(question)
        window = question.settings.get("context", Config.context)
        spec = {"data": text.sha256, "ngrams": True, "iters": 1, "window": window}
        key = digest(spec)
        if key not in self.finished:
            order, val, test = best_ngram(text, window)
            result = {
                "label": f"{order}-gram, counted",
                "spec": spec,
                "curve": [[1, val]],
                "test": test,
                "bytes_per_token": text.bytes_per_token,
            }
            self.add(result)
        result = self.finished[key]
        return Row(result["label"], [result])

    def train_missing(self, jobs):
        """Train the missing runs, `jobs` runs at a time, and save them."""
        todo = [*self.missing.values()]
        self.missing.clear()
        n = len(todo)
        jobs = min(jobs, n)
        print(f"{n} {'run' if n == 1 else 'runs'} to train, {jobs} at a time", flush=True)
        with closing(train_all(todo, jobs)) as results:
            for k, result in enumerate(results, 1):
                self.add(result)
                print(f"{k} of {n}: {result['label']}", flush=True)

    def add(self, result):
        """Save a finished run."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.finished[digest(result["spec"])] = result


def add_times(rows, text, path):
    """Add the milliseconds of a step from a file.

    If they are missing, and the file is from this machine, measure.
    """
    specs = [row.results[0]["spec"] for row in rows]
    key = digest(specs)
    known = read_times(path)
    if key not in known["ms"] and known["machine"] == machine():
        threads = len(processes.available_cores())
        runs = {k: learner(Trial(spec), text, threads).step for k, spec in enumerate(specs)}
        times = alternate(runs, 10, 3)
        known["ms"][key] = [1e3 * median(seconds) for seconds in times.values()]
        path.write_text(json.dumps(known), encoding="utf-8")
    for row, ms in zip(rows, known["ms"].get(key, []), strict=False):
        row.ms = ms


def read_times(path):
    """{"machine": …, "ms": {…}} from the file, or without times if there is no file."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"machine": machine(), "ms": {}}


# ---- tables and figures --------------------------------------------------------------------------


def mean_and_deviation(row):
    """Of the test loss, over the seeds. The deviation of one seed, or a diverged run, is nan."""
    losses = [final(run) for run in row.results]
    known = len(losses) > 1 and max(losses) < math.inf
    return fmean(losses), stdev(losses) if known else math.nan


def loss_table(question, rows, counted=None):
    """One line per model. Gaps are those to the first model that was trained.

    A gap below two standard deviations of the difference of two runs is level.
    """
    unit = "token" if question.text and question.text[1] else "character"
    first, spread = mean_and_deviation(rows[0])
    if first == math.inf:
        first = math.nan  # no gap to that
    table = []
    for row in [counted, *rows] if counted else rows:
        loss, deviation = mean_and_deviation(row)
        result = row.results[0]
        validation = fmean(final(run, test=False) for run in row.results)
        bits = loss / math.log(2) / result.get("bytes_per_token", 1)
        line = {
            "model": row.label,
            "learning rate": "",
            "seeds": "",
            f"test loss, nats per {unit}": f"{loss:.3f}",
            "bits per byte": f"{bits:.3f}",
            "validation": f"{validation:.3f}",
            "parameters": "",
            "ms per step": "" if math.isnan(row.ms) else f"{row.ms:.1f}",
            f"gap to {rows[0].label}": "",
        }
        if row is not counted:
            line["learning rate"] = f"{result['spec']['lr']:g}"
            line["seeds"] = len(row.results)
            line["parameters"] = f"{result['parameters']:,}"
        if not math.isnan(deviation):
            line[f"test loss, nats per {unit}"] += f" ± {deviation:.3f}"
        if row is not rows[0]:
            level = abs(loss - first) < 2 * math.hypot(deviation, spread)
            gap = f"{100 * np.expm1(loss - first):+.1f}%"
            line[f"gap to {rows[0].label}"] = gap + ", level" if level else gap
        table.append(line)
    return table


EXPLANATION = (
    f"Unless a question says otherwise: {BASE['iters']:,} steps of "
    f"{Training.batch_size * Config.context:,} tokens, no dropout (so short a run does not "
    "overfit), models of one size. Nine tenths of a text are trained on. Of the rest the first "
    "half (validation) chooses learning rates and the order of the n-gram, and the second half "
    f"(test) is what is reported. Learning rates: the best of {LEARNING_RATES[0]:g} and "
    f"{LEARNING_RATES[1]:g} in runs of full length, of one seed; while it is the smallest or the "
    "largest tried, half or twice of it is tried, too. A loss is the mean over the seeds ± their "
    "standard deviation; inf: diverged. Gap: how much higher the perplexity per token is; level: "
    "below two standard deviations of such a difference. Milliseconds: medians on all cores, by "
    "turns; what is not in grassmann.py is not written for speed."
)


def report(lab, answers, timed_on):
    """compare.md"""
    command = shlex.join(["python", "-m", "experiments.compare", *sys.argv[1:]])
    parts = ["# Does geometry replace attention?", f"`{command}`", f"{timed_on}.", EXPLANATION]
    for question, rows in answers:
        asks = question.asks
        if question.tasks:
            table = tasks.table(rows)
        else:
            counted = lab.counting(question) if question.ngrams else None
            table = loss_table(question, rows, counted)
            text = lab.text(question)
            asks += f" {text.name}: {len(text.train):,} tokens to train on."
        parts += [f"## {question.number}. {question.title}", asks, markdown(table)]
    return "\n\n".join(parts) + "\n"


def plot(path, answers):
    """Left, the losses of a table, a dot per run. Right, the validation loss against seconds."""
    ((question, rows),) = answers
    figure = Figure(figsize=(12, 1.2 + 0.3 * max(6, len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, row in enumerate(rows):
        color = colormaps["turbo"]((k + 0.5) / len(rows))
        losses = [final(run) for run in row.results]
        left.plot(losses, [k] * len(losses), "o", alpha=0.7, color=color)
        steps, losses = np.transpose(row.results[0]["curve"])
        right.plot(steps * row.ms / 1e3, losses, lw=1, label=row.label, color=color)
    left.set_title(f"{question.number}. {question.title}")
    left.set_xlabel("test loss, nats; a dot per seed")
    left.set_yticks(range(len(rows)), [row.label for row in rows])
    left.invert_yaxis()
    right.set(xlabel="seconds of training", ylabel="validation loss, nats")
    right.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def plot_sizes(path, answers):
    """Left, test losses against parameters after the fewest steps.

    Right, validation losses along the longest runs, less those of the first model.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    iters = [question.settings.get("iters", BASE["iters"]) for question, _ in answers]
    first = None
    for longest, (_, rows) in zip(iters, answers, strict=True):
        for k, row in enumerate(rows):
            if longest == min(iters):
                loss, _ = mean_and_deviation(row)
                left.semilogx(row.results[0]["parameters"], loss, "o", color=f"C{k}")
            if longest == max(iters):
                steps, losses = np.transpose([run["curve"] for run in row.results]).mean(-1)
                if first is None:
                    first = losses
                right.plot(steps, losses - first, color=f"C{k}", label=row.label)
    left.set_title(f"after {min(iters):,} steps")
    left.set(xlabel="parameters", ylabel="test loss, nats per character")
    right.set_title("0.1 million parameters")
    right.set(xlabel="steps", ylabel="validation loss minus attention's", ylim=(-0.1, 0.06))
    right.legend(loc="lower right")
    figure.savefig(path, dpi=110)


# ---- the program ---------------------------------------------------------------------------------


def compare(args):
    """Answer the questions. Raises UserError and OSError."""
    require(args.jobs >= 0, f"--jobs must be 0 or more, not {args.jobs}")
    asked = [question for question in QUESTIONS if question.number in args.only]
    args.out.mkdir(parents=True, exist_ok=True)
    lab = Laboratory(args.out / "runs.jsonl", args.data)
    answers = [(question, lab.answer(question)) for question in asked]
    while lab.missing and args.jobs:  # first learning rates, then runs that depend on them
        lab.train_missing(args.jobs)
        answers = [(question, lab.answer(question)) for question in asked]
    answers = [(question, rows) for question, rows in answers if rows]
    times = args.out / "timing.json"
    for question, rows in answers:
        if not question.tasks:
            add_times(rows, lab.text(question), times)
    text = report(lab, answers, read_times(times)["machine"])
    (args.out / "compare.md").write_text(text, encoding="utf-8")
    with rc_context({"axes.grid": True, "grid.alpha": 0.3}):
        for number, draw in ((1, plot), (5, plot_sizes), (7, plot)):
            group = [answer for answer in answers if answer[0].number == number]
            if group:
                draw(args.out / f"compare_{number}.png", group)
    print(text)
    written = sorted(path.name for path in args.out.glob("compare*"))
    print(f"written to {args.out}: {', '.join(written)}")


def main():
    command_line.plain_output()
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--data", help="a UTF-8 text file, or 'shakespeare' (default: Python's own documentation)")
    add("--out", type=Path, default="compare", help="folder to write into (default: compare)")
    numbers = sorted({question.number for question in QUESTIONS})
    add(
        "--only",
        type=int,
        choices=numbers,
        default=numbers,
        nargs="+",
        metavar="QUESTION",
        help=f"some of 1 to {numbers[-1]}",
    )
    add(
        "--jobs",
        type=int,
        default=len(processes.available_cores()),
        help="runs at a time, which changes no result (default: one per core); 0: trains nothing",
    )
    args = parser.parse_args()
    stopped = f"\nstopped; what is finished is in {args.out}, the same command goes on from there\n"
    with command_line.short_errors(parser, args.out, stopped=stopped):
        compare(args)


if __name__ == "__main__":
    main()
