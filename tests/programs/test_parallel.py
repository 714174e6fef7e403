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
pytestmark = [pytest.mark.skipif(not MPIEXEC, reason=WHY), pytest.mark.slow,
              pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")]
OPEN_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # more ranks than cores
OPTIONS = [*MODEL, "--batch-size", 13, "--dropout", 0.2, "--eval-every", 50, "--threads", 1]

@pytest.fixture
def launch(plain, text, tmp_path):
    """launch(n, *options) starts train_char.py on n ranks, into tmp_path / "out"; or `program`."""
    jobs = []

    def launch(n, *options, program=(ROOT / "train_char.py",)):
        given = [*OPTIONS, "--data", text, "--out", tmp_path / "out", *options]
        command = [MPIEXEC, "-n", n, sys.executable, *program, *given]
        env = plain | OPEN_MPI | {"JOB": str(tmp_path)}
        env["PYTHONPATH"] += os.pathsep + str(ROOT)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        jobs.append(subprocess.Popen([*map(str, command)], env=env, **pipes))
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

def all_ended(job, folder):
    """Its exit code, what it printed and its own errors; within 15 seconds no rank is left."""
    start = time.perf_counter()
    out, errors = job.communicate(timeout=60)
    while ranks(folder) and time.perf_counter() - start < 15:
        time.sleep(0.01)
    assert time.perf_counter() - start < 15, (out, errors)
    return job.returncode, out, [line for line in errors.splitlines() if line.startswith("train_char.py: ")]

@pytest.fixture(scope="module")
def alone(program, text, tmp_path_factory):
    """The folder of 200 steps without mpiexec."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert program("train_char.py", *OPTIONS, "--iters", 200, "--data", text, "--out", out).returncode == 0
    return out

def assert_equal_to_rounding(out, alone):
    (params, _, extra), (others, _, other) = (load_checkpoint(folder / "last.npz") for folder in (out, alone))
    assert extra["step"] == other["step"] == 200
    np.testing.assert_allclose(*(np.array(e["log"], float)[:, :4] for e in (extra, other)), rtol=1e-5)
    for name in params:
        np.testing.assert_allclose(params[name], others[name], rtol=0, atol=1e-4)

@pytest.mark.parametrize("n", [1, 3])
def test_n_ranks_follow_one_process(launch, alone, tmp_path, n):
    """13 windows a step, which three do not divide, and dropout."""
    job = launch(n, "--iters", 200)
    out, errors = job.communicate(timeout=100)
    assert (job.returncode, errors) == (0, "") and out.count("A sample:") == 1 and f"processes: {n};" in out
    assert_equal_to_rounding(tmp_path / "out", alone)

SAME_STEPS = """
import hashlib, train_char, parallel
run = []
train, make_run = train_char.train, train_char.make_run
train_char.train = lambda r, signals: (train(r, signals), run.append(r))
train_char.main()
own = hashlib.sha256(b"".join(a.tobytes() for a in run[0].params.values())).hexdigest()
print(f"{len({*parallel.comm.allgather(own)})} kinds of weights", flush=True)
"""

def test_all_ranks_take_the_same_steps(launch):
    """To the last bit, or they would drift apart."""
    out, errors = launch(3, "--iters", 20, program=("-c", SAME_STEPS)).communicate(timeout=60)
    assert "\n1 kinds of weights\n" in out, errors

def test_a_rank_is_killed_and_another_number_goes_on(launch, wait_for_step, alone, tmp_path):
    wait_for_step(job := launch(3, "--iters", 200), tmp_path / "out", 50)
    os.kill(ranks(tmp_path)[1], signal.SIGKILL)
    code, _, errors = all_ended(job, tmp_path)
    step = load_checkpoint(tmp_path / "out/last.npz")[2]["step"]
    assert code and errors == [] and 50 <= step < 200 and step % 50 == 0
    assert launch(2, "--iters", 200, "--resume").wait(100) == 0
    assert_equal_to_rounding(tmp_path / "out", alone)

@pytest.mark.parametrize("which", ["mpiexec", 2])
def test_a_signal_stops_all_after_the_same_step(launch, wait_for_step, tmp_path, which):
    """Ctrl-C, which mpiexec hands on, or one that a single rank gets. (After Ctrl-C Open MPI's shows nothing more, and
    soon kills those that have not ended.)"""
    wait_for_step(job := launch(3, "--iters", 100_000), tmp_path / "out", 50)
    if which == "mpiexec":
        job.send_signal(signal.SIGINT)
    else:
        os.kill(ranks(tmp_path)[which], signal.SIGTERM)
    code, out, errors = all_ended(job, tmp_path)
    step = load_checkpoint(tmp_path / "out/last.npz")[2]["step"]
    assert code and errors == [] and step >= 50
    if which == 2:
        assert code == 128 + signal.SIGTERM and f"stopped at step {step} and saved" in out

ONE_FAILS = """
import sys, parallel, train_char
sys.argv = ["train_char.py", *sys.argv[1:], *["--lr", "nan"] * (parallel.rank == 1)]
train_char.main()
"""

def test_an_error_ends_all(launch, tmp_path):
    """Also where only one rank has it. Each rank may print it."""
    code, _, errors = all_ended(launch(3, program=("-c", ONE_FAILS)), tmp_path)
    assert code and errors and all("lr must be" in line for line in errors)
    code, _, errors = all_ended(launch(3, "--batch-size", 2), tmp_path)
    assert code and errors and all("a batch of 2 is too small for 3" in line for line in errors)

