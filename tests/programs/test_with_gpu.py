"""The programs with --gpu, on the CPU stand-in for CuPy in tests/gpu, and without a working
CuPy."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(tmp_path):
    """Runs a program, in a folder with a text.txt and this cupy.py."""
    (tmp_path / "text.txt").write_text(
        "".join(f"{k} times {k} is {k * k}\n" for k in range(200)), encoding="utf-8"
    )

    def run(cupy, name, arguments):
        (tmp_path / "cupy.py").write_text(cupy, encoding="utf-8")
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests" / "gpu")])
        }
        return subprocess.run(
            [sys.executable, ROOT / name, *arguments.split()],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
        )

    return run


WORKS = "import cuda_on_cpu, sys; sys.modules['cupy'] = cuda_on_cpu"
BROKEN = {  # a cupy.py, and the programs' message
    "missing": ("raise ImportError('no such library')", r"\[gpu12\].* no such library"),
    "no device": (
        f"{WORKS}\ncuda_on_cpu.ones = 0",
        "--gpu: .*\\[gpu\\] .*driver .*TypeError: 'int' ob",
    ),
    "old": (
        f"{WORKS}\nold = cuda_on_cpu.SimpleNamespace(compute_capability='75', use=int)\n"
        "cuda_on_cpu.cuda.Device = lambda *_: old",
        "--gpu: tf32 needs compute capability 8.0",
    ),
    "full": (
        f"{WORKS}\ncuda_on_cpu.empty = lambda *_: bytearray(2**62)",
        "not enough memory: lower --batch-size",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("g++") or platform.libc_ver()[0] != "glibc", reason="no g++ with glibc"
)
def test_a_run_goes_on_on_the_other_side(program, tmp_path):
    """train_char.py --gpu writes what the CPU writes. --resume and sample.py work with files of
    either."""
    sizes = (
        "--context 8 --n-layer 2 --d-model 8 --rank 3 --batch-size 4 --eval-every 10 --dropout 0"
    )
    begin, go_on = f"--data text.txt --iters 20 {sizes}", "--resume --iters 30"
    for options in (f"gpu --gpu {begin}", f"cpu {begin}", f"gpu {go_on}", f"cpu --gpu {go_on}"):
        process = program(WORKS, "train_char.py", f"--out {options}")
        assert (process.returncode, process.stderr) == (0, "")
    logs = [
        np.genfromtxt(tmp_path / out / "log.csv", delimiter=",", skip_header=1)[:, :4]
        for out in ("gpu", "cpu")
    ]
    assert logs[0][-1, 0] == 30 and np.allclose(*logs, rtol=1e-5)
    samples = [
        program(WORKS, "sample.py", f"gpu/best.npz --length 30 --seed 1 {flags}")
        for flags in ("", "--gpu", "--gpu --precision tf32")
    ]
    assert [process.stderr for process in samples] == [""] * 3
    assert len(samples[0].stdout) == 31 and len({process.stdout for process in samples}) == 1


@pytest.mark.parametrize("cupy, error", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_one_sentence(program, cupy, error):
    process = program(cupy, "train_char.py", "--gpu --precision tf32 --data text.txt --context 8")
    assert process.returncode == 2 and re.match(f"train_char.py: .*{error}.*\n$", process.stderr)
    if "empty" not in cupy:  # sample.py needs less
        process = program(cupy, "sample.py", "--gpu --precision tf32 --seed 1")
        assert process.stdout == "" and re.match(f"sample.py: .*{error}.*\n$", process.stderr)
