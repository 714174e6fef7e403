"""tutorial.md and README.md cannot go stale: their code runs, their numbers come out, their names exist."""

import contextlib
import inspect
import io
import re
from pathlib import Path

import pytest

import grassmann

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL, README = ((ROOT / name).read_text(encoding="utf-8") for name in ("tutorial.md", "README.md"))
BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", re.S)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def run_document(document: str) -> list[tuple[str, str]]:
    """Run all Python blocks in order, in one namespace: what each printed, and what the document says it prints."""
    results, names = [], {}
    for code, shown in BLOCK.findall(document):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "document", "exec"), names)
        results.append((printed.getvalue(), shown))
    return results


def same(printed: str, shown: str) -> bool:
    """The same words, and the same numbers to a unit of the last digit shown."""
    if NUMBER.sub("#", printed) != NUMBER.sub("#", shown):
        return False
    for a, b in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        digits = len(b.partition(".")[2])
        if abs(float(a) - float(b)) > 1.01 * 10**-digits * (digits > 0):
            return False
    return True


def test_the_comparison_of_numbers():
    assert same("a 1.234 [2. 3]", "a 1.235 [2. 3]")
    assert not same("a 1.234", "a 1.237")
    assert not same("12606656", "12606657")
    assert not same("True False", "True True")


@pytest.mark.parametrize("document", [TUTORIAL, README], ids=["tutorial.md", "README.md"])
def test_every_block_prints_what_the_page_shows(document, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    for printed, shown in run_document(document):
        assert same(printed, shown), f"shown:\n{shown}\nprinted:\n{printed}"


def known_names() -> set[str]:
    """Every name that the project's modules define, with their parameters' names and the programs' flags."""
    words = set()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.cu"), *ROOT.glob("tests/*.py")]:
        source = file.read_text(encoding="utf-8")
        words |= set(re.findall(r"--[\w-]+|\w+", source)) | {file.name, f"tests/{file.name}"}
    return words


@pytest.mark.parametrize("document", [TUTORIAL, README], ids=["tutorial.md", "README.md"])
def test_every_name_in_backticks_exists(document):
    prose = re.sub(r"```.*?```", "", document, flags=re.S)
    known = known_names()
    for name in re.findall(r"`([^`\n]+)`", prose):
        if name.endswith("_*"):  # a pair: gate_* is gate_forward and gate_backward
            assert {name[:-1] + "forward", name[:-1] + "backward"} <= known, name
        elif re.fullmatch(r"[\w./]+\.py|--[\w-]+|\w+", name):
            assert name in known or (ROOT / name).exists(), name


@pytest.mark.parametrize("document", [TUTORIAL, README], ids=["tutorial.md", "README.md"])
def test_every_picture_and_quoted_kernel_exists(document):
    for file in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", document):
        assert (ROOT / file).is_file(), file
    kernels = (ROOT / "kernels.cu").read_text(encoding="utf-8")
    for kernel in re.findall(r"```cuda\n(.*?)```", document, re.S):
        assert kernel in kernels


def test_every_public_function_is_in_the_tutorial():
    functions = [name for name, f in inspect.getmembers(grassmann, inspect.isfunction) if f.__module__ == "grassmann"]
    functions += ["pairs"]
    missing = []
    for name in functions:
        pair = re.sub(r"_(forward|backward)$", "_*", name)
        if not name.startswith("_") and not re.search(rf"`(G\.)?({re.escape(name)}|{re.escape(pair)})[`(]", TUTORIAL):
            missing.append(name)
    assert not missing
