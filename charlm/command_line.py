"""What the programs share.

A program begins with `command_line.prepare()`. The import alone changes nothing.
"""

import argparse
import ctypes
import difflib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import NoReturn

BEST = Path("out/best.npz")  # the checkpoint that programs read by default
# Names of nanoGPT's options that are not like ours.
NANOGPT = {"--block-size": "--context", "--n-embd": "--d-model", "--learning-rate": "--lr"}


def prepare(name: str = "") -> None:
    """Settings of the process, before NumPy is imported. They do not change results.

    A program gives its __name__. If it runs, it ends with one line if a package is missing, and
    without a word at Ctrl-C until `short_errors` begins.

    BLAS gets one thread, because small matrices are not worth splitting. training.py splits
    the batch instead. glibc keeps freed memory, because getting it back from the system takes a
    third of a step.
    """
    for library in ("OPENBLAS_NUM", "MKL_NUM", "BLIS_NUM", "VECLIB_MAXIMUM"):
        os.environ.setdefault(f"{library}_THREADS", "1")
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)
    if mallopt:
        # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
        for option, size in (-1, (1 << 31) - 1), (-2, 1 << 26), (-3, 1 << 25):
            mallopt(option, size)
    if name == "__main__":
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        for package in ("numpy", "tqdm"):
            if importlib.util.find_spec(package) is None:
                sys.exit(f"{package} is missing: pip install -r requirements.txt")


class Parser(argparse.ArgumentParser):
    """An argument parser. An error prints one line and ends with exit code 2."""

    def __init__(self, description: str | None):
        from grassmann import __version__  # only now, since it imports NumPy

        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=plain, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"grassmann {__version__}")

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: -"):
            word = message.split()[2].partition("=")[0].replace("_", "-")
            near = difflib.get_close_matches(
                NANOGPT.get(word, word), self._option_string_actions, 1
            )
            message += "".join(f"; did you mean {option}?" for option in near)
        if "expected one argument" in message:
            message += " (if it begins with a dash, write --option=-value)"
        shown = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode()
            for c in " ".join(message.split())
        )
        self.exit(2, f"{self.prog}: {shown}\n")


def add_gpu_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", action="store_true", help="run on a CUDA GPU, with CuPy (pip install -e .[gpu])"
    )
    parser.add_argument(
        "--precision",
        choices=["float32", "tf32"],
        help="of matrix products on a GPU (default: float32)",
    )


def backend(gpu: bool, precision: str | None = None) -> ModuleType:
    """The module that computes: grassmann (NumPy) or gpu (CuPy), with the same names.

    Raises UserError.
    """
    import grassmann

    grassmann.require(gpu or precision is None, "--precision is an option for GPUs: add --gpu")
    if not gpu:
        return grassmann
    try:
        import gpu as cuda

        cuda.set_precision(precision or "float32")
    except (ImportError, ValueError) as error:
        raise grassmann.UserError(f"--gpu: {error}") from None
    return cuda


def command(script: str, *args: object) -> str:
    """A command line to copy, with the running interpreter and the path of the running script."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    words = [python, str(Path(sys.argv[0]).with_name(script)), *map(str, args)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def plain_output() -> None:
    """Escape what the terminal cannot show, and hide NumPy's warnings: the programs check their
    numbers themselves."""
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        with suppress(AttributeError):  # in IDLE and Jupyter
            getattr(sys, name).reconfigure(errors="backslashreplace")


def leave_quietly() -> None:
    """Our output cannot be written any more (`| head`, a full disk), so discard the rest of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def short_errors(
    parser: Parser, where: object, memory: str = "not enough memory", stopped: str = ""
) -> Iterator[None]:
    """Within the block, an error that the user can correct ends the program with one line.

    The exit code is then 2; Ctrl-C ends it with `stopped` and 130. Other errors keep their
    traceback. `where` replaces the file that an OSError does not name.
    """
    from grassmann import UserError

    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # `prepare`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        sys.stdout.flush()  # a full disk raises here
    except UserError as error:
        parser.error(str(error))
    except BrokenPipeError:
        leave_quietly()
    except OSError as error:
        if error.filename is None:
            with suppress(OSError):  # an output without a number, as in a notebook
                leave_quietly()
        parser.error(f"{error.filename or where}: {error.strerror}")
    except MemoryError:
        parser.error(memory)
    except KeyboardInterrupt:
        parser.exit(130, stopped)
