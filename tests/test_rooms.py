"""The rooms of the house: what may import what, and what an import may not do."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [  # a file imports files of its own floor and of lower floors
    {"grassmann"},  # the model
    {"charlm", "gpu", "gpu_kernels"},  # the support, and the model once more for a GPU
    {"train_char", "sample"},  # the programs
    {"experiments", "explorer", "docs"},  # the laboratory
    {"tests"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = [path.relative_to(ROOT) for pattern in ("*.py", "*/**/*.py") for path in ROOT.glob(pattern)]
FILES = [path for path in FILES if path.parts[0].removesuffix(".py") in FLOOR]


def imports(path: Path) -> set[str]:
    """The rooms of this project that the file imports, at the top or inside a function."""
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    rooms = {name.split(".")[0] for name in names}
    return rooms & FLOOR.keys()


def test_no_import_goes_up():
    up = []
    for path in FILES:
        floor = FLOOR[path.parts[0].removesuffix(".py")]
        up += [f"{path} imports {room}" for room in imports(path) if FLOOR[room] > floor]
    assert up == []


def test_programs_do_not_import_programs():
    for program in FLOORS[2]:
        assert imports(Path(f"{program}.py")) & FLOORS[2] == set(), program


def test_the_root_has_four_python_files():
    found = {path.stem for path in ROOT.glob("*.py")}
    assert found == {"grassmann", "gpu", "train_char", "sample"}


def is_a_command(path: Path) -> bool:
    return '__name__ == "__main__"' in (ROOT / path).read_text(encoding="utf-8")


LEFT_OUT = ("torch_layer", "fused")  # needs PyTorch; only gpu.py imports it
MODULES = [
    ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    for path in FILES
    if path.parts[0] != "tests" and path.stem not in LEFT_OUT and not is_a_command(path)
]
PROCESS = """
import importlib, os, signal, sys, threading, unittest.mock
sys.modules["cupy"] = cupy = unittest.mock.MagicMock()
def process():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "modules": sys.path.copy(),
        "output": sys.stdout,
        "signals": handlers,
        "switch interval": sys.getswitchinterval(),
        "threads": threading.active_count(),
        "MPI": "mpi4py" in sys.modules,
        "GPU": cupy.cuda.mock_calls.copy(),
    }
before = process()
importlib.import_module(sys.argv[1])
after = process()
print([name for name in before if before[name] != after[name]])
"""


@pytest.mark.parametrize("module", MODULES)
def test_an_import_changes_nothing_in_the_process(module):
    """Under mpiexec, too, and with a GPU. Only a command may prepare its process."""
    command = [sys.executable, "-c", PROCESS, module]
    env = os.environ | {"PMI_SIZE": "2"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr
