"""The same model on a CUDA GPU, with CuPy: the functions of grassmann.py under the same names, in the same order.

Here is only what differs on a GPU. What is plain array code there is the same code here: `_borrowed` gives a
function of grassmann.py this module's names, so that its `np` is CuPy and the ops that it calls are the ones
below. Those are CUDA kernels (kernels.cu) where array code would pass over memory a dozen times; matrix products
are cuBLAS's. Parameters, gradients and Adam's means are views of one flat buffer each (`Flat`), so that what
runs over all of them is one kernel. The loss stays on the device until somebody looks at it.

All arrays are CuPy arrays, except tokens, which may lie on either side. Batches and initial weights are drawn on
the host, the same numbers as in grassmann.py; dropout is drawn on the device, from keys that the host draws. A
checkpoint of either module loads in the other. A token outside the vocabulary goes unnoticed on a GPU. All of this
is for one device and one thread.

To start a kernel costs the host more than a small kernel costs the card. The pass forward and backward, two hundred
of them, is therefore recorded as a CUDA graph when it is run for the second time, and launched as one from then on.
"""

import ctypes
import functools
import math
import os
import warnings
from pathlib import Path
from types import FunctionType, SimpleNamespace

import numpy

import grassmann

try:
    import cupy as cp

    cp.ones((2, 2)) @ cp.ones((2, 2))  # needs all of it: the driver, a device, the compiler, cuBLAS
except Exception as error:  # each of these has its own
    raise ImportError(
        "this needs a CUDA GPU and CuPy: pip install -r requirements-gpu.txt for a driver of version 580 or newer "
        "(nvidia-smi tells) and a GTX 16, RTX 20 or newer; for a driver from 525 on or an older card "
        "pip install 'cupy-cuda12x[ctk]' "
        f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    ) from None

np = SimpleNamespace(**vars(cp) | {"random": numpy.random})  # what borrowed functions find under this name
Array = cp.ndarray
Params = dict[str, Array]
SHARD_TOKENS = 2048  # at most so many at a time in a validation: its activations come on top of a graph's
GRAPHS = 4  # CUDA graphs at a time, each with its own memory for activations


def _borrowed(function):
    """A function of grassmann.py that finds the names of this module: CuPy as np, and the ops below."""
    own = FunctionType(function.__code__, globals(), function.__name__, function.__defaults__)
    return functools.update_wrapper(own, function)


class Flat(dict):
    """A dict of arrays, from either side, copied into one `buffer` of which they become views.

    The matrices, which AdamW decays, come first, `matrices` numbers. Names and shapes decide the layout.
    """

    def __init__(self, arrays: Params):
        order = sorted(arrays, key=lambda name: (arrays[name].ndim == 1, name))
        self.buffer = cp.concatenate([cp.asarray(arrays[name]).ravel() for name in order])
        self.matrices = sum(a.size for a in arrays.values() if a.ndim > 1)
        views, end = {}, 0
        for name in order:
            start, end = end, end + arrays[name].size
            views[name] = self.buffer[start:end].reshape(arrays[name].shape)
        super().__init__((name, views[name]) for name in arrays)


# ---- kernels and matrix products ----------------------------------------------------------------------

CHUNK = 64  # tokens whose gradients one thread adds up


@functools.cache
def _kernels(real: numpy.dtype):
    """kernels.cu, compiled at its first use for real = float32 or float64."""
    code = Path(__file__).with_name("kernels.cu").read_text(encoding="utf-8")
    code = code.encode("ascii", "backslashreplace").decode()  # CuPy writes it to a file, in the locale's encoding
    in_c = {"float32": "float", "float64": "double"}[real.name]
    return cp.RawModule(code=code, options=(f"-Dreal={in_c}",))


@functools.cache
def _kernel(name: str, real: numpy.dtype):
    return _kernels(real).get_function(name)


def _launch(name: str, grid: tuple, block: tuple, *args) -> None:
    """Start a kernel of kernels.cu; its `real` is the dtype of the first array of floats.

    CuPy passes numbers as they are, so they get the kernel's types here: whole ones int, others real, and None
    is the null pointer. (Numbers that are NumPy's have their type already.)
    """
    real = next(a.dtype for a in args if isinstance(a, Array) and a.dtype.kind == "f")

    def typed(a):
        if isinstance(a, Array):
            return cp.ascontiguousarray(a)
        if a is None:
            return numpy.intp(0)
        return numpy.int32(a) if isinstance(a, int) else real.type(a) if isinstance(a, float) else a

    _kernel(name, real)(grid, block, tuple(map(typed, args)))


def _per_token(name: str, T: int, *args) -> None:
    """One warp for each of T tokens."""
    _launch(name, (-(-T // 8),), (32, 8), T, *args)


def _per_element(name: str, n: int, *args) -> None:
    """One thread for each of n elements."""
    _launch(name, (-(-n // 256),), (256,), numpy.int64(n), *args)


def _per_chunk(name: str, T: int, columns: int, *args) -> None:
    """One thread for each of `columns` in each chunk of tokens."""
    _launch(name, (-(-T // CHUNK), -(-columns // 256)), (256,), T, CHUNK, *args)


_precision, _bfloat16 = "float32", None


def set_precision(precision: str) -> None:
    """How float32 matrices are multiplied from now on; everything else, sums and weights included, is float32.

    float32     as they are
    tf32        rounded to 10 bits after the point, on tensor cores (compute capability 8.0 or newer)
    bfloat16    rounded to 7 bits, likewise

    Products of stacks of matrices, which only attention has, are CuPy's, in float32 at all times. Raises ValueError
    on another word or an older card, ImportError without ml_dtypes, which has the dtype.
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


WORKSPACE = 2**25  # bytes of memory that cuBLAS may use, as much as it takes by itself on an H100


@functools.cache
def _cublas() -> tuple[ctypes.CDLL, Array]:
    """The library of matrix products, which CuPy has loaded, and its workspace."""
    version = cp.cuda.cublas.getVersion(cp.cuda.get_cublas_handle()) // 10000
    library = ctypes.CDLL(f"cublas64_{version}.dll" if os.name == "nt" else f"libcublas.so.{version}")
    return library, cp.empty(WORKSPACE, numpy.uint8)


def _matmul(a: Array, b: Array) -> Array:
    """a b for matrices (T, in), (in, out) of one dtype; the result and the sums in it are not rounded.

    CuPy's own product refuses to be recorded in a CUDA graph, and rounds the result as the operands are. cuBLAS takes
    columns for rows, so it is asked for (a b)ᵀ = bᵀ aᵀ; a transposed array is read where it lies.
    """
    library, workspace = _cublas()
    runtime, cublas, pointer = cp.cuda.runtime, cp.cuda.cublas, ctypes.c_void_p
    types = {"float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F, "bfloat16": runtime.CUDA_R_16BF}
    if a.dtype == numpy.float64:
        real, compute = ctypes.c_double, cublas.CUBLAS_COMPUTE_64F
    elif _precision == "tf32":
        real, compute = ctypes.c_float, cublas.CUBLAS_COMPUTE_32F_FAST_TF32
    else:
        real, compute = ctypes.c_float, cublas.CUBLAS_COMPUTE_32F
    out, one, zero = cp.empty((len(a), b.shape[1]), numpy.dtype(real)), real(1), real(0)

    def operand(x: Array) -> tuple[int, Array, int, int]:
        """Whether what lies in memory is the transpose of x, then that, its type and the length of its rows."""
        transposed = x.flags.f_contiguous and not x.flags.c_contiguous
        memory = x.T if transposed else cp.ascontiguousarray(x)
        return int(transposed), memory, types[x.dtype.name], memory.shape[1]

    a_transposed, a_memory, a_type, a_row = operand(a)
    b_transposed, b_memory, b_type, b_row = operand(b)
    handle = pointer(cp.cuda.get_cublas_handle())
    status = (
        library.cublasSetStream_v2(handle, pointer(cp.cuda.get_current_stream().ptr)),
        library.cublasSetWorkspace_v2(handle, pointer(workspace.data.ptr), ctypes.c_size_t(WORKSPACE)),
        library.cublasGemmEx(
            handle, b_transposed, a_transposed, b.shape[1], len(a), len(b),
            ctypes.byref(one), pointer(b_memory.data.ptr), b_type, b_row, pointer(a_memory.data.ptr), a_type, a_row,
            ctypes.byref(zero), pointer(out.data.ptr), types[out.dtype.name], out.shape[1],
            compute, cublas.CUBLAS_GEMM_DEFAULT,
        ),
    )  # fmt: skip
    if any(status):
        raise RuntimeError(f"cuBLAS refuses a product of {a.shape} and {b.shape}, {a.dtype} and {b.dtype}: {status}")
    return out


class _Graph:
    """What function(*inputs) starts on the card, as a CUDA graph: the host then starts it all at once.

    The first call runs as it is, which compiles the kernels; the second one records. From then on every array has its
    place: inputs are copied to theirs, the outputs of a call are overwritten by the next one, and what lies in between
    is from a pool that nobody else draws from. Recording computes nothing yet.
    """

    def __init__(self):
        memory = []

        def malloc(size: int):
            """For the pool. That gives unused blocks back when the card is full, but the graph still writes to them."""
            memory.append(cp.cuda.Memory(size))
            return cp.cuda.MemoryPointer(memory[-1], 0)

        self.calls, self.memory, self.pool = 0, memory, cp.cuda.MemoryPool(malloc)
        self.graph = self.stream = self.inputs = self.outputs = None

    def __call__(self, function, *inputs: Array):
        self.calls += 1
        if self.calls == 2:
            try:
                self.record(function, inputs)
            except (RuntimeError, MemoryError) as error:
                warnings.warn(f"without a CUDA graph, kernel by kernel: {error}", stacklevel=3)
                self.graph = None
            if self.graph is None:  # not above, where the error still holds what the function had
                self.release()
        if self.graph is None:
            return function(*inputs)
        for place, a in zip(self.inputs, inputs, strict=True):
            place[...] = a
        self.graph.launch()
        return self.outputs

    def record(self, function, inputs: tuple[Array, ...]) -> None:
        cp.get_default_memory_pool().free_all_blocks()  # what the first call needed
        self.inputs, self.stream = [a.copy() for a in inputs], cp.cuda.Stream(non_blocking=True)
        with self.stream, cp.cuda.using_allocator(self.pool.malloc):
            self.stream.begin_capture()
            try:
                self.outputs = function(*self.inputs)
            finally:
                self.graph = self.stream.end_capture()
        _, grads = self.outputs
        cp.empty(sum(a.nbytes for a in grads.values()), numpy.uint8)  # is there room for the copies of the outputs?

    def release(self) -> None:
        """Give up the graph and its memory, which a pool that is dropped does not return to the card."""
        self.graph = self.inputs = self.outputs = None
        self.memory.clear()
        self.pool.free_all_blocks()

    __del__ = release


# ---- configuration ------------------------------------------------------------------------------------

Config, param_shapes = grassmann.Config, grassmann.param_shapes


def init_params(config: Config, seed: int = 0, dtype: type = numpy.float32) -> Params:
    """The numbers that grassmann.py draws."""
    return Flat(grassmann.init_params(config, seed, dtype))


sub, prefixed = grassmann.sub, grassmann.prefixed
pool, in_threads = grassmann.pool, grassmann.in_threads


# ---- small ops ----------------------------------------------------------------------------------------


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
    exact = dy.reshape(-1, dy.shape[-1])
    rows = _rounded(exact)
    return _matmul(rows, W.T).reshape(*dy.shape[:-1], -1), _matmul(x.T, rows), _column_sums(exact)


def _column_sums(x: Array) -> Array:
    """Σ_t x_t: (T, d) -> (d)."""
    T, d = x.shape
    parts = cp.empty((-(-T // CHUNK), d), x.dtype)
    _per_chunk("column_sums", T, d, d, x, parts)
    return parts.sum(0)


mean = _borrowed(grassmann.mean)


def dot(a: Array, b: Array) -> Array:
    """Inner product over the last axis, kept: (..., r), (..., r) -> (..., 1)."""
    return (a * b).sum(-1, keepdims=True)


def layernorm_forward(x: Array, w: Array, b: Array, eps: float = 1e-5) -> tuple[Array, tuple]:
    """x̂ = (x - mean) / sqrt(var + eps) over the last axis, y = w ⊙ x̂ + b; x (..., d), w and b (d)."""
    return _add_layernorm_forward(x, None, w, b, eps)[1:]


def layernorm_backward(dy: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """dx, dw and db, as derived in grassmann.py."""
    return _add_layernorm_backward(dy, None, cache)


def _add_layernorm_forward(x: Array, residual: Array | None, w: Array, b: Array, eps: float = 1e-5):
    """x + residual, its LayerNorm, and the cache; x and residual (..., d)."""
    d, T = len(w), x.size // len(w)
    total = x if residual is None else cp.empty(x.shape, x.dtype)
    y, mean, inv_std = (cp.empty(shape, x.dtype) for shape in (x.shape, T, T))
    _per_token("layernorm_forward", T, d, eps, x, residual, w, b, total, y, mean, inv_std)
    return total, y, (total, w, mean, inv_std)


def _add_layernorm_backward(dy: Array, dsum: Array | None, cache: tuple) -> tuple[Array, Array, Array]:
    """`layernorm_backward`, with dsum added to dx: the gradient that reached x + residual on another way."""
    x, w, mean, inv_std = cache
    d, T = len(w), x.size // len(w)
    dx = cp.empty(x.shape, x.dtype)
    _per_token("layernorm_backward", T, d, dy, dsum, x, w, mean, inv_std, dx)
    parts = cp.empty((2, -(-T // CHUNK), d), x.dtype)
    _per_chunk("layernorm_backward_weights", T, d, d, dy, x, mean, inv_std, parts)
    dw, db = parts.sum(1)
    return dx, dw, db


def gelu_forward(x: Array) -> tuple[Array, tuple]:
    """GELU(x) = x/2 (1 + tanh q(x)),  q(x) = c (x + a x³),  c = sqrt(2/π), a = 0.044715; any shape."""
    return _bias_gelu_forward(x, None)


def gelu_backward(dy: Array, cache: tuple) -> Array:
    """GELU' = (1 + tanh q)/2 + x/2 (1 - tanh² q) q'(x),  q'(x) = c (1 + 3 a x²)."""
    x, b = cache
    dx, d = cp.empty(x.shape, x.dtype), x.shape[-1]
    _per_token("bias_gelu_backward", x.size // d, d, dy, x, b, dx)
    return dx


def _bias_gelu_forward(x: Array, b: Array | None) -> tuple[Array, tuple]:
    """GELU(x + b); x (..., d), b (d). Its backward is `gelu_backward`."""
    y, d = cp.empty(x.shape, x.dtype), x.shape[-1]
    _per_token("bias_gelu_forward", x.size // d, d, x, b, y)
    return y, (x, b)


def dropout_forward(x: Array, rate: float, rng: numpy.random.Generator | None) -> tuple[Array, tuple | None]:
    """Zero a fraction `rate` of x and divide the rest by 1 - rate, so the mean stays; rng None: x itself.

    `rng` draws one key, the device hashes it with the place of each element.
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
    dE = cp.empty((V, d), dx.dtype)
    _launch("embedding_backward", (V, -(-d // 32)), (32, 8), tokens.size, d, tokens.astype(numpy.int32), dx, dE)
    return dE


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, tuple]:
    """Mean over all tokens of -log softmax(logits)[target], in nats; logits (..., V), targets (...)."""
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).astype(numpy.int32)
    losses = cp.empty(targets.shape, logits.dtype)
    _per_token("cross_entropy_forward", *logits.shape, logits, targets, losses)
    return losses.mean(), (logits, targets)


def cross_entropy_backward(dloss: float, cache: tuple) -> Array:
    """∂(log Σ exp(x) - x_target)/∂x = softmax(x) - onehot(target), over T for the mean; (T, V)."""
    logits, targets = cache
    dlogits = cp.empty(logits.shape, logits.dtype)
    _per_token("cross_entropy_backward", *logits.shape, dloss / len(logits), logits, targets, dlogits)
    return dlogits


# ---- the wedge product --------------------------------------------------------------------------------

# One by one, as in grassmann.py. The mixing layer below has kernels of its own.
pairs = functools.lru_cache(_borrowed(grassmann.pairs.__wrapped__))
plucker_forward, plucker_backward = _borrowed(grassmann.plucker_forward), _borrowed(grassmann.plucker_backward)
plucker = _borrowed(grassmann.plucker)
unit_area_forward = _borrowed(grassmann.unit_area_forward)
unit_area_backward = _borrowed(grassmann.unit_area_backward)


# ---- the mixing layer ---------------------------------------------------------------------------------

partner_forward, partner_backward = _borrowed(grassmann.partner_forward), _borrowed(grassmann.partner_backward)


@functools.cache
def _deltas(offsets: tuple[int, ...]) -> Array:
    """The offsets, on the device."""
    return cp.asarray(offsets, numpy.int32)


@functools.cache
def _index_pairs(r: int) -> tuple[Array, Array]:
    """`pairs`, on the device."""
    i, j = grassmann.pairs(r)
    return cp.asarray(i, numpy.int32), cp.asarray(j, numpy.int32)


def _wedge_forward(z: Array, taps: Array | None, offsets: tuple[int, ...], normalize: bool, past: int = 0):
    """z_t ∧ partner_t in one pass, from the token `past` on: z (B, L, r), taps (m, r) -> p (B, L - past, n)."""
    B, L, r = z.shape
    i, j = _index_pairs(r)
    s, p = (cp.empty((B, L - past, size), z.dtype) for size in (r, len(i)))
    sizes = L, past, r, len(offsets), len(i), normalize
    _per_token("wedge_forward", B * (L - past), *sizes, _deltas(offsets), i, j, z, taps, s, p)
    return p, (z, taps, offsets, normalize, s)


def _wedge_backward(dp: Array, cache: tuple) -> tuple[Array, Array | None]:
    """dz (B, L, r) and dtaps (m, r), or None: `plucker_backward`, then `partner_backward`."""
    z, taps, offsets, normalize, s = cache
    (_, L, r), m, T = z.shape, len(offsets), z.size // z.shape[-1]
    dz, ds, deltas = cp.empty(z.shape, z.dtype), cp.empty(z.shape, z.dtype), _deltas(offsets)
    _per_token("wedge_backward", T, L, r, m, dp.shape[-1], normalize, deltas, dp, z, taps, s, dz, ds)
    _per_token("partner_backward", T, L, r, m, normalize, deltas, z, taps, ds, dz)
    if taps is None:
        return dz, None
    parts = cp.empty((-(-T // CHUNK), m, r), z.dtype)
    _per_chunk("taps_backward", T, m * r, L, r, m, deltas, z, ds, parts)
    return dz, parts.sum(0)


def gate_forward(h: Array, g: Array, W: Array, b: Array) -> tuple[Array, tuple]:
    """α = sigmoid([h ; g] W + b), out = α ⊙ h + (1-α) ⊙ g = g + α ⊙ (h-g); h, g (..., d), W (2d, d), b (d)."""
    d, T = len(b), h.size // len(b)
    hg, out = cp.concatenate([h.reshape(T, d), g.reshape(T, d)], 1), cp.empty(h.shape, h.dtype)
    alpha, c_product = _product(hg, W)
    _per_token("gate_forward", T, d, hg, b, alpha, out)
    return out, (hg, alpha, c_product)


def gate_backward(dout: Array, cache: tuple) -> tuple[Array, Array, Array, Array]:
    """dα = dout ⊙ (h - g), and sigmoid' = α(1-α); h and g are reached directly and through the gate."""
    hg, alpha, c_product = cache
    T, d = alpha.shape
    da, dh, dg = (cp.empty(shape, dout.dtype) for shape in (alpha.shape, dout.shape, dout.shape))
    _per_token("gate_backward_logits", T, d, dout, hg, alpha, da)
    dhg, dW, db = linear_backward(da, c_product)
    _per_token("gate_backward", T, d, dout, alpha, dhg, dh, dg)
    return dh, dg, dW, db


def mix_forward(h: Array, w: Params, offsets: tuple[int, ...], normalize: bool, past: dict | None = None):
    """The Grassmann mixing layer (paper, section 3): h (B, L, d) -> mix (B, L, d).

        z = h W_red + b_red              reduce                         (B, L, r)
        p = z ∧ partner(z)               look back and span a plane     (B, L, n)
        g = p W_plu + b_plu              project back                   (B, L, d)
        mix = gate(h, g)                 blend                          (B, L, d)

    `past` (streaming) holds the last max(Δ) reduced states before h and is brought up to date.
    """
    z, c_red = linear_forward(h, w["W_red"], w["b_red"])
    length, window = z.shape[1], z
    if past is not None:
        window = cp.concatenate([past["z"], z], 1) if past else z
        past["z"] = window[:, -max(offsets) :]
    p, c_wedge = _wedge_forward(window, w.get("taps"), offsets, normalize, window.shape[1] - length)
    g, c_plu = linear_forward(p, w["W_plu"], w["b_plu"])
    mix, c_gate = gate_forward(h, g, w["W_gate"], w["b_gate"])
    return mix, (c_red, c_wedge, c_plu, c_gate)


def mix_backward(dmix: Array, cache: tuple) -> tuple[Array, Params]:
    """The steps of `mix_forward` in reverse; h is used twice, so two gradients add up."""
    c_red, c_wedge, c_plu, c_gate = cache
    grads = {}
    dh, dg, grads["W_gate"], grads["b_gate"] = gate_backward(dmix, c_gate)
    dp, grads["W_plu"], grads["b_plu"] = linear_backward(dg, c_plu)
    dz, dtaps = _wedge_backward(dp, c_wedge)
    if dtaps is not None:
        grads["taps"] = dtaps
    dh_red, grads["W_red"], grads["b_red"] = linear_backward(dz, c_red)
    return dh + dh_red, grads


# ---- attention, to compare with -----------------------------------------------------------------------

attention_forward, attention_backward = _borrowed(grassmann.attention_forward), _borrowed(grassmann.attention_backward)


# ---- the block ----------------------------------------------------------------------------------------


def ffn_forward(x: Array, w: Params) -> tuple[Array, tuple]:
    """GELU(x W_1 + b_1) W_2 + b_2, each token by itself; x (..., d)."""
    a, c_1 = _product(x, w["W_1"])
    a, c_gelu = _bias_gelu_forward(a, w["b_1"])
    out, c_2 = linear_forward(a, w["W_2"], w["b_2"])
    return out, (c_1, c_gelu, c_2)


ffn_backward = _borrowed(grassmann.ffn_backward)
mixer_forward, mixer_backward = _borrowed(grassmann.mixer_forward), _borrowed(grassmann.mixer_backward)


def prenorm_block_forward(h: Array, w: Params, config: Config, layer: int, past=None, rng=None) -> tuple[Array, tuple]:
    """h ← h + D(mix(LN1(h))),  h ← h + D(FFN(LN2(h))),  D dropout; h (B, L, d)."""
    a, c_ln1 = layernorm_forward(h, w["ln1.w"], w["ln1.b"])
    a, c_mix = mixer_forward(a, sub(w, "mix."), config, layer, past)
    a, keep_mix = dropout_forward(a, config.dropout, rng)
    h, f, c_ln2 = _add_layernorm_forward(h, a, w["ln2.w"], w["ln2.b"])
    f, c_ffn = ffn_forward(f, sub(w, "ffn."))
    f, keep_ffn = dropout_forward(f, config.dropout, rng)
    return h + f, (c_ln1, c_mix, keep_mix, c_ln2, c_ffn, keep_ffn)


def prenorm_block_backward(dout: Array, cache: tuple, config: Config) -> tuple[Array, Params]:
    """A sum h + f(h) passes its gradient on unchanged, and once more through f."""
    c_ln1, c_mix, keep_mix, c_ln2, c_ffn, keep_ffn = cache
    grads = {}
    df, ffn = ffn_backward(dropout_backward(dout, keep_ffn), c_ffn)
    dh, grads["ln2.w"], grads["ln2.b"] = _add_layernorm_backward(df, dout, c_ln2)
    da, mix = mixer_backward(dropout_backward(dh, keep_mix), c_mix, config)
    dh, grads["ln1.w"], grads["ln1.b"] = _add_layernorm_backward(da, dh, c_ln1)
    return dh, grads | prefixed("mix.", mix) | prefixed("ffn.", ffn)


def paper_block_forward(h: Array, w: Params, config: Config, layer: int, past=None, rng=None) -> tuple[Array, tuple]:
    """h ← D(LN1(mix(h))),  h ← LN2(h + D(FFN(h))),  D dropout (paper, section 3); h (B, L, d).

    The gate inside mix keeps h; attention has none and gets a residual, mix(h) = h + attention(h).
    """
    a, c_mix = mixer_forward(h, sub(w, "mix."), config, layer, past)
    residual = h if config.mixer == "attention" else None
    _, a, c_ln1 = _add_layernorm_forward(a, residual, w["ln1.w"], w["ln1.b"])
    h, keep_mix = dropout_forward(a, config.dropout, rng)
    f, c_ffn = ffn_forward(h, sub(w, "ffn."))
    f, keep_ffn = dropout_forward(f, config.dropout, rng)
    _, out, c_ln2 = _add_layernorm_forward(h, f, w["ln2.w"], w["ln2.b"])
    return out, (c_mix, c_ln1, keep_mix, c_ffn, keep_ffn, c_ln2)


paper_block_backward = _borrowed(grassmann.paper_block_backward)


# ---- the model and its loss ---------------------------------------------------------------------------

def head_forward(h: Array, E: Array) -> tuple[Array, tuple]:
    """logits = h Eᵀ; h (B, L, d), E (V, d) -> (B, L, V)."""
    logits, operands = _product(h, E.T)
    return logits, (h.shape, operands)


def head_backward(dlogits: Array, cache: tuple) -> tuple[Array, Array]:
    """dh = dlogits E,  dE = dlogitsᵀ h."""
    shape, (h, E_T) = cache
    rows = _rounded(dlogits.reshape(-1, dlogits.shape[-1]))
    return _matmul(rows, E_T.T).reshape(shape), _matmul(rows.T, h)


model_forward, model_backward = _borrowed(grassmann.model_forward), _borrowed(grassmann.model_backward)
forward = _borrowed(grassmann.forward)


def _forward_and_backward(params: Params, config: Config, x: Array, y: Array, keys: Array | None = None):
    """The loss and its gradients, each in an array of its own; the dropouts take `keys` one after the other."""
    rest = iter(() if keys is None else keys)
    rng = None if keys is None else SimpleNamespace(integers=lambda high: next(rest))  # as if it drew them
    logits, cache = model_forward(params, config, x, rng=rng)
    loss, c_loss = cross_entropy_forward(logits, y)
    return loss, model_backward(cross_entropy_backward(1.0, c_loss), cache)


@functools.lru_cache(maxsize=GRAPHS)
def _graph(*key) -> _Graph:
    """A graph of its own for all that decides what is launched where."""
    return _Graph()


def loss_and_grads(params: Params, config: Config, x: Array, y: Array, seed=None, threads: int = 1):
    """Mean cross-entropy in nats of predicting y from x, both (B, L), and its gradients (a new dict).

    `seed` (a whole number or a tuple of them) drives dropout; None switches it off. The loss is an array of
    the device, and float(loss) waits for it. `threads` is not used.

    A CUDA graph does it, from the second call on with parameters in the same place in memory, the same configuration,
    precision and shapes. Attention cannot be recorded: CuPy's products of stacks of matrices refuse.
    """
    inputs = [cp.asarray(x), cp.asarray(y)]
    if seed is not None and config.dropout:
        inputs.append(cp.asarray(numpy.random.default_rng(seed).integers(2**63, size=2 * config.n_layer + 1)))
    run = functools.partial(_forward_and_backward, params, config)
    if config.mixer == "attention":
        loss, grads = run(*inputs)
    else:
        places, shapes = [(a.data.ptr, a.dtype) for a in params.values()], [(a.shape, a.dtype) for a in inputs]
        loss, grads = _graph(config, _precision, tuple(places), tuple(shapes))(run, *inputs)
    return loss.copy(), Flat({name: grads[name] for name in params})


# ---- optimiser ----------------------------------------------------------------------------------------


def adamw_init(params: Params) -> dict[str, Params]:
    """The optimiser's state: running means of the gradient and of its square, zero at first."""
    return {key: Flat({name: cp.zeros_like(value) for name, value in params.items()}) for key in ("adam_m", "adam_v")}


def adamw_step(
    params: Params, grads: Params, state: dict[str, Params], step: int, lr: float,
    betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.1, eps: float = 1e-8,
) -> None:  # fmt: skip
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), in place; `step` counts from 0.

    All dicts are `Flat`, as the functions of this module return them. The decay is applied to matrices only.
    """
    beta_1, beta_2 = betas
    rates = 1 - beta_1, 1 - beta_2, 1 - beta_1 ** (step + 1), 1 - beta_2 ** (step + 1), lr, lr * weight_decay, eps
    buffers = (flat.buffer for flat in (grads, params, state["adam_m"], state["adam_v"]))
    _per_element("adamw", params.buffer.size, numpy.int64(params.matrices), *map(float, rates), *buffers)


def clip_grads(grads: Params, max_norm: float) -> Array:
    """Scale all gradients together, in place, so that their global norm is at most max_norm; returns the norm."""
    g, parts = grads.buffer, cp.empty(256, numpy.float64)
    _launch("sum_of_squares", (256,), (256,), numpy.int64(g.size), g, parts)
    norm = cp.sqrt(parts.sum())
    _per_element("clip", g.size, float(max_norm), g, norm)
    return norm


learning_rate = grassmann.learning_rate


# ---- batches and validation ---------------------------------------------------------------------------


get_batch = _borrowed(grassmann.get_batch)


def validation_loss(params: Params, config: Config, tokens: Array, threads: int = 1) -> float:
    """Mean nats per token over `tokens` (at least 2) in consecutive windows of the context, every target once."""
    tokens, targets, context = cp.asarray(tokens), len(tokens) - 1, config.context
    whole = targets // context * context
    x, y = tokens[:whole].reshape(-1, context), tokens[1 : whole + 1].reshape(-1, context)
    at_a_time = max(1, SHARD_TOKENS // context)
    chunks = [(x[k : k + at_a_time], y[k : k + at_a_time]) for k in range(0, len(x), at_a_time)]
    if whole < targets:
        chunks.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))
    losses = [cross_entropy_forward(forward(params, config, x), y)[0] for x, y in chunks]
    return math.fsum(float(loss) * y.size for loss, (_, y) in zip(losses, chunks, strict=True)) / targets


# ---- streaming and sampling ---------------------------------------------------------------------------

stream_init, stream_step = _borrowed(grassmann.stream_init), _borrowed(grassmann.stream_step)


def sample(logits: Array, temperature: float, top_k: int | None, rng: numpy.random.Generator) -> int:
    """Draw from softmax(logits / temperature), among the top_k largest if given; temperature 0 takes the largest.

    Raises ValueError if the logits are not finite, as those of a run that diverged.
    """
    return grassmann.sample(cp.asnumpy(logits), temperature, top_k, rng)


generate = _borrowed(grassmann.generate)


# ---- checkpoints --------------------------------------------------------------------------------------


def save_checkpoint(path, params: Params, config: Config, **extra) -> None:
    """Fetch all arrays and write grassmann.py's file. Raises OSError and ValueError, as there."""

    def on_host(value):
        if not grassmann._is_arrays(value):
            return value
        return {name: cp.asnumpy(a) for name, a in value.items()}

    grassmann.save_checkpoint(path, on_host(params), config, **{key: on_host(value) for key, value in extra.items()})


def load_checkpoint(path) -> tuple[Params, Config, dict]:
    """Read a checkpoint of either module: (params, config, extra). Raises OSError and ValueError, as grassmann.py."""
    params, config, extra = grassmann.load_checkpoint(path)
    return Flat(params), config, {k: Flat(v) if grassmann._is_arrays(v) else v for k, v in extra.items()}
