"""The programs with --gpu, on the CPU stand-in for CuPy of tests/gpu, and without a CuPy that works."""

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
needs_compiler = pytest.mark.skipif(not shutil.which("g++") or platform.libc_ver()[0] != "glibc", reason="no g++ with glibc")

@pytest.fixture
def program(tmp_path):
    """Runs a program with this as cupy.py, if any; there is a text.txt."""
    text = "".join(f"{k} times {k} is {k * k}\n" for k in range(200))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")

    def run(cupy, name, *args):
        (tmp_path / "cupy.py").write_text(cupy or "", encoding="utf-8")
        paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests" / "gpu")])}
        command = [sys.executable, ROOT / name, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8",
                              timeout=300, env=os.environ | (paths if cupy else {}))
    return run

WORKS = "import cuda_on_cpu, sys; sys.modules['cupy'] = cuda_on_cpu"
BROKEN = {  # a cupy.py, and what the programs say
    "missing": ("raise ImportError('no such library')", "-r requirements-gpu12.* no such library"),
    "no device": (f"{WORKS}\ndef ones(*_): raise type('CompileException', (Exception,), {{}})('no device')\n"
                  "cuda_on_cpu.ones = ones", "--gpu: .*requirements-gpu.txt .*driver .*CompileException: no device"),
    "full": (f"{WORKS}\ndef empty(*_): raise MemoryError\ncuda_on_cpu.empty = empty",
             "not enough memory: lower --batch-size"),
}

@needs_compiler
def test_training_on_a_gpu_goes_on_on_a_cpu(program, tmp_path):
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

@needs_compiler
@pytest.mark.parametrize("cupy, error", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_one_sentence(program, tmp_path, cupy, error):
    process = program(cupy, "train_char.py", "--gpu", "--data", tmp_path / "text.txt",
                      "--context", 8, "--out", tmp_path / "out")
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert re.match(f"train_char.py: .*{error}", process.stderr)
    if "device" in cupy or "library" in cupy:
        process = program(cupy, "sample.py", "--gpu", "--seed", 1)
        assert process.stdout == "" and re.match(f"sample.py: .*{error}\\S*\n$", process.stderr)
