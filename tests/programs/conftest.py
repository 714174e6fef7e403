"""The programs as users run them: as real processes, or as main() in this process, on tiny
models."""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import kill_and_resume  # before NumPy
import numpy as np
import pytest
from kill_and_resume import MODEL, ROOT, TEXT

import train_char
from charlm import processes, run

Process = subprocess.CompletedProcess


def helper(function: Callable) -> Callable:
    """Makes the function a fixture with its own name."""
    return pytest.fixture(scope="session", name=function.__name__)(lambda: function)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, newline="\n")
    return path


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> dict[str, str]:
    """The environment of most programs here: without matplotlib, which takes a second to draw."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "matplotlib.py").write_text("raise ModuleNotFoundError")
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="session")
def start(plain) -> Callable:
    def start(name: str, *args, **how) -> subprocess.Popen:
        """Start a program of the root folder, its output in pipes."""
        words = [ROOT / name, *(word if isinstance(word, bytes) else str(word) for word in args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        return subprocess.Popen([sys.executable, *words], **pipes | {"env": plain} | how)

    return start


@helper
def ended(process: subprocess.Popen) -> Process:
    """Wait for a process. Returns what it printed."""
    out, errors = process.communicate(timeout=300)
    return Process(process.args, process.returncode, out, errors)


@pytest.fixture(scope="session")
def program(start, ended) -> Callable:
    """program(name, *args) runs a program to its end."""
    return lambda name, *args, **how: ended(start(name, *args, **how))


@pytest.fixture
def call(monkeypatch, text) -> Callable:
    def call(name: str, *args, stdin: bytes = b"") -> Process:
        """main() of a program, here, without plot, lock and signals. train_char.py gets a tiny
        model and a text."""
        if name == "train_char.py" and "--resume" not in args:
            args = (*MODEL, "--threads", 1, "--data", text, *args)
        module, code = importlib.import_module(name.removesuffix(".py")), 0
        out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(ROOT / name), *map(str, args)])
            for stream in (
                ("stdin", io.TextIOWrapper(io.BytesIO(stdin))),
                ("stdout", out),
                ("stderr", errors),
            ):
                patch.setattr(sys, *stream)
            patch.setattr(train_char, "lock", lambda out: None)
            patch.setattr(train_char, "catch_signals", lambda: None)
            patch.setattr(run.Run, "plot", lambda self: "")
            patch.setattr(processes, "stops", [])
            try:
                module.main()
            except SystemExit as end:
                code = end.code or 0
        printed = (stream.flush() or stream.buffer.getvalue().decode() for stream in (out, errors))
        return Process([name, *args], code, *printed)

    return call


@helper
def succeeded(process: Process) -> str:
    """The standard output of a program that ended without an error."""
    assert (process.returncode, process.stderr) == (0, ""), process
    return process.stdout


@helper
def refused(process: Process) -> str:
    """The one line with which a program stops. It must not be a traceback."""
    assert process.returncode == 2 and re.fullmatch(
        r"(train_char|sample)\.py: .+\n", process.stderr
    ), process
    assert "None" not in process.stderr and process.stderr[:-1].isprintable()
    return process.stderr


@pytest.fixture(scope="session")
def trained(program, text, succeeded, tmp_path_factory) -> tuple[Path, str]:
    """A run of 30 steps, with its plot: its folder and what it printed. Tests may read it only."""
    out, options = (
        tmp_path_factory.mktemp("run") / "out",
        ["--lr", 0.1, "--warmup-iters", 0, "--threads", 1],
    )
    options += ["--iters", 30, "--eval-every", 15, "--data", text, "--out", out]
    return out, succeeded(program("train_char.py", *MODEL, *options, env=None))


@helper
def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Wait until log.csv has this step or a later step. The run must be longer than that."""
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if int(kill_and_resume.log_lines(out)[-1].split(",")[0].replace("step", "0")) >= step:
                return
        time.sleep(0.001)
    raise AssertionError(f"the run ended first: {process.communicate()}")


@helper
def with_meta(checkpoint: Path, place: str, value: object) -> dict:
    """The checkpoint's arrays, with another value at a place of its description, such as
    "extra.settings.lr"."""
    with np.load(checkpoint) as file:
        arrays = dict(file)
    meta, (*groups, key) = json.loads(arrays["meta"].tobytes()), place.split(".")
    reduce(dict.get, groups, meta)[key] = value
    return arrays | {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
