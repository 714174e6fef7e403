"""What the benchmark measures: a model of grassmann.py or gpu.py in training, and PyTorch models, as they are
usually written, in the same loop. Also the amount of work in a step."""

import math
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import numpy as np

import grassmann
from experiments.common import Learner, cell  # noqa: F401 (bench_gpu.py has `cell` from here)
from grassmann import Array, Config, param_shapes
from text import Corpus
from training import Training, in_threads

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    Module = nn.Module
except (ImportError, OSError):  # (OSError: installed, but one of its libraries doesn't load)
    torch, Module, Tensor = None, object, object

# ---- models in training --------------------------------------------------------------------------

@dataclass(frozen=True)
class Setup:
    """What everything is measured with: a text, and the defaults of train_char.py."""

    corpus: Corpus
    threads: int
    quick: bool = False
    training: Training = field(default_factory=Training)
    sizes: dict = field(default_factory=dict)  # of the models, if they are not the defaults

    def config(self, **changes) -> Config:
        """The model that train_char.py trains, or a variant; no dropout, as nanoGPT's recipe."""
        return Config(len(self.corpus.vocab), **{"dropout": 0.0} | self.sizes | changes)

    def gpt_config(self, **changes) -> Config:
        """nanoGPT's laptop recipe has the layers, width and context of our defaults."""
        return self.config(mixer="attention", positions=True, **changes)

class Ours(Learner):
    """A model of grassmann.py, or of gpu.py, in training."""

    def __init__(self, setup: Setup, config: Config, model: ModuleType = grassmann):
        text, threads = model.np.asarray(setup.corpus.train), setup.threads if model is grassmann else 0
        super().__init__(config, setup.training, text, threads, model)
        self.setup = setup

    def validate(self) -> float:
        each = partial(in_threads, threads=self.setup.threads)
        return grassmann.validation_loss(self.params, self.config, self.setup.corpus.val, each)

class Theirs:
    """A PyTorch `Model` in training: the same batches, rates, clipping, optimiser, validation."""

    def __init__(self, setup: Setup, config: Config, device: str = "cpu"):
        torch.set_num_threads(setup.threads)
        self.setup, self.config, self.device, self.k = setup, config, device, 0
        self.model = Model(config).to(device)
        groups = [{"params": [p for p in self.model.parameters() if (p.dim() > 1) == is_matrix],
                   "weight_decay": setup.training.weight_decay * is_matrix}
                  for is_matrix in (True, False)]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)

    def step(self) -> None:
        t, (x, y) = self.setup.training, self.batch()
        for group in self.optimizer.param_groups:
            group["lr"] = t.rate(self.k)
        self.optimizer.zero_grad()
        self.loss(x, y).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), t.grad_clip)
        self.optimizer.step()
        self.k += 1

    def batch(self) -> list[Tensor]:
        t, tokens = self.setup.training, self.setup.corpus.train
        batch = grassmann.get_batch(tokens, t.batch_size, self.config.context, t.seed, self.k)
        return [*map(self.tensor, batch)]

    def tensor(self, tokens: Array) -> Tensor:
        return torch.from_numpy(tokens.astype(np.int64)).to(self.device)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())

    def validate(self) -> float:
        def totals(_, chunks: list) -> list[float]:  # the windows of grassmann.py, but this model
            return [self.loss(*map(self.tensor, (x, y))).item() * y.size for x, y in chunks]

        with torch.inference_mode():
            return grassmann.validation_loss({}, self.config, self.setup.corpus.val, totals)

# ---- the models in PyTorch -----------------------------------------------------------------------

class Attention(Module):
    """Causal multi-head attention, as in nanoGPT. `past` is a cache of earlier keys and values."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        d, self.n_head = config.d_model, config.n_head
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, h: Tensor, past: dict | None = None) -> Tensor:
        B, L, d = h.shape
        q, k, v = (a.view(B, L, self.n_head, d // self.n_head).transpose(1, 2)
                   for a in self.qkv(h).split(d, 2))  # (B, n_head, L, d_h)
        if past:
            k, v = torch.cat([past["k"], k], 2), torch.cat([past["v"], v], 2)
        if past is not None:
            past["k"], past["v"] = k, v
        a = F.scaled_dot_product_attention(q, k, v, is_causal=L > 1)
        return self.out(a.transpose(1, 2).reshape(B, L, d))

class GrassmannMix(Module):
    """The paper's layer as it is usually written: for each offset gather the partners, gather the
    index pairs of the wedge, normalise, project; then average over the offsets, and gate."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        d, r, self.offsets = config.d_model, config.rank, config.offsets[layer]
        for name, index in zip("ij", torch.triu_indices(r, r, 1), strict=True):
            self.register_buffer(name, index.clone(), persistent=False)  # moves with the model
        self.red, self.gate = nn.Linear(d, r), nn.Linear(2 * d, d)
        self.plu, self.b_plu = nn.Linear(len(self.i), d, bias=False), nn.Parameter(torch.zeros(d))
        self.taps = nn.Parameter(torch.empty(len(self.offsets), r)) if config.taps else None

    def forward(self, h: Tensor, past: None = None) -> Tensor:
        g = self.planes(self.red(h)) + self.b_plu
        alpha = torch.sigmoid(self.gate(torch.cat([h, g], -1)))
        return alpha * h + (1 - alpha) * g

    def wedge(self, u: Tensor, v: Tensor) -> Tensor:
        return u[..., self.i] * v[..., self.j] - u[..., self.j] * v[..., self.i]

    def planes(self, z: Tensor) -> Tensor:
        t, total, count = torch.arange(z.shape[1], device=z.device), 0, 0
        for delta in self.offsets:
            valid = (t >= delta).to(z.dtype)[:, None]
            p = self.wedge(z, z[:, (t - delta).clamp(min=0)])
            p = p / p.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            total, count = total + valid * self.plu(p), count + valid
        return total / count.clamp(min=1)

class TappedMix(GrassmannMix):
    """Our default layer, computed our way: one partner, a sum weighted by the taps, and one wedge."""

    def wedge(self, u: Tensor, v: Tensor) -> Tensor:
        (u_i, v_i), (u_j, v_j) = ([a.index_select(-1, k) for a in (u, v)] for k in (self.i, self.j))
        return u_i * v_j - u_j * v_i  # (the gradient of index_select is faster than u[..., i]'s)

    def planes(self, z: Tensor) -> Tensor:
        earlier = (F.pad(z, (0, 0, delta, -delta)) for delta in self.offsets)  # zeros in front
        s = sum(tap * partner for tap, partner in zip(self.taps, earlier, strict=True))
        return self.plu(self.wedge(z, s))

class Block(Module):
    """h ← h + mix(LN(h)),  h ← h + FFN(LN(h))."""

    def __init__(self, config: Config, mix: Module, bias: bool, gelu: str):
        super().__init__()
        d, d_ff = config.d_model, config.d_ff
        self.mix, self.ln1, self.ln2 = mix, nn.LayerNorm(d, bias=bias), nn.LayerNorm(d, bias=bias)
        inner, outer = nn.Linear(d, d_ff, bias=bias), nn.Linear(d_ff, d, bias=bias)
        self.ffn = nn.Sequential(inner, nn.GELU(gelu), outer)

    def forward(self, h: Tensor, past: dict | None = None) -> Tensor:
        h = h + self.mix(self.ln1(h), past)
        return h + self.ffn(self.ln2(h))

class Model(Module):
    """With attention, this is nanoGPT's model: no biases, exact GELU. Otherwise it is the model of grassmann.py with
    gradients by autograd, either with taps and not normalised, or normalised and without taps."""

    def __init__(self, config: Config):
        super().__init__()
        torch.manual_seed(0)
        d, n_layer, gpt = config.d_model, config.n_layer, config.mixer == "attention"
        mixer = Attention if gpt else TappedMix if config.taps else GrassmannMix
        mixers, gelu = [mixer(config, i) for i in range(n_layer)], "none" if gpt else "tanh"
        self.E = nn.Embedding(config.vocab_size, d)
        self.P = nn.Embedding(config.context, d) if config.positions else None
        self.blocks = nn.ModuleList(Block(config, mix, not gpt, gelu) for mix in mixers)
        self.ln_f = nn.LayerNorm(d, bias=not gpt)
        for name, p in self.named_parameters():  # as in nanoGPT: smaller if it writes into the residual path
            if p.dim() > 1:
                residual = "mix.out" in name or "ffn.2" in name
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer if residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, past: list | None = None, start: int = 0) -> Tensor:
        h = self.E(tokens)
        if self.P is not None:
            h = h + self.P.weight[start : start + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            h = block(h, past and past[i])
        return F.linear(self.ln_f(h), self.E.weight)

# ---- sizes and work ------------------------------------------------------------------------------

def n_parameters(config: Config) -> int:
    """The number of a model's parameters. With attention, biases do not count, since the GPT has none."""
    return sum(math.prod(shape) for name, shape in param_shapes(config).items()
               if config.mixer != "attention" or not name.split(".")[-1].startswith("b"))

def gpt_of_size(setup: Setup, size: int) -> Config:
    """The widest GPT of at most `size` parameters. Parameters that are left widen its FFN."""
    gpt = setup.gpt_config()
    d = gpt.n_head  # a multiple of the heads
    while n_parameters(setup.gpt_config(d_model=d + gpt.n_head)) <= size:
        d += gpt.n_head
    missing = size - n_parameters(setup.gpt_config(d_model=d))
    return setup.gpt_config(d_model=d, d_ff=4 * d + 8 * round(missing / (16 * d * gpt.n_layer)))

def multiply_adds(config: Config, batch_size: int) -> int:
    """Multiply-adds in the matrix products of one training step: three times the forward pass, since inputs and
    weights have gradients. Attention also has its tables, scores and weighted sums, L·d each per token and layer.
    The wedge is no matrix product and is not counted."""
    tokens, attention = batch_size * config.context, config.mixer == "attention"
    tables = 2 * config.n_layer * config.context * config.d_model if attention else 0
    weights = sum(math.prod(shape) for name, shape in param_shapes(config).items() if ".W_" in name)
    return 3 * tokens * (weights + config.d_model * config.vocab_size + tables)
