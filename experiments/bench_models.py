"""What the benchmark measures: models of grassmann.py, gpu.py and PyTorch in training, and how much work a step is."""

import math
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np

import grassmann
from charlm.text import Corpus
from charlm.training import Training
from experiments.common import Learner
from grassmann import Array, Config, param_shapes

try:
    import torch
    from torch import Tensor, nn

    from experiments.torch_layer import GrassmannMix
except (ImportError, OSError):  # (OSError: installed, but one of its libraries doesn't load)
    torch, Tensor, nn, GrassmannMix = None, object, SimpleNamespace(Module=object), object


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
        text, threads = (
            model.np.asarray(setup.corpus.train),
            setup.threads if model is grassmann else 0,
        )
        super().__init__(config, setup.training, text, threads, model)
        self.setup = setup

    def validate(self) -> float:
        return grassmann.validation_loss(self.params, self.config, self.setup.corpus.val)


class Theirs:
    """A PyTorch `Model` in training: the same batches, rates, clipping, optimiser, validation."""

    def __init__(self, setup: Setup, config: Config, device: str = "cpu"):
        torch.set_num_threads(setup.threads)
        self.setup, self.config, self.device, self.k = setup, config, device, 0
        self.model = Model(config).to(device)
        groups = [
            {
                "params": [p for p in self.model.parameters() if (p.dim() > 1) == is_matrix],
                "weight_decay": setup.training.weight_decay * is_matrix,
            }
            for is_matrix in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.setup.training.rate(self.k)
        self.optimizer.zero_grad()
        self.loss(*self.batch()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.setup.training.grad_clip)
        self.optimizer.step()
        self.k += 1

    def batch(self) -> list[Tensor]:
        t, tokens = self.setup.training, self.setup.corpus.train
        return [
            *map(
                self.tensor,
                grassmann.get_batch(tokens, t.batch_size, self.config.context, t.seed, self.k),
            )
        ]

    def tensor(self, tokens: Array) -> Tensor:
        return torch.from_numpy(tokens.astype(np.int64)).to(self.device)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(x).flatten(0, 1), y.flatten())

    def validate(self) -> float:
        with torch.inference_mode():  # the windows of grassmann.py, but this model
            return grassmann.validation_loss(
                {},
                self.config,
                self.setup.corpus.val,
                lambda _, chunks: (
                    self.loss(*map(self.tensor, (x, y))).item() * y.size for x, y in chunks
                ),
            )


# ---- the models in PyTorch -----------------------------------------------------------------------


class Attention(nn.Module):
    """Causal multi-head attention, as in nanoGPT. `past` is a cache of earlier keys and values."""

    def __init__(self, d: int, n_head: int):
        super().__init__()
        self.n_head, self.qkv, self.out = (
            n_head,
            nn.Linear(d, 3 * d, bias=False),
            nn.Linear(d, d, bias=False),
        )

    def forward(self, h: Tensor, past: dict | None = None) -> Tensor:
        q, k, v = (
            a.unflatten(2, (self.n_head, -1)).transpose(1, 2) for a in self.qkv(h).chunk(3, 2)
        )
        if past:
            k, v = torch.cat([past["k"], k], 2), torch.cat([past["v"], v], 2)
        if past is not None:
            past["k"], past["v"] = k, v
        heads = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=h.shape[1] > 1
        )  # (B, n_head, L, d_k)
        return self.out(heads.transpose(1, 2).flatten(2))


class UsualMix(GrassmannMix):
    """The paper's layer as it is usually written: gathers, a wedge and a projection for each offset."""

    def message(self, z: Tensor) -> Tensor:
        t, (i, j), total, count = torch.arange(z.shape[1], device=z.device), self.pairs, 0, 0
        for delta in self.offsets:
            valid, v = (t >= delta).to(z.dtype)[:, None], z[:, (t - delta).clamp(min=0)]
            p = z[..., i] * v[..., j] - z[..., j] * v[..., i]
            p = p / p.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            total, count = total + valid * (p @ self.W_plu), count + valid
        return total / count.clamp(min=1) + self.b_plu


class Model(nn.Module):
    """With attention, nanoGPT's model: no biases, exact GELU. Otherwise the model of grassmann.py."""

    def __init__(self, config: Config):
        super().__init__()
        torch.manual_seed(0)
        d, gpt, options = (
            config.d_model,
            config.mixer == "attention",
            (config.rank, config.taps, config.normalize),
        )
        grassmann_mix = UsualMix if config.normalize and not config.taps else GrassmannMix
        linear, norm = partial(nn.Linear, bias=not gpt), partial(nn.LayerNorm, d, bias=not gpt)
        self.E = nn.Embedding(config.vocab_size, d)
        self.P = nn.Embedding(config.context, d) if config.positions else None
        self.blocks, self.ln_f = nn.ModuleList(), norm()
        for i in range(config.n_layer):
            mix = (
                Attention(d, config.n_head)
                if gpt
                else grassmann_mix(d, config.offsets[i], *options)
            )
            ffn = nn.Sequential(
                linear(d, config.d_ff), nn.GELU("none" if gpt else "tanh"), linear(config.d_ff, d)
            )
            self.blocks.append(
                nn.ModuleDict({"ln1": norm(), "mix": mix, "ln2": norm(), "ffn": ffn})
            )
        for (
            name,
            p,
        ) in self.named_parameters():  # as in nanoGPT: smaller if it writes into the residual path
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("weight") and p.dim() > 1:
                residual = "mix.out" in name or "ffn.2" in name
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer if residual else 1))

    def forward(self, tokens: Tensor, past: list | tuple = (), start: int = 0) -> Tensor:
        h = self.E(tokens)
        if self.P is not None:
            h = h + self.P.weight[start : start + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            h = h + block.mix(block.ln1(h), *past[i : i + 1])
            h = h + block.ffn(block.ln2(h))
        return nn.functional.linear(self.ln_f(h), self.E.weight)


# ---- sizes and work ------------------------------------------------------------------------------


def n_parameters(config: Config) -> int:
    """The number of a model's parameters. With attention, biases do not count, since the GPT has none."""
    return sum(
        math.prod(shape)
        for name, shape in param_shapes(config).items()
        if config.mixer != "attention" or not name.split(".")[-1].startswith("b")
    )


def gpt_of_size(setup: Setup, size: int) -> Config:
    """The widest GPT of at most `size` parameters. Parameters that are left widen its FFN."""
    gpt, size_of = setup.gpt_config(), lambda d: n_parameters(setup.gpt_config(d_model=d))
    d = gpt.n_head  # a multiple of the heads
    while size_of(d + gpt.n_head) <= size:
        d += gpt.n_head
    return setup.gpt_config(
        d_model=d, d_ff=4 * d + 8 * round((size - size_of(d)) / (16 * d * gpt.n_layer))
    )


def multiply_adds(config: Config, batch_size: int) -> int:
    """Multiply-adds in the matrix products of a training step: three times those of the forward pass. Attention's
    scores and weighted sums take L·d each, for every token and layer. The wedge is no matrix product."""
    attention = 2 * config.n_layer * config.context * config.d_model * (config.mixer == "attention")
    weights = sum(math.prod(shape) for name, shape in param_shapes(config).items() if ".W_" in name)
    return (
        3 * batch_size * config.context * (weights + config.d_model * config.vocab_size + attention)
    )
