"""What bench.py and bench_gpu.py measure, and with what clock. Not a program of its own.

A model of grassmann.py or gpu.py in training, the PyTorch models it is compared with, as they are usually written,
and the same loop around both; how much work a step is; and the clock that lets them take turns.
"""

import cpu  # noqa: F401, I001  (before NumPy)

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from statistics import median
from types import ModuleType

import numpy as np

import grassmann
from grassmann import Array, Config
from text import encode, load_text, vocabulary
from runs import MODEL_DEFAULTS, PACE_DEFAULTS, resolved

try:
    import torch
    from torch import nn
    from torch.nn import functional as F

    Module = nn.Module
except (ImportError, OSError):  # (OSError: installed, but one of its libraries doesn't load)
    torch, Module = None, object

NEEDS_TORCH = "needs torch"


# ---- text and settings --------------------------------------------------------------------------------


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
        s = resolved({**self.settings, **changes})
        return Config(vocab_size=self.vocab_size, **{f.name: s[f.name] for f in fields(Config) if f.name in s})

    def gpt_config(self, **changes) -> Config:
        """nanoGPT's laptop recipe has the layers, width and context of our defaults."""
        return self.config(mixer="attention", positions=True, **changes)


def make_setup(data: str | None, threads: int, quick: bool) -> Setup:
    """The text, split as train_char.py does. Raises ValueError."""
    text, settings = load_text(data), MODEL_DEFAULTS | PACE_DEFAULTS | {"dropout": 0.0}  # as nanoGPT's recipe
    if len(text) < 20 * settings["context"]:
        raise ValueError(f"the text has {len(text)} characters, the benchmark needs {20 * settings['context']}")
    vocab = vocabulary(text)
    tokens, n_val = encode(text, vocab), len(text) // 10
    return Setup(settings, len(vocab), tokens[:-n_val], tokens[-n_val:], threads, quick)


# ---- a model in training ------------------------------------------------------------------------------


class Ours:
    """A model of grassmann.py, or of gpu.py, in training, as train_char.py does it."""

    def __init__(
        self, setup: Setup, config: Config, batch_size: int = 0, threads: int = 0, backend: ModuleType = grassmann
    ):
        self.setup, self.config, self.backend, self.threads = setup, config, backend, threads or setup.threads
        self.batch_size = batch_size or setup.settings["batch_size"]
        self.train_tokens = backend.np.asarray(setup.train_tokens)
        self.params = backend.init_params(config, setup.settings["seed"])
        self.optimizer = backend.adamw_init(self.params)
        self.k = 0

    def step(self, lr: float = 1e-3) -> None:
        s, seed, model = self.setup.settings, self.setup.settings["seed"], self.backend
        x, y = model.get_batch(self.train_tokens, self.batch_size, self.config.context, seed, self.k)
        _, grads = model.loss_and_grads(self.params, self.config, x, y, (seed, self.k), threads=self.threads)
        model.clip_grads(grads, s["grad_clip"])
        how = {"weight_decay": s["weight_decay"]}
        model.adamw_step(self.params, grads, self.optimizer, self.k, lr, **how)
        self.k += 1

    def validate(self) -> float:
        return self.backend.validation_loss(self.params, self.config, self.setup.val_tokens, self.threads)


class Theirs:
    """A PyTorch model in training: the same batches, clipping, optimiser and validation."""

    def __init__(self, setup: Setup, model: Module):
        torch.set_num_threads(setup.threads)
        self.setup, self.model = setup, model
        matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": setup.settings["weight_decay"]},
                  {"params": vectors, "weight_decay": 0.0}]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
        self.k = 0

    def step(self, lr: float = 1e-3) -> None:
        x, y = self.batch()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(x, y).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.setup.settings["grad_clip"])
        self.optimizer.step()
        self.k += 1

    def batch(self) -> Iterable:
        s = self.setup.settings
        batch = grassmann.get_batch(self.setup.train_tokens, s["batch_size"], s["context"], s["seed"], self.k)
        return map(self.tensor, batch)

    def tensor(self, tokens: Array):
        return torch.from_numpy(tokens.astype(np.int64)).to(self.model.E.weight.device)

    def loss(self, x, y):
        return F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())

    def validate(self) -> float:
        """What `grassmann.validation_loss` does: consecutive windows of the context, every target once."""
        x, y, context = self.setup.val_tokens[:-1], self.setup.val_tokens[1:], self.setup.settings["context"]
        whole, total = len(x) // context * context, 0.0
        chunks = [slice(k, min(k + 32 * context, whole)) for k in range(0, whole, 32 * context)]
        chunks += [slice(whole, None)] if whole < len(x) else []
        with torch.inference_mode():
            for chunk in chunks:
                length = min(context, len(x[chunk]))
                loss = self.loss(*(self.tensor(tokens[chunk].reshape(-1, length)) for tokens in (x, y)))
                total += loss.item() * len(x[chunk])
        return total / len(x)


# ---- the models in PyTorch ----------------------------------------------------------------------------


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
        self.offsets = offsets
        for name, index in zip("ij", torch.triu_indices(rank, rank, 1), strict=True):
            self.register_buffer(name, index.clone(), persistent=False)  # goes to the model's device, no parameter
        self.red, self.gate = nn.Linear(d, rank), nn.Linear(2 * d, d)
        self.plu, self.b_plu = nn.Linear(len(self.i), d, bias=False), nn.Parameter(torch.zeros(d))

    def forward(self, h, past: None = None):
        g = self.planes(self.red(h)) + self.b_plu
        alpha = torch.sigmoid(self.gate(torch.cat([h, g], -1)))
        return alpha * h + (1 - alpha) * g

    def wedge(self, u, v):
        return u[..., self.i] * v[..., self.j] - u[..., self.j] * v[..., self.i]

    def planes(self, z):
        t, total, count = torch.arange(z.shape[1], device=z.device), 0, 0
        for delta in self.offsets:
            valid = (t >= delta).to(z.dtype)[:, None]
            p = self.wedge(z, z[:, (t - delta).clamp(min=0)])
            p = p / p.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            total, count = total + valid * self.plu(p), count + valid
        return total / count.clamp(min=1)


class TappedMix(GrassmannMix):
    """Our default layer with our algebra: one partner, weighted by the taps, and one wedge, not normalised."""

    def __init__(self, d: int, rank: int, offsets: tuple[int, ...]):
        super().__init__(d, rank, offsets)
        self.taps = nn.Parameter(torch.empty(len(offsets), rank))

    def wedge(self, u, v):
        (u_i, v_i), (u_j, v_j) = ([a.index_select(-1, k) for a in (u, v)] for k in (self.i, self.j))
        return u_i * v_j - u_j * v_i  # (the gradient of index_select is faster than that of u[..., i])

    def planes(self, z):
        earlier = (F.pad(z, (0, 0, delta, -delta)) for delta in self.offsets)  # zeros in front, as long as z
        return self.plu(self.wedge(z, sum(weight * e for weight, e in zip(self.taps, earlier, strict=True))))


class Block(Module):
    """h ← h + mix(LN(h)),  h ← h + FFN(LN(h))."""

    def __init__(self, d: int, d_ff: int, mix: Module, bias: bool, gelu: str):
        super().__init__()
        self.mix, self.ln1, self.ln2 = mix, nn.LayerNorm(d, bias=bias), nn.LayerNorm(d, bias=bias)
        self.ffn = nn.Sequential(nn.Linear(d, d_ff, bias=bias), nn.GELU(gelu), nn.Linear(d_ff, d, bias=bias))

    def forward(self, h, past: dict | None = None):
        h = h + self.mix(self.ln1(h), past)
        return h + self.ffn(self.ln2(h))


class Model(Module):
    """Learned positions if the configuration has them, blocks, head tied to the embedding: around any mixer."""

    def __init__(self, config: Config, mixers: list[Module], bias: bool, gelu: str):
        super().__init__()
        d, n_layer = config.d_model, config.n_layer
        self.E = nn.Embedding(config.vocab_size, d)
        self.P = nn.Embedding(config.context, d) if config.positions else None
        self.blocks = nn.ModuleList(Block(d, config.d_ff, mix, bias, gelu) for mix in mixers)
        self.ln_f = nn.LayerNorm(d, bias=bias)
        for name, p in self.named_parameters():  # as in nanoGPT: smaller where it writes into the residual stream
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer if "mix.out" in name or "ffn.2" in name else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, past: list[dict] | None = None, start: int = 0):
        h = self.E(tokens)
        if self.P is not None:
            h = h + self.P.weight[start : start + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            h = block(h, past and past[i])
        return F.linear(self.ln_f(h), self.E.weight)


def gpt(config: Config) -> Model:
    """nanoGPT's model: no biases, GELU in its exact form."""
    torch.manual_seed(0)
    return Model(config, [Attention(config.d_model, config.n_head) for _ in range(config.n_layer)], False, "none")


def torch_grassmann(config: Config) -> Model:
    """The model of grassmann.py, gradients by autograd: with taps and not normalised, or normalised and without."""
    torch.manual_seed(0)
    mix = TappedMix if config.taps else GrassmannMix
    return Model(config, [mix(config.d_model, config.rank, o) for o in config.offsets], True, "tanh")


# ---- sizes and work -----------------------------------------------------------------------------------


def n_parameters(config: Config, bias: bool = True) -> int:
    """Parameters of a model; of `gpt` with bias=False: mixer="attention" in grassmann.py without the biases."""
    shapes = grassmann.param_shapes(config).items()
    return sum(math.prod(shape) for name, shape in shapes if bias or not name.split(".")[-1].startswith("b"))


def gpt_of_size(setup: Setup, size: int) -> Config:
    """The widest GPT (a multiple of its heads) of at most `size` parameters; what is missing widens its FFN."""
    d = n_head = setup.settings["n_head"]
    while n_parameters(setup.gpt_config(d_model=d + n_head), bias=False) <= size:
        d += n_head
    missing = size - n_parameters(setup.gpt_config(d_model=d), bias=False)
    return setup.gpt_config(d_model=d, d_ff=4 * d + 8 * round(missing / (16 * d * setup.settings["n_layer"])))


def products(config: Config, tokens: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of each product of m x k by k x n numbers in which a forward pass over m = `tokens` tokens
    applies a weight matrix: every W, and E as the head."""
    weights = [shape for name, shape in grassmann.param_shapes(config).items() if ".W_" in name]
    return [(tokens, *shape) for shape in (*weights, (config.d_model, config.vocab_size))]


def multiply_adds(config: Config, batch_size: int) -> int:
    """Multiply-adds in the matrix products of one training step.

    Three times those of the forward pass: the product, the gradient of its input, the gradient of its weights.
    Attention has scores and weighted sums besides, L·d each per token and layer. What is no matrix product is
    not counted: the wedge (2n multiplications per token and layer), normalisation, activations, the optimiser.
    """
    tokens = batch_size * config.context
    tables = 2 * config.n_layer * config.context * config.d_model if config.mixer == "attention" else 0
    return 3 * (sum(math.prod(shape) for shape in products(config, tokens)) + tokens * tables)


# ---- the clock ----------------------------------------------------------------------------------------


def alternate(contestants: dict, rounds: int, calls: int, finish: Callable[[], None] = lambda: None) -> dict:
    """Seconds per call of each contestant, one number a round; a contestant None (no PyTorch) gets none.

    In a round each has its turn: a call that is not timed, which fetches its data into the caches and lets
    the other's threads fall asleep, then `calls` timed ones. A round to warm up is left out. `finish` waits for
    what was only started, as on a GPU, before the clock is read.
    """
    times = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            if run is not None:
                run()
                finish()
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                finish()
                times[name].append((time.perf_counter() - start) / calls)
    return {name: seconds[1:] for name, seconds in times.items()}


def middle(values: Iterable[float], scale: float = 1.0, missing: str = NEEDS_TORCH) -> float | str:
    """Their median times `scale`."""
    values = list(values)
    return median(values) * scale if values else missing


def quotient(theirs: list[float], ours: list[float], missing: str = NEEDS_TORCH) -> float | str:
    """Median of the quotients within a round."""
    return middle((a / b for a, b in zip(theirs, ours, strict=True)), 1, missing) if theirs and ours else missing
