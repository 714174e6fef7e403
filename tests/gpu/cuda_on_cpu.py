"""A stand-in for CuPy that computes on the CPU, so that gpu.py and kernels.cu run without a GPU.

Its arrays hold NumPy arrays, but like CuPy arrays they refuse to meet an array of the host. New
memory holds NaN (in a recording, at every launch), and kernels see their arguments between guards.
So the tests notice numbers that were never written, and numbers written beside an array. Kernels
come from kernels.cu, compiled by the host's C++ compiler after cuda_on_cpu.h. A graph repeats at
each launch what ran while its stream captured; copies between host and device then raise, as on a
GPU. `started` lists what was started. Only what gpu.py and gpu_kernels/device.py use is here.
"""

import contextlib
import ctypes
import hashlib
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np

COMPILER = shutil.which("g++") if platform.libc_ver()[0] == "glibc" else None  # for its ucontext.h
HEADER = Path(__file__).with_suffix(".h")


def gpu_on_cpu(**environment: str) -> ModuleType:
    """gpu.py, as it is when its CuPy is this module. Afterwards all is as before."""
    modules = mock.patch.dict(sys.modules, cupy=sys.modules[__name__])
    with modules, mock.patch.dict(os.environ, environment):
        for name in ("gpu", "gpu_kernels", "gpu_kernels.device", "gpu_kernels.fused"):
            sys.modules.pop(name, None)
        return importlib.import_module("gpu")


# ---- arrays --------------------------------------------------------------------------------------


class Base:
    """The part of a device array that CuPy has in C code. Its subclass is below, as in CuPy."""

    __hash__ = __array_ufunc__ = None  # np.float32(2) * array comes here, np.exp(array) fails

    def __init__(self, host):
        self.host = host
        if captured is not None:
            kept.append(host)  # a graph's memory stays its own

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion to a NumPy array is not allowed; use get")

    def __getattr__(self, name):
        if name.startswith("__"):  # above all __array_interface__, which would bypass __array__
            raise AttributeError(name)
        found = getattr(self.host, name)
        return function(found) if callable(found) else device(found)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.host.ctypes.data)

    def get(self):
        crossing("to the host", self.nbytes)
        return self.host.copy()

    def set(self, numbers):
        crossing("from the host", self.nbytes)
        self.host[...] = numbers
        blanks[:] = [a for a in blanks if a is not self.host]


class ndarray(Base):
    pass


def host(value):
    """The NumPy array inside a device array, also in lists and tuples. Arrays of the host are
    refused."""
    if isinstance(value, np.ndarray):
        raise TypeError("an array of the host meets one of the device")
    if isinstance(value, (tuple, list)):
        return type(value)(map(host, value))
    return value.host if isinstance(value, ndarray) else value


def device(value):
    """The inverse of `host`. What NumPy returns as a scalar is a 0-d array in CuPy."""
    return ndarray(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value


OPERATORS = (
    "add sub mul truediv matmul radd rsub rmul rtruediv rmatmul iadd isub imul itruediv rpow and "
    "neg invert "
    "float int bool lt le gt ge eq ne getitem setitem len"
)
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem", "copyto")


def function(of_numpy):
    """A function of NumPy for device arrays. Making a view starts nothing; everything else is
    started on the device."""
    name = of_numpy.__name__.strip("_")

    def of_device(*args, **kwargs):
        args, kwargs = host(args), {name: host(value) for name, value in kwargs.items()}
        given = [getattr(of_numpy, "__self__", None), *args, *kwargs.values()]
        read = [
            a
            for x in given
            for a in (x if isinstance(x, (tuple, list)) else [x])
            if isinstance(a, np.ndarray)
        ]
        if name in ("getitem", "setitem"):  # counts only the bytes of that place
            read[0] = read[0][args[0]]
        moved = sum(a.nbytes for a in read)
        if name in IN_PLACE:
            return launched(name, lambda: of_numpy(*args, **kwargs), moved + read[0].nbytes)
        result = of_numpy(*args, **kwargs)
        if isinstance(result, (np.ndarray, np.generic)) and not any(
            np.may_share_memory(result, a) for a in read
        ):
            result = place = np.asarray(result)
            launched(
                name,
                lambda: place.__setitem__(..., of_numpy(*args, **kwargs)),
                moved + place.nbytes,
            )
        return device(result)

    return of_device


started = []  # (name, bytes read and written, multiply-adds, …) of everything that was started
captured = (
    None  # while a stream captures: a list as `started`, with functions; a None in it: it is spoilt
)
kept = []  # arrays of the graph
blanks = []  # arrays that are new memory at each launch of the graph
dry = False  # if True, nothing is computed, only counted


def launched(name, compute, moved, multiply_adds=0):
    """Start compute(). While a stream captures, compute() runs only when the graph is launched."""
    (started if captured is None else captured).append((name, moved, multiply_adds, compute))
    if captured is None and not dry:
        compute()


def not_while_capturing():
    if captured is not None:
        captured.append(None)
        raise RuntimeError("cudaErrorStreamCaptureUnsupported: not when a stream is capturing")


def crossing(direction, nbytes):
    not_while_capturing()
    started.append((direction, nbytes, 0, None))


for _name in OPERATORS.split():

    def _method(self, *others, name=f"__{_name}__"):
        if name in ("__matmul__", "__rmatmul__"):
            not_while_capturing()  # CuPy refuses its products too
        if name in ("__float__", "__int__", "__bool__"):
            crossing("to the host", self.nbytes)
        if name == "__getitem__" and isinstance(others[0], int):
            others = ((*others, ...),)  # a view, not a number as in NumPy
        result = function(getattr(self.host, name))(*others)
        return self if name.strip("_") in IN_PLACE else result  # as after +=

    setattr(Base, f"__{_name}__", _method)

NAMES = (
    "arange ascontiguousarray concatenate copyto einsum empty_like exp log matmul maximum ones "
    "sqrt square stack tanh tri where zeros zeros_like"
)
for _name in NAMES.split():
    globals()[_name] = function(getattr(np, _name))
inf, finfo, float64 = np.inf, np.finfo, np.float64
linalg = SimpleNamespace(norm=function(np.linalg.norm))


def asarray(value, dtype=None):
    """From host or device, without a copy if it is on the device already."""
    if isinstance(value, ndarray):
        return value if dtype in (None, value.dtype) else value.astype(dtype)
    copy = ndarray(np.array(value, dtype))
    crossing("from the host", copy.nbytes)
    return copy


array = asarray  # for arrays of the host


def empty(shape, dtype=float):
    """New memory. It holds NaN, or for whole numbers a token, so that a test notices if it is
    read."""
    blank = ndarray(np.empty(shape, dtype))
    if not dry or np.dtype(dtype).kind != "f":
        blank.host[...] = np.nan if np.dtype(dtype).kind == "f" else 1
    if captured is not None:
        blanks.append(blank.host)
    return blank


# ---- kernels -------------------------------------------------------------------------------------

GUARD = 1024  # elements on either side of an argument


class RawModule:
    """CUDA source, compiled for the CPU."""

    def __init__(self, code: str, options: tuple[str, ...] = ()):
        """The library is compiled once for a source and kept in __pycache__."""
        real = {"float": "f4", "double": "f8"}[options[0].removeprefix("-Dreal=")]
        self.dtypes = {  # of C types, and of kernels.cu's names of pointers
            "int": "i4",
            "wide": "i8",
            "double*": "f8",
            "int*": "i4",
            "bytes": "u1",
            "real": real,
            "real*": real,
            "in": real,
            "out": real,
            "words": "i8",
            "indices": "i4",
        }
        kernels = re.findall(
            r'extern "C" __global__ void (?:__launch_bounds__\(\w+\) )?(\w+)\(([^)]*)\)', code
        )
        self.signatures = {
            name: [tuple(parameter.strip().rsplit(" ", 1)) for parameter in parameters.split(",")]
            for name, parameters in kernels
        }  # (type, name) of each parameter
        source = (
            HEADER.read_text() + code + "".join(f"LAUNCHER({name})\n" for name in self.signatures)
        )
        flags = ["-x", "c++", "-std=c++11", "-O1", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC"]
        command = [COMPILER, *flags, *options, "-", "-o"]
        if dry:
            return
        key = hashlib.sha256((source + str(command)).encode()).hexdigest()[:16]
        library = HEADER.parent / "__pycache__" / f"kernels-{key}.so"
        if not library.exists():
            library.parent.mkdir(exist_ok=True)
            unfinished = library.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, unfinished], input=source, text=True, check=True)
            unfinished.replace(library)
        self.library = ctypes.CDLL(str(library))

    def get_function(self, name: str):
        def run(grid: tuple, block: tuple, args: tuple) -> None:
            launch, parameters = self.library[f"launch_{name}"], self.signatures[name]
            launch.restype, guarded, numbers = ctypes.c_char_p, {}, []
            for value, (kind, parameter) in zip(args, parameters, strict=True):
                pointer = kind.endswith("*") or kind in ("in", "out", "words", "indices", "bytes")
                dtype = np.dtype(self.dtypes[kind.removeprefix("const ")])
                fine = type(value) is np.intp and value == 0  # the null pointer
                if isinstance(value, ndarray) and pointer:
                    whole = value.host if value.flags.c_contiguous else value.host.base
                    rows_contiguous = value.strides[-1:] in ((), (value.itemsize,))
                    fine = value.dtype == dtype and whole.flags.c_contiguous and rows_contiguous
                    beside = (
                        -77.25 if dtype.kind == "f" else 1
                    )  # a test notices if this is read or changed
                    room = np.pad(whole.ravel(), GUARD, constant_values=beside)
                    room, *_ = guarded.setdefault(whole.ctypes.data, (room, whole, beside))
                    place = value.data.ptr - whole.ctypes.data + GUARD * dtype.itemsize
                    value = np.intp(room.ctypes.data + place)
                elif not pointer:
                    fine = isinstance(value, np.generic) and value.dtype == dtype
                assert fine, f"{name}: {parameter} is {value!r}"
                numbers.append(np.array(value))
            addresses = (ctypes.c_void_p * len(numbers))(*(n.ctypes.data for n in numbers))
            if error := launch(*grid, *block, *[1] * (2 - len(block)), addresses):
                raise RuntimeError(f"{name}: {error.decode()}")
            for room, whole, beside in guarded.values():
                guards = np.r_[room[:GUARD], room[-GUARD:]]
                assert (guards == beside).all(), f"{name} wrote beside an array"
                whole[...] = room[GUARD:-GUARD].reshape(whole.shape)

        def start(grid: tuple, block: tuple, args: tuple) -> None:
            arrays = {a.data.ptr: a.nbytes for a in args if isinstance(a, ndarray)}
            launched(name, lambda: run(grid, block, args), sum(arrays.values()))

        return start


# ---- cuBLAS --------------------------------------------------------------------------------------

VERSION = 99  # of a libcublas.so that does not exist
REALS = {0: np.float32, 1: np.float64}  # CUDA_R_32F, CUDA_R_64F
F32, F64, TF32 = 68, 70, 77  # how cuBLAS computes, and for which types:
PRODUCTS = {(0, 0, 0, F32), (0, 0, 0, TF32), (1, 1, 1, F64)}


def matrix(memory: ctypes.c_void_p, kind: int, rows: int, columns: int, ld: int, transposed=0):
    """A matrix (rows, columns) as cuBLAS sees it: by columns, each `ld` numbers from the last."""
    if transposed:
        return matrix(memory, kind, columns, rows, ld).T
    assert ld >= rows > 0 and columns > 0, "CUBLAS_STATUS_INVALID_VALUE"
    size = np.dtype(REALS[kind]).itemsize
    memory = (ctypes.c_char * (size * ((columns - 1) * ld + rows))).from_address(memory.value)
    return np.ndarray((rows, columns), REALS[kind], memory, strides=(size, size * ld))


def rounded(x: np.ndarray) -> np.ndarray:
    """A matrix as a tensor core sees it in TF32: rounded to 10 bits after the point."""
    return ((np.ascontiguousarray(x).view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


class Cublas:
    """The functions that gpu_kernels/device.py calls, with the parameters of NVIDIA's
    cublas_api.h."""

    def cublasSetStream_v2(self, handle, stream):
        self.stream = stream.value or 0
        return 0 if handle.value else 1

    def cublasSetWorkspace_v2(self, handle, workspace, size):
        return 0 if workspace.value and size.value > 4096 else 7

    def cublasGemmEx(self, *args):
        """C = alpha op(A) op(B) + beta C: a stack of one matrix."""
        no = ctypes.c_longlong(0)
        return self.cublasGemmStridedBatchedEx(
            *args[:10], no, *args[10:13], no, *args[13:17], no, 1, *args[17:]
        )

    def cublasGemmStridedBatchedEx(
        self,
        handle,
        transa,
        transb,
        m,
        n,
        k,
        alpha,
        A,
        Atype,
        lda,
        strideA,
        B,
        Btype,
        ldb,
        strideB,
        beta,
        C,
        Ctype,
        ldc,
        strideC,
        count,
        compute,
        algo,
    ):
        """C = alpha op(A) op(B) + beta C for each of `count` matrices, which lie `stride` numbers
        apart."""
        if (Atype, Btype, Ctype, compute) not in PRODUCTS:
            return 15  # CUBLAS_STATUS_NOT_SUPPORTED
        assert self.stream == get_current_stream().ptr and handle.value
        number = ctypes.c_double if compute == F64 else ctypes.c_float
        assert type(alpha._obj) is type(beta._obj) is number  # by ctypes.byref
        assert alpha._obj.value == 1 and beta._obj.value in (0, 1)
        more, size = beta._obj.value == 1, np.dtype(REALS[Atype]).itemsize

        def stack(memory, stride, *how):
            return [
                matrix(ctypes.c_void_p(memory.value + i * stride.value * size), Atype, *how)
                for i in range(count)
            ]

        As, Bs = stack(A, strideA, m, k, lda, transa), stack(B, strideB, k, n, ldb, transb)
        Cs = stack(C, strideC, m, n, ldc)

        @np.errstate(all="ignore")  # a BLAS may compute with numbers beside a small matrix
        def multiply():
            for a, b, c in zip(As, Bs, Cs, strict=True):
                product = rounded(a) @ rounded(b) if compute == TF32 else a @ b
                c[...] = c + product if more else product

        moved = count * (As[0].nbytes + Bs[0].nbytes + (1 + more) * Cs[0].nbytes)
        launched("product", multiply, moved, count * m * n * k)
        return 0


load = ctypes.CDLL  # which is how gpu_kernels/device.py asks for the library
LIBRARIES = f"libcublas.so.{VERSION}", f"cublas64_{VERSION}.dll"
ctypes.CDLL = lambda name, *how, **more: Cublas() if name in LIBRARIES else load(name, *how, **more)

# ---- the rest of the library that gpu.py touches -------------------------------------------------


class Stream:
    """Work is done at once, whatever the stream."""

    def __init__(self, non_blocking: bool = False):
        self.ptr, self.is_capturing = id(self), lambda: captured is not None

    def __enter__(self):
        streams.append(self)

    def __exit__(self, *_):
        streams.pop()

    def begin_capture(self):
        global captured, kept, blanks
        assert get_current_stream() is self and captured is None
        captured, kept, blanks = [], [], []

    def end_capture(self):
        global captured
        work, captured = captured, None
        if None in work:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated: due to a previous error")
        moved, multiply_adds = (sum(node[k] for node in work) for k in (1, 2))

        def compute(new=blanks):
            for a in new:
                a[...] = np.nan if a.dtype.kind == "f" else 1
            for *_, node in work:
                node()

        return SimpleNamespace(
            nodes=work, kept=kept, launch=lambda: launched("graph", compute, moved, multiply_adds)
        )


streams = [SimpleNamespace(ptr=0, is_capturing=lambda: False)]  # the current one last


def get_current_stream():
    return streams[-1]


def memcpy_async(to, source, size, kind, stream):
    assert kind == 1 and stream == get_current_stream().ptr
    crossing("from the host", size)
    ctypes.memmove(to, source, size)


def get_default_memory_pool(malloc=None):  # memory is NumPy's, whatever the allocator
    return SimpleNamespace(malloc=malloc, free_all_blocks=not_while_capturing)


cuda = SimpleNamespace(
    Device=lambda *_: SimpleNamespace(
        compute_capability="90", synchronize=not_while_capturing, use=int
    ),
    Stream=Stream,
    get_current_stream=get_current_stream,
    get_cublas_handle=lambda: 0xB1A5,
    Memory=bytearray,
    MemoryPointer=lambda *place: place,
    MemoryPool=get_default_memory_pool,
    using_allocator=lambda malloc: contextlib.nullcontext(malloc(512)),
    runtime=SimpleNamespace(
        CUDA_R_32F=0,
        CUDA_R_64F=1,
        memcpyHostToDevice=1,
        memcpyAsync=memcpy_async,
        getDeviceCount=lambda: 1,
    ),
    cublas=SimpleNamespace(
        getVersion=lambda handle: VERSION * 10000,
        CUBLAS_GEMM_DEFAULT=-1,
        CUBLAS_COMPUTE_32F=F32,
        CUBLAS_COMPUTE_64F=F64,
        CUBLAS_COMPUTE_32F_FAST_TF32=TF32,
    ),
)
