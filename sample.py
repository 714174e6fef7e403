"""Write text with a trained model: python sample.py [out/best.npz] --prompt "ROMEO:" --length 500

Each character is printed as soon as it is drawn. train_char.py trains the model.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import os
import random
import sys
from pathlib import Path

from charlm.trained import continue_text, load_trained, write_text
from grassmann import require


def build_parser() -> command_line.Parser:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    best = command_line.BEST
    add("checkpoint", nargs="?", type=Path, default=best, help=f"the model (default: {best})")
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
    return parser


def read_prompt(word: str) -> str:
    """The word itself, or for - what stands on standard input. It is UTF-8 in any locale."""
    given = sys.stdin.buffer.read() if word == "-" else os.fsencode(word)
    return given.decode("utf-8", "surrogateescape").replace("\r\n", "\n")


def main() -> None:
    command_line.plain_output()
    parser = build_parser()
    args = parser.parse_args()
    with command_line.short_errors(parser, "standard output", "not enough memory for this model"):
        model = command_line.backend(args.gpu, args.precision)
        if args.mixer:
            from charlm.own_layer import load_layer

            load_layer(args.mixer)
        trained = load_trained(model, args.checkpoint)
        prompt = read_prompt(args.prompt)
        seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
        require(seed >= 0, f"--seed must be 0 or more, not {seed}")
        how = {"temperature": args.temperature, "top_k": args.top_k, "seed": seed}
        characters = continue_text(model, *trained, prompt, args.length, **how)
        if args.seed is None:  # after the checks, so that an error comes without a seed
            print(f"--seed {seed} writes this again", file=sys.stderr)
        write_text(prompt, characters)


if __name__ == "__main__":
    main()
