"""Train a character-level Grassmann-flow model on any text, on a laptop.

  python train_char.py                          the text that every Python ships, a few minutes on two cores
  python train_char.py --data my.txt            your own text, UTF-8
  python train_char.py --data shakespeare       Tiny Shakespeare, downloaded once
  python train_char.py --resume                 go on after Ctrl-C, or with a larger --iters

Writes into --out: best.npz (lowest validation loss, for sample.py), last.npz (for --resume), log.csv, loss.png.
The last tenth of the text is held out for validation. Ctrl-C loses nothing.
"""

import cpu  # noqa: I001  (before NumPy)

import argparse
import csv
import math
import shlex
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

import runs
from runs import MODEL_DEFAULTS, PACE_DEFAULTS, Run
from cli import Parser, add_gpu_option, number, plain_output, short_errors
from sample import write_sample

LOG_EVERY = 10  # steps per line of log.csv; its training loss is their mean
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
STOP_SIGNALS = [stop for stop in STOP_SIGNALS if signal.getsignal(stop) != signal.SIG_IGN]  # (as nohup has it)

# ---- options ------------------------------------------------------------------------------------------


def parse_offsets(text: str) -> tuple[tuple[int, ...], ...]:
    """ "1,2;4" -> ((1, 2), (4,)): layers separated by semicolons, offsets by commas."""
    try:
        return tuple(tuple(int(delta) for delta in layer.split(",")) for layer in text.split(";"))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form "1,2;1,2;4;8"') from None


def build_parser() -> Parser:
    """Options are absent unless given (a resumed run must know which); the help texts name the defaults."""
    parser = Parser(__doc__)
    parser.argument_default = argparse.SUPPRESS
    parser.set_defaults(out=Path("out"), resume=False, gpu=False, threads=cpu.available_cores())
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
    add(model, "--d-ff", "inner width of the feed-forward network (default: 2 * d_model; 4 * d_model with attention)",
        type=size)  # fmt: skip
    add(model, "--rank", "width of the reduced states that span the planes", type=number(int, 2, 10**4))
    add(model, "--offsets", 'how far back each layer looks, e.g. "1,2;1,2;4;8" (default: from 1,2 in the '
        "first layers to 1,2,4,8,12,16 in the last; without taps 1;2;4;8;1;…)", type=parse_offsets)  # fmt: skip
    add(model, "--block", "residual block, or the paper's", choices=["prenorm", "paper"])
    add(model, "--taps", "learned weights per offset, or their plain average", action=argparse.BooleanOptionalAction)
    add(model, "--normalize", "divide bivectors by their length", action=argparse.BooleanOptionalAction)
    add(model, "--positions", "learned position vectors; sampling beyond the context then re-reads its last half",
        action=argparse.BooleanOptionalAction)  # fmt: skip
    add(model, "--mixer", "what mixes the tokens", choices=["grassmann", "attention"])
    add(model, "--n-head", "attention heads", type=size)
    return parser


# ---- training -----------------------------------------------------------------------------------------


def train(run: Run, signals: list[int]) -> float | None:
    """Steps until --iters or a signal; returns the last validation loss. Raises ValueError, OSError."""
    model, s = run.model, run.settings
    min_lr = s["lr"] / 10 if s["min_lr"] is None else s["min_lr"]
    start_step, started, before = run.step, time.perf_counter(), run.seconds
    bar = tqdm(total=s["iters"], initial=run.step, unit="step", disable=None, dynamic_ncols=True)
    val_loss, shown = None, {}
    with bar, runs.open_log(run) as log:
        while run.step < s["iters"] and not signals:
            x, y = model.get_batch(run.train_tokens, s["batch_size"], s["context"], s["seed"], run.step)
            lr = model.learning_rate(run.step, s["iters"], s["lr"], min_lr, s["warmup_iters"])
            loss, grads = model.loss_and_grads(run.params, run.config, x, y, (s["seed"], run.step), run.threads)
            if s["grad_clip"]:
                model.clip_grads(grads, s["grad_clip"])
            model.adamw_step(run.params, grads, run.optimizer, run.step, lr, weight_decay=s["weight_decay"])
            run.step += 1
            run.recent.append(loss)
            run.seconds = before + time.perf_counter() - started
            bar.update()
            validate = run.step % s["eval_every"] == 0 or run.step == s["iters"]
            if not validate and run.step % LOG_EVERY:
                continue
            losses = runs.checked_losses(run)
            train_loss = math.fsum(losses) / len(losses)
            if validate:
                val_loss = model.validation_loss(run.params, run.config, run.val_tokens, run.threads)
                if not math.isfinite(val_loss):
                    raise ValueError(runs.diverged(run, "validation loss", val_loss, run.step))
                shown["val"] = f"{val_loss:.4f}"
            log.write(f"{run.step},{train_loss},{val_loss if validate else ''},{lr},{run.seconds:.2f}\n")
            run.recent = []
            speed = (run.step - start_step) * s["batch_size"] * s["context"] / (run.seconds - before)
            bar.set_postfix(loss=f"{train_loss:.4f}", **shown, chars_per_s=f"{speed:,.0f}", refresh=False)
            if validate:
                if run.best is None or val_loss < run.best[1]:
                    run.best = [run.step, val_loss]
                    runs.save(run, "best.npz")
                runs.save_last(run)
                both = f"train {train_loss:.4f}   val {val_loss:.4f} nats/char"  # (last: the reader may have gone)
                bar.write(f"step {run.step:6d}   {both}   {run.seconds:6.1f} s")
        if signals:
            runs.save_last(run)
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


def report(run: Run, val_loss: float, go_on: str) -> None:
    """The numbers, the files and a sample; `go_on` is the command that trains further."""
    step, best = run.best
    for name, loss in (("best", best), ("last", val_loss)):
        at = step if name == "best" else run.step
        print(f"{name} validation loss {loss:.4f} nats, {loss / math.log(2):.4f} bits per character, at step {at}")
    print(f"{run.out / 'best.npz'}   to sample from: python sample.py {shlex.quote(str(run.out / 'best.npz'))}")
    print(f"{run.out / 'last.npz'}   to go on from: {go_on} --iters MORE")
    print(f"{run.out / 'log.csv'}, {run.out / 'loss.png'}   the losses\n\nA sample:\n")
    params, config, extra = run.model.load_checkpoint(run.out / "best.npz")
    write_sample(run.model, params, config, extra, "", 600, temperature=0.8)


def catch_signals() -> list[int]:
    """A list that Ctrl-C, SIGTERM and a closed terminal are noted in; a second Ctrl-C ends the process at once."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL if number in (signal.SIGINT, signal.SIGTERM) else signal.SIG_IGN)

    for stop in STOP_SIGNALS:
        signal.signal(stop, note)
    return caught


def main() -> None:
    plain_output()
    parser = build_parser()
    args = parser.parse_args()
    memory = "not enough memory; a smaller --batch-size, --context, --d-model or --n-layer needs less"
    with short_errors(parser, args.out, memory):
        run = runs.make_run(args, parser)
        run.out.mkdir(parents=True, exist_ok=True)
        runs.claim(run.out)
        if not args.resume:
            runs.set_aside(run.out)
            runs.save_last(run)  # before any work: is the folder writable?
        n_params = sum(p.size for p in run.params.values())
        print(f"{len(run.train_tokens):,} characters to train on, {len(run.val_tokens):,} to validate, "
              f"{len(run.vocab)} different ones; {n_params / 1e6:.2f}M parameters; {run.threads} threads")  # fmt: skip
        signals = catch_signals()
        val_loss = train(run, signals)
        plot(run)
        gpu = ["--gpu"] * args.gpu + (["--precision", args.precision] if args.precision else [])
        go_on = shlex.join(["python", "train_char.py", "--resume", "--out", str(run.out), *gpu])
        if signals and run.step < run.settings["iters"]:
            print(f"stopped at step {run.step} and saved; go on with: {go_on}")
            sys.exit(128 + signals[0])
        for stop in STOP_SIGNALS:
            signal.signal(stop, signal.SIG_DFL)
        report(run, val_loss, go_on)


if __name__ == "__main__":
    main()
