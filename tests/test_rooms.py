"""The rooms of the house: what may import what, and what an import may not do."""

import ast
import subprocess
import sys
from pathlib import Path

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


def test_an_import_changes_nothing_in_the_process():
    code = """
import os, signal, sys, threading
before = dict(os.environ), sys.getswitchinterval(), signal.getsignal(signal.SIGINT), sys.stdout
import grassmann, charlm.run, charlm.own_layer, charlm.trained, charlm.training
after = dict(os.environ), sys.getswitchinterval(), signal.getsignal(signal.SIGINT), sys.stdout
print(before == after, threading.active_count(), "mpi4py" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "True 1 False\n"
