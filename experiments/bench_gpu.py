"""How fast gpu.py is on a CUDA GPU, compared with PyTorch and with the limits of the GPU.

  python -m experiments.bench_gpu --first-hour    everything within ten minutes, and one table of it
  python -m experiments.bench --gpu --report      everything, into results/gpu-NAME.md
  python -m experiments.bench --gpu --only floor  what a step starts and moves; needs no GPU
  python -m experiments.bench --gpu --rehearse    tiny models on the tests' stand-in

Needs a GPU, CuPy, and for comparison a PyTorch built for CUDA. Each section is a process of its own
with a time limit, so that a slow section does not stop the next. Both sides have the same batches,
clipping and AdamW, and the text is on the GPU. The clock is read when the GPU is done. Compiled
PyTorch includes the loss; the compile time is not counted.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

import grassmann
from charlm import processes
from charlm.text import read_corpus
from charlm.training import Training, train_step
from experiments.bench_models import Ours, Setup, Theirs, multiply_adds, n_parameters, torch
from experiments.common import markdown
from grassmann import Config, UserError, require

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"  # PyTorch's; gpu.py has CuPy's
LARGE = 8192  # rows of the product and of the copy that measure the GPU's rates
SIZES = {
    "laptop": (
        {"n_layer": 4, "d_model": 128, "n_head": 4, "context": 64},
        12,
    ),  # sizes of the models, batch size
    "nanogpt": ({"n_layer": 6, "d_model": 384, "n_head": 6, "context": 256}, 64),
}  # nanoGPT's on a GPU
RATES = {
    "GB/s": 3350.0,
    "TFLOP/s": 50.0,
    "TFLOP/s in tf32": 400.0,
    "us a node": 1.5,
}  # assumed of an H100

# ---- sections: each yields the rows of its table; everything that it prints is a note ------------


def rates(setup: Setup) -> Iterator[dict]:
    """The GPU, and how fast it copies, multiplies and starts the nodes of a graph"""
    gpu, precisions, wait = ours_on_gpu()
    cp, properties = (
        gpu.cp,
        getattr(gpu.cp.cuda.runtime, "getDeviceProperties", lambda k: {"name": b"a stand-in"}),
    )
    row = {"GPU": properties(0)["name"].decode(), "PyTorch": torch and torch.__version__}
    a, b, c = (cp.ones((LARGE, LARGE), np.float32) for _ in "abc")  # larger than any cache
    row["GB/s"] = 2e-9 * a.nbytes / timed(lambda: cp.copyto(b, a), wait)
    for precision in precisions:
        gpu.set_precision(precision)
        name = "TFLOP/s" + " in tf32" * (precision == "tf32")
        row[name] = 2e-12 * LARGE**3 / timed(lambda: gpu.fused.product(a, b, c), wait)
    few = cp.ones(32, np.float32)
    graph = gpu.fused.device.Graph(lambda: [few.__iadd__(few) for _ in range(200)])
    yield row | {"us a node": 1e6 / 200 * timed(graph, wait)}


def parity(setup: Setup) -> Iterator[dict]:
    """Parity with NumPy: python -m pytest -m gpu tests/gpu"""
    which = ["-m", "gpu"] if DEVICE == "cuda" else ["-m", "slow", "-k", "test_op and linear"]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", *which],
        cwd=ROOT,
    )
    yield from ()  # what pytest prints last are the notes


def floor(setup: Setup) -> Iterator[dict]:
    """What a recorded step of the default model starts and moves, and how long that must take

    Counted on the tests' CPU stand-in: nodes of the graph, calls of the host, bytes of all
    arguments, operations of products. The floor adds up the times of all nodes. A node's time is
    the longest of three: bytes, operations, start.
    """
    cuda_on_cpu = stand_in()
    gpu, cuda_on_cpu.dry = cuda_on_cpu.gpu_on_cpu(), True
    np.seterr(all="ignore")  # nothing is computed
    for size, (sizes, batch_size) in SIZES.items():
        for dropout in (0.0, 0.1):
            config, training = (
                replace(setup, sizes=sizes).config(dropout=dropout),
                Training(batch_size=batch_size),
            )
            params, text = gpu.init_params(config), gpu.np.zeros(10_000, dtype=np.uint8)
            state = gpu.adamw_init(params)
            for step in range(3):  # the third step is like all later steps
                cuda_on_cpu.started.clear()
                train_step(gpu, params, config, training, state, step, text)
            calls, recorded = len(cuda_on_cpu.started), params.step.graphs["step"].graph.nodes
            gradients = (
                params.step.gradients
            )  # some come in parts, and only a table points to these
            parts = sum(
                (n + 1) * gradients[name].nbytes
                for name in gradients
                for _, place, _, n, _ in gradients.rows
                if place == gradients.places[name]
            )
            nodes = [
                (name, parts if name == "gather" else moved, work)
                for name, moved, work, _ in recorded
            ]
            floors = {
                "floor, ms" + rate.removeprefix("TFLOP/s"): sum(
                    max(
                        1e-6 * moved / RATES["GB/s"],
                        2e-9 * work / RATES[rate],
                        1e-3 * RATES["us a node"],
                    )
                    for _, moved, work in nodes
                )
                for rate in RATES
                if rate.startswith("TFLOP/s")
            }
            yield {
                "size": size,
                "dropout": dropout,
                "nodes": len(nodes),
                "calls of the host": calls,
                "products": sum(name == "product" for name, *_ in nodes),
                "MB": 1e-6 * sum(n[1] for n in nodes),
                "GFLOP": 2e-9 * sum(n[2] for n in nodes),
            } | floors


def ours(setup: Setup, size: str) -> Iterator[dict]:
    """Milliseconds per training step of gpu.py, and how many microseconds of a step the host is
    busy"""
    (gpu, precisions, wait), setup = ours_on_gpu(), of_size(setup, size)
    every = models(setup) | {"memory": setup.config(memory=True)}
    for precision in precisions:
        gpu.set_precision(precision)
        for name, config in every.items():
            run = Ours(setup, config, gpu)
            seconds, started, calls = (
                timed(run.step, wait),
                time.perf_counter(),
                1 if DEVICE == "cpu" else 50,
            )
            for _ in range(calls):  # few enough not to fill CUDA's queue
                run.step()
            host = (time.perf_counter() - started) / calls
            yield step_row(size, precision, name, "gpu.py", config, seconds) | {
                "host, us": 1e6 * host
            }
            run = wait()


def theirs(setup: Setup, size: str, by: str) -> Iterator[dict]:
    """Milliseconds per training step of PyTorch, eager or compiled, in float32, TF32 and bfloat16
    (autocast)"""
    setup = of_size(setup, size)
    for precision in ("bfloat16", "tf32", "float32"):
        torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
        for name, config in models(setup).items():
            try:
                run = OnGPU(setup, config, by == "compiled", precision == "bfloat16")
                yield step_row(size, precision, name, by, config, timed(run.step, run.wait))
            except Exception as error:  # it fails in many ways; the table then lacks this row
                print(f"{name}, {by}: {type(error).__name__}: {str(error)[:300]}")


def kernels(setup: Setup, size: str, steps: int = 10) -> Iterator[dict]:
    """Where the time of a step goes, kernel by kernel (CUPTI, through PyTorch's profiler)"""
    (gpu, precisions, wait), setup = ours_on_gpu(), of_size(setup, size)
    gpu.set_precision(precisions[-1])
    run, time_of = (
        Ours(setup, setup.config(), gpu),
        f"self_{'device' if DEVICE == 'cuda' else 'cpu'}_time_total",
    )
    timed(run.step, wait)
    with torch.profiler.profile(
        activities=[getattr(torch.profiler.ProfilerActivity, DEVICE.upper())]
    ) as profile:
        for _ in range(steps):
            run.step()
        wait()
    events = sorted(
        ((getattr(e, time_of) / steps, e) for e in profile.key_averages()),
        key=lambda pair: -pair[0],
    )
    for us, event in events[:40]:
        yield {"kernel": event.key[:60], "a step": event.count / steps, "us a step": us}


def training(setup: Setup) -> Iterator[dict]:
    """The first steps of a training run on the GPU and by NumPy: their losses, every 50th"""
    config, losses, steps = setup.config(), [], 300 if DEVICE == "cuda" else 5
    for model in (ours_on_gpu()[0], grassmann):
        run = Ours(setup, config, model)
        losses.append([float(run.step()) for _ in range(steps)])
    apart = np.abs(np.subtract(*losses))
    for k in sorted({*range(0, steps, 50), steps - 1}):
        yield {
            "step": k,
            "the GPU": losses[0][k],
            "NumPy": losses[1][k],
            "apart so far": float(max(apart[: k + 1])),
        }


SECTIONS = {
    "rates": (rates, 30),
    "parity": (parity, 120),
    "floor": (floor, 30),
}  # and its time limit in seconds
SECTIONS |= {f"{size}-ours": (partial(ours, size=size), 30) for size in SIZES}
SECTIONS |= {f"{size}-eager": (partial(theirs, size=size, by="eager"), 30) for size in SIZES}
SECTIONS |= {f"{size}-compiled": (partial(theirs, size=size, by="compiled"), 100) for size in SIZES}
SECTIONS |= {"kernels": (partial(kernels, size="nanogpt"), 30), "training": (training, 60)}


def stand_in() -> ModuleType:
    """The tests' CPU stand-in for CuPy."""
    name = "cuda_on_cpu"
    place = ROOT / "tests" / "gpu" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, place)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def ours_on_gpu() -> tuple:
    """gpu.py, in float32; the precisions of this GPU's products; and a function that waits for the
    GPU."""
    gpu = command_line.backend(True, "float32")
    device = gpu.cp.cuda.Device()
    return (
        gpu,
        ["float32", "tf32"][: 1 + (int(device.compute_capability) >= 80)],
        device.synchronize,
    )


def timed(step: Callable, wait: Callable) -> float:
    """Seconds of a call: the median of seven rounds of calls, after two rounds that compile, record
    and warm up."""
    times, calls = [], 3
    for _ in range(9 if DEVICE == "cuda" else 3):
        start = time.perf_counter()
        for _ in range(calls):
            step()
        wait()
        times.append((time.perf_counter() - start) / calls)
        calls = max(1, min(200, round(0.3 / times[-1]))) if DEVICE == "cuda" else 1
    return float(np.median(times[2:]))


def of_size(setup: Setup, size: str) -> Setup:
    return replace(
        setup, sizes=SIZES[size][0], training=replace(setup.training, batch_size=SIZES[size][1])
    )


def models(setup: Setup) -> dict[str, Config]:
    paper = {"taps": False, "normalize": True, "positions": True}
    return {
        "default": setup.config(),
        "GPT": setup.gpt_config(),
        "paper's layer": setup.config(**paper),
    }


def step_row(
    size: str, precision: str, model: str, by: str, config: Config, seconds: float
) -> dict:
    return {
        "size": size,
        "precision": precision,
        "model": model,
        "by": by,
        "parameters": n_parameters(config),
        "ms": 1e3 * seconds,
        "TFLOP/s": 2e-12 * multiply_adds(config, SIZES[size][1]) / seconds,
    }


class OnGPU(Theirs):
    """A PyTorch model in training on the GPU, compiled or not."""

    def __init__(self, setup: Setup, config: Config, compiled: bool, bfloat16: bool):
        super().__init__(setup, config, DEVICE)
        self.tokens, self.window = (
            self.tensor(setup.corpus.train),
            torch.arange(config.context, device=DEVICE),
        )
        how = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}  # with CUDA graphs
        torch.compiler.reset()  # without this, it refuses to compile the ninth model
        loss = torch.compile(self.loss, **how) if compiled else self.loss
        self.loss = torch.autocast(DEVICE, torch.bfloat16, enabled=bfloat16)(loss)
        self.wait = torch.cuda.synchronize if DEVICE == "cuda" else int

    def batch(self) -> tuple:
        t, end = self.setup.training, len(self.tokens) - len(self.window)
        starts = np.random.default_rng((t.seed, self.k)).integers(0, end, t.batch_size)
        windows = torch.from_numpy(starts).to(DEVICE, non_blocking=True)[:, None] + self.window
        return self.tokens[windows], self.tokens[windows + 1]


# ---- the report ----------------------------------------------------------------------------------


def run(
    name: str, data: str | None, rehearse: bool, measured: dict
) -> tuple[list[dict], list[str]]:
    """The rows and notes of a section, in a process of its own that ends at its time limit."""
    command = [
        sys.executable,
        "-m",
        "experiments.bench_gpu",
        name,
        json.dumps([data, measured, rehearse]),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=SECTIONS[name][1])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # also ends what torch.compile has started
        said = process.communicate()[0] + "\nit took too long"
    lines = [line for line in said.splitlines() if line.strip()]
    return [json.loads(line) for line in lines if line[:2] == '{"'], [
        line for line in lines[-9:] if line[:2] != '{"'
    ]


def main(
    only: list[str] | None, data: str | None, folder: Path | None, rehearse: bool
) -> list[dict]:
    """Run the sections. Print each when it is done, and with a folder write it.

    Returns a row for each result, or for each section without any. Raises UserError without a GPU.
    """
    results = []
    page, gpu, measured, names = ["# On a GPU"], {}, {}, only or [*SECTIONS]
    for name in names if names == ["floor"] or "rates" in names else ["rates", *names]:
        rows, notes = run(name, data, rehearse, measured)
        if name == "rates":
            require(len(rows) > 0, notes[-1] if notes else "the GPU does not answer")
            gpu, measured = rows[0], {key: rate for key, rate in rows[0].items() if key in RATES}
        results += [summary(name, row) for row in rows]
        if not rows:
            results.append(
                {"section": name, "what": "", "result": notes[-1] if notes else "nothing"}
            )
        function = SECTIONS[name][0]
        text = ["", f"## {name}", "", getattr(function, "func", function).__doc__.strip(), ""]
        text += [markdown(rows)] * (len(rows) > 0) + ["", *notes]
        print(*text, sep="\n", flush=True)
        page += text
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"gpu-{gpu['GPU'].replace(' ', '-')}.md").write_text(
                "\n".join(page) + "\n", encoding="utf-8"
            )
    return results


def summary(name: str, row: dict) -> dict:
    """A row of any section's table as a row of one table for all: its words, then its numbers."""
    words = [value for value in row.values() if isinstance(value, str)]
    numbers = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, int | float)]
    return {"section": name, "what": " ".join(words), "result": ", ".join(numbers)}


def first_hour() -> None:
    """Everything in a row, into results/gpu-NAME.md, and one table at the end."""
    rows = main(None, None, ROOT / "experiments" / "results", False)
    print("", "## In one table", "", markdown(rows), sep="\n")


def section(name: str, data: str | None, measured: dict, rehearse: bool) -> None:
    """Run one section and print its rows as JSON. This runs in the section's own process."""
    global DEVICE, LARGE
    if rehearse:
        sys.modules["cupy"] = stand_in()
        DEVICE, LARGE = "cpu", 64
        SIZES.update(
            dict.fromkeys(
                SIZES, ({"n_layer": 2, "d_model": 16, "rank": 4, "context": 24, "n_head": 4}, 2)
            )
        )
    require(
        torch is not None or not name.endswith(("eager", "compiled", "kernels")),
        "this section needs PyTorch",
    )
    RATES.update(measured)
    setup = Setup(read_corpus(data, 16_384), len(processes.available_cores()))
    for row in SECTIONS[name][0](replace(setup, sizes=SIZES["laptop"][0]) if rehearse else setup):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["--first-hour"]:
            first_hour()
        else:
            section(sys.argv[1], *json.loads(sys.argv[2]))
    except UserError as error:  # no GPU
        sys.exit(str(error))
