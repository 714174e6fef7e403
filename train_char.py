"""Train a character-level Grassmann-flow model on any text, on a laptop.

  python train_char.py                          the text that every Python ships, some minutes
  python train_char.py --data my.txt            your own text, UTF-8: files, folders
  python train_char.py --data shakespeare       Tiny Shakespeare, downloaded once
  python train_char.py --paper                  the paper's own model instead of ours
  python train_char.py --resume                 go on after Ctrl-C, or with a larger --iters
  mpiexec -n 4 python train_char.py             on four processes (requirements-parallel.txt)

Writes into --out: best.npz (lowest validation loss, for sample.py), last.npz (for --resume),
log.csv, loss.png. The last tenth of the text is held out for validation. Ctrl-C loses nothing.
If nobody reads the output any more (| head), the run goes on in silence.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -P and -I leave it out

import cli  # noqa: I001  (before NumPy)

import argparse
import contextlib
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from types import ModuleType
from typing import TextIO

import numpy as np
from tqdm import tqdm

import parallel
from checkpoint import load_checkpoint, on_host, save_checkpoint
from cli import Parser, command, number, plural, short_errors
from grassmann import Config, param_shapes
from sample import write_sample
from text import decode, read_corpus, start_token, visible
from training import SHARD_TOKENS, Training, in_threads, train_step

LOG_COLUMNS = ["step", "train_loss", "val_loss", "lr", "seconds"]
LOG_EVERY = 10  # steps per line of log.csv; its training loss is their mean
MOST_VALIDATED = 1_000_000  # characters; of more held out, evenly spread pieces are read
PACE = ("iters", "lr", "min_lr", "warmup_iters", "eval_every")  # what a resumed run may change
DEFAULTS = {f.name: f.default for f in fields(Config)[1:] + fields(Training)} | {"data": None, "eval_every": 250}
PRESETS = {
    "laptop": ("the defaults: some minutes on two cores", {
        name: DEFAULTS[name] for name in ("n_layer", "d_model", "context", "batch_size", "dropout", "iters")}),
    "tiny": ("under a minute, to see that it learns", {"iters": 1000, "d_model": 64, "eval_every": 100}),
    "best": ("for a megabyte of text: half an hour or more", {
        "iters": 8000, "eval_every": 500, "n_layer": 6, "d_model": 224, "context": 1024, "batch_size": 2,
        "dropout": 0.25, "min_lr": 1e-4, "offsets": (
            (1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 6, 8), (1, 2, 4, 8, 12, 16),
            (1, 2, 4, 8, 16, 32, 64))}),
}

# ---- options ---------------------------------------------------------------------------------------

def parse_offsets(text: str) -> tuple[tuple[int, ...], ...]:
    """ "1,2;4" -> ((1, 2), (4,)): layers separated by semicolons, offsets by commas."""
    try:
        return tuple(tuple(int(delta) for delta in layer.split(",")) for layer in text.split(";"))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form "1,2;1,2;4;8"') from None

def build_parser() -> Parser:
    """Options are absent unless given (a resumed run must know which); help texts name defaults."""
    parser = Parser(__doc__)
    parser.argument_default = argparse.SUPPRESS
    parser.set_defaults(out=Path("out"), resume=False, paper=False, preset=None, gpu=False,
                        threads=parallel.cores)
    count, size, rate = number(int, 1, 10**9), number(int, 1, 10**6), number(float, 0, 10)

    def add(flag: str, text: str, kind: Callable | None = None, **how) -> None:
        default = DEFAULTS.get(flag.lstrip("-").replace("-", "_"))
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        elif kind:
            how["type"] = kind
        group.add_argument(flag, help=text if default is None else f"{text} (default: {default})", **how)

    group = parser.add_argument_group("the run")
    add("--data", "UTF-8 files, folders or 'shakespeare' (default: Python's documentation)", nargs="+")
    add("--out", "folder for checkpoints, log and plot (default: out)", Path)
    add("--preset", "; ".join(f"{k}: {what}" for k, (what, _) in PRESETS.items()), choices=PRESETS)
    add("--seed", "drives initial weights, batches and dropout", number(int, 0, 2**63 - 1))
    add("--resume", "go on from last.npz; only the pace may change", action="store_true")
    add("--threads", "CPU threads (default: all cores)", number(int, 1, 1024))
    cli.add_gpu_option(group)
    group = parser.add_argument_group("training (the pace)")
    add("--iters", "training steps", count)
    add("--lr", "peak learning rate", number(float, 0, 10, above=True))
    add("--min-lr", "learning rate at the end (default: lr / 10)", rate)
    add("--warmup-iters", "steps until the peak", number(int, 0, 10**9))
    add("--eval-every", "steps between validations and checkpoints", count)
    group = parser.add_argument_group("training")
    add("--batch-size", "windows of text per step", size)
    add("--weight-decay", "AdamW's, on matrices only", rate)
    add("--grad-clip", "largest norm of the gradient, 0 for none", number(float, 0, 10**9))
    add("--dropout", "fraction of activations dropped", number(float, 0, 0.99))
    group = parser.add_argument_group("the model")
    add("--paper", "the paper's own: its block, average, normalisation, positions, one offset a layer, "
        "d_ff = 4 d_model", action="store_true")
    add("--context", "characters per window", size)
    add("--n-layer", "blocks", number(int, 1, 1000))
    add("--d-model", "width of the hidden states", size)
    add("--d-ff", "inner width of the FFN (default: 2 d_model; 4 d_model with attention)", size)
    add("--rank", "width of the reduced states that span the planes", number(int, 2, 10**4))
    add("--offsets", 'how far back each layer looks, e.g. "1,2;1,2;4;8" (default: from 1,2 in the '
        "first layers to 1,2,4,8,12,16 in the last; without taps 1;2;4;8;1;…, as --paper 1;2;4;8;12;16)",
        parse_offsets)
    add("--block", "residual block, or the paper's", choices=["prenorm", "paper"])
    add("--taps", "learned weights per offset, or their plain average")
    add("--normalize", "divide bivectors by their length")
    add("--positions", "learned position vectors; beyond the context sampling re-reads its last half")
    add("--mixer", "what mixes the tokens", choices=["grassmann", "attention"])
    add("--n-head", "attention heads", size)
    add("--memory", "a bivector in every layer that all tokens so far have written")
    return parser

def paper(n_layer: int, d_model: int, context: int) -> dict:
    """--paper at any size; with twelve layers each offset serves two in a row, as in the paper."""
    offsets = [(1, 2, 4, 8, 12, 16)[i * 6 // max(6, n_layer)] for i in range(n_layer)]
    return {"block": "paper", "taps": False, "normalize": True, "positions": True, "d_ff": 4 * d_model,
            "offsets": tuple((delta if delta < context else 1,) for delta in offsets)}

# ---- a run -----------------------------------------------------------------------------------------

@dataclass
class Progress:
    """How far a run is: what last.npz holds besides parameters and settings."""

    step: int = 0
    seconds: float = 0.0  # spent so far
    recent: list[float] = field(default_factory=list)  # training losses since the last line of the log
    best: list | None = None  # step and validation loss of best.npz
    log: list[list] = field(default_factory=list)  # the rows of log.csv

    @classmethod
    def read(cls, extra: dict) -> Progress:
        """From a checkpoint, whole or not at all. Raises ValueError and TypeError."""
        p = cls(extra["step"], extra["seconds"], extra["recent"], extra["best"], extra.get("log", []))
        best = [0, 0] if p.best is None else p.best
        rows = [*p.log, [p.step, p.seconds, None, 0, 0], [*best, None, 0, 0]]  # alike in their columns

        def real(n: object) -> bool:
            return type(n) in (int, float) and abs(n) < 1e300

        if not (isinstance(p.recent, list) and isinstance(p.log, list) and all(map(real, p.recent)) and all(
                type(step) is int and 0 <= step < 2**63 and (val_loss is None or real(val_loss))
                and real(loss) and real(lr) and real(seconds) for step, loss, val_loss, lr, seconds in rows)):
            raise ValueError
        return p

@dataclass
class Run:
    """What is trained, with what, and how far it is."""

    model: ModuleType  # grassmann or gpu
    out: Path
    threads: int  # 0: on a card
    settings: dict  # of all options that --resume keeps or may change
    corpus: object  # text.Corpus
    config: Config
    training: Training
    params: dict
    optimizer: dict
    progress: Progress

    @parallel.first
    def save(self, name: str, **more) -> None:
        """Write a checkpoint. Raises OSError, and ValueError if the weights are not finite."""
        p, corpus = self.progress, self.corpus
        known = {"vocab": corpus.vocab, "most_common": corpus.most_common, "text_sha256": corpus.sha256}
        settings = {key: value for key, value in self.settings.items() if not hasattr(self.config, key)}
        try:
            save_checkpoint(self.out / name, self.params, self.config, **known, **more,
                            step=p.step, best=p.best, settings=settings)
        except ValueError as error:
            if "not finite" not in str(error):
                raise
            raise ValueError(f"{error}; {self.diverged('run', 'unstable', p.step)}") from None

    def save_last(self) -> None:
        """last.npz: all that --resume needs."""
        p = self.progress
        self.save("last.npz", **self.optimizer, seconds=p.seconds, log=p.log, recent=self.checked_losses())

    def checked_losses(self) -> list[float]:
        """The training losses since the last line of the log, as numbers. Raises ValueError."""
        recent, arrays = self.progress.recent, self.model.np
        if recent:  # from a card all at once
            losses = arrays.stack([arrays.asarray(loss) for loss in recent])
            recent = on_host({"losses": losses})["losses"].tolist()
        for step, loss in enumerate(recent, self.progress.step - len(recent) + 1):
            if not math.isfinite(loss):
                raise ValueError(self.diverged("loss", loss, step))
        return recent

    def diverged(self, what: str, value: float | str, step: int) -> str:
        last = self.out / "last.npz"
        return f"the {what} became {value} at step {step}: lower --lr; {last} is the last good checkpoint"

def make_run(args: argparse.Namespace) -> Run:
    """A new run, or with --resume the one in last.npz. Raises ValueError and OSError."""
    model, last = cli.backend(args.gpu, args.precision), args.out / "last.npz"
    preset = PRESETS[args.preset][1] if args.preset else {}
    typed = {k: v for k, v in vars(args).items() if k in DEFAULTS}
    if typed.get("data"):
        typed["data"] = [name if name == "shakespeare" else os.path.abspath(name) for name in typed["data"]]
    saved = resume_point(model, last) if args.resume else {"settings": {}}
    given = preset | typed
    settings = DEFAULTS | saved["settings"] | given  # what is typed counts most
    if args.paper:
        given |= paper(settings["n_layer"], settings["d_model"], settings["context"]) | typed
        settings |= given
    if settings["min_lr"] is not None and settings["min_lr"] > settings["lr"]:
        raise ValueError(f"--min-lr ({settings['min_lr']}) must not exceed --lr ({settings['lr']})")
    if args.resume:
        may_go_on(last, saved, given, settings["iters"])
    try:
        corpus = read_corpus(settings["data"], settings["context"])
    except ValueError as error:
        advice = "" if "data" in given or not args.resume else "; where it was moved, --data says to where"
        raise ValueError(f"{error}{advice}") from None
    config = Config(len(corpus.vocab), **{f.name: settings[f.name] for f in fields(Config)[1:]})
    training = Training(**{f.name: settings[f.name] for f in fields(Training)})
    if args.resume and (corpus.sha256, config) != (saved["text_sha256"], saved["config"]):
        where = " ".join(settings["data"] or ["the documentation of this Python"])
        raise ValueError(f"--resume cannot change the text, and {where} is not what {last} was trained on")
    if not args.gpu:  # a GPU has memory of its own, and says when it is full
        check_memory(config, training.batch_size, args.threads)
    if not args.resume:
        params = model.init_params(config, training.seed)
        saved |= {"params": params, "progress": Progress(), **model.adamw_init(params)}
    optimizer = {name: saved[name] for name in ("adam_m", "adam_v")}
    threads = 0 if args.gpu else args.threads
    return Run(model, args.out, threads, settings, corpus, config, training, saved["params"], optimizer,
               saved["progress"])

def resume_point(model: ModuleType, last: Path) -> dict:
    """What last.npz holds, and best.npz is whole if it is there. Raises ValueError and OSError."""
    if not last.exists():
        raise ValueError(f"nothing to resume: {last} does not exist")
    params, config, extra = load_checkpoint(last, getattr(model, "Flat", dict))
    try:
        settings = extra["settings"] | {f.name: getattr(config, f.name) for f in fields(Config)[1:]}
        if settings.keys() != DEFAULTS.keys() or not {"adam_m", "adam_v", "text_sha256"} <= extra.keys():
            raise KeyError
        data, every = settings["data"], settings["eval_every"]
        settings["data"] = [data] if isinstance(data, str) else data  # (older runs have one text)
        words = extra["text_sha256"], *(data or ())
        if type(every) is not int or every < 1 or not all(isinstance(word, str) for word in words):
            raise ValueError
        Training(**{f.name: settings[f.name] for f in fields(Training)})
        saved = extra | {"settings": settings, "progress": Progress.read(extra)}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{last} cannot be resumed: settings or progress are missing or make no sense") from None
    best = last.with_name("best.npz")
    if best.exists():
        load_checkpoint(best)
    else:
        saved["progress"].best = None
    return saved | {"params": params, "config": config}

def may_go_on(last: Path, saved: dict, given: dict, iters: int) -> None:
    """Do the options ask for the run that was saved? Raises ValueError, saying what differs."""
    before, p = saved["settings"], saved["progress"]
    free = *PACE, "data", *(["offsets"] if before["mixer"] == "attention" else [])  # attention has none
    for name in given:
        if name not in free and given[name] != before[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--resume cannot change {flag}: {last} has {before[name]}, not {given[name]}")
    if p.step > iters or (p.step == iters and not p.recent):  # (or it waits for its last validation)
        raise ValueError(f"{last} is at step {p.step}; to go on, give --iters more than that, not {iters}")

def check_memory(config: Config, batch_size: int, threads: int) -> None:
    """Refuse, before anything is allocated, what this machine cannot hold. Raises ValueError."""
    rows = math.ceil(batch_size / parallel.size)
    tokens = rows * config.context
    at_once = max(min(tokens, threads * SHARD_TOKENS), min(threads, rows) * config.context)
    per_token = 16 * config.d_model + 6 * config.d_ff + 3 * config.rank**2
    if config.mixer == "attention":
        per_token += 4 * config.n_head * config.context
    activations = at_once * (config.n_layer * per_token + 4 * config.vocab_size) + 6 * tokens
    n_params = sum(math.prod(shape) for shape in param_shapes(config).values())
    copies = 5 + threads  # weights, two means, an update, gradients, and those of each thread
    needed = 4e-9 * parallel.local_size * (n_params * copies + activations)
    if not hasattr(os, "sysconf"):  # Windows
        return
    has = 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > has:
        raise ValueError(f"this needs about {needed:.1f} GB of memory, the machine has {has:.1f}")

@parallel.first
def claim(out: Path) -> None:
    """Keep the folder for this process until it ends: two runs would mix their files. Raises ValueError."""
    try:
        import fcntl

        folder = os.open(out, os.O_RDONLY)  # never closed, and so locked to the end, however that comes
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing into {out}; give this one another --out") from None
    except (ImportError, OSError):
        return  # Windows, or a file system without locks

@parallel.first
def set_aside(out: Path) -> None:
    """Move the files of an earlier run in `out` to out/previous-N, so that nothing is overwritten."""
    ours = "best.npz", "last.npz", "log.csv", "log-old-*.csv", "loss.png", "flow", "explorer.html"
    files = [file for pattern in ours for file in out.glob(pattern)]
    if files:
        folder = unused(out, "previous-{}")
        folder.mkdir()
        for file in files:
            file.rename(folder / file.name)
        print(f"the earlier run in {out} is now in {folder} (--resume would have gone on with it)")

def unused(folder: Path, name: str) -> Path:
    """The first that does not exist, of a name with a number in it."""
    return next(path for k in itertools.count(1) if not (path := folder / name.format(k)).exists())

def open_log(run: Run) -> TextIO:
    """log.csv, written anew up to where the checkpoint is, for more lines. One that is not ours is kept."""
    if parallel.rank:
        return open(os.devnull, "w")
    path = run.out / "log.csv"
    lines = "".join(log_line(row) for row in [LOG_COLUMNS, *run.progress.log])
    found = path.read_bytes().decode("ascii", "replace") if path.exists() else lines
    older = not run.progress.log and run.progress.step >= LOG_EVERY  # its last.npz has no log
    if not found.startswith(lines) or (older and found != lines):
        old = path.rename(unused(run.out, "log-old-{}.csv"))
        print(f"{path} is not as train_char.py wrote it; it is now {old.name}")
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(lines, encoding="ascii", newline="\n")
    unfinished.replace(path)
    return path.open("a", encoding="ascii", newline="\n", buffering=1)

def log_line(row: list) -> str:
    return ",".join("" if cell is None else str(cell) for cell in row) + "\n"

# ---- training --------------------------------------------------------------------------------------

def train(run: Run, signals: list[int]) -> None:
    """Steps until --iters or a signal. Raises ValueError, OSError."""
    p, t, model, eval_every = run.progress, run.training, run.model, run.settings["eval_every"]
    tokens, first, before = model.np.asarray(run.corpus.train), p.step, p.seconds
    started = time.perf_counter()
    log_every = LOG_EVERY * max(1, t.iters // 10**6)  # at most some 100,000 lines
    bar = tqdm(total=t.iters, initial=p.step, unit="step", disable=None, dynamic_ncols=True, smoothing=0)
    with bar, open_log(run) as log:
        while True:
            due = p.step % eval_every == 0 or p.step == t.iters
            if p.recent and (due or p.step % log_every == 0):  # of the last step, or left by a stop
                record(run, log, bar, due, signals)
            if signals or p.step >= t.iters:
                break
            x, y = model.get_batch(tokens, t.batch_size, run.config.context, t.seed, p.step)
            loss = train_step(model, run.params, run.config, t, run.optimizer, p.step, x, y, run.threads)
            p.recent.append(loss)
            p.step += 1
            p.seconds = before + time.perf_counter() - started
            bar.update()
            if p.step == first + 10 and p.step < t.iters:
                left = (p.seconds - before) / 10 * (t.iters - p.step)
                time_left = plural(max(1, round(left)), "second") if left < 100 else f"{left / 60:.0f} minutes"
                bar.write(f"about {time_left} to go")
        if signals:
            run.save_last()

def record(run: Run, log: TextIO, bar: tqdm, due: bool, signals: list[int]) -> None:
    """A line of the log; where it is due a validation, and then checkpoints, plot and a line to read.

    After a stop in the validation the losses wait for the next time. Raises ValueError, OSError.
    """
    p, losses = run.progress, run.checked_losses()
    train_loss, val_loss = math.fsum(losses) / len(losses), validate(run, signals) if due else None
    if due and val_loss is None:
        return
    p.log.append([p.step, train_loss, val_loss, run.training.rate(p.step - 1), round(p.seconds, 2)])
    p.recent = []
    log.write(log_line(p.log[-1]))
    validated = [row for row in p.log if row[2] is not None]
    shown = f" val {validated[-1][2]:.4f}" if validated else ""
    bar.set_description_str(f"loss {train_loss:.4f}{shown}", refresh=False)
    if due:
        if p.best is None or val_loss < p.best[1]:
            p.best = [p.step, val_loss]
            run.save("best.npz")
        run.save_last()
        plot(run)
        bar.write(f"step {p.step:6d}   train {train_loss:.4f}   val {val_loss:.4f} nats/char   {p.seconds:6.1f} s"
                  f"\n  {line_of(run)}")
        if overfits(validated):
            bar.write("The validation loss rises while the training loss falls: the model learns the text by "
                      "heart. More text, more --dropout or fewer --iters help; best.npz is from before.")

def validate(run: Run, signals: list[int]) -> float | None:
    """The validation loss, of all that is held out or of MOST_VALIDATED characters; None after a signal.

    Raises ValueError if it is not finite.
    """
    tokens, context = run.model.np.asarray(run.corpus.val), run.config.context
    pieces, losses = [tokens], []
    if len(tokens) > MOST_VALIDATED:
        starts = np.linspace(0, len(tokens) - 10_001, max(1, MOST_VALIDATED // 10_000)).astype(int)
        pieces = [tokens[start : start + 10_001] for start in starts.tolist()]
    total = sum(map(len, pieces)) // context

    def each(function: Callable, chunks: Iterable) -> Iterator:
        for chunk in parallel.each(function, chunks, partial(in_threads, threads=run.threads or 1)):
            yield chunk
            bar.update(max(1, 512 // context))
            if signals:
                break

    with tqdm(total=total, desc="validating", unit="window", leave=False, delay=2, disable=None) as bar:
        for piece in pieces:
            losses.append(run.model.validation_loss(run.params, run.config, piece, each))
            if signals:
                return None
    loss = math.fsum(losses) / len(losses)
    if not math.isfinite(loss):
        raise ValueError(run.diverged("validation loss", loss, run.progress.step))
    return loss

def line_of(run: Run) -> str:
    """70 characters that the model writes by now, always from the same start and seed."""
    vocab = run.corpus.vocab
    start = [start_token(vocab, run.corpus.most_common)]
    tokens = run.model.generate(run.params, run.config, start, 70, temperature=0.8, seed=0)
    return visible(decode(tokens, vocab)).replace("\n", "⏎").replace("\t", " ")

def overfits(validated: list[list]) -> bool:
    """Has the validation loss risen three times in a row while the training loss fell, now and not before?

    `validated` are the rows of the log that have a validation loss.
    """
    found = [k for k, rows in enumerate(zip(*(validated[i:] for i in range(4)), strict=False))
             if rows[0][2] < rows[1][2] < rows[2][2] < rows[3][2] and rows[3][1] < rows[0][1]]
    return found == [len(validated) - 4]

# ---- afterwards ------------------------------------------------------------------------------------

@parallel.first
def plot(run: Run) -> None:
    """loss.png. Training goes on without it: a font cache, LaTeX, a backend are matplotlib's own."""
    if not run.progress.log:
        return  # stopped in its first steps
    grey = dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], "gray")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        with rc_context(grey):  # to be read on a white and on a black page
            figure = Figure(figsize=(7, 4.2), layout="constrained")
            axes = figure.subplots()
            styles = {"lw": 0.8, "alpha": 0.6}, {"marker": "o", "ms": 3}
            for k, name, style in zip((1, 2), ("training", "validation"), styles, strict=True):
                points = [(row[0], row[k]) for row in run.progress.log if row[k] is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), label=name, **style)
            if run.progress.best:
                axes.axhline(run.progress.best[1], color="gray", ls=":", label=f"best {run.progress.best[1]:.3f}")
            axes.set(xlabel="step", ylabel="loss (nats per character)")
            later = [row[k] for row in run.progress.log[len(run.progress.log) // 20 :] for k in (1, 2) if row[k]]
            axes.set_ylim(top=1.05 * max(later, default=1.0))  # not the fall at the beginning
            bits = axes.secondary_yaxis("right", functions=(lambda x: x / math.log(2), lambda x: x * math.log(2)))
            bits.set_ylabel("bits per character")
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
            figure.savefig(run.out / "loss.png", dpi=130, transparent=True)
    except Exception as error:
        tqdm.write(f"no loss.png: {type(error).__name__}: {' '.join(str(error).split()):.100}")

@parallel.first
def report(run: Run, go_on: str) -> None:
    """The numbers, the files and a sample; `go_on` is the command that trains further."""
    best, last = run.out / "best.npz", run.out / "last.npz"
    last_step, _, last_loss, *_ = run.progress.log[-1]
    for name, (step, loss) in (("best", run.progress.best), ("last", (last_step, last_loss))):
        print(f"{name} validation loss {loss:.4f} nats, {loss / math.log(2):.4f} bits per character, at step {step}")
    print(f"{best}   to sample from: {command('sample.py', best)}")
    print(f"{last}   to go on from: {go_on} --iters {2 * run.progress.step}")
    print(f"{run.out / 'log.csv'}, {run.out / 'loss.png'}   the losses\n\nA sample:\n")
    params, config, extra = load_checkpoint(best, getattr(run.model, "Flat", dict))
    write_sample(run.model, params, config, extra, "", 600, temperature=0.8)

def catch_signals() -> list[int]:
    """A list that Ctrl-C, SIGTERM and a closed terminal are noted in; a second Ctrl-C ends it at once."""
    caught, names = [], [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def note(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_IGN if number == getattr(signal, "SIGHUP", 0) else signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the terminal is closed
            if parallel.rank == 0:
                os.write(2, b"\nstopping, to be resumed; once more ends it at once\n")

    for stop in (getattr(signal, name) for name in names):
        if signal.getsignal(stop) != signal.SIG_IGN:  # as nohup has it
            signal.signal(stop, note)
    return caught

@parallel.together()
def main() -> None:
    cli.plain_output()
    sys.stdout = cli.Patient(sys.stdout)
    parser = build_parser()
    args = parser.parse_args()
    memory = "not enough memory; a smaller --batch-size, --context, --d-model or --n-layer needs less"
    with short_errors(parser, args.out, memory):
        if args.resume:
            claim(args.out)  # before it is read
        run = make_run(args)
        run.out.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            claim(run.out)
            set_aside(run.out)
            run.save_last()  # before any work: is the folder writable?
        corpus, n_params = run.corpus, sum(p.size for p in run.params.values())
        text = " ".join(run.settings["data"] or ["the documentation of this Python"])
        processes = f" in each of {parallel.size} processes" * (parallel.size > 1)
        print(f"{text}: {plural(len(corpus.train), 'character')} to train on, {len(corpus.val):,} to validate"
              + (f" (on {MOST_VALIDATED:,} of them)" if len(corpus.val) > MOST_VALIDATED else "")
              + f", {len(corpus.vocab)} different ones\n{n_params / 1e6:.2f}M parameters; "
              f"{plural(args.threads, 'thread')}{processes}; writing into {run.out}")
        signals = parallel.agreed(catch_signals())
        train(run, signals)
        how = ["--gpu"] * args.gpu + (["--precision", args.precision] if args.precision else [])
        how += ["--threads", args.threads] if args.threads != parallel.cores else []
        go_on = command("train_char.py", "--resume", "--out", run.out, *how)
        if signals and (run.progress.step < run.training.iters or run.progress.recent):
            print(f"stopped at step {run.progress.step} and saved; go on with: {go_on}")
            best = run.progress.best and f"best so far {run.progress.best[1]:.4f} nats; "
            print(f"{best or ''}sample from it with: {command('sample.py', run.out / 'best.npz')}")
            plot(run)
            sys.exit(128 + signals[0])
        report(run, go_on)

if __name__ == "__main__":
    main()
