"""Does geometry replace attention? Both, and variants of both, trained on one text under the same conditions.

  python compare.py --quick                     questions 1, 3 and 5, one seed: about a quarter of an hour on two cores
  python compare.py                             all questions, three seeds, full length: some hours, unattended
  python compare.py --only 3 4                  some of the questions
  python compare.py --data shakespeare          on Tiny Shakespeare

The same for every model of a question: the number of parameters (within 2%), the batches and their order,
the optimiser, the schedule, the number of tokens, and the validation (grassmann.validation_loss). Every model
gets the learning rate that is best for it in short runs, without which no comparison is fair.

Writes into --out: compare.md (the tables), compare.png (the curves), compare_recall.png (question 6), and one
file per finished run in runs/. It resumes after an interruption and runs what is missing; other settings or
another text are other runs. (It can't know that grassmann.py itself has changed: then choose another --out.)
"""

import cpu  # noqa: I001  (before NumPy)

import hashlib
import itertools
import json
import math
import os
import time
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import grassmann
from grassmann import Array, Config, pairs, param_shapes
from runs import MODEL_DEFAULTS, PACE_DEFAULTS, resolved
from sample import Parser, leave_quietly, number, plain_output
from text import encode, load_text, vocabulary

BASE = MODEL_DEFAULTS | PACE_DEFAULTS | {"product": "wedge"}  # what train_char.py trains; questions override some of it
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # tried first, see best_lr
QUICK_STEPS = 1200

# ---- the questions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Models to compare with each other: (label, what differs from train_char.py's defaults), attention first."""

    number: int
    title: str
    asks: str
    rows: list[tuple[str, dict]]
    size: dict = field(default_factory=dict)  # what differs for all of them, and sets the number of parameters
    large: bool = False  # one seed, and not in the quick set


ATTENTION = ("attention", {"mixer": "attention", "positions": True})
GRASSMANN = ("Grassmann", {})
SIX = ((1, 2, 4, 8, 12, 16),) * BASE["n_layer"]  # the paper's offsets, all of them in every layer
QUICK_QUESTIONS = (1, 3, 5)
QUESTIONS = [
    Question(1, "Grassmann or attention", "Which predicts text better, at equal size and at equal time?",
             [ATTENTION, GRASSMANN], {"d_model": 144}),  # 0.8M parameters
    Question(1, "Grassmann or attention, five times larger", "Is it the same with more layers, width and context?",
             [ATTENTION, GRASSMANN], {"n_layer": 6, "d_model": 256, "context": 128, "dropout": 0.1}, large=True),
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
]  # fmt: skip

# Question 6 has tasks of its own, see `recall` and `brackets`.
FAR = ((1, 2, 3, 4), (4, 8, 12, 16), (16, 32, 48, 64), (64, 128))  # reaches every distance up to 212
RECALL_SIZE = {"context": 256, "n_layer": 4, "d_model": 64, "rank": 16, "batch_size": 8, "iters": 2000}
RECALL_ROWS = (ATTENTION, GRASSMANN, ("Grassmann, far offsets", {"offsets": FAR}))

# ---- products in place of the wedge -------------------------------------------------------------------


def symmetric_forward(u: Array, v: Array) -> tuple[Array, tuple]:
    """p_ij = u_i v_j + u_j v_i for i < j: as many numbers as the wedge, but u and v may be exchanged; (..., n)."""
    i, j = pairs(u.shape[-1])
    return u[..., i] * v[..., j] + u[..., j] * v[..., i], (u, v)


def symmetric_backward(dp: Array, cache: tuple) -> tuple[Array, Array]:
    """Let S be the symmetric matrix with S_ij = S_ji = dp_ij and zeros on the diagonal: Σ dp_ij p_ij = uᵀ S v,

    so du = S v, dv = S u.
    """
    u, v = cache
    i, j = pairs(u.shape[-1])
    S = np.zeros((*u.shape, u.shape[-1]), dp.dtype)
    S[..., i, j] = S[..., j, i] = dp
    return (S @ v[..., None])[..., 0], (S @ u[..., None])[..., 0]


def padded(p: Array, r: int) -> Array:
    """p (..., k) with zeros after it, to the n = r(r-1)/2 coordinates that W_plu expects.

    Rows of W_plu that meet only zeros do nothing and learn nothing: `count_params` leaves them out, and
    `matched` gives the model as many others, so a product with fewer coordinates has a wider model around it.
    """
    out = np.zeros((*p.shape[:-1], r * (r - 1) // 2), p.dtype)
    out[..., : p.shape[-1]] = p
    return out


def elementwise_forward(u: Array, v: Array) -> tuple[Array, tuple]:
    """p_i = u_i v_i, then zeros."""
    return padded(u * v, u.shape[-1]), (u, v)


def elementwise_backward(dp: Array, cache: tuple) -> tuple[Array, Array]:
    """du_i = dp_i v_i,  dv_i = dp_i u_i; what arrives at the zeros ends there."""
    u, v = cache
    dp = dp[..., : u.shape[-1]]
    return dp * v, dp * u


def concatenation_forward(u: Array, v: Array) -> tuple[Array, int]:
    """p = [u ; v], then zeros: no product, each vector by itself."""
    r = u.shape[-1]
    return padded(np.concatenate([u, v], -1), r), r


def concatenation_backward(dp: Array, r: int) -> tuple[Array, Array]:
    """du and dv are the first and the second r numbers of dp."""
    return dp[..., :r], dp[..., r : 2 * r]


PRODUCTS = {  # forward, backward, coordinates that are used
    "wedge": (grassmann.plucker_forward, grassmann.plucker_backward, lambda r: r * (r - 1) // 2),
    "symmetric": (symmetric_forward, symmetric_backward, lambda r: r * (r - 1) // 2),
    "elementwise": (elementwise_forward, elementwise_backward, lambda r: r),
    "concatenation": (concatenation_forward, concatenation_backward, lambda r: 2 * r),
}


@contextmanager
def multiply_by(name: str) -> Iterator[None]:
    """Within the `with` block, in all threads, models multiply by this product instead of the wedge."""
    before = grassmann.plucker_forward, grassmann.plucker_backward
    grassmann.plucker_forward, grassmann.plucker_backward, _ = PRODUCTS[name]
    try:
        yield
    finally:
        grassmann.plucker_forward, grassmann.plucker_backward = before


# ---- models of equal size -----------------------------------------------------------------------------


def model(settings: dict, vocab_size: int) -> Config:
    """The configuration that train_char.py would make of these settings."""
    s = resolved(settings)
    return Config(vocab_size, **{f.name: s[f.name] for f in fields(Config) if f.name in s})


def count_params(config: Config, product: str = "wedge") -> int:
    """Parameters that do something: all of them but the rows of W_plu for which the product has no coordinate."""
    total = sum(math.prod(shape) for shape in param_shapes(config).values())
    if config.mixer == "attention":
        return total
    idle = config.rank * (config.rank - 1) // 2 - PRODUCTS[product][2](config.rank)
    return total - config.n_layer * idle * config.d_model


def matched(config: Config, target: int, product: str = "wedge") -> Config:
    """The same model, as wide as `target` parameters allow.

    d_model becomes the multiple of n_head that comes closest while the feed-forward network keeps its usual
    ratio of d_ff to d_model; d_ff then makes up for the rest, at N (2 d_model + 1) parameters a unit.
    """
    ratio = config.d_ff // config.d_model
    widths = range(config.n_head, math.isqrt(target) + config.n_head, config.n_head)
    sizes = [replace(config, d_model=d, d_ff=ratio * d) for d in widths]
    best = min(sizes, key=lambda size: abs(count_params(size, product) - target))
    rest = target - count_params(best, product)
    return replace(best, d_ff=max(1, best.d_ff + round(rest / (best.n_layer * (2 * best.d_model + 1)))))


# ---- one run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    out: Path
    threads: int
    quick: bool
    seeds: int
    iters: int
    text: str  # its SHA-256
    vocab_size: int
    train_tokens: Array
    val_tokens: Array


def train(label: str, spec: dict, config: Config, batch: Callable, evaluate: Callable) -> dict:
    """Train as train_char.py does: {"parameters", "tokens_per_step", "curve"}.

    The curve has a [step, seconds, evaluate(params)] every spec["eval_every"] steps and at the end; the
    seconds are those of training alone. A loss that is not finite ends the run.
    """
    params = grassmann.init_params(config, spec["seed"])
    optimizer, curve, seconds = grassmann.adamw_init(params), [], 0.0
    how = {"weight_decay": spec["weight_decay"]}
    bar = tqdm(range(spec["iters"]), label, unit="step", disable=None, dynamic_ncols=True)
    with bar, multiply_by(spec["product"]):
        for step in bar:
            started = time.perf_counter()
            x, y = batch(step)
            lr = grassmann.learning_rate(step, spec["iters"], spec["lr"], spec["lr"] / 10, spec["warmup_iters"])
            loss, grads = grassmann.loss_and_grads(params, config, x, y, (spec["seed"], step), spec["threads"])
            if spec["grad_clip"]:
                grassmann.clip_grads(grads, spec["grad_clip"])
            grassmann.adamw_step(params, grads, optimizer, step, lr, **how)
            seconds += time.perf_counter() - started
            last = step + 1 == spec["iters"] or not math.isfinite(loss)
            if last or (step + 1) % spec["eval_every"] == 0:
                curve.append([step + 1, seconds, evaluate(params)])
            if last:
                break
    return {"parameters": count_params(config, spec["product"]), "tokens_per_step": x.size, "curve": curve}


def finished(study: Study, label: str, spec: dict, config: Config, batch: Callable, evaluate: Callable) -> dict:
    """The run that `spec` describes in full: from its file, or trained now and written to it."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    path = study.out / "runs" / f"{digest}.json"
    if not path.exists():
        document = json.dumps({"label": label, "spec": spec, **train(label, spec, config, batch, evaluate)})
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(document)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged; delete it, and its run is repeated") from None


def make_spec(study: Study, settings: dict, overrides: dict, vocab_size: int, data: str) -> tuple[dict, Config]:
    """A run in full, and its configuration: as many parameters as the model of `settings` has."""
    s = settings | overrides
    config = matched(model(s, vocab_size), count_params(model(settings, vocab_size)), s["product"])
    warmup = min(s["warmup_iters"], s["iters"] // 10)  # the short runs too have a peak
    return {**s, **asdict(config), "warmup_iters": warmup, "data": data, "threads": study.threads}, config


def text_run(study: Study, label: str, settings: dict, overrides: dict) -> dict:
    """A model trained on the text; the curve holds validation losses."""
    s, config = make_spec(study, settings, overrides, study.vocab_size, study.text)
    return finished(
        study, label, s, config,
        batch=lambda step: grassmann.get_batch(study.train_tokens, s["batch_size"], s["context"], s["seed"], step),
        evaluate=lambda params: grassmann.validation_loss(params, config, study.val_tokens, study.threads),
    )  # fmt: skip


def final(run: dict) -> float:
    """The validation loss at the end of a run, infinite if it diverged."""
    step, _, loss = run["curve"][-1]
    return loss if step == run["spec"]["iters"] and math.isfinite(loss) else math.inf


def best_lr(study: Study, label: str, settings: dict, overrides: dict) -> float:
    """The best of LEARNING_RATES after a tenth of the steps. While it is the smallest or the largest so far,
    one more is tried beyond it.

    In the quick set only the plain model of each mixer is tried, and its variants take its learning rate;
    a tenth of so few steps says little, so there it is a quarter.
    """
    if study.quick:
        label, overrides = ATTENTION if overrides.get("mixer") == "attention" else GRASSMANN
    iters = max(1, study.iters // (4 if study.quick else 10))

    def loss(lr: float) -> float:
        how = {"lr": lr, "iters": iters, "eval_every": iters, "seed": 0}
        return final(text_run(study, f"{label}, lr {lr:g}", settings, overrides | how))

    losses = {lr: loss(lr) for lr in LEARNING_RATES}
    while (best := min(losses, key=losses.get)) in (min(losses), max(losses)) and 1e-4 < best < 0.1:
        beyond = best / 2 if best == min(losses) else best * 2
        losses[beyond] = loss(beyond)
    return best


# ---- the answers --------------------------------------------------------------------------------------

Answer = namedtuple("Answer", "label lr runs")  # one line of a table: a model, a run per seed


def answer(study: Study, question: Question) -> list[Answer]:
    """Train what a question needs."""
    answers, settings = [], BASE | question.size
    for label, overrides in question.rows:
        lr = best_lr(study, label, settings, overrides)
        how = {"lr": lr, "iters": study.iters, "eval_every": max(1, study.iters // (8 if study.quick else 20))}
        seeds = range(1 if question.large else study.seeds)
        runs = [text_run(study, f"{label}, seed {s}", settings, overrides | how | {"seed": s}) for s in seeds]
        answers.append(Answer(label, lr, runs))
    return answers


def markdown(rows: list) -> str:
    """A table from its rows, the first of which is the heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def loss_at(seconds: float, run: dict) -> float:
    """A run's validation loss after so many seconds of training; nan before its first validation."""
    _, times, losses = zip(*run["curve"], strict=True)
    return float(np.interp(seconds, times, losses, left=math.nan))


def table(answers: list[Answer]) -> str:
    """One line per model, means over its runs; the first answer is attention's."""
    whole = [run for a in answers for run in a.runs if final(run) < math.inf]
    deadline = min((run["curve"][-1][1] for run in whole), default=math.nan)
    attention = fmean(map(final, answers[0].runs))
    attention = attention if attention < math.inf else math.nan  # no gap to that
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
            "ms per step": f"{fmean(1e3 * run['curve'][-1][1] / run['curve'][-1][0] for run in a.runs):.1f}",
            "loss at equal time": f"{fmean(loss_at(deadline, run) for run in a.runs):.3f}",
            "gap to attention": "" if a is answers[0] else f"{100 * np.expm1(loss - attention):+.1f}%",
        }
        rows.append(cells)
    return markdown([list(rows[0]), *(row.values() for row in rows)])


EXPLANATION = """{train:,} characters to train on, {val:,} to validate, {vocab} different ones; {iters:,} steps of \
{batch} windows; {threads} threads. Losses are means over the seeds, then the lowest and the highest; inf: diverged. \
Learning rates: the best {search}. Loss at equal time: what the validation loss was, interpolated, when the fastest \
run of the table had finished. Gap to attention: how much higher the perplexity per character is. Parameters: those \
that act. Products in place of the wedge are not written for speed."""


def report(study: Study, answers: list[tuple[Question, list[Answer]]], recalled: list[dict]) -> str:
    """compare.md"""
    tuned = "at a quarter of the steps, for the plain model of each mixer" if study.quick else "at a tenth of the steps"
    parts = ["# Does geometry replace attention?", EXPLANATION.format(
        train=len(study.train_tokens), val=len(study.val_tokens), vocab=study.vocab_size, iters=study.iters,
        batch=BASE["batch_size"], threads=study.threads, search=tuned,
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
    """compare.png: for every question the validation loss against tokens and against seconds, a line per run."""
    figure = Figure(figsize=(12, 3.6 * len(answers)), layout="constrained")
    for (question, rows), (left, right) in zip(answers, figure.subplots(len(answers), 2, squeeze=False), strict=True):
        for k, a in enumerate(rows):
            for run in a.runs:
                steps, seconds, losses = zip(*run["curve"], strict=True)
                style = {"color": f"C{k}", "marker": ".", "lw": 1, "label": a.label if run is a.runs[0] else None}
                left.plot(np.array(steps) * run["tokens_per_step"] / 1e6, losses, **style)
                right.plot(seconds, losses, **style)
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


def recall_run(study: Study, label: str, task: str, overrides: dict) -> dict:
    """A model trained on a task; the curve is one point, the accuracies at the end."""
    settings = BASE | RECALL_SIZE | {"seed": 0, "eval_every": RECALL_SIZE["iters"]}
    s, config = make_spec(study, settings, overrides, TOKENS, task)

    def draw(step: int, batch: int) -> tuple[Array, Array, Array]:
        return TASKS[task](np.random.default_rng((s["seed"], step)), batch, s["context"])

    return finished(
        study, label, s, config,
        batch=lambda step: draw(step, s["batch_size"])[:2],
        evaluate=lambda params: accuracy(params, config, *draw(s["iters"], 512)),  # a step that is never trained
    )  # fmt: skip


def answer_recall(study: Study) -> list[dict]:
    """The best run of every model on every task. Such a task is often learned all at once, after a long time
    of nothing, so that short runs would not tell the learning rates apart: all run to the end.
    """
    results = []
    for task, (label, overrides) in itertools.product(TASKS, RECALL_ROWS):
        runs = [recall_run(study, f"{task}, {label}, lr {lr:g}", task, overrides | {"lr": lr}) for lr in LEARNING_RATES]
        best = max(runs, key=lambda run: np.nanmean(run["curve"][-1][2]))
        spec, accuracies = best["spec"], best["curve"][-1][2]
        result = {"task": task, "label": label, "lr": spec["lr"], "reach": reach(spec["offsets"])}
        results.append(result | {"accuracy": accuracies})
    return results


def plot_recall(path: Path, results: list[dict]) -> None:
    """compare_recall.png: accuracy against distance, and how far the Grassmann models can see at all."""
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
        axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=110)


# ---- the program --------------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", help="a UTF-8 text file, or 'shakespeare' (default: Python's own documentation, pydoc_data.topics)")
    add("--out", type=Path, default=Path("compare"), help="folder for tables, figures and runs (default: compare)")
    add("--quick", action="store_true", help=f"one seed, {QUICK_STEPS:,} steps, questions 1, 3 and 5")
    add("--only", type=number(int, 1, 6), nargs="+", metavar="QUESTION", help="some of the questions 1 to 6")
    add("--seeds", type=number(int, 1, 1000), help="runs of every model (default: 3, with --quick 1)")
    add("--threads", type=number(int, 1, 1024), default=cpu.available_cores(), help="CPU threads (default: all cores)")
    return parser


def make_study(args) -> Study:
    """Read the text. Raises ValueError and OSError."""
    text = load_text(args.data)
    n_val, context = len(text) // 10, max((BASE | question.size)["context"] for question in QUESTIONS)
    if n_val < 2 or len(text) - n_val <= context:
        raise ValueError(f"the text has {len(text)} characters, a context of {context} needs {context * 10 // 9 + 20}")
    vocab = vocabulary(text)
    tokens = encode(text, vocab)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    return Study(
        args.out, args.threads, args.quick, args.seeds or (1 if args.quick else 3),
        min(QUICK_STEPS, BASE["iters"]) if args.quick else BASE["iters"],
        hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), len(vocab), tokens[:-n_val], tokens[-n_val:],
    )  # fmt: skip


def selected(args) -> list[Question]:
    """The questions that the options ask for, question 6 apart."""
    numbers = args.only or (QUICK_QUESTIONS if args.quick else range(1, 7))
    return [question for question in QUESTIONS if question.number in numbers and not (args.quick and question.large)]


def compare(args) -> None:
    """Answer the questions; the files are written anew after each. Raises ValueError and OSError."""
    study, answers, recalled = make_study(args), [], []

    def write() -> None:
        (args.out / "compare.md").write_text(report(study, answers, recalled), encoding="utf-8")

    for question in selected(args):
        print(f"{question.number}. {question.title}", flush=True)
        answers.append((question, answer(study, question)))
        write()
        plot(args.out / "compare.png", answers)
    if 6 in (args.only or []) or not (args.only or args.quick):
        recalled = answer_recall(study)
        write()
        plot_recall(args.out / "compare_recall.png", recalled)
    print(report(study, answers, recalled))
    print(f"written to {args.out}: " + ", ".join(sorted(p.name for p in args.out.glob("compare*"))))


def main() -> None:
    plain_output()
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # overflow: a run that diverges is reported as such
    parser = build_parser()
    args = parser.parse_args()
    try:
        compare(args)
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped; what is finished is in {args.out}, the same command goes on from there\n")
    except ValueError as error:
        parser.error(str(error))
    except BrokenPipeError:
        leave_quietly()
    except OSError as error:
        parser.error(f"{error.filename or args.out}: {error.strerror}")
    except MemoryError:
        parser.error("not enough memory")


if __name__ == "__main__":
    main()
