"""The first rung, and every function that the second rung puts in the place of one of its own."""

import cuda_on_cpu
import numpy as np
import pytest

import grassmann
from charlm.own_layer import load_layer
from grassmann import Scope

parametrize = pytest.mark.parametrize
MODELS = {
    "default": {"dropout": 0.1},
    "memory": {"memory": True},
    "average": {"taps": False},
    "paper": {"block": "paper", "taps": False, "normalize": True, "positions": True},
    "attention": {"mixer": "attention", "offsets": (), "positions": True},
    "own": {"mixer": "docs/my_layer.py"},
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def config(request, tiny_config):
    changes = dict(request.param)
    if changes.get("mixer", "").endswith(".py"):
        changes["mixer"] = load_layer(changes["mixer"])
    return tiny_config(**changes)


# ---- the first rung alone ------------------------------------------------------------------------


def test_the_first_rung_has_no_kernel_of_ours(first_rung):
    assert not hasattr(first_rung, "fused")


def test_the_first_rung_trains_as_the_cpu_does(first_rung, same, trained, config):
    """With dropout, too: its masks are the CPU's."""
    params = grassmann.init_params(config, dtype=np.float64)
    ours = first_rung.init_params(config, dtype=np.float64)
    losses, state = trained(grassmann, config, params, 6)
    our_losses, our_state = trained(first_rung, config, ours, 6)
    same((np.array(our_losses), ours, our_state), (np.array(losses), params, state), 1e-9)


def test_the_first_rung_writes_the_same_text(first_rung, model_and_batch):
    params, config, *_ = model_and_batch()
    how = {"temperature": 0.9, "top_k": 5, "seed": 4}
    text = list(grassmann.generate(params, config, [1, 2, 3], 20, **how))
    ours = first_rung.Flat(params)
    assert list(first_rung.generate(ours, config, [1, 2, 3], 20, **how)) == text


def test_the_first_rung_knows_no_tf32(first_rung):
    with pytest.raises(ValueError, match="only float32, not tf32"):
        first_rung.set_precision("tf32")


def test_more_processes_than_gpus_are_refused(first_rung, monkeypatch):
    here = first_rung.processes.World(1, size=3, local_size=3)
    monkeypatch.setattr(first_rung.processes, "world", lambda: here)
    first_rung.start.cache_clear()
    with pytest.raises(ImportError, match="3 processes here, but the number of GPUs is 1"):
        first_rung.start()


# ---- the second rung, without one group after the other ------------------------------------------

GROUPS = ["buffer", "host", "dropout", "cross_entropy", "gelu", "layernorm", "block", "step"]


@pytest.fixture(scope="session", params=GROUPS)
def without(request, stand_in):
    """gpu.py with all of the second rung but one group."""
    return request.param, cuda_on_cpu.gpu_on_cpu(GPU_WITHOUT=request.param)


def test_groups(stand_in):
    assert list(dict.fromkeys(group for group, *_ in stand_in.fused.REPLACED)) == GROUPS


def test_unknown_groups_are_refused(stand_in):
    with pytest.raises(ValueError, match=r"GPU_WITHOUT knows buffer .* step, not layers"):
        stand_in.fused.replace({}, ["layers"])


@pytest.mark.slow
def test_what_is_left_out_is_the_first_rungs(without, stand_in, first_rung):
    """Its code is that of grassmann.py, or of the first rung."""
    group, gpu = without
    for name, _, functions in gpu.fused.REPLACED:
        for function in functions if name == group and group != "step" else ():
            here, there = (getattr(module, function.__name__) for module in (gpu, first_rung))
            assert here.__code__ is there.__code__ or here.__module__ == "gpu"


@pytest.mark.slow
def test_without_one_group_the_numbers_are_the_same(without, same, model_and_batch, variant):
    """Loss and gradients of every model, of NumPy and of the second rung without this group."""
    params, config, x, y = model_and_batch(**variant)
    _, gpu = without
    y = gpu.np.asarray(y)
    ours = gpu.loss_and_grads(gpu.Flat(params), config, x, y)
    same(ours, grassmann.loss_and_grads(params, config, x, y.get()), 1e-12)


# ---- every replaced function beside what it replaces ---------------------------------------------

OPS = {  # inputs' shapes; T tokens are (3, 23)
    "layernorm": [(3, 23, 37), (37,), (37,)],
    "gelu": [(3, 23, 37)],
}


@pytest.mark.slow
@parametrize("op", OPS)
def test_replaced_functions_give_the_first_rungs_numbers(stand_in, first_rung, same, rng, op):
    inputs = [rng.standard_normal(shape) for shape in OPS[op]]
    dout = rng.standard_normal(OPS[op][0])
    results = []
    for gpu in (stand_in, first_rung):
        arrays = [gpu.np.asarray(a) for a in inputs]
        out, cache = getattr(gpu, f"{op}_forward")(*arrays)
        grads = getattr(gpu, f"{op}_backward")(gpu.np.asarray(dout), cache)
        results.append((out, grads))
    same(*results, 1e-12)


@pytest.mark.slow
def test_replaced_losses_give_the_first_rungs_numbers(stand_in, first_rung, same, rng):
    logits, targets = rng.standard_normal((3, 23, 11)), rng.integers(0, 11, (3, 23))
    results = []
    for gpu in (stand_in, first_rung):
        loss, cache = gpu.cross_entropy_forward(gpu.np.asarray(logits), gpu.np.asarray(targets))
        results.append((loss, gpu.cross_entropy_backward(0.3, cache)))
    same(*results, 1e-12)


@pytest.mark.slow
def test_replaced_blocks_give_the_first_rungs_numbers(stand_in, first_rung, same, model_and_batch):
    """The mixing layer, the FFN and the block around them."""
    params, config, *_ = model_and_batch()
    h = np.random.default_rng(3).standard_normal((2, 9, config.d_model))
    results = []
    for gpu in (stand_in, first_rung):
        w = Scope(gpu.Flat(params), "blocks.0.")
        out, cache = gpu.prenorm_block_forward(gpu.np.asarray(h), w, config, 0)
        out, c_norm = gpu.layernorm_forward(out, w["ln1.w"], w["ln1.b"])
        dout, *_ = gpu.layernorm_backward(gpu.np.asarray(h), c_norm)
        results.append((out, *gpu.prenorm_block_backward(dout, cache, config)))
    same(*results, 1e-12)


@pytest.mark.slow
def test_replaced_optimisers_give_the_first_rungs_numbers(stand_in, first_rung, same, rng):
    arrays = {"W": rng.standard_normal((3, 5)), "b": rng.standard_normal(4)}
    slopes = {name: rng.standard_normal(a.shape) for name, a in arrays.items()}
    results = []
    for gpu in (stand_in, first_rung):
        params, grads = gpu.Flat(arrays), gpu.Flat(slopes)
        state = gpu.adamw_init(params)
        norm = float(gpu.clip_grads(grads, 0.7))
        gpu.adamw_step(params, grads, state, 0, 0.1)
        results.append((np.array(norm), grads, params, state))
    same(*results, 1e-12)


# ---- what a rung starts, and where it ends -------------------------------------------------------


@pytest.mark.slow
@parametrize("rung, starts, moved", [("first_rung", 13, 5_585_920), ("stand_in", 1, 793_600)])
def test_layernorm_on_each_rung(request, rung, starts, moved):
    """Kernels and bytes of a LayerNorm of 768 tokens of width 128, as in docs/gpu.md."""
    gpu = request.getfixturevalue(rung)
    shapes = (12, 64, 128), (128,), (128,)
    inputs = [gpu.np.asarray(np.ones(shape, np.float32)) for shape in shapes]
    cuda_on_cpu.started.clear()
    gpu.layernorm_forward(*inputs)
    assert len(cuda_on_cpu.started) == starts
    assert sum(node[1] for node in cuda_on_cpu.started) == moved


@pytest.mark.slow
def test_more_tokens_than_32_bits_are_refused(stand_in):
    with pytest.raises(OverflowError):
        stand_in.fused.per_token("gelu_forward", 2**31, 4, None, None, None)
