"""gpu.py against grassmann.py: on the CPU stand-in, and on a GPU (`python -m pytest -m gpu`)."""

import contextlib
import functools
import inspect
import itertools
import math
from types import SimpleNamespace

import cuda_on_cpu
import numpy as np
import pytest

import grassmann
from charlm import checkpoint
from charlm.training import Training
from grassmann import Config, Scope

parametrize = pytest.mark.parametrize

# ---- names, and the stand-in ---------------------------------------------------------------------


PUBLIC = [
    name
    for name, value in vars(grassmann).items()
    if inspect.isfunction(value) and value.__module__ == "grassmann"
]


def signature(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@parametrize("rung", ["first_rung", "stand_in"])
@parametrize("name", PUBLIC)
def test_every_function_has_the_arguments_of_the_cpu(request, rung, name):
    theirs = signature(getattr(grassmann, name))
    ours = signature(getattr(request.getfixturevalue(rung), name))
    shared = min(len(ours), len(theirs))  # layernorm_forward takes more
    assert ours[:shared] == theirs[:shared]


def test_every_name_is_one_of_cupy():
    """What the stand-in offers, and so what gpu.py uses, exists in the real library."""
    cupy = pytest.importorskip("cupy", reason="no CuPy")
    names = (
        cuda_on_cpu.NAMES + " array asarray empty finfo inf RawModule get_default_memory_pool"
    ).split()
    operators = ["get", "set", *(f"__{name}__" for name in cuda_on_cpu.OPERATORS.split())]
    parts, runtime = vars(cuda_on_cpu.cuda).keys() - {"cublas"}, vars(cuda_on_cpu.cuda.runtime)
    for module, found in [
        (cupy, names),
        (cupy.ndarray, operators),
        (cupy.cuda, parts),
        (cupy.cuda.runtime, runtime),
    ]:
        assert all(getattr(module, name) is not None for name in found)
    assert "__matmul__" not in vars(
        cupy.ndarray
    )  # it is inherited, so that ours can be taken away again
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)  # which the programs report


def test_the_stand_in_waits_as_a_gpu_does_and_refuses_what_cuda_does_not_define(stand_in):
    """y[i + shift] = x[63 - i] + 1000 i' for i from `first` on, where i' is the lane beside i."""
    toy = cuda_on_cpu.RawModule(
        r"""
        extern "C" __global__ void toy(int first, int wait, int shift, const int* x, int* y) {
            __shared__ int all[64];
            const int i = threadIdx.x, place = blockIdx.x * 64 + i;
            if (i < first) return;
            all[i] = x[place];
            if (wait) __syncthreads();
            y[place + shift] = all[63 - i] + 1000 * __shfl_xor_sync(~0, i, 1);
        }""",
        ("-Dreal=float", "--std=c++17"),
    ).get_function("toy")
    x, y = (
        cuda_on_cpu.asarray(np.arange(192, dtype=np.int32)),
        cuda_on_cpu.zeros(192, dtype=np.int32),
    )
    right, zero, one = (
        x.get().reshape(3, 64)[:, ::-1] + 1000 * (np.arange(64) ^ 1),
        *np.arange(2, dtype=np.int32),
    )
    for wait in (one, zero):
        toy((3,), (64,), (zero, wait, zero, x, y))
        assert ((y.get().reshape(3, 64) == right).all(axis=1) == wait).all()
    toy((3,), (64,), (32 * one, zero, zero, x, y))  # a whole warp may leave
    for block, args, error in [
        (64, (one, zero, zero, x, y), "will never come"),
        (64, (63 * one, one, zero, x, y), "will never come"),
        (64, (zero, one, one, x, y), "wrote beside"),
        (64, (zero, one, -one, x, y), "wrote beside"),
        (1025, (zero, one, zero, x, y), "invalid"),
        (64, (zero, one, np.int64(0), x, y), "shift is"),
        (64, (zero, one, zero, x, None), "y is None"),
        (64, (zero, one, zero, x, cuda_on_cpu.zeros(192)), "y is"),
    ]:
        with pytest.raises((RuntimeError, AssertionError), match=error):
            toy((3,), (block,), args)


def test_arrays_keep_to_their_side_and_new_memory_is_nan(stand_in):
    """Memory that a recording allocates is new at every launch."""
    here, there = np.ones(3), cuda_on_cpu.ones(3)
    for mix in [
        lambda: here + there,
        lambda: there + here,
        lambda: np.asarray(there),
        lambda: np.exp(there),
        lambda: cuda_on_cpu.stack([here, there]),
        lambda: there[here > 0],
        lambda: there.__setitem__(0, here),
    ]:
        with pytest.raises((TypeError, ValueError)):
            mix()
    assert float(there.sum()) == 3 and np.isnan(cuda_on_cpu.empty(3).host).all()
    graph = stand_in.fused.device.Graph(lambda: cuda_on_cpu.empty(3))
    graph.outputs.host[...] = 1
    assert np.isnan(graph().host).all()


# ---- op by op ------------------------------------------------------------------------------------

T, D, V = (3, 23), 37, 70  # no size divides evenly into blocks; two need more than a warp
RNG = np.random.default_rng(2)
TOKENS = RNG.integers(0, V, (9, 131)) % 60  # some are missing
TOKENS[0] = 3
OPS = {  # the inputs, or their shapes; a dict is a part of the parameters
    "linear": [(*T, 5), (5, D), (D,)],
    "head": [(*T, D), (V, D)],
    "layernorm": [(*T, D), (D,), (D,)],
    "layernorm, narrow": [(1, 3), (3,), (3,)],
    "layernorm, many tokens": [(130, 300), (300,), (300,)],
    "gelu": [(*T, D)],
    "gelu, one row": [(5,)],
    "gelu, huge": [np.array([-1e30, -60, -11, 0, 11, 60, 1e30])],
    "embedding": [TOKENS, (V, D)],
} | {
    f"cross_entropy, {n}": [30 * RNG.standard_normal((*T, n)), RNG.integers(0, n, T)]
    for n in (2, 32, V)
}
LAYERS = {
    "attention": {"mixer": "attention", "d_model": 36, "offsets": ()},
    "memory": {"memory": True},
}
LAYERS |= {f"rank {r}": {"rank": r} for r in (2, 3, 31, 32, 33, 64, 65)}
LAYERS |= {
    "average": {"taps": False},
    "average, normalized": {"taps": False, "normalize": True},
    "normalized": {"normalize": True},
    "memory, average": {"memory": True, "taps": False},
}
both_dtypes = parametrize("dtype, bound", [(np.float64, 1e-12), (np.float32, 1e-5)])


def drawn(what, dtype, rng):
    if isinstance(what, dict):
        return {name: drawn(s, dtype, rng) / dtype(math.sqrt(s[0])) for name, s in what.items()}
    if isinstance(what, np.ndarray):
        return what.astype(dtype) if what.dtype.kind == "f" else what
    return rng.standard_normal(what).astype(dtype)


def on_device(gpu, a, strided=False):
    """The array on the GPU; with `strided`, in every other place, since arrays need not be
    contiguous."""
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
    """The mixing layer and the FFN, between the LayerNorms that add up their outputs. A warp has
    one token or, as in long batches, three."""
    monkeypatch.setattr(gpu.fused.device, "chunks", lambda T: (-(-T // chunk), chunk))
    config = Config(
        2,
        **{"context": 23, "n_layer": 1, "d_model": D, "d_ff": 70, "offsets": ((1, 2, 7, 22),)}
        | layer,
    )
    shapes = {
        name.removeprefix("blocks.0."): shape
        for name, shape in grassmann.param_shapes(config).items()
        if "blocks" in name
    }
    w, h, dy = drawn(shapes, dtype, rng), *(drawn((*T, config.d_model), dtype, rng) for _ in "hy")

    def run(model, w, h, dy):
        out, cache = model.prenorm_block_forward(h, Scope(w), config, 0)
        y, c_norm = model.layernorm_forward(out, w["ln1.w"], w["ln1.b"])
        dout, *_ = model.layernorm_backward(dy, c_norm)
        mix = cache["mix"]
        if "logits" in mix:
            mix["alpha"] = 1 / (1 + gpu.np.exp(-(mix["logits"] + w["mix.b_gate"])))
        seen = {name: mix[name] for name in {"z", "s", "p", "alpha"} & mix.keys()}
        return y, seen, *model.prenorm_block_backward(dout, cache, config)

    ours = run(gpu, gpu.Flat(w), on_device(gpu, h), on_device(gpu, dy))
    same(ours, run(grassmann, w, h, dy), bound)


@both_dtypes
def test_dropout(gpu, same, rng, dtype, bound):
    x, w = drawn((7, 50, D), dtype, rng), np.ones(D, dtype)
    ours, our_w = on_device(gpu, x), on_device(gpu, w)
    (y, mask), (again, _), (other, _) = (
        gpu.dropout_forward(ours, 0.3, gpu.draw_rows(k)) for k in (5, 5, 6)
    )
    kept = y.get() != 0
    same((again, gpu.dropout_backward(ours, mask)), (y, y))
    same(y, np.where(kept, x / dtype(0.7), 0), 1e-7)
    assert (y.get() != other.get()).any() and gpu.dropout_forward(x, 0.3, None)[0] is x
    assert abs(kept.mean() - 0.7) < 0.02 and abs(kept[..., ::2].mean() - 0.7) < 0.03
    assert abs(np.corrcoef(kept[:, 1:].ravel(), kept[:, :-1].ravel())[0, 1]) < 0.03
    later, _ = gpu.dropout_forward(gpu.fused._Sum(ours, our_w), 0.3, gpu.draw_rows(5))
    _, cache = gpu.layernorm_forward(ours + later, our_w, our_w)  # x + D(x + 1)
    same(cache[0].total, x + np.where(kept, (x + 1) / dtype(0.7), 0), bound)
    grad, *_ = gpu.layernorm_backward(ours, cache)
    same(grad.x, np.where(kept, grad.h.get() / dtype(0.7), 0), bound)


@parametrize("precision, bound", [("float64", 1e-15), ("float32", 1e-6), ("tf32", 1e-3)])
@parametrize("sizes", [(3, 5, 7), (1, 5, 1), (64, 1, 2), (384, 512, 256)])
def test_products(gpu, same, set_precision, rng, precision, bound, sizes):
    """Products of matrices in any memory layout, and of stacks; into a part of another array, or
    added to it."""
    real = np.float64 if precision == "float64" else np.float32
    set_precision("float32" if precision == "float32" else "tf32")  # which is for float32 alone
    a, b = (rng.standard_normal(shape).astype(real) for shape in (sizes[:2], sizes[1:]))
    exact = (a.astype(np.float64) @ b).astype(real)

    def laid_out(host):
        """The array as it is, as a transpose, as every other column, and as half of the columns."""
        x = on_device(gpu, host)
        half = gpu.cp.concatenate([x, x], 1)[:, x.shape[1] :]
        return x, gpu.cp.ascontiguousarray(x.T).T, on_device(gpu, host, strided=True), half

    ours = laid_out(a), laid_out(b)
    for one, other in itertools.product(*ours):
        same(gpu.fused.product(one, other), exact, bound)
        if len(a) < 100:
            left, right = (gpu.cp.stack([x, x, -x])[None] for x in (one, other))
            with gpu.fused.device.recordable_products():
                same(left @ right, np.stack([exact] * 3)[None], bound)
                same(
                    right.swapaxes(-1, -2) @ left.swapaxes(-1, -2),
                    np.stack([exact.T] * 3)[None],
                    bound,
                )
    wide = gpu.cp.zeros((2, len(a), 2 * sizes[2]), real)
    for add in (False, True):
        gpu.fused.product(gpu.cp.stack([ours[0][0]] * 2), ours[1][0], wide[..., sizes[2] :], add)
    same(wide, np.stack([np.concatenate([0 * exact, 2 * exact], 1)] * 2), bound)


def test_a_product_that_is_refused(gpu):
    a, b, c = (on_device(gpu, np.ones((3, 3), dtype)) for dtype in (np.float64, np.float32, int))
    with pytest.raises(ValueError, match="same number of matrices"):
        gpu.fused.product(a[None], gpu.cp.stack([a, a]))
    for one, other, error in [
        (a, b, "float64 and float32"),
        (b, a, "float32 and float64"),
        (c, c, "int"),
    ]:
        with pytest.raises((RuntimeError, KeyError), match=error):
            gpu.fused.product(one, other)


# ---- whole models --------------------------------------------------------------------------------


@pytest.fixture
def model(variant, model_and_batch):
    """Each of the twelve, some with positions."""
    return model_and_batch(**variant, positions=variant.get("normalize") != variant.get("taps"))


def test_model(gpu, same, model):
    """Logits, loss and gradients, of part of a batch too; gradients belong to the caller."""
    params, config, x, y = model
    ours = gpu.Flat(params)
    same(gpu.forward(ours, config, x), grassmann.forward(params, config, x), 1e-12)
    loss, grads = gpu.loss_and_grads(ours, config, x, gpu.cp.asarray(y))
    part = gpu.loss_and_grads(ours, config, x, y, rows=(5, 20))
    assert list(grads) == list(params)
    same((loss, grads), grassmann.loss_and_grads(params, config, x, y), 1e-12)
    same(part, grassmann.loss_and_grads(params, config, x, y, rows=(5, 20)), 1e-12)
    with pytest.raises(ValueError, match="same shape"):
        gpu.loss_and_grads(ours, config, x, y[:4])


def test_an_older_gpu_is_refused(stand_in, monkeypatch):
    monkeypatch.setattr(
        "cuda_on_cpu.cuda.Device",
        lambda *_: SimpleNamespace(compute_capability="75", use=lambda: None),
    )
    for precision, error in [
        ("tf32", "tf32 needs compute capability 8.0"),
        ("float16", "not 'float16'"),
    ]:
        with pytest.raises(ValueError, match=error):
            stand_in.set_precision(precision)


@parametrize("block", grassmann.BLOCKS)
def test_gradients_with_dropout_are_slopes(gpu, same, rng, model_and_batch, slope, block):
    """The masks do not depend on how the rows are split."""
    params, config, x, y = model_and_batch(dropout=0.2, block=block)

    def result(part=slice(None), **more):
        return gpu.loss_and_grads(gpu.Flat(params), config, x[part], y[part], (3, 4), **more)

    whole, grads = result()
    parts = [result(slice(k, k + 1), rows=(k, len(x)))[0] for k in range(len(x))]
    same(sum(parts), whole, 1e-12)
    assert float(parts[0]) != float(result(slice(1), rows=(1, len(x)))[0])
    for name in ["E", "blocks.0.mix.taps", "blocks.1.ln2.w", "blocks.1.ffn.b_1"]:
        direction = rng.standard_normal(params[name].shape)
        direction /= np.linalg.norm(direction)
        measured = slope(lambda: float(result()[0]), params[name], direction)
        assert math.isclose(
            np.vdot(grads[name].get(), direction), measured, rel_tol=1e-6, abs_tol=1e-9
        ), name


# ---- the recorded step ---------------------------------------------------------------------------


@parametrize("dtype, bound", [(np.float64, 1e-9), (np.float32, 1e-3)])
@parametrize(
    "changes",
    [
        {},
        {"memory": True},
        {"mixer": "attention", "offsets": (), "positions": True},
        {"taps": False, "normalize": True},
        {"block": "paper", "taps": False, "normalize": True, "positions": True},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_training_follows_the_cpu(gpu, same, tiny_config, trained, recwarn, changes, dtype, bound):
    """Every model is recorded, without a warning, and its steps equal grassmann.py's."""
    config = tiny_config(**changes)
    params, ours = (m.init_params(config, dtype=dtype) for m in (grassmann, gpu))
    same(ours, params)
    losses, state = trained(grassmann, config, params, 12)
    our_losses, our_state = trained(gpu, config, ours, 12)
    assert np.allclose(our_losses, losses, rtol=bound) and len({*losses}) == 12
    same((ours, our_state), (params, state), 10 * bound)
    assert isinstance(ours.step.graphs["step"], gpu.fused.device.Graph) and not recwarn.list


def test_the_graph_does_what_its_kernels_do(gpu, same, tiny_config, trained, monkeypatch):
    """With dropout, whose numbers differ from the CPU's. From the third step on no function is
    called."""
    config, calls, function = tiny_config(dropout=0.3), itertools.count(), gpu.fused._differentiate
    params, ours = (gpu.init_params(config, dtype=np.float64) for _ in "ab")
    with monkeypatch.context() as patch:
        patch.setattr(gpu.fused.device.Step, "run", lambda step, name, function: function())
        losses, state = trained(gpu, config, params, 8)
    monkeypatch.setattr(
        gpu.fused, "_differentiate", lambda *args: next(calls) < 2 and function(*args)
    )
    same((*trained(gpu, config, ours, 8), ours), (losses, state, params), 1e-14)
    assert len({*losses}) == 8


def test_all_that_a_step_depends_on(gpu, set_precision, tiny_config):
    """Another text, batch size, optimiser or precision is another recording."""
    config, seen = tiny_config(), []
    ours, texts = (
        gpu.init_params(config),
        [gpu.cp.asarray(np.arange(300, dtype=np.uint8) % k) for k in (7, 11)],
    )
    states, usual = [gpu.adamw_init(ours) for _ in "ab"], "float32"
    for size, a, b, precision in [
        (3, 0, 0, usual),
        (3, 0, 0, usual),
        (4, 0, 0, usual),
        (3, 1, 0, usual),
        (3, 0, 1, usual),
        (3, 0, 1, "tf32"),
    ]:
        set_precision(precision)
        for k in range(3):
            gpu.train_step(ours, config, Training(batch_size=size), states[a], k, texts[b])
        seen.append(ours.step)
        assert isinstance(ours.step.graphs["step"], gpu.fused.device.Graph)
    assert seen[0] is seen[1] and len({*map(id, seen)}) == 5


@parametrize(
    "name, change, error",
    [
        ("W_red", lambda cp, g: cp.ascontiguousarray(g.T).T, None),
        ("W_plu", lambda cp, g: g.astype(np.float32), "W_plu must .* float64; .* float32"),
        (
            "W_plu",
            lambda cp, g: cp.ascontiguousarray(g.T),
            r"W_plu must have shape \(6, 8\) .* \(8, 6\)",
        ),
    ],
    ids=["strided", "another dtype", "transposed"],
)
def test_gradients_of_a_layer_of_ones_own(
    gpu, same, tiny_config, trained, monkeypatch, name, change, error
):
    """A strided gradient is copied at every step, inside the recording: a copy outside the graph
    would hold the gradients of one step for ever. Other shapes and dtypes are refused."""

    def backward(dmix, cache):
        dh, grads = gpu.mix_backward(dmix, cache)
        return dh, grads | {name: change(gpu.cp, grads[name])}

    monkeypatch.setitem(gpu.MIXERS, "grassmann", (gpu.mix_forward, backward, gpu.mix_shapes))
    config = tiny_config()
    params, ours = (m.init_params(config, dtype=np.float64) for m in (grassmann, gpu))
    with pytest.raises(ValueError, match=error) if error else contextlib.nullcontext():
        trained(gpu, config, ours, 5)
        trained(grassmann, config, params, 5)
        same(ours, params, 1e-9)


@parametrize("when", ["early", "spoilt", "Ctrl-C"])
def test_without_a_graph(gpu, same, tiny_config, trained, monkeypatch, when):
    """If recording fails, one warning gives the reason, the memory is given back, and the numbers
    are the same. After Ctrl-C the next step records."""
    config, empty, released, release = (
        tiny_config(),
        gpu.cp.empty,
        [],
        gpu.fused.device.Graph.__del__,
    )
    params, ours = (m.init_params(config, dtype=np.float64) for m in (grassmann, gpu))

    def fails(shape, dtype):
        if gpu.cp.cuda.get_current_stream().ptr:
            with contextlib.suppress(RuntimeError):
                when == "spoilt" and ours["E"].get()  # so that the end of the recording fails, too
            raise (KeyboardInterrupt if when == "Ctrl-C" else MemoryError)("the reason")
        return empty(shape, dtype)

    monkeypatch.setattr(gpu.cp, "empty", fails)
    monkeypatch.setattr(
        gpu.fused.device.Graph, "__del__", lambda g: release(g) or released.append(len(g.memory))
    )
    with (
        pytest.raises(KeyboardInterrupt)
        if when == "Ctrl-C"
        else pytest.warns(UserWarning, match="without a CUDA graph.*: the reason")
    ):
        trained(gpu, config, ours, 5)
        trained(grassmann, config, params, 5)
        same(ours, params, 1e-9)
    assert released == [0]
    monkeypatch.setattr(gpu.cp, "empty", empty)
    trained(gpu, config, ours, 3)
    assert ours.step.graphs["step"]


@pytest.mark.gpu
def test_memory_of_graphs_is_given_back(on_gpu, tiny_config):
    config = tiny_config(d_model=64)
    params, tokens, training = (
        on_gpu.init_params(config),
        on_gpu.cp.zeros(1000, np.uint8),
        Training(batch_size=512),
    )
    step = functools.partial(
        on_gpu.train_step, params, config, training, on_gpu.adamw_init(params), 0, tokens
    )

    def free():
        on_gpu.cp.get_default_memory_pool().free_all_blocks()
        return on_gpu.cp.cuda.runtime.memGetInfo()[0]

    step()
    before = free()
    step()
    assert free() < before - 2**23
    params.step = None
    assert free() > before - 2**22


# ---- arrays, validation, sampling, checkpoints ---------------------------------------------------


def test_arrays_in_one_buffer(gpu, rng):
    """Each array begins at a multiple of 256 bytes, matrices first. The bytes between arrays never
    change."""
    shapes = {"b": (5,), "W": (3, 25), "c": (64,), "V": (2, 2)}
    theirs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    ours, grads = gpu.Flat(theirs), gpu.Flat(theirs)
    assert all((a.data.ptr - ours.buffer.data.ptr) % 256 == 0 for a in ours.values())
    assert (ours.matrices, ours.buffer.size) == (192, 320)
    gpu.clip_grads(grads, 0.1)
    gpu.adamw_step(ours, grads, gpu.adamw_init(ours), 0, 0.1)
    assert [np.count_nonzero(flat.buffer.get()) for flat in (ours, grads)] == [148, 148]


@parametrize("at_once, tokens, chunks", [(2048, 103, 2), (20, 100, 6), (20, 103, 7), (20, 2, 1)])
def test_validation(gpu, rng, model_and_batch, monkeypatch, at_once, tokens, chunks):
    """Whole windows and the rest, with tokens on the CPU or the GPU. `each` sees every chunk."""
    monkeypatch.setattr(gpu, "TOKENS_PER_PASS", at_once)
    (params, config, *_), text, seen = model_and_batch(), rng.integers(0, 11, 200), []
    loss = grassmann.validation_loss(params, config, text[:tokens])
    for own in (text[:tokens], gpu.cp.asarray(text[:tokens])):
        found = gpu.validation_loss(
            gpu.Flat(params), config, own, lambda f, items: map(f, seen.append(items) or items)
        )
        assert math.isclose(found, loss, rel_tol=1e-10) and len(seen.pop()) == chunks


def test_clipping(gpu, same, rng):
    for dtype, size, max_norm in [
        (np.float64, 1, 1e-3),
        (np.float64, 1, 1e3),
        (np.float32, 1e30, 1.0),
    ]:
        theirs = {
            name: (size * rng.standard_normal(40_000)).astype(dtype) for name in "ab"
        }  # no square overflows
        ours = gpu.Flat(theirs)
        norm = grassmann.clip_grads(theirs, max_norm)
        assert math.isclose(gpu.clip_grads(ours, max_norm), norm, rel_tol=1e-12)
        same(ours, theirs, 1e-6 if dtype == np.float32 else 1e-14)


def test_streams_and_generated_texts(gpu, same, model, monkeypatch):
    params, config, x, _ = model
    how = {"temperature": 0.9, "top_k": 5, "seed": 4}
    ours, state = gpu.Flat(params), gpu.stream_init(params, config)
    for token, logits in zip(x[0], gpu.forward(ours, config, x[:1])[0], strict=True):
        streamed, state = gpu.stream_step(ours, config, state, token)
        same(streamed, logits, 1e-12)
    text = list(grassmann.generate(params, config, [1, 2, 3], 20, **how))
    for on_host, *other in [(10**6, gpu, "model_forward"), (0, grassmann, "model_forward")]:
        with monkeypatch.context() as patch:
            patch.setattr(gpu.fused, "ON_HOST", on_host)
            patch.setattr(*other, None)  # not by the GPU, not by NumPy
            assert list(gpu.generate(ours, config, [1, 2, 3], 20, **how)) == text
            with pytest.raises(ValueError, match="tokens must be from 0"):
                next(gpu.generate(ours, config, [config.vocab_size], 1))


def test_checkpoints_of_either_load_in_the_other(gpu, same, tiny_config, trained, tmp_path):
    config, path = tiny_config(), tmp_path / "model.npz"
    params = gpu.init_params(config, 3)
    _, state = trained(gpu, config, params, 2)
    back, rest = params, state
    for make in (dict, gpu.Flat):
        checkpoint.save_checkpoint(path, back, config, **rest)
        back, found, rest = checkpoint.load_checkpoint(path, make)
        assert found == config and all(type(flat) is make for flat in (back, *rest.values()))
    same((back, rest), (params, state))
    back.buffer[...] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        checkpoint.save_checkpoint(path, back, config)
