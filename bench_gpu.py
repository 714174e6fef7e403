"""Training steps on a CUDA GPU, gpu.py against PyTorch: python bench.py --gpu. Not a program of its own.

Needs a card, CuPy (requirements-gpu.txt) and a PyTorch built for CUDA (requirements-bench.txt). Six sections, two
sizes in three precisions; torch.compile takes minutes in each. Both sides have the same precision, batches (from a
text that lies on the card), clipping and AdamW, and take turns as everywhere in bench.py; the clock is read when
the card is done with a batch of steps. PyTorch runs eagerly, and under torch.compile, loss included, in both modes
of MODES, of which the faster is quoted (--quick tries the first). Each precision as that side usually does it:

  float32     nothing is rounded
  tf32        operands to 10 bits after the point: `gpu.set_precision`; float32_matmul_precision "high"
  bfloat16    operands to 7 bits, in PyTorch results too, the weights stay float32: `gpu.set_precision`; torch.autocast
"""

import cpu  # noqa: F401, I001  (before NumPy)

import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, update_wrapper

import numpy as np

from bench_models import Ours, Setup, Theirs, alternate, gpt, middle, multiply_adds, n_parameters, products, quotient
from bench_models import torch, torch_grassmann
from grassmann import Config
from cli import backend

DEVICE = "cuda"  # PyTorch's; gpu.py has CuPy's
MODES = ("reduce-overhead", "max-autotune")
LARGE, COPIED = 8192, 2**26  # the card's rates: a product of matrices with so many rows, a copy of so many numbers
SIZES = {
    "laptop": {"n_layer": 4, "d_model": 128, "n_head": 4, "context": 64, "batch_size": 12},
    "nanogpt": {"n_layer": 6, "d_model": 384, "n_head": 6, "context": 256, "batch_size": 64},  # its size for a GPU
}


def our_side(precision: str):
    """gpu.py, with its products in this precision. Raises ValueError where it, or PyTorch, cannot run."""
    gpu = backend(True, precision)
    if torch is None:
        raise ValueError("--gpu compares with PyTorch: pip install -r requirements-bench.txt")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--gpu compares with PyTorch, and PyTorch {torch.__version__} finds no CUDA GPU")
    return gpu


def card() -> dict:
    """What the numbers depend on. Raises ValueError."""
    cp, question = our_side("float32").cp, ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(question, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "nvidia-smi does not tell"
    return {
        "card": torch.cuda.get_device_name(), "driver": driver,
        "CuPy": f"{cp.__version__}, CUDA {cp.cuda.runtime.runtimeGetVersion()}",
        "PyTorch": f"{torch.__version__}, CUDA {torch.version.cuda}",
    }  # fmt: skip


# ---- PyTorch on the card ------------------------------------------------------------------------------


class OnCard(Theirs):
    """A PyTorch model in training on the card, in one of the precisions, compiled if a mode is given."""

    def __init__(self, setup: Setup, model, precision: str, mode: str | None):
        super().__init__(setup, model.to(DEVICE))
        self.tokens = self.tensor(setup.train_tokens)
        self.window, self.rounded = torch.arange(setup.settings["context"], device=DEVICE), precision == "bfloat16"
        if mode:
            self.loss = torch.compile(self.loss, mode=mode, fullgraph=True, dynamic=False)

    def batch(self):
        """As `gpu.get_batch`: the places that grassmann.py draws; they alone travel, and nothing waits for them."""
        s, end = self.setup.settings, len(self.tokens) - len(self.window)
        starts = np.random.default_rng((s["seed"], self.k)).integers(0, end, s["batch_size"])
        windows = torch.from_numpy(starts).to(DEVICE, non_blocking=True)[:, None] + self.window
        return self.tokens[windows], self.tokens[windows + 1]

    def loss(self, x, y):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.rounded):
            return torch.nn.functional.cross_entropy(self.model(x).flatten(0, 1), y.flatten())


@contextmanager
def both_sides(precision: str):
    """gpu.py, while both sides compute in this precision; afterwards as before, and what was compiled is forgotten."""
    gpu = our_side(precision)
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    try:
        yield gpu
    finally:
        gpu.set_precision("float32")
        gpu._graph.cache_clear()
        torch.set_float32_matmul_precision("highest")
        torch.compiler.reset()


def finish() -> None:
    """Wait for the card, whichever side gave it work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def failure(run: Callable[[], None]) -> str | None:
    """What goes wrong, if anything, in the first three calls: there torch.compile compiles and records."""
    try:
        for _ in range(3):
            run()
        finish()
    except Exception as error:  # a compiler can fail in many ways, and the table does without it
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return None


# ---- the floor ----------------------------------------------------------------------------------------


def bytes_moved(config: Config, batch_size: int, precision: str) -> int:
    """Bytes that one training step reads and writes, if nothing stays in a cache between two products.

    11 numbers of 4 bytes per parameter: itself read forward, backward and by AdamW, and written; its gradient
    written, and read by the norm and by AdamW; its two means read and written. 5 numbers (of 2 bytes in bfloat16)
    for each that a matrix product takes or gives: written and read forward, read again backward, its gradient
    written and read. What happens between two products counts as fused with them.
    """
    parameters = n_parameters(config, bias=config.mixer != "attention")  # `gpt` has none
    activations = sum(m * (k + n) for m, k, n in products(config, batch_size * config.context))
    return 4 * 11 * parameters + (2 if precision == "bfloat16" else 4) * 5 * activations


def large_product(precision: str) -> Callable[[], None]:
    """A matrix product of 2 LARGE³ operations."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b, c = torch.randn(3, LARGE, LARGE, dtype=dtype, device=DEVICE)
    return lambda: torch.mm(a, b, out=c)


def large_copy() -> Callable[[], None]:
    """COPIED numbers of 4 bytes, read and written."""
    a, b = torch.randn(2, COPIED, device=DEVICE)
    return lambda: b.copy_(a)


# ---- the sections -------------------------------------------------------------------------------------


def training_step(size: str, precision: str, setup: Setup) -> list[dict]:
    """Milliseconds per training step on the card, and how often the floor fits into them

    Our default model against itself in PyTorch and against the GPT; the paper's layer (one offset a layer, normalised,
    positions) against the same in PyTorch as it is usually written. "x ours" is its time over ours. The floor is the
    larger of two times: "arithmetic", of the operations in the step's matrix products (two for each of
    `multiply_adds`, where a causal kernel can skip half of attention's tables), at the measured rate of a large product
    in the same precision; and "memory", of `bytes_moved`, at the measured bandwidth of a large copy.
    """
    setup = replace(setup, settings=setup.settings | SIZES[size])
    one = setup.config(taps=False, normalize=True, positions=True)
    models = {"default": setup.config(), "GPT": setup.gpt_config(), "paper's layer": one}
    against = {"default": "default", "GPT": "default", "paper's layer": "paper's layer"}
    compiled = {f"compiled, {mode}": mode for mode in (MODES[:1] if setup.quick else MODES)}
    runs, failures = {}, {}
    with both_sides(precision) as gpu:
        for name, make in (("default", torch_grassmann), ("GPT", gpt), ("paper's layer", torch_grassmann)):
            if against[name] == name:
                runs[name, "gpu.py"] = Ours(setup, models[name], backend=gpu).step
            for by, mode in {"PyTorch": None, **compiled}.items():
                run = OnCard(setup, make(models[name]), precision, mode).step
                failures[name, by] = failure(run)
                runs[name, by] = None if failures[name, by] else run
        rates = {"product": large_product(precision), "copy": large_copy()}
        times = alternate(runs | rates, *((2, 2) if setup.quick else (10, 10)), finish)
    for name in models:
        ran = sorted((middle(times[name, by]), by) for by in compiled if times.get((name, by)))
        for _, slower in ran[1:]:
            del runs[name, slower]

    rows = []
    for name, by in runs:
        config, batch_size, failed = models[name], setup.settings["batch_size"], failures.get((name, by))
        operations, moved = 2 * multiply_adds(config, batch_size), bytes_moved(config, batch_size, precision)
        arithmetic = [operations / (2 * LARGE**3) * seconds for seconds in times["product"]]
        memory = [moved / (8 * COPIED) * seconds for seconds in times["copy"]]
        floor = max(arithmetic, memory, key=middle)
        missing = f"fails: {failed.split(':')[0]}" if failed else ""
        rows.append({
            "size": size, "precision": precision, "model": name, "by": by,
            "parameters": n_parameters(config, bias=name != "GPT"), "ms": middle(times[name, by], 1e3, missing),
            "x ours": quotient(times[name, by], times[against[name], "gpu.py"], missing),
            "GFLOP": operations / 1e9, "at TFLOP/s": middle(2e-12 * LARGE**3 / t for t in times["product"]),
            "arithmetic, µs": middle(arithmetic, 1e6),
            "MB": moved / 1e6, "at GB/s": middle(8e-9 * COPIED / t for t in times["copy"]),
            "memory, µs": middle(memory, 1e6), "floor": "arithmetic" if floor is arithmetic else "memory",
            "x floor": quotient(times[name, by], floor, missing),
            "turns, ms": [1e3 * seconds for seconds in times[name, by]], "failure": [failed] if failed else [],
        })  # fmt: skip
    return rows


SECTIONS = {
    f"{size}-{precision}": update_wrapper(partial(training_step, size, precision), training_step)
    for size in SIZES for precision in ("float32", "tf32", "bfloat16")
}  # fmt: skip
