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
    """nanoGPT's model, with its seeds: no biases, GELU in its exact form."""
    torch.manual_seed(1337)
    return Model(config, [Attention(config.d_model, config.n_head) for _ in range(config.n_layer)], bias=False)
