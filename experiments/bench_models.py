"""What the benchmark measures: models of grassmann.py, gpu.py and PyTorch in training.

And how much work a training step is.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import numpy as np

import grassmann
from charlm.text import Corpus
from charlm.training import Training
from experiments.common import Learner
from grassmann import Config, param_shapes

try:
    import torch
    from torch import Tensor, nn

    from experiments.torch_layer import GrassmannMix
except (ImportError, OSError):  # (OSError: installed, but one of its libraries doesn't load)
    torch = None
    Tensor = object
    nn = SimpleNamespace(Module=object)
    GrassmannMix = object


@dataclass(frozen=True)
class Setup:
    """What everything is measured with: a text, and the defaults of train_char.py."""

    corpus: Corpus
    threads: int
    quick: bool = False
    training: Training = field(default_factory=Training)
    sizes: dict = field(default_factory=dict)  # of the models, if they are not the defaults

    def config(self, **changes):
        """The model that train_char.py trains, or a variant; no dropout, as in nanoGPT's recipe."""
        settings = {"dropout": 0.0} | self.sizes | changes
        return Config(len(self.corpus.vocab), **settings)

    def gpt_config(self, **changes):
        """nanoGPT's laptop recipe has the layers, width and context of our defaults."""
        return self.config(mixer="attention", positions=True, **changes)


class Ours(Learner):
    """A model of grassmann.py, or of gpu.py, in training."""

    def __init__(self, setup, config, model=grassmann):
        text = model.np.asarray(setup.corpus.train)
        threads = setup.threads if model is grassmann else 0
        super().__init__(config, setup.training, text, threads, model)
        self.setup = setup

    def validate(self):
        return grassmann.validation_loss(self.params, self.config, self.setup.corpus.val)


class Theirs:
    """A PyTorch `Model` in training: the same batches, rates, clipping, optimiser, validation."""

    def __init__(self, setup, config, device="cpu"):
        torch.set_num_threads(setup.threads)
        self.setup = setup
        self.config = config
        self.device = device
        self.k = 0  # steps made
        self.model = Model(config).to(device)
        parameters = [*self.model.parameters()]
        matrices = [p for p in parameters if p.dim() > 1]
        vectors = [p for p in parameters if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": setup.training.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] = self.setup.training.rate(self.k)
        self.optimizer.zero_grad()
        x, y = self.batch()
        self.loss(x, y).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.setup.training.grad_clip)
        self.optimizer.step()
        self.k += 1

    def batch(self):
        tokens = self.setup.corpus.train
        how = self.setup.training
        x, y = grassmann.get_batch(tokens, how.batch_size, self.config.context, how.seed, self.k)
        return self.tensor(x), self.tensor(y)

    def tensor(self, tokens):
        return torch.from_numpy(tokens.astype(np.int64)).to(self.device)

    def loss(self, x, y):
        logits = self.model(x)
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def validate(self):
        """grassmann.py cuts the windows. This model reads them."""

        def each(_, windows):
            for x, y in windows:
                loss = self.loss(self.tensor(x), self.tensor(y))
                yield loss.item() * y.size

        with torch.inference_mode():
            return grassmann.validation_loss({}, self.config, self.setup.corpus.val, each)


# ---- the models in PyTorch -----------------------------------------------------------------------


class Attention(nn.Module):
    """Causal multi-head attention, as in nanoGPT. `past` is a cache of earlier keys and values."""

    def __init__(self, d, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, h, past=None):
        q, k, v = (self.split(a) for a in self.qkv(h).chunk(3, 2))  # (B, n_head, L, d_k)
        if past:
            k = torch.cat([past["k"], k], 2)
            v = torch.cat([past["v"], v], 2)
        if past is not None:
            past["k"] = k
            past["v"] = v
        causal = h.shape[1] > 1
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(heads.transpose(1, 2).flatten(2))

    def split(self, a):
        """(B, L, d) -> (B, n_head, L, d_k)."""
        return a.unflatten(2, (self.n_head, -1)).transpose(1, 2)


class UsualMix(GrassmannMix):
    """The paper's layer as usually written: gathers, a wedge, a projection for each offset."""

    def message(self, z):
        t = torch.arange(z.shape[1], device=z.device)
        i, j = self.pairs
        z_i = z[..., i]
        z_j = z[..., j]
        total = 0
        count = 0
        for delta in self.offsets:
            valid = (t >= delta).to(z.dtype)[:, None]
            v = z[:, (t - delta).clamp(min=0)]
            p = z_i * v[..., j] - z_j * v[..., i]
            p = p / p.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            total = total + valid * (p @ self.W_plu)
            count = count + valid
        return total / count.clamp(min=1) + self.b_plu


class Model(nn.Module):
    """With attention, nanoGPT's model: no biases, exact GELU. Otherwise that of grassmann.py."""

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        d = config.d_model
        gpt = config.mixer == "attention"
        linear = partial(nn.Linear, bias=not gpt)
        norm = partial(nn.LayerNorm, d, bias=not gpt)
        gelu = nn.GELU("none" if gpt else "tanh")
        self.E = nn.Embedding(config.vocab_size, d)
        self.P = nn.Embedding(config.context, d) if config.positions else None
        self.blocks = nn.ModuleList()
        self.ln_f = norm()
        for layer in range(config.n_layer):
            mix = mixer(config, layer)
            ffn = nn.Sequential(linear(d, config.d_ff), gelu, linear(config.d_ff, d))
            block = {"ln1": norm(), "mix": mix, "ln2": norm(), "ffn": ffn}
            self.blocks.append(nn.ModuleDict(block))
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("weight") and p.dim() > 1:
                # as in nanoGPT: smaller if it writes into the residual path
                residual = "mix.out" in name or "ffn.2" in name
                n = 2 * config.n_layer if residual else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(n))

    def forward(self, tokens, past=(), start=0):
        h = self.E(tokens)
        if self.P is not None:
            h = h + self.P.weight[start : start + tokens.shape[1]]
        for layer, block in enumerate(self.blocks):
            of_layer = past[layer : layer + 1]
            h = h + block.mix(block.ln1(h), *of_layer)
            h = h + block.ffn(block.ln2(h))
        return nn.functional.linear(self.ln_f(h), self.E.weight)


def mixer(config, layer):
    if config.mixer == "attention":
        return Attention(config.d_model, config.n_head)
    usual = config.normalize and not config.taps
    kind = UsualMix if usual else GrassmannMix
    offsets = config.offsets[layer]
    return kind(config.d_model, offsets, config.rank, config.taps, config.normalize)


# ---- sizes and work ------------------------------------------------------------------------------


def n_parameters(config):
    """The number of a model's parameters. With attention biases do not count: the GPT has none."""
    total = 0
    for name, shape in param_shapes(config).items():
        bias = name.split(".")[-1].startswith("b")
        if not (bias and config.mixer == "attention"):
            total += math.prod(shape)
    return total


def gpt_of_size(setup, size):
    """The widest GPT of at most `size` parameters. Parameters that are left widen its FFN."""
    best = setup.gpt_config()
    step = best.n_head  # the width is a multiple of the heads
    for d in range(step, size, step):
        wider = setup.gpt_config(d_model=d)
        if n_parameters(wider) > size:
            break
        best = wider
    d = best.d_model
    more = round((size - n_parameters(best)) / (16 * d * best.n_layer))
    return setup.gpt_config(d_model=d, d_ff=4 * d + 8 * more)


def multiply_adds(config, batch_size):
    """Multiply-adds in the matrix products of a training step: three times the forward pass's.

    Attention's scores and weighted sums take L·d each, for every token and layer. The wedge is no
    matrix product.
    """
    per_token = config.d_model * config.vocab_size  # the head
    for name, shape in param_shapes(config).items():
        if ".W_" in name:
            per_token += math.prod(shape)
    if config.mixer == "attention":
        per_token += 2 * config.n_layer * config.context * config.d_model
    return 3 * batch_size * config.context * per_token
