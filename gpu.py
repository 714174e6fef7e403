"""The same model on a CUDA GPU, with CuPy: the names of grassmann.py, in the same order.

Here is only what differs on a GPU. What is plain array code there is the same code here:
`_borrowed` gives a function of grassmann.py this module's names, so that its `np` is CuPy and the
ops that it calls are the ones below. Those are CUDA kernels (kernels.cu) where array code would
pass over memory a dozen times; matrix products are cuBLAS's. (Ops that no model calls, because a
kernel does several of them, are left out.) Parameters, gradients and Adam's means are views of one
flat buffer each (`Flat`), so that what runs over all of them is one kernel.

All arrays are CuPy arrays, except tokens, which may lie on either side. Batches and initial weights
are drawn on the host, the same numbers as in grassmann.py; dropout is drawn on the device, from
keys that the host draws. The loss stays on the device until somebody looks at it. A checkpoint of
either module loads in the other. A token outside the vocabulary goes unnoticed. All of this is for
one device and one thread.

To start a kernel costs the host more than a small one costs the card. The pass forward and back,
two hundred of them, is therefore recorded as a CUDA graph in its second run, then launched as one.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import operator  # noqa: F401  (for what is borrowed)
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, SimpleNamespace

import numpy

import grassmann

try:
    import cupy as cp

    cp.ones((2, 2)) @ cp.ones((2, 2))  # needs it all: the driver, a device, the compiler, cuBLAS
except Exception as error:  # each of these has its own
    raise ImportError(
        "this needs a CUDA GPU and CuPy; if there is none yet, pip install -r requirements-gpu.txt "
        "for a driver of version 580 or newer (nvidia-smi tells) and a GTX 16, RTX 20 or newer, "
        "for a driver from 525 on or an older card pip install 'cupy-cuda12x[ctk]' "
        f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    ) from None

np = SimpleNamespace(**vars(cp) | {"random": numpy.random})  # what borrowed functions find as np
Array = cp.ndarray
Params = dict[str, Array]
Rng = numpy.random.Generator
CHUNK = 64  # tokens whose gradients one thread adds up
SHARD_TOKENS = 2048  # at a time in a validation: its activations come on top of a graph's
GRAPHS = 4  # CUDA graphs at a time, each with its own memory for activations
WORKSPACE = 2**25  # bytes of memory that cuBLAS may use, as much as it takes by itself on an H100
_precision, _bfloat16 = "float32", None

def _borrowed(function: Callable) -> Callable:
    """A function of grassmann.py that finds this module's names: CuPy as np, and the ops below."""
    own = FunctionType(function.__code__, globals(), function.__name__, function.__defaults__)
    return functools.update_wrapper(own, function)

class Flat(dict):
    """A dict of arrays, from either side, copied into one `buffer`, whose views they become."""

    def __init__(self, arrays: Params):
        order = sorted(arrays, key=lambda name: (arrays[name].ndim == 1, name))
        self.buffer = cp.concatenate([cp.asarray(arrays[name]).ravel() for name in order])
        self.matrices = sum(a.size for a in arrays.values() if a.ndim > 1)  # first; these decay
        views, end = {}, 0
        for name in order:
            start, end = end, end + arrays[name].size
            views[name] = self.buffer[start:end].reshape(arrays[name].shape)
        super().__init__((name, views[name]) for name in arrays)

# ---- kernels and matrix products -----------------------------------------------------------------

@functools.cache
def _kernels(real: numpy.dtype) -> Callable:
    """kernels.cu, compiled at its first use for real = float32 or float64: name -> kernel."""
    code = Path(__file__).with_name("kernels.cu").read_text(encoding="utf-8")
    code = code.encode("ascii", "backslashreplace").decode()  # for a file in the locale's encoding
    in_c = {"float32": "float", "float64": "double"}[real.name]
    return functools.cache(cp.RawModule(code=code, options=(f"-Dreal={in_c}",)).get_function)

def _launch(name: str, grid: tuple, block: tuple, *args) -> None:
    """Start a kernel of kernels.cu; its `real` is the dtype of the first array of floats.

    CuPy passes numbers as they are: Python's get the kernel's types here. None is a null pointer.
    """
    real = next(a.dtype for a in args if isinstance(a, Array) and a.dtype.kind == "f")

    def typed(a):
        if isinstance(a, Array):
            return cp.ascontiguousarray(a)
        if a is None:
            return numpy.intp(0)
        return numpy.int32(a) if isinstance(a, int) else real.type(a) if isinstance(a, float) else a

    _kernels(real)(name)(grid, block, tuple(map(typed, args)))

def _per_token(name: str, T: int, *args) -> None:
    """One warp for each of T tokens."""
    _launch(name, (-(-T // 8),), (32, 8), T, *args)

def _per_element(name: str, n: int, *args) -> None:
    """One thread for each of n elements."""
    _launch(name, (-(-n // 256),), (256,), numpy.int64(n), *args)

def _sum_over_tokens(name: str, T: int, shape: tuple[int, ...], *args) -> Array:
    """An array of this shape: one thread for each number in each chunk of tokens, then a sum."""
    parts = cp.empty((-(-T // CHUNK), *shape), args[-1].dtype)
    _launch(name, (len(parts), -(-math.prod(shape) // 256)), (256,), T, CHUNK, *args, parts)
    return parts.sum(0)

def set_precision(precision: str) -> None:
    """How float32 matrices are multiplied from now on; all else, sums and weights too, is float32.

    float32     as they are
    tf32        rounded to 10 bits after the point, on tensor cores (compute capability 8.0 on)
    bfloat16    rounded to 7 bits, likewise

    Products of stacks of matrices, which only attention has, are CuPy's, always in float32. Raises
    ValueError on another word or an older card, ImportError without ml_dtypes.
    """
    global _precision, _bfloat16
    if precision not in ("float32", "tf32", "bfloat16"):
        raise ValueError(f"precision must be float32, tf32 or bfloat16, not {precision!r}")
    if precision != "float32" and int(cp.cuda.Device().compute_capability) < 80:
        raise ValueError(f"{precision} needs compute capability 8.0, this card has an older one")
    if precision == "bfloat16":
        from ml_dtypes import bfloat16 as _bfloat16
    _precision = precision

def _rounded(a: Array) -> Array:
    """The operand of a product, in bfloat16 if that is set. (To tf32 cuBLAS rounds by itself.)"""
    return a.astype(_bfloat16) if _precision == "bfloat16" and a.dtype == numpy.float32 else a

@functools.cache
def _cublas() -> tuple[ctypes.CDLL, Array]:
    """The library of matrix products, which CuPy has loaded, and its workspace."""
    version = cp.cuda.cublas.getVersion(cp.cuda.get_cublas_handle()) // 10000
    name = f"cublas64_{version}.dll" if os.name == "nt" else f"libcublas.so.{version}"
    return ctypes.CDLL(name), cp.empty(WORKSPACE, numpy.uint8)

def _matmul(a: Array, b: Array) -> Array:
    """a b for matrices (T, in), (in, out) of one dtype; the result and its sums are not rounded.

    CuPy's own product refuses to be recorded in a CUDA graph, and rounds the result as the operands
    are. cuBLAS takes columns for rows, so it is asked for (a b)ᵀ = bᵀ aᵀ; a transposed array is
    read where it lies.
    """
    library, workspace = _cublas()
    runtime, cublas, pointer = cp.cuda.runtime, cp.cuda.cublas, ctypes.c_void_p
    types = {"float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F,
             "bfloat16": runtime.CUDA_R_16BF}
    real, compute = ctypes.c_float, cublas.CUBLAS_COMPUTE_32F
    if a.dtype == numpy.float64:
        real, compute = ctypes.c_double, cublas.CUBLAS_COMPUTE_64F
    elif _precision == "tf32":
        compute = cublas.CUBLAS_COMPUTE_32F_FAST_TF32
    out, one, zero = cp.empty((len(a), b.shape[1]), numpy.dtype(real)), real(1), real(0)

    def operand(x: Array) -> tuple[int, Array, int, int]:
        """Whether what lies in memory is xᵀ, then that, its type and the length of its rows."""
        transposed = x.flags.f_contiguous and not x.flags.c_contiguous
        memory = x.T if transposed else cp.ascontiguousarray(x)
        return int(transposed), memory, types[x.dtype.name], memory.shape[1]

    a_transposed, a_memory, a_type, a_row = operand(a)
    b_transposed, b_memory, b_type, b_row = operand(b)
    handle, size = pointer(cp.cuda.get_cublas_handle()), ctypes.c_size_t(workspace.nbytes)
    status = (
        library.cublasSetStream_v2(handle, pointer(cp.cuda.get_current_stream().ptr)),
        library.cublasSetWorkspace_v2(handle, pointer(workspace.data.ptr), size),
        library.cublasGemmEx(
            handle, b_transposed, a_transposed, b.shape[1], len(a), len(b), ctypes.byref(one),
            pointer(b_memory.data.ptr), b_type, b_row, pointer(a_memory.data.ptr), a_type, a_row,
            ctypes.byref(zero), pointer(out.data.ptr), types[out.dtype.name], out.shape[1],
            compute, cublas.CUBLAS_GEMM_DEFAULT),
    )
    if any(status):
        raise RuntimeError(f"cuBLAS refuses a product of {a.shape} and {b.shape}, "
                           f"{a.dtype} and {b.dtype}: {status}")
    return out

class _Graph:
    """What function(*inputs) starts on the card, as a CUDA graph: the host starts it all at once.

    The first call runs as it is, which compiles the kernels; the second one records, which computes
    nothing yet. From then on every array has its place: inputs are copied to theirs, the next call
    overwrites the outputs, and what lies in between is from a pool that nobody else draws from.
    """

    def __init__(self):
        memory = []

        def malloc(size: int) -> cp.cuda.MemoryPointer:
            memory.append(cp.cuda.Memory(size))  # or a full card takes what the graph writes to
            return cp.cuda.MemoryPointer(memory[-1], 0)

        self.memory, self.pool = memory, cp.cuda.MemoryPool(malloc)
        self.ran = self.tried = False
        self.graph = self.stream = self.inputs = self.outputs = None

    def __call__(self, function: Callable, *inputs: Array):
        if self.ran and not self.tried:
            try:
                self.record(function, inputs)
            except (RuntimeError, MemoryError) as error:
                warnings.warn(f"without a CUDA graph, kernel by kernel: {error}", stacklevel=3)
            if self.graph is None:  # not above, where the error still holds what the function had
                self.release()
            self.tried = True  # but after Ctrl-C the next call records
        if self.graph is None:
            outputs, self.ran = function(*inputs), True
            return outputs
        for place, a in zip(self.inputs, inputs, strict=True):
            place[...] = a
        self.graph.launch()
        return self.outputs

    def record(self, function: Callable, inputs: tuple[Array, ...]) -> None:
        self.release()  # what a recording had that Ctrl-C ended
        gc.collect()  # a graph that is freed while this one is recorded would spoil it
        cp.get_default_memory_pool().free_all_blocks()  # what the first call needed
        self.inputs, self.stream = [a.copy() for a in inputs], cp.cuda.Stream(non_blocking=True)
        with self.stream, cp.cuda.using_allocator(self.pool.malloc):
            try:
                self.stream.begin_capture()
                outputs = function(*self.inputs)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # which says that it failed, not why
                    self.stream.end_capture()
                raise
            graph = self.stream.end_capture()
        _, grads = outputs
        cp.empty(sum(a.nbytes for a in grads.values()), numpy.uint8)  # is there room for copies?
        self.outputs, self.graph = outputs, graph

    def release(self) -> None:
        """Give up the graph and its memory, which a dropped pool does not return to the card."""
        self.graph = self.inputs = self.outputs = None
        self.memory.clear()
        self.pool.free_all_blocks()

    __del__ = release

# ---- small ops -----------------------------------------------------------------------------------

def _product(x: Array, W: Array) -> tuple[Array, tuple]:
    """x W, and the operands, rounded once, for the backward; x (..., in), W (in, out)."""
    rows, W = _rounded(x.reshape(-1, len(W))), _rounded(W)
    return _matmul(rows, W).reshape(*x.shape[:-1], -1), (rows, W)

def linear_forward(x: Array, W: Array, b: Array) -> tuple[Array, tuple]:
    """y = x W + b for x (..., in), W (in, out), b (out); y is (..., out)."""
    y, cache = _product(x, W)
    y += b
    return y, cache

def linear_backward(dy: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """dx = dy Wᵀ,  dW = xᵀ dy,  db = Σ_t dy_t."""
    x, W = cache
    rows, d = _rounded(dy.reshape(-1, dy.shape[-1])), dy.shape[-1]  # (T, out)
    db = _sum_over_tokens("column_sums", len(rows), (d,), d, dy)
    return _matmul(rows, W.T).reshape(*dy.shape[:-1], -1), _matmul(x.T, rows), db

def dot(a: Array, b: Array) -> Array:
    """Inner product over the last axis, kept: (..., r), (..., r) -> (..., 1)."""
    return (a * b).sum(-1, keepdims=True)

def layernorm_forward(
    x: Array, w: Array, b: Array, eps: float = 1e-5, residual: Array | None = None
) -> tuple[Array, tuple]:
    """x̂ = (x - mean) / sqrt(var + eps) over the last axis, y = w ⊙ x̂ + b; x (..., d), w b (d).

    With a residual (..., d), x + residual takes the place of x, and is the first of the cache.
    """
    d, T = len(w), x.size // len(w)
    total = x if residual is None else cp.empty(x.shape, x.dtype)
    y, mean, inv_std = (cp.empty(shape, x.dtype) for shape in (x.shape, T, T))
    _per_token("layernorm_forward", T, d, eps, x, residual, w, b, total, y, mean, inv_std)
    return y, (total, w, mean, inv_std)

def layernorm_backward(dy: Array, cache: tuple, dsum: Array | None = None) -> tuple:
    """dx, dw, db, as in grassmann.py; dx + dsum where x + residual also went on elsewhere."""
    x, w, mean, inv_std = cache
    d, T = len(w), x.size // len(w)
    dx = cp.empty(x.shape, x.dtype)
    _per_token("layernorm_backward", T, d, dy, dsum, x, w, mean, inv_std, dx)
    dw, db = _sum_over_tokens("layernorm_weights", T, (2, d), d, dy, x, mean, inv_std)
    return dx, dw, db

def gelu_forward(x: Array, b: Array | None = None) -> tuple[Array, tuple]:
    """GELU(x + b) for x (..., d), b (d); GELU(x) = x/2 (1 + tanh q(x)), q as in grassmann.py."""
    y, d = cp.empty(x.shape, x.dtype), x.shape[-1]
    _per_token("bias_gelu_forward", x.size // d, d, x, b, y)
    return y, (x, b)

def gelu_backward(dy: Array, cache: tuple) -> Array:
    """GELU' = (1 + tanh q)/2 + x/2 (1 - tanh² q) q'(x),  q'(x) = c (1 + 3 a x²)."""
    x, b = cache
    dx, d = cp.empty(x.shape, x.dtype), x.shape[-1]
    _per_token("bias_gelu_backward", x.size // d, d, dy, x, b, dx)
    return dx

def dropout_forward(x: Array, rate: float, rng: Rng | None) -> tuple[Array, tuple | None]:
    """Zero a fraction `rate` of x, divide the rest by 1 - rate: the mean stays. rng None: x.

    `rng` draws one key, which the device hashes with the place of each element.
    """
    if rng is None or rate == 0:
        return x, None
    keep = cp.asarray(rng.integers(2**63)), float(rate)
    return dropout_backward(x, keep), keep

def dropout_backward(dy: Array, keep: tuple | None) -> Array:
    """y = keep ⊙ x, so dx = keep ⊙ dy."""
    if keep is None:
        return dy
    dx = cp.empty(dy.shape, dy.dtype)
    _per_element("dropout", dy.size, *keep, dy, dx)
    return dx

embedding_forward = _borrowed(grassmann.embedding_forward)

def embedding_backward(dx: Array, cache: tuple) -> Array:
    """dE_k = Σ dx_t over the tokens t that are k, in the order of the text."""
    tokens, (V, d) = cache
    dE, tokens = cp.empty((V, d), dx.dtype), tokens.astype(numpy.int32)
    _launch("embedding_backward", (V, -(-d // 32)), (32, 8), tokens.size, d, tokens, dx, dE)
    return dE

def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, tuple]:
    """Mean over tokens of -log softmax(logits)[target] in nats; logits (..., V), targets (...)."""
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).astype(numpy.int32)
    losses = cp.empty(targets.shape, logits.dtype)
    _per_token("cross_entropy_forward", *logits.shape, logits, targets, losses)
    return losses.mean(), (logits, targets)

def cross_entropy_backward(dloss: float, cache: tuple) -> Array:
    """∂(log Σ exp(x) - x_target)/∂x = softmax(x) - onehot(target), over T for the mean; (T, V)."""
    logits, targets = cache
    dlogits, dloss = cp.empty(logits.shape, logits.dtype), dloss / len(logits)
    _per_token("cross_entropy_backward", *logits.shape, dloss, logits, targets, dlogits)
    return dlogits

# ---- the mixing layer ----------------------------------------------------------------------------

@functools.cache
def _indices(offsets: tuple[int, ...], r: int) -> tuple[Array, Array, Array]:
    """The offsets (m) and the index pairs i < j below r (n), (n), on the device."""
    return tuple(cp.asarray(a, numpy.int32) for a in (offsets, *grassmann.pairs(r)))

def _wedge_forward(z: Array, taps: Array | None, offsets: tuple, normalize: bool, past=0) -> tuple:
    """p = z_t ∧ s_t, from the token `past` on: `partner_forward` and `plucker_forward` in one pass;
    z (B, L, r), taps (m, r) -> p (B, L - past, n)."""
    B, L, r = z.shape
    deltas, i, j = _indices(offsets, r)
    s, p = (cp.empty((B, L - past, size), z.dtype) for size in (r, len(i)))
    sizes = B * (L - past), L, past, r, len(offsets), len(i), int(normalize)
    _per_token("wedge_forward", *sizes, deltas, i, j, z, taps, s, p)
    return p, (z, taps, offsets, normalize, s)

def _wedge_backward(dp: Array, cache: tuple) -> tuple[Array, Array | None]:
    """dz (B, L, r) and dtaps (m, r), or None: `plucker_backward`, then `partner_backward`."""
    z, taps, offsets, normalize, s = cache
    (_, L, r), m, T, n = z.shape, len(offsets), z.size // z.shape[-1], dp.shape[-1]
    dz, ds = cp.empty(z.shape, z.dtype), cp.empty(z.shape, z.dtype)
    deltas, *_ = _indices(offsets, r)
    _per_token("wedge_backward", T, L, r, m, n, int(normalize), deltas, dp, z, taps, s, dz, ds)
    _per_token("partner_backward", T, L, r, m, int(normalize), deltas, z, taps, ds, dz)
    if taps is None:
        return dz, None
    return dz, _sum_over_tokens("taps_backward", T, (m, r), L, r, m, deltas, z, ds)

def gate_forward(h: Array, g: Array, W: Array, b: Array) -> tuple[Array, tuple]:
    """α = sigmoid([h ; g] W + b), out = α ⊙ h + (1-α) ⊙ g; h, g (..., d), W (2d, d), b (d)."""
    hg, out, d = cp.concatenate([h, g], -1), cp.empty(h.shape, h.dtype), len(b)
    alpha, c_product = _product(hg, W)  # the gate before its bias and the sigmoid
    _per_token("gate_forward", h.size // d, d, hg, b, alpha, out)
    return out, (hg, alpha, c_product)

def gate_backward(dout: Array, cache: tuple) -> tuple[Array, Array, Array, Array]:
    """dα = dout ⊙ (h - g), sigmoid' = α(1-α); h and g are reached directly and through the gate."""
    hg, alpha, c_product = cache
    d = alpha.shape[-1]
    da, dh, dg = (cp.empty(dout.shape, dout.dtype) for _ in range(3))
    _per_token("gate_backward_logits", dout.size // d, d, dout, hg, alpha, da)
    dhg, dW, db = linear_backward(da, c_product)
    _per_token("gate_backward", dout.size // d, d, dout, alpha, dhg, dh, dg)
    return dh, dg, dW, db

contract = _borrowed(grassmann.contract)
memory_forward, memory_backward = map(
    _borrowed, (grassmann.memory_forward, grassmann.memory_backward))

def mix_forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[Array, dict]:
    """The Grassmann mixing layer (paper, section 3): h (B, L, d) -> mix (B, L, d).

        z = h W_red + b_red        reduce                       (B, L, r)
        p = z ∧ partner(z)         look back and span a plane   (B, L, n)
        g = p W_plu + b_plu        project back                 (B, L, d)   + memory(h, z), if any
        mix = gate(h, g)           blend                        (B, L, d)

    `past` (streaming) holds the last max(Δ) reduced states before h and is brought up to date. The
    cache holds z, s, p and the gate α as in grassmann.py, except that with taps and normalize s is
    what it was before the kernel divided p by |z ∧ s|.
    """
    offsets, taps = config.offsets[layer], w["taps"] if config.taps else None
    z, c_red = linear_forward(h, w["W_red"], w["b_red"])
    length, window = z.shape[1], z
    if past is not None:
        window = cp.concatenate([past["z"], z], 1) if past else z  # (B, max Δ + L, r)
        past["z"] = window[:, -max(offsets) :]
    before = window.shape[1] - length
    p, c_wedge = _wedge_forward(window, taps, offsets, config.normalize, before)
    g, c_plu = linear_forward(p, w["W_plu"], w["b_plu"])
    cache = {"red": c_red, "wedge": c_wedge, "plu": c_plu}
    if config.memory:
        m, cache["memory"] = memory_forward(h, z, w, past)
        g += m
    mix, cache["gate"] = gate_forward(h, g, w["W_gate"], w["b_gate"])
    return mix, cache | {"z": z, "s": c_wedge[-1], "p": p, "alpha": cache["gate"][1]}

def mix_backward(dmix: Array, cache: dict) -> tuple[Array, Params]:
    """The steps of `mix_forward` in reverse; h is used twice, so two gradients add up."""
    grads = {}
    dh, dg, grads["W_gate"], grads["b_gate"] = gate_backward(dmix, cache["gate"])
    dp, grads["W_plu"], grads["b_plu"] = linear_backward(dg, cache["plu"])
    dz, dtaps = _wedge_backward(dp, cache["wedge"])
    if dtaps is not None:
        grads["taps"] = dtaps
    if "memory" in cache:
        dh_memory, dz_memory, memory = memory_backward(dg, cache["memory"])
        dz, dh, grads = dz + dz_memory, dh + dh_memory, grads | memory
    dh_red, grads["W_red"], grads["b_red"] = linear_backward(dz, cache["red"])
    return dh + dh_red, grads

mix_shapes = grassmann.mix_shapes

# ---- attention, to compare with ------------------------------------------------------------------

attention_forward = _borrowed(grassmann.attention_forward)
attention_backward = _borrowed(grassmann.attention_backward)

attention_shapes = grassmann.attention_shapes

MIXERS = {"grassmann": (mix_forward, mix_backward, mix_shapes),
          "attention": (attention_forward, attention_backward, attention_shapes)}

# ---- the block -----------------------------------------------------------------------------------

def ffn_forward(x: Array, w: Scope) -> tuple[Array, tuple]:
    """GELU(x W_1 + b_1) W_2 + b_2, each token by itself; x (..., d)."""
    inner, c_1 = _product(x, w["W_1"])  # (..., d_ff)
    active, c_gelu = gelu_forward(inner, w["b_1"])
    out, c_2 = linear_forward(active, w["W_2"], w["b_2"])  # (..., d)
    return out, (c_1, c_gelu, c_2)

ffn_backward = _borrowed(grassmann.ffn_backward)

def prenorm_block_forward(
    h: Array, w: Scope, config: Config, layer: int, past=None, rng: Rng | None = None
) -> tuple[Array, dict]:
    """h ← h + D(mix(LN1(h))),  h ← h + D(FFN(LN2(h))),  D dropout; h (B, L, d)."""
    mixer_forward, *_ = MIXERS[config.mixer]
    normed, c_ln1 = layernorm_forward(h, w["ln1.w"], w["ln1.b"])
    mix, c_mix = mixer_forward(normed, w.scope("mix."), config, layer, past)
    mix, keep_mix = dropout_forward(mix, config.dropout, rng)
    normed, c_ln2 = layernorm_forward(h, w["ln2.w"], w["ln2.b"], residual=mix)
    h = c_ln2[0]  # h + mix
    ffn, c_ffn = ffn_forward(normed, w.scope("ffn."))
    ffn, keep_ffn = dropout_forward(ffn, config.dropout, rng)
    cache = {"ln1": c_ln1, "mix": c_mix, "keep_mix": keep_mix}
    return h + ffn, cache | {"ln2": c_ln2, "ffn": c_ffn, "keep_ffn": keep_ffn}

def prenorm_block_backward(dout: Array, cache: dict, config: Config) -> tuple[Array, Params]:
    """A sum h + f(h) passes its gradient on unchanged, and once more through f."""
    _, mixer_backward, _ = MIXERS[config.mixer]
    grads = {}
    dnormed, ffn = ffn_backward(dropout_backward(dout, cache["keep_ffn"]), cache["ffn"])
    dh, grads["ln2.w"], grads["ln2.b"] = layernorm_backward(dnormed, cache["ln2"], dout)
    dnormed, mix = mixer_backward(dropout_backward(dh, cache["keep_mix"]), cache["mix"])
    dh, grads["ln1.w"], grads["ln1.b"] = layernorm_backward(dnormed, cache["ln1"], dh)
    return dh, grads | prefixed("mix.", mix) | prefixed("ffn.", ffn)

def paper_block_forward(
    h: Array, w: Scope, config: Config, layer: int, past=None, rng: Rng | None = None
) -> tuple[Array, dict]:
    """h ← D(LN1(mix(h))),  h ← LN2(h + D(FFN(h))),  D dropout (paper, section 3); h (B, L, d).

    The gate inside mix keeps h; attention has none and gets a residual: mix(h) = h + attention(h).
    """
    mixer_forward, *_ = MIXERS[config.mixer]
    mix, c_mix = mixer_forward(h, w.scope("mix."), config, layer, past)
    residual = h if config.mixer == "attention" else None
    normed, c_ln1 = layernorm_forward(mix, w["ln1.w"], w["ln1.b"], residual=residual)
    h, keep_mix = dropout_forward(normed, config.dropout, rng)
    ffn, c_ffn = ffn_forward(h, w.scope("ffn."))
    ffn, keep_ffn = dropout_forward(ffn, config.dropout, rng)
    out, c_ln2 = layernorm_forward(h, w["ln2.w"], w["ln2.b"], residual=ffn)
    cache = {"mix": c_mix, "ln1": c_ln1, "keep_mix": keep_mix}
    return out, cache | {"ffn": c_ffn, "keep_ffn": keep_ffn, "ln2": c_ln2}

paper_block_backward = _borrowed(grassmann.paper_block_backward)

BLOCKS = {"prenorm": (prenorm_block_forward, prenorm_block_backward),
          "paper": (paper_block_forward, paper_block_backward)}

# ---- configuration and parameters ----------------------------------------------------------------

default_offsets, Config, check = grassmann.default_offsets, grassmann.Config, grassmann.check
param_shapes = grassmann.param_shapes

def init_params(config: Config, seed: int = 0, dtype: type = numpy.float32) -> Params:
    """The numbers that grassmann.py draws."""
    return Flat(grassmann.init_params(config, seed, dtype))

Scope, prefixed = grassmann.Scope, grassmann.prefixed

# ---- the model and its loss ----------------------------------------------------------------------

def head_forward(h: Array, E: Array) -> tuple[Array, tuple]:
    """logits = h Eᵀ: a state meets every token's embedding; h (B, L, d), E (V, d) -> (B, L, V)."""
    logits, operands = _product(h, E.T)
    return logits, (h.shape, operands)

def head_backward(dlogits: Array, cache: tuple) -> tuple[Array, Array]:
    """dh = dlogits E,  dE = dlogitsᵀ h."""
    shape, (h, E_T) = cache
    rows = _rounded(dlogits.reshape(-1, dlogits.shape[-1]))
    return _matmul(rows, E_T.T).reshape(shape), _matmul(rows.T, h)

model_forward, model_backward = map(_borrowed, (grassmann.model_forward, grassmann.model_backward))
forward = _borrowed(grassmann.forward)

class _Keys(list):
    """A generator for `dropout_forward` that hands out keys which are drawn already."""

    def integers(self, high: int) -> Array:
        return self.pop(0)

def _forward_and_backward(params: Params, config: Config, share: float, x, y, keys=None) -> tuple:
    """`loss_and_grads` kernel by kernel; the dropouts take `keys` one after the other."""
    logits, cache = model_forward(params, config, x, rng=None if keys is None else _Keys(keys))
    loss, c_loss = cross_entropy_forward(logits, y)
    return share * loss, model_backward(cross_entropy_backward(share, c_loss), cache)

@functools.lru_cache(maxsize=GRAPHS)
def _graph(*key) -> _Graph:
    """A graph of its own for all that decides what is launched where."""
    return _Graph()

def loss_and_grads(
    params: Params, config: Config, x: Array, y: Array, seed=None, share: float = 1.0
) -> tuple[Array, Params]:
    """Mean cross-entropy of predicting y from x, both (B, L), and its gradients: grassmann.py's.

    float(loss) waits for the card. A CUDA graph does it, from the second call on with parameters in
    the same place in memory, the same configuration, precision, share and shapes. Attention and a
    memory cannot be recorded: CuPy's products of stacks of matrices refuse.
    """
    inputs = [cp.asarray(x), cp.asarray(y)]
    check(inputs[0].shape == inputs[1].shape, "x and y must have one shape", "this batch")
    if seed is not None and config.dropout:
        keys = numpy.random.default_rng(seed).integers(2**63, size=2 * config.n_layer + 1)
        before = getattr(seed, "first", 0) * x.shape[1] * config.d_model  # elements of earlier rows
        step = numpy.uint64(before * 0x9E3779B97F4A7C15 % 2**64)  # the kernel's, from one to the next
        inputs.append(cp.asarray((keys.view(numpy.uint64) + step).view(numpy.int64)))
    run = functools.partial(_forward_and_backward, params, config, share)
    if config.mixer != "attention" and not config.memory:
        places = tuple((a.data.ptr, a.dtype) for a in params.values())
        shapes = tuple((a.shape, a.dtype) for a in inputs)
        layer = MIXERS[config.mixer], BLOCKS[config.block]  # somebody may have put in their own
        run = functools.partial(_graph(config, layer, share, _precision, places, shapes), run)
    loss, grads = run(*inputs)
    return loss.copy(), Flat({name: grads[name] for name in params})

# ---- optimiser -----------------------------------------------------------------------------------

def adamw_init(params: Params) -> dict[str, Params]:
    """The optimiser's state: running means of the gradient and of its square, zero at first."""
    return {mean: Flat({name: cp.zeros_like(value) for name, value in params.items()})
            for mean in ("adam_m", "adam_v")}

def adamw_step(
    params: Params, grads: Params, state: dict[str, Params], step: int, lr: float,
    betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.1, eps: float = 1e-8,
) -> None:
    """One step of AdamW, as in grassmann.py, in place. `step` counts from 0; dicts are `Flat`."""
    (beta_1, beta_2), matrices = betas, numpy.int64(params.matrices)
    fix_1, fix_2 = 1 - beta_1 ** (step + 1), 1 - beta_2 ** (step + 1)
    rates = map(float, (1 - beta_1, 1 - beta_2, fix_1, fix_2, lr, lr * weight_decay, eps))
    buffers = (flat.buffer for flat in (grads, params, state["adam_m"], state["adam_v"]))
    _per_element("adamw", params.buffer.size, matrices, *rates, *buffers)

def clip_grads(grads: Params, max_norm: float) -> Array:
    """Scale all gradients together, in place, to a norm of at most max_norm; returns the norm."""
    g, parts = grads.buffer, cp.empty(256, numpy.float64)
    _launch("sum_of_squares", (256,), (256,), numpy.int64(g.size), g, parts)
    norm = cp.sqrt(parts.sum())
    _per_element("clip", g.size, float(max_norm), g, norm)
    return norm

# ---- batches and validation ----------------------------------------------------------------------

get_batch = _borrowed(grassmann.get_batch)

def validation_loss(params: Params, config: Config, tokens: Array, each: Callable = map) -> float:
    """Mean nats per token over `tokens` (at least 2), every target once; larger chunks than in
    grassmann.py. The host waits for the card when all are started: `each` runs ahead of it."""
    tokens, targets, context = cp.asarray(tokens), len(tokens) - 1, config.context
    whole = targets // context * context
    x, y = tokens[:whole].reshape(-1, context), tokens[1 : whole + 1].reshape(-1, context)
    size = max(1, SHARD_TOKENS // context)
    chunks = [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]
    if whole < targets:
        chunks.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))

    def mean(chunk: tuple[Array, Array]) -> Array:
        return cross_entropy_forward(forward(params, config, chunk[0]), chunk[1])[0]

    means = zip([*each(mean, chunks)], chunks, strict=True)
    return math.fsum(float(loss) * y.size for loss, (_, y) in means) / targets

# ---- streaming and sampling ----------------------------------------------------------------------

stream_init = _borrowed(grassmann.stream_init)
stream_read, stream_step = map(_borrowed, (grassmann.stream_read, grassmann.stream_step))

def sample(logits: Array, temperature: float, top_k: int | None, rng: Rng) -> int:
    """grassmann.py's, of logits that are fetched. Raises ValueError if they are not finite."""
    return grassmann.sample(logits.get(), temperature, top_k, rng)

generate = _borrowed(grassmann.generate)
