"""gpu.py as the tests see it: on a CPU stand-in for CuPy (cuda_on_cpu.py), and on a GPU."""

import cuda_on_cpu
import numpy as np
import pytest

from charlm.training import Training, train_step


@pytest.fixture(scope="session")
def stand_in():
    if not cuda_on_cpu.COMPILER:
        pytest.skip("no g++ with glibc")
    return cuda_on_cpu.gpu_on_cpu()


@pytest.fixture(scope="session")
def first_rung():
    """gpu.py without any kernel of ours, which needs no compiler."""
    return cuda_on_cpu.gpu_on_cpu(GPU_RUNGS="1")


@pytest.fixture(scope="session")
def on_gpu():
    module = pytest.importorskip("gpu", reason="no GPU", exc_type=ImportError)
    try:
        module.start()
    except ImportError:
        pytest.skip("no GPU")
    return module


@pytest.fixture(
    params=[
        pytest.param(name, marks=mark)
        for name, mark in [("stand_in", pytest.mark.slow), ("on_gpu", pytest.mark.gpu)]
    ]
)
def gpu(request):
    module = request.getfixturevalue(request.param)
    yield module
    module.set_precision("float32")


@pytest.fixture
def set_precision(gpu):
    def set_or_skip(precision):
        try:
            gpu.set_precision(precision)
        except ValueError as error:  # an older GPU
            pytest.skip(str(error))

    return set_or_skip


@pytest.fixture
def same():
    """Assert ‖a - b‖ <= bound max(‖a‖, ‖b‖) for each array a of one result and b of the other;
    `Parts` are added."""

    def check(ours, theirs, bound=0):
        if isinstance(ours, dict):
            assert ours.keys() == theirs.keys()
            ours, theirs = list(ours.values()), [theirs[name] for name in ours]
        if isinstance(ours, (tuple, list)):
            for a, b in zip(ours, theirs, strict=True):
                check(a, b, bound)
        elif ours is not None or theirs is not None:
            a = ours.array.get().sum(0) if hasattr(ours, "array") else ours
            a, b = (x.get() if hasattr(x, "get") else np.asarray(x) for x in (a, theirs))
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            a, b = a.astype(np.float64), b.astype(np.float64)
            error, size = np.linalg.norm(a - b), max(np.linalg.norm(a), np.linalg.norm(b))
            assert error <= bound * size, f"{error:.1e} of {size:.1e}"

    return check


@pytest.fixture
def model_and_batch(tiny_model, batch):
    return lambda **changes: (*tiny_model(**changes), *batch(5))


@pytest.fixture
def trained(rng):
    """Train for a few steps, in place, on the CPU or the GPU. Returns the losses and the
    optimiser's state."""
    text = np.resize(rng.integers(0, 11, 17), 500).astype(
        np.uint8
    )  # the same words again and again
    text[::10] = rng.integers(0, 11, 50)  # with noise

    def train(model, config, params, steps, lr=1e-2, **more):
        training = Training(steps, 4, lr, **{"warmup_iters": 3, "grad_clip": 0.5, "seed": 1} | more)
        state, tokens = model.adamw_init(params), model.np.asarray(text)
        losses = []
        for step in range(steps):
            loss, _ = train_step(model, params, config, training, state, step, tokens)
            losses.append(loss)
        return [float(loss) for loss in losses], state

    return train
