"""What the programs share: options, errors in one line, the choice between NumPy and CuPy."""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grassmann


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, exit code 2."""

    def __init__(self, description: str):
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=plain, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def number(kind: type, least: float, most: float, *, above: bool = False):
    """A type for argparse: an int or float from least to most (`above`: greater than least)."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not least <= value <= most or (above and value == least):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'from'} {least:g}, up to {most:g}")
        return value

    return parse


def add_gpu_option(parser) -> None:
    parser.add_argument("--gpu", action="store_true", help="run on a CUDA GPU, with CuPy (requirements-gpu.txt)")
    parser.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default=None,
        help="of matrix products on the GPU: tf32 and bfloat16 are faster and coarser (default: float32)")  # fmt: skip


def backend(gpu: bool, precision: str | None):
    """The module that computes: grassmann (NumPy) or gpu (CuPy), the same names in both. Raises ValueError."""
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


def load_trained(model, checkpoint: Path) -> tuple:
    """(params, config, extra) of a checkpoint that train_char.py wrote; model: grassmann or gpu. Raises ValueError."""
    try:
        params, config, extra = model.load_checkpoint(checkpoint)
    except FileNotFoundError:
        raise ValueError(f"{checkpoint} does not exist; train_char.py writes it") from None
    except OSError as error:
        raise ValueError(f"{checkpoint}: {error.strerror}") from None
    if extra.get("vocab") is None:
        raise ValueError(f"{checkpoint} has no vocabulary, it was not written by train_char.py")
    return params, config, extra


def plain_output() -> None:
    """No surprises: escape what the terminal cannot show, and let no NumPy warning of an overflow in between.

    (Values that are not finite are noticed and reported where they matter.)
    """
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (to the end)
        getattr(sys, name).reconfigure(errors="backslashreplace")


def leave_quietly() -> None:
    """Whoever read our output has had enough (`| head`): write the rest nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def short_errors(parser: Parser, where: object, memory: str = "not enough memory", stopped: str = "") -> Iterator[None]:
    """Within the `with` block, what a user can mend ends the program with one line and exit code 2, Ctrl-C with 130.

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
    except KeyboardInterrupt:
        parser.exit(130, stopped)
