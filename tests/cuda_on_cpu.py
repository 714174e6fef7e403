"""A stand-in for CuPy that computes on the CPU, so that gpu.py and kernels.cu run where there is no GPU.

Its arrays are NumPy's inside, but like CuPy's they refuse to meet an array of the host: what would raise on a
card raises here. New memory holds NaN, and kernels see their arguments between guards, so that what is not
written, or beside an array, does not go unnoticed. Kernels are the same file, compiled by the host's C++
compiler behind cuda_on_cpu.h. Only what gpu.py uses is here; a test compares the names with the real CuPy.
"""

import ctypes
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
        return device(getattr(ufunc, method)(*map(host, inputs), **{key: host(a) for key, a in kwargs.items()}))

    def __getattr__(self, name):
        if name.startswith("__"):  # above all __array_interface__, a way around __array__
            raise AttributeError(name)
        found = getattr(self.host, name)
        return function(found) if callable(found) else device(found)

    def __getitem__(self, key):
        return device(self.host[host(key)])

    def __setitem__(self, key, value):
        self.host[host(key)] = host(value)

    def __iter__(self):
        return map(device, iter(self.host))

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
        return device(of_numpy(*map(host, args), **{name: host(value) for name, value in kwargs.items()}))

    return of_device


OPERATORS = (
    "add sub mul truediv floordiv mod pow matmul and or xor lt le gt ge eq ne radd rsub rmul rtruediv rpow rmatmul "
    "iadd isub imul itruediv neg invert abs float int bool"
)
for _name in OPERATORS.split():

    def _method(self, *others, name=f"__{_name}__"):
        result = getattr(self.host, name)(*map(host, others))
        return self if result is self.host else device(result)

    setattr(ndarray, f"__{_name}__", _method)

FUNCTIONS = "arange concatenate copyto einsum exp ones sqrt stack tri triu_indices where zeros zeros_like"
for _name in FUNCTIONS.split():
    globals()[_name] = function(getattr(np, _name))
inf, finfo = np.inf, np.finfo


def asarray(value, dtype=None):
    """From either side, without a copy if it is on the device already."""
    return ndarray(np.asarray(value.host, dtype) if isinstance(value, ndarray) else np.array(value, dtype))


def array(value, dtype=None):
    return ndarray(np.array(value.host if isinstance(value, ndarray) else value, dtype))


def asnumpy(value):
    return np.array(value.host if isinstance(value, ndarray) else value)


def ascontiguousarray(value):
    return ndarray(np.ascontiguousarray(host(value)))


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


class RawModule:
    """CUDA source, compiled for the CPU."""

    def __init__(self, code: str, options: tuple[str, ...] = ()):
        self.real = np.dtype({"-Dreal=float": "f4", "-Dreal=double": "f8"}[options[0]])
        self.signatures = signatures(code)
        launchers = "".join(f"LAUNCHER({name})\n" for name in self.signatures)
        source = f'#include "{HEADER}"\n{code}\n{launchers}'
        key = hashlib.sha256((source + HEADER.read_text() + str(options)).encode()).hexdigest()[:16]
        library = HEADER.parent / "__pycache__" / f"kernels-{key}.so"
        if not library.exists():
            library.parent.mkdir(exist_ok=True)
            unfinished = library.with_suffix(f".{os.getpid()}")
            flags = ["-x", "c++", "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-sign-compare"]
            command = [COMPILER, *flags, "-shared", "-fPIC", *options, "-o", unfinished, "-"]
            subprocess.run(command, input=source, text=True, check=True)
            unfinished.replace(library)
        self.library = ctypes.CDLL(str(library))

    def get_function(self, name: str):
        launch, parameters = self.library[f"launch_{name}"], self.signatures[name]
        launch.restype = ctypes.c_char_p
        dtypes = {"real": self.real, "int": "i4", "double": "f8", "long long": "i8"}

        def kernel(grid: tuple, block: tuple, args: tuple) -> None:
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


# ---- the rest of the library that gpu.py touches --------------------------------------------------------

_compute_types = {}
_core = types.SimpleNamespace(
    set_compute_type=lambda dtype, kind: _compute_types.update({np.dtype(dtype): kind}),
    get_compute_type=lambda dtype: _compute_types[np.dtype(dtype)],
    _routines_linalg=types.SimpleNamespace(COMPUTE_TYPE_DEFAULT=1, COMPUTE_TYPE_TF32=7),
)
