"""gpu.py as the tests see it: on a stand-in for CuPy (cuda_on_cpu.py), and on a card."""

import os
import subprocess
import sys
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest

from training import Training, train_step

@pytest.fixture(scope="session")
def stand_in():
    if not cuda_on_cpu.COMPILER:
        pytest.skip("no g++ with glibc")
    return cuda_on_cpu.gpu_on_cpu()

@pytest.fixture(scope="session")
def card():
    try:
        import gpu
    except ImportError:
        pytest.skip("no GPU")
    return gpu

@pytest.fixture(params=["stand_in", pytest.param("card", marks=pytest.mark.gpu)])
def gpu(request):
    module = request.getfixturevalue(request.param)
    yield module
    module.set_precision("float32")

@pytest.fixture
def set_precision(gpu):
    def set_or_skip(precision):
        try:
            gpu.set_precision(precision)
        except ValueError as error:  # an older card
            pytest.skip(str(error))
    return set_or_skip

@pytest.fixture
def same():
    """Asserts ‖a - b‖ <= bound max(‖a‖, ‖b‖) for each array a of one result and b of the other. One
    of the two may come in the parts of a sum."""
    def check(ours, theirs, bound=0):
        if isinstance(ours, dict):
            assert ours.keys() == theirs.keys()
            ours, theirs = list(ours.values()), [theirs[name] for name in ours]
        if isinstance(ours, (tuple, list)):
            for a, b in zip(ours, theirs, strict=True):
                check(a, b, bound)
        elif ours is not None or theirs is not None:
            a, b = (x.get() if hasattr(x, "get") else np.asarray(x) for x in (ours, theirs))
            a, b = a.sum(0) if a.ndim > b.ndim else a, b.sum(0) if b.ndim > a.ndim else b
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            a, b = a.astype(np.float64), b.astype(np.float64)
            error, size = np.linalg.norm(a - b), max(np.linalg.norm(a), np.linalg.norm(b))
            assert error <= bound * size, f"{error:.1e} of {size:.1e}"
    return check

@pytest.fixture
def model_and_batch(tiny_model, batch):
    def make(dtype=np.float64, **changes):
        params, config = tiny_model(dtype, **changes)
        return config, params, *batch(5)
    return make

@pytest.fixture
def trained(rng):
    """Losses of a few steps of training, in place, on either side, and the optimiser's state."""
    text = np.resize(rng.integers(0, 11, 17), 500).astype(np.uint8)  # words over and over again
    text[::10] = rng.integers(0, 11, 50)  # with noise

    def train(model, config, params, steps, lr=1e-2):
        losses, state, tokens = [], model.adamw_init(params), model.np.asarray(text)
        training = Training(steps, 4, lr, warmup_iters=3, grad_clip=0.5, seed=1)
        for step in range(steps):
            x, y = model.get_batch(tokens, training.batch_size, config.context, 1, step)
            losses.append(train_step(model, params, config, training, state, step, x, y, threads=0))
        return [float(loss) for loss in losses], state
    return train

@pytest.fixture
def program(tmp_path):
    """Runs a program with this as cupy.py, if any; there is a text.txt."""
    text = "".join(f"{k} times {k} is {k * k}\n" for k in range(200))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")

    def run(cupy, name, *args):
        (tmp_path / "cupy.py").write_text(cupy or "", encoding="utf-8")
        paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.path.dirname(__file__)])}
        command = [sys.executable, Path(__file__).parents[2] / name, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8",
                              timeout=300, env=os.environ | (paths if cupy else {}))
    return run
