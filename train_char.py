"""Train a character-level Grassmann-flow model on any text, on a laptop.

  python train_char.py                          the text that every Python ships, some minutes
  python train_char.py --data my.txt            your own text, UTF-8: files, folders
  python train_char.py --data shakespeare       Tiny Shakespeare, downloaded once
  python train_char.py --paper                  the paper's own model instead of ours
  python train_char.py --resume                 go on after Ctrl-C, or with a larger --iters
  mpiexec -n 4 python train_char.py             on four processes (requirements-parallel.txt)

Writes into --out: best.npz (lowest validation loss), last.npz (to resume), log.csv, loss.png. The
last tenth of the text is held out for validation. Ctrl-C saves and stops.
"""

from __future__ import annotations

from charlm import command_line

command_line.prepare()  # before NumPy

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

import numpy as np
from tqdm import tqdm

from charlm import processes
from charlm.checkpoint import load_checkpoint
from charlm.run import Run, check_memory, lock, read_run, set_aside
from charlm.text import decode, read_corpus, start_token, visible
from charlm.trained import continue_text, write_text
from charlm.training import Training, in_threads, train_step
from grassmann import Config, require

LOG_EVERY = 10  # steps per row of log.csv; the row has their mean training loss
MOST_VALIDATED, PIECE = (
    200_000,
    10_000,
)  # characters; a longer held-out text is validated on evenly spread pieces

# ---- options -------------------------------------------------------------------------------------


def offsets(text: str) -> tuple[tuple[int, ...], ...]:
    """ "1,2;4" -> ((1, 2), (4,)): layers separated by semicolons, offsets by commas."""
    return tuple(tuple(int(delta) for delta in layer.split(",")) for layer in text.split(";"))


DEFAULTS = {"data": None, "eval_every": 250} | {
    f.name: f.default for f in fields(Training) + fields(Config)[1:]
}
MAY_CHANGE = (
    "data",
    "iters",
    "lr",
    "min_lr",
    "warmup_iters",
    "eval_every",
)  # what a resumed run may change
OPTIONS = {  # name: (type, choices or bool, help)
    "data": (
        str,
        "UTF-8 files, folders, 'folder/**/*.py' or shakespeare (default: Python's documentation)",
    ),
    "iters": (int, "training steps"),
    "batch_size": (int, "windows of text per step"),
    "lr": (float, "learning rate at its peak"),
    "min_lr": (float, "learning rate at the end (default: lr / 10)"),
    "warmup_iters": (int, "steps until the peak"),
    "weight_decay": (float, "AdamW's weight decay, for matrices only"),
    "grad_clip": (float, "largest norm of the gradient; 0: no clipping"),
    "dropout": (float, "fraction of activations dropped"),
    "eval_every": (int, "steps between validations and checkpoints"),
    "seed": (int, "decides initial weights, batches and dropout"),
    "context": (int, "characters per window"),
    "n_layer": (int, "blocks"),
    "d_model": (int, "width of the hidden states"),
    "d_ff": (int, "inner width of the FFN (default: 2 d_model; 4 d_model with attention)"),
    "rank": (int, "width of the reduced states that span the planes"),
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
    "n_head": (int, "attention heads"),
    "memory": (bool, "a memory in every layer that all tokens so far have written"),
}
NO_USE = {"attention": ("rank", "offsets", "taps", "normalize", "memory"), "grassmann": ("n_head",)}
PRESETS = {
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
    """OPTIONS that are not typed are absent from the result, since a resumed run must know which
    were typed."""
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
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
    add("--threads", type=int, default=processes.cores, help="CPU threads (default: all cores)")
    command_line.add_gpu_option(parser)
    for name, (kind, text) in OPTIONS.items():
        how = {"choices": kind} if isinstance(kind, list) else {"type": kind}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
        text += "" if DEFAULTS[name] is None else f" (default: {DEFAULTS[name]})"
        add(
            flag(name),
            help=text,
            default=argparse.SUPPRESS,
            **how,
            **{"nargs": "+"} if name == "data" else {},
        )
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


def make_run(args: argparse.Namespace) -> Run:
    """A new run, or with --resume the run in last.npz. Raises UserError and OSError."""
    model, last = command_line.backend(args.gpu, args.precision), args.out / "last.npz"
    typed = {name: value for name, value in vars(args).items() if name in OPTIONS}
    if "data" in typed:
        typed["data"] = [
            name if name in ("shakespeare", "") else os.path.abspath(name) for name in typed["data"]
        ]
    if typed.get("mixer", "").endswith(".py"):  # docs/my_layer.py is one
        from charlm.own_layer import check_layer, load_layer

        require(not args.gpu, f"{typed['mixer']} is a layer for NumPy: leave out --gpu")
        typed["mixer"] = load_layer(typed["mixer"])
        check_layer(typed["mixer"])
    saved = read_run(model, last) if args.resume else {"settings": {}, "step": 0, "recent": []}
    old, asked = saved["settings"], PRESETS.get(args.preset, {}) | typed
    settings = (
        DEFAULTS | old | asked
    )  # later values win: defaults, saved run, preset, --paper, typed options
    if args.paper:
        asked |= paper(settings["n_layer"], settings["d_model"], settings["context"]) | typed
    for name in (unused := [name for name in NO_USE.get(settings["mixer"], ()) if name in asked]):
        require(name not in typed, f"{flag(name)} is of no use with --mixer {settings['mixer']}")
        asked[name] = old.get(name, DEFAULTS[name])  # not the preset's value
    if unused:
        say(f"--mixer {settings['mixer']} has no use for {', '.join(map(flag, unused))}: left out")
    settings |= asked
    for name in sorted((asked.keys() & old.keys()) - set(MAY_CHANGE)):
        require(
            asked[name] == old[name],
            f"--resume cannot change {flag(name)}: it was {old[name]}, not {asked[name]}",
        )
    training = Training(**{f.name: settings[f.name] for f in fields(Training)})
    step, iters = saved["step"], training.iters
    require(
        step < iters
        or (step == iters and saved["recent"]),  # it was stopped in its last validation
        f"nothing to do: {last} is at step {step}; to go on, give more steps, "
        f"such as --iters {2 * step}",
    )
    for name, value in ("--eval-every", settings["eval_every"]), ("--threads", args.threads):
        require(value >= 1, f"{name} must be at least 1, not {value}")
    for name in (old.get("data") or ()) if "data" not in typed else ():
        require(
            os.path.exists(name) or name == "shakespeare" or "*" in name,
            f"cannot read {name}: it is gone; if it was moved, add --data with its new place",
        )
    corpus = read_corpus(settings["data"], settings["context"])
    config = Config(len(corpus.vocab), **{f.name: settings[f.name] for f in fields(Config)[1:]})
    if not args.gpu:  # with a GPU, CuPy reports that its memory is full
        check_memory(config, training.batch_size, args.threads)
    if args.resume:
        require(
            (corpus.sha256, config) == (saved["text_sha256"], saved["config"]),
            f"--resume cannot change the text: {corpus.name} is not the text that {last} was "
            "trained on; it has changed, or it has CRLF line ends, which version 2.0 kept and this "
            "version reads as LF",
        )
    else:
        params = model.init_params(config, training.seed)
        saved = {"params": params, **model.adamw_init(params)}
    state = {
        name: saved[name] for name in ("step", "seconds", "recent", "best", "log") if name in saved
    }
    return Run(
        model,
        args.out,
        0 if args.gpu else args.threads,
        settings,
        corpus,
        config,
        training,
        saved["params"],
        {name: saved[name] for name in ("adam_m", "adam_v")},
        **state,
    )


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
    """From now on, Ctrl-C, SIGTERM and a closed terminal only fill processes.stops, which `train`
    reads."""

    def note(number: int, frame: object) -> None:
        (processes.caught if processes.size > 1 else processes.stops).append(
            number
        )  # all ranks must agree first
        signal.signal(
            number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN
        )  # a second Ctrl-C kills
        with suppress(OSError):  # as in `2>&1 | tee log`: Ctrl-C ends tee, too
            os.write(
                2,
                b"\nSaving. Ctrl-C again quits at once.\n"
                * (number == signal.SIGINT and processes.rank == 0),
            )

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if (
            signal.getsignal(stop := getattr(signal, name, signal.SIGINT)) != signal.SIG_IGN
        ):  # nohup ignores SIGHUP
            signal.signal(stop, note)


def train(run: Run) -> None:
    """Train until --iters or a signal. Raises UserError and OSError."""
    iters, tokens = run.training.iters, run.model.np.asarray(run.corpus.train)
    started = time.perf_counter() - run.seconds
    with tqdm(
        total=iters, initial=run.step, unit="step", disable=None, dynamic_ncols=True, smoothing=0
    ) as bar:
        while True:  # first the log and the validation that are due, then the next step
            due = run.step % run.settings["eval_every"] == 0 or run.step == iters
            if run.recent and (due or run.step % LOG_EVERY == 0):
                train_loss = math.fsum(run.losses()) / len(run.recent)
                val_loss = estimate_loss(run) if due else None
                if (
                    due and val_loss is None
                ):  # a signal came during the validation; --resume does it again
                    break
                run.log.append(
                    [
                        run.step,
                        train_loss,
                        val_loss,
                        run.training.rate(run.step - 1),
                        round(run.seconds, 2),
                    ]
                )
                run.recent = []
                if due:
                    if run.best is None or val_loss < run.best[1]:
                        run.best = [run.step, val_loss]
                        run.save("best.npz")
                    run.save("last.npz")
                    to_go = (time.perf_counter() - started) * (iters / run.step - 1)
                    start = [start_token(run.corpus.vocab, run.corpus.most_common)]
                    written = run.model.generate(run.params, run.config, start, 70, temperature=0.8)
                    line = decode(written, run.corpus.vocab).replace("\n", "⏎").replace("\t", " ")
                    line += (
                        run.plot() if processes.rank == 0 else ""
                    )  # empty, or why there is no plot
                    say(
                        f"step {run.step:6d}   train {train_loss:.4f}   val {val_loss:.4f} "
                        f"nats/char   {run.seconds:6.1f} s, {to_go:.0f} to go\n  {line}"
                    )
                best = f" best val {run.best[1]:.4f}" if run.best else ""
                bar.set_description_str(f"loss {train_loss:.4f}{best}", refresh=False)
            if processes.stops or run.step >= iters:
                break
            run.recent.append(
                train_step(  # it changes params and optimizer in place
                    run.model,
                    run.params,
                    run.config,
                    run.training,
                    run.optimizer,
                    run.step,
                    tokens,
                    run.threads,
                )
            )
            run.step += 1
            run.seconds = time.perf_counter() - started
            bar.update()
    if processes.stops:
        run.save("last.npz")


def estimate_loss(run: Run) -> float | None:
    """The validation loss on at most MOST_VALIDATED characters, or None after a signal.

    Raises UserError.
    """
    tokens, losses = run.model.np.asarray(run.corpus.val), []
    starts = np.linspace(0, len(tokens) - PIECE - 1, MOST_VALIDATED // PIECE).astype(int).tolist()
    each = partial(processes.shared_map, run=partial(in_threads, threads=run.threads or 1))
    for piece in (
        [tokens[k : k + PIECE + 1] for k in starts] if len(tokens) > MOST_VALIDATED else [tokens]
    ):
        losses.append(run.model.validation_loss(run.params, run.config, piece, each))
        if processes.stops:
            return None
    loss = math.fsum(losses) / len(losses)
    require(
        math.isfinite(loss), f"the validation loss became {loss} at step {run.step}: lower --lr"
    )
    return loss


# ---- the program ---------------------------------------------------------------------------------


def advice(run: Run, go_on: str) -> str:
    """What to try next, judging by the losses. experiments/README.md, "What to try next", has the
    measurements."""
    rows = [row for row in run.log if row[2] is not None]
    train_loss, loss, earlier = rows[-1][1], rows[-1][2], rows[-1 - len(rows) // 4][2]
    by_heart, still_short = loss - train_loss > 0.15, len(rows) < 4
    if still_short or loss < (0.95 if by_heart else 0.99) * earlier:
        return f"more steps\n{go_on} --iters {2 * run.step}"
    return (
        f"more --dropout than {run.config.dropout}, or more text"
        if by_heart
        else "a larger model: --preset best"
    )


@processes.together()
def main() -> None:
    command_line.plain_output()
    parser = build_parser()
    args = parser.parse_args()
    with command_line.short_errors(
        parser, args.out, "not enough memory: lower --batch-size, --context, --d-model or --n-layer"
    ):
        if args.resume:
            lock(args.out)  # before last.npz is read
        run = make_run(args)
        if not args.resume:
            run.out.mkdir(parents=True, exist_ok=True)
            lock(run.out)
            set_aside(run.out)
            run.save("last.npz")  # before any work: is the folder writable?
        corpus, n_params = run.corpus, sum(p.size for p in run.params.values())
        say(
            f"{corpus.name}: {len(corpus.train):,} characters to train on, {len(corpus.val):,} to "
            f"validate, {len(corpus.vocab):,} different ones\n{n_params / 1e6:.2f}M parameters; "
            f"threads: {run.threads or 'GPU'}, processes: {processes.size}; writing into {run.out}"
            + f", from step {run.step} on"
            * (run.step > 0)
        )
        rate, last_rate = run.training.rate(run.step), run.log[-1][3] if run.log else 1.0
        if (
            run.step > run.training.warmup_iters and rate > 1.1 * last_rate
        ):  # a run with more --iters
            say(f"the learning rate rises from {last_rate:.2g} to {rate:.2g} and falls again")
        catch_signals()
        train(run)
        how = ["--gpu"] * args.gpu + ["--precision", args.precision] * bool(args.precision)
        own = (
            ["--mixer", args.mixer] if "#" in run.config.mixer else []
        )  # a layer of your own has a hash
        go_on, best = (
            command_line.command("train_char.py", "--resume", "--out", run.out, *how, *own),
            run.out / "best.npz",
        )
        write_more = command_line.command("sample.py", best, *own)
        if processes.stops and (run.step < run.training.iters or run.recent):
            say(
                f"stopped at step {run.step} and saved; go on with: {go_on}\n"
                f"sample from it with: {write_more}"
            )
            sys.exit(128 + processes.stops[0])
        step, loss = run.best
        say(
            f"best validation loss {loss:.4f} nats, {loss / math.log(2):.4f} bits per "
            f"character, at step {step}\n"
            f"{run.out / 'log.csv'}, {run.out / 'loss.png'}: the losses; {best}: the model, for\n"
            f"{write_more}\nwhat to try next: {advice(run, go_on)}\n\nA sample:\n"
        )
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # all is saved: Ctrl-C may end it at once
        if processes.rank == 0:
            trained = load_checkpoint(best, getattr(run.model, "Flat", dict))
            write_text("", continue_text(run.model, *trained, "", 600, temperature=0.8))


if __name__ == "__main__":
    main()
