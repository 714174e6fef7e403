"""Kill a training run again and again, resume it each time; does it equal one that was left alone?

  python tests/programs/kill_and_resume.py --kills 50

SIGKILL cannot be caught: nothing is flushed or tidied up, as when the power fails. A third of the
kills fall into the program's start, a third anywhere in its work, a third as soon as a checkpoint's
.tmp file is seen. After each, last.npz and best.npz must load, and the run must not have gone back.
In the end both runs must agree bit for bit. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: F401, E402, I001  (before NumPy)

from checkpoint import load_checkpoint  # noqa: E402

TEXT = "".join(f"{k} times {k} is {k * k}\n" for k in range(200))
MODEL = ["--context", "8", "--n-layer", "2", "--d-model", "8", "--rank", "3", "--batch-size", "4"]


def log_lines(folder: Path) -> list[str]:
    """The lines of log.csv without their last column, the seconds."""
    lines = (folder / "log.csv").read_text(encoding="utf-8").splitlines()
    return [line.rpartition(",")[0] for line in lines]


def contents(checkpoint: Path) -> dict:
    """All that is in a checkpoint, arrays as bytes, without the seconds."""
    params, config, extra = load_checkpoint(checkpoint)
    extra.pop("seconds", None)
    everything = extra | {"param": params, "config": config}
    if "log" in extra:
        everything["log"] = [row[:-1] for row in extra["log"]]
    arrays = {"param", "adam_m", "adam_v"} & everything.keys()
    flat = {key: {name: a.tobytes() for name, a in everything[key].items()} for key in arrays}
    return everything | flat


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs don't have in common, bit for bit; only the seconds may differ."""
    found = [] if log_lines(one) == log_lines(other) else ["log.csv"]
    for name in ("best.npz", "last.npz"):
        a, b = contents(one / name), contents(other / name)
        found += [f"{name}: {key}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return found


def written(*files: Path) -> list[int]:
    """When each file was last written, 0 for one that is not there."""
    times = []
    for file in files:
        try:
            times.append(file.stat().st_mtime_ns)
        except FileNotFoundError:
            times.append(0)
    return times


def newly(files: list[Path], before: list[int]) -> bool:
    """Has one of the files been written since? (One that was renamed away has not.)"""
    return any(now not in (0, then) for now, then in zip(written(*files), before, strict=True))


def wait_for(process: subprocess.Popen, *files: Path) -> None:
    """Return as soon as one of the files is written, or the process ends."""
    before = written(*files)
    while process.poll() is None and not newly(files, before):
        time.sleep(0.0002)


def main(argv: list[str] | None = None) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--kills", type=int, default=50, help="(default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        text, alone, out = Path(folder, "text.txt"), Path(folder, "alone"), Path(folder, "killed")
        last, best = out / "last.npz", out / "best.npz"
        unfinished = [out / "last.npz.tmp", out / "best.npz.tmp"]
        text.write_text(TEXT, encoding="utf-8")
        Path(folder, "matplotlib.py").write_text("raise ImportError")  # to draw takes longer than to train
        env = os.environ | {"PYTHONPATH": folder}
        train = [sys.executable, ROOT / "train_char.py"]
        new = [*MODEL, "--dropout", "0.1", "--threads", "2", "--eval-every", "5", "--data", text,
               "--iters", str(100 + 40 * args.kills)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": env, "text": True}
        subprocess.run([*train, *new, "--out", alone], check=True, **pipes)

        kills = step = writing = 0
        while True:
            command = [*train, *(["--resume"] if last.exists() else new), "--out", out]
            process = subprocess.Popen(command, **pipes)
            before = written(*unfinished)
            if kills < args.kills:
                if kills % 3 == 0:
                    time.sleep(rng.uniform(0, 0.3))
                else:
                    for _ in range(rng.randint(1, 3)):
                        wait_for(process, last)
                    if kills % 3 == 1:
                        time.sleep(rng.uniform(0, 0.02))
                    else:
                        wait_for(process, *unfinished[: rng.randint(1, 2)])
                process.kill()
            errors = process.communicate()[1]
            if process.returncode == 0:
                break
            if process.returncode != -9:
                print(f"after {kills} kills, it ended with {process.returncode}: {errors}")
                return 1
            kills += 1
            writing += newly(unfinished, before)
            try:
                steps = [load_checkpoint(file)[2]["step"] for file in (best, last) if file.exists()]
            except ValueError as error:
                print(f"after kill {kills}: {error}")
                return 1
            if step and (not last.exists() or steps[-1] < step):
                print(f"kill {kills} took the run back from step {step}")
                return 1
            step = steps[-1] if steps else 0

        wrong = differences(alone, out)
        result = f"DIFFERS in {wrong}" if wrong else "equals, bit for bit, one that was left alone"
        print(f"{kills} kills up to step {step}, {writing} of them while a checkpoint was written; "
              f"the run {result}")
        if kills < args.kills:
            print(f"the run ended before {args.kills} kills")
        return 1 if wrong or kills < args.kills else 0


if __name__ == "__main__":
    sys.exit(main())
