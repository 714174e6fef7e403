"""What the programs share: settings for NumPy, options, errors in one line, NumPy or CuPy.

Import it before NumPy: a BLAS reads its settings once, as it loads. Neither of the two changes what
is computed.

1. One BLAS thread. The matrices of a small model are too small to share between cores; training.py
   splits the batch instead. (A variable that is set already stays as it is.)
2. With glibc, keep freed memory. By default the space of large temporaries goes back to the system
   when they are freed, and the next step has to fault it in anew: a third of a step on one thread.
"""

# ruff: noqa: E402  (imports are where Ctrl-C comes, and where a package is missing)

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"this needs Python 3.10 or newer, not {sys.version.split()[0]}")

def without_traceback(kind: type, error: BaseException, trace: object) -> None:
    """What ends a program during its imports: Ctrl-C in silence, a missing package with a sentence."""
    if issubclass(kind, ModuleNotFoundError):
        lists = "requirements.txt", "requirements-parallel.txt", "experiments/requirements.txt"
        files = [path for path in map(Path(__file__).parent.joinpath, lists) if path.exists()]
        needed = next((str(path) for path in files if str(error.name) in path.read_text("utf-8")), None)
        install = f"; {shlex.join([sys.executable, '-m', 'pip', 'install', '-r', needed])}" if needed else ""
        print(f"{Path(sys.argv[0]).name}: {error.name} is not installed{install}", file=sys.stderr)
    elif not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)

sys.excepthook = without_traceback

import argparse
import ctypes
import os
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

for _variable in ("OPENBLAS_NUM", "MKL_NUM", "BLIS_NUM", "VECLIB_MAXIMUM"):
    os.environ.setdefault(f"{_variable}_THREADS", "1")
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):  # musl has none
    for _option, _bytes in ((-1, (1 << 31) - 1), (-2, 1 << 26), (-3, 1 << 25)):
        ctypes.CDLL(None).mallopt(_option, _bytes)  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD

import numpy as np

import grassmann
from checkpoint import load_checkpoint

VERSION = "2.0"
BEST = Path("out/best.npz")  # what the programs read unless told otherwise

def available_cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))

# ---- options ---------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, exit code 2."""

    def __init__(self, description: str | None):
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=plain, allow_abbrev=False)
        versions = f"{VERSION} (Python {sys.version.split()[0]}, NumPy {np.__version__})"
        self.add_argument("--version", action="version", version=f"grassmann {versions}")

    def error(self, message: str) -> None:
        if "expected one argument" in message:
            message += " (one that begins with a dash is written --option=-value)"
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

def number(kind: type, least: float, most: float, *, above: bool = False) -> Callable:
    """A type for argparse: an int or float from least to most (`above`: greater than least)."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not least <= value <= most or (above and value == least):
            rule = f"above {least:,} and at most" if above else f"between {least:,} and"
            raise argparse.ArgumentTypeError(f"{text} is not {rule} {most:,}")
        return value

    return parse

def add_gpu_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--gpu", action="store_true", help="run on a CUDA GPU, with CuPy (requirements-gpu.txt)")
    parser.add_argument("--precision", choices=["float32", "tf32"], default=None,
        help="of matrix products on the GPU: tf32 is faster and coarser (default: float32)")

def backend(gpu: bool, precision: str | None = None) -> ModuleType:
    """The module that computes: grassmann (NumPy) or gpu (CuPy), same names. Raises ValueError."""
    if not gpu:
        if precision is not None:
            raise ValueError("--precision is a choice for GPUs, it needs --gpu")
        return grassmann
    try:
        import gpu as cuda

        cuda.set_precision(precision or "float32")
    except ImportError as error:
        raise ValueError(f"--gpu: {error}") from None
    return cuda

def load_trained(model: ModuleType, checkpoint: Path) -> tuple:
    """(params, config, extra) of a checkpoint that train_char.py wrote, for model, grassmann or gpu.

    Of a run that was stopped before its first validation, last.npz is read in place of best.npz;
    before any run, the model that the project ships in place of BEST. Raises ValueError.
    """
    last, shipped = checkpoint.with_name("last.npz"), Path(__file__).with_name("shakespeare.npz")
    if checkpoint.name == "best.npz" and not checkpoint.exists():
        other = last if last.exists() else shipped if checkpoint == BEST else checkpoint
        if other != checkpoint:
            print(f"there is no {checkpoint} yet, so this is {other}", file=sys.stderr)
        checkpoint = other
    try:
        params, config, extra = load_checkpoint(checkpoint, getattr(model, "Flat", dict))
    except FileNotFoundError:
        raise ValueError(f"{checkpoint} does not exist; train_char.py writes it") from None
    except OSError as error:
        raise ValueError(f"{checkpoint}: {error.strerror}") from None
    start = extra.get("most_common")
    if extra.get("vocab") is None or type(start) is not int or not 0 <= start < config.vocab_size:
        raise ValueError(f"{checkpoint} was not written by train_char.py")
    return params, config, extra

# ---- words and errors ------------------------------------------------------------------------------

def plural(n: int, what: str) -> str:
    """1 thread, 2 threads."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"

def command(script: str, *args: object) -> str:
    """A command line to copy: with the interpreter that runs, and the script as it was found."""
    python = shutil.which("python")
    same = python is not None and os.path.realpath(python) == os.path.realpath(sys.executable) \
        and os.path.dirname(python) == os.path.dirname(sys.executable)
    paths = [f"./{a}" if isinstance(a, Path) and str(a).startswith("-") else str(a) for a in args]
    words = ["python" if same else sys.executable, str(Path(sys.argv[0]).with_name(script)), *paths]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)

class Patient:
    """A stream whose reader may leave (`| head`) or whose disk may fill: then it is silent."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                with suppress(OSError):  # a closed terminal takes no errors either
                    print(f"standard output: {error.strerror}; going on without it", file=sys.stderr)
            leave_quietly()
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

def plain_output() -> None:
    """No surprises: escape what the terminal cannot show, and let no NumPy warning in between.

    (Values that are not finite are noticed and reported where they matter.)
    """
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    sys.stdin = sys.stdin or open(os.devnull)  # closed, as by <&-  # noqa: SIM115
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (to the end)
        getattr(sys, name).reconfigure(errors="backslashreplace")

def leave_quietly() -> None:
    """Whoever read our output has had enough: write the rest nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

@contextmanager
def short_errors(parser: Parser, where: object, memory: str = "not enough memory", stopped: str = "") -> Iterator[None]:
    """Within the `with` block, what a user can mend ends the program with one line and exit code 2.

    Ctrl-C ends it with 130.

    where     what could not be read or written, if the error names no file
    memory    what to say when there is not enough
    stopped   what to say after Ctrl-C
    """
    try:
        yield
    except ValueError as error:
        parser.error(str(error))
    except BrokenPipeError:
        leave_quietly()
    except OSError as error:
        parser.error(f"{error.filename or where}: {error.strerror}")
    except MemoryError:
        parser.error(memory)
    except RuntimeError as error:
        if str(error).lower().startswith(("cuda", "cublas", "nccl")):
            parser.error(f"the card, its driver or its libraries failed: {error}")
        if "thread" not in str(error):
            raise
        parser.error(f"{error}; --threads 1 needs none")
    except KeyboardInterrupt:
        parser.exit(130, stopped)
