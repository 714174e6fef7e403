"""Break the code on purpose, in one place at a time, and see whether a test notices.

    python tests/mutate.py                every mutation, a quarter of an hour
    python tests/mutate.py plucker        mutations with "plucker" in their line
    python tests/mutate.py --start 120    go on with number 120

A test that cannot fail proves nothing. mutations.txt names a file, a function or class in it, and
below them mistakes, one a line: what stands there once => what stands there instead  # which test
must fail. The mistake is made in a copy of the project, where this test runs. If it passes, all
tests run. Exit code 1 if they pass as well, if the list does not fit the code, or if a test fails
without any mistake.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "mutations.txt"
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "out")


class Mutation(NamedTuple):
    file: str
    name: str  # of the function or class; "": anywhere in the file
    old: str
    new: str
    test: str

    def __str__(self) -> str:
        return f"{self.file} {self.name}: {self.old} => {self.new}"


def read_list() -> list[Mutation]:
    mutations = []
    file = name = ""
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            change, _, test = line.rpartition("  # ")
            old, _, new = change.partition(" => ")
            mutations.append(Mutation(file, name, old.strip(), new.strip(), test))
        elif line:
            file, _, name = line.partition(" ")
    return mutations


def own_lines(source: str, name: str) -> slice:
    """The lines of the function or class, with its decorators."""
    for node in ast.walk(ast.parse(source)):
        if name and getattr(node, "name", None) == name:
            first = min(part.lineno for part in (node, *node.decorator_list))
            return slice(first - 1, node.end_lineno)
    return slice(None)


def mistaken(mutation: Mutation) -> str:
    """The file's text with the mistake."""
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    own = own_lines(source, mutation.name)
    text = "".join(lines[own])
    found = text.count(mutation.old)
    if found != 1:
        sys.exit(f"{mutation}\nThe old text occurs {found} times, not once: update {LIST.name}")
    lines[own] = [text.replace(mutation.old, mutation.new)]
    return "".join(lines)


def first_failure(folder: Path, tests: list[str]) -> str | None:
    """The first of these tests that fails in the folder, or None."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return "it takes more than ten minutes"
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", run.stdout, re.MULTILINE)
    if run.returncode and not failed:
        sys.exit(f"pytest ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return failed[1] if failed else None


def noticed_by(mutation: Mutation, folder: Path) -> str | None:
    """The first test that fails with this mistake, or None."""
    file = folder / mutation.file
    file.write_text(mistaken(mutation), encoding="utf-8")
    try:
        named = [f"tests/{mutation.test}"] if mutation.test else []
        return (named and first_failure(folder, named)) or first_failure(folder, ["tests"])
    finally:
        shutil.copyfile(ROOT / mutation.file, file)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*")
    parser.add_argument("--start", type=int, default=1)
    args = parser.parse_args()
    chosen = [
        (number, mutation)
        for number, mutation in enumerate(read_list(), 1)
        if number >= args.start and all(word in str(mutation) for word in args.words)
    ]
    for _, mutation in chosen:
        mistaken(mutation)  # before hours pass: does the list fit the code?
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # two versions within a second look the same
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        tests = sorted({f"tests/{mutation.test}" for _, mutation in chosen if mutation.test})
        if failed := first_failure(folder, tests):
            sys.exit(f"without any mistake {failed} fails: repair that first")
        for number, mutation in chosen:
            test = noticed_by(mutation, folder)
            survivors += test is None
            print(f"{number:3} {mutation}  # {test or 'SURVIVED'}", flush=True)
    print(f"{len(chosen)} mutations, {survivors} survived")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
