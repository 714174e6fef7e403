"""One step of training, on all cores: what train_char.py, the comparison and the benchmark repeat.

`model` is the module that computes, grassmann or gpu.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np

import parallel
from grassmann import Array, Config, Params, check

SHARD_TOKENS = 4096  # at most so many at a time in a thread: bounds the memory for activations

@dataclass(frozen=True)
class Training:
    """How a model is trained; the defaults are those of train_char.py."""

    iters: int = 5000
    batch_size: int = 12  # windows of Config.context tokens a step
    lr: float = 3e-3  # at its peak
    min_lr: float | None = None  # at the end; unless given lr / 10
    warmup_iters: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # largest norm of all gradients together; 0: any
    seed: int = 0  # drives initial weights, batches and dropout

    def __post_init__(self) -> None:
        whole = self.iters, self.batch_size, self.warmup_iters, self.seed
        real = self.lr, self.min_lr or 0.0, self.weight_decay, self.grad_clip
        check(all(isinstance(n, (int, np.integer)) and n >= 0 for n in whole)
              and all(isinstance(n, (int, float, np.floating)) and 0 <= n < math.inf for n in real),
              "numbers of training are 0 or more, and whole where they count", self)

    def rate(self, step: int) -> float:
        """The learning rate: linear up to lr, from its (warmup_iters + 1)-th part, then half a cosine
        down to min_lr."""
        if step < self.warmup_iters:
            return self.lr * (step + 1) / (self.warmup_iters + 1)
        progress = (step - self.warmup_iters) / max(1, self.iters - self.warmup_iters)
        min_lr = self.lr / 10 if self.min_lr is None else self.min_lr
        return min_lr + 0.5 * (self.lr - min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))

def train_step(
    model: ModuleType, params: Params, config: Config, training: Training, optimizer: dict[str, Params],
    step: int, x: Array, y: Array, threads: int = 1,
) -> float:
    """One step on the batch x, y (B, L), in place: rate, gradients, clipping, AdamW. The loss."""
    t = training
    loss, grads = loss_and_grads(model, params, config, x, y, (t.seed, step), threads)
    if t.grad_clip:
        model.clip_grads(grads, t.grad_clip)
    model.adamw_step(params, grads, optimizer, step, t.rate(step), weight_decay=t.weight_decay)
    return loss

@lru_cache
def pool(threads: int) -> ThreadPoolExecutor:
    """So many threads, kept: new ones for every step would each take memory of their own anew.

    They hand the interpreter lock over at every array operation. By default one that waits for it may
    miss its turn for 5 ms, as long as a dozen of those; so ask for it more often.
    """
    sys.setswitchinterval(1e-4)
    return ThreadPoolExecutor(threads)

def in_threads(function: Callable, items: Iterable, threads: int) -> Iterator:
    """map(function, items), on so many threads (NumPy releases the interpreter lock)."""
    return pool(threads).map(function, items) if threads > 1 else map(function, items)

class RowsOfBatch(np.random.Generator):
    """Draws for rows `first`, first + 1, … of a batch of `n` what one generator would for all of it.

    So dropout's masks are a function of seed, step and row, whoever computes which rows.
    """

    def __init__(self, seed: list[int], first: int, n: int):
        super().__init__(np.random.PCG64(seed))
        self.first, self.n, self.begin, self.drawn = first, n, 0, 0

    def random(self, shape: tuple[int, ...], dtype: type) -> Array:
        """Of an array (n, …) of float32 the part `shape`; arrays follow each other as in a stream.

        A draw of 64 bits makes two of them, so an odd place is the second of its draw.
        """
        row, size = math.prod(shape[1:]), math.prod(shape)
        start, odd = divmod(self.begin + self.first * row, 2)  # in draws
        self.begin += self.n * row
        self.bit_generator.advance(start - self.drawn)
        self.drawn = start + (odd + size + 1) // 2
        return super().random(odd + size, dtype)[odd:].reshape(shape)

def loss_and_grads(
    model: ModuleType, params: Params, config: Config, x: Array, y: Array, seed: tuple | None, threads: int
) -> tuple[float, Params]:
    """The model's `loss_and_grads` on so many threads: rows are dealt out in shards of bounded size.

    Their gradients are added in a fixed order: a run repeats bit for bit with as many threads, and
    with others up to rounding. (A card, which has no `threads`, takes its rows whole.) Under mpiexec
    each process has its part of the rows, and gets the sums over all of them (parallel.py).
    """
    check(threads >= 0, "threads must be 1 or more, or 0 for the batch as a whole", threads)
    check(x.shape == y.shape, "x and y must have one shape", f"{x.shape} and {y.shape}")
    mine = parallel.rows(len(x))
    tokens = len(mine) * x.shape[1]
    n_shards = threads * math.ceil(tokens / (threads * SHARD_TOKENS)) if threads else 1

    def shard(rows: Array) -> tuple[float, Params]:
        own, part = slice(rows[0], rows[-1] + 1), len(rows) / len(x)
        rng = None if seed is None else RowsOfBatch([*seed, 1], int(rows[0]), len(x))  # 1: not get_batch's
        return model.loss_and_grads(params, config, x[own], y[own], rng, part)

    results = in_threads(shard, np.array_split(mine, min(n_shards, len(mine))), threads)
    loss, grads = next(results)
    for shard_loss, shard_grads in results:
        loss += shard_loss
        for name, g in shard_grads.items():
            grads[name] += g
    return parallel.add_up(loss, grads)
