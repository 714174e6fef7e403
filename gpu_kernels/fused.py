"""The second rung: functions that replace those of gpu.py with the same name.

Array code starts one kernel for each operation, and each reads its arguments from memory and writes
its result back. Here several operations are one kernel of kernels.cu, and products are cuBLAS's,
called in a way that can be recorded (device.py). `REPLACED` at the end says what replaces what.
Two things are fused into later kernels. The next LayerNorm computes the gate and adds up what joins
the residual path (`_Sum`). A gradient that is a sum over tokens may come in parts, one for each
block of threads (`Parts`).

`train_step` is recorded as a CUDA graph, because the host takes longer to start a small kernel than
the GPU to run it. Everything else starts kernel by kernel. Dropout masks differ from the first
rung's, because kernels draw them. Losses stay on the GPU until they are read. Use one thread only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed

import cupy as cp
import numpy

import gpu
import grassmann
from charlm import processes
from gpu_kernels import device
from gpu_kernels.device import (
    Array,
    Flat,
    Gradients,
    Parts,
    Step,
    over_tokens,
    parts_of,
    per_element,
    per_token,
    product,
    row_stride,
)
from grassmann import Config, Scope, check_model, prefixed, require

Params = dict[str, Array]
ON_HOST = 5_000_000  # parameters; with fewer, NumPy writes text faster than kernels start
generate_on_gpu = gpu.generate  # the first rung's


class _Weights(dict):
    """Parameters. Their attribute `gradients` is the `Gradients` that the backward writes into."""


def _place(w: Scope, name: str) -> Array | None:
    """Where the gradient of w[name] belongs; None: anywhere."""
    return w.params.gradients[w.prefix + name] if isinstance(w.params, _Weights) else None


# ---- small ops -----------------------------------------------------------------------------------


@dataclass
class _Sum:
    """h + D(x + b), D dropout. The next LayerNorm computes this `total`. x (..., d) is a product
    without its bias b. With `hg` = [h' | g] (..., 2d) it is h + D(gate), where x + b are the logits
    of a gate between h' and g."""

    x: Array
    b: Array | None = None
    hg: Array | None = None
    h: Array | None = None
    mask: tuple = (None, numpy.int64(0), 0.0)  # no dropout; else as in `dropout_forward`
    total: Array | None = None
    __array_ufunc__ = None  # so that array + this comes here

    def __radd__(self, h: Array) -> _Sum:
        return changed(self, h=h)

    def __add__(self, other: Array | _Sum) -> Array | _Sum:
        return self.total + other


@dataclass
class _SumGrad:
    """The gradients of a `_Sum`: of h, of x, of b, and directly of hg."""

    h: Array
    x: Array
    b: Parts
    hg: Array | None

    def __add__(self, dh: Array) -> Array:
        return self.h + dh


def layernorm_forward(
    x: Array | _Sum, w: Array, b: Array, eps: float = 1e-5, room: bool = False
) -> tuple:
    """x̂ = (x - mean) / sqrt(var + eps) over the last axis, y = w ⊙ x̂ + b; x (..., d), w b (d).
    With `room` the result is [h | g] (..., 2d): h is y, and beside it is room for the g of the
    mixing layer."""
    s = x if isinstance(x, _Sum) else _Sum(cp.ascontiguousarray(x))
    d, T = len(w), s.x.size // len(w)
    s.total = cp.empty(s.x.shape, w.dtype) if s is x else s.x
    y = cp.empty((*s.x.shape[:-1], 2 * d if room else d), w.dtype)
    mean, inv_std = cp.empty(T, w.dtype), cp.empty(T, w.dtype)
    per_token(
        "layernorm_forward",
        T,
        d,
        y.shape[-1],
        eps,
        *s.mask,
        s.b,
        s.hg,
        s.h,
        w,
        b,
        s.x,
        s.total if s is x else None,
        [y[..., :d]],
        mean,
        inv_std,
    )
    return y, (s, w, mean, inv_std)


def layernorm_backward(dy: Array, cache: tuple, dmore: Array | _SumGrad | None = None) -> tuple:
    """dx (for a `_Sum`, the gradients of its terms), dw, db. `dmore`, from another use of x, is
    added to dx."""
    s, w, mean, inv_std = cache
    x, d, T, dy = s.total, len(w), len(mean), dy.reshape(-1, len(w))
    row = row_stride(dy)  # so that one half of [dh | dg] is not copied
    parts, dsum = parts_of(T, 3, d, dtype=x.dtype), cp.empty(x.shape, x.dtype)
    dhg = None if s.hg is None else cp.empty(s.hg.shape, x.dtype)
    dx = None if s.mask[0] is None and dhg is None else cp.empty(x.shape, x.dtype)
    dmore = dmore.h if isinstance(dmore, _SumGrad) else dmore
    per_token(
        "layernorm_backward",
        T,
        d,
        row or d,
        *s.mask,
        [dy] if row else dy,
        dmore,
        x,
        w,
        mean,
        inv_std,
        s.x,
        s.b,
        s.hg,
        dsum,
        dx,
        dhg,
        parts,
    )
    of_terms = _SumGrad(dsum, dsum if dx is None else dx, Parts(parts[:, 2]), dhg)
    return dsum if s.total is s.x else of_terms, Parts(parts[:, 0]), Parts(parts[:, 1])


def gelu_forward(x: Array, b: Array | None = None) -> tuple[Array, tuple]:
    """GELU(x + b) for x (..., d), b (d); GELU(x) = x/2 (1 + tanh q(x)), q as in grassmann.py."""
    y, d = cp.empty(x.shape, x.dtype), x.shape[-1]
    per_token("gelu_forward", x.size // d, d, x, b, y)
    return y, (x, b)


def gelu_backward(dy: Array, cache: tuple) -> Array | tuple[Array, Parts]:
    """GELU' = (1 + tanh q)/2 + x/2 (1 - tanh² q) q'(x),  q'(x) = c (1 + 3 a x²). With b: dx, db."""
    x, b = cache
    d, T = x.shape[-1], x.size // x.shape[-1]
    dx, db = cp.empty(x.shape, x.dtype), parts_of(T, d, dtype=x.dtype)
    per_token("gelu_backward", T, d, dy, x, b, dx, db)
    return dx if b is None else (dx, Parts(db))


def draw_rows(seed: int | Sequence[int] | Array, first: int = 0, n: int | None = None) -> Callable:
    """Returns draw(shape): a key and a first place, for rows `first`, first + 1, … of a batch of n.
    Kernels draw each random number as a hash of the key and its place. The key comes from the seed,
    or is given as an array."""
    begin, key = 0, seed if isinstance(seed, Array) else cp.asarray(_key(seed))

    def draw(shape: tuple[int, ...]) -> tuple[Array, numpy.int64]:
        nonlocal begin
        place, row = begin, math.prod(shape[1:])
        begin += (shape[0] if n is None else n) * row
        return key, numpy.int64(place + first * row)

    return draw


def _key(seed: int | Sequence[int]) -> numpy.ndarray:
    return numpy.random.SeedSequence(seed).generate_state(1, numpy.uint64).view(numpy.int64)


def dropout_forward(x: Array | _Sum, rate: float, draw: Callable | None) -> tuple:
    """Set a fraction `rate` of x to 0 and divide the rest by 1 - rate: the mean stays. draw=None:
    no dropout."""
    if draw is None or rate == 0:
        return x, None
    mask = *draw(x.x.shape if isinstance(x, _Sum) else x.shape), float(rate)
    return changed(x, mask=mask) if isinstance(x, _Sum) else dropout_backward(x, mask), mask


def dropout_backward(dy: Array | _SumGrad, mask: tuple | None) -> Array | _SumGrad:
    """y = mask ⊙ x, so dx = mask ⊙ dy. (The gradients of a `_Sum` have the mask already.)"""
    if mask is None or isinstance(dy, _SumGrad):
        return dy
    dx = cp.empty(dy.shape, dy.dtype)
    per_element("dropout", dy.size, *mask, dy, dx)
    return dx


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, tuple]:
    """Mean over tokens of -log softmax(logits)[target] in nats; logits (..., V), targets (...).
    Caches the gradient."""
    V, targets = logits.shape[-1], targets.astype(numpy.int32, copy=False)
    losses, dlogits = (cp.empty(shape, logits.dtype) for shape in (targets.size, (targets.size, V)))
    per_token("cross_entropy", targets.size, V, logits, targets, losses, dlogits)
    return losses.mean(), (dlogits,)


def cross_entropy_backward(dloss: float, cache: tuple) -> Array:
    """∂(log Σ exp(x) - x_target)/∂x = softmax(x) - onehot(target); the mean divides it by T; (T,
    V)."""
    return cache[0] if dloss == 1 else dloss * cache[0]


# ---- the mixing layer --------------------------------------------------------------------------


@functools.cache
def _indices(offsets: tuple[int, ...], r: int) -> tuple[Array, Array, Array]:
    """The offsets (m) and the index pairs i < j below r (n), (n), on the GPU."""
    return tuple(cp.asarray(a, numpy.int32) for a in (offsets, *grassmann.pairs(r)))


def mix_forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[_Sum, dict]:
    """The Grassmann mixing layer (paper, section 3): h (B, L, d), or [h | g] with room for g, ->
    mix (B, L, d).

        z = h W_red + b_red        reduce                       (B, L, r)
        s = partner(z)             look back                    (B, L, r)
        p = z ∧ s                  span a plane                 (B, L, n)
        g = p W_plu + b_plu        project back                 (B, L, d), + memory, if any
        mix = gate(h, g)           blend, in the next LayerNorm (B, L, d)

    One kernel computes the biases, p and, with taps, s. `past` and the cache are as in
    grassmann.py, except that the cache has `logits` instead of alpha: the gate is sigmoid(logits +
    b_gate).
    """
    offsets, b_red, r, d = config.offsets[layer], w["b_red"], config.rank, len(w["b_plu"])
    hg = cp.concatenate([h, h], -1) if h.shape[-1] == d else h
    (B, L, _), h, g = h.shape, hg[..., :d], hg[..., d:]
    x, taps = product(h, w["W_red"]), w["taps"] if config.taps and not config.normalize else None
    if past is not None or taps is None:
        x, b_red = x + b_red, None
    if past is not None:
        x = cp.concatenate([past["z"], x], 1) if past else x  # (B, max Δ + L, r)
        past["z"] = x[:, -max(offsets) :]
    z, s = cp.empty((B, L, r), h.dtype), cp.empty((B, L, r), h.dtype)
    cache, before = {"w": w, "offsets": offsets, "taps": taps}, x.shape[1] - L
    if taps is None:
        every_s, cache["partner"] = gpu.partner_forward(
            x, w["taps"] if config.taps else None, offsets, config.normalize
        )
        s = cp.ascontiguousarray(every_s[:, before:])
    deltas, i, j = _indices(offsets, r)
    p = cp.empty((B, L, len(i)), h.dtype)
    per_token(
        "wedge_forward",
        B * L,
        L + before,
        before,
        r,
        len(offsets),
        len(i),
        d,
        deltas,
        i,
        j,
        x,
        b_red,
        taps,
        w["b_plu"],
        z,
        s,
        p,
        [g],
    )
    product(p, w["W_plu"], out=g, add=True)
    if config.memory:
        m, cache["memory"] = gpu.memory_forward(h, z, s, w, past)
        g += m
    logits = product(hg, w["W_gate"])
    return _Sum(logits, w["b_gate"], hg), cache | {
        "hg": hg,
        "z": z,
        "s": s,
        "p": p,
        "logits": logits,
    }


def mix_backward(dmix: _SumGrad, cache: dict) -> tuple[Array, Params]:
    """The steps of `mix_forward` in reverse. h is used three times, so three gradients add up.

    dmix.hg = [dh | dg] already has the direct gradients. All other gradients are added to it.
    """
    hg, w, offsets, z, p = (cache[name] for name in ("hg", "w", "offsets", "z", "p"))
    (B, L, r), n, d, dhg = z.shape, p.shape[-1], hg.shape[-1] // 2, dmix.hg
    grads = {"W_gate": over_tokens(hg, dmix.x, _place(w, "W_gate")), "b_gate": dmix.b}
    product(dmix.x, w["W_gate"].T, out=dhg, add=True)
    dh, dg = dhg[..., :d], dhg[..., d:]
    grads["W_plu"], dp = over_tokens(p, dg, _place(w, "W_plu")), product(dg, w["W_plu"].T)
    dz, ds = cp.empty(z.shape, z.dtype), cp.empty(z.shape, z.dtype)
    per_token("wedge_backward", B * L, r, n, dp, z, cache["s"], dz, ds)
    if "memory" in cache:
        dh_memory, dz_memory, ds_memory, memory = gpu.memory_backward(dg, cache["memory"])
        for sum_, part in ((dh, dh_memory), (dz, dz_memory), (ds, ds_memory)):
            sum_ += part
        grads |= memory
    m = 0 if cache["taps"] is None else len(offsets)
    if m == 0:
        dz_partner, dtaps = gpu.partner_backward(ds, cache["partner"])
        dz += dz_partner
        grads |= {} if dtaps is None else {"taps": dtaps}
    parts, (deltas, *_) = parts_of(B * L, r + m * r + d, dtype=z.dtype), _indices(offsets, r)
    per_token("partner_backward", B * L, L, r, m, d, deltas, z, cache["taps"], ds, [dg], dz, parts)
    grads |= {"b_red": Parts(parts[:, :r]), "b_plu": Parts(parts[:, r + m * r :])}
    if m > 0:
        grads["taps"] = Parts(parts[:, r : r + m * r].reshape(-1, m, r))
    grads["W_red"] = over_tokens(hg[..., :d], dz, _place(w, "W_red"))
    return product(dz, w["W_red"].T, out=dh, add=True), grads


# ---- the block -----------------------------------------------------------------------------------


def ffn_forward(x: Array, w: Scope) -> tuple[_Sum, tuple]:
    """GELU(x W_1 + b_1) W_2 + b_2, each token by itself; x (..., d)."""
    active, c_gelu = gelu_forward(product(x, w["W_1"]), w["b_1"])
    return _Sum(product(active, w["W_2"]), w["b_2"]), (x, w, active, c_gelu)


def ffn_backward(dout: _SumGrad, cache: tuple) -> tuple[Array, Params]:
    """The steps of `ffn_forward` in reverse."""
    x, w, active, c_gelu = cache
    grads = {"W_2": over_tokens(active, dout.x, _place(w, "W_2")), "b_2": dout.b}
    dinner, grads["b_1"] = gelu_backward(product(dout.x, w["W_2"].T), c_gelu)
    grads["W_1"] = over_tokens(x, dinner, _place(w, "W_1"))
    return product(dinner, w["W_1"].T), grads


def prenorm_block_forward(
    h: Array, w: Scope, config: Config, layer: int, past=None, draw=None
) -> tuple[_Sum, dict]:
    """h ← h + D(mix(LN1(h))), h ← h + D(FFN(LN2(h))). LN1 writes into the array that the mixing
    layer reads."""
    mixer_forward, *_ = gpu.MIXERS[config.mixer]
    normed, c_ln1 = layernorm_forward(h, w["ln1.w"], w["ln1.b"], room=mixer_forward is mix_forward)
    mix, c_mix = mixer_forward(normed, w.scope("mix."), config, layer, past)
    mix, mask_mix = dropout_forward(mix, config.dropout, draw)
    h = h + mix
    normed, c_ln2 = layernorm_forward(h, w["ln2.w"], w["ln2.b"])
    ffn, c_ffn = ffn_forward(normed, w.scope("ffn."))
    ffn, _ = dropout_forward(ffn, config.dropout, draw)
    return h + ffn, {"ln1": c_ln1, "mix": c_mix, "mask_mix": mask_mix, "ln2": c_ln2, "ffn": c_ffn}


def prenorm_block_backward(dout: _SumGrad, cache: dict, config: Config) -> tuple:
    """h + f(h) passes its gradient to h twice: unchanged, and through f."""
    _, mixer_backward, _ = gpu.MIXERS[config.mixer]
    grads = {}
    dnormed, ffn = ffn_backward(dout, cache["ffn"])
    dh, grads["ln2.w"], grads["ln2.b"] = layernorm_backward(dnormed, cache["ln2"], dout)
    dnormed, mix = mixer_backward(dropout_backward(dh, cache["mask_mix"]), cache["mix"])
    dh, grads["ln1.w"], grads["ln1.b"] = layernorm_backward(dnormed, cache["ln1"], dh)
    return dh, grads | prefixed("mix.", mix) | prefixed("ffn.", ffn)


def init_params(config: Config, seed: int = 0, dtype: type = numpy.float32) -> Params:
    """The same numbers as in grassmann.py, in one buffer."""
    gpu.start()
    return Flat(grassmann.init_params(config, seed, dtype))


# ---- the loss and its gradients ------------------------------------------------------------------


@device.recordable_products()
def _differentiate(
    params: Params, gradients: Gradients, config: Config, x: Array, y: Array, draw, share
) -> Array:
    """Returns share times the loss, and writes its gradients into `gradients`."""
    weights = _Weights(params)
    weights.gradients = gradients
    logits, cache = gpu.model_forward(weights, config, x, draw=draw)
    loss, c_loss = gpu.cross_entropy_forward(logits, y)
    gradients.gather(gpu.model_backward(gpu.cross_entropy_backward(share, c_loss), cache))
    return loss if share == 1 else share * loss


def loss_and_grads(
    params: Params, config: Config, x: Array, y: Array, seed=None, rows=None
) -> tuple[Array, Params]:
    """As in grassmann.py, kernel by kernel. The gradients are new arrays. float(loss) waits for the
    GPU."""
    require(x.shape == y.shape, f"x and y must have the same shape, not {x.shape} and {y.shape}")
    check_model(params, config)
    x, y = (cp.asarray(a).astype(numpy.int32, copy=False) for a in (x, y))
    (first, n), gradients = rows or (0, len(x)), Gradients(params)
    draw = None if seed is None else draw_rows(seed, first, n)
    return _differentiate(params, gradients, config, x, y, draw, len(x) / n), gradients


# ---- optimiser -----------------------------------------------------------------------------------


def adamw_init(params: Params) -> dict[str, Params]:
    """The optimiser's state: running means of the gradient and of its square, zero at first."""
    return {mean: Flat(params, copy=False) for mean in ("adam_m", "adam_v")}


def adamw_step(
    params, grads, state: dict, step: int, lr: float, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8
) -> None:
    """One step of AdamW, as in grassmann.py, in place. `step` counts from 0; dicts are `Flat`."""
    _adamw(params, grads, state, cp.asarray(_rates(step, lr, betas, weight_decay, eps)))


def _rates(
    step: int, lr: float, betas=(0.9, 0.99), weight_decay: float = 0.1, eps: float = 1e-8
) -> numpy.ndarray:
    """The numbers of an AdamW step: lr / (1 - β₁^(step+1)), 1 / (1 - β₂^(step+1)), lr λ, 1 - β₁, 1
    - β₂, eps."""
    (beta_1, beta_2), t = betas, step + 1
    return numpy.array(
        [lr / (1 - beta_1**t), 1 / (1 - beta_2**t), lr * weight_decay, 1 - beta_1, 1 - beta_2, eps]
    )


def _adamw(params: Params, grads: Params, state: dict[str, Params], rates: Array) -> None:
    buffers = [flat.buffer for flat in (grads, params, state["adam_m"], state["adam_v"])]
    per_element("adamw", params.buffer.size, numpy.int64(params.matrices), *buffers, rates)


def clip_grads(grads: Params, max_norm: float) -> Array:
    """Scale all gradients by one factor, in place, to a joint norm of at most max_norm. Returns the
    norm before."""
    g, parts, norm = grads.buffer, cp.empty(256, numpy.float64), cp.empty((), numpy.float64)
    device.launch("sum_of_squares", 256, numpy.int64(g.size), g, parts)
    device.launch("clip", 256, numpy.int64(g.size), float(max_norm), g, parts, norm)
    return norm


# ---- a training step -----------------------------------------------------------------------------


def train_step(
    params: Flat, config: Config, training, optimizer: dict, step: int, tokens: Array
) -> Array:
    """One step, in place, on the batch that (training.seed, step) draws from tokens on the GPU.
    Returns the loss.

    The first call starts kernel by kernel, the second records a CUDA graph. From then on the host
    only sends what changes: where the windows start, dropout's key, AdamW's rates. Several
    processes have two graphs each, and NCCL adds up the gradients between them.
    """
    B, L, mine = training.batch_size, config.context, processes.rows(training.batch_size)
    require(len(tokens) > L, f"{len(tokens)} tokens are too few: a context of {L} needs {L + 1}")
    places = [
        a.data.ptr for a in (tokens, *(flat.buffer for flat in (params, *optimizer.values())))
    ]
    key = (
        config,
        training,
        gpu.MIXERS[config.mixer],
        gpu.BLOCKS[config.block],
        device.tf32,
        places,
        len(tokens),
        tokens.dtype,
    )
    if params.step is None or params.step.key != key:
        params.step = None  # first free the old memory
        params.step = Step(key, params, len(mine) + 7)
    owner = params.step  # of the graphs, the inputs, the gradients
    dropout_key = _key((training.seed, step, 1)) if config.dropout else numpy.zeros(1, numpy.int64)
    rates = _rates(step, training.rate(step), weight_decay=training.weight_decay)
    starts = numpy.random.default_rng((training.seed, step)).integers(
        0, len(tokens) - L, B
    )  # as in `get_batch`
    owner.send(starts[mine], dropout_key, rates)  # from here on, these names are arrays on the GPU
    starts, dropout_key, rates = (
        owner.inputs[:-7],
        owner.inputs[-7:-6],
        owner.inputs[-6:].view(numpy.float64),
    )

    def differentiate() -> Array:
        x, y = (cp.empty((len(mine), L), numpy.int32) for _ in "xy")
        per_element("windows", x.size, L, tokens.itemsize, starts, tokens.view(numpy.uint8), x, y)
        draw = draw_rows(dropout_key, int(mine[0]), B)
        return _differentiate(params, owner.gradients, config, x, y, draw, len(mine) / B)

    def update() -> None:
        if training.grad_clip:
            clip_grads(owner.gradients, training.grad_clip)
        _adamw(params, owner.gradients, optimizer, rates)

    here = processes.world()
    if here.size == 1:
        return owner.run("step", lambda: (differentiate(), update())[0]).copy()
    loss = owner.run("gradients", differentiate)
    for array in (loss, owner.gradients.buffer):
        _nccl().all_reduce(array, array)
    processes.stop_if(here.comm.allreduce(len(processes.caught)))
    owner.run("update", update)
    return loss.copy()


@functools.cache
def _nccl() -> object:
    """A `cupyx.distributed.NCCLBackend` of all processes."""
    from cupyx.distributed import init_process_group

    here = processes.world()
    return init_process_group(here.size, here.rank, use_mpi=True)


# ---- sampling, and the precision of products -----------------------------------------------------


@functools.wraps(grassmann.generate)
def generate(params: Params, *how, **more) -> Iterator[int]:
    """NumPy computes it unless the model is large: starting dozens of kernels takes longer."""
    if params.buffer.size > ON_HOST:
        return generate_on_gpu(params, *how, **more)
    return grassmann.generate({name: a.get() for name, a in params.items()}, *how, **more)


def set_precision(precision: str) -> None:
    """As device.py's, once the GPU works."""
    gpu.start()
    device.set_precision(precision)


# ---- what replaces what --------------------------------------------------------------------------

# A group, the groups that it needs, and its functions. Each replaces the function of gpu.py that
# has its name. A group is left out if what it needs is left out.
REPLACED = (
    ("buffer", "", (Flat, init_params, adamw_init, adamw_step, clip_grads, loss_and_grads)),
    ("host", "buffer", (generate,)),
    ("dropout", "", (draw_rows, dropout_forward, dropout_backward)),
    ("cross_entropy", "", (cross_entropy_forward, cross_entropy_backward)),
    ("gelu", "buffer", (gelu_forward, gelu_backward)),
    ("layernorm", "buffer", (layernorm_forward, layernorm_backward)),
    ("block", "dropout gelu layernorm", (mix_forward, mix_backward, ffn_forward, ffn_backward)),
    ("block", "", (prenorm_block_forward, prenorm_block_backward)),
    ("step", "dropout buffer", (train_step,)),
)


def replace(names: dict, without: Sequence[str] = ()) -> None:
    """Put the functions of every group but `without` into `names`, those of gpu.py."""
    groups = [group for group, *_ in REPLACED]
    unknown = set(without) - set(groups)
    require(not unknown, f"GPU_WITHOUT knows {' '.join(groups)}, not {' '.join(unknown)}")
    left_out = set(without)
    for group, needs, functions in REPLACED:
        if left_out & {group, *needs.split()}:
            left_out.add(group)
            continue
        for function in functions:
            names[function.__name__] = function
    names["set_precision"] = set_precision
    names["np"].matmul = lambda a, b, out: product(a, b)  # there `out` only suggests a layout
