"""A stand-in for CuPy that computes on the CPU, so that gpu.py and kernels.cu run where there is no GPU.

Its arrays are NumPy's inside, but like CuPy's they refuse to meet an array of the host: what would raise on a
card raises here. New memory holds NaN, and kernels see their arguments between guards, so that what is not
written, or beside an array, does not go unnoticed. Kernels are the same file, compiled by the host's C++
compiler behind cuda_on_cpu.h. cuBLAS is a library that ctypes loads, as on a card. What runs while a stream
captures is remembered and done again at each launch of the graph; copies between the sides raise, as on a card.
Only what gpu.py uses is here; a test compares the names with the real CuPy.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import types
from pathlib import Path

import numpy as np

# ---- arrays -------------------------------------------------------------------------------------------


class ndarray:
    """An array that lies "on the device"."""

    __hash__ = None

    def __init__(self, host):
        self.host = host

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion to a NumPy array is not allowed; use asnumpy")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):  # NumPy's scalars come here: np.float32(2) * array
        return function(getattr(ufunc, method))(*inputs, **kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):  # above all __array_interface__, a way around __array__
            raise AttributeError(name)
        found = getattr(self.host, name)
        return function(found) if callable(found) else device(found)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.host.ctypes.data)

    def __getitem__(self, key):
        return function(self.host.__getitem__)(key)

    def __setitem__(self, key, value):
        function(self.host.__setitem__)(key, value)

    def __iter__(self):
        return (self[k] for k in range(len(self)))

    def __len__(self):
        return len(self.host)

    def __repr__(self):
        return f"on_device({self.host!r})"


def host(value):
    """What is inside a device array, in lists and tuples too; arrays of the host are refused, as CuPy does."""
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {np.ndarray}: an array of the host meets one of the device")
    if isinstance(value, (tuple, list)):
        return type(value)(map(host, value))
    return value


def device(value):
    """The reverse; what NumPy returns as a scalar is a 0-d array in CuPy."""
    if isinstance(value, (np.ndarray, np.generic)):
        return ndarray(np.asarray(value))
    return type(value)(map(device, value)) if isinstance(value, (tuple, list)) else value


def function(of_numpy):
    def of_device(*args, **kwargs):
        args, kwargs = host(args), {name: host(value) for name, value in kwargs.items()}
        return launched(lambda: of_numpy(*args, **kwargs))

    return of_device


captured = None  # while a stream captures: what its graph is to do


def launched(compute):
    """What compute() gives, on the device; a graph that is being captured will compute it anew, into the same place."""
    result = device(compute())

    def again():
        parts = [(result, compute())]
        for place, new in parts:  # grows
            if isinstance(place, ndarray) and not np.shares_memory(place.host, new):
                place.host[...] = new
            elif isinstance(place, (tuple, list)):
                parts.extend(zip(place, new, strict=True))

    if captured is not None:
        captured.append(again)
    return result


def not_while_capturing():
    if captured is not None:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing")


OPERATORS = (
    "add sub mul truediv floordiv mod pow matmul and or xor lt le gt ge eq ne radd rsub rmul rtruediv rpow rmatmul "
    "iadd isub imul itruediv neg invert abs float int bool"
)
for _name in OPERATORS.split():

    def _method(self, *others, name=f"__{_name}__"):
        if name in ("__float__", "__int__", "__bool__", "__matmul__", "__rmatmul__"):  # CuPy refuses its products too
            not_while_capturing()
        result = function(getattr(self.host, name))(*others)
        return self if name.startswith("__i") and result.host is self.host else result

    setattr(ndarray, f"__{_name}__", _method)

FUNCTIONS = "arange concatenate copyto einsum exp ones sqrt stack tri triu_indices where zeros zeros_like"
for _name in FUNCTIONS.split():
    globals()[_name] = function(getattr(np, _name))
inf, finfo = np.inf, np.finfo


def asarray(value, dtype=None):
    """From either side, without a copy if it is on the device already."""
    if not isinstance(value, ndarray):
        not_while_capturing()
    return ndarray(np.asarray(value.host, dtype) if isinstance(value, ndarray) else np.array(value, dtype))


def array(value, dtype=None):
    not_while_capturing()
    return ndarray(np.array(value, dtype))


def asnumpy(value):
    not_while_capturing()
    return np.array(value.host if isinstance(value, ndarray) else value)


def ascontiguousarray(value):
    return function(np.ascontiguousarray)(value)


def empty(shape, dtype=float):
    return ndarray(np.full(shape, unwritten(dtype), dtype))


def empty_like(value):
    return ndarray(np.full_like(host(value), unwritten(value.dtype)))


def unwritten(dtype):
    """What shows if it is read: NaN, or a token that texts have."""
    return np.nan if np.dtype(dtype).kind == "f" else 1


def beside(dtype):
    """What shows if it is read or changed."""
    return -77.25 if np.dtype(dtype).kind == "f" else 1


# ---- kernels ------------------------------------------------------------------------------------------

SIGNATURE = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')
COMPILER = shutil.which("g++") if platform.libc_ver()[0] == "glibc" else None  # for its ucontext.h
HEADER = Path(__file__).with_suffix(".h")
GUARD = 1024  # elements on either side of an argument
LAUNCHES = set()  # the kernels that ran, of either precision


def signatures(source: str) -> dict[str, list[tuple[str, str]]]:
    """Name of every kernel in CUDA source -> (type, name) of its parameters."""
    return {
        name: [tuple(re.sub(r"\bconst\b", "", p).split()) for p in parameters.split(",")]
        for name, parameters in SIGNATURE.findall(source)
    }


def compiled(source: str, name: str, flags: list[str]) -> Path:
    """A shared library, made once for a source and kept beside the compiled Python files."""
    key = hashlib.sha256((source + HEADER.read_text() + str(flags)).encode()).hexdigest()[:16]
    library = HEADER.parent / "__pycache__" / f"{name}-{key}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [COMPILER, "-x", "c++", *flags, "-shared", "-fPIC", "-o", unfinished, "-"]
        subprocess.run(command, input=source, text=True, check=True)
        unfinished.replace(library)
    return library


class RawModule:
    """CUDA source, compiled for the CPU."""

    def __init__(self, code: str, options: tuple[str, ...] = ()):
        self.real = np.dtype({"-Dreal=float": "f4", "-Dreal=double": "f8"}[options[0]])
        self.signatures = signatures(code)
        launchers = "".join(f"LAUNCHER({name})\n" for name in self.signatures)
        source = f'#include "{HEADER}"\n{code}\n{launchers}'
        flags = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-sign-compare", *options]
        self.library = ctypes.CDLL(str(compiled(source, "kernels", flags)))

    def get_function(self, name: str):
        launch, parameters = self.library[f"launch_{name}"], self.signatures[name]
        launch.restype = ctypes.c_char_p
        dtypes = {"real": self.real, "int": "i4", "double": "f8", "long long": "i8"}

        def kernel(grid: tuple, block: tuple, args: tuple) -> None:
            launched(lambda: run(grid, block, args))

        def run(grid: tuple, block: tuple, args: tuple) -> None:
            assert len(args) == len(parameters), f"{name}: {len(args)} arguments for {len(parameters)} parameters"
            guarded, pointers = {}, []
            for value, (*kind, parameter) in zip(args, parameters, strict=True):
                kind = " ".join(kind)
                dtype = np.dtype(dtypes[kind.rstrip("*")])
                if kind.endswith("*") and isinstance(value, ndarray):
                    assert value.dtype == dtype, f"{name}: {parameter} is {value.dtype}, not {dtype}"
                    assert value.flags.c_contiguous, f"{name}: {parameter} is not contiguous"
                    address = value.host.ctypes.data
                    if address not in guarded:
                        room = np.full(value.size + 2 * GUARD, beside(dtype), dtype)
                        room[GUARD:-GUARD] = value.host.ravel()
                        guarded[address] = value.host, room
                    pointers.append(ctypes.c_void_p(guarded[address][1].ctypes.data + GUARD * dtype.itemsize))
                elif kind.endswith("*"):
                    assert type(value) is np.intp and value == 0, f"{name}: {parameter} is {value!r}, not an array"
                    pointers.append(ctypes.c_void_p(0))
                else:
                    assert isinstance(value, np.generic) and value.dtype == dtype, f"{name}: {parameter} is {value!r}"
                    pointers.append(np.ctypeslib.as_ctypes_type(dtype)(value))
            three = [(ctypes.c_uint * 3)(*size, *[1] * (3 - len(size))) for size in (grid, block)]
            array_of_pointers = ctypes.c_void_p * len(pointers)
            error = launch(*three, array_of_pointers(*map(ctypes.addressof, pointers)))
            if error:
                raise RuntimeError(f"{name}: {error.decode()}")
            for original, room in guarded.values():
                assert (room[:GUARD] == beside(room.dtype)).all(), f"{name} wrote before an array"
                assert (room[-GUARD:] == beside(room.dtype)).all(), f"{name} wrote behind an array"
                original[...] = room[GUARD:-GUARD].reshape(original.shape)
            LAUNCHES.add(name)

        return kernel


# ---- cuBLAS -------------------------------------------------------------------------------------------

VERSION = 99  # of a libcublas.so that nobody has
PARAMETERS = """void* handle, int transa, int transb, int m, int n, int k, const void* alpha,
    const void* A, int Atype, int lda, const void* B, int Btype, int ldb, const void* beta, void* C, int Ctype, int ldc,
    int computeType, int algo"""  # as NVIDIA's cublas_api.h declares cublasGemmEx; its enumerations are int
GEMM = f"""
#include <stddef.h>
typedef int Gemm({PARAMETERS});
static Gemm* gemm;
static void* stream;
extern "C" void in_python(Gemm* f) {{ gemm = f; }}
extern "C" void* current_stream() {{ return stream; }}
extern "C" int cublasSetStream_v2(void* handle, void* s) {{ return stream = s, handle ? 0 : 1; }}
extern "C" int cublasSetWorkspace_v2(void* handle, void* p, size_t size) {{ return p && size > 4096 ? 0 : 7; }}
extern "C" int cublasGemmEx({PARAMETERS}) {{
    return gemm({", ".join(parameter.split()[-1] for parameter in PARAMETERS.split(","))});
}}
"""
REALS = {0: np.float32, 1: np.float64, 14: np.uint16}  # CUDA_R_32F, CUDA_R_64F; the upper half of a float: CUDA_R_16BF
COMPUTE_32F, COMPUTE_64F, COMPUTE_TF32 = 68, 70, 77


def matrix(address: int, kind: int, rows: int, columns: int, ld: int, transposed: int = 0) -> np.ndarray:
    """A matrix (rows, columns) as cuBLAS sees it: column by column, each `ld` numbers from the last."""
    if transposed:
        return matrix(address, kind, columns, rows, ld).T
    assert ld >= rows > 0 and columns > 0, "CUBLAS_STATUS_INVALID_VALUE"
    item = ctypes.POINTER(np.ctypeslib.as_ctypes_type(REALS[kind]))
    memory = np.ctypeslib.as_array(ctypes.cast(address, item), ((columns - 1) * ld + rows,))
    return np.lib.stride_tricks.as_strided(memory, (rows, columns), (memory.itemsize, memory.itemsize * ld))


def gemm(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, compute, algo):
    """C = alpha op(A) op(B) + beta C, for those combinations of types that cuBLAS has."""
    wide = np.float64 if compute == COMPUTE_64F else np.float32
    if (Atype, Btype, Ctype, compute) not in [
        (0, 0, 0, COMPUTE_32F), (0, 0, 0, COMPUTE_TF32), (1, 1, 1, COMPUTE_64F), (14, 14, 0, COMPUTE_32F)
    ]:  # fmt: skip
        return 15  # CUBLAS_STATUS_NOT_SUPPORTED
    assert (cublas_library().current_stream() or 0) == get_current_stream().ptr
    a, b = matrix(A, Atype, m, k, lda, transa), matrix(B, Btype, k, n, ldb, transb)
    c = matrix(C, Ctype, m, n, ldc)
    factors = [ctypes.cast(p, ctypes.POINTER(np.ctypeslib.as_ctypes_type(wide)))[0] for p in (alpha, beta)]
    assert factors == [1, 0]

    def exact(x):
        if Atype == 14:
            return (x.astype(np.uint32) << 16).view(np.float32)
        if compute == COMPUTE_TF32:  # to nearest, in the bits
            return ((np.ascontiguousarray(x).view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)
        return x

    launched(lambda: np.matmul(exact(a), exact(b), out=c) is None)
    return 0


pointer, whole = ctypes.c_void_p, ctypes.c_int
_types = [pointer, *[whole] * 5, pointer, pointer, whole, whole, pointer, whole, whole, pointer, pointer, *[whole] * 4]
_gemm_in_python = ctypes.CFUNCTYPE(whole, *_types)(gemm)


@functools.cache
def cublas_library() -> ctypes.CDLL:
    """Loaded under the name by which gpu.py asks for it."""
    name = f"libcublas.so.{VERSION}"
    library = ctypes.CDLL(str(compiled(GEMM, name, ["-O1", f"-Wl,-soname,{name}"])))
    library.in_python(_gemm_in_python)
    library.current_stream.restype = pointer
    return library


# ---- the rest of the library that gpu.py touches --------------------------------------------------------


class Stream:
    """Work is done at once, whatever the stream."""

    def __init__(self, non_blocking: bool = False):
        self.ptr = id(self)

    def __enter__(self):
        streams.append(self)

    def __exit__(self, *_):
        streams.pop()

    def begin_capture(self):
        global captured
        assert get_current_stream() is self and captured is None
        captured = []

    def end_capture(self):
        global captured
        work, captured = captured, None
        return types.SimpleNamespace(launch=lambda: [again() for again in work])


streams = [types.SimpleNamespace(ptr=0)]  # the current one last


def get_current_stream():
    return streams[-1]


class MemoryPool:
    """Memory is NumPy's here, whatever the allocator."""

    def __init__(self, malloc=None):
        self.malloc = malloc

    def free_all_blocks(self):
        not_while_capturing()


def get_default_memory_pool():
    return MemoryPool()


cuda = types.SimpleNamespace(
    Device=lambda: types.SimpleNamespace(compute_capability="90"),
    Stream=Stream, get_current_stream=get_current_stream, MemoryPool=MemoryPool, Memory=bytearray,
    MemoryPointer=lambda memory, offset: (memory, offset),
    using_allocator=lambda malloc: contextlib.nullcontext(malloc(512)),
    get_cublas_handle=lambda: cublas_library() and 0xB1A5,
    runtime=types.SimpleNamespace(CUDA_R_32F=0, CUDA_R_64F=1, CUDA_R_16BF=14),
    cublas=types.SimpleNamespace(
        getVersion=lambda handle: VERSION * 10000, CUBLAS_GEMM_DEFAULT=-1, CUBLAS_COMPUTE_32F=COMPUTE_32F,
        CUBLAS_COMPUTE_64F=COMPUTE_64F, CUBLAS_COMPUTE_32F_FAST_TF32=COMPUTE_TF32,
    ),
)  # fmt: skip
