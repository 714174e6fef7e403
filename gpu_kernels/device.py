"""How gpu.py reaches CUDA: kernels, cuBLAS's matrix products, arrays in one buffer, and a training
step recorded as a CUDA graph. (This file is not called cuda.py, because CuPy imports a package of
that name.)"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cupy as cp
import numpy

Array = cp.ndarray
WORKSPACE = 2**25  # bytes of memory that cuBLAS may use: its default on an H100
ALIGNED = 64  # numbers: every array of a `Flat` begins at a multiple of 256 bytes
tf32 = False  # `set_precision`

# ---- kernels -------------------------------------------------------------------------------------


@functools.cache
def _kernels(real: numpy.dtype) -> Callable:
    """kernels.cu, compiled at its first use for real = float32 or float64: name -> kernel."""
    code = Path(__file__).with_name("kernels.cu").read_text(encoding="utf-8")
    code = code.encode(
        "ascii", "backslashreplace"
    ).decode()  # CuPy writes it to a file in the locale's encoding
    in_c = {"float32": "float", "float64": "double"}[real.name]
    return functools.cache(
        cp.RawModule(code=code, options=(f"-Dreal={in_c}", "--std=c++17")).get_function
    )


def launch(name: str, blocks: int, *args) -> None:
    """Start a kernel of kernels.cu; its `real` is the dtype of the first array of floats.

    Arrays are made contiguous, unless given as [a]. None becomes a null pointer. Numbers get the
    kernel's types.
    """
    real = next(
        (a.dtype for a in args if isinstance(a, Array) and a.dtype.kind == "f"),
        numpy.dtype(numpy.float32),
    )
    typed = {
        int: numpy.int32,
        float: real.type,
        type(None): lambda a: numpy.intp(0),
        list: lambda a: a[0],
        Array: cp.ascontiguousarray,
    }
    _kernels(real)(name)(
        (blocks,), (32, 8), tuple(typed.get(type(a), lambda a: a)(a) for a in args)
    )


def per_element(name: str, n: int, *args) -> None:
    """One thread for each of n elements."""
    launch(name, -(-n // 256), numpy.int64(n), *args)


def chunks(T: int) -> tuple[int, int]:
    """The number of blocks for T tokens, at most 512, which fill a GPU, and a block's tokens, a
    multiple of 8."""
    chunk = 8 * -(-T // 4096)
    return -(-T // chunk), chunk


def per_token(name: str, T: int, *args) -> None:
    """One warp for each of T tokens, one block for each chunk of tokens."""
    blocks, chunk = chunks(T)
    launch(name, blocks, T, chunk, *args)


@dataclass
class Parts:
    """An unfinished sum over tokens: array (blocks, ...) has the sum of each block."""

    array: Array


def parts_of(T: int, *shape: int, dtype: numpy.dtype) -> Array:
    """A new array for the sums of the blocks of `per_token`: (blocks, *shape)."""
    return cp.empty((chunks(T)[0], *shape), dtype)


# ---- matrix products -----------------------------------------------------------------------------


def set_precision(precision: str) -> None:
    """How float32 matrices are multiplied from now on: "float32", as they are, or "tf32", rounded
    to 10 bits after the point on tensor cores. Sums and weights are always float32. Raises
    ValueError on another word or an older GPU."""
    global tf32
    if precision not in ("float32", "tf32"):
        raise ValueError(f"precision must be float32 or tf32, not {precision!r}")
    if precision == "tf32" and int(cp.cuda.Device().compute_capability) < 80:
        raise ValueError("tf32 needs compute capability 8.0 or newer: use float32 on this GPU")
    tf32 = precision == "tf32"


@functools.cache
def _cublas() -> tuple[ctypes.CDLL, Array]:
    """The cuBLAS library, which CuPy has loaded, and its workspace."""
    version = cp.cuda.cublas.getVersion(cp.cuda.get_cublas_handle()) // 10000
    name = f"cublas64_{version}.dll" if os.name == "nt" else f"libcublas.so.{version}"
    return ctypes.CDLL(name), cp.empty(WORKSPACE, numpy.uint8)


def row_stride(x: Array) -> int | None:
    """The distance between rows of a matrix, or of each matrix in a stack; None if a row is not
    contiguous."""
    if x.flags.c_contiguous:
        return x.shape[-1]
    row, column = (stride // x.itemsize for stride in x.strides[-2:])
    return row if (column == 1 or x.shape[-1] == 1) and row >= x.shape[-1] else None


def _operand(x: Array) -> tuple[int, Array, int]:
    """Whether memory holds xᵀ; x, or a contiguous copy if need be; the distance between rows in
    memory."""
    for transposed, m in enumerate((x, x.swapaxes(-1, -2))):
        if apart := row_stride(m):
            return transposed, x, apart
    return 0, cp.ascontiguousarray(x), x.shape[-1]


def product(a: Array, b: Array, out: Array | None = None, add: bool = False) -> Array:
    """a b for a (..., in), b (in, out), or for two stacks of matrices, (..., rows, in) and (...,
    in, out).

    Both have the same dtype, float32 or float64. `out` may be some columns of an array. With `add`
    the product is added to `out`. CuPy's own product cannot be recorded in a CUDA graph. cuBLAS
    stores matrices by columns, so it computes (a b)ᵀ = bᵀ aᵀ. Raises RuntimeError if cuBLAS
    refuses, ValueError if the stacks differ.
    """
    library, workspace = _cublas()
    runtime, cublas, pointer = cp.cuda.runtime, cp.cuda.cublas, ctypes.c_void_p
    types = {"float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F}
    real, compute = ctypes.c_float, cublas.CUBLAS_COMPUTE_32F
    if a.dtype == numpy.float64:
        real, compute = ctypes.c_double, cublas.CUBLAS_COMPUTE_64F
    elif tf32:
        compute = cublas.CUBLAS_COMPUTE_32F_FAST_TF32
    stack = b.ndim > 2
    if stack and a.shape[:-2] != b.shape[:-2]:
        raise ValueError(
            f"both stacks must have the same number of matrices, not {a.shape} and {b.shape}"
        )
    result = cp.empty((*a.shape[:-1], b.shape[-1]), a.dtype) if out is None else out
    a, b, out = (
        m.reshape(-1, *m.shape[-2:]) if stack else m.reshape(-1, m.shape[-1])
        for m in (a, b, result)
    )
    (a_transposed, a, a_row), (b_transposed, b, b_row) = _operand(a), _operand(b)

    def matrix(x: Array, apart: int) -> tuple:
        to_next = [ctypes.c_longlong(x.strides[0] // x.itemsize)] if stack else []
        return pointer(x.data.ptr), types[x.dtype.name], apart, *to_next

    multiply = library.cublasGemmStridedBatchedEx if stack else library.cublasGemmEx
    handle, size = pointer(cp.cuda.get_cublas_handle()), ctypes.c_size_t(workspace.nbytes)
    status = (
        library.cublasSetStream_v2(handle, pointer(cp.cuda.get_current_stream().ptr)),
        library.cublasSetWorkspace_v2(handle, pointer(workspace.data.ptr), size),
        multiply(
            handle,
            b_transposed,
            a_transposed,
            b.shape[-1],
            *a.shape[-2:],
            ctypes.byref(real(1)),
            *matrix(b, b_row),
            *matrix(a, a_row),
            ctypes.byref(real(add)),
            *matrix(out, row_stride(out)),
            *([len(a)] if stack else []),
            compute,
            cublas.CUBLAS_GEMM_DEFAULT,
        ),
    )
    if any(status):
        raise RuntimeError(
            f"cuBLAS refuses a product of {a.shape} and {b.shape}, "
            f"{a.dtype} and {b.dtype}: {status}"
        )
    return result


def over_tokens(a: Array, b: Array, out: Array | None = None) -> Array:
    """aᵀ b = Σ_t a_t b_tᵀ for a (..., i), b (..., j): the gradient of a matrix (i, j)."""
    return product(a.reshape(-1, a.shape[-1]).T, b.reshape(-1, b.shape[-1]), out)


@contextlib.contextmanager
def recordable_products() -> Iterator[None]:
    """Within the `with` block a @ b of CuPy's arrays is `product`, so that plain array code can be
    recorded."""
    Array.__matmul__ = product
    try:
        yield
    finally:
        del Array.__matmul__  # the method that CuPy's class inherits is found again


# ---- arrays in one buffer ------------------------------------------------------------------------


class Flat(dict):
    """A dict of arrays that are views of one `buffer`: matrices, then vectors. Copies of `arrays`,
    or zeros."""

    def __init__(self, arrays: dict, copy: bool = True):
        self.places, end = {}, 0  # name -> where its array begins in the buffer
        for name in sorted(arrays, key=lambda name: arrays[name].ndim == 1):
            self.places[name], end = end, end + -(-arrays[name].size // ALIGNED) * ALIGNED
        vectors = [self.places[name] for name, a in arrays.items() if a.ndim == 1]
        self.matrices = min(
            vectors, default=end
        )  # numbers of matrices, which come first, and decay
        self.buffer = cp.zeros(end, arrays[next(iter(arrays))].dtype)
        for name, a in arrays.items():
            place = self.places[name]
            self[name] = self.buffer[place : place + a.size].reshape(a.shape)
            if copy:
                self[name][...] = cp.asarray(a)
        self.step: Step | None = None  # if these are parameters: the recorded step that trains them


class Gradients(Flat):
    """The gradients of all parameters. `table` tells a kernel where each layer has left its
    gradients."""

    def __init__(self, params: Flat):
        super().__init__(params, copy=False)
        self.table = cp.empty((len(params), 5), numpy.int64)

    def gather(self, grads: dict) -> None:
        """Copy all gradients into the buffer, and add up `Parts`. Raises ValueError on another
        shape or dtype."""
        self.rows, threads = [], 0
        for name, home in self.items():
            g = grads[name].array if isinstance(grads[name], Parts) else grads[name][None]
            if g.shape[1:] != home.shape or g.dtype != home.dtype:
                raise ValueError(
                    f"the gradient of {name} must have shape {home.shape} and dtype {home.dtype}; "
                    f"its layer returns {g.shape[1:]} and {g.dtype}"
                )
            if g.data.ptr != home.data.ptr:  # (else it was written here)
                g = grads[name] = g if g[0].flags.c_contiguous else cp.ascontiguousarray(g)
                self.rows.append(
                    (threads, self.places[name], g.data.ptr, len(g), g.strides[0] // g.itemsize)
                )
                threads += home.size
        if (
            not cp.cuda.get_current_stream().is_capturing()
        ):  # (else `Step` fills the table when all is recorded)
            self.fill_table()
        per_element("gather", threads, len(self.rows), self.table, self.buffer)

    def fill_table(self) -> None:
        self.table[: len(self.rows)].set(numpy.array(self.rows))


# ---- CUDA graphs ---------------------------------------------------------------------------------


class Graph:
    """Everything that function() starts on the GPU, recorded, so that the host can start it with
    one call.

    Recording computes nothing. The function has run before, so its kernels are compiled. All its
    arrays keep their places in the graph's own pool of memory. So the next call overwrites the
    outputs. Raises RuntimeError, MemoryError.
    """

    def __init__(self, function: Callable):
        self.memory = memory = []

        def malloc(size: int) -> cp.cuda.MemoryPointer:
            memory.append(
                cp.cuda.Memory(size)
            )  # kept; a full GPU would reuse memory that the graph writes to
            return cp.cuda.MemoryPointer(memory[-1], 0)

        self.pool = cp.cuda.MemoryPool(malloc)
        gc.collect()  # freeing another graph during the recording would spoil it
        cp.get_default_memory_pool().free_all_blocks()  # the memory of the function's first run
        self.stream = stream = cp.cuda.Stream(non_blocking=True)
        with stream, cp.cuda.using_allocator(self.pool.malloc):
            try:
                stream.begin_capture()
                self.outputs = function()
            except BaseException:
                with contextlib.suppress(
                    Exception
                ):  # its error says that recording failed, not why
                    stream.end_capture()
                raise
            self.graph = stream.end_capture()

    def __call__(self):
        self.graph.launch()
        return self.outputs

    def __del__(self) -> None:
        """Give the memory back to the GPU. Dropping the pool alone would not do this."""
        self.graph = self.outputs = None
        self.memory.clear()
        self.pool.free_all_blocks()


class Step:
    """A recorded training step. It owns the graphs, their inputs, and the gradients, which last
    until the next step. `key` is everything except the parameters that the recording depends on.
    Another key needs another Step."""

    def __init__(self, key: tuple, params: Flat, inputs: int):
        self.key, self.gradients = key, Gradients(params)
        self.inputs, self.graphs = (
            cp.zeros(inputs, numpy.int64),
            {},
        )  # words of 64 bits; name -> graph, if there is one

    def send(self, *words: numpy.ndarray) -> None:
        """Copy the inputs to their place, with one call."""
        words = numpy.concatenate([word.view(numpy.int64) for word in words])
        stream, to_gpu = cp.cuda.get_current_stream(), cp.cuda.runtime.memcpyHostToDevice
        cp.cuda.runtime.memcpyAsync(
            self.inputs.data.ptr, words.ctypes.data, words.nbytes, to_gpu, stream.ptr
        )

    def run(self, name: str, function: Callable):
        """function(): kernel by kernel in the first call, recorded in the second call, launched
        from then on."""
        if name not in self.graphs:
            self.graphs[name] = None
            return function()
        if self.graphs[name] is None:
            try:
                self.graphs[name] = Graph(function)
                self.gradients.fill_table()
            except (RuntimeError, MemoryError) as error:
                self.graphs[name] = False  # do not try again
                warnings.warn(
                    f"training runs without a CUDA graph, kernel by kernel: {error}", stacklevel=3
                )
        return (self.graphs[name] or function)()
