"""Write text with a trained model: python sample.py [out/best.npz] --prompt "ROMEO:" --length 500

Characters appear as they are drawn. train_char.py, which trains the model, ends with such a sample too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -P and -I leave it out

import cli  # noqa: I001  (before NumPy)

import os
import random
from collections.abc import Callable
from functools import partial
from types import ModuleType

from cli import Parser, number, short_errors
from text import encode, read_file, start_token, visible

def write_sample(
    model: ModuleType, params: dict, config: object, extra: dict, prompt: str, length: int,
    before: str = "", **how
) -> str:
    """Print the prompt and `length` characters after it, each as it is drawn; returns all of it.

    `extra` is the checkpoint's; the text `before` the prompt is read, not printed, and so is the start
    if both are empty. `how`: temperature, top_k, seed. On a terminal control characters are escaped.
    Raises ValueError on a character that the model never saw.
    """
    vocab, written = extra["vocab"], [before, prompt]
    start = encode(before + prompt, vocab).tolist() or [start_token(vocab, extra["most_common"])]
    tokens = model.generate(params, config, start, length, **how)
    show = visible if sys.stdout.isatty() else str
    print(show(prompt), end="")
    for token in tokens:
        written.append(chr(vocab[token]))
        print(show(written[-1]), end="", flush=True)
    print()
    return "".join(written)

def read_prompt(prompt: str, escapes: bool) -> str:
    """--prompt: the text itself, - for the standard input, @FILE for a file. Raises ValueError."""
    if prompt == "-":
        return sys.stdin.read()
    if prompt.startswith("@"):
        return read_file(Path(prompt[1:]))
    prompt = os.fsencode(prompt).decode("utf-8", "surrogateescape")  # in any locale
    return prompt.replace("\\n", "\n").replace("\\t", "\t") if escapes else prompt

def converse(write: Callable, text: str, seed: int) -> None:
    """--interactive: what is typed is appended to the text, and the model goes on from there."""
    print("type something, and the model goes on; an empty line lets it write on, Ctrl-D ends")
    while True:
        try:
            typed = input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        try:
            text = write(typed, before=text[-100_000:], seed=seed)
        except ValueError as error:
            print(error)
        seed += 1

def main() -> None:
    cli.plain_output()
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, default=cli.BEST, help=f"what to sample from (default: {cli.BEST})")
    add("--prompt", default="", help="text to go on from; - reads the standard input, @FILE a file "
        "(default: empty, as after a line end)")
    add("--escapes", action="store_true", help=r"\n and \t in --prompt are a line end and a tab")
    add("--interactive", action="store_true", help="type a line: it is appended to the text, and the model goes on")
    add("--length", type=number(int, 0, 10**9), default=500, help="characters to write (default: 500)")
    add("--temperature", type=number(float, 0, 100), default=0.8,
        help="below 1 safer, above 1 wilder, 0 always the likeliest (default: 0.8)")
    add("--top-k", type=number(int, 1, 10**9), help="draw only among the k likeliest characters (default: all)")
    add("--seed", type=number(int, 0, 2**63 - 1), help="the same seed, the same text (default: a new one)")
    add("--samples", type=number(int, 1, 10**6), default=1, help="how many, one seed after the other (default: 1)")
    cli.add_gpu_option(parser)
    args = parser.parse_args()
    with short_errors(parser, "standard output", "not enough memory for this model"):
        model = cli.backend(args.gpu, args.precision)
        params, config, extra = cli.load_trained(model, args.checkpoint)
        prompt = read_prompt(args.prompt, args.escapes)
        encode(prompt, extra["vocab"])  # refused before a seed is named
        if args.seed is None:
            args.seed = random.SystemRandom().randrange(10**6)
            print(f"--seed {args.seed} writes this again", file=sys.stderr)
        write = partial(write_sample, model, params, config, extra, length=args.length,
                        temperature=args.temperature, top_k=args.top_k)
        if args.interactive:
            return converse(write, prompt, args.seed)
        for k in range(args.samples):
            if k:
                print("-" * 40)
            write(prompt, seed=args.seed + k)

if __name__ == "__main__":
    main()
