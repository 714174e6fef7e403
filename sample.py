"""Write text with a trained model: python sample.py [out/best.npz] --prompt "ROMEO:" --length 500

Characters appear as they are drawn. train_char.py, which trains the model, ends with such a sample too.
"""

import cpu  # noqa: F401, I001  (before NumPy)

from pathlib import Path

from cli import Parser, add_gpu_option, backend, load_trained, number, plain_output, short_errors
from text import encode


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


def main() -> None:
    plain_output()
    parser = Parser(__doc__)
    add = parser.add_argument
    best = Path("out/best.npz")
    add("checkpoint", nargs="?", type=Path, default=best, help=f"what to sample from (default: {best})")
    add("--prompt", default="", help="text to go on from (default: empty, as after a line end)")
    add("--length", type=number(int, 0, 10**9), default=500, help="characters to write (default: 500)")
    add("--temperature", type=number(float, 0, 100), default=0.8,
        help="below 1 safer, above 1 wilder, 0 always the likeliest (default: 0.8)")  # fmt: skip
    add("--top-k", type=number(int, 1, 10**9), help="draw only among the k likeliest characters (default: all)")
    add("--seed", type=number(int, 0, 2**63), default=0, help="another seed, another text (default: 0)")
    add("--samples", type=number(int, 1, 10**6), default=1, help="how many, one seed after the other (default: 1)")
    add_gpu_option(parser)
    args = parser.parse_args()
    with short_errors(parser, "standard output", "not enough memory for this model"):
        model = backend(args.gpu, args.precision)
        params, config, extra = load_trained(model, args.checkpoint)
        if extra.get("most_common") not in range(config.vocab_size):
            raise ValueError(f"{args.checkpoint} was not written by train_char.py")
        for k in range(args.samples):
            if k:
                print("-" * 40)
            how = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed + k}
            write_sample(model, params, config, extra, args.prompt, args.length, **how)


if __name__ == "__main__":
    main()
