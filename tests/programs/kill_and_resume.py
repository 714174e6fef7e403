"""Kill a training run again and again, and resume it each time.

Does it equal a run that was left alone?

  python tests/programs/kill_and_resume.py 50

Kills come at the start of the program, anywhere in its work, and while it writes a checkpoint.
After each kill the checkpoints must load, and the run must not have gone back. At the end both runs
agree bit for bit.
"""

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from charlm import command_line

command_line.prepare()  # before NumPy

from charlm.checkpoint import load_checkpoint

TEXT = "".join(f"{k} times {k} is {k * k}\n" for k in range(200))
MODEL = ["--context", "8", "--n-layer", "2", "--d-model", "8", "--rank", "3", "--batch-size", "4"]


def log_lines(folder: Path) -> list[str]:
    """The lines of log.csv without the last two columns, which are times."""
    return [line.rsplit(",", 2)[0] for line in (folder / "log.csv").read_text().splitlines()]


def contents(checkpoint: Path) -> dict:
    """Everything in a checkpoint except times, with arrays as bytes."""
    params, config, extra = load_checkpoint(checkpoint)
    everything = extra | {"param": params, "config": config, "seconds": None}
    everything["log"] = [row[:-2] for row in extra.get("log", [])]
    for key in {"param", "adam_m", "adam_v"} & everything.keys():
        everything[key] = {name: a.tobytes() for name, a in everything[key].items()}
    return everything


def differences(one: Path, other: Path) -> list[str]:
    """The files and keys in which two finished runs differ by a bit.

    Only times may differ.
    """
    found = [] if log_lines(one) == log_lines(other) else ["log.csv"]
    for name in ("best.npz", "last.npz"):
        a, b = contents(one / name), contents(other / name)
        found += [f"{name}: {key}" for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
    return found


def wait_for(process: subprocess.Popen, file: Path) -> None:
    """Return as soon as the file is written or the process ends."""
    before = file.stat().st_ino if file.exists() else None
    with contextlib.suppress(FileNotFoundError):
        while process.poll() is None and (not file.exists() or file.stat().st_ino == before):
            time.sleep(0.0002)


def main(wanted: int = 50) -> None:
    rng, kills, step = random.Random(0), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        text, alone, out = (Path(folder, name) for name in ("text.txt", "alone", "killed"))
        last = out / "last.npz"
        text.write_text(TEXT)
        Path(folder, "matplotlib.py").write_text("raise ImportError")  # drawing takes too long
        how = {"stdout": subprocess.DEVNULL, "env": os.environ | {"PYTHONPATH": folder}}
        new = [*MODEL, "--dropout", "0.1", "--threads", "2", "--eval-every", "5", "--data", text]
        train, new = (
            [sys.executable, ROOT / "train_char.py"],
            [*new, "--iters", str(100 + 40 * wanted), "--out"],
        )
        subprocess.run([*train, *new, alone], check=True, **how)
        while True:
            command = [*train, "--resume", "--out", out] if last.exists() else [*train, *new, out]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **how)
            if kills < wanted:
                for _ in range(rng.randint(1, 3) if kills % 3 else 0):
                    wait_for(process, last)
                if kills % 3 == 2:
                    wait_for(process, out / rng.choice(["last.npz.tmp", "best.npz.tmp"]))
                else:
                    time.sleep(rng.uniform(0, 0.02 if kills % 3 else 0.3))
                process.kill()
            errors = process.communicate()[1]
            if process.returncode == 0:
                break
            assert process.returncode == -9, (
                f"after {kills} kills, it ended with {process.returncode}: {errors}"
            )
            kills += 1
            before, step = (
                step,
                max((load_checkpoint(file)[2]["step"] for file in out.glob("last.npz")), default=0),
            )
            assert step >= before, f"kill {kills} took the run back from {before}"
            assert [load_checkpoint(file) for file in out.glob("best.npz")] or not step
        assert not (wrong := differences(alone, out)), (
            f"after {kills} kills, the run differs in {wrong}"
        )
        assert kills == wanted, f"the run ended after {kills} kills"
    print(
        f"{kills} kills up to step {step}: the run equals, bit for bit, a run that was left alone"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
