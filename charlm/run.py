"""A run of train_char.py on disk: its folder, its checkpoints, its log, its plot."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType

from charlm import processes
from charlm.checkpoint import load_checkpoint, save_checkpoint
from charlm.text import WRITTEN, Corpus, visible
from charlm.training import SHARD_TOKENS, Training
from grassmann import Config, Params, UserError, param_shapes, require


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
    step: int = 0
    seconds: float = 0.0  # of training so far
    recent: list = field(default_factory=list)  # training losses since the last row of the log
    best: list | None = None  # step and validation loss of best.npz
    log: list[list] = field(default_factory=list)  # rows of log.csv

    def save(self, name: str) -> None:
        """Write best.npz, to sample from, or last.npz, for --resume; and log.csv.

        Raises UserError and OSError.
        """
        settings = {
            key: value for key, value in self.settings.items() if not hasattr(self.config, key)
        }
        extra = {
            "vocab": self.corpus.vocab,
            "most_common": self.corpus.most_common,
            "settings": settings,
            "text_sha256": self.corpus.sha256,
            "step": self.step,
            "best": self.best,
        }
        if name == "last.npz":
            extra |= {
                **self.optimizer,
                "seconds": self.seconds,
                "log": self.log,
                "recent": self.losses(),
            }
        if processes.rank == 0:
            save_checkpoint(self.out / name, self.params, self.config, **extra)
            rows = [["step", "train_loss", "val_loss", "lr", "seconds"], *self.log]
            lines = [",".join("" if cell is None else str(cell) for cell in row) for row in rows]
            (self.out / "log.csv.tmp").write_text(
                "\n".join([*lines, ""]), encoding="ascii", newline="\n"
            )
            (self.out / "log.csv.tmp").replace(self.out / "log.csv")

    def losses(self) -> list[float]:
        """The training losses since the last row of the log, as numbers.

        Waits for a GPU. Raises UserError.
        """
        if self.recent:
            array = self.model.np
            self.recent = array.stack([array.asarray(loss) for loss in self.recent]).tolist()
        require(
            all(map(math.isfinite, self.recent)),
            f"the loss became {(self.recent or [0])[-1]} before step "
            f"{self.step}: lower --lr; {self.out / 'last.npz'} is the last good checkpoint",
        )
        return self.recent

    def plot(self) -> str:
        """Write loss.png.

        Returns "", or a line that says why not: a user's matplotlib can fail in many ways.
        """
        try:
            from matplotlib.figure import Figure

            figure = Figure(figsize=(7, 4.2), layout="constrained")
            axes = figure.subplots()
            for k, name, style in (1, "training", "-"), (2, "validation", "o-"):
                points = [(row[0], row[k]) for row in self.log if row[k] is not None]
                axes.plot(*zip(*points, strict=True), style, label=name, lw=0.8, ms=3)
            axes.axhline(self.best[1], color="gray", ls=":", label=f"best {self.best[1]:.3f}")
            axes.set(xlabel="step", ylabel="loss (nats per character)")
            axes.set_ylim(
                top=1.05 * max(row[1] for row in self.log[len(self.log) // 20 :])
            )  # not the fall at first
            axes.legend(frameon=False)
            figure.savefig(self.out / "loss.png", dpi=130)
            return ""
        except Exception as error:
            return f"\nno loss.png: {type(error).__name__}: {' '.join(str(error).split()):.100}"


def read_run(model: ModuleType, last: Path) -> dict:
    """What last.npz holds. Raises UserError and OSError."""
    require(last.exists(), f"nothing to resume: {last} does not exist")
    params, config, extra = load_checkpoint(last, getattr(model, "Flat", dict))
    try:
        settings, best = extra["settings"], extra["best"]
        Training(**{f.name: settings[f.name] for f in fields(Training)})
        require(
            0 <= extra["step"] < 1e18
            and settings["eval_every"] >= 1
            and "adam_m" in extra
            and "adam_v" in extra,
            "",
        )
        extra |= {
            "params": params,
            "config": config,
            "step": int(extra["step"]),
            "seconds": float(extra["seconds"]),
            "settings": settings | {f.name: getattr(config, f.name) for f in fields(Config)[1:]},
            "recent": [float(loss) for loss in extra["recent"]],
            "best": [int(best[0]), float(best[1])] if best else None,
            "log": [
                [
                    int(step),
                    float(loss),
                    val if val is None else float(val),
                    float(rate),
                    float(seconds),
                ]
                for step, loss, val, rate, seconds in extra["log"]
            ],
        }
        "".join([extra["text_sha256"], *(settings["data"] or ())])  # fails unless they are strings
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError):
        raise UserError(
            f"{last} cannot be resumed: settings or progress are missing or make no sense"
        ) from None
    return extra if last.with_name("best.npz").exists() else extra | {"best": None}


def check_memory(config: Config, batch_size: int, threads: int) -> None:
    """Raises UserError, before anything is allocated, if the run needs more memory than the
    machine has."""
    n_params = sum(math.prod(shape) for shape in param_shapes(config).values())
    tokens = min(
        math.ceil(batch_size / processes.size) * config.context,
        threads * max(SHARD_TOKENS, config.context),
    )
    of_mixer = (
        4 * config.n_head * config.context if config.mixer == "attention" else 3 * config.rank**2
    )
    per_token = (
        config.n_layer * (16 * config.d_model + 6 * config.d_ff + of_mixer) + 4 * config.vocab_size
    )
    needed = (
        4e-9
        * processes.local_size
        * (n_params * (5 + threads) + tokens * per_token + 4 * batch_size * config.context)
    )
    if hasattr(os, "sysconf"):  # not Windows
        has = 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        require(
            needed <= has,
            f"needs {needed:.1f} GB of memory (here {has:.1f}): "
            "lower --batch-size, --d-model, --threads",
        )


def lock(out: Path) -> None:
    """Reserve the folder until this process ends, because two runs would mix their files.

    Raises UserError.
    """
    try:
        import fcntl

        if (
            processes.rank == 0
        ):  # the folder is never closed, so that the lock ends with the process
            fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing into {out}; give this run another --out") from None
    except (ImportError, OSError):
        return  # Windows, or a file system without locks


def set_aside(out: Path) -> None:
    """Move an earlier run to out/previous-N. Raises UserError if other files are in the way."""
    found = [name for name in WRITTEN if (out / name).exists()] if processes.rank == 0 else []
    if "best.npz" in found or "last.npz" in found:
        folder = next(
            path for k in itertools.count(1) if not (path := out / f"previous-{k}").exists()
        )
        folder.mkdir()
        for name in found:
            (out / name).rename(folder / name)
        print(
            visible(
                f"the earlier run in {out} is now in {folder} (--resume would have gone on with it)"
            )
        )
    else:
        require(
            not {"log.csv", "loss.png"} & {*found},
            f"{out} has a log.csv or loss.png, but no run; give another --out",
        )
