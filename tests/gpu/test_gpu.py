"""gpu.py against grassmann.py, with a GPU or without.

Without one, its kernels run on the CPU, and NVRTC, which needs none, compiles them for GPUs. On a
card, `python -m pytest -m gpu` runs the same tests once more.
"""

import contextlib
import functools
import importlib.util
import inspect
import itertools
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import cuda_on_cpu
import numpy as np
import pytest

import checkpoint
import grassmann
from grassmann import Config, Scope
from training import RowsOfBatch

SOURCE = (Path(__file__).parents[2] / "kernels.cu").read_text(encoding="utf-8")
KERNELS = cuda_on_cpu.signatures(SOURCE)
parametrize = pytest.mark.parametrize
LEFT_OUT = {"mean", "pairs", "plucker_forward", "plucker_backward", "plucker", "gate_forward",
            "gate_backward"}  # steps of kernels

# ---- the mirror ----------------------------------------------------------------------------------

def test_gpu_mirrors_grassmann(stand_in):
    def own(module):
        return {name: value for name, value in vars(module).items() if name[0] != "_"
                and getattr(value, "__module__", "") in ("grassmann", module.__name__)}

    theirs, ours = own(grassmann), own(stand_in)
    assert [*ours] == [name for name in theirs if name not in LEFT_OUT]
    for name in ours:
        original, mine = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f[name]).parameters.values()]
            for f in (theirs, ours))
        assert mine[: len(original)] == original, name
        assert all(default is None for *_, default in mine[len(original) :]), name
    mixers = [*grassmann.MIXERS][:2]  # (experiments add theirs)
    assert [*stand_in.MIXERS, *stand_in.BLOCKS] == [*mixers, *grassmann.BLOCKS]
    tested = {op.split(",")[0] for op in OPS} | {"dropout", "partner", "unit_area"}  # below; whole:
    tested |= {"mix", "memory", "attention", "ffn", "prenorm_block", "paper_block", "model"}
    backwards = {f"{name}_backward" for name in tested}
    assert {name for name in ours if name.endswith("_backward")} == backwards

def test_every_name_is_one_of_cupy():
    """What the stand-in offers, and so what gpu.py uses, exists in the real library."""
    cupy = pytest.importorskip("cupy", reason="no CuPy")
    names = cuda_on_cpu.FUNCTIONS + " array asarray empty finfo inf RawModule get_default_memory_pool"
    operators = ["get", *(f"__{name}__" for name in cuda_on_cpu.OPERATORS.split())]
    parts = vars(cuda_on_cpu.cuda).keys() - {"cublas"}
    for module, found in [(cupy, names.split()), (cupy.ndarray, operators), (cupy.cuda, parts)]:
        assert all(getattr(module, name) is not None for name in found)
    runtime, cublas = vars(cuda_on_cpu.cuda.runtime), vars(cuda_on_cpu.cuda.cublas)
    assert {name: getattr(cupy.cuda.runtime, name) for name in runtime} == runtime
    binary = Path(importlib.util.find_spec("cupy_backends.cuda.libs.cublas").origin).read_bytes()
    assert all(name.encode() in binary for name in cublas)
    with contextlib.suppress(ImportError):  # it needs NVIDIA's library, which is large
        from cupy.cuda import cublas as real
        assert all(getattr(real, name) == cublas[name] for name in cublas if name != "getVersion")
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)  # which the programs report

# ---- the kernels, for a GPU and on the CPU -------------------------------------------------------

@parametrize("real", ["float", "double"])
@parametrize("arch", ["75", "80", "90"])
def test_kernels_compile_for_a_gpu(arch, real):
    """By NVRTC, with the options of CuPy's RawModule: machine code that holds every kernel."""
    pytest.importorskip("cupy", reason="no CuPy")
    from cupy.cuda import nvrtc

    code = SOURCE.encode("ascii", "backslashreplace").decode()
    program = nvrtc.createProgram(code, "kernels.cu", (), ())
    nvrtc.compileProgram(program, (f"-Dreal={real}", f"-arch=sm_{arch}", "-std=c++17", "-ftz=true",
                                   "--device-as-default-execution-space"))
    binary = nvrtc.getCUBIN(program)
    assert binary.startswith(b"\x7fELF")
    assert SOURCE.count("__global__") == len(KERNELS) > 12
    assert all(b".text." + name.encode() in binary for name in KERNELS)

@pytest.fixture
def toy(stand_in):
    """y[i + shift] = x[63 - i] + 1000 i' for i from `first` on, i' being the lane beside i."""
    module = cuda_on_cpu.RawModule(r"""
        extern "C" __global__ void toy(int first, int wait, int shift, const int* x, int* y) {
            __shared__ int all[64];
            const int i = threadIdx.x, place = blockIdx.x * 64 + i;
            if (i < first) return;
            all[i] = x[place];
            if (wait) __syncthreads();
            y[place + shift] = all[63 - i] + 1000 * __shfl_xor_sync(~0, i, 1);
        }""", ("-Dreal=float",))

    def run(*args, grid=3, block=64):
        typed = tuple(np.int32(a) if isinstance(a, int) else a for a in args)
        module.get_function("toy")((grid,), (block,), typed)
    return run

X, Y = cuda_on_cpu.asarray(np.arange(192, dtype=np.int32)), cuda_on_cpu.zeros(192, dtype=np.int32)

def test_the_cpu_waits_as_a_card_does(toy):
    right = X.get().reshape(3, 64)[:, ::-1] + 1000 * (np.arange(64) ^ 1)
    for wait in (1, 0):
        toy(0, wait, 0, X, Y)
        assert ((Y.get().reshape(3, 64) == right).all(axis=1) == wait).all()
    toy(32, 0, 0, X, Y)  # a whole warp may leave

@parametrize("args, sizes, error", [
    ((1, 0, 0, X, Y), {}, "will never come"), ((33, 0, 0, X, Y), {}, "will never come"),
    ((63, 1, 0, X, Y), {}, "will never come"), ((0, 1, 1, X, Y), {}, "wrote beside"),
    ((0, 1, -1, X, Y), {}, "wrote beside"), ((0, 1, 0, X, Y), {"grid": 0}, "invalid configuration"),
    ((0, 1, 0, X, Y), {"block": 0}, "invalid"), ((0, 1, 0, X, Y), {"block": 1025}, "invalid"),
    ((0, 1, np.int64(0), X, Y), {}, "shift is"), ((0, 1, 0, X, None), {}, "y is None"),
    ((0, 1, 0, X, Y[::2]), {}, "y is"), ((0, 1, 0, X, cuda_on_cpu.zeros(192)), {}, "y is"),
    ((0, 1, 0, X), {}, "longer"),
])
def test_the_cpu_refuses_what_a_card_does_not_define(toy, args, sizes, error):
    with pytest.raises((RuntimeError, AssertionError, ValueError), match=error):
        toy(*args, **sizes)

def test_arrays_keep_to_their_side(stand_in):
    here, there = np.ones(3), cuda_on_cpu.ones(3)
    for mix in [
        lambda: here + there, lambda: there + here, lambda: there @ here, lambda: np.asarray(there),
        lambda: np.exp(there) + here, lambda: cuda_on_cpu.concatenate([here, there]),
        lambda: here.dot(there), lambda: there[np.array([0])], lambda: there.__iadd__(here),
        lambda: there.__setitem__(0, here[:1]),
    ]:
        with pytest.raises((TypeError, ValueError)):
            mix()
    assert all(isinstance(a, cuda_on_cpu.ndarray) for a in (np.float64(2) * there, there[0]))
    assert float(there.sum()) == 3 and np.isnan(cuda_on_cpu.empty(3).host).all()

# ---- op by op ------------------------------------------------------------------------------------

T, D, V = (3, 23), 37, 70  # no size is a multiple of a block's, two need more than a warp
RNG = np.random.default_rng(2)
TOKENS = RNG.integers(0, V, (9, 131)) % 60  # some are missing
TOKENS[0] = 3
OPS = {  # the inputs, or their shapes; a dict is a part of the parameters
    "linear": [(*T, 5), (5, D), (D,)], "head": [(*T, D), (V, D)],
    "layernorm": [(*T, D), (D,), (D,)], "layernorm, narrow": [(1, 3), (3,), (3,)],
    "layernorm, many tokens": [(130, 300), (300,), (300,)],
    "gelu": [(*T, D)], "gelu, one row": [(5,)],
    "gelu, huge": [np.array([-1e30, -60, -11, 0, 11, 60, 1e30])], "embedding": [TOKENS, (V, D)],
} | {f"cross_entropy, {size}": [30 * RNG.standard_normal((*T, size)), RNG.integers(0, size, T)]
     for size in (2, 32, V)}
LAYERS = {"attention": {"mixer": "attention", "d_model": 36}, "memory": {"memory": True}}
LAYERS |= {f"rank {r}": {"rank": r} for r in (2, 3, 31, 32, 33, 64, 65)}
LAYERS |= {"average": {"taps": False}, "average, normalized": {"taps": False, "normalize": True},
           "normalized": {"normalize": True}, "memory, average": {"memory": True, "taps": False}}
both_dtypes = parametrize("dtype, bound", [(np.float64, 1e-12), (np.float32, 1e-5)])

def drawn(what, dtype, rng):
    if isinstance(what, dict):
        return {name: drawn(s, dtype, rng) / dtype(math.sqrt(s[0])) for name, s in what.items()}
    if isinstance(what, np.ndarray):
        return what.astype(dtype) if what.dtype.kind == "f" else what
    return rng.standard_normal(what).astype(dtype)

def on_device(gpu, a, strided=False):
    """On the card, if so in every other place: arrays need not be contiguous."""
    if isinstance(a, float):
        return a
    return gpu.cp.asarray(np.repeat(a, 2, -1))[..., ::2] if strided else gpu.cp.asarray(a)

@both_dtypes
@parametrize("op", OPS)
def test_op(gpu, same, rng, op, dtype, bound):
    inputs, name = [drawn(what, dtype, rng) for what in OPS[op]], op.split(",")[0]
    out, cache = getattr(grassmann, f"{name}_forward")(*inputs)
    dout = drawn(out.shape, dtype, rng) if out.shape else 0.3  # a loss
    grads = getattr(grassmann, f"{name}_backward")(dout, cache)
    *ours, our_dout = (on_device(gpu, a, dtype == np.float32) for a in (*inputs, dout))
    our_out, our_cache = getattr(gpu, f"{name}_forward")(*ours)
    same(our_out, out, bound)
    same(getattr(gpu, f"{name}_backward")(our_dout, our_cache), grads, bound)

@both_dtypes
@parametrize("chunk", [8, 24])
@parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_block(gpu, same, rng, monkeypatch, layer, chunk, dtype, bound):
    """The mixing layer and the FFN, between the LayerNorms that add up what they give; a warp has
    one token or, as in long batches, three."""
    monkeypatch.setattr(gpu.card, "chunks", lambda T: (-(-T // chunk), chunk))
    sizes = {"context": 23, "n_layer": 1, "d_model": D, "d_ff": 70, "offsets": ((1, 2, 7, 22),)}
    config = Config(2, **sizes | layer)
    shapes = {name.removeprefix("blocks.0."): shape
              for name, shape in grassmann.param_shapes(config).items() if "blocks" in name}
    w, h, dy = drawn(shapes, dtype, rng), *(drawn((*T, config.d_model), dtype, rng) for _ in "hy")

    def run(model, w, h, dy):
        out, cache = model.prenorm_block_forward(h, Scope(w), config, 0)
        y, c_norm = model.layernorm_forward(out, w["ln1.w"], w["ln1.b"])
        dout, *_ = model.layernorm_backward(dy, c_norm)
        seen = {name: cache["mix"][name] for name in {"z", "s", "p", "alpha"} & cache["mix"].keys()}
        return y, seen, *model.prenorm_block_backward(dout, cache, config)

    ours = run(gpu, gpu.Flat(w), on_device(gpu, h), on_device(gpu, dy))
    same(ours, run(grassmann, w, h, dy), bound)

@both_dtypes
def test_dropout(gpu, same, rng, dtype, bound):
    x, w = drawn((7, 50, D), dtype, rng), np.ones(D, dtype)
    ours, our_w = on_device(gpu, x), on_device(gpu, w)
    results = [gpu.dropout_forward(ours, 0.3, np.random.default_rng(k)) for k in (5, 5, 6)]
    y, again, other = (y.get() for y, _ in results)
    dx, kept = gpu.dropout_backward(ours, results[0][1]).get(), y != 0
    assert (y == again).all() and (y == dx).all() and (y != other).any()
    same(y[kept], x[kept] / dtype(0.7), 1e-7)
    assert abs(kept.mean() - 0.7) < 0.02 and abs(kept[..., ::2].mean() - 0.7) < 0.03
    assert abs(np.corrcoef(kept[:, 1:].ravel(), kept[:, :-1].ravel())[0, 1]) < 0.03
    assert gpu.dropout_forward(x, 0.3, None)[0] is x
    later, keep = gpu.dropout_forward(gpu._Sum(ours, our_w), 0.3, np.random.default_rng(5))
    _, cache = gpu.layernorm_forward(ours + later, our_w, our_w)  # x + D(x + 1)
    same(cache[0].total, x + np.where(kept, (x + 1) / dtype(0.7), 0), bound)
    grad, *_ = gpu.layernorm_backward(ours, cache)
    same(grad.x, np.where(kept, grad.h.get() / dtype(0.7), 0), bound)
    assert keep is not None and gpu.dropout_backward(grad, keep) is grad

# ---- whole models --------------------------------------------------------------------------------

@pytest.fixture
def model(variant, model_and_batch):
    """Each of the twelve, some with positions."""
    return model_and_batch(**variant, positions=variant.get("normalize") != variant.get("taps"))

def test_model(gpu, same, model, recwarn):
    """Kernel by kernel, then from a graph; attention and memory are not recorded, silently."""
    config, params, x, y = model
    ours = gpu.Flat(params)
    same(gpu.forward(ours, config, x), grassmann.forward(params, config, x), 1e-12)
    for share in (1.0, 1.0, 1.0, 0.25, 0.25, 0.25):
        loss, grads = gpu.loss_and_grads(ours, config, x, gpu.cp.asarray(y), share=share)
        assert list(grads) == list(params)
        same((loss, grads), grassmann.loss_and_grads(params, config, x, y, share=share), 1e-12)
    assert not recwarn.list
    with pytest.raises(ValueError, match="one shape"):
        gpu.loss_and_grads(ours, config, x, y[:4])

@parametrize("precision, bound", [("float32", 1e-5), ("tf32", 4e-3)])
def test_precision(gpu, same, set_precision, tiny_config, batch, precision, bound):
    """Rounded products: the same gradients, within a few units of their last place. (The stand-in
    rounds to the nearest, 7e-4; a card that cuts would be off by 3e-3.)"""
    set_precision(precision)
    config, (x, y) = tiny_config(rank=33, d_model=64, d_ff=128), batch(5)
    params = grassmann.init_params(config)
    ours = gpu.loss_and_grads(gpu.Flat(params), config, x, y)
    same(ours, grassmann.loss_and_grads(params, config, x, y), bound)

def test_an_older_card_is_refused(stand_in, monkeypatch):
    monkeypatch.setattr("cuda_on_cpu.cuda.Device", lambda: SimpleNamespace(compute_capability="75"))
    stand_in.set_precision("float32")
    for precision, error in [("tf32", "tf32 needs compute capability 8.0"),
                             ("float16", "not 'float16'")]:
        with pytest.raises(ValueError, match=error):
            stand_in.set_precision(precision)

def test_gradients_with_dropout_are_slopes(gpu, rng, model_and_batch, slope):
    config, params, x, y = model_and_batch(dropout=0.2)
    result = lambda: gpu.loss_and_grads(gpu.Flat(params), config, x, y, (3, 4))  # noqa: E731
    _, grads = result()
    for name in ["E", "blocks.0.mix.taps", "blocks.1.ln2.w", "blocks.1.ffn.b_1"]:
        direction = rng.standard_normal(params[name].shape)
        direction /= np.linalg.norm(direction)
        numeric = slope(lambda: float(result()[0]), params[name], direction)
        analytic = np.vdot(grads[name].get(), direction)
        assert math.isclose(analytic, numeric, rel_tol=1e-6, abs_tol=1e-9), name

# ---- products and the CUDA graph -----------------------------------------------------------------

@parametrize("precision, bound, least", [
    ("float64", 1e-15, 0), ("float32", 1e-6, 0), ("tf32", 1e-3, 2e-5)])
@parametrize("sizes", [(3, 5, 7), (1, 5, 1), (64, 1, 2), (384, 512, 256)])
def test_products(gpu, same, set_precision, rng, precision, bound, least, sizes):
    """Of matrices however they lie, into a part of another, and added to what is there."""
    real = np.float64 if precision == "float64" else np.float32
    set_precision("float32" if precision == "float32" else "tf32")  # which is for float32 alone
    a, b = (rng.standard_normal(shape).astype(real) for shape in (sizes[:2], sizes[1:]))
    exact = (a.astype(np.float64) @ b).astype(real)

    def laid_out(host):
        """As it is, as the transpose of what lies in memory, every other column, half of them."""
        x = on_device(gpu, host)
        half = gpu.cp.concatenate([x, x], 1)[:, x.shape[1] :]
        return x, gpu.cp.ascontiguousarray(x.T).T, on_device(gpu, host, strided=True), half

    ours = laid_out(a), laid_out(b)
    for one, other in itertools.product(*ours):
        same(gpu.product(one, other), exact, bound)
    wide = gpu.cp.zeros((2, len(a), 2 * sizes[2]), real)
    for add in (False, True):
        gpu.product(gpu.cp.stack([ours[0][0]] * 2), ours[1][0], wide[..., sizes[2] :], add)
    same(wide, np.stack([np.concatenate([0 * exact, 2 * exact], 1)] * 2), bound)
    if min(sizes) > 64:
        with pytest.raises(AssertionError) if least else contextlib.nullcontext():
            same(gpu.product(ours[0][0], ours[1][0]), exact, least or bound)  # something is rounded

def test_a_product_that_is_refused(gpu, monkeypatch):
    a, b, c = (on_device(gpu, np.ones((3, 3), dtype)) for dtype in (np.float64, np.float32, int))
    for one, other, error in [(a, b, "float64 and float32"), (b, a, "float32 and float64"),
                              (c, c, "int"), (a, a, r"\(3, 3\) and \(3, 3\), float64")]:
        with pytest.raises((RuntimeError, KeyError), match=error):
            gpu.product(one, other)
        if one is c:
            monkeypatch.setattr(gpu.cp.cuda.cublas, "CUBLAS_COMPUTE_64F", 64)  # half

@parametrize("variant", [
    {}, {"dropout": 0.3}, {"taps": False, "normalize": True, "positions": True},
    {"block": "paper", "taps": False, "dropout": 0.3}], ids=["", "dropout", "positions", "paper"])
def test_the_graph_does_what_it_recorded(gpu, same, model_and_batch, variant, monkeypatch):
    """With other batches, keys and changed parameters; gradients lie where they lay."""
    config, params, *_ = model_and_batch(**variant)
    ours, state, rng = gpu.Flat(params), gpu.adamw_init(gpu.Flat(params)), np.random.default_rng(8)
    losses, direct = [], gpu._forward_and_backward
    for step in range(5):
        if step == 2:  # from here on it is not needed any more
            monkeypatch.setattr(gpu, "_forward_and_backward", lambda *_: pytest.fail("by kernel"))
        x, y = rng.integers(0, config.vocab_size, (2, 3, config.context))
        keys = np.random.default_rng(step).integers(2**63, size=2 * config.n_layer + 1)
        arrays = [gpu.cp.asarray(a) for a in ((x, y, keys) if config.dropout else (x, y))]
        loss, expected = direct(ours, config, 1.0, *arrays)
        losses.append(gpu.loss_and_grads(ours, config, x, y, step))
        same(losses[-1], (loss, {name: expected[name] for name in params}), 1e-15)
        assert losses[-1][1] is ours.gradients
        gpu.adamw_step(ours, ours.gradients, state, step, 0.1)
    assert len({float(loss) for loss, _ in losses}) == 5

@parametrize("when", ["early", "spoilt", "Ctrl-C"])
def test_without_a_graph(gpu, same, model_and_batch, monkeypatch, when):
    """A failure of the recording is told once, in its own words, its memory is given back, the
    numbers are the same; but after Ctrl-C the next call records."""
    config, params, x, y = model_and_batch()
    ours, expected = gpu.Flat(params), grassmann.loss_and_grads(params, config, x, y)
    gpu.loss_and_grads(ours, config, x, y)
    empty, released, release = gpu.cp.empty, [], gpu.card.Graph.__del__

    def fails(shape, dtype):
        if gpu.cp.cuda.get_current_stream().ptr:
            with contextlib.suppress(RuntimeError):
                when == "spoilt" and ours["E"].get()  # so that the end of the recording fails, too
            raise (KeyboardInterrupt if when == "Ctrl-C" else MemoryError)("the reason")
        return empty(shape, dtype)

    monkeypatch.setattr(gpu.cp, "empty", fails)
    monkeypatch.setattr(gpu.card.Graph, "__del__",
                        lambda graph: release(graph) or released.append(len(graph.memory)))
    with (pytest.raises(KeyboardInterrupt) if when == "Ctrl-C"
          else pytest.warns(UserWarning, match="without a CUDA graph.*: the reason")):
        same(gpu.loss_and_grads(ours, config, x, y), expected, 1e-12)
    assert released == [0]
    monkeypatch.setattr(gpu.cp, "empty", empty)
    for _ in range(3):
        same(gpu.loss_and_grads(ours, config, x, y), expected, 1e-12)
    assert isinstance(ours.graph, gpu.card.Graph) == (when == "Ctrl-C")

def test_all_that_a_graph_depends_on(gpu, same, set_precision, model_and_batch, monkeypatch):
    config, params, x, y = model_and_batch(np.float32)
    ours = gpu.Flat(params)

    def backward(dmix, cache):
        dh, grads = gpu.mix_backward(dmix, cache)
        return 2 * dh, grads

    own = gpu.mix_forward, backward, gpu.mix_shapes
    usual = {"mixer": gpu.MIXERS["grassmann"], "precision": "float32", "share": 1.0, "end": 2}
    for change in [{"mixer": own}, {"precision": "tf32"}, {"share": 0.5}, {"end": 5}]:
        for mixer, precision, share, end in (usual.values(), (usual | change).values()):
            monkeypatch.setitem(gpu.MIXERS, "grassmann", mixer)
            set_precision(precision)
            arrays = [gpu.cp.asarray(a[:end]) for a in (x, y)]
            loss, grads = gpu._forward_and_backward(ours, config, share, *arrays)
            for _ in range(3):
                found = gpu.loss_and_grads(ours, config, x[:end], y[:end], share=share)
                same(found, (loss, {name: grads[name] for name in params}), 1e-6)
            assert isinstance(ours.graph, gpu.card.Graph)  # one at a time

def test_every_dropout_has_its_key(gpu, model_and_batch):
    config, params, x, y = model_and_batch(dropout=0.3)
    n, arrays, losses = 2 * config.n_layer + 1, [gpu.cp.asarray(a) for a in (x, y)], set()
    for changed in range(n + 1):  # the last: none
        keys = gpu.cp.asarray(np.where(np.arange(n) == changed, 77, np.arange(n)))
        loss, _ = gpu._forward_and_backward(gpu.Flat(params), config, 1.0, *arrays, keys)
        losses.add(float(loss))
    assert len(losses) == n + 1

def test_dropout_does_not_depend_on_who_computes_which_rows(gpu, same, model_and_batch):
    config, params, x, y = model_and_batch(dropout=0.3)
    ours, n = gpu.Flat(params), len(x)
    whole, _ = gpu.loss_and_grads(ours, config, x, y, RowsOfBatch([1, 2], 0, n))
    parts = [gpu.loss_and_grads(ours, config, x[k : k + 1], y[k : k + 1], RowsOfBatch([1, 2], k, n),
                                1 / n)[0] for k in range(n)]
    same(sum(parts), whole, 1e-12)
    assert n > 1 and float(parts[0]) != float(gpu.loss_and_grads(
        ours, config, x[:1], y[:1], RowsOfBatch([1, 2], 1, n), 1 / n)[0])

@pytest.mark.gpu
@pytest.mark.skipif(os.name == "nt", reason="Windows lends a full card the computer's memory")
def test_memory_of_graphs_is_given_back(card, tiny_config):
    """Of those that are dropped, and of one that was begun when the card was full."""
    runtime, config = card.cp.cuda.runtime, tiny_config(d_model=64, context=64)
    params, batch = card.init_params(config), np.random.default_rng(0).integers(0, 11, (2, 512, 64))

    def in_use():
        card.cp.get_default_memory_pool().free_all_blocks()
        free, total = runtime.memGetInfo()
        return total - free

    step = functools.partial(card.loss_and_grads, params, config, *batch)
    step()
    before = in_use()
    for _ in range(3):
        step(), step(), step()
        assert in_use() > before + 2**24
        params.sources = params.key = params.graph = None
        assert in_use() < before + 2**24
    step()
    in_use()  # (which gives back what is not)
    full = card.cp.cuda.Memory(runtime.memGetInfo()[0] - 2**25)
    with pytest.warns(UserWarning, match="without a CUDA graph"), contextlib.suppress(MemoryError):
        step()
    del full
    step()
    assert in_use() < before + 2**24

# ---- training, sampling, checkpoints -------------------------------------------------------------

def test_training_follows_the_cpu(gpu, same, tiny_config, trained):
    config = tiny_config()
    params, ours = (m.init_params(config, dtype=np.float64) for m in (grassmann, gpu))
    same(ours, params)
    losses, state = trained(grassmann, config, params, 20)
    our_losses, our_state = trained(gpu, config, ours, 20)
    assert np.allclose(our_losses, losses, rtol=1e-12) and losses[-1] < losses[0]
    same((ours, our_state), (params, state), 1e-9)

@pytest.mark.gpu
@parametrize("gpu", ["card"], indirect=True)
@parametrize("precision, bound", [("float32", 1e-5), ("tf32", 2e-3)])
def test_200_steps_follow_the_cpu(gpu, set_precision, tiny_config, trained, precision, bound):
    """At a learning rate that is not too high: there rounding grows from step to step."""
    set_precision(precision)
    config = tiny_config(rank=32, d_model=64, d_ff=128)
    losses, ours = (
        trained(m, config, m.init_params(config), 200, lr=3e-3)[0] for m in (grassmann, gpu))
    assert np.abs(np.subtract(ours, losses)).max() < bound * losses[0]

def test_training_launches_every_kernel(stand_in, tiny_config, trained):
    """Nothing in kernels.cu is only compiled, or forgotten."""
    cuda_on_cpu.RAN.clear()
    config = tiny_config(dropout=0.1)
    trained(stand_in, config, stand_in.init_params(config), 1)
    assert KERNELS.keys() == cuda_on_cpu.RAN

@parametrize("dtype", [np.float32, np.float64])
def test_arrays_in_one_buffer(gpu, same, rng, dtype):
    """Each begins at a multiple of 256 bytes, matrices first; between them nothing ever changes."""
    shapes = {"b": (5,), "W": (3, 25), "c": (64,), "V": (2, 2)}
    theirs = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    ours, grads = gpu.Flat(theirs), gpu.Flat(theirs)
    same(ours, theirs)
    assert all((a.data.ptr - ours.buffer.data.ptr) % 256 == 0 for a in ours.values())
    assert (ours.matrices, ours.buffer.size) == (192, 320)
    gpu.clip_grads(grads, 0.1)
    gpu.adamw_step(ours, grads, gpu.adamw_init(ours), 0, 0.1)
    assert [np.count_nonzero(flat.buffer.get()) for flat in (ours, grads)] == [148, 148]

@parametrize("at_once, tokens, chunks", [(2048, 103, 2), (20, 100, 6), (20, 103, 7), (20, 2, 1)])
def test_validation(gpu, rng, model_and_batch, monkeypatch, at_once, tokens, chunks):
    """Whole windows and the rest, from either side; `each` sees every chunk."""
    monkeypatch.setattr(gpu, "SHARD_TOKENS", at_once)
    (config, params, *_), text, seen = model_and_batch(), rng.integers(0, 11, 200), []
    loss = grassmann.validation_loss(params, config, text[:tokens])
    for own in (text[:tokens], gpu.cp.asarray(text[:tokens])):
        found = gpu.validation_loss(gpu.Flat(params), config, own,
                                    lambda f, items: map(f, seen.append(items) or items))
        assert math.isclose(found, loss, rel_tol=1e-10) and len(seen.pop()) == chunks

def test_clipping(gpu, same, rng):
    for dtype, size, max_norm, bound in [  # no square of a float32 overflows
            (np.float64, 1, 1e-3, 1e-14), (np.float64, 1, 1e3, 0), (np.float32, 1e30, 1.0, 1e-6)]:
        theirs = {name: (size * rng.standard_normal(40_000)).astype(dtype) for name in "ab"}
        ours = gpu.Flat(theirs)
        norm = grassmann.clip_grads(theirs, max_norm)
        assert math.isclose(gpu.clip_grads(ours, max_norm), norm, rel_tol=1e-12)
        same(ours, theirs, bound)

def test_streams_and_generated_texts(gpu, same, model, monkeypatch):
    config, params, x, _ = model
    how = {"temperature": 0.9, "top_k": 5, "seed": 4}
    ours, state = gpu.Flat(params), gpu.stream_init(params, config)
    for token, logits in zip(x[0], gpu.forward(ours, config, x[:1])[0], strict=True):
        streamed, state = gpu.stream_step(ours, config, state, token)
        same(streamed, logits, 1e-12)
    text = list(grassmann.generate(params, config, [1, 2, 3], 20, **how))
    for on_host, *other in [(10**6, gpu, "_generate"), (0, grassmann, "generate")]:
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "ON_HOST", on_host)
            patch.setattr(*other, None)  # not by the card, not by NumPy
            assert list(gpu.generate(ours, config, [1, 2, 3], 20, **how)) == text
            with pytest.raises(ValueError, match="prompt"):
                gpu.generate(ours, config, [config.vocab_size], 1)

def test_checkpoints_of_either_load_in_the_other(gpu, same, tiny_config, trained, tmp_path):
    config, path, extra = tiny_config(), tmp_path / "model.npz", {"step": 2, "best": [2, 0.5]}
    params = gpu.init_params(config, 3)
    _, state = trained(gpu, config, params, 2)
    checkpoint.save_checkpoint(path, params, config, **state, **extra)
    loaded, _, rest = checkpoint.load_checkpoint(path)
    checkpoint.save_checkpoint(path, loaded, config, **rest)
    back, found, rest = checkpoint.load_checkpoint(path, gpu.Flat)
    assert found == config and {name: rest.pop(name) for name in extra} == extra
    same((back, rest), (params, state))
    assert all(isinstance(flat, gpu.Flat) for flat in (back, *rest.values()))
    back.buffer[...] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        checkpoint.save_checkpoint(path, back, config)

# ---- the programs --------------------------------------------------------------------------------

WORKS = "import cuda_on_cpu, sys; sys.modules['cupy'] = cuda_on_cpu"
BROKEN = {  # a cupy.py, and what the programs say
    "missing": ("raise ImportError('no such library')", "-r requirements-gpu12.* no such library"),
    "no device": ("def ones(shape): raise type('CompileException', (Exception,), {})('no device')",
                  "--gpu: .*requirements-gpu.txt .*driver .*CompileException: no device"),
    "no kernel": (f"{WORKS}\ndef empty(*_): raise RuntimeError('cudaErrorNoKernelImage: none')\n"
                  "cuda_on_cpu.empty = empty", "the card, .* failed: cudaErrorNoKernelImage: none"),
    "full": (f"{WORKS}\ndef empty(*_): raise MemoryError\ncuda_on_cpu.empty = empty",
             "not enough memory; a smaller --batch-size"),
}

def test_training_on_a_gpu_goes_on_on_a_cpu(stand_in, program, tmp_path):
    """train_char.py --gpu writes what the CPU writes; --resume and sample.py work across."""
    options = ("--context 8 --n-layer 2 --d-model 8 --rank 3 --batch-size 4 --eval-every 10 "
               f"--dropout 0 --iters 20 --data {tmp_path / 'text.txt'}").split()
    out, logs = tmp_path / "gpu", []
    for where, flags in [("gpu", ["--gpu"]), ("cpu", [])]:
        process = program(WORKS, "train_char.py", *options, "--out", tmp_path / where, *flags)
        assert (process.returncode, process.stderr) == (0, "")
        logs.append(np.genfromtxt(tmp_path / where / "log.csv", delimiter=",", skip_header=1))
    assert np.allclose(logs[0][:, :4], logs[1][:, :4], rtol=1e-5)
    process = program(None, "train_char.py", "--resume", "--out", out, "--iters", 30)
    assert (process.returncode, process.stderr) == (0, "")
    samples = [program(WORKS, "sample.py", out / "best.npz", "--length", 30, "--seed", 1, *flags)
               for flags in ([], ["--gpu"], ["--gpu", "--precision", "tf32"])]
    assert [process.stderr for process in samples] == [""] * 3
    assert len(samples[0].stdout) == 31 and len({process.stdout for process in samples}) == 1

@parametrize("cupy, error", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_one_sentence(program, tmp_path, cupy, error):
    process = program(cupy, "train_char.py", "--gpu", "--data", tmp_path / "text.txt",
                      "--context", 8, "--out", tmp_path / "out")
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert re.match(f"train_char.py: .*{error}", process.stderr)
    if "device" in cupy or "library" in cupy:
        process = program(cupy, "sample.py", "--gpu", "--seed", 1)
        assert process.stdout == "" and re.match(f"sample.py: .*{error}\\S*\n$", process.stderr)

@pytest.mark.gpu
def test_a_full_card_is_one_sentence(card, program, tmp_path):
    process = program(None, "train_char.py", "--data", tmp_path / "text.txt", "--gpu", "--out",
                      tmp_path / "out", "--context", 64, "--batch-size", 900000)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("train_char.py: not enough memory; a smaller --batch-size")
