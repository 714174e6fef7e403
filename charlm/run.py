"""A run of train_char.py on disk: its folder, its checkpoints, its log, its plot."""

from __future__ import annotations

import itertools
import logging
import math
import os
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from types import ModuleType

from charlm import processes
from charlm.checkpoint import load_checkpoint, save_checkpoint
from charlm.text import WRITTEN, Corpus, visible
from charlm.training import SHARD_TOKENS, Training
from grassmann import Config, Params, UserError, param_shapes, require


@dataclass
class Row:
    """A row of log.csv."""

    step: int
    train_loss: float  # mean since the row before
    val_loss: float | None  # at a validation
    lr: float  # of the last step
    grad_norm: float | None  # of the last step, before clipping; a GPU does not tell it
    tokens_per_second: float | None  # of training so far
    train_seconds: float  # in training steps so far, without validation, plot and sample


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0  # in training steps so far
    recent: list = field(default_factory=list)  # training losses since the last row of the log
    grad_norm: float | None = None  # of the last step
    best: tuple[int, float] | None = None  # step and validation loss of best.npz
    log: list[Row] = field(default_factory=list)


@dataclass
class Saved:
    """What last.npz holds: what a run needs to go on."""

    params: Params
    optimizer: dict[str, Params]
    config: Config
    settings: dict
    vocab: list[int]
    text_sha256: str
    at: Progress


@dataclass
class Run:
    """The model, its text, its settings, and how far its training is."""

    model: ModuleType  # grassmann or gpu
    out: Path
    threads: int  # 0: on a GPU
    settings: dict  # the values of all train_char.OPTIONS
    corpus: Corpus
    config: Config
    training: Training
    params: Params
    optimizer: dict[str, Params]
    at: Progress

    def save(self, name: str) -> None:
        """Write best.npz, to sample from, or last.npz, for --resume; and log.csv.

        Raises UserError and OSError.
        """
        extra = {
            "vocab": self.corpus.vocab,
            "most_common": self.corpus.most_common,
            "settings": {k: v for k, v in self.settings.items() if not hasattr(self.config, k)},
            "text_sha256": self.corpus.sha256,
            "step": self.at.step,
            "best": self.at.best and [*self.at.best],
        }
        if name == "last.npz":
            extra |= self.optimizer
            extra |= {
                "seconds": self.at.seconds,
                "log": [[*astuple(row)] for row in self.at.log],
                "recent": self.losses(),
                "grad_norm": self.at.grad_norm,
            }
        if processes.world().rank > 0:
            return
        try:
            save_checkpoint(self.out / name, self.params, self.config, **extra)
            self.write_log()
        except OSError as error:
            error.filename = error.filename or self.out / name
            raise

    def write_log(self) -> None:
        """Write log.csv. Raises OSError, and then the old file is still there."""
        lines = [",".join(f.name for f in fields(Row))]
        for row in self.at.log:
            lines.append(",".join("" if cell is None else str(cell) for cell in astuple(row)))
        unfinished = self.out / "log.csv.tmp"
        try:
            unfinished.write_text("\n".join([*lines, ""]), encoding="ascii", newline="\n")
            unfinished.replace(self.out / "log.csv")
        finally:
            unfinished.unlink(missing_ok=True)

    def losses(self) -> list[float]:
        """The training losses since the last row of the log, as numbers.

        Waits for a GPU. Raises UserError.
        """
        if self.at.recent:
            array = self.model.np
            losses = [array.asarray(loss) for loss in self.at.recent]
            self.at.recent = array.stack(losses).tolist()
        last = self.out / "last.npz"
        for loss in self.at.recent:
            became = f"the loss became {loss} before step {self.at.step}"
            advice = f"{self.too_high()}; {last} is the last good checkpoint"
            require(math.isfinite(loss), f"{became}: {advice}")
        return self.at.recent

    def too_high(self) -> str:
        """What to do if the numbers grow beyond all bounds."""
        # A step multiplies matrices by 1 - lr weight_decay.
        shrunk = self.training.lr * self.training.weight_decay
        return "lower --weight-decay" if shrunk > 1 else "lower --lr"

    def plot(self) -> str:
        """Write loss.png. Returns "", or why not: a user's matplotlib can fail in many ways."""
        try:
            logging.getLogger("matplotlib").setLevel(logging.ERROR)  # not about its cache
            from matplotlib.figure import Figure

            log, last = self.at.log, self.at.log[-1]
            validated = [row for row in log if row.val_loss is not None]
            best = self.at.best[1] if self.at.best else last.val_loss
            steps = [row.step for row in log]
            trained = [row.train_loss for row in log]
            figure = Figure(figsize=(7, 6.5), layout="constrained")
            axes, whole = figure.subplots(2, sharex=True, height_ratios=[3, 1])
            axes.plot(steps, trained, label="training", lw=0.8)
            val_steps, val_losses = zip(
                *[(row.step, row.val_loss) for row in validated], strict=True
            )
            axes.plot(val_steps, val_losses, "o-", label="validation", lw=0.8, ms=3)
            axes.axhline(best, color="gray", ls=":", label=f"best {best:.3f}")
            axes.set(ylabel="loss (nats per character)")
            axes.set_ylim(top=1.05 * max(trained[len(log) // 20 :]))  # not the fall at first
            axes.legend(frameon=False)
            whole.plot(steps, trained, lw=0.8)
            whole.set(xlabel="step", ylabel="training loss")
            rates = whole.twinx()
            rates.plot(steps, [row.lr for row in log], color="gray", ls=":")
            rates.set(ylabel="learning rate (dotted)")
            figure.savefig(self.out / "loss.png", dpi=130)
            return ""
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.100}"
            advice = "; pip install -r requirements.txt" * isinstance(error, ImportError)
            return f"\nno loss.png: {reason}{advice}"


def read_run(model: ModuleType, last: Path) -> Saved:
    """What last.npz holds. Raises UserError and OSError."""
    require(last.exists(), f"nothing to resume: {last} does not exist")
    params, config, extra = load_checkpoint(last, getattr(model, "Flat", dict))
    try:
        settings = extra["settings"]
        step, seconds, best = extra["step"], float(extra["seconds"]), extra["best"]
        require(0 <= step < 1e18 and settings["eval_every"] >= 1, "")
        if best is not None:
            best = int(best[0]), float(best[1])
        norm = extra.get("grad_norm")  # version 3.0 did not have it
        at = Progress(
            step=int(step),
            seconds=seconds,
            recent=[float(loss) for loss in extra["recent"]],
            grad_norm=norm if norm is None else float(norm),
            best=best if last.with_name("best.npz").exists() else None,
            log=[read_row(cells) for cells in extra["log"]],
        )
        "".join([extra["text_sha256"], *(settings["data"] or ())])  # fails unless they are strings
        optimizer = {name: extra[name] for name in ("adam_m", "adam_v")}
        Training(**{f.name: settings[f.name] for f in fields(Training)})
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError):
        raise UserError(
            f"{last} cannot be resumed: settings or progress are missing or make no sense"
        ) from None
    settings |= {f.name: getattr(config, f.name) for f in fields(Config)[1:]}
    return Saved(params, optimizer, config, settings, extra["vocab"], extra["text_sha256"], at)


def read_row(cells: list) -> Row:
    """A row of the log in last.npz. Raises TypeError, ValueError and ArithmeticError."""
    step, train_loss, val_loss, lr, *rest = cells
    norm, pace, seconds = rest if len(rest) == 3 else (None, None, *rest)  # as in version 3.0
    losses = float(train_loss), known(val_loss)
    return Row(int(step), *losses, float(lr), known(norm), known(pace), float(seconds))


def known(value: object) -> float | None:
    """None, or a number as JSON has it. Raises TypeError."""
    if not (value is None or isinstance(value, (int, float))):
        raise TypeError(value)
    return value


def check_memory(config: Config, batch_size: int, threads: int) -> None:
    """Does the run need more memory than the machine has? Nothing is allocated yet.

    Raises UserError.
    """
    if not hasattr(os, "sysconf"):  # Windows
        return
    here = processes.world()
    n_params = sum(math.prod(shape) for shape in param_shapes(config).values())
    of_mixer = 3 * config.rank**2
    if config.mixer == "attention":
        of_mixer = 4 * config.n_head * config.context
    of_layer = 16 * config.d_model + 6 * config.d_ff + of_mixer
    per_token = config.n_layer * of_layer + 4 * config.vocab_size
    rows = math.ceil(batch_size / here.size)
    tokens = min(rows * config.context, threads * max(SHARD_TOKENS, config.context))
    numbers = n_params * (5 + threads) + tokens * per_token + 4 * batch_size * config.context
    needed = 4e-9 * here.local_size * numbers
    has = 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lower = "lower --batch-size, --d-model, --threads"
    require(needed <= has, f"needs {needed:.1f} GB of memory (here {has:.1f}): {lower}")


def lock(out: Path) -> None:
    """Reserve the folder until this process ends, because two runs would mix their files.

    Raises UserError.
    """
    if processes.world().rank > 0:
        return
    try:
        import fcntl

        folder = os.open(out, os.O_RDONLY)  # never closed: the lock ends with the process
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing into {out}; give this run another --out") from None
    except (ImportError, OSError):
        return  # Windows, or a file system without locks


def set_aside(out: Path) -> None:
    """Move an earlier run to out/previous-N. Raises UserError if other files are in the way."""
    if processes.world().rank > 0:
        return
    found = [out / name for name in WRITTEN if (out / name).exists()]
    names = {path.name for path in found}
    if not names & {"best.npz", "last.npz"}:
        strange = f"{out} has a log.csv or loss.png, but no run; give another --out"
        require(not names & {"log.csv", "loss.png"}, strange)
        return
    folders = (out / f"previous-{k}" for k in itertools.count(1))
    folder = next(path for path in folders if not path.exists())
    folder.mkdir()
    for path in found:
        path.rename(folder / path.name)
    moved = f"the earlier run in {out} is now in {folder}"
    print(visible(f"{moved} (--resume would have gone on with it)"))
