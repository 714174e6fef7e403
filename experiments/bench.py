"""How fast the model is, and compared with what. Prints a table for each section.

  python -m experiments.bench                      everything, a quarter of an hour on two cores
  python -m experiments.bench --data shakespeare   on Tiny Shakespeare, as in README.md
  python -m experiments.bench --quick              fewer turns, and no race
  python -m experiments.bench --only step length   some sections
  python -m experiments.bench --gpu                on a CUDA GPU; --report writes it down

Two sides run in turns, A B A B …, so that both have the same share of a machine's fast and slow
times. Times are medians over the turns. "x ours" is the median over the turns of their time divided
by ours. (The seconds of `race` are sums.) Both sides have the same threads, batches and optimiser.
The other side is PyTorch as it is usually written (experiments/requirements.txt has it). Without
PyTorch there is a dash.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import time
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


def step(setup):
    """Milliseconds per training step: batch, forward, backward, clipping, AdamW

    Our default model against nanoGPT's laptop recipe and against our model in PyTorch; the paper's
    layer (offsets averaged, normalised, positions) against the layer as it is usually written; and
    the cost of more offsets.
    """
    default = setup.config()
    gpts = {
        "GPT, equal width": setup.gpt_config(),
        "GPT, equal parameters": gpt_of_size(setup, n_parameters(default)),
        "the same": default,
    }
    rows = compare_steps(setup, "default", default, gpts)
    one = setup.config(taps=False, normalize=True, positions=True)
    rows += compare_steps(setup, "one offset per layer", one, {"as usually written": one})
    six = replace(one, offsets=((1, 2, 4, 8, 12, 16),) * one.n_layer)
    rows += compare_steps(setup, "six offsets per layer", six, {"as usually written": six})
    back_1 = replace(default, offsets=((1,),) * default.n_layer)
    back_16 = replace(default, offsets=(tuple(range(1, 17)),) * default.n_layer)
    rows += compare_steps(setup, "16 taps in each layer", back_16, {"ours, 1 in each": back_1})
    return rows


def compare_steps(setup, what, config, others):
    """Our model's step against each of the others. Their side is PyTorch unless it is "ours, …"."""
    runs = {"ours": Ours(setup, config).step}
    for name, other in others.items():
        side = Ours if name.startswith("ours") else Theirs
        there = side is Ours or torch
        runs[name] = side(setup, other).step if there else None
    times = alternate(runs, 2 if setup.quick else 25, 4)
    return [
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


def race(setup, iters=2000):
    """Validation loss (nats per character) and seconds of training, against nanoGPT's laptop recipe

    Our defaults, the GPT as published (learning rate 1e-3) and the GPT at its best learning rate
    (4e-3), with the same number of steps, on the same batches, in turns of 50 steps. Validation is
    not timed.
    """
    if setup.quick:
        return [{"run": "skipped by --quick: it takes minutes"}]
    sides = [("ours", Ours, setup.config(), setup.training.lr)]
    if torch:
        gpt = setup.gpt_config()
        sides.append(("GPT, as published", Theirs, gpt, 1e-3))
        sides.append(("GPT, at its best learning rate", Theirs, gpt, 4e-3))
    runs = []
    rows = []
    for name, side, config, lr in sides:
        training = replace(setup.training, iters=iters, lr=lr)
        runs.append(side(replace(setup, training=training), config))
        rows.append({"run": name, "learning rate": lr, "steps": iters, "seconds": 0.0})
    for done in range(0, iters, 50):
        for run, row in zip(runs, rows, strict=True):
            start = time.perf_counter()
            for _ in range(min(50, iters - done)):
                run.step()
            row["seconds"] += time.perf_counter() - start
    for run, row in zip(runs, rows, strict=True):
        row["loss"] = run.validate()
    return rows


def gpt_writer(setup, text):
    """A function that writes one character and reads it, with a cache of keys and values.

    At the end of the context the cache starts again from half of the context.
    """
    config = setup.gpt_config()
    context = config.context
    model = Model(config)
    tokens = torch.from_numpy(text.astype(np.int64))[None, -context:]
    past = None
    read = context

    @torch.inference_mode()
    def write():
        nonlocal tokens, past, read
        if read < context:
            logits = model(tokens[:, -1:], past, read)
            read += 1
        else:
            past = [{} for _ in range(config.n_layer)]
            read = context // 2
            logits = model(tokens[:, -read:], past)
        shares = torch.softmax(logits[:, -1] / 0.8, -1)
        token = torch.multinomial(shares, 1)
        tokens = torch.cat([tokens, token], 1)[:, -context:]

    return write


def generation(setup, positions=(100, 20_000)):
    """Characters written per second on one thread, after a text of `position` characters"""
    if torch:
        torch.set_num_threads(1)
    if setup.quick:
        positions = positions[:1]
    config = setup.config()
    params = grassmann.init_params(config)
    calls = 2 * (config.context - config.context // 2 + 1)  # twice from a full cache to a full one
    rows = []
    for position in positions:
        text = np.resize(setup.corpus.train, position)
        runs = {
            "ours": grassmann.generate(params, config, text, 10**9, temperature=0.8).__next__,
            "GPT with cache": gpt_writer(setup, text) if torch else None,
        }
        times = alternate(runs, 2 if setup.quick else 20, calls)
        row = {"position": position}
        for name, seconds in times.items():
            row[name] = median(1 / t for t in seconds)
        row["ours / GPT"] = quotient(times["GPT with cache"], times["ours"])
        rows.append(row)
    return rows


def length(setup, tokens=32_768, longest_table=2048):
    """Microseconds per token of a training step by the length of its windows, on at most 2 threads

    Every step has the same number of tokens, from 512 windows of 64 to 2 windows of 16,384. The
    columns: our model; our model with a memory; attention (mixer="attention"), as long as its
    length x length tables fit; and reading a text with a memory, as `sample.py` reads a prompt, on
    one thread. "x" is the time divided by the time at the shortest length.
    """
    if setup.quick:
        tokens //= 8
    memory = setup.config(memory=True)
    params = grassmann.init_params(memory)

    def read(L):
        for text in np.resize(setup.corpus.train, (tokens // L, L)):
            state = grassmann.stream_init(params, memory)
            grassmann.stream_read(params, memory, state, text)

    lengths = [2**k for k in range(6, 20, 2) if 2**k <= tokens // 2]
    runs = {}
    for L in lengths:
        training = replace(setup.training, batch_size=tokens // L)
        own = replace(setup, training=training, threads=min(2, setup.threads))
        attention = setup.config(mixer="attention", context=L)
        runs[L, "grassmann"] = Ours(own, setup.config(context=L)).step
        runs[L, "memory"] = Ours(own, setup.config(memory=True, context=L)).step
        runs[L, "attention"] = Ours(own, attention).step if longest_table >= L else None
        runs[L, "reading"] = partial(read, L)
    times = alternate(runs, 2 if setup.quick else 5, 1)
    columns = ("grassmann", "memory", "attention", "reading")
    rows = []
    for L in lengths:
        row = {"length": L, "windows": tokens // L}
        for name in columns:
            row[name] = 1e6 / tokens * median(times[L, name])
        for name in columns:
            row[f"{name} x"] = quotient(times[L, name], times[lengths[0], name])
        rows.append(row)
    return rows


SECTIONS = {"step": step, "race": race, "generation": generation, "length": length}

# ---- the program ---------------------------------------------------------------------------------


def main():
    command_line.plain_output()
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    cores = len(processes.available_cores())
    sections = [*SECTIONS, *bench_gpu.SECTIONS]
    add("--data", help="a UTF-8 text file, or 'shakespeare' (default: the text of train_char.py)")
    add("--threads", type=int, default=cores, help="CPU threads (default: all cores)")
    add("--quick", action="store_true", help="fewer turns, and no race")
    add("--gpu", action="store_true", help="measure gpu.py on a CUDA GPU instead")
    add("--report", action="store_true", help="with --gpu: write experiments/results/gpu-NAME.md")
    add(
        "--rehearse", action="store_true", help="with --gpu: tiny models on the tests' CPU stand-in"
    )
    add("--only", nargs="+", choices=sections, help="some sections")
    args = parser.parse_args()
    with command_line.short_errors(parser, args.data, "not enough memory for this model"):
        if args.gpu:
            measure_gpu(args)
        else:
            measure(args)


def measure(args):
    """Print the tables of the CPU. Raises UserError and OSError."""
    require(args.threads >= 1, f"--threads must be 1 or more, not {args.threads}")
    require(not (args.report or args.rehearse), "--report and --rehearse need --gpu")
    names = args.only or [*SECTIONS]
    require(set(names) <= set(SECTIONS), f"--only {' '.join(names)}: some of these need --gpu")
    setup = Setup(read_corpus(args.data, 16_384), args.threads, args.quick)
    print(
        f"{args.data or 'pydoc_data.topics'}; {machine()}; {setup.threads} threads; "
        f"PyTorch {torch.__version__ if torch else 'is missing'}"
    )
    for name in names:
        print(f"\n{name}: {SECTIONS[name].__doc__.splitlines()[0]}\n", flush=True)
        print(markdown(SECTIONS[name](setup)))


def measure_gpu(args):
    """Print the tables of the GPU. Raises UserError and OSError."""
    names = args.only or []
    others = [name for name in names if name not in bench_gpu.SECTIONS]
    require(not others, f"--only {' '.join(others)}: not a section of --gpu")
    folder = None
    if args.report:
        folder = bench_gpu.ROOT / "experiments" / "results"
    if args.rehearse:
        folder = bench_gpu.ROOT / "out"
    bench_gpu.main(args.only, args.data, folder, args.rehearse)


if __name__ == "__main__":
    main()
