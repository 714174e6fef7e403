"""mpiexec: any number of processes train like one process; if one process ends, all end."""

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

from charlm.checkpoint import load_checkpoint

MPIEXEC = shutil.which(
    "mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)
WHY = "no mpiexec and mpi4py: pip install -e .[mpi]"
pytest.importorskip("mpi4py", reason=WHY)
pytestmark = [
    pytest.mark.skipif(not MPIEXEC, reason=WHY),
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}  # more ranks than cores
OPTIONS = [*MODEL, "--batch-size", 13, "--dropout", 0.2, "--eval-every", 50, "--threads", 1]


@pytest.fixture
def launch(plain, text, tmp_path):
    """launch(n, *options) starts train_char.py on n ranks, into tmp_path / "out"; or `program`."""

    def launch(n, *options, program=(ROOT / "train_char.py",)):
        given = [*OPTIONS, "--data", text, "--out", tmp_path / "out", *options]
        env = (
            plain
            | OPEN_MPI
            | {"JOB": str(tmp_path), "PYTHONPATH": f"{plain['PYTHONPATH']}{os.pathsep}{ROOT}"}
        )
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        command = [MPIEXEC, "-n", n, sys.executable, *program, *given]
        return subprocess.Popen([*map(str, command)], env=env, **pipes)

    yield launch
    for pid in ranks(tmp_path):  # of a test that failed; mpiexec ends with them
        os.kill(pid, signal.SIGKILL)


def ranks(folder, rank=""):
    """The living processes that a test has started: all ranks, or one rank."""
    found, of_test = [], (f"PMI_RANK={rank}", f"OMPI_COMM_WORLD_RANK={rank}")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            names = (process / "environ").read_text(errors="replace").split("\0")
            if f"JOB={folder}" in names and any(name.startswith(of_test) for name in names):
                found.append(int(process.name))
    return found


def all_ended(job, folder):
    """The exit code, the output, and the program's own errors.

    Within 15 seconds no rank is left.
    """
    start = time.perf_counter()
    out, errors = job.communicate(timeout=60)
    while ranks(folder):
        assert time.perf_counter() - start < 15, (out, errors)
    return (
        job.returncode,
        out,
        [line for line in errors.splitlines() if line.startswith("train_char.py: ")],
    )


def test_ranks_follow_one_process_also_when_one_is_killed(
    program, launch, text, wait_for_step, tmp_path
):
    """13 windows a step, no multiple of three ranks; then two ranks go on.

    Results are equal up to rounding.
    """
    alone = tmp_path / "alone"
    assert (
        program(
            "train_char.py", *OPTIONS, "--iters", 200, "--data", text, "--out", alone
        ).returncode
        == 0
    )
    wait_for_step(job := launch(3, "--iters", 200), tmp_path / "out", 50)
    os.kill(ranks(tmp_path, 1)[0], signal.SIGKILL)
    code, _, errors = all_ended(job, tmp_path)
    step = load_checkpoint(tmp_path / "out/last.npz")[2]["step"]
    assert code and errors == [] and step < 200 and step % 50 == 0
    out, errors = (job := launch(2, "--iters", 200, "--resume")).communicate(timeout=100)
    assert (
        (job.returncode, errors) == (0, "")
        and out.count("A sample:") == 1
        and "processes: 2;" in out
    )
    (params, _, extra), (others, _, other) = (
        load_checkpoint(f / "last.npz") for f in (tmp_path / "out", alone)
    )
    np.testing.assert_allclose(
        *(np.array(e["log"], float)[:, :4] for e in (extra, other)), rtol=1e-5
    )
    for name in params:
        np.testing.assert_allclose(params[name], others[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("which", ["mpiexec", 2])
def test_a_signal_stops_all_after_the_same_step(launch, wait_for_step, tmp_path, which):
    """Ctrl-C, which mpiexec passes on (Open MPI then shows nothing more), or a signal to a single
    rank."""
    wait_for_step(job := launch(3, "--iters", 100_000), tmp_path / "out", 50)
    if which == "mpiexec":
        job.send_signal(signal.SIGINT)
    else:
        os.kill(ranks(tmp_path, which)[0], signal.SIGTERM)
    code, out, errors = all_ended(job, tmp_path)
    step = load_checkpoint(tmp_path / "out/last.npz")[2]["step"]
    assert code and errors == [] and step >= 50
    assert which != 2 or (
        code == 128 + signal.SIGTERM and f"stopped at step {step} and saved" in out
    )


ONE_FAILS = """
import sys, train_char
from charlm import processes
sys.argv = ["train_char.py", *sys.argv[1:], *["--lr", "nan"] * (processes.world().rank == 1)]
train_char.main()
"""


def test_an_error_ends_all(launch, tmp_path):
    """Also if only one rank has the error. Each rank may print it."""
    for how, message in (
        ({"program": ("-c", ONE_FAILS)}, "lr must be"),
        ({}, "raise --batch-size"),
    ):
        code, _, errors = all_ended(launch(3, *["--batch-size", 2] * (not how), **how), tmp_path)
        assert code and errors and all(message in line for line in errors)
