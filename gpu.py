"""The drop-in: grassmann.py on a CUDA GPU, with CuPy.

A drop-in is the same program on other arrays. CuPy's arrays lie in the GPU's memory and answer to
NumPy's names. So this module has no model of its own. It has the functions of grassmann.py
themselves: `borrowed` makes a twin of each, whose `np` is CuPy and whose other names are those of
this module. Attention and a layer of your own are borrowed when a config first asks for them.

What differs stands below: six functions that CuPy lacks or that would start too many kernels, and
three that move numbers between CPU and GPU. Initial weights, batches, dropout masks and checkpoints
are the CPU's. Arrays must be on the GPU (`np.asarray` copies them), and float(loss) waits for it.

That is the first rung, and it computes everything. But each array operation starts a kernel, and
starting one takes longer than a small one runs. The second rung, gpu_kernels/fused.py, replaces
functions of this module by others with the same names: several operations in one kernel, and a
whole training step in one call. GPU_RUNGS=1 in the environment leaves all of them out,
GPU_WITHOUT="layernorm gelu" some of them. docs/gpu.md walks from rung to rung.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace

import numpy

import grassmann
from charlm import processes
from grassmann import UserError

HELP = (
    "this needs a CUDA GPU for each process, and CuPy. If CuPy is missing: "
    "pip install -e .[gpu] for driver 580 or newer (see nvidia-smi) and "
    "GTX 16, RTX 20 or newer GPUs, else .[gpu12]"
)


def failed(error: Exception) -> ImportError:
    what = " ".join(str(error).split())[:200]
    return ImportError(f"{HELP} ({type(error).__name__}: {what})")


try:
    import cupy as cp
except Exception as error:  # a broken library raises its own type
    raise failed(error) from None

Array = cp.ndarray
Params = dict[str, Array]
np = SimpleNamespace(**vars(cp) | {"random": numpy.random})  # the np of borrowed functions
_constant = functools.cache(cp.array)
np.array = lambda a: _constant(a) if isinstance(a, tuple) else cp.array(a)  # offsets: copied once
this = sys.modules[__name__]

# ---- borrowing -----------------------------------------------------------------------------------

_twins = {id(vars(grassmann)): globals()}  # a module's names -> the names of its twin


def _names(theirs: dict) -> dict:
    """A module's names once more, each `borrowed`."""
    if id(theirs) not in _twins:
        ours = dict(theirs)
        _twins[id(theirs)] = ours  # first, because functions refer to each other
        for name, value in theirs.items():
            ours[name] = borrowed(value)
    return _twins[id(theirs)]


def _twin(function: FunctionType) -> Callable:
    """The function once more, with the names of its module's twin."""
    names = _names(function.__globals__)
    twin = FunctionType(function.__code__, names, None, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(twin, function)


def borrowed(value: object) -> object:
    """CuPy for NumPy, this module for grassmann, a twin for a function that uses NumPy."""
    if value is numpy:
        return np
    if value is grassmann:
        return this
    if not isinstance(value, FunctionType) or value.__globals__.get("np") is not numpy:
        return value
    if value.__globals__ is vars(grassmann):
        return globals()[value.__name__]
    return _twin(value)


class _Borrowed(dict):
    """A table of grassmann.py: what is missing here is borrowed from there."""

    def __init__(self, theirs: dict):
        super().__init__()
        self.theirs = theirs

    def __missing__(self, name: str) -> tuple:
        self[name] = tuple(map(borrowed, self.theirs[name]))
        return self[name]


for _name, _value in vars(grassmann).items():
    if isinstance(_value, FunctionType):
        globals()[_name] = _twin(_value)
    else:
        globals().setdefault(_name, _value)

MIXERS = _Borrowed(grassmann.MIXERS)
BLOCKS = _Borrowed(grassmann.BLOCKS)
TOKENS_PER_PASS = 4096  # tokens in one forward pass of a validation or a stream

# ---- what differs, since CuPy lacks it or does it in many kernels --------------------------------


def dot(a: Array, b: Array) -> Array:
    """Dot product over the last axis, which stays as 1: (..., r), (..., r) -> (..., 1)."""
    return (a * b).sum(-1, keepdims=True)


@functools.cache
def pairs(r: int) -> tuple[Array, Array]:
    """All i < j below r, on the GPU."""
    i, j = grassmann.pairs(r)
    return cp.asarray(i), cp.asarray(j)


def embedding_backward(dx: Array, cache: tuple) -> Array:
    """dE_k = Σ dx_t over all t with token k, so dE = Oᵀ dx, where O (T, V) has one-hot rows.

    (CuPy's sums over equal tokens add in any order, so that a run would not repeat.)
    """
    tokens, (V, d) = cache
    one_hot = (tokens.reshape(-1, 1) == cp.arange(V)).astype(dx.dtype)
    return one_hot.T @ dx.reshape(-1, d)


def draw_rows(seed: int | Sequence[int], first: int = 0, n: int | None = None) -> Callable:
    """The CPU draws, and copies the numbers to the GPU: the masks are the CPU's."""
    draw = grassmann.draw_rows(seed, first, n)
    return lambda shape: cp.asarray(draw(shape))


def init_params(config, seed: int = 0, dtype: type = numpy.float32) -> Params:
    """The same numbers as in grassmann.py."""
    return this.Flat(grassmann.init_params(config, seed, dtype))


def validation_loss(params: Params, config, tokens: Array, each: Callable = map) -> float:
    """As in grassmann.py, with tokens on the CPU or on the GPU."""
    return _twin(grassmann.validation_loss)(params, config, cp.asarray(tokens), each)


# ---- what moves numbers between CPU and GPU ------------------------------------------------------


def Flat(arrays: dict) -> Params:
    """These arrays on the GPU."""
    start()
    return {name: cp.asarray(a) for name, a in arrays.items()}


@functools.wraps(grassmann.sample)
def sample(logits: Array, *how, **more) -> int:
    return grassmann.sample(logits.get(), *how, **more)


@functools.cache
def start() -> None:
    """Choose this process's GPU, and see that it works. Raises ImportError.

    Two processes cannot share a GPU, because NCCL refuses it.
    """
    try:
        gpus = cp.cuda.runtime.getDeviceCount()
        here = processes.world()
        if here.local_size > gpus:
            raise UserError(f"{here.local_size} processes here, but the number of GPUs is {gpus}")
        cp.cuda.Device(here.local_rank).use()
        cp.ones((2, 2)) @ cp.ones((2, 2))  # works only if driver, compiler and cuBLAS work
    except Exception as error:  # each of them raises its own type
        raise failed(error) from None
    if here.size > 1 and not hasattr(this, "train_step"):
        raise ImportError("several processes need the second rung's recorded step")


def set_precision(precision: str) -> None:
    """How float32 matrices are multiplied. Raises ValueError, and ImportError without a GPU."""
    start()
    if precision != "float32":
        raise ValueError(f"the first rung knows only float32, not {precision}: unset GPU_RUNGS")


# ---- the second rung -----------------------------------------------------------------------------

if os.environ.get("GPU_RUNGS") != "1":
    from gpu_kernels import fused

    fused.replace(vars(this), os.environ.get("GPU_WITHOUT", "").split())
