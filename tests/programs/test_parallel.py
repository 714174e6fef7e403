"""mpiexec: however many processes train, they do what one does; however one ends, all end."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kill_and_resume import MODEL, ROOT

from checkpoint import load_checkpoint

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
WHY = "no mpiexec and mpi4py: requirements-parallel.txt"
pytest.importorskip("mpi4py", reason=WHY)
pytestmark = [pytest.mark.skipif(not MPIEXEC, reason=WHY),
              pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")]
OPEN_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # more ranks than cores
EVERY, SECONDS = 50, 15  # steps from checkpoint to checkpoint; within so many seconds all must end
OPTIONS = [*MODEL, "--batch-size", 13, "--dropout", 0.2, "--eval-every", EVERY, "--threads", 1]

@pytest.fixture
def launch(plain, tmp_path):
    """launch(n, *words) starts `python *words` on n ranks."""
    jobs = []

    def launch(n, *words, **environment):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        environment = plain | OPEN_MPI | {"JOB": str(tmp_path)} | environment
        command = [MPIEXEC, "-n", n, sys.executable, *words]
        jobs.append(subprocess.Popen([*map(str, command)], env=environment, **pipes))
        return jobs[-1]

    yield launch
    for pid in [*(job.pid for job in jobs if job.poll() is None), *ranks(tmp_path).values()]:
        os.kill(pid, signal.SIGKILL)

def ranks(job):
    """The living ranks that a test has started: rank -> process."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines = (process / "environ").read_text(errors="replace").split("\0")
            names = dict(line.split("=", 1) for line in lines if "=" in line)
            rank = names.get("PMI_RANK", names.get("OMPI_COMM_WORLD_RANK"))
            if names.get("JOB") == str(job) and rank:
                found[int(rank)] = int(process.name)
    return found

@pytest.fixture
def train(launch, text, tmp_path):
    """train(n, *options) starts training on n ranks, into tmp_path / "out"."""
    given = [ROOT / "train_char.py", *OPTIONS, "--data", text, "--out", tmp_path / "out"]
    return lambda n, *options, **how: launch(n, *given, *options, **how)

@pytest.fixture
def all_ended(tmp_path):
    """all_ended(job) -> its exit code, what it printed and its own errors; no rank is left."""
    def check(job):
        start = time.perf_counter()
        out, errors = job.communicate(timeout=60)
        while ranks(tmp_path) and time.perf_counter() - start < SECONDS:
            time.sleep(0.01)
        assert time.perf_counter() - start < SECONDS, (out, errors)
        sentences = [line for line in errors.splitlines() if line.startswith("train_char.py: ")]
        return job.returncode, out, sentences

    return check

@pytest.fixture(scope="module")
def alone(program, text, tmp_path_factory):
    """The folder of 200 steps without mpiexec."""
    out = tmp_path_factory.mktemp("alone") / "out"
    process = program("train_char.py", *OPTIONS, "--iters", 200, "--data", text, "--out", out)
    assert process.returncode == 0
    return out

def assert_equal_to_rounding(out, alone):
    (params, _, extra), (others, _, other) = (load_checkpoint(f / "last.npz") for f in (out, alone))
    assert extra["step"] == other["step"] == 200
    np.testing.assert_allclose(*(np.array(e["log"], float)[:, :4] for e in (extra, other)), rtol=1e-5)
    for name in params:
        np.testing.assert_allclose(params[name], others[name], rtol=0, atol=1e-4)

@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_n_ranks_follow_one_process(train, alone, tmp_path, n):
    """13 windows a step, which none of them divides, and dropout."""
    job = train(n, "--iters", 200)
    out, errors = job.communicate(timeout=100)
    assert (job.returncode, errors) == (0, "") and out.count("A sample:") == 1
    assert (f"1 thread in each of {n} processes" in out) == (n > 1)
    assert_equal_to_rounding(tmp_path / "out", alone)

SAME_STEPS = """
import cli, hashlib, numpy as np, grassmann, parallel, training
config = grassmann.Config(7, context=9, n_layer=2, d_model=8, rank=3)
params, t = grassmann.init_params(config), training.Training(batch_size=5)
state, tokens = grassmann.adamw_init(params), np.arange(500) % 7
for step in range(20):
    x, y = grassmann.get_batch(tokens, 5, 9, 0, step)
    training.train_step(grassmann, params, config, t, state, step, x, y, threads=2)
own = hashlib.sha256(b"".join(a.tobytes() for a in params.values())).hexdigest()
every = parallel.comm.gather(own)
if every:
    print("equal" if len({*every}) == 1 else every)
"""

def test_all_ranks_take_the_same_steps(launch):
    """To the last bit, or they would drift apart."""
    out, errors = launch(3, "-c", SAME_STEPS, PYTHONPATH=str(ROOT)).communicate(timeout=60)
    assert out == "equal\n", errors

# ---- how a run ends ------------------------------------------------------------------------------

@pytest.fixture
def running(train, wait_for_step, tmp_path):
    """running(n) -> a job that has taken 60 steps of 200 or, asked for, of more."""
    def begin(n, iters=100_000):
        job = train(n, "--iters", iters)
        wait_for_step(job, tmp_path / "out", 60)
        return job

    return begin

def test_a_rank_is_killed_and_another_number_goes_on(
        running, train, all_ended, alone, tmp_path):
    job = running(3, 200)
    os.kill(ranks(tmp_path)[1], signal.SIGKILL)
    code, _, errors = all_ended(job)
    step = load_checkpoint(tmp_path / "out/last.npz")[2]["step"]
    assert code and errors == [] and EVERY <= step < 200 and step % EVERY == 0
    assert train(2, "--iters", 200, "--resume").wait(100) == 0
    assert_equal_to_rounding(tmp_path / "out", alone)

def test_the_disk_of_the_first_rank_is_full(running, all_ended, tmp_path):
    """The system allows it no file of more than 4 kB any more."""
    import resource

    job = running(3)
    resource.prlimit(ranks(tmp_path)[0], resource.RLIMIT_FSIZE, (4096, 4096))
    code, _, errors = all_ended(job)
    assert code and errors == [f"train_char.py: {tmp_path / 'out'}: File too large"]
    step = load_checkpoint(tmp_path / "out/last.npz")[2]["step"]
    assert step >= EVERY and step % EVERY == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "best.npz", "last.npz", "log.csv"]

@pytest.mark.parametrize("which", ["mpiexec", 2])
def test_a_signal_stops_all_after_the_same_step(running, all_ended, tmp_path, which):
    """Ctrl-C, which mpiexec hands on, or one that a single rank gets. (After Ctrl-C Open MPI's shows
    nothing more, and soon kills those that have not ended.)"""
    job = running(3)
    if which == "mpiexec":
        job.send_signal(signal.SIGINT)
    else:
        os.kill(ranks(tmp_path)[which], signal.SIGTERM)
    code, out, errors = all_ended(job)
    step = load_checkpoint(tmp_path / "out/last.npz")[2]["step"]
    assert code and errors == [] and step >= EVERY
    if which == 2:
        assert code == 128 + signal.SIGTERM and f"stopped at step {step} and saved" in out
        assert step >= 60

ONE_FAILS = """
import sys, parallel, train_char
sys.argv = ["train_char.py", *sys.argv[1:], *["--lr", "99"] * (parallel.rank == 1)]
train_char.main()
"""

@pytest.mark.parametrize("where, options, message", [
    ("everywhere", ["--lr", 99], "argument --lr: 99 is not above 0 and at most 10"),
    ("on one", [], "argument --lr: 99 is not above 0 and at most 10"),
    ("everywhere", ["--batch-size", 2], "a batch of 2 is too small for 3 processes: each needs a row")])
def test_an_error_is_one_sentence(train, launch, text, all_ended, tmp_path, where, options, message):
    given = ["--data", text, "--out", tmp_path / "out", *OPTIONS, *options]
    program = ["-c", ONE_FAILS] if where == "on one" else [ROOT / "train_char.py"]
    code, _, errors = all_ended(launch(3, *program, *given, PYTHONPATH=str(ROOT)))
    assert code and errors == [f"train_char.py: {message}"]

def test_mpi4py_is_missing(program, without):
    process = program("train_char.py", env=without("mpi4py") | {"PMI_SIZE": "2"})
    install = f"-m pip install -r {ROOT / 'requirements-parallel.txt'}\n"
    assert process.returncode == 1 and process.stderr.endswith(install)

# ---- on cards ------------------------------------------------------------------------------------

CARDS = """
import cuda_on_cpu, os, sys, types
class NCCL:
    def all_reduce(self, array, out):
        assert array is out
        out[...] = cuda_on_cpu.asarray(parallel.comm.allreduce(array.get()))
sys.modules |= {"cupy": cuda_on_cpu, "cupyx": types.ModuleType("cupyx"),
                "cupyx.distributed": types.ModuleType("cupyx.distributed")}
sys.modules["cupyx.distributed"].init_process_group = lambda size, rank, use_mpi: NCCL()

import cli, numpy as np, gpu, parallel, training
config = gpu.Config(7, context=9, n_layer=1, d_model=8, rank=3, dropout=0.3)
params, t = gpu.Flat(gpu.init_params(config)), training.Training(batch_size=5)
state, tokens, losses = gpu.adamw_init(params), gpu.np.asarray(np.arange(500) % 7), []
for step in range(5):
    x, y = gpu.get_batch(tokens, 5, 9, 0, step)
    losses.append(training.train_step(gpu, params, config, t, state, step, x, y, threads=0))
losses.append(gpu.validation_loss(params, config, tokens, lambda *work: parallel.each(*work, map)))
line = " ".join([os.environ["CUDA_VISIBLE_DEVICES"], *map(str, map(float, losses))])
print(*(parallel.comm.gather(line) or [] if parallel.size > 1 else [line]), sep="\\n")
"""

@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_each_rank_has_a_card(launch):
    """On the stand-in for CuPy, with MPI in the place of NCCL."""
    paths, found = os.pathsep.join([str(ROOT), str(ROOT / "tests/gpu")]), {}
    for n in (1, 2):
        job = launch(n, "-c", CARDS, PYTHONPATH=paths, CUDA_VISIBLE_DEVICES="5,7")
        out, errors = job.communicate(timeout=100)
        assert job.returncode == 0, errors
        found |= {line.split()[0]: [*map(float, line.split()[1:])] for line in out.splitlines() if line}
    assert sorted(found) == ["5", "5,7", "7"] and found["5"] == found["7"]
    np.testing.assert_allclose(found["5"], found["5,7"], rtol=1e-5)
