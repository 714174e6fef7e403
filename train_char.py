"""Train a character-level Grassmann-flow model on any text, on a laptop.

  python train_char.py                          the text that every Python ships, some minutes
  python train_char.py my.txt                   your own text, UTF-8: files, folders; - is stdin
  python train_char.py shakespeare              Tiny Shakespeare, downloaded once
  python train_char.py --paper                  the paper's own model instead of ours
  python train_char.py --resume                 go on after Ctrl-C, or with a larger --iters
  python train_char.py --init out/best.npz my.txt --out mine    go on with another text
  mpiexec -n 4 python train_char.py             on four processes: pip install -e '.[mpi]'

Writes into --out: best.npz (lowest validation loss), last.npz (to resume), log.csv, loss.png. The
last tenth of the text is held out for validation. Ctrl-C saves and stops.
"""

from __future__ import annotations

from charlm import command_line

command_line.prepare(__name__)  # before NumPy

import argparse
import math
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from charlm import processes
from charlm.checkpoint import load_checkpoint
from charlm.run import Progress, Row, Run, Saved, check_memory, lock, read_run, set_aside
from charlm.text import decode, read_corpus, start_token, visible
from charlm.trained import continue_text, load_trained, write_text
from charlm.training import Training, in_threads, train_step
from grassmann import Config, Params, require

LOG_EVERY = 10  # steps per row of log.csv; the row has their mean training loss
# Characters. A longer held-out text is validated on evenly spread pieces.
MOST_VALIDATED = 200_000
PIECE = 10_000

# ---- options -------------------------------------------------------------------------------------


def offsets(text: str) -> tuple[tuple[int, ...], ...]:
    """ "1,2;4" -> ((1, 2), (4,)): layers separated by semicolons, offsets by commas."""
    return tuple(tuple(int(delta) for delta in layer.split(",")) for layer in text.split(";"))


def whole(text: str) -> int:
    """A whole number of an ordinary size."""
    number = int(text)
    if abs(number) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text[:12]}… is too large")
    return number


def folder(text: str) -> Path:
    """A folder that need not exist. ~ is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("needs the name of a folder")
    return Path(text).expanduser()


OF_TRAINING = [f.name for f in fields(Training)]
OF_MODEL = [f.name for f in fields(Config)[1:]]
DEFAULTS = {"data": None, "eval_every": 250} | {
    f.name: f.default for f in fields(Training) + fields(Config)[1:]
}
# What --resume may change.
MAY_CHANGE = ("data", "iters", "lr", "min_lr", "warmup_iters", "eval_every")
OPTIONS: dict[str, tuple[Any, str]] = {  # name: (type, choices or bool, help)
    "data": (
        str,
        "UTF-8 files, folders, 'folder/**/*.py', shakespeare or - for standard input "
        "(default: Python's documentation)",
    ),
    "iters": (whole, "training steps"),
    "batch_size": (whole, "windows of text per step"),
    "lr": (float, "learning rate at its peak"),
    "min_lr": (float, "learning rate at the end (default: lr / 10)"),
    "warmup_iters": (whole, "steps until the peak"),
    "weight_decay": (float, "AdamW's weight decay, for matrices only"),
    "grad_clip": (float, "largest norm of the gradient; 0: no clipping"),
    "dropout": (float, "fraction of activations dropped"),
    "eval_every": (whole, "steps between validations and checkpoints"),
    "seed": (whole, "decides initial weights, batches and dropout"),
    "context": (whole, "characters per window"),
    "n_layer": (whole, "blocks"),
    "d_model": (whole, "width of the hidden states"),
    "d_ff": (whole, "inner width of the FFN (default: 2 d_model; 4 d_model with attention)"),
    "rank": (whole, "width of the reduced states that span the planes"),
    "offsets": (
        offsets,
        'how far back each layer looks, e.g. "1,2;1,2;4;8" (default: from 1,2 in the first layers '
        "to 1,2,4,8,12,16 in the last; --no-taps: 1;2;4;8;1;…; --paper: 1;2;4;8;12;16)",
    ),
    "block": (["prenorm", "paper"], "a block with a residual path, or the paper's block"),
    "taps": (bool, "learned weights for each offset; --no-taps: the average over the offsets"),
    "normalize": (bool, "divide bivectors by their length"),
    "positions": (
        bool,
        "learned position vectors; at the end of the context a sample re-reads its last half",
    ),
    "mixer": (
        str,
        "what mixes the tokens: grassmann, attention, or a file with a layer of your own",
    ),
    "n_head": (whole, "attention heads"),
    "memory": (bool, "a memory in every layer that all tokens so far have written"),
}
NO_USE = {"attention": ("rank", "offsets", "taps", "normalize", "memory"), "grassmann": ("n_head",)}
NO_USE_IN_OWN_LAYER = ("taps", "normalize", "memory", "n_head")
PRESETS: dict[str, dict] = {
    "laptop": {},  # the defaults
    "tiny": {"iters": 1000, "d_model": 64, "eval_every": 100},
    "best": {
        "iters": 8000,
        "eval_every": 500,
        "n_layer": 6,
        "d_model": 224,
        "context": 1024,
        "batch_size": 2,
        "dropout": 0.25,
        "min_lr": 1e-4,
        "offsets": offsets("1,2;1,2,3,4;1,2,3,4,5,6;1,2,3,4,6,8;1,2,4,8,12,16;1,2,4,8,16,32,64"),
    },
}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def build_parser() -> command_line.Parser:
    """OPTIONS that are not typed are absent from the result.

    A resumed run must know which were typed.
    """
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("text", nargs="*", help="the same as --data")
    add(
        "--out",
        type=folder,
        default=Path("out"),
        help="folder for checkpoints, log and plot (default: out)",
    )
    add(
        "--preset",
        choices=PRESETS,
        help="laptop: the defaults; tiny: under a minute, to see that it learns; best: "
        "for a megabyte of text, half an hour or more",
    )
    add(
        "--paper",
        action="store_true",
        help="the paper's own model: its block, average, normalisation, positions, "
        "one offset a layer, d_ff = 4 d_model",
    )
    add(
        "--resume",
        action="store_true",
        help=f"go on from last.npz; may change: {', '.join(map(flag, MAY_CHANGE))}",
    )
    add("--init", type=Path, help="begin with the weights and sizes of this best.npz")
    add("--threads", type=whole, help="CPU threads (default: all cores)")
    command_line.add_gpu_option(parser)
    for name, (kind, text) in OPTIONS.items():
        how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if type(DEFAULTS[name]) in (int, float, str, bool):
            how["help"] += f" (default: {DEFAULTS[name]})"
        if isinstance(kind, list):
            how["choices"] = kind
        elif kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["type"] = kind
        if name == "data":
            how["nargs"] = "+"
        add(flag(name), **how)
    return parser


def paper(n_layer: int, d_model: int, context: int) -> dict:
    """--paper at any size.

    With twelve layers each offset serves two layers in a row, as in the paper.
    """
    deltas = [(1, 2, 4, 8, 12, 16)[i * 6 // max(6, n_layer)] for i in range(n_layer)]
    return {
        "block": "paper",
        "taps": False,
        "normalize": True,
        "positions": True,
        "d_ff": 4 * d_model,
        "offsets": tuple((delta if delta < context else 1,) for delta in deltas),
    }


def typed_options(args: argparse.Namespace) -> dict:
    """The OPTIONS that were typed. Raises UserError."""
    typed = {name: value for name, value in vars(args).items() if name in OPTIONS}
    if args.text:
        typed["data"] = [*typed.get("data", []), *args.text]
    if "data" in typed:
        plain = ("shakespeare", "-", "")  # not names of files
        paths = {name: os.path.abspath(os.path.expanduser(name)) for name in typed["data"]}
        typed["data"] = [name if name in plain else paths[name] for name in typed["data"]]
    if typed.get("mixer", "").endswith(".py"):  # docs/my_layer.py is one
        from charlm.own_layer import load_layer

        require(not args.gpu, f"{typed['mixer']} is a layer for NumPy: leave out --gpu")
        typed["mixer"] = load_layer(typed["mixer"])
    return typed


def choose_settings(args: argparse.Namespace, typed: dict, old: dict) -> dict:
    """A value for each of OPTIONS. Later ones win: defaults, `old`, preset, --paper, typed.

    Raises UserError if an option is of no use, or would change what a model or a run is.
    """
    preset = dict(PRESETS.get(args.preset, {}))
    if typed.keys() & {"n_layer", "context"}:
        preset.pop("offsets", None)  # they are for the preset's sizes
    asked = preset | typed
    settings = DEFAULTS | old | asked
    if args.paper:
        asked |= paper(settings["n_layer"], settings["d_model"], settings["context"]) | typed
    mixer = settings["mixer"]
    unused = [name for name in NO_USE.get(mixer, NO_USE_IN_OWN_LAYER) if name in asked]
    for name in unused:
        require(name not in typed, f"{flag(name)} is of no use with --mixer {mixer}")
        asked[name] = old.get(name, DEFAULTS[name])  # not the preset's value
    if unused:
        say(f"--mixer {mixer} has no use for {', '.join(map(flag, unused))}: left out")
    how, free = ("--resume", MAY_CHANGE) if args.resume else ("--init", ("dropout",))
    for name in sorted((asked.keys() & old.keys()) - set(free)):
        change = f"{how} cannot change {flag(name)}: it was {old[name]}, not {asked[name]}"
        require(asked[name] == old[name], change)
    return settings | asked


def check_settings(args: argparse.Namespace, typed: dict, settings: dict) -> None:
    """Raises UserError."""
    for name, value in ("--eval-every", settings["eval_every"]), ("--threads", args.threads):
        require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
    iters, warmup = settings["iters"], typed.get("warmup_iters", 0)
    longer = f"--warmup-iters {warmup} is longer than the run, --iters {iters}"
    require(warmup <= iters, longer)
    if args.resume and "data" not in typed:
        for name in settings["data"] or ():
            there = os.path.exists(name) or name in ("shakespeare", "-") or "*" in name
            gone = f"cannot read {name}: it is gone; if it was moved, add --data with its new place"
            require(there, gone)


def read_trained(model: ModuleType, path: Path) -> Saved:
    """A trained model, to begin with. Raises UserError and OSError."""
    params, config, extra = load_trained(model, path)
    settings = {name: getattr(config, name) for name in OF_MODEL}
    return Saved(params, {}, config, settings, extra["vocab"], "", Progress())


def take_over(model: ModuleType, params: Params, old: Saved, vocab: list[int]) -> None:
    """Copy the trained weights, in place. New characters keep their rows of E as drawn."""
    rows = {point: row for row, point in enumerate(old.vocab)}
    known = [point for point in vocab if point in rows]
    to = model.np.asarray([vocab.index(point) for point in known])
    source = model.np.asarray([rows[point] for point in known])
    for name, trained in old.params.items():
        if name == "E":
            params[name][to] = trained[source]
        else:
            params[name][...] = trained
    new = " ".join(repr(chr(point)) for point in vocab if point not in rows) or "none"
    gone = " ".join(repr(chr(point)) for point in old.vocab if point not in vocab) or "none"
    say(f"{len(known)} characters are known to the model; new: {new:.200}; gone: {gone:.200}")


def make_run(args: argparse.Namespace) -> Run:
    """A new run, or with --resume the run in last.npz. Raises UserError and OSError."""
    model, last = command_line.backend(args.gpu, args.precision), args.out / "last.npz"
    require(not (args.resume and args.init), "--init begins a run, --resume goes on with one")
    typed = typed_options(args)
    old = None
    at = Progress()
    if args.resume:
        old = read_run(model, last)
        at = old.at
    elif args.init:
        old = read_trained(model, args.init)
    settings = choose_settings(args, typed, old.settings if old else {})
    training = Training(**{name: settings[name] for name in OF_TRAINING})
    check_settings(args, typed, settings)
    owed = at.step == training.iters and len(at.recent) > 0  # stopped in its last validation
    finished = f"nothing to do: {last} is at step {at.step}; to go on, give more steps"
    require(at.step < training.iters or owed, f"{finished}, such as --iters {2 * at.step}")
    corpus = read_corpus(settings["data"], settings["context"])
    config = Config(len(corpus.vocab), **{name: settings[name] for name in OF_MODEL})
    threads = 0 if args.gpu else args.threads or processes.world().cores
    if not args.gpu:  # with a GPU, CuPy reports that its memory is full
        check_memory(config, training.batch_size, threads)
    if "#" in config.mixer:  # a layer of one's own
        from charlm.own_layer import check_layer

        check_layer(config.mixer, config)
    if old and args.resume:
        require(
            (corpus.sha256, config) == (old.text_sha256, old.config),
            f"--resume cannot change the text: {corpus.name} is not the text that {last} was "
            "trained on; it has changed, or it has CRLF line ends, which version 2.0 kept and this "
            "version reads as LF",
        )
        params, optimizer = old.params, old.optimizer
    else:
        params = model.init_params(config, training.seed)
        if old:
            take_over(model, params, old, corpus.vocab)
        optimizer = model.adamw_init(params)
    return Run(model, args.out, threads, settings, corpus, config, training, params, optimizer, at)


# ---- training ------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print a line above the progress bar.

    If it cannot be written (`| head`, a full disk), go on silently.
    """
    try:
        tqdm.write(visible(text))
        sys.stdout.flush()
    except OSError:
        command_line.leave_quietly()


def catch_signals() -> None:
    """From now on, Ctrl-C, SIGTERM and a closed terminal only fill processes.stops.

    `train` reads it.
    """
    here = processes.world()
    known = processes.caught if here.size > 1 else processes.stops  # all ranks must agree first

    def note(number: int, frame: object) -> None:
        known.append(number)
        interrupted = number == signal.SIGINT
        # A second Ctrl-C kills.
        signal.signal(number, signal.SIG_DFL if interrupted else signal.SIG_IGN)
        if interrupted and here.rank == 0:
            with suppress(OSError):  # as in `2>&1 | tee log`: Ctrl-C ends tee, too
                os.write(2, b"\nSaving. Ctrl-C again quits at once.\n")

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        stop = getattr(signal, name, signal.SIGINT)  # Windows has no SIGHUP
        if signal.getsignal(stop) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(stop, note)


def train(run: Run) -> None:
    """Train until --iters or a signal. Raises UserError and OSError."""
    at, iters = run.at, run.training.iters
    tokens = run.model.np.asarray(run.corpus.train)
    bar = tqdm(
        total=iters,
        initial=at.step,
        unit="step",
        disable=None,
        dynamic_ncols=True,
        smoothing=0,
    )
    with bar:
        log_step(run, bar)  # if the run was stopped in this validation
        while at.step < iters and not processes.stops:
            begin = time.perf_counter()
            # Draw a batch, derive the loss, clip the gradients, step. It changes params in place.
            loss, at.grad_norm = train_step(
                run.model,
                run.params,
                run.config,
                run.training,
                run.optimizer,
                at.step,
                tokens,
                run.threads,
            )
            at.recent.append(loss)
            at.step += 1
            at.seconds += time.perf_counter() - begin
            bar.update()
            log_step(run, bar)
    if processes.stops:
        run.save("last.npz")


def log_step(run: Run, bar: tqdm) -> None:
    """Write the row of the log and make the validation that are due. Raises UserError, OSError."""
    at = run.at
    validation = at.step % run.settings["eval_every"] == 0 or at.step == run.training.iters
    if not at.recent or not (validation or at.step % LOG_EVERY == 0):
        return
    begin = time.perf_counter()
    train_loss = math.fsum(run.losses()) / len(at.recent)  # a GPU is waited for here
    at.seconds += time.perf_counter() - begin
    val_loss = None
    if validation:
        val_loss = estimate_loss(run)
        if val_loss is None:  # a signal came; --resume validates again
            return
    tokens = at.step * run.training.batch_size * run.config.context
    at.log.append(
        Row(
            step=at.step,
            train_loss=train_loss,
            val_loss=val_loss,
            lr=run.training.rate(at.step - 1),
            grad_norm=None if at.grad_norm is None else float(at.grad_norm),
            tokens_per_second=round(tokens / at.seconds),
            train_seconds=round(at.seconds, 2),
        )
    )
    at.recent = []
    if val_loss is not None:
        if at.best is None or val_loss < at.best[1]:
            at.best = at.step, val_loss
            run.save("best.npz")
        run.save("last.npz")
        say(describe(run, at.log[-1]))
    best = f" best val {at.best[1]:.4f}" if at.best else ""
    bar.set_description_str(f"loss {train_loss:.4f}{best}", refresh=False)


def describe(run: Run, row: Row) -> str:
    """What is printed after a validation: the numbers, 70 characters of the model, the plot."""
    corpus = run.corpus
    start = [start_token(corpus.vocab, corpus.most_common)]
    written = run.model.generate(run.params, run.config, start, 70, temperature=0.8)
    line = decode(written, corpus.vocab).replace("\n", "⏎").replace("\t", " ")
    norm = "" if row.grad_norm is None else f"   gradient {row.grad_norm:.2f}"
    to_go = row.train_seconds * (run.training.iters / row.step - 1)
    problem = run.plot() if processes.world().rank == 0 else ""
    return (
        f"step {row.step:6d}   train {row.train_loss:.4f}   val {row.val_loss:.4f} nats/char   "
        f"lr {row.lr:.2g}{norm}   {row.tokens_per_second:,} tokens/s   "
        f"{row.train_seconds:.1f} s, {to_go:.0f} to go\n  {line}{problem}"
    )


def estimate_loss(run: Run) -> float | None:
    """The validation loss on at most MOST_VALIDATED characters, or None after a signal.

    Raises UserError.
    """
    tokens = run.model.np.asarray(run.corpus.val)
    pieces = [tokens]
    if len(tokens) > MOST_VALIDATED:
        starts = np.linspace(0, len(tokens) - PIECE - 1, MOST_VALIDATED // PIECE)
        pieces = [tokens[k : k + PIECE + 1] for k in starts.astype(int).tolist()]
    threads = partial(in_threads, threads=run.threads)
    each = partial(processes.shared_map, run=threads)
    losses = []
    for piece in pieces:
        losses.append(run.model.validation_loss(run.params, run.config, piece, each))
        if processes.stops:
            return None
    loss = math.fsum(losses) / len(losses)
    became = f"the validation loss became {loss} at step {run.at.step}"
    require(math.isfinite(loss), f"{became}: {run.too_high()}")
    return loss


# ---- the program ---------------------------------------------------------------------------------


def advice(run: Run, go_on: str) -> str:
    """What to try next, judging by the losses.

    experiments/README.md, "What to try next", has the measurements.
    """
    losses = [row.val_loss for row in run.at.log if row.val_loss is not None]
    loss, earlier = losses[-1], losses[-1 - len(losses) // 4]
    by_heart = loss - run.at.log[-1].train_loss > 0.15
    if len(losses) < 4 or loss < (0.95 if by_heart else 0.99) * earlier:
        return f"more steps\n{go_on} --iters {2 * run.at.step}"
    if by_heart:
        return f"more --dropout than {run.config.dropout}, or more text"
    return "a larger model: --preset best"


def announce(run: Run) -> None:
    """Say what is trained, on what and where to."""
    corpus, at = run.corpus, run.at
    n_params = sum(p.size for p in run.params.values())
    further = f", from step {at.step} on" if at.step else ""
    say(
        f"{corpus.name}: {len(corpus.train):,} characters to train on, {len(corpus.val):,} to "
        f"validate, {len(corpus.vocab):,} different ones\n{n_params / 1e6:.2f}M parameters; "
        f"threads: {run.threads or 'GPU'}, processes: {processes.world().size}; writing into "
        f"{run.out}{further}"
    )
    rate, last_rate = run.training.rate(at.step), at.log[-1].lr if at.log else 1.0
    if at.step > run.training.warmup_iters and rate > 1.1 * last_rate:  # more --iters than before
        say(f"the learning rate rises from {last_rate:.2g} to {rate:.2g} and falls again")


def conclude(run: Run, args: argparse.Namespace) -> None:
    """Say how it ended and what can be done next, and let the best model write."""
    own = ["--mixer", args.mixer] if "#" in run.config.mixer else []  # a layer of your own
    how = [*own]
    for name in ("threads", "precision"):
        if getattr(args, name):
            how += [flag(name), getattr(args, name)]
    if args.gpu:
        how.append("--gpu")
    best = run.out / "best.npz"
    go_on = command_line.command("train_char.py", "--resume", "--out", run.out, *how)
    write_more = command_line.command("sample.py", best, *own)
    at = run.at
    if processes.stops and (at.step < run.training.iters or at.recent):
        stopped = f"stopped at step {at.step} and saved; go on with: {go_on}"
        say(f"{stopped}\nsample from it with: {write_more}")
        sys.exit(128 + processes.stops[0])
    step, loss = at.best or (0, math.nan)
    plot = run.out / "loss.png"
    files = f"{run.out / 'log.csv'}, {plot}" if plot.exists() else f"{run.out / 'log.csv'}"
    say(
        f"best validation loss {loss:.4f} nats, {loss / math.log(2):.4f} bits per character, at "
        f"step {step}\n{files}: the losses; {best}: the model, for\n{write_more}\n"
        f"what to try next: {advice(run, go_on)}\n\nA sample:\n"
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # all is saved: Ctrl-C may end it
    if processes.world().rank == 0:
        trained = load_checkpoint(best, getattr(run.model, "Flat", dict))
        write_text("", continue_text(run.model, *trained, "", 600, temperature=0.8))


def main() -> None:
    command_line.plain_output()
    parser = build_parser()
    too_large = "not enough memory: lower --batch-size, --context, --d-model or --n-layer"
    with command_line.short_errors(parser, "mpiexec"):
        processes.world()
    with processes.together():
        args = parser.parse_args()
        with command_line.short_errors(parser, "standard output", too_large):
            if args.resume:
                lock(args.out)  # before last.npz is read
            run = make_run(args)
            if not args.resume:
                run.out.mkdir(parents=True, exist_ok=True)
                lock(run.out)
                set_aside(run.out)
                run.save("last.npz")  # before any work: is the folder writable?
            announce(run)
            catch_signals()
            train(run)
            conclude(run, args)


if __name__ == "__main__":
    main()
