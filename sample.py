"""Write text with a trained model: python sample.py [out/best.npz] --prompt "ROMEO:" --length 500

Characters appear as they are drawn. train_char.py, which trains the model, ends with such a sample too.
"""

import cpu  # noqa: F401, I001  (before NumPy)

import argparse
import os
import sys
import warnings
from pathlib import Path

import grassmann
from text import encode


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


def write_sample(model, params, config, extra: dict, prompt: str, length: int, **how) -> None:
    """Print the prompt and `length` characters after it, each as it is drawn.

    `extra` is the checkpoint's. An empty prompt starts from a newline, or from the most common character
    if the model knows none; that start is not printed. `how`: temperature, top_k, seed. Raises ValueError
    on a character that the model never saw.
    """
    vocab = extra["vocab"]
    start = encode(prompt, vocab).tolist() or [vocab.index(10) if 10 in vocab else extra["most_common"]]
    tokens = model.generate(params, config, start, length, **how)
    print(prompt, end="")
    for token in tokens:
        print(chr(vocab[token]), end="", flush=True)
    print()


def plain_output() -> None:
    """No surprises: escape what the terminal cannot show, and let no NumPy warning of an overflow in between.

    (Values that are not finite are noticed and reported where they matter.)
    """
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def leave_quietly() -> None:
    """Whoever read our output has had enough (`| head`): write the rest nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    plain_output()
    parser = Parser(__doc__)
    add = parser.add_argument
    best = Path("out/best.npz")
    add("checkpoint", nargs="?", type=Path, default=best, help=f"what to sample from (default: {best})")
    add("--prompt", default="", help="text to go on from (default: empty, as after a line end)")
    add("--length", type=number(int, 0, 10**9), default=500, help="characters to write (default: 500)")
    add("--temperature", type=number(float, 0, 100), default=0.8,
        help="below 1 bolder, above 1 wilder, 0 always the likeliest (default: 0.8)")  # fmt: skip
    add("--top-k", type=number(int, 1, 10**9), help="draw only among the k likeliest characters (default: all)")
    add("--seed", type=number(int, 0, 2**63), default=0, help="another seed, another text (default: 0)")
    add("--samples", type=number(int, 1, 10**6), default=1, help="how many, one seed after the other (default: 1)")
    add_gpu_option(parser)
    args = parser.parse_args()
    try:
        model = backend(args.gpu, args.precision)
        try:
            params, config, extra = model.load_checkpoint(args.checkpoint)
        except FileNotFoundError:
            raise ValueError(f"{args.checkpoint} does not exist; train_char.py writes it") from None
        except OSError as error:
            raise ValueError(f"{args.checkpoint}: {error.strerror}") from None
        if extra.get("vocab") is None or extra.get("most_common") not in range(config.vocab_size):
            raise ValueError(f"{args.checkpoint} has no vocabulary, it was not written by train_char.py")
        for k in range(args.samples):
            if k:
                print("-" * 40)
            how = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed + k}
            write_sample(model, params, config, extra, args.prompt, args.length, **how)
    except ValueError as error:
        parser.error(str(error))
    except BrokenPipeError:
        leave_quietly()
    except OSError as error:
        parser.error(f"standard output: {error.strerror}")
    except MemoryError:
        parser.error("not enough memory for this model")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
