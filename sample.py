"""Write text with a trained model: python sample.py [out/best.npz] --prompt "ROMEO:" --length 500

Each character is printed as soon as it is drawn. train_char.py trains the model.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import os
import random
import sys
from pathlib import Path
from types import ModuleType

from charlm.checkpoint import load_checkpoint
from charlm.text import encode, start_token, visible
from grassmann import Config, Params, require

SHIPPED = Path(__file__).with_name("explorer") / "shakespeare.npz"


def find_trained(path: Path) -> Path:
    """The file to read. If there is no best.npz, this is last.npz; if neither is in out/, it is the shipped model."""
    others = [path.parent / "last.npz", *[SHIPPED] * (path == command_line.BEST)] * (
        path.name == "best.npz"
    )
    found = next((other for other in [path, *others] if other.exists()), path)
    if found != path:
        print(visible(f"there is no {path} yet; using {found}"), file=sys.stderr)
    return found


def load_trained(model: ModuleType, path: Path) -> tuple[Params, Config, dict]:
    """(params, config, extra) of a checkpoint that train_char.py wrote, for grassmann or gpu. Raises UserError, OSError."""
    found = find_trained(path)
    require(found.exists(), f"{path} does not exist; train_char.py writes it")
    params, config, extra = load_checkpoint(found, getattr(model, "Flat", dict))
    require(
        extra.get("vocab") is not None and extra.get("most_common") in range(config.vocab_size),
        f"{found} was not written by train_char.py",
    )
    return params, config, extra


def write_sample(
    model: ModuleType, params: Params, config: Config, extra: dict, prompt: str, length: int, **how
) -> None:
    """Print the prompt and `length` characters after it, each as it is drawn.

    `extra` comes from the checkpoint. `how` may have temperature, top_k and seed. On a terminal, control
    characters are escaped. Raises UserError if the prompt has a character that the model does not know.
    """
    vocab, show = extra["vocab"], visible if sys.stdout.isatty() else str
    start = encode(prompt, vocab).tolist() or [start_token(vocab, extra["most_common"])]
    tokens = model.generate(params, config, start, length, **how)
    print(show(prompt), end="")
    for token in tokens:
        print(show(chr(vocab[token])), end="", flush=True)
    print()


def main() -> None:
    command_line.plain_output()
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add(
        "checkpoint",
        nargs="?",
        type=Path,
        default=command_line.BEST,
        help=f"the model (default: {command_line.BEST})",
    )
    add(
        "--prompt",
        default="",
        help="text to continue; - reads it from standard input (default: begin a new line)",
    )
    add("--length", type=int, default=500, help="characters to write (default: 500)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="1: as learned, below safer, 0: the likeliest (default: 0.8)",
    )
    add("--top-k", type=int, help="draw only among the k likeliest characters (default: all)")
    add("--seed", type=int, help="the same seed writes the same text (default: a new seed)")
    add("--mixer", help="the file of your own layer, if the model was trained with one")
    command_line.add_gpu_option(parser)
    args = parser.parse_args()
    with command_line.short_errors(parser, "standard output", "not enough memory for this model"):
        model = command_line.backend(args.gpu, args.precision)
        if args.mixer:
            from charlm.own_layer import load_layer

            load_layer(args.mixer)
        params, config, extra = load_trained(model, args.checkpoint)
        given = sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt)
        prompt = given.decode("utf-8", "surrogateescape").replace("\r\n", "\n")  # in any locale
        how = {"temperature": args.temperature, "top_k": args.top_k}
        model.generate(params, config, encode(prompt, extra["vocab"]).tolist(), args.length, **how)
        if args.seed is None:  # after the checks, so that an error comes without a seed
            args.seed = random.SystemRandom().randrange(10**6)
            print(f"--seed {args.seed} writes this again", file=sys.stderr)
        require(args.seed >= 0, f"--seed must be 0 or more, not {args.seed}")
        write_sample(model, params, config, extra, prompt, args.length, **how, seed=args.seed)


if __name__ == "__main__":
    main()
