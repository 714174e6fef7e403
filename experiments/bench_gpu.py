"""Training steps on a CUDA GPU, gpu.py against PyTorch: python -m experiments.bench --gpu.

Needs a card, CuPy (requirements-gpu.txt) and a PyTorch built for CUDA. Both sides have the same
precision, batches, clipping and AdamW, and take turns; the text lies on the card, and the clock is
read when the card is done. PyTorch runs eagerly and under torch.compile, loss included, which takes
minutes in each section. In bfloat16 its results are rounded too, not only operands (autocast).
"""

import cli  # noqa: I001  (before NumPy)

from dataclasses import replace
from functools import partial, update_wrapper
from statistics import median
from types import ModuleType

import numpy as np

from experiments.bench_models import (Ours, Setup, Tensor, Theirs, alternate, multiply_adds,
                                      n_parameters, quotient, torch)
from grassmann import Config

DEVICE = "cuda"  # PyTorch's; gpu.py has CuPy's
LARGE = 8192  # rows of a product that shows the card's rate
MODES = {"PyTorch": None, "compiled": "reduce-overhead", "autotuned": "max-autotune"}
SIZES = {  # of the models, and the batch; the second is nanoGPT's for a GPU
    "laptop": ({"n_layer": 4, "d_model": 128, "n_head": 4, "context": 64}, 12),
    "nanogpt": ({"n_layer": 6, "d_model": 384, "n_head": 6, "context": 256}, 64),
}

def both_sides(precision: str) -> ModuleType:
    """gpu.py, which computes in this precision from now on, as PyTorch does; what was compiled or
    recorded before is forgotten. Raises ValueError where one of them cannot run."""
    gpu = cli.backend(True, precision)
    if torch is None or (DEVICE == "cuda" and not torch.cuda.is_available()):
        raise ValueError("--gpu compares with PyTorch, and no PyTorch here finds a CUDA GPU")
    gpu._graph.cache_clear()
    torch.compiler.reset()
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    return gpu

def card() -> dict[str, str]:
    """What the numbers depend on. Raises ValueError."""
    cupy = both_sides("float32").cp
    info = {"CUDA": torch.version.cuda, "CuPy": cupy.__version__}
    return info | {"card": torch.cuda.get_device_name()}

class OnCard(Theirs):
    """A PyTorch model in training on the card, compiled if a mode is given."""

    def __init__(self, setup: Setup, config: Config, precision: str, mode: str | None):
        super().__init__(setup, config, DEVICE)
        self.tokens, self.rounded = self.tensor(setup.corpus.train), precision == "bfloat16"
        self.window = torch.arange(config.context, device=DEVICE)
        if mode:
            self.loss = torch.compile(self.loss, mode=mode, fullgraph=True, dynamic=False)

    def batch(self) -> tuple[Tensor, Tensor]:
        """As `gpu.get_batch`: places are drawn on the host, they alone travel, nobody waits."""
        t, end = self.setup.training, len(self.tokens) - len(self.window)
        starts = np.random.default_rng((t.seed, self.k)).integers(0, end, t.batch_size)
        windows = torch.from_numpy(starts).to(DEVICE, non_blocking=True)[:, None] + self.window
        return self.tokens[windows], self.tokens[windows + 1]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.rounded):
            return super().loss(x, y)

def training_step(size: str, precision: str, setup: Setup) -> list[dict]:
    """Milliseconds per training step on the card, and what part of the card's rate that is

    Our default model against itself in PyTorch and the GPT; the paper's layer against its usual
    code. "of the rate": the time of as many multiply-adds in a large product, over the step's.
    """
    gpu, (sizes, batch_size), runs, rows = both_sides(precision), SIZES[size], {}, []
    setup = replace(setup, sizes=sizes, training=replace(setup.training, batch_size=batch_size))
    models = {"default": setup.config(), "GPT": setup.gpt_config(),
              "paper's layer": setup.config(taps=False, normalize=True, positions=True)}
    for name, config in models.items():
        if name != "GPT":
            runs[name, "gpu.py"] = Ours(setup, config, gpu).step
        for by, mode in MODES.items():
            runs[name, by] = OnCard(setup, config, precision, mode).step
            try:
                for _ in range(3):  # torch.compile compiles here
                    runs[name, by]()
            except Exception as error:  # in many ways, and the table does without it
                print(f"{name}, {by}: {type(error).__name__}: {str(error)[:500]}")
                runs[name, by] = None
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b, c = torch.randn(3, LARGE, LARGE, dtype=dtype, device=DEVICE)
    runs["product"] = lambda: torch.mm(a, b, out=c)
    times = alternate(setup, runs, 10, 10, torch.cuda.synchronize)
    product = times.pop("product")
    for (name, by), seconds in times.items():
        ours = times["default" if name == "GPT" else name, "gpu.py"]
        part = quotient(product, seconds) * multiply_adds(models[name], batch_size) / LARGE**3
        rows.append({"size": size, "precision": precision, "model": name, "by": by,
                     "parameters": n_parameters(models[name]), "ms": 1e3 * median(seconds),
                     "x ours": quotient(seconds, ours), "of the rate": part})
    return rows

SECTIONS = {f"{size}-{word}": update_wrapper(partial(training_step, size, word), training_step)
            for size in SIZES for word in ("float32", "tf32", "bfloat16")}
