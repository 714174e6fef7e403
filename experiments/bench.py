"""How fast the model is, and compared with what. Prints a table for each section.

  python -m experiments.bench                          everything, a quarter of an hour on two cores
  python -m experiments.bench --data shakespeare       on Tiny Shakespeare, as in README.md
  python -m experiments.bench --quick                  fewer turns, and no race
  python -m experiments.bench --only step length       some sections
  python -m experiments.bench --gpu                    on a CUDA GPU; --report writes it down

Two sides run in turns, A B A B …, so that both have the same share of a machine's fast and slow times.
Times are medians over the turns. "x ours" is the median over the turns of their time divided by ours.
(The seconds of `race` are sums.) Both sides have the same threads, batches and optimiser. The other side
is PyTorch as it is usually written (experiments/requirements.txt has it); without it there is a dash.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np

import grassmann
from charlm import processes
from charlm.text import read_corpus
from experiments import bench_gpu
from experiments.bench_models import Model, Ours, Setup, Theirs, gpt_of_size, n_parameters, torch
from experiments.common import alternate, machine, markdown, quotient
from grassmann import require

# ---- sections: each returns the rows of its table ------------------------------------------------


def step(setup: Setup) -> list[dict]:
    """Milliseconds per training step: batch, forward, backward, clipping, AdamW

    Our default model against nanoGPT's laptop recipe and against our model in PyTorch; the paper's layer
    (offsets averaged, normalised, positions) as it is usually written; and the cost of more offsets.
    """
    default, rows = setup.config(), []
    one = setup.config(taps=False, normalize=True, positions=True)  # 1, 2, 4, 8 back, one a layer
    six = replace(one, offsets=((1, 2, 4, 8, 12, 16),) * one.n_layer)
    back_1, back_16 = (replace(default, offsets=[range(1, m + 1)] * one.n_layer) for m in (1, 16))
    gpts = {
        "GPT, equal width": setup.gpt_config(),
        "GPT, equal parameters": gpt_of_size(setup, n_parameters(default)),
    }
    for what, config, others in (
        ("default", default, gpts | {"the same": default}),
        ("one offset per layer", one, {"as usually written": one}),
        ("six offsets per layer", six, {"as usually written": six}),
        ("16 taps in each layer", back_16, {"ours, 1 in each": back_1}),
    ):
        runs = {"ours": Ours(setup, config).step}
        for name, other in others.items():
            side = Ours if name.startswith("ours") else torch and Theirs
            runs[name] = side and side(setup, other).step
        times = alternate(runs, 2 if setup.quick else 25, 4)
        rows += [
            {
                "ours": what,
                "parameters": n_parameters(config),
                "ms": 1e3 * median(times["ours"]),
                "against": name,
                "its parameters": n_parameters(other),
                "its ms": 1e3 * median(times[name]),
                "x ours": quotient(times[name], times["ours"]),
            }
            for name, other in others.items()
        ]
    return rows


def race(setup: Setup, iters: int = 2000) -> list[dict]:
    """Validation loss (nats per character) and seconds of training, against nanoGPT's laptop recipe

    Our defaults, the GPT as published (learning rate 1e-3) and the GPT at its best learning rate (4e-3), with
    the same number of steps, on the same batches, in turns of 50 steps. Validation is not timed.
    """
    if setup.quick:
        return [{"run": "skipped by --quick: it takes minutes"}]
    gpts = [("GPT, as published", Theirs, 1e-3), ("GPT, at its best learning rate", Theirs, 4e-3)]
    rows, runs = [], []
    for name, side, lr in [("ours", Ours, setup.training.lr), *(gpts if torch else [])]:
        own = replace(setup, training=replace(setup.training, iters=iters, lr=lr))
        runs.append(side(own, setup.config() if side is Ours else setup.gpt_config()))
        rows.append({"run": name, "learning rate": lr, "steps": iters, "seconds": 0.0})
    for k in range(0, iters, 50):
        for run, row in zip(runs, rows, strict=True):
            start = time.perf_counter()
            for _ in range(k, min(k + 50, iters)):
                run.step()
            row["seconds"] += time.perf_counter() - start
    return [row | {"loss": run.validate()} for run, row in zip(runs, rows, strict=True)]


def gpt_writer(setup: Setup, text: np.ndarray) -> Callable[[], None]:
    """A function that writes one character and reads it, with a cache of keys and values. At the end of the context the
    cache starts again from half of the context."""
    config = setup.gpt_config()
    model, context = Model(config), config.context
    tokens, past, read = torch.from_numpy(text.astype(np.int64))[None, -context:], None, context

    @torch.inference_mode()
    def write() -> None:
        nonlocal tokens, past, read
        if read < context:
            logits, read = model(tokens[:, -1:], past, read), read + 1
        else:
            past, read = [{} for _ in range(config.n_layer)], context // 2
            logits = model(tokens[:, -read:], past)
        token = torch.multinomial(torch.softmax(logits[:, -1] / 0.8, -1), 1)
        tokens = torch.cat([tokens, token], 1)[:, -context:]

    return write


def generation(setup: Setup, positions: tuple[int, ...] = (100, 20_000)) -> list[dict]:
    """Characters written per second on one thread, after a text of so many characters as the position"""
    if torch:
        torch.set_num_threads(1)
    rows, config, memory = [], setup.config(), setup.config(memory=True)
    calls = 2 * (config.context - config.context // 2 + 1)  # twice from a full cache to a full one
    for position in positions[:1] if setup.quick else positions:
        text = np.resize(setup.corpus.train, position)
        runs = {
            name: grassmann.generate(
                grassmann.init_params(own), own, text, 10**9, temperature=0.8
            ).__next__
            for name, own in (("ours", config), ("with memory", memory))
        }
        runs["GPT with cache"] = torch and gpt_writer(setup, text)
        times = alternate(runs, 2 if setup.quick else 20, calls)
        row = {name: median(1 / t for t in seconds) for name, seconds in times.items()}
        ratios = {f"ours / {name}": quotient(times[name], times["ours"]) for name in [*times][1:]}
        rows.append({"position": position} | row | ratios)
    return rows


def length(setup: Setup, tokens: int = 32_768, longest_table: int = 2048) -> list[dict]:
    """Microseconds per token of a training step by the length of its windows, on at most 2 threads

    Every step has the same number of tokens, from 512 windows of 64 to 2 windows of 16,384. The columns: our
    model; our model with a memory; attention (mixer="attention"), as long as its length x length tables fit;
    and reading a text with a memory, as `sample.py` reads a prompt, on one thread. "x" is the time divided by
    the time at the shortest length.
    """

    def read(L: int) -> None:
        for text in np.resize(setup.corpus.train, (tokens // L, L)):
            grassmann.stream_read(params, config, grassmann.stream_init(params, config), text)

    tokens = tokens // 8 if setup.quick else tokens
    columns, config = ("grassmann", "memory", "attention", "reading"), setup.config(memory=True)
    params = grassmann.init_params(config)
    lengths, runs = [2**k for k in range(6, 20, 2) if 2**k <= tokens // 2], {}
    for L in lengths:
        training = replace(setup.training, batch_size=tokens // L)
        own = replace(setup, training=training, threads=min(2, setup.threads))
        runs[L, "grassmann"] = Ours(own, setup.config(context=L)).step
        runs[L, "memory"] = Ours(own, setup.config(memory=True, context=L)).step
        runs[L, "attention"] = (
            Ours(own, setup.config(mixer="attention", context=L)).step
            if longest_table >= L
            else None
        )
        runs[L, "reading"] = partial(read, L)
    times = alternate(runs, 2 if setup.quick else 5, 1)
    return [
        {
            "length": L,
            "windows": tokens // L,
            **{mixer: 1e6 / tokens * median(times[L, mixer]) for mixer in columns},
            **{
                f"{mixer} x": quotient(times[L, mixer], times[lengths[0], mixer])
                for mixer in columns
            },
        }
        for L in lengths
    ]


SECTIONS = {f.__name__: f for f in (step, race, generation, length)}

# ---- the program -----------------------------------------------------------------------------------


def main() -> None:
    command_line.plain_output()
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--data", help="a UTF-8 text file, or 'shakespeare' (default: the text of train_char.py)")
    add(
        "--threads",
        type=int,
        default=len(processes.available_cores()),
        help="CPU threads (default: all cores)",
    )
    add("--quick", action="store_true", help="fewer turns, and no race")
    add("--gpu", action="store_true", help="measure gpu.py on a CUDA GPU instead")
    add("--report", action="store_true", help="with --gpu: write experiments/results/gpu-NAME.md")
    add(
        "--rehearse",
        action="store_true",
        help="with --gpu: tiny models on the tests' CPU stand-in, into out/",
    )
    add("--only", nargs="+", choices=[*SECTIONS, *bench_gpu.SECTIONS], help="some sections")
    args = parser.parse_args()
    with command_line.short_errors(parser, args.data, "not enough memory for this model"):
        require(args.threads >= 1, f"--threads must be 1 or more, not {args.threads}")
        require(
            set(args.only or []) <= (bench_gpu.SECTIONS if args.gpu else SECTIONS).keys(),
            f"--only {' '.join(args.only or [])}: not all are sections {'of' if args.gpu else 'without'} --gpu",
        )
        require(
            args.gpu or not (args.report or args.rehearse), "--report and --rehearse need --gpu"
        )
        if args.gpu:
            folder = "out" if args.rehearse else "experiments/results" if args.report else None
            return bench_gpu.main(
                args.only, args.data, folder and bench_gpu.ROOT / folder, args.rehearse
            )
        setup = Setup(read_corpus(args.data, 16_384), args.threads, args.quick)
        print(
            f"{args.data or 'pydoc_data.topics'}; {machine()}; {setup.threads} threads; "
            f"PyTorch {torch.__version__ if torch else 'is missing'}"
        )
        for name in args.only or SECTIONS:
            print(f"\n{name}: {SECTIONS[name].__doc__.splitlines()[0]}\n", flush=True)
            print(markdown(SECTIONS[name](setup)))


if __name__ == "__main__":
    main()
