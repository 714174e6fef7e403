"""How fast it is, and against what: python bench.py prints a table and writes it as JSON.

  python bench.py                               everything, about a quarter of an hour on two cores
  python bench.py --data shakespeare            on Tiny Shakespeare, as in the README
  python bench.py --quick                       fewer repeats, and no race
  python bench.py --only step generation        some sections

What is compared runs by turns, A B A B …, so that a machine that speeds up or slows down does so for both:
times are medians over the turns, and "x ours" is the median of the quotients within a turn. Both sides have
the same number of threads, the same batches and the same optimiser. The other side is PyTorch as it is
usually written, not compiled (pip install -r requirements-bench.txt); without it, its cells say so.
"""

import cpu  # noqa: F401, I001  (before NumPy)

import json
import multiprocessing
import platform
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import numpy as np

import grassmann
from grassmann import Config
from sample import Parser, number, plain_output
from text import encode, load_text, vocabulary
from train_char import MODEL_DEFAULTS, PACE_DEFAULTS, available_cores, default_offsets

try:
    import torch
    from torch import nn
    from torch.nn import functional as F

    Module = nn.Module
except ImportError:
    torch, Module = None, object

Array = np.ndarray
NEEDS_TORCH = "needs torch"
ONE_OFFSET, SIX_OFFSETS = ((1,), (2,), (4,), (8,)), (1, 2, 4, 8, 12, 16)  # per layer by turns; in every layer


# ---- the two sides ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """The text, and train_char.py's settings: what everything is measured with."""

    settings: dict
    vocab_size: int
    train_tokens: Array
    val_tokens: Array
    threads: int
    quick: bool = False

    def config(self, **changes) -> Config:
        """The model that train_char.py trains, or a variant of it."""
        s = {**self.settings, **changes}
        if s["offsets"] is None:
            s["offsets"] = default_offsets(s["n_layer"], s["context"], s["taps"])
        return Config(vocab_size=self.vocab_size, **{f.name: s[f.name] for f in fields(Config) if f.name in s})


class Ours:
    """A model of grassmann.py in training, as train_char.py does it."""

    def __init__(self, setup: Setup, config: Config, batch_size: int = 0, threads: int = 0):
        self.setup, self.config, self.threads = setup, config, threads or setup.threads
        self.batch_size = batch_size or setup.settings["batch_size"]
        self.params = grassmann.init_params(config, setup.settings["seed"])
        self.optimizer = grassmann.adamw_init(self.params)
        self.n_params = sum(p.size for p in self.params.values())
        self.k = 0

    def step(self, lr: float = 1e-3) -> None:
        s, seed = self.setup.settings, self.setup.settings["seed"]
        x, y = grassmann.get_batch(self.setup.train_tokens, self.batch_size, self.config.context, seed, self.k)
        _, grads = grassmann.loss_and_grads(self.params, self.config, x, y, (seed, self.k), threads=self.threads)
        grassmann.clip_grads(grads, s["grad_clip"])
        grassmann.adamw_step(self.params, grads, self.optimizer, self.k, lr, weight_decay=s["weight_decay"])
        self.k += 1

    def validate(self) -> float:
        return grassmann.validation_loss(self.params, self.config, self.setup.val_tokens, self.threads)


class Theirs:
    """A PyTorch model in training: the same batches, clipping, optimiser and validation."""

    def __init__(self, setup: Setup, model: Module):
        self.setup, self.model = setup, model
        parameters, decay = list(model.parameters()), setup.settings["weight_decay"]
        groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
                  {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
        self.n_params = sum(p.numel() for p in parameters)
        self.k = 0

    def step(self, lr: float = 1e-3) -> None:
        s = self.setup.settings
        x, y = grassmann.get_batch(self.setup.train_tokens, s["batch_size"], s["context"], s["seed"], self.k)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(x, y).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), s["grad_clip"])
        self.optimizer.step()
        self.k += 1

    def loss(self, x: Array, y: Array):
        logits = self.model(torch.from_numpy(x).long())
        return F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).long().flatten())

    def validate(self) -> float:
        """What `grassmann.validation_loss` does: consecutive windows of the context, every target once."""
        x, y, context = self.setup.val_tokens[:-1], self.setup.val_tokens[1:], self.setup.settings["context"]
        whole, total = len(x) // context * context, 0.0
        chunks = [slice(k, min(k + 32 * context, whole)) for k in range(0, whole, 32 * context)]
        chunks += [slice(whole, None)] if whole < len(x) else []
        with torch.inference_mode():
            for chunk in chunks:
                length = min(context, len(x[chunk]))
                loss = self.loss(x[chunk].reshape(-1, length), y[chunk].reshape(-1, length))
                total += loss.item() * len(x[chunk])
        return total / len(x)


class Attention(Module):
    """Causal multi-head attention, as in nanoGPT. `past` holds the earlier keys and values (a KV cache)."""

    def __init__(self, d: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, h, past: dict | None = None):
        B, L, d = h.shape
        q, k, v = (a.view(B, L, self.n_head, d // self.n_head).transpose(1, 2) for a in self.qkv(h).split(d, 2))
        if past:
            k, v = torch.cat([past["k"], k], 2), torch.cat([past["v"], v], 2)
        if past is not None:
            past["k"], past["v"] = k, v
        a = F.scaled_dot_product_attention(q, k, v, is_causal=L > 1)
        return self.out(a.transpose(1, 2).reshape(B, L, d))


class GrassmannMix(Module):
    """The paper's layer as it is usually written: for each offset, gather the partners, gather the index
    pairs of the wedge, normalise, project; then average over the offsets, and gate."""

    def __init__(self, d: int, rank: int, offsets: tuple[int, ...]):
        super().__init__()
        self.offsets, (self.i, self.j) = offsets, torch.triu_indices(rank, rank, 1)
        self.red, self.gate = nn.Linear(d, rank), nn.Linear(2 * d, d)
        self.plu, self.b_plu = nn.Linear(len(self.i), d, bias=False), nn.Parameter(torch.zeros(d))

    def forward(self, h, past: None = None):
        z, t = self.red(h), torch.arange(h.shape[1])
        total, count = torch.zeros_like(h), torch.zeros(h.shape[1], 1, dtype=h.dtype)
        for delta in self.offsets:
            valid = (t >= delta).to(h.dtype)[:, None]
            partner = z[:, (t - delta).clamp(min=0)]
            p = z[..., self.i] * partner[..., self.j] - z[..., self.j] * partner[..., self.i]
            p = p / p.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            total, count = total + valid * self.plu(p), count + valid
        g = total / count.clamp(min=1) + self.b_plu
        alpha = torch.sigmoid(self.gate(torch.cat([h, g], -1)))
        return alpha * h + (1 - alpha) * g


class Block(Module):
    """h ← h + mix(LN(h)),  h ← h + FFN(LN(h))."""

    def __init__(self, d: int, d_ff: int, mix: Module, bias: bool, gelu: str):
        super().__init__()
        self.mix, self.ln1, self.ln2 = mix, nn.LayerNorm(d, bias=bias), nn.LayerNorm(d, bias=bias)
        up, down = nn.Linear(d, d_ff, bias=bias), nn.Linear(d_ff, d, bias=bias)
        self.ffn = nn.Sequential(up, nn.GELU(gelu), down)

    def forward(self, h, past: dict | None = None):
        h = h + self.mix(self.ln1(h), past)
        return h + self.ffn(self.ln2(h))


class Model(Module):
    """Learned positions, blocks, head tied to the embedding: around either mixer."""

    def __init__(self, config: Config, mixers: list, bias: bool, gelu: str = "none"):
        super().__init__()
        d = config.d_model
        self.E, self.P = nn.Embedding(config.vocab_size, d), nn.Embedding(config.context, d)
        self.blocks = nn.ModuleList(Block(d, config.d_ff, mix, bias, gelu) for mix in mixers)
        self.ln_f = nn.LayerNorm(d, bias=bias)
        for name, p in self.named_parameters():
            if p.dim() > 1:  # N(0, 0.02²), smaller where it writes into the residual stream, as in nanoGPT
                nn.init.normal_(p, std=0.02 / (2 * len(mixers)) ** (0.5 if "mix.out" in name or "ffn.2" in name else 0))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, past: list | None = None, start: int = 0):
        h = self.E(tokens) + self.P.weight[start : start + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            h = block(h, past and past[i])
        return F.linear(self.ln_f(h), self.E.weight)


def gpt(config: Config) -> Model:
    """nanoGPT's model: no biases, GELU in its exact form."""
    torch.manual_seed(0)
    return Model(config, [Attention(config.d_model, config.n_head) for _ in range(config.n_layer)], bias=False)


def plain_grassmann(config: Config) -> Model:
    """The Grassmann model of everyone's first hour: `config` in PyTorch operations, gradients by autograd."""
    torch.manual_seed(0)
    return Model(config, [GrassmannMix(config.d_model, config.rank, o) for o in config.offsets], bias=True, gelu="tanh")


def gpt_size(config: Config) -> int:
    """Parameters of `gpt`: those of the attention model in grassmann.py without the biases."""
    shapes = grassmann.param_shapes(config)
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.split(".")[-1].startswith("b"))


def gpt_of_size(setup: Setup, n_params: int) -> Config:
    """The GPT with about n_params parameters: as many columns per head as fit, the rest in the FFN's inner width."""
    n_head, n_layer = setup.settings["n_head"], setup.settings["n_layer"]
    d = n_head
    while gpt_size(setup.config(mixer="attention", positions=True, d_model=d + n_head)) <= n_params:
        d += n_head
    missing = n_params - gpt_size(setup.config(mixer="attention", positions=True, d_model=d))
    d_ff = 4 * d + 8 * round(missing / (2 * d * n_layer) / 8)
    return setup.config(mixer="attention", positions=True, d_model=d, d_ff=d_ff)


# ---- the clock ----------------------------------------------------------------------------------------


def alternate(contestants: dict[str, Callable | None], rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds per call of each contestant, one number a round; a contestant None (no PyTorch) gets none.

    In a round each has its turn: a call that is not timed, which fetches its data into the caches and lets
    the other's threads fall asleep, then `calls` timed ones. A round to warm up is left out.
    """
    times = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            if run is not None:
                run()
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                times[name].append((time.perf_counter() - start) / calls)
    return {name: seconds[1:] for name, seconds in times.items()}


def middle(values, scale: float = 1.0) -> float | str:
    """Their median times `scale`."""
    values = list(values)
    return median(values) * scale if values else NEEDS_TORCH


def quotient(theirs: list[float], ours: list[float]) -> float | str:
    """Median of the quotients within a round."""
    return middle(b / a for a, b in zip(ours, theirs, strict=bool(theirs)))


# ---- sections: each returns the rows of its table -----------------------------------------------------


def step(setup: Setup) -> list[dict]:
    """Milliseconds per training step: batch, forward, backward, clipping, AdamW

    Our default model against the GPT of nanoGPT's laptop recipe, at equal width and at equal parameters. Then
    the paper's layer (offsets averaged, normalised, positions), ours against the same in plain PyTorch.
    """
    n_layer, ours = setup.settings["n_layer"], setup.config()
    one, six = (
        setup.config(taps=False, normalize=True, positions=True, offsets=offsets)
        for offsets in ([ONE_OFFSET[i % 4] for i in range(n_layer)], [SIX_OFFSETS] * n_layer)
    )
    size = sum(math.prod(shape) for shape in grassmann.param_shapes(ours).values())
    matches = [
        ("default", ours, [("GPT, equal width", gpt, setup.config(mixer="attention", positions=True)),
                           ("GPT, equal parameters", gpt, gpt_of_size(setup, size))]),
        ("one offset per layer", one, [("plain Grassmann", plain_grassmann, one)]),
        ("six offsets per layer", six, [("plain Grassmann", plain_grassmann, six)]),
    ]  # fmt: skip
    rows = []
    for what, config, others in matches:
        ours = Ours(setup, config)
        theirs = {name: Theirs(setup, make(config)) if torch else None for name, make, config in others}
        contestants = {"ours": ours.step} | {name: model and model.step for name, model in theirs.items()}
        times = alternate(contestants, *((3, 1) if setup.quick else (25, 4)))
        for name, model in theirs.items():
            rows.append({
                "ours": what, "parameters": ours.n_params, "ms": middle(times["ours"], 1e3),
                "PyTorch": name, "its parameters": model.n_params if model else NEEDS_TORCH,
                "its ms": middle(times[name], 1e3), "x ours": quotient(times[name], times["ours"]),
            })  # fmt: skip
    return rows


@dataclass
class Run:
    """A training run in the race."""

    model: Ours | Theirs
    lr: float
    iters: int
    seconds: float = 0.0
    curve: list = field(default_factory=list)  # [step, seconds, validation loss]

    def advance(self, steps: int) -> None:
        """So many steps, on the clock; then a validation where one is due, off the clock."""
        s, model, start = self.model.setup.settings, self.model, time.perf_counter()
        for k in range(model.k, min(model.k + steps, self.iters)):
            model.step(grassmann.learning_rate(k, self.iters, self.lr, self.lr / 10, s["warmup_iters"]))
        self.seconds += time.perf_counter() - start
        if model.k % s["eval_every"] == 0 or model.k == self.iters:
            self.curve.append([model.k, self.seconds, model.validate()])


def race(setup: Setup, iters: int = 2000) -> list[dict]:
    """Validation loss (nats per character) and training time, against nanoGPT's laptop recipe

    2,000 steps of the GPT as published (learning rate 1e-3, falling to a tenth) and at its best learning rate
    (4e-3), and of our defaults, by turns of 50 steps; the same batches. Then two runs of ours whose number of
    steps, and with it the schedule, is chosen beforehand from the times per step: for a fifth of the GPT's
    time, and for all of it. Validation is the whole split, every target once, and not on the clock.
    """
    if setup.quick:
        return [{"run": "skipped by --quick: it takes minutes"}]
    attention, lr = setup.config(mixer="attention", positions=True), setup.settings["lr"]
    runs = {}
    if torch:
        runs["GPT, as published"] = published = Run(Theirs(setup, gpt(attention)), 1e-3, iters)
        runs["GPT, at its best learning rate"] = Run(Theirs(setup, gpt(attention)), 4e-3, iters)
    runs["ours, as many steps"] = ours = Run(Ours(setup, setup.config()), lr, iters)
    for _ in range(0, iters, 50):
        for run in runs.values():
            run.advance(50)
    for name, share in (("ours, in a fifth of the GPT's time", 0.2), ("ours, in the GPT's time", 1.0)):
        if torch:
            steps = max(1, round(share * published.seconds / ours.seconds * iters))
            runs[name] = Run(Ours(setup, setup.config()), lr, steps)
            for _ in range(0, steps, 50):
                runs[name].advance(50)
    return [{
        "run": name, "parameters": run.model.n_params, "learning rate": run.lr, "steps": run.iters,
        "seconds": run.seconds, "of the GPT's": run.seconds / published.seconds if torch else NEEDS_TORCH,
        "loss": run.curve[-1][2], "minus the GPT's": run.curve[-1][2] - published.curve[-1][2] if torch else NEEDS_TORCH,
        "curve": run.curve,
    } for name, run in runs.items()]  # fmt: skip


def products(config: Config, tokens: int) -> list[tuple[int, int, int]]:
    """The (m, k, n) of every product of an (m, k) by a (k, n) matrix, where a forward pass over so many tokens
    applies a parameter: once for each W, and E for the head."""
    shapes = {name: shape for name, shape in grassmann.param_shapes(config).items() if ".W_" in name}
    return [(tokens, *shape) for shape in shapes.values()] + [(tokens, config.d_model, config.vocab_size)]


def multiply_adds(config: Config, batch_size: int) -> int:
    """Multiply-adds in the matrix products of one training step.

    Three times those of the forward pass: the product itself, the gradient of its input, that of its weights.
    Attention also has scores and weighted sums, L x d each per token and layer. Not counted is what is no matrix
    product: the wedge (2n multiplications a token), normalisation, activations, the optimiser.
    """
    tokens = batch_size * config.context
    tables = 2 * config.n_layer * config.context * config.d_model if config.mixer == "attention" else 0
    return 3 * (sum(m * k * n for m, k, n in products(config, tokens)) + tokens * tables)


def multiply(operands: list) -> None:
    """The three products of each linear map: forward, gradient of the input, gradient of the weights."""
    for x, W, dy in operands:
        x @ W, dy @ W.T, x.T @ dy


def product_loop(shapes: list[tuple[int, int, int]], threads: int, side: str) -> Callable[[], None]:
    """A function that does the products of these shapes, forward and backward, on so many threads.

    NumPy: each thread for itself, on its share of the rows, as in the training step. PyTorch: one after the
    other, each on all threads.
    """
    rng = np.random.default_rng(0)

    def operands(m: int, k: int, n: int) -> list[Array]:
        return [rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n), (m, n))]

    if side == "PyTorch":
        tensors = [[torch.from_numpy(a) for a in operands(*shape)] for shape in shapes]
        return lambda: multiply(tensors)
    shares = [[operands(-(-m // threads), k, n) for m, k, n in shapes] for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(multiply, shares))


def efficiency(setup: Setup) -> list[dict]:
    """Float32 matrix products per second (GFLOP/s, one multiply-add is 2), and how near a training step comes

    The rate is measured at the shapes of the step itself, and at large squares; "of the rate" is the time the
    step's multiply-adds would take at the first of them, over the time that the step takes.
    """
    large, threads, batch_size = 1024 if setup.quick else 2048, setup.threads, setup.settings["batch_size"]
    configs = {"NumPy": setup.config(), "PyTorch": setup.config(mixer="attention", positions=True)}
    shapes = {side: products(config, batch_size * config.context) for side, config in configs.items()}
    squares = {"NumPy": [(large * threads, large, large)], "PyTorch": [(large, large, large)]}
    contestants = {}
    for side, config in configs.items():
        there = side == "NumPy" or torch
        model = there and (Ours(setup, config) if side == "NumPy" else Theirs(setup, gpt(config)))
        contestants[side, "step"] = model.step if there else None
        contestants[side, "own"] = product_loop(shapes[side], threads, side) if there else None
        contestants[side, "large"] = product_loop(squares[side], threads, side) if there else None
    times = alternate(contestants, *((2, 1) if setup.quick else (15, 2)))
    rows = []
    for side, what in (("NumPy", "ours"), ("PyTorch", "GPT, equal width")):
        work = multiply_adds(configs[side], batch_size)
        own, big = (6e-9 * sum(m * k * n for m, k, n in a[side]) for a in (shapes, squares))
        seconds, alone = times[side, "step"], times[side, "own"]
        rows.append({
            "what": what, "multiply-adds per step": work, "ms per step": middle(seconds, 1e3),
            "GFLOP/s, own shapes": middle(own / t for t in alone),
            "GFLOP/s, large": middle(big / t for t in times[side, "large"]),
            "of the rate": middle(2e-9 * work / own * a / t for a, t in zip(alone, seconds, strict=True)),
        })  # fmt: skip
    return rows


@contextmanager
def exclusive_times():
    """Replace every op of grassmann.py by one that keeps time; gives a dict from name to [calls, seconds].

    The seconds are exclusive: while an op has called another, only the other's clock runs.
    """
    rest = ("get_batch", "loss_and_grads", "clip_grads", "adamw_step")
    names = [name for name in vars(grassmann) if name.endswith(("_forward", "_backward")) or name in rest]
    originals, spent, inner = {name: getattr(grassmann, name) for name in names}, {}, [0.0]

    def timed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            inner.append(0.0)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - start
            entry = spent.setdefault(name, [0, 0.0])
            entry[0] += 1
            entry[1] += seconds - inner.pop()
            inner[-1] += seconds
            return result

        return call

    try:
        for name, function in originals.items():
            setattr(grassmann, name, timed(name, function))
        yield spent
    finally:
        for name, function in originals.items():
            setattr(grassmann, name, function)


def ops(setup: Setup) -> list[dict]:
    """Where the time of our step goes, on one thread: each op without the ops that it calls"""
    model, steps = Ours(setup, setup.config(), threads=1), []
    for _ in range(3 if setup.quick else 30):
        with exclusive_times() as spent:
            model.step()
        steps.append(spent)
    steps = steps[1:]  # the first one warms up
    total = middle(sum(seconds for _, seconds in spent.values()) for spent in steps)
    rows = []
    for name, (calls, _) in steps[0].items():
        seconds = middle(spent[name][1] for spent in steps)
        rows.append({"op": name, "calls": calls, "ms": 1e3 * seconds, "share": seconds / total})
    return sorted(rows, key=lambda row: -row["ms"])


def our_writer(setup: Setup, text: Array) -> Callable[[], None]:
    """Reads the text with stream_step; then each call draws one character and reads it."""
    config = setup.config()
    params, rng = grassmann.init_params(config), np.random.default_rng(0)
    state = grassmann.stream_init(params, config)
    for token in text:
        logits, state = grassmann.stream_step(params, config, state, token)

    def write() -> None:
        nonlocal logits, state
        token = grassmann.sample(logits, 0.8, None, rng)
        logits, state = grassmann.stream_step(params, config, state, token)

    return write


def gpt_writer(setup: Setup, text: Array, cache: bool) -> Callable[[], None]:
    """The same with the GPT, which sees its context: each call reads all of it again; or, with a KV cache, only the
    last character. The cache ends with the positions, at the context; it then starts over with the last half."""
    config = setup.config(mixer="attention", positions=True)
    model, context = gpt(config), config.context
    tokens, past, read = torch.from_numpy(text).long()[None, -context:], None, context

    def write() -> None:
        nonlocal tokens, past, read
        with torch.inference_mode():
            if not cache:
                logits = model(tokens[:, -context:])
            elif read == context:
                past, read = [{} for _ in range(config.n_layer)], context // 2
                logits = model(tokens[:, -read:], past)
            else:
                logits, read = model(tokens[:, -1:], past, read), read + 1
            token = torch.multinomial(F.softmax(logits[:, -1] / 0.8, -1), 1)
            tokens = torch.cat([tokens[:, -context:], token], 1)

    return write


def generation(setup: Setup, positions: tuple[int, ...] = (100, 20_000)) -> list[dict]:
    """Characters written per second, one at a time, on one thread, sampling included

    Ours streams, and has read as many characters as the position says. The GPT re-reads its context for each
    character, or keeps keys and values until the context is full; nothing before the context matters to it.
    """
    rows, context = [], setup.settings["context"]
    if torch:
        torch.set_num_threads(1)
    for position in positions[:1] if setup.quick else positions:
        text = np.resize(setup.train_tokens, position)
        contestants = {"ours": our_writer(setup, text)}
        for name, cache in (("GPT, re-reading", False), ("GPT, KV cache", True)):
            contestants[name] = gpt_writer(setup, text, cache) if torch else None
        # as many calls as make whole cycles of the cache, context - context // 2 characters each
        times = alternate(contestants, 2 if setup.quick else 20, 2 * (context - context // 2))
        row = {"position": position} | {name: middle(1 / t for t in seconds) for name, seconds in times.items()}
        for name in list(times)[1:]:
            row[f"ours / {name}"] = quotient(times[name], times["ours"])
        rows.append(row)
    return rows


def length(setup: Setup, tokens: int = 32_768, table_up_to: int = 2048) -> list[dict]:
    """Microseconds per token of a training step against the length of the text window, on at most 2 threads

    Every step has the same number of tokens: 512 windows of 64, or 2 of 16,384. Beside our model the same with
    attention (mixer="attention"), as far as its length x length tables go.
    """
    if setup.quick:
        tokens = 4096
    lengths = [64 * 2**k for k in range(20) if 64 * 2**k <= tokens // 2]
    contestants = {}
    for L in lengths:
        for mixer in ("grassmann", "attention"):
            config = setup.config(context=L, mixer=mixer)
            if L < len(setup.train_tokens) and (mixer == "grassmann" or table_fits(setup, config, tokens, table_up_to)):
                contestants[L, mixer] = Ours(setup, config, tokens // L, min(2, setup.threads)).step
    times = alternate(contestants, 1 if setup.quick else 3, 1)
    rows = []
    for L in lengths:
        ours, attention = times.get((L, "grassmann")), times.get((L, "attention"))
        rows.append({
            "length": L, "windows": tokens // L, "ours": middle(ours, 1e6 / tokens) if ours else "text too short",
            "attention": middle(attention, 1e6 / tokens) if attention else "table too large",
            "x ours": quotient(attention, ours) if ours and attention else "",
        })  # fmt: skip
    return rows
