"""What the programs share. A program begins with `import cli` and `cli.prepare()`; the import changes nothing."""

import argparse
import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

VERSION = "3.0"
BEST = Path("out/best.npz")  # what the programs read unless told otherwise

def prepare() -> None:
    """Settings of the process, before NumPy is imported. They do not change results.

    One BLAS thread: small matrices are not worth sharing between cores; training.py splits the batch.
    With glibc, keep freed memory: to get it back from the system takes a third of a step.
    """
    for library in ("OPENBLAS_NUM", "MKL_NUM", "BLIS_NUM", "VECLIB_MAXIMUM"):
        os.environ.setdefault(f"{library}_THREADS", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, size in ((-1, (1 << 31) - 1), (-2, 1 << 26), (-3, 1 << 25)) if mallopt else ():
        mallopt(option, size)  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD

class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, exit code 2."""

    def __init__(self, description: str | None):
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=plain, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"grassmann {VERSION}")

    def error(self, message: str) -> None:
        if "expected one argument" in message:
            message += " (one that begins with a dash is written --option=-value)"
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(message.split()))
        self.exit(2, f"{self.prog}: {shown}\n")

def add_gpu_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", action="store_true", help="run on a CUDA GPU, with CuPy (requirements-gpu.txt)")
    parser.add_argument("--precision", choices=["float32", "tf32"], help="of products on the GPU (default: float32)")

def backend(gpu: bool, precision: str | None = None) -> ModuleType:
    """The module that computes: grassmann (NumPy) or gpu (CuPy), same names. Raises UserError."""
    import grassmann

    grassmann.check(gpu or precision is None, "--precision is a choice for GPUs, it needs --gpu")
    if not gpu:
        return grassmann
    try:
        import gpu as cuda
    except ImportError as error:
        raise grassmann.UserError(f"--gpu: {error}") from None
    cuda.set_precision(precision or "float32")
    return cuda

def command(script: str, *args: object) -> str:
    """A command line to copy: with the interpreter that runs, and the script as it was found."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    words = [python, str(Path(sys.argv[0]).with_name(script)), *map(str, args)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)

def plain_output() -> None:
    """Escape what the terminal cannot show, and let no NumPy warning in between: programs look at their numbers."""
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    for name in ("stdout", "stderr"):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # noqa: SIM115  (closed, as by >&-)
        getattr(sys, name).reconfigure(errors="backslashreplace")

def leave_quietly() -> None:
    """Whoever read our output has had enough (`| head`): write the rest nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

@contextmanager
def short_errors(parser: Parser, where: object, memory: str = "not enough memory", stopped: str = "") -> Iterator[None]:
    """In its block, what a user can mend ends the program with one line and exit code 2, Ctrl-C with 130 and
    `stopped`; other errors keep their traceback. `where`: what an OSError that names no file is about."""
    from grassmann import UserError

    try:
        yield
        sys.stdout.flush()  # a full disk is noticed here
    except UserError as error:
        parser.error(str(error))
    except BrokenPipeError:
        leave_quietly()
    except OSError as error:
        parser.error(f"{error.filename or where}: {error.strerror}")
    except MemoryError:
        parser.error(memory)
    except KeyboardInterrupt:
        parser.exit(130, stopped)
