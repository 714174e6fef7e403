"""gpu.py against grassmann.py, with a GPU or without.

Without one, gpu.py runs on a stand-in for CuPy (cuda_on_cpu.py), its kernels compiled for the CPU; they are also
compiled for GPUs by NVRTC, which needs none. On a card, `python -m pytest -m gpu` runs the same tests once more.
"""

import ast
import builtins
import contextlib
import dis
import importlib.util
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_on_cpu
import numpy as np
import pytest
from finite_differences import ordinary_params, relative_error, slope, tiny_config
from kill_and_resume import ROOT, TEXT

import grassmann

ADDED = {"Flat", "set_precision"}  # what only a GPU needs
needs_compiler = pytest.mark.skipif(not cuda_on_cpu.COMPILER, reason="no g++ with glibc")


def gpu_on_cpu():
    """gpu.py, as it is when its CuPy is the stand-in."""
    spec = importlib.util.spec_from_file_location("gpu_on_cpu", ROOT / "gpu.py")
    module, real = importlib.util.module_from_spec(spec), sys.modules.get("cupy")
    sys.modules["cupy"] = cuda_on_cpu
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["cupy"]
        if real:
            sys.modules["cupy"] = real
    return module


@pytest.fixture(scope="module")
def stand_in():
    return gpu_on_cpu()


@pytest.fixture(scope="module")
def card():
    try:
        import gpu
    except ImportError:
        pytest.skip("no GPU")
    return gpu


both = [pytest.param("stand_in", marks=needs_compiler), pytest.param("card", marks=pytest.mark.gpu)]


@pytest.fixture(params=both)
def gpu(request):
    module = request.getfixturevalue(request.param)
    yield module
    module.set_precision("float32")
    module._graph.cache_clear()


def on_device(gpu, value):
    """Arrays, in tuples and dicts too, from the host to the device."""
    if isinstance(value, dict):
        return gpu.Flat(value)
    if isinstance(value, np.ndarray):
        return gpu.cp.asarray(value)
    return value


def on_host(gpu, value):
    """The reverse, as a flat list of arrays."""
    if isinstance(value, dict):
        return [a for name in sorted(value) for a in on_host(gpu, value[name])]
    if isinstance(value, (tuple, list)):
        return [a for part in value for a in on_host(gpu, part)]
    return [] if value is None else [gpu.cp.asnumpy(value)]


def same(ours, theirs, bound, what=""):
    """‖a-b‖ within the bound times ‖a‖+‖b‖, for each array."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), what
        error = relative_error(a.astype(np.float64), b.astype(np.float64))
        assert error <= bound, f"{what}: error {error:.1e}"


# ---- the mirror ---------------------------------------------------------------------------------------


def public_names(path: Path) -> list[str]:
    """Functions, classes and what is assigned in a module, in order."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [name for name in names if not name.startswith("_") and not name.isupper() and name != "np"]


def shapes(text: str | None) -> set[str]:
    """What a docstring says in parentheses about shapes: (B, L, d), (..., V), (n)."""
    size = r"(?:\.\.\.|context|[BLTVdrnm]|2d|in|out)"
    return set(re.findall(rf"\({size}(?:, ?{size})*\)", text or ""))


def test_gpu_mirrors_grassmann(stand_in):
    theirs = [name for name in public_names(ROOT / "grassmann.py") if callable(getattr(grassmann, name))]
    ours = [name for name in public_names(ROOT / "gpu.py") if name not in ADDED]
    assert ours == theirs
    for name in theirs:
        ours, theirs = getattr(stand_in, name), getattr(grassmann, name)
        if name in ("Array", "Params", "pool"):
            continue
        mine, original = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in (ours, theirs)
        )
        assert mine == original, name
        assert bool(ours.__doc__) == bool(theirs.__doc__), name
        if inspect.isfunction(ours) and ours.__code__ is not getattr(theirs, "__code__", None):
            assert shapes(ours.__doc__) == shapes(theirs.__doc__), name


def used_names() -> set[str]:
    """Every np.NAME or cp.NAME that gpu.py or a function borrowed by it reads."""
    borrowing = (ROOT / "gpu.py").read_text(encoding="utf-8")
    borrowed = set(re.findall(r"_borrowed\(grassmann\.(\w+)", borrowing))
    original = ast.parse((ROOT / "grassmann.py").read_text(encoding="utf-8")).body
    functions = [node for node in original if isinstance(node, ast.FunctionDef) and node.name in borrowed]
    assert len(functions) == len(borrowed) > 15
    names = set()
    for tree in [ast.parse(borrowing), *functions]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.fullmatch(r"(np|cp)(\.\w+)+", ast.unparse(node)):
                names.add(ast.unparse(node).split(".", 1)[1])
    return {name for name in names if not name.startswith("random") and name not in ("ndarray", "ndarray.dtype")}


def globals_of(code) -> set[str]:
    """The global names that a function and the functions inside it read."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return names.union(*(globals_of(inner) for inner in code.co_consts if inspect.iscode(inner)))


def test_borrowed_functions_find_their_names(stand_in):
    for name, function in vars(stand_in).items():
        if inspect.isfunction(function) and function.__globals__ is vars(stand_in):
            assert globals_of(function.__code__) <= vars(stand_in).keys() | vars(builtins).keys(), name


def found(module, path: str):
    for name in path.split("."):
        module = getattr(module, name)
    return module


def test_every_name_is_one_of_cupy():
    """What the stand-in offers, and what gpu.py uses, exists in the real library."""
    cupy = pytest.importorskip("cupy", reason="no CuPy")
    for name in used_names() | set(cuda_on_cpu.FUNCTIONS.split()):
        assert found(cuda_on_cpu, name) is not None, name
        if not name.startswith("cuda.cublas"):
            assert found(cupy, name) is not None, name
    runtime, cublas = vars(cuda_on_cpu.cuda.runtime), vars(cuda_on_cpu.cuda.cublas)
    assert {name: getattr(cupy.cuda.runtime, name) for name in runtime} == runtime
    try:
        from cupy.cuda import cublas as real
    except ImportError:  # it needs NVIDIA's library, which is large: is there such a name at least?
        binary = Path(importlib.util.find_spec("cupy_backends.cuda.libs.cublas").origin).read_bytes()
        assert all(name.encode() in binary for name in cublas) and b"no such name" not in binary
    else:
        assert all(getattr(real, name) == value for name, value in cublas.items() if name != "getVersion")
    for name in cuda_on_cpu.OPERATORS.split():
        assert hasattr(cupy.ndarray, f"__{name}__"), name
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)  # which the programs report


# ---- the kernels, for a GPU and on the CPU ------------------------------------------------------------

SOURCE = (ROOT / "kernels.cu").read_text(encoding="utf-8")
KERNELS = cuda_on_cpu.signatures(SOURCE)


@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("arch", ["75", "80", "90"])
def test_kernels_compile_for_a_gpu(arch, real):
    """By NVRTC, with the options of CuPy's RawModule: machine code that holds every kernel."""
    pytest.importorskip("cupy", reason="no CuPy")
    from cupy.cuda import nvrtc

    code = SOURCE.encode("ascii", "backslashreplace").decode()
    program = nvrtc.createProgram(code, "kernels.cu", (), ())
    options = f"-Dreal={real}", f"-arch=sm_{arch}", "-std=c++17", "-ftz=true", "--device-as-default-execution-space"
    nvrtc.compileProgram(program, options)
    binary = nvrtc.getCUBIN(program)
    assert binary.startswith(b"\x7fELF")
    assert SOURCE.count("__global__") == len(KERNELS) > 15
    for name in KERNELS:
        assert b".text." + name.encode() in binary


TOY = r"""
extern "C" __global__ void reverse(int n, int wait, const int* x, int* y) {
    __shared__ int all[64];
    const int i = threadIdx.x;
    if (i >= n) return;
    all[i] = x[blockIdx.x * n + i];
    if (wait) __syncthreads();
    y[blockIdx.x * n + i] = all[n - 1 - i];
}

extern "C" __global__ void ballot(int leave, int* y) {
    const int i = threadIdx.x;
    if (i < leave) return;
    y[i] = __ffs(__ballot_sync(0xffffffff, i % 32 == 5 || i == 33)) + __shfl_xor_sync(0xffffffff, i, 1);
}

extern "C" __global__ void beside(int n, int* y) { y[n] = 7; }
"""


@needs_compiler
class TestTheCpuThatPlaysACard:
    """cuda_on_cpu.h does what CUDA does, and says where a card would be undefined."""

    toys = cuda_on_cpu.RawModule(TOY, ("-Dreal=float",)) if cuda_on_cpu.COMPILER else None

    def run(self, name, grid, block, *args):
        typed = (np.int32(a) if isinstance(a, int) else a for a in args)
        self.toys.get_function(name)((grid,), (block,), tuple(typed))

    def test_barrier(self):
        x, y = cuda_on_cpu.asarray(np.arange(192, dtype=np.int32)), cuda_on_cpu.empty(192, np.int32)
        self.run("reverse", 3, 64, 64, 1, x, y)
        assert (y.host.reshape(3, 64) == np.arange(192).reshape(3, 64)[:, ::-1]).all()
        self.run("reverse", 3, 64, 64, 0, x, y)
        assert (y.host.reshape(3, 64) != np.arange(192).reshape(3, 64)[:, ::-1]).any(axis=1).all()

    def test_warps(self):
        y = cuda_on_cpu.empty(64, np.int32)
        self.run("ballot", 1, 64, 0, y)
        assert (y.host == np.repeat([6, 2], 32) + (np.arange(64) ^ 1)).all()

    @pytest.mark.parametrize("leave, fine", [(32, True), (1, False), (33, False)])
    def test_a_warp_that_is_not_whole(self, leave, fine):
        y = cuda_on_cpu.empty(64, np.int32)
        if fine:
            return self.run("ballot", 1, 64, leave, y)
        with pytest.raises(RuntimeError, match="will never come"):
            self.run("ballot", 1, 64, leave, y)

    def test_a_barrier_that_not_all_reach(self):
        x = cuda_on_cpu.zeros(64, dtype=np.int32)
        with pytest.raises(RuntimeError, match="will never come"):
            self.run("reverse", 1, 64, 63, 1, x, x)

    @pytest.mark.parametrize("grid, block", [(0, 32), (1, 0), (1, 1025)])
    def test_impossible_launches(self, grid, block):
        with pytest.raises(RuntimeError, match="invalid configuration"):
            self.run("beside", grid, block, 0, cuda_on_cpu.zeros(1, dtype=np.int32))

    def test_arguments(self):
        y = cuda_on_cpu.zeros(4, dtype=np.int32)
        self.run("beside", 1, 1, 3, y)
        for args in [(4, y), (-1, y), (np.int64(0), y), (0, None), (0, cuda_on_cpu.zeros(4)), (0, y[::2]), (0,)]:
            with pytest.raises(AssertionError):
                self.run("beside", 1, 1, *args)

    def test_arrays_keep_to_their_side(self):
        here, there = np.ones(3), cuda_on_cpu.ones(3)
        for mix in [
            lambda: here + there, lambda: there + here, lambda: there @ here, lambda: np.asarray(there),
            lambda: np.exp(there) + here, lambda: cuda_on_cpu.concatenate([here, there]), lambda: here.dot(there),
            lambda: there[np.array([0])], lambda: there.__setitem__(0, here[:1]), lambda: there.__iadd__(here),
        ]:  # fmt: skip
            with pytest.raises((TypeError, ValueError)):
                mix()
        assert isinstance(np.float64(2) * there, cuda_on_cpu.ndarray) and isinstance(there[0], cuda_on_cpu.ndarray)
        assert float(there.sum()) == 3 and np.isnan(cuda_on_cpu.empty(3).host).all()


# ---- op by op -----------------------------------------------------------------------------------------

T, D, R, V = (3, 23), 37, 33, 70  # tokens; no size is a multiple of a block's, and two need more than a warp
DELTAS = (1, 2, 7, 22)
MIX = {"W_red": (D, R), "b_red": (R,), "W_plu": (R * (R - 1) // 2, D), "b_plu": (D,), "W_gate": (2 * D, D),
       "b_gate": (D,)}  # fmt: skip
ATTENTION = {"W_qkv": (36, 108), "b_qkv": (108,), "W_out": (36, 36), "b_out": (36,)}

# (op, variant): the shapes of its inputs (a dict is a dict of parameters) and its other arguments
OPS = {
    ("linear", ""): ([(*T, 5), (5, D), (D,)], []),
    ("head", ""): ([(*T, D), (V, D)], []),
    ("layernorm", ""): ([(*T, D), (D,), (D,)], []),
    ("layernorm", "narrow"): ([(1, 3), (3,), (3,)], []),
    ("layernorm", "many tokens"): ([(130, 300), (300,), (300,)], []),
    ("gelu", ""): ([(*T, D)], []),
    ("gelu", "one row"): ([(5,)], []),
    ("plucker", ""): ([(*T, R), (*T, R)], []),
    ("unit_area", ""): ([(*T, R), (*T, R)], []),
    ("partner", "average"): ([(*T, R)], [None, DELTAS, True]),
    ("partner", "taps"): ([(*T, R), (4, R)], [DELTAS, True]),
    ("gate", ""): ([(*T, D), (*T, D), (2 * D, D), (D,)], []),
    ("mix", "average"): ([(*T, D), MIX], [DELTAS, False]),
    ("mix", "average, normalized"): ([(*T, D), MIX], [DELTAS, True]),
    ("mix", "taps"): ([(*T, D), MIX | {"taps": (4, R)}], [DELTAS, False]),
    ("mix", "taps, normalized"): ([(*T, D), MIX | {"taps": (4, R)}], [DELTAS, True]),
    ("attention", ""): ([(*T, 36), ATTENTION], [4]),
    ("ffn", ""): ([(*T, D), {"W_1": (D, 70), "b_1": (70,), "W_2": (70, D), "b_2": (D,)}], []),
}
for r in (2, 3, 31, 32, 64, 65):
    for taps, normalize in itertools.product([False, True], [False, True]):
        w = MIX | {"W_red": (D, r), "b_red": (r,), "W_plu": (r * (r - 1) // 2, D)} | ({"taps": (2, r)} if taps else {})
        if r > 2 or not normalize:  # there is one unit bivector in the plane: all gradients are rounding
            OPS["mix", f"rank {r}{', taps' * taps}{', normalized' * normalize}"] = ([(2, 9, D), w], [(1, 4), normalize])
# Choices between ops above, so covered by the whole models; embedding, dropout and cross-entropy have tests below.
ELSEWHERE = {"mixer", "prenorm_block", "paper_block", "model", "embedding", "dropout", "cross_entropy"}


def test_no_op_is_forgotten():
    names = {name.removesuffix("_backward") for name in dir(grassmann) if name.endswith("_backward")}
    assert names == {op for op, _ in OPS} | ELSEWHERE


def drawn(shape, rng, dtype):
    if isinstance(shape, dict):
        return {name: drawn(s, rng, dtype) / math.sqrt(s[0]) for name, s in shape.items()}
    return rng.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype, bound", [(np.float64, 1e-12), (np.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize(("op", "variant"), OPS)
def test_op(gpu, op, variant, dtype, bound):
    shapes, other = OPS[op, variant]
    rng = np.random.default_rng(1)
    inputs = [drawn(shape, rng, dtype) for shape in shapes]
    out, cache = getattr(grassmann, f"{op}_forward")(*inputs, *other)
    dout = drawn(out.shape, rng, dtype)
    grads = getattr(grassmann, f"{op}_backward")(dout.copy(), cache)
    our_out, our_cache = getattr(gpu, f"{op}_forward")(*(on_device(gpu, a) for a in inputs), *other)
    our_grads = getattr(gpu, f"{op}_backward")(on_device(gpu, dout), our_cache)
    same(on_host(gpu, our_out), [out], bound, "out")
    same(on_host(gpu, our_grads), on_host(gpu, grads), bound, "gradients")


@pytest.mark.parametrize("dtype, bound", [(np.float64, 1e-12), (np.float32, 1e-5)], ids=["float64", "float32"])
class TestOpsOnTokens:
    def test_embedding(self, gpu, rng, dtype, bound):
        E, tokens = drawn((V, D), rng, dtype), rng.integers(0, V, (9, 131)) % 60  # some are missing
        tokens[0] = 3
        out, cache = grassmann.embedding_forward(tokens, E)
        dout = drawn(out.shape, rng, dtype)
        our_out, our_cache = gpu.embedding_forward(on_device(gpu, tokens), on_device(gpu, E))
        same(on_host(gpu, our_out), [out], 0)
        dE = gpu.embedding_backward(on_device(gpu, dout), our_cache)
        same(on_host(gpu, dE), [grassmann.embedding_backward(dout, cache)], bound)

    @pytest.mark.parametrize("size", [2, 32, V])
    def test_cross_entropy(self, gpu, rng, dtype, bound, size):
        logits, targets = 30 * drawn((*T, size), rng, dtype), rng.integers(0, size, T)
        loss, cache = grassmann.cross_entropy_forward(logits, targets)
        our_loss, our_cache = gpu.cross_entropy_forward(on_device(gpu, logits), on_device(gpu, targets))
        assert our_loss.shape == () and math.isclose(our_loss, loss, rel_tol=bound)
        dlogits = gpu.cross_entropy_backward(0.3, our_cache)
        same(on_host(gpu, dlogits), [grassmann.cross_entropy_backward(0.3, cache).astype(dtype)], bound)

    def test_dropout(self, gpu, rng, dtype, bound):
        x = drawn((7, 50, D), rng, dtype)
        y, keep = gpu.dropout_forward(on_device(gpu, x), 0.3, np.random.default_rng(5))
        again, _ = gpu.dropout_forward(on_device(gpu, x), 0.3, np.random.default_rng(5))
        other, _ = gpu.dropout_forward(on_device(gpu, x), 0.3, np.random.default_rng(6))
        y, again, other, dx = on_host(gpu, [y, again, other, gpu.dropout_backward(on_device(gpu, x), keep)])
        assert (y == again).all() and (y == dx).all() and (y != other).any()
        kept = y != 0
        assert relative_error(y[kept], x[kept] / 0.7) < 1e-7
        assert abs(kept.mean() - 0.7) < 0.02 and abs(kept[..., ::2].mean() - 0.7) < 0.03
        assert abs(np.corrcoef(kept[:, 1:].ravel(), kept[:, :-1].ravel())[0, 1]) < 0.03
        assert gpu.dropout_forward(x, 0.3, None)[0] is x


def test_gelu_of_huge_numbers(gpu):
    x = np.array([-1e30, -60, -11, 0, 11, 60, 1e30], np.float32)
    y, cache = gpu.gelu_forward(on_device(gpu, x))
    theirs = grassmann.gelu_forward(x)
    same(on_host(gpu, y), theirs[:1], 1e-6)
    same(on_host(gpu, gpu.gelu_backward(on_device(gpu, x), cache)), [grassmann.gelu_backward(x, theirs[1])], 1e-6)


def test_arrays_need_not_be_contiguous(gpu, rng):
    x, w, b, dy = (rng.standard_normal(shape) for shape in [(*T, D), D, D, (*T, D)])
    y, cache = grassmann.layernorm_forward(x, w, b)
    every_other = [on_device(gpu, np.repeat(a, 2, -1))[..., ::2] for a in (x, w, b, dy)]
    our_y, our_cache = gpu.layernorm_forward(*every_other[:3])
    same(on_host(gpu, our_y), [y], 1e-12)
    grads = gpu.layernorm_backward(every_other[3], our_cache)
    same(on_host(gpu, grads), list(grassmann.layernorm_backward(dy, cache)), 1e-12)


def test_degenerate_pairs(gpu, rng):
    """Equal, parallel, opposite and zero vectors span no plane: p = 0 and no gradient, not NaN."""
    z = rng.standard_normal((1, 8, 5))
    z[0, 1], z[0, 2], z[0, 3], z[0, 5], z[0, 6] = z[0, 0], 3 * z[0, 0], 0, 0, -z[0, 4]
    for taps, dtype in itertools.product([None, np.ones((1, 5))], [np.float64, np.float32]):
        ours = [on_device(gpu, a if a is None else a.astype(dtype)) for a in (z, taps)]
        p, cache = gpu._wedge_forward(*ours, (1,), True)
        lengths = np.linalg.norm(gpu.cp.asnumpy(p)[0], axis=1)
        assert np.allclose(lengths, [0, 0, 0, 0, 0, 0, 0, 1], atol=1e-5)
        dz, _ = gpu._wedge_backward(on_device(gpu, rng.standard_normal(p.shape).astype(dtype)), cache)
        dz = gpu.cp.asnumpy(dz)[0]
        assert (dz[:6] == 0).all() and np.isfinite(dz[6:]).all() and dz[6:].any()


# ---- whole models -------------------------------------------------------------------------------------

MODELS = {
    "-".join([block, "taps" if taps else "average", *["normalized"] * norm, *["positions"] * positions]): {
        "block": block, "taps": taps, "normalize": norm, "positions": positions,
    }
    for block, taps, norm in itertools.product(["prenorm", "paper"], [True, False], [True, False])
    for positions in [norm != taps]
}  # fmt: skip
MODELS |= {f"{block}-attention": {"block": block, "mixer": "attention"} for block in ["prenorm", "paper"]}
every_model = pytest.mark.parametrize("variant", MODELS.values(), ids=MODELS)


def model_and_batch(variant, dtype=np.float64):
    config = tiny_config(**variant)
    x, y = np.random.default_rng(2).integers(0, config.vocab_size, (2, 5, config.context))
    return config, ordinary_params(config, dtype=dtype), x, y


@every_model
def test_model(gpu, variant):
    config, params, x, y = model_and_batch(variant)
    ours = gpu.Flat(params)
    same(on_host(gpu, gpu.forward(ours, config, x)), [grassmann.forward(params, config, x)], 1e-12)
    loss, grads = grassmann.loss_and_grads(params, config, x, y)
    our_loss, our_grads = gpu.loss_and_grads(ours, config, x, gpu.cp.asarray(y))
    assert math.isclose(our_loss, loss, rel_tol=1e-12)
    assert list(our_grads) == list(params)
    same(on_host(gpu, our_grads), on_host(gpu, grads), 1e-12)


def fresh_model_and_batch(precision=np.float32):
    """Wider, with initial weights: `ordinary_params` of that width lose more digits than float32 can spare."""
    config = tiny_config(rank=33, d_model=64, d_ff=128)
    return config, grassmann.init_params(config, dtype=precision), *model_and_batch({})[2:]


def test_model_in_float32(gpu):
    config, params, x, y = fresh_model_and_batch()
    loss, grads = grassmann.loss_and_grads(params, config, x, y)
    our_loss, our_grads = gpu.loss_and_grads(gpu.Flat(params), config, x, y)
    assert math.isclose(our_loss, loss, rel_tol=1e-5)
    same(on_host(gpu, our_grads), on_host(gpu, grads), 1e-5)


def needs_tensor_cores(gpu, precision):
    if precision != "float32" and gpu.cp is not cuda_on_cpu and int(gpu.cp.cuda.Device().compute_capability) < 80:
        pytest.skip("no GPU of compute capability 8.0")


@needs_compiler
def test_an_older_card_is_refused(stand_in, monkeypatch):
    monkeypatch.setattr(cuda_on_cpu.cuda, "Device", lambda: SimpleNamespace(compute_capability="75"))
    for precision in ["tf32", "bfloat16"]:
        with pytest.raises(ValueError, match=f"{precision} needs compute capability 8.0"):
            stand_in.set_precision(precision)
    stand_in.set_precision("float32")
    with pytest.raises(ValueError, match="not 'float16'"):
        stand_in.set_precision("float16")


@pytest.mark.parametrize("precision, bound", [("tf32", 2e-3), ("bfloat16", 2e-2)])
def test_precision(gpu, precision, bound):
    """Rounded products: the same gradients, within a few units of their last place."""
    needs_tensor_cores(gpu, precision)
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="no ml_dtypes")
    config, params, x, y = fresh_model_and_batch()
    loss, grads = grassmann.loss_and_grads(params, config, x, y)
    gpu.set_precision(precision)
    our_loss, our_grads = gpu.loss_and_grads(gpu.Flat(params), config, x, y)
    assert math.isclose(our_loss, loss, rel_tol=bound)
    same(on_host(gpu, our_grads), on_host(gpu, grads), bound)
    W = grads["blocks.0.ffn.W_1"]
    assert relative_error(gpu.cp.asnumpy(our_grads["blocks.0.ffn.W_1"]), W) > 1e-5, "nothing is rounded"
    _, exact, *_ = fresh_model_and_batch(np.float64)  # is never rounded
    same(on_host(gpu, gpu.forward(gpu.Flat(exact), config, x)), [grassmann.forward(exact, config, x)], 1e-12)


@pytest.mark.parametrize("seed", [None, (3, 4)], ids=["", "dropout"])
def test_gradients_are_slopes(gpu, seed):
    config, params, x, y = model_and_batch({"dropout": 0.2, "normalize": True})
    _, grads = gpu.loss_and_grads(gpu.Flat(params), config, x, y, seed)
    rng = np.random.default_rng(0)

    def loss():
        return float(gpu.loss_and_grads(gpu.Flat(params), config, x, y, seed)[0])

    for name in ["E", "blocks.0.mix.taps", "blocks.1.ln2.w", "blocks.1.ffn.b_1"]:
        direction = rng.standard_normal(params[name].shape)
        direction /= np.linalg.norm(direction)
        numeric = slope(loss, params[name], direction)
        assert math.isclose(np.vdot(gpu.cp.asnumpy(grads[name]), direction), numeric, rel_tol=1e-6, abs_tol=1e-9), name


def test_a_step_repeats_bit_for_bit(gpu):
    config, params, x, y = model_and_batch({"dropout": 0.1}, np.float32)
    runs = [gpu.loss_and_grads(gpu.Flat(params), config, x, y, 7) for _ in range(2)]
    for a, b in zip(*(on_host(gpu, run) for run in runs), strict=True):
        assert a.tobytes() == b.tobytes()


# ---- products and the CUDA graph ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float64", "float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(3, 5, 7), (1, 5, 1), (64, 1, 2)])
def test_products_of_transposed_matrices(gpu, rng, precision, sizes):
    needs_tensor_cores(gpu, precision)
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="no ml_dtypes")
    T, inner, d = sizes
    a, b = rng.standard_normal((T, inner)), rng.standard_normal((inner, d))
    bound = {"float64": 1e-15, "float32": 1e-6, "tf32": 1e-3, "bfloat16": 1e-2}[precision]
    gpu.set_precision(precision if precision != "float64" else "float32")
    real = np.float64 if precision == "float64" else np.float32

    def laid_out(x):
        """As it is, as the transpose of what lies in memory, and as every other column of it."""
        x = gpu._rounded(on_device(gpu, x.astype(real)))
        return x, gpu.cp.ascontiguousarray(x.T).T, gpu.cp.concatenate([x, x], 1)[:, : x.shape[1]]

    for ours in itertools.product(laid_out(a), laid_out(b)):
        same(on_host(gpu, gpu._matmul(*ours)), [(a @ b).astype(real)], bound)


def test_a_product_that_is_refused(gpu, monkeypatch):
    a = gpu.cp.asarray(np.ones((3, 3)))
    with pytest.raises(KeyError, match="int32"):
        gpu._matmul(a.astype(np.int32), a.astype(np.int32))
    with pytest.raises(RuntimeError, match="float64 and float32"):
        gpu._matmul(a, a.astype(np.float32))
    with pytest.raises(RuntimeError, match="float32 and float64"):
        gpu._matmul(a.astype(np.float32), a)
    monkeypatch.setattr(gpu.cp.cuda.cublas, "CUBLAS_COMPUTE_64F", 64)  # half precision: not for float64
    with pytest.raises(RuntimeError, match=r"cuBLAS refuses a product of \(3, 3\) and \(3, 3\), float64"):
        gpu._matmul(a, a)


GRAPHS = {
    "taps": {}, "dropout": {"dropout": 0.3}, "positions": {"taps": False, "normalize": True, "positions": True},
    "paper": {"block": "paper", "taps": False, "dropout": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("variant", GRAPHS.values(), ids=GRAPHS)
def test_the_graph_does_what_it_recorded(gpu, variant, monkeypatch):
    """With other batches, other keys for dropout and parameters that have changed; what it gave before stays."""
    config, params, *_ = model_and_batch(variant)
    ours, state, rng = gpu.Flat(params), gpu.adamw_init(gpu.Flat(params)), np.random.default_rng(8)
    expected, found, launched = [], [], gpu._forward_and_backward
    for step in range(5):
        if step == 2:  # from here on it is not needed any more
            monkeypatch.setattr(gpu, "_forward_and_backward", lambda *_: pytest.fail("kernel by kernel"))
        x, y = rng.integers(0, config.vocab_size, (2, 3, config.context))
        keys = np.random.default_rng(step).integers(2**63, size=2 * config.n_layer + 1)
        arrays = [gpu.cp.asarray(a) for a in ((x, y, keys) if config.dropout else (x, y))]
        expected.append(on_host(gpu, launched(ours, config, *arrays)))
        found.append(gpu.loss_and_grads(ours, config, x, y, step))
        gpu.adamw_step(ours, found[-1][1], state, step, 0.1)
    for step in range(5):
        same(on_host(gpu, found[step]), expected[step], 0)
    assert len({float(loss) for loss, _ in found}) == 5


def test_without_a_graph(gpu, monkeypatch):
    """Where it cannot be recorded it is said once, and the numbers are the same."""
    config, params, x, y = model_and_batch({})
    ours, expected, matmul = gpu.Flat(params), grassmann.loss_and_grads(params, config, x, y), gpu._matmul

    def refuses(a, b):
        if gpu.cp.cuda.get_current_stream().ptr:
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
        return matmul(a, b)

    monkeypatch.setattr(gpu, "_matmul", refuses)
    with pytest.warns(UserWarning, match="without a CUDA graph.*unsupported") as warned:
        for _ in range(4):
            same(on_host(gpu, gpu.loss_and_grads(ours, config, x, y)), on_host(gpu, expected), 1e-12)
    assert len(warned) == 1


def test_attention_is_not_recorded(gpu, recwarn):
    config, params, x, y = model_and_batch({"mixer": "attention"})
    ours, expected = gpu.Flat(params), grassmann.loss_and_grads(params, config, x, y)
    for _ in range(3):
        same(on_host(gpu, gpu.loss_and_grads(ours, config, x, y)), on_host(gpu, expected), 1e-12)
    assert not recwarn.list


@pytest.mark.parametrize("when", ["recording", "the outputs are to be copied"])
def test_a_graph_that_does_not_fit_into_memory(gpu, monkeypatch, when):
    """Its arrays come on top of what the first call needed."""
    config, params, x, y = model_and_batch({})
    ours, expected, empty = gpu.Flat(params), grassmann.loss_and_grads(params, config, x, y), gpu.cp.empty

    def full(shape, dtype):
        if gpu.cp.cuda.get_current_stream().ptr if when == "recording" else dtype == np.uint8:
            raise MemoryError("out of memory")
        return empty(shape, dtype)

    gpu.loss_and_grads(gpu.Flat(params), config, x, y)  # (cuBLAS has its workspace)
    monkeypatch.setattr(gpu.cp, "empty", full)
    released, release = [], gpu._Graph.release
    monkeypatch.setattr(gpu._Graph, "release", lambda graph: released.append(release(graph)))
    with pytest.warns(UserWarning, match="out of memory"):
        for _ in range(3):
            same(on_host(gpu, gpu.loss_and_grads(ours, config, x, y)), on_host(gpu, expected), 1e-12)
    assert len(released) == 1


def test_each_shape_and_precision_has_its_graph(gpu):
    config, params, x, y = fresh_model_and_batch()
    ours = gpu.Flat(params)
    for rows, precision in itertools.product([slice(0, 2), slice(0, 5), slice(3, 5)], ["float32", "tf32"]):
        needs_tensor_cores(gpu, precision)
        gpu.set_precision(precision)
        expected = on_host(gpu, gpu._forward_and_backward(ours, config, *(gpu.cp.asarray(a[rows]) for a in (x, y))))
        for _ in range(3):
            same(on_host(gpu, gpu.loss_and_grads(ours, config, x[rows], y[rows])), expected, 0)


def test_every_dropout_has_its_key(gpu):
    config, params, x, y = model_and_batch({"dropout": 0.3})
    ours, arrays = gpu.Flat(params), [gpu.cp.asarray(a) for a in (x, y)]

    def loss(changed=None):
        keys = np.arange(2 * config.n_layer + 1)
        if changed is not None:
            keys[changed] = 77
        return float(gpu._forward_and_backward(ours, config, *arrays, gpu.cp.asarray(keys))[0])

    assert len({loss(), *map(loss, range(2 * config.n_layer + 1))}) == 2 * config.n_layer + 2


def test_graphs_do_not_pile_up(gpu):
    config, params, x, y = model_and_batch({})
    models = [gpu.Flat(params) for _ in range(gpu.GRAPHS + 2)]
    for ours in models * 3:
        gpu.loss_and_grads(ours, config, x, y)
    assert gpu._graph.cache_info().currsize == gpu.GRAPHS


@pytest.mark.gpu
def test_memory_of_graphs_is_given_back(card):
    """Of those that are dropped, and of one that was begun when the card was full."""
    runtime, empty_pool = card.cp.cuda.runtime, card.cp.get_default_memory_pool().free_all_blocks
    if os.name == "nt":
        pytest.skip("Windows lends a full card the computer's memory")
    config = tiny_config(d_model=64, context=64)
    params, x, y = card.init_params(config), *np.random.default_rng(0).integers(0, config.vocab_size, (2, 512, 64))

    def in_use():
        empty_pool()
        free, total = runtime.memGetInfo()
        return total - free

    card.loss_and_grads(params, config, x, y)
    card._graph.cache_clear()
    before = in_use()
    for _ in range(3):
        for _ in range(3):
            card.loss_and_grads(params, config, x, y)
        assert in_use() > before + 2**24
        card._graph.cache_clear()
        assert in_use() < before + 2**24
    card.loss_and_grads(params, config, x, y)
    in_use()
    full = card.cp.cuda.Memory(runtime.memGetInfo()[0] - 2**25)
    with pytest.warns(UserWarning, match="without a CUDA graph"), contextlib.suppress(MemoryError):
        card.loss_and_grads(params, config, x, y)
    del full
    card.loss_and_grads(params, config, x, y)
    assert in_use() < before + 2**24


# ---- training, sampling, checkpoints ------------------------------------------------------------------


def trained(model, config, params, steps, text, seed=None, lr=1e-2):
    """Losses of a few steps with everything that train_char.py does, on either side."""
    losses, state, tokens = [], model.adamw_init(params), model.np.asarray(text)
    for step in range(steps):
        x, y = model.get_batch(tokens, 4, config.context, 1, step)
        loss, grads = model.loss_and_grads(params, config, x, y, seed)
        model.clip_grads(grads, 0.5)
        model.adamw_step(params, grads, state, step, model.learning_rate(step, steps, lr, lr / 10, 3))
        losses.append(loss)
    return [float(loss) for loss in losses], state


def text_of(config, length=500):
    """Words over and over again, with noise."""
    rng = np.random.default_rng(3)
    text = np.resize(rng.integers(0, config.vocab_size, 17), length)
    text[::10] = rng.integers(0, config.vocab_size, len(text[::10]))
    return text.astype(np.uint8)


def test_training_follows_the_cpu(gpu):
    config = tiny_config()
    params = grassmann.init_params(config, dtype=np.float64)
    ours = gpu.init_params(config, dtype=np.float64)
    same(on_host(gpu, ours), on_host(gpu, params), 0)
    losses, state = trained(grassmann, config, params, 20, text_of(config))
    our_losses, our_state = trained(gpu, config, ours, 20, text_of(config))
    assert np.allclose(our_losses, losses, rtol=1e-12)
    same(on_host(gpu, [ours, our_state]), on_host(gpu, [params, state]), 1e-9)
    assert losses[-1] < losses[0]
    text = text_of(config, 100)
    loss = gpu.validation_loss(ours, config, text)
    assert math.isclose(loss, grassmann.validation_loss(params, config, text), rel_tol=1e-10)
    assert loss == gpu.validation_loss(ours, config, gpu.cp.asarray(text))


@pytest.mark.gpu
@pytest.mark.parametrize("precision, bound", [("float32", 1e-5), ("tf32", 2e-3), ("bfloat16", 1e-2)])
def test_200_steps_follow_the_cpu(card, precision, bound):
    """At a learning rate that is not too high: there rounding grows from step to step, in NumPy too."""
    needs_tensor_cores(card, precision)
    config = tiny_config(rank=32, d_model=64, d_ff=128)
    params, ours = grassmann.init_params(config), card.init_params(config)
    losses, _ = trained(grassmann, config, params, 200, text_of(config), lr=3e-3)
    card.set_precision(precision)
    our_losses, _ = trained(card, config, ours, 200, text_of(config), lr=3e-3)
    card.set_precision("float32")
    assert np.abs(np.subtract(our_losses, losses)).max() < bound * losses[0]


@needs_compiler
def test_training_launches_every_kernel(stand_in):
    """Nothing in kernels.cu is only compiled, or forgotten."""
    cuda_on_cpu.LAUNCHES.clear()
    for taps in (True, False):
        config = tiny_config(taps=taps, dropout=0.1)
        trained(stand_in, config, stand_in.init_params(config), 1, text_of(config), seed=1)
    assert KERNELS.keys() == cuda_on_cpu.LAUNCHES


def test_clipping(gpu, rng):
    grads = {"a": rng.standard_normal((30, 40)), "b": rng.standard_normal(7)}
    for max_norm in (1e-3, 1e3):
        theirs, ours = {name: g.copy() for name, g in grads.items()}, gpu.Flat(grads)
        norm = grassmann.clip_grads(theirs, max_norm)
        assert math.isclose(gpu.clip_grads(ours, max_norm), norm, rel_tol=1e-12)
        same(on_host(gpu, ours), on_host(gpu, theirs), 1e-14)
    huge = gpu.Flat({"a": np.full((9, 9), 1e30, np.float32)})  # no square of a float32 overflows
    assert math.isclose(gpu.clip_grads(huge, 1.0), 9e30, rel_tol=1e-6)
    assert np.allclose(gpu.cp.asnumpy(huge["a"]), 1 / 9)


def test_flat_buffers(gpu):
    arrays = {"b": np.arange(3.0), "W": np.arange(3.0, 9.0).reshape(2, 3), "a": np.arange(9.0, 10.0)}
    flat = gpu.Flat(arrays)
    assert list(flat) == list(arrays) and flat.matrices == 6
    same([gpu.cp.asnumpy(flat[name]) for name in arrays], list(arrays.values()), 0)
    flat.buffer[...] = 5.0
    assert all((gpu.cp.asnumpy(a) == 5).all() for a in flat.values())
    same(on_host(gpu, gpu.Flat(flat).buffer), [np.full(10, 5.0)], 0)


@pytest.mark.parametrize("name", ["prenorm-taps-positions", "paper-average-normalized-positions", "prenorm-attention"])
def test_generated_text_is_the_same(gpu, name):
    config, params, *_ = model_and_batch(MODELS[name])
    for how in [{"temperature": 0}, {"temperature": 0.9, "top_k": 5, "seed": 4}]:
        text = list(grassmann.generate(params, config, [1, 2, 3], 20, **how))
        assert list(gpu.generate(gpu.Flat(params), config, [1, 2, 3], 20, **how)) == text
    with pytest.raises(ValueError, match="prompt"):
        gpu.generate(gpu.Flat(params), config, [config.vocab_size], 1)


@every_model
def test_streaming_equals_the_full_pass(gpu, variant):
    config, params, x, _ = model_and_batch(variant)
    ours, state = gpu.Flat(params), gpu.stream_init(params, config)
    full = gpu.cp.asnumpy(gpu.forward(ours, config, x[:1]))[0]
    for token, logits in zip(x[0], full, strict=True):
        streamed, state = gpu.stream_step(ours, config, state, token)
        same(on_host(gpu, streamed), [logits], 1e-12)


def test_checkpoints_of_either_load_in_the_other(gpu, tmp_path):
    config = tiny_config()
    params = gpu.init_params(config, 3)
    _, state = trained(gpu, config, params, 2, text_of(config))
    extra = {"step": 2, "vocab": None, "best": [2, 0.5]}
    gpu.save_checkpoint(tmp_path / "ours.npz", params, config, **state, **extra)
    loaded, found, rest = grassmann.load_checkpoint(tmp_path / "ours.npz")
    assert found == config and {name: rest[name] for name in extra} == extra
    grassmann.save_checkpoint(tmp_path / "theirs.npz", loaded, config, **rest)
    back, found, rest = gpu.load_checkpoint(tmp_path / "theirs.npz")
    assert found == config and {name: rest[name] for name in extra} == extra
    restored = [back, rest["adam_m"], rest["adam_v"]]
    same(on_host(gpu, restored), on_host(gpu, [params, state["adam_m"], state["adam_v"]]), 0)
    assert all(isinstance(flat, gpu.Flat) for flat in restored)
    with pytest.raises(ValueError, match="not finite"):
        back.buffer[...] = math.nan
        gpu.save_checkpoint(tmp_path / "ours.npz", back, config)


# ---- the programs -------------------------------------------------------------------------------------


def program(name, *args, cupy=None):
    """Run train_char.py or sample.py with this folder's cupy.py in place of CuPy."""
    env = os.environ | ({"PYTHONPATH": str(cupy)} if cupy else {})
    command = [sys.executable, str(ROOT / name), *(str(a) for a in args)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, env=env)


@pytest.fixture(scope="module")
def cupys(tmp_path_factory):
    """Folders with a CuPy that works, one on a card that is full, one that is missing, and one without a device."""
    tests = str(Path(__file__).parent)
    contents = {
        "works": f"import sys\nsys.path.append({tests!r})\nimport cuda_on_cpu\nsys.modules['cupy'] = cuda_on_cpu\n",
        "missing": "raise ImportError('no such library')\n",
        "full": "import cuda_on_cpu\n\ndef empty(*_):\n    raise MemoryError\n\ncuda_on_cpu.empty = empty\n",
        "no device": "def ones(shape):\n    raise type('CompileException', (Exception,), {})('no device')\n",
    }
    contents["full"] = contents["works"] + contents["full"]
    folders = {}
    for name, source in contents.items():
        folders[name] = tmp_path_factory.mktemp("cupy")
        (folders[name] / "cupy.py").write_text(source, encoding="utf-8")
    return folders


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@needs_compiler
def test_training_on_a_gpu_goes_on_on_a_cpu(cupys, text, tmp_path):
    """train_char.py --gpu writes what the CPU writes; --resume and sample.py work across."""
    options = f"--data {text} --context 8 --n-layer 2 --d-model 8 --rank 3 --batch-size 4 --eval-every 10 --dropout 0"
    for where, flags in [("gpu", ["--gpu"]), ("cpu", [])]:
        out = ["--out", tmp_path / where]
        process = program("train_char.py", *options.split(), "--iters", 20, *out, *flags, cupy=cupys["works"])
        assert (process.returncode, process.stderr) == (0, "")
    logs = [np.genfromtxt(tmp_path / where / "log.csv", delimiter=",", skip_header=1) for where in ("gpu", "cpu")]
    assert np.allclose(logs[0][:, :4], logs[1][:, :4], rtol=1e-5)
    process = program("train_char.py", "--resume", "--out", tmp_path / "gpu", "--iters", 30)
    assert (process.returncode, process.stderr) == (0, "")
    samples = [
        program("sample.py", tmp_path / "gpu/best.npz", "--length", 30, *flags, cupy=cupys["works"])
        for flags in ([], ["--gpu"], ["--gpu", "--precision", "tf32"])
    ]
    assert [process.stderr for process in samples] == [""] * 3
    assert len(samples[0].stdout) == 31 and samples[0].stdout == samples[1].stdout == samples[2].stdout


@pytest.mark.parametrize("name", ["train_char.py", "sample.py"])
@pytest.mark.parametrize("which", ["missing", "no device"])
def test_no_gpu_is_one_sentence(cupys, which, name):
    process = program(name, "--gpu", cupy=cupys[which])
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    for word in ("--gpu", "cupy-cuda12x[ctk]", "requirements-gpu.txt", "driver", "no "):
        assert word in process.stderr


@pytest.mark.parametrize("where", both)
def test_a_full_card_is_one_sentence(request, where, cupys, text, tmp_path):
    request.getfixturevalue(where)
    size, cupy = ("--context 8", cupys["full"]) if where == "stand_in" else ("--context 64 --batch-size 900000", None)
    options = f"--data {text} --gpu --out {tmp_path / 'out'} {size}"
    process = program("train_char.py", *options.split(), cupy=cupy)
    assert process.returncode == 2
    assert re.fullmatch(r"train_char\.py: not enough memory; a smaller --batch-size.*\n", process.stderr)
