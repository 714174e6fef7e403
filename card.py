"""How gpu.py reaches the card: its kernels, cuBLAS's matrix products, both in a CUDA graph, and
arrays that lie in one buffer."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy

try:
    import cupy as cp

    cp.ones((2, 2)) @ cp.ones((2, 2))  # needs it all: the driver, a device, the compiler, cuBLAS
except Exception as error:  # each of these has its own
    raise ImportError(
        "this needs a CUDA GPU, for each process one, and CuPy; if there is none yet, pip install "
        "-r requirements-gpu.txt for a driver of version 580 or newer (nvidia-smi tells) and a GTX 16, RTX 20 or newer, "
        "else -r requirements-gpu12.txt "
        f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    ) from None

Array = cp.ndarray
WORKSPACE = 2**25  # bytes of memory that cuBLAS may use, as much as it takes by itself on an H100

ALIGNED = 64  # numbers: every array of a `Flat` begins at a multiple of 256 bytes
_tf32 = False

# ---- kernels -------------------------------------------------------------------------------------

@functools.cache
def _kernels(real: numpy.dtype) -> Callable:
    """kernels.cu, compiled at its first use for real = float32 or float64: name -> kernel."""
    code = Path(__file__).with_name("kernels.cu").read_text(encoding="utf-8")
    code = code.encode("ascii", "backslashreplace").decode()  # for a file in the locale's encoding
    in_c = {"float32": "float", "float64": "double"}[real.name]
    return functools.cache(cp.RawModule(code=code, options=(f"-Dreal={in_c}",)).get_function)

def launch(name: str, blocks: int, *args) -> None:
    """Start a kernel of kernels.cu; its `real` is the dtype of the first array of floats.

    Arrays are made contiguous, but [a] is passed where it lies. CuPy passes numbers as they are:
    Python's get the kernel's types here. None is a null pointer.
    """
    real = next(a.dtype for a in args if isinstance(a, Array) and a.dtype.kind == "f")

    def typed(a):
        if isinstance(a, list):
            return a[0]
        if isinstance(a, Array):
            return cp.ascontiguousarray(a)
        if a is None:
            return numpy.intp(0)
        return numpy.int32(a) if isinstance(a, int) else real.type(a) if isinstance(a, float) else a

    _kernels(real)(name)((blocks,), (32, 8), tuple(map(typed, args)))

def per_element(name: str, n: int, *args) -> None:
    """One thread for each of n elements."""
    launch(name, -(-n // 256), numpy.int64(n), *args)

def chunks(T: int) -> tuple[int, int]:
    """How many blocks share T tokens, and how many of these each has: at most 512 blocks, which
    fill a card, of 8 tokens or a multiple."""
    chunk = 8 * -(-T // 4096)
    return -(-T // chunk), chunk

def per_token(name: str, T: int, *args) -> None:
    """One warp for each of T tokens; a block for each chunk of them."""
    blocks, chunk = chunks(T)
    launch(name, blocks, T, chunk, *args)

def parts_of(T: int, *shape: int, dtype: numpy.dtype) -> Array:
    """Room for what these blocks sum up, each over its tokens: (blocks, *shape)."""
    return cp.empty((chunks(T)[0], *shape), dtype)

# ---- matrix products -----------------------------------------------------------------------------

def set_precision(precision: str) -> None:
    """How float32 matrices are multiplied from now on; all else, sums and weights too, is float32.

    float32     as they are
    tf32        rounded to 10 bits after the point, on tensor cores (compute capability 8.0 on)

    Products of stacks of matrices, which attention and memory have, are CuPy's, always in float32.
    Raises ValueError on another word or an older card.
    """
    global _tf32
    if precision not in ("float32", "tf32"):
        raise ValueError(f"precision must be float32 or tf32, not {precision!r}")
    if precision == "tf32" and int(cp.cuda.Device().compute_capability) < 80:
        raise ValueError("tf32 needs compute capability 8.0, this card has an older one")
    _tf32 = precision == "tf32"

@functools.cache
def _cublas() -> tuple[ctypes.CDLL, Array]:
    """The library of matrix products, which CuPy has loaded, and its workspace."""
    version = cp.cuda.cublas.getVersion(cp.cuda.get_cublas_handle()) // 10000
    name = f"cublas64_{version}.dll" if os.name == "nt" else f"libcublas.so.{version}"
    return ctypes.CDLL(name), cp.empty(WORKSPACE, numpy.uint8)

def _operand(x: Array) -> tuple[int, Array, int]:
    """Whether what lies in memory is xᵀ, then x, and from where to where its rows (columns) are.

    A part of the columns of a matrix is read where it lies, too; what lies otherwise is copied.
    """
    row, column = (stride // x.itemsize for stride in x.strides)
    if x.flags.c_contiguous or (column == 1 and row >= x.shape[1]):
        return 0, x, x.shape[1] if x.flags.c_contiguous else row
    if x.flags.f_contiguous or (row == 1 and column >= x.shape[0]):
        return 1, x, x.shape[0] if x.flags.f_contiguous else column
    return 0, cp.ascontiguousarray(x), x.shape[1]

def product(a: Array, b: Array, out: Array | None = None, add: bool = False) -> Array:
    """a b for a (..., in), b (in, out) of one dtype, float32 or float64.

    `out` (..., out) may be some of the columns of an array; with `add` the product is added to it.
    CuPy's own product refuses to be recorded in a CUDA graph. cuBLAS takes columns for rows, so it
    is asked for (a b)ᵀ = bᵀ aᵀ. Raises RuntimeError if it refuses.
    """
    library, workspace = _cublas()
    runtime, cublas, pointer = cp.cuda.runtime, cp.cuda.cublas, ctypes.c_void_p
    types = {"float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F}
    real, compute = ctypes.c_float, cublas.CUBLAS_COMPUTE_32F
    if a.dtype == numpy.float64:
        real, compute = ctypes.c_double, cublas.CUBLAS_COMPUTE_64F
    elif _tf32:
        compute = cublas.CUBLAS_COMPUTE_32F_FAST_TF32
    if out is None:
        out = cp.empty((*a.shape[:-1], b.shape[1]), a.dtype)
    out_row = out.shape[-1] if out.flags.c_contiguous else out.strides[-2] // out.itemsize
    a_transposed, a, a_row = _operand(a.reshape(-1, a.shape[-1]))
    b_transposed, b, b_row = _operand(b)
    handle, size = pointer(cp.cuda.get_cublas_handle()), ctypes.c_size_t(workspace.nbytes)
    status = (
        library.cublasSetStream_v2(handle, pointer(cp.cuda.get_current_stream().ptr)),
        library.cublasSetWorkspace_v2(handle, pointer(workspace.data.ptr), size),
        library.cublasGemmEx(
            handle, b_transposed, a_transposed, b.shape[1], len(a), len(b), ctypes.byref(real(1)),
            pointer(b.data.ptr), types[b.dtype.name], b_row,
            pointer(a.data.ptr), types[a.dtype.name], a_row, ctypes.byref(real(add)),
            pointer(out.data.ptr), types[out.dtype.name], out_row,
            compute, cublas.CUBLAS_GEMM_DEFAULT),
    )
    if any(status):
        raise RuntimeError(f"cuBLAS refuses a product of {a.shape} and {b.shape}, "
                           f"{a.dtype} and {b.dtype}: {status}")
    return out

def over_tokens(a: Array, b: Array) -> Array:
    """aᵀ b = Σ_t a_t b_tᵀ for a (..., i), b (..., j), as gradients of matrices are; (i, j)."""
    return product(a.reshape(-1, a.shape[-1]).T, b.reshape(-1, b.shape[-1]))

# ---- CUDA graphs ---------------------------------------------------------------------------------

class Graph:
    """What function(*inputs) starts on the card, recorded, so that the host starts it all at once.

    To record computes nothing yet, and takes a function that has run before (its kernels are
    compiled). Every array has its place from then on: inputs are copied to theirs, the next call
    overwrites the outputs, and what lies in between is from a pool that nobody else draws from.
    """

    def __init__(self, function: Callable, inputs: list[Array]):
        """Raises what the function raises, or RuntimeError, or MemoryError."""
        self.memory = memory = []

        def malloc(size: int) -> cp.cuda.MemoryPointer:
            memory.append(cp.cuda.Memory(size))  # or a full card takes what the graph writes to
            return cp.cuda.MemoryPointer(memory[-1], 0)

        self.pool = cp.cuda.MemoryPool(malloc)
        gc.collect()  # a graph that is freed while this one is recorded would spoil it
        cp.get_default_memory_pool().free_all_blocks()  # what the function needed when it ran
        self.inputs = [a.copy() for a in inputs]
        self.stream = stream = cp.cuda.Stream(non_blocking=True)
        with stream, cp.cuda.using_allocator(self.pool.malloc):
            try:
                stream.begin_capture()
                self.outputs = function(*self.inputs)
            except BaseException:
                with contextlib.suppress(Exception):  # which says that it failed, not why
                    stream.end_capture()
                raise
            self.graph = stream.end_capture()

    def __call__(self, *inputs: Array):
        for place, a in zip(self.inputs, inputs, strict=True):
            place[...] = a
        self.graph.launch()
        return self.outputs

    def __del__(self) -> None:
        """Its memory goes back to the card, which a dropped pool alone would not do."""
        self.graph = self.inputs = self.outputs = None
        self.memory.clear()
        self.pool.free_all_blocks()

# ---- arrays in one buffer ------------------------------------------------------------------------

class Flat(dict):
    """A dict of arrays, from either side, copied into one `buffer`, whose views they become.

    If they are parameters, their gradients and the graph of their training step belong to them.
    """

    def __init__(self, arrays: dict):
        self.places, end = {}, 0  # the name -> where its array begins
        for name in sorted(arrays, key=lambda name: arrays[name].ndim == 1):
            self.places[name], end = end, end + -(-arrays[name].size // ALIGNED) * ALIGNED
        vectors = [self.places[name] for name, a in arrays.items() if a.ndim == 1]
        self.matrices = min(vectors, default=end)  # so many numbers, which decay, come first
        self.buffer = cp.zeros(end, arrays[next(iter(arrays))].dtype)
        for name, a in arrays.items():
            place = self.places[name]
            self[name] = self.buffer[place : place + a.size].reshape(a.shape)
            self[name][...] = cp.asarray(a)
        self.sources = self.table = self.key = self.graph = self.gradients = None

    def run(self, key: object, function: Callable, inputs: list[Array]) -> tuple:
        """function(*inputs), recorded by the second call in a row with this key, unless it is None:
        all that decides, beside precision and parameters, what is started where."""
        key = key and (key, _tf32)
        if key is None or self.key != key:
            self.sources = self.key = self.graph = None  # in this order: a graph's end frees what nobody holds
            outputs = function(*(a.copy() for a in inputs))  # laid out as for the graph: compiles
            self.key = key
            return outputs
        if self.graph is None:
            try:
                self.graph = Graph(function, inputs)
            except (RuntimeError, MemoryError) as error:
                self.graph = False
                warnings.warn(f"without a CUDA graph, kernel by kernel: {error}", stacklevel=3)
        return (self.graph or function)(*inputs)

    def gathered(self, grads: dict) -> Flat:
        """The gradients in one buffer, always the same; sums that came in parts are added up."""
        if self.gradients is None:
            self.gradients = Flat({name: cp.zeros_like(a) for name, a in self.items()})
        if self.sources is not grads:  # (a graph's are the same each time)
            rows = []
            for name, place in self.places.items():
                parts, apart = 1, 0
                if grads[name].shape == self[name].shape:
                    grads[name] = cp.ascontiguousarray(grads[name])
                else:
                    parts, apart = len(grads[name]), grads[name].strides[0] // self.buffer.itemsize
                rows.append((place, self[name].size, grads[name].data.ptr, parts, apart))
            self.table, self.sources = cp.asarray(numpy.array(rows)), grads
        out = self.gradients.buffer
        per_element("gather", out.size, len(self), self.table, out)
        return self.gradients
