"""Train a character-level Grassmann-flow model on any text, on a laptop.

  python train_char.py                          the text that every Python ships, a few minutes on two cores
  python train_char.py --data my.txt            your own text, UTF-8
  python train_char.py --data shakespeare       Tiny Shakespeare, downloaded once
  python train_char.py --resume                 go on after Ctrl-C, or with a larger --iters

Writes into --out: best.npz (lowest validation loss, for sample.py), last.npz (for --resume), log.csv, loss.png.
The last tenth of the text is held out for validation. Ctrl-C loses nothing.
"""

import cpu  # noqa: F401, I001  (before NumPy)

import argparse
import csv
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from grassmann import Config, param_shapes
from sample import Parser, add_gpu_option, backend, leave_quietly, number, plain_output, write_sample
from text import encode, load_text, vocabulary

LOG_EVERY = 10  # steps per line of log.csv; its training loss is their mean
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOG_COLUMNS = ["step", "train_loss", "val_loss", "lr", "seconds"]

# What is trained: a resumed run keeps these.
MODEL_DEFAULTS = {
    "data": None, "seed": 0, "batch_size": 12, "context": 64, "n_layer": 4, "d_model": 128, "rank": 32,
    "offsets": None, "block": "prenorm", "taps": True, "normalize": False, "positions": False,
    "mixer": "grassmann", "n_head": 4, "dropout": 0.0, "weight_decay": 0.1, "grad_clip": 1.0,
}  # fmt: skip
# How long and how fast: these may change on the way.
PACE_DEFAULTS = {"iters": 5000, "lr": 4e-3, "min_lr": None, "warmup_iters": 100, "eval_every": 250}


# ---- options ------------------------------------------------------------------------------------------


def parse_offsets(text: str) -> tuple[tuple[int, ...], ...]:
    """ "1,2;4" -> ((1, 2), (4,)): layers separated by semicolons, offsets by commas."""
    try:
        return tuple(tuple(int(delta) for delta in layer.split(",")) for layer in text.split(";"))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form "1,2;1,2;4;8"') from None


def default_offsets(n_layer: int, context: int, taps: bool) -> tuple[tuple[int, ...], ...]:
    """With taps, the last four characters in every layer; without, one offset a layer: 1, 2, 4, 8, 1, 2, …"""
    layers = [(1, 2, 3, 4) if taps else (2 ** (i % 4),) for i in range(n_layer)]
    return tuple(tuple(delta for delta in layer if delta < context) or (1,) for layer in layers)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_parser() -> Parser:
    """Options are absent unless given (a resumed run must know which); the help texts name the defaults."""
    parser = Parser(__doc__)
    parser.argument_default = argparse.SUPPRESS
    parser.set_defaults(out=Path("out"), resume=False, gpu=False, threads=available_cores())
    default = {name: value for name, value in (MODEL_DEFAULTS | PACE_DEFAULTS).items() if value is not None}

    def add(group, flag: str, text: str, **how) -> None:
        name = flag.lstrip("-").replace("-", "_")
        group.add_argument(flag, help=f"{text} (default: {default[name]})" if name in default else text, **how)

    run = parser.add_argument_group("the run")
    add(run, "--data", "a UTF-8 text file, or 'shakespeare' (default: Python's own documentation, pydoc_data.topics)")
    add(run, "--out", "folder for checkpoints, log and plot (default: out)", type=Path)
    add(run, "--seed", "drives initial weights, batches and dropout", type=number(int, 0, 2**63))
    add(run, "--resume", "go on from last.npz; only how long and how fast may change", action="store_true")
    add(run, "--threads", "CPU threads (default: all cores)", type=number(int, 1, 1024))
    add_gpu_option(run)
    train = parser.add_argument_group("training")
    size = number(int, 1, 10**6)
    add(train, "--iters", "training steps", type=number(int, 1, 10**9))
    add(train, "--batch-size", "windows of text per step", type=size)
    add(train, "--lr", "peak learning rate", type=number(float, 0, 10, above=True))
    add(train, "--min-lr", "learning rate at the end (default: lr / 10)", type=number(float, 0, 10))
    add(train, "--warmup-iters", "steps until the peak", type=number(int, 0, 10**9))
    add(train, "--weight-decay", "AdamW's, on matrices only", type=number(float, 0, 10))
    add(train, "--grad-clip", "largest global norm of the gradient, 0 for none", type=number(float, 0, 1e9))
    add(train, "--dropout", "fraction of activations dropped", type=number(float, 0, 0.99))
    add(train, "--eval-every", "steps between validations and checkpoints", type=number(int, 1, 10**9))
    model = parser.add_argument_group("the model")
    add(model, "--context", "characters per window", type=size)
    add(model, "--n-layer", "blocks", type=number(int, 1, 1000))
    add(model, "--d-model", "width of the hidden states", type=size)
    add(model, "--rank", "width of the reduced states that span the planes", type=number(int, 2, 10**4))
    add(model, "--offsets", 'how far back each layer looks, e.g. "1,2;1,2;4;8" (default: 1,2,3,4 in every layer; '
        "without taps 1;2;4;8;1;…)", type=parse_offsets)  # fmt: skip
    add(model, "--block", "residual block, or the paper's", choices=["prenorm", "paper"])
    add(model, "--taps", "learned weights per offset, or their plain average", action=argparse.BooleanOptionalAction)
    add(model, "--normalize", "divide bivectors by their length", action=argparse.BooleanOptionalAction)
    add(model, "--positions", "learned position vectors; sampling beyond the context then re-reads its last half",
        action=argparse.BooleanOptionalAction)  # fmt: skip
    add(model, "--mixer", "what mixes the tokens", choices=["grassmann", "attention"])
    add(model, "--n-head", "attention heads", type=size)
    return parser


# ---- a run --------------------------------------------------------------------------------------------


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


def make_run(args: argparse.Namespace) -> Run:
    """A new run, or with --resume the one in last.npz. Raises ValueError and OSError."""
    model, last = backend(args.gpu), args.out / "last.npz"
    given = {name: value for name, value in vars(args).items() if name in MODEL_DEFAULTS | PACE_DEFAULTS}
    if given.get("data") not in (None, "shakespeare"):
        given["data"] = os.path.abspath(given["data"])
    saved = resume_point(model, last, given) if args.resume else None
    settings = MODEL_DEFAULTS | PACE_DEFAULTS | (saved["settings"] if saved else {}) | given
    if settings["min_lr"] is not None and settings["min_lr"] > settings["lr"]:
        raise ValueError(f"--min-lr ({settings['min_lr']}) must not exceed --lr ({settings['lr']})")
    if settings["offsets"] is None:
        settings["offsets"] = default_offsets(settings["n_layer"], settings["context"], settings["taps"])

    text = load_text(settings["data"])
    n_val = len(text) // 10
    if len(text) - n_val <= settings["context"] or n_val < 2:
        least = max(20, settings["context"] * 10 // 9 + 2)
        raise ValueError(f"the text has {len(text)} characters, a context of {settings['context']} needs {least}")
    text_sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    vocab = vocabulary(text)
    config = Config(len(vocab), **{f.name: settings[f.name] for f in fields(Config) if f.name in settings})
    check_memory(config, settings["batch_size"], args.threads)
    if not saved:
        params = model.init_params(config, settings["seed"])
        saved = {"params": params, **model.adamw_init(params)}
    elif (text_sha256, config) != (saved["text_sha256"], saved["config"]):
        raise ValueError(f"--resume cannot change the text, and {settings['data'] or 'pydoc_data.topics'} has changed")
    tokens = encode(text, vocab)
    return Run(
        model, args.out, args.threads, settings, text_sha256, vocab, int(np.bincount(tokens[: 1 << 20]).argmax()),
        tokens[:-n_val], tokens[-n_val:], config, saved["params"], {m: saved[m] for m in ("adam_m", "adam_v")},
        **{name: saved[name] for name in ("step", "seconds", "recent", "best") if name in saved},
    )  # fmt: skip


def resume_point(model: ModuleType, last: Path, given: dict) -> dict:
    """What last.npz holds, if `given` asks for nothing else. Raises ValueError and OSError."""
    if not last.exists():
        raise ValueError(f"nothing to resume: {last} does not exist")
    params, config, saved = model.load_checkpoint(last)
    missing = {"adam_m", "adam_v", "settings", "text_sha256", "step", "seconds", "recent", "best"} - saved.keys()
    if missing:
        raise ValueError(f"{last} cannot be resumed: it lacks {', '.join(sorted(missing))}")
    settings = saved["settings"]
    for name in MODEL_DEFAULTS.keys() & given.keys():
        if json.dumps(given[name]) != json.dumps(settings.get(name)):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--resume cannot change {flag}: {last} has {settings.get(name)}, not {given[name]}")
    iters = given.get("iters", settings.get("iters", 0))
    if saved["step"] >= iters:
        raise ValueError(f"{last} is at step {saved['step']} of {iters}; to go on, give a larger --iters")
    return saved | {"params": params, "config": config}


def check_memory(config: Config, batch_size: int, threads: int) -> None:
    """Refuse, before anything is allocated, what this machine cannot hold. Raises ValueError."""
    n_params = sum(math.prod(shape) for shape in param_shapes(config).values())
    per_token = 16 * config.d_model + 6 * config.d_ff + 3 * config.rank**2
    if config.mixer == "attention":
        per_token += 4 * config.n_head * config.context
    activations = batch_size * config.context * (config.n_layer * per_token + 4 * config.vocab_size)
    needed = 4 * (n_params * (5 + threads) + activations)  # weights, two means, an update, gradients per thread
    if not hasattr(os, "sysconf"):  # Windows
        return
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise ValueError(f"this needs about {needed / 1e9:.1f} GB of memory, the machine has {available / 1e9:.1f}")


def set_aside(out: Path) -> None:
    """Move the files of an earlier run in `out` to out/previous-N, so that a new run overwrites nothing."""
    files = [out / name for name in ("best.npz", "last.npz", "log.csv", "loss.png") if (out / name).exists()]
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
    """log.csv, opened for more lines: a new one, or an old one cut back to where the checkpoint is."""
    path, lines = run.out / "log.csv", [",".join(LOG_COLUMNS)]
    if run.step and path.exists():
        old = path.read_text(encoding="utf-8").splitlines()[1:]
        lines += [line for line in old if line.count(",") == 4 and int(line.split(",")[0]) <= run.step]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path.open("a", encoding="utf-8", buffering=1)


def train(run: Run, signals: list[int]) -> float | None:
    """Steps until --iters or a signal; returns the last validation loss. Raises ValueError, OSError."""
    model, s = run.model, run.settings
    min_lr = s["lr"] / 10 if s["min_lr"] is None else s["min_lr"]
    start_step, started, before = run.step, time.perf_counter(), run.seconds
    bar = tqdm(total=s["iters"], initial=run.step, unit="step", disable=None, dynamic_ncols=True)
    val_loss, shown = None, {}
    with bar, open_log(run) as log:
        while run.step < s["iters"] and not signals:
            x, y = model.get_batch(run.train_tokens, s["batch_size"], s["context"], s["seed"], run.step)
            lr = model.learning_rate(run.step, s["iters"], s["lr"], min_lr, s["warmup_iters"])
            loss, grads = model.loss_and_grads(run.params, run.config, x, y, (s["seed"], run.step), run.threads)
            if s["grad_clip"]:
                model.clip_grads(grads, s["grad_clip"])
            how = {"weight_decay": s["weight_decay"], "threads": run.threads}
            model.adamw_step(run.params, grads, run.optimizer, run.step, lr, **how)
            run.step += 1
            run.recent.append(loss)
            run.seconds = before + time.perf_counter() - started
            bar.update()
            validate = run.step % s["eval_every"] == 0 or run.step == s["iters"]
            if not validate and run.step % LOG_EVERY:
                continue
            losses = checked_losses(run)
            train_loss = math.fsum(losses) / len(losses)
            if validate:
                val_loss = model.validation_loss(run.params, run.config, run.val_tokens, run.threads)
                if not math.isfinite(val_loss):
                    raise ValueError(diverged(run, "validation loss", val_loss, run.step))
                shown["val"] = f"{val_loss:.4f}"
                both = f"train {train_loss:.4f}   val {val_loss:.4f} nats/char"
                bar.write(f"step {run.step:6d}   {both}   {run.seconds:6.1f} s")
            log.write(f"{run.step},{train_loss},{val_loss if validate else ''},{lr},{run.seconds:.2f}\n")
            run.recent = []
            speed = (run.step - start_step) * s["batch_size"] * s["context"] / (run.seconds - before)
            bar.set_postfix(loss=f"{train_loss:.4f}", **shown, chars_per_s=f"{speed:,.0f}", refresh=False)
            if validate:
                if run.best is None or val_loss < run.best[1]:
                    run.best = [run.step, val_loss]
                    save(run, "best.npz")
                save_last(run)
        if signals:
            save_last(run)
    return val_loss


# ---- afterwards ---------------------------------------------------------------------------------------


def plot(run: Run) -> None:
    """loss.png from log.csv."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(run.out / "log.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    curves = {"train_loss": {"label": "training", "lw": 0.8, "alpha": 0.6},
              "val_loss": {"label": "validation", "marker": "o", "ms": 3}}  # fmt: skip
    for column, style in curves.items():
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        axes.plot([step for step, _ in points], [loss for _, loss in points], **style)
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    if run.best:
        axes.axhline(run.best[1], color="gray", lw=0.8, ls=":")
        axes.annotate(f"best {run.best[1]:.3f}", run.best, xytext=(0, 6), textcoords="offset points", ha="right")
    top = axes.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    top.set_ylabel("bits per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run.out / "loss.png", dpi=130)
    plt.close(figure)


def report(run: Run, val_loss: float) -> None:
    """The numbers, the files and a sample."""
    step, best = run.best
    for name, loss in (("best", best), ("last", val_loss)):
        at = step if name == "best" else run.step
        print(f"{name} validation loss {loss:.4f} nats, {loss / math.log(2):.4f} bits per character, at step {at}")
    print(f"{run.out / 'best.npz'}   to sample from: python sample.py {run.out / 'best.npz'}")
    print(f"{run.out / 'last.npz'}   to go on from: python train_char.py --resume --out {run.out} --iters MORE")
    print(f"{run.out / 'log.csv'}, {run.out / 'loss.png'}   the losses\n\nA sample:\n")
    params, config, extra = run.model.load_checkpoint(run.out / "best.npz")
    write_sample(run.model, params, config, extra, "", 600, temperature=0.8)


def catch_signals() -> list[int]:
    """A list that Ctrl-C and SIGTERM are noted in; a second one ends the process at once."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for stop in STOP_SIGNALS:
        signal.signal(stop, note)
    return caught


def main() -> None:
    plain_output()
    parser = build_parser()
    args = parser.parse_args()
    try:
        run = make_run(args)
        run.out.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            set_aside(run.out)
            save_last(run)  # before any work: is the folder writable?
        n_params = sum(p.size for p in run.params.values())
        print(f"{len(run.train_tokens):,} characters to train on, {len(run.val_tokens):,} to validate, "
              f"{len(run.vocab)} different ones; {n_params / 1e6:.2f}M parameters; {run.threads} threads")  # fmt: skip
        signals = catch_signals()
        val_loss = train(run, signals)
        plot(run)
        if signals:
            print(f"stopped at step {run.step} and saved; go on with: python train_char.py --resume --out {run.out}")
            sys.exit(128 + signals[0])
        for stop in STOP_SIGNALS:
            signal.signal(stop, signal.SIG_DFL)
        report(run, val_loss)
    except ValueError as error:
        parser.error(str(error))
    except BrokenPipeError:
        leave_quietly()
    except OSError as error:
        parser.error(f"{error.filename or args.out}: {error.strerror}")
    except MemoryError:
        parser.error("not enough memory; a smaller --batch-size, --context, --d-model or --n-layer needs less")
    except KeyboardInterrupt:  # before the first step: nothing to save yet
        sys.exit(130)


if __name__ == "__main__":
    main()
