"""A training run: what is trained, how far it is, and how both are kept on disk, for train_char.py.

A run is a folder: best.npz (lowest validation loss), last.npz (all that is needed to go on), log.csv, loss.png.
"""

import cpu  # noqa: F401, I001  (before NumPy)

import argparse
import hashlib
import itertools
import math
import operator
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType

import numpy as np

from grassmann import SHARD_TOKENS, Config, param_shapes
from cli import backend
from text import encode, load_text, vocabulary

LOG_COLUMNS = ["step", "train_loss", "val_loss", "lr", "seconds"]

# What is trained: a resumed run keeps these.
MODEL_DEFAULTS = {
    "data": None, "seed": 0, "batch_size": 12, "context": 64, "n_layer": 4, "d_model": 128, "d_ff": None, "rank": 32,
    "offsets": None, "block": "prenorm", "taps": True, "normalize": False, "positions": False,
    "mixer": "grassmann", "n_head": 4, "dropout": 0.1, "weight_decay": 0.1, "grad_clip": 1.0,
}  # fmt: skip
# How long and how fast: these may change on the way.
PACE_DEFAULTS = {"iters": 5000, "lr": 3e-3, "min_lr": None, "warmup_iters": 100, "eval_every": 250}


WIDENING = ((1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 4, 8, 12, 16))  # from the first layers to the last


def default_offsets(n_layer: int, context: int, taps: bool) -> tuple[tuple[int, ...], ...]:
    """With taps, ever more and farther ones from layer to layer; without, one a layer: 1, 2, 4, 8, 1, 2, …"""
    layers = [WIDENING[3 - 4 * (n_layer - 1 - i) // n_layer] if taps else (2 ** (i % 4),) for i in range(n_layer)]
    return tuple(tuple(delta for delta in layer if delta < context) or (1,) for layer in layers)


def resolved(settings: dict) -> dict:
    """The settings, with the defaults that depend on others filled in."""
    s = dict(settings)
    if s["offsets"] is None:
        s["offsets"] = default_offsets(s["n_layer"], s["context"], s["taps"])
    if s["d_ff"] is None:
        s["d_ff"] = (4 if s["mixer"] == "attention" else 2) * s["d_model"]
    return s


@dataclass
class Run:
    """What is trained, and how far it is."""

    model: ModuleType  # grassmann or gpu
    out: Path
    threads: int
    settings: dict
    text_sha256: str
    vocab: list[int]
    most_common: int  # the token that an empty prompt starts from where there is no newline
    train_tokens: np.ndarray
    val_tokens: np.ndarray
    config: Config
    params: dict
    optimizer: dict
    step: int = 0
    seconds: float = 0.0  # spent so far
    recent: list = field(default_factory=list)  # training losses since the last line of the log
    best: list | None = None  # step and validation loss of best.npz


def make_run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Run:
    """A new run, or with --resume the one in last.npz. Raises ValueError and OSError."""
    model, last = backend(args.gpu, args.precision), args.out / "last.npz"
    given = {name: value for name, value in vars(args).items() if name in MODEL_DEFAULTS | PACE_DEFAULTS}
    if given.get("data") not in (None, "shakespeare"):
        given["data"] = os.path.abspath(given["data"])
    saved = resume_point(model, last, given, parser) if args.resume else None
    settings = resolved(MODEL_DEFAULTS | PACE_DEFAULTS | (saved["settings"] if saved else {}) | given)
    if settings["min_lr"] is not None and settings["min_lr"] > settings["lr"]:
        raise ValueError(f"--min-lr ({settings['min_lr']}) must not exceed --lr ({settings['lr']})")

    text = load_text(settings["data"])
    n_val = len(text) // 10
    if len(text) - n_val <= settings["context"] or n_val < 2:
        least = max(20, settings["context"] * 10 // 9 + 1)
        raise ValueError(f"the text has {len(text)} characters, a context of {settings['context']} needs {least}")
    text_sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    vocab = vocabulary(text)
    config = Config(len(vocab), **{f.name: settings[f.name] for f in fields(Config) if f.name in settings})
    if not args.gpu:  # a GPU has memory of its own, and says when it is full
        check_memory(config, settings["batch_size"], args.threads)
    if not saved:
        params = model.init_params(config, settings["seed"])
        saved = {"params": params, **model.adamw_init(params)}
    elif (text_sha256, config) != (saved["text_sha256"], saved["config"]):
        raise ValueError(f"--resume cannot change the text, and {settings['data'] or 'pydoc_data.topics'} has changed")
    elif not (args.out / "best.npz").exists():
        saved["best"] = None
    tokens = encode(text, vocab)
    return Run(
        model, args.out, args.threads, settings, text_sha256, vocab, int(np.bincount(tokens[: 1 << 20]).argmax()),
        model.np.asarray(tokens[:-n_val]), model.np.asarray(tokens[-n_val:]), config,
        saved["params"], {m: saved[m] for m in ("adam_m", "adam_v")},
        **{name: saved[name] for name in ("step", "seconds", "recent", "best") if name in saved},
    )  # fmt: skip


def resume_point(model: ModuleType, last: Path, given: dict, parser: argparse.ArgumentParser) -> dict:
    """What last.npz holds, if `given` asks for nothing else. Raises ValueError and OSError."""
    if not last.exists():
        raise ValueError(f"nothing to resume: {last} does not exist")
    params, config, saved = model.load_checkpoint(last)
    missing = {"adam_m", "adam_v", "settings", "text_sha256", "step", "seconds", "recent", "best"} - saved.keys()
    if missing:
        raise ValueError(f"{last} cannot be resumed: it lacks {', '.join(sorted(missing))}")
    step, seconds, recent, best = (saved[name] for name in ("step", "seconds", "recent", "best"))
    names = MODEL_DEFAULTS.keys() | PACE_DEFAULTS.keys()
    try:
        if saved["settings"].keys() != names:
            raise ValueError("settings are missing")
        settings = vars(parser.parse_args(flags(saved["settings"])))  # checked as if they were typed
        known = [float(number) for number in [operator.index(step), seconds, *recent, *(best or [0, 0])]]
        if not all(map(math.isfinite, known)) or min(known[:2]) < 0 or len(known) != 4 + len(recent):
            raise ValueError("numbers out of range")
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{last} cannot be resumed, its progress makes no sense: {error}") from None
    for name in MODEL_DEFAULTS.keys() & given.keys():
        if given[name] != settings.get(name):
            flag, before = "--" + name.replace("_", "-"), settings.get(name)
            raise ValueError(f"--resume cannot change {flag}: {last} has {before}, not {given[name]}")
    iters = given.get("iters", settings["iters"])
    if step >= iters:
        raise ValueError(f"{last} is at step {step} of {iters}; to go on, give a larger --iters")
    return saved | {"params": params, "config": config, "settings": {k: v for k, v in settings.items() if k in names}}


def flags(settings: dict) -> list[str]:
    """The command line that gives these settings."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if name == "offsets":
            value = ";".join(",".join(map(str, layer)) for layer in value)
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words.append(f"--{flag}={value}")
    return words


def check_memory(config: Config, batch_size: int, threads: int) -> None:
    """Refuse, before anything is allocated, what this machine cannot hold. Raises ValueError."""
    n_params = sum(math.prod(shape) for shape in param_shapes(config).values())
    per_token = 16 * config.d_model + 6 * config.d_ff + 3 * config.rank**2
    if config.mixer == "attention":
        per_token += 4 * config.n_head * config.context
    tokens = batch_size * config.context
    at_a_time = max(min(tokens, threads * SHARD_TOKENS), min(threads, batch_size) * config.context)
    activations = at_a_time * (config.n_layer * per_token + 4 * config.vocab_size) + 6 * tokens
    needed = 4 * (n_params * (5 + threads) + activations)  # weights, two means, an update, gradients per thread
    if not hasattr(os, "sysconf"):  # Windows
        return
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise ValueError(f"this needs about {needed / 1e9:.1f} GB of memory, the machine has {available / 1e9:.1f}")


def claim(out: Path) -> None:
    """Keep the folder for this process until it ends: two runs would mix their files. Raises ValueError."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    folder = os.open(out, os.O_RDONLY)  # never closed, and so locked to the end, however that comes
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing into {out}; give this one another --out") from None
    except OSError:
        return  # a file system without locks


def set_aside(out: Path) -> None:
    """Move the files of an earlier run in `out` to out/previous-N, so that a new run overwrites nothing."""
    files = [out / name for name in ("best.npz", "last.npz", "log.csv", "loss.png", "flow") if (out / name).exists()]
    if files:
        numbers = (k for k in range(1, 10**6) if not (out / f"previous-{k}").exists())
        folder = out / f"previous-{next(numbers)}"
        folder.mkdir()
        for file in files:
            file.rename(folder / file.name)
        print(f"the earlier run in {out} is now in {folder} (--resume would have gone on with it)")


def save(run: Run, name: str, **state) -> None:
    """Write a checkpoint. Raises OSError, and ValueError if the weights are not finite."""
    state |= {"vocab": run.vocab, "most_common": run.most_common, "settings": run.settings}
    try:
        run.model.save_checkpoint(run.out / name, run.params, run.config, step=run.step, best=run.best, **state)
    except ValueError as error:
        raise ValueError(f"{error}; {diverged(run, 'run', 'unstable', run.step)}") from None


def save_last(run: Run) -> None:
    """last.npz: all that --resume needs."""
    save(run, "last.npz", **run.optimizer, text_sha256=run.text_sha256, seconds=run.seconds, recent=checked_losses(run))


def checked_losses(run: Run) -> list[float]:
    """The training losses since the last line of the log, as numbers. Raises ValueError if one is not finite."""
    losses = [float(loss) for loss in run.recent]
    for step, loss in enumerate(losses, run.step - len(losses) + 1):
        if not math.isfinite(loss):
            raise ValueError(diverged(run, "loss", loss, step))
    return losses


def diverged(run: Run, what: str, value: float | str, step: int) -> str:
    return f"the {what} became {value} at step {step}: lower --lr; {run.out / 'last.npz'} is the last good checkpoint"


def open_log(run: Run):
    """log.csv, opened for more lines: a new one, or an old one cut back to where the checkpoint is.

    Raises ValueError if it is not ours, as after a spreadsheet has saved it with a byte order mark.
    """
    log = (run.out / "log.csv").open("a+", encoding="ascii", errors="replace", newline="\n", buffering=1)
    log.seek(0)
    lines = [line for line in log if line.endswith("\n")]
    if lines and lines[0].partition(",")[0] != LOG_COLUMNS[0]:
        raise ValueError(f"{log.name} is not as train_char.py wrote it; rename it, and the run goes on with a new one")
    keep = "".join(itertools.takewhile(lambda line: is_up_to(run.step, line), lines))
    log.truncate(len(keep))  # ASCII: as many bytes as characters
    if not keep:
        log.write(",".join(LOG_COLUMNS) + "\n")
    return log


def is_up_to(last_step: int, line: str) -> bool:
    """Is this line of log.csv the first, or that of a step up to last_step?"""
    step = line.partition(",")[0]
    return step == LOG_COLUMNS[0] or (step.isdecimal() and int(step) <= last_step)
