"""gpu.py against grassmann.py, with a GPU or without.

Without one, its kernels run on the CPU, and NVRTC, which needs none, compiles them for GPUs. On a
card, `python -m pytest -m gpu` runs the same tests once more.
"""

import contextlib
import importlib.util
import inspect
import itertools
import math
import os
from pathlib import Path
from types import SimpleNamespace

import cuda_on_cpu
import numpy as np
import pytest

import checkpoint
import grassmann
from grassmann import Config, Scope
from training import Training, train_step

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
    names = (f"{cuda_on_cpu.FUNCTIONS} array asarray ascontiguousarray empty finfo inf RawModule "
             "get_default_memory_pool")
    operators = ["get", "set", *(f"__{name}__" for name in cuda_on_cpu.OPERATORS.split())]
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
    """y[i + shift] = x[63 - i] + 1000 i' + 100 f for i from `first` on: i' is the lane beside i, f
    the place of the first set bit of 32, one of which is set in each half of the block."""
    module = cuda_on_cpu.RawModule(r"""
        extern "C" __global__ void toy(int first, int wait, int shift, const int* x, int* y) {
            __shared__ int all[64];
            const int i = threadIdx.x, place = blockIdx.x * 64 + i;
            if (i < first) return;
            all[i] = x[place];
            if (wait) __syncthreads();
            const int x_i = all[63 - i], f = __ffs(__ballot_sync(~0, i % 32 == 5 || i == 33));
            y[place + shift] = x_i + 1000 * __shfl_xor_sync(~0, i, 1) + 100 * f;
        }""", ("-Dreal=float",))

    def run(*args, grid=3, block=64):
        typed = tuple(np.int32(a) if isinstance(a, int) else a for a in args)
        module.get_function("toy")((grid,), (block,), typed)
    return run

X = cuda_on_cpu.asarray(np.arange(192, dtype=np.int32))
Y = cuda_on_cpu.zeros(192, dtype=np.int32)

def test_the_cpu_waits_as_a_card_does(toy):
    i = np.arange(64)
    right = X.get().reshape(3, 64)[:, ::-1] + 1000 * (i ^ 1) + 100 * np.repeat([6, 2], 32)
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
@parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_block(gpu, same, rng, layer, dtype, bound):
    """The mixing layer and the FFN, between the LayerNorms that add up what they give."""
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

@both_dtypes
@parametrize("taps", [False, True])
def test_pairs_that_span_no_plane(gpu, same, rng, taps, dtype, bound):
    """Equal, parallel, opposite and zero vectors, or nearly so: no gradient, not NaN. A plane of
    short vectors, or of an angle just above the threshold, is a plane like any other."""
    u, v, side = np.eye(5)[0], np.ones(5), np.eye(5)[1]
    z = np.array([u, u, 3 * u, 0 * u, v, -v, 7 * v + 4e-5 * side, 1e-12 * side, 1e-12 * u,
                  u + 2e-5 * side], dtype)[None]
    ds, ones = drawn(z.shape, dtype, rng), np.ones((1, 5), dtype)
    s, cache = grassmann.partner_forward(z, ones if taps else None, (1,), True)
    our_s, our_cache = gpu.partner_forward(
        on_device(gpu, z), on_device(gpu, ones) if taps else None, (1,), True)
    same(our_s, s, 100 * bound)  # (near the threshold little is left of a height)
    dz = gpu.partner_backward(on_device(gpu, ds), our_cache)[0]
    same(dz, grassmann.partner_backward(ds, cache)[0], 100 * bound)
    assert (dz.get()[0, :6] == 0).all() and dz.get()[0, 6:].any(axis=1).all()

# ---- whole models --------------------------------------------------------------------------------

@pytest.fixture
def model(variant, model_and_batch):
    """Each of the twelve, some with positions."""
    return model_and_batch(**variant, positions=variant.get("normalize") != variant.get("taps"))

def test_model(gpu, same, model, recwarn):
    """Kernel by kernel, then from a graph; attention and memory are not recorded, without a word."""
    config, params, x, y = model
    ours = gpu.Flat(params)
    same(gpu.forward(ours, config, x), grassmann.forward(params, config, x), 1e-12)
    for share in (1.0, 0.25) * 3:
        loss, grads = gpu.loss_and_grads(ours, config, x, gpu.cp.asarray(y), share=share)
        assert list(grads) == list(params)
        same((loss, grads), grassmann.loss_and_grads(params, config, x, y, share=share), 1e-12)
    assert not recwarn.list
    with pytest.raises(ValueError, match="one shape"):
        gpu.loss_and_grads(ours, config, x, y[:4])

@parametrize("precision, bound", [("float32", 1e-5), ("tf32", 2e-3)])
def test_precision(gpu, same, set_precision, tiny_config, batch, precision, bound):
    """Rounded products: the same gradients, within a few units of their last place."""
    set_precision(precision)
    config, (x, y) = tiny_config(rank=33, d_model=64, d_ff=128), batch(5)
    params, exact = (grassmann.init_params(config, 0, dtype) for dtype in (np.float32, np.float64))
    ours = gpu.loss_and_grads(gpu.Flat(params), config, x, y)
    theirs = grassmann.loss_and_grads(params, config, x, y)
    same(ours, theirs, bound)
    if precision != "float32":
        with pytest.raises(AssertionError):  # something is rounded
            same(ours[1]["blocks.0.ffn.W_1"], theirs[1]["blocks.0.ffn.W_1"], 2e-5)
    same(gpu.forward(gpu.Flat(exact), config, x), grassmann.forward(exact, config, x), 1e-12)

def test_an_older_card_is_refused(stand_in, monkeypatch):
    monkeypatch.setattr("cuda_on_cpu.cuda.Device", lambda: SimpleNamespace(compute_capability="75"))
    stand_in.set_precision("float32")
    for precision, error in [("tf32", "tf32 needs compute capability 8.0"),
                             ("float16", "not 'float16'")]:
        with pytest.raises(ValueError, match=error):
            stand_in.set_precision(precision)

def test_gradients_with_dropout_are_slopes(gpu, rng, model_and_batch, slope):
    config, params, x, y = model_and_batch(dropout=0.2, normalize=True)
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
    set_precision(precision if real == np.float32 else "float32")
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
                              (c, c, "int")]:
        with pytest.raises((RuntimeError, KeyError), match=error):
            gpu.product(one, other)
    monkeypatch.setattr(gpu.cp.cuda.cublas, "CUBLAS_COMPUTE_64F", 64)  # half: not for float64
    with pytest.raises(RuntimeError, match=r"refuses a product of \(3, 3\) and \(3, 3\), float64"):
        gpu.product(a, a)

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
    monkeypatch.setattr(gpu.card.Graph, "__del__", lambda graph: released.append(release(graph)))
    with (pytest.raises(KeyboardInterrupt) if when == "Ctrl-C"
          else pytest.warns(UserWarning, match="without a CUDA graph.*: the reason")):
        same(gpu.loss_and_grads(ours, config, x, y), expected, 1e-12)
    assert len(released) == 1
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

    card.loss_and_grads(params, config, *batch)
    before = in_use()
    for _ in range(3):
        for _ in range(3):
            card.loss_and_grads(params, config, *batch)
        assert in_use() > before + 2**24
        params.key = params.graph = params.sources = None
        assert in_use() < before + 2**24
    card.loss_and_grads(params, config, *batch)
    in_use()  # (which gives back what is not)
    full = card.cp.cuda.Memory(runtime.memGetInfo()[0] - 2**25)
    with pytest.warns(UserWarning, match="without a CUDA graph"), contextlib.suppress(MemoryError):
        card.loss_and_grads(params, config, *batch)
    del full
    card.loss_and_grads(params, config, *batch)
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
    losses, _ = trained(grassmann, config, grassmann.init_params(config), 200, lr=3e-3)
    our_losses, _ = trained(gpu, config, gpu.init_params(config), 200, lr=3e-3)
    assert np.abs(np.subtract(our_losses, losses)).max() < bound * losses[0]

def test_training_launches_every_kernel(stand_in, tiny_config, trained):
    """Nothing in kernels.cu is only compiled, or forgotten."""
    cuda_on_cpu.RAN.clear()
    config = tiny_config(dropout=0.1)
    trained(stand_in, config, stand_in.init_params(config), 1)
    assert KERNELS.keys() == cuda_on_cpu.RAN

@parametrize("dropout, most", [(0.0, 108), (0.1, 110)])
def test_how_much_a_step_starts(stand_in, monkeypatch, dropout, most):
    """Of train_char.py's model: nodes in the graph, and launches and copies around it."""
    monkeypatch.setattr(cuda_on_cpu, "dry", True)
    config = Config(65, dropout=dropout)
    params, text = stand_in.init_params(config), stand_in.np.zeros(1000, dtype=np.uint8)
    state = stand_in.adamw_init(params)
    for step in range(3):
        cuda_on_cpu.started.clear()
        batch = stand_in.get_batch(text, 12, config.context, 1, step)
        train_step(stand_in, params, config, Training(), state, step, *batch, threads=0)
    assert len(params.graph.graph.nodes) <= most and len(cuda_on_cpu.started) <= 14

@parametrize("dtype", [np.float32, np.float64])
def test_arrays_in_one_buffer(gpu, same, rng, dtype):
    """Each begins at a multiple of 256 bytes, matrices first; between them nothing ever changes."""
    theirs = {"b": rng.standard_normal(5), "W": rng.standard_normal((3, 25)), "c": np.ones(64),
              "V": np.ones((2, 2))}
    theirs = {name: a.astype(dtype) for name, a in theirs.items()}
    ours, grads = gpu.Flat(theirs), gpu.Flat(theirs)
    state = gpu.adamw_init(ours)
    same(ours, theirs)
    assert all((a.data.ptr - ours.buffer.data.ptr) % 256 == 0 for a in ours.values())
    assert ours.matrices == 192 and ours.buffer.size == 320
    gpu.clip_grads(grads, 0.1)
    gpu.adamw_step(ours, grads, state, 0, 0.1)
    for flat in (ours, grads, *state.values()):
        assert np.count_nonzero(flat.buffer.get()) == sum(a.size for a in theirs.values())

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
    for on_host in (10**6, 0):  # by NumPy, by the card
        monkeypatch.setattr(gpu, "ON_HOST", on_host)
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
FULL = f"{WORKS}\ndef empty(*_): raise MemoryError\ncuda_on_cpu.empty = empty"
MISSING = "raise ImportError('no such library')"
NO_DEVICE = "def ones(shape): raise type('CompileException', (Exception,), {})('no device')"

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

@parametrize("name", ["train_char.py", "sample.py"])
@parametrize("cupy", [MISSING, NO_DEVICE], ids=["missing", "no device"])
def test_no_gpu_is_one_sentence(program, cupy, name):
    process = program(cupy, name, "--gpu", "--seed", 1)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (2, "", 1)
    for word in ("--gpu", "requirements-gpu12.txt", "requirements-gpu.txt", "driver", "no "):
        assert word in process.stderr

def test_an_error_of_cuda_is_one_sentence(stand_in, program, tmp_path):
    broken = (f"{WORKS}\ndef fails(*_): raise RuntimeError('cudaErrorNoKernelImageForDevice: no image')\n"
              "cuda_on_cpu.RawModule.get_function = lambda module, name: fails")
    options = f"--data {tmp_path / 'text.txt'} --gpu --out {tmp_path / 'out'} --context 8"
    process = program(broken, "train_char.py", *options.split())
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert "the card, its driver or its libraries failed: cudaErrorNoKernel" in process.stderr

def test_a_full_card_is_one_sentence(gpu, program, tmp_path):
    cupy, size = FULL, "--context 8"
    if gpu.cp is not cuda_on_cpu:
        cupy, size = None, "--context 64 --batch-size 900000"
    options = f"--data {tmp_path / 'text.txt'} --gpu --out {tmp_path / 'out'} {size}"
    process = program(cupy, "train_char.py", *options.split())
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("train_char.py: not enough memory; a smaller --batch-size")
