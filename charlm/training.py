"""One step of training, on all cores. `model` is the module that computes, grassmann or gpu."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np

from charlm import processes
from grassmann import Array, Config, Params, require

# About so many tokens a thread computes at once, and at least one row. It limits the memory.
SHARD_TOKENS = 4096
WORKER = "in_threads"  # the first part of a thread's name


@dataclass(frozen=True)
class Training:
    """How a model is trained. The defaults are train_char.py's. Raises UserError."""

    iters: int = 5000
    batch_size: int = 12  # windows of Config.context tokens a step
    lr: float = 3e-3  # learning rate at its peak
    min_lr: float | None = None  # learning rate at the end; None: lr / 10
    warmup_iters: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # largest joint norm of all gradients; 0: no clipping
    seed: int = 0  # decides initial weights, batches and dropout

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 1 if name in ("iters", "batch_size") else 0
            whole = least == 1 or name in ("warmup_iters", "seed")
            number = isinstance(value, (int, np.integer) if whole else (int, float, np.number))
            require(
                (number and least <= value < 1e300) or (name == "min_lr" and value is None),
                f"{name} must be {least} or more and {'whole' if whole else 'finite'}, "
                f"not {value!r}",
            )
        if self.min_lr is not None:
            higher = f"min_lr, {self.min_lr}, is higher than lr, {self.lr}"
            require(self.min_lr <= self.lr, higher)

    def rate(self, step: int) -> float:
        """The learning rate: linear up to lr, then half a cosine down to min_lr."""
        if step < self.warmup_iters:
            return self.lr * (step + 1) / (self.warmup_iters + 1)
        progress = (step - self.warmup_iters) / max(1, self.iters - self.warmup_iters)
        min_lr = self.lr / 10 if self.min_lr is None else self.min_lr
        return min_lr + 0.5 * (self.lr - min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def train_step(
    model: ModuleType,
    params: Params,
    config: Config,
    training: Training,
    optimizer: dict[str, Params],
    step: int,
    tokens: Array | Callable[[int], tuple[Array, Array]],
    threads: int = 1,
) -> tuple[float, float | None]:
    """One step, in place. Returns the loss and the norm of the gradient before clipping.

    (seed, step) draws the batch from `tokens` (T). Instead of tokens there may be a function from
    the step to a batch x, y (B, L). gpu.py records the whole step as one graph, without the norm.
    """
    t = training
    if callable(tokens):
        x, y = tokens(step)
    elif hasattr(model, "train_step"):
        return model.train_step(params, config, t, optimizer, step, tokens), None
    else:
        x, y = model.get_batch(tokens, t.batch_size, config.context, t.seed, step)
    loss, grads = loss_and_grads(model, params, config, x, y, (t.seed, step), threads)
    norm = model.clip_grads(grads, t.grad_clip or math.inf)
    model.adamw_step(params, grads, optimizer, step, t.rate(step), weight_decay=t.weight_decay)
    return loss, norm


def loss_and_grads(
    model: ModuleType,
    params: Params,
    config: Config,
    x: Array,
    y: Array,
    seed: Sequence[int] | None,
    threads: int,
) -> tuple[float, Params]:
    """The model's `loss_and_grads` on several threads.

    With threads=0, for a GPU, it takes all rows at once. The rows are split into shards, and the
    shards' gradients are added in a fixed order. So with the same number of threads a run repeats
    bit for bit. Under mpiexec each process takes its part of the rows (processes.py).
    """
    require(
        threads >= 0, f"threads must be 1 or more, or 0 for the batch as a whole, not {threads}"
    )
    mine = processes.rows(len(x))
    tokens = len(mine) * x.shape[1]
    n_shards = threads * math.ceil(tokens / (threads * SHARD_TOKENS)) if threads else 1
    masks = None if seed is None else (*seed, 1)  # with the 1, other numbers than for the batch

    def shard(rows: Array) -> tuple[float, Params]:
        own = slice(rows[0], rows[-1] + 1)
        return model.loss_and_grads(params, config, x[own], y[own], masks, (int(rows[0]), len(x)))

    results = in_threads(shard, np.array_split(mine, min(n_shards, len(mine))), threads)
    loss, grads = next(results)
    for shard_loss, shard_grads in results:
        loss += shard_loss
        for name, g in shard_grads.items():
            grads[name] += g
    return processes.add_up(loss, grads)


@lru_cache
def pool(threads: int) -> ThreadPoolExecutor:
    """A pool of threads, made once.

    A thread waits 0.1 ms for the interpreter lock, not 5 ms, which is a dozen array operations.
    """
    sys.setswitchinterval(1e-4)
    if hasattr(os, "register_at_fork"):  # a forked process has the pool, but none of its threads
        os.register_at_fork(after_in_child=pool.cache_clear)
    return ThreadPoolExecutor(threads, WORKER)


def in_threads(function: Callable, items: Iterable, threads: int) -> Iterator:
    """map(function, items) on several threads.

    They run in parallel, since NumPy releases the interpreter lock. Within such a thread it is a
    plain map, because the pool may have no thread left.
    """
    inside = threading.current_thread().name.startswith(WORKER)
    if threads <= 1 or inside:
        return map(function, items)
    return pool(threads).map(function, items)
