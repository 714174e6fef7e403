"""tutorial.md and README.md: their code runs, their numbers come out, what they name exists."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")

@pytest.fixture(params=["tutorial.md", "README.md"])
def document(request) -> str:
    return (ROOT / request.param).read_text(encoding="utf-8")

def same(printed: str, shown: str) -> bool:
    """The same words, and the same numbers to a unit of the last digit shown."""
    def near(a, b):
        digits = len(b.partition(".")[2])
        return abs(float(a) - float(b)) <= 1.01 * 10**-digits * (digits > 0)

    words = NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    return words and all(map(near, NUMBER.findall(printed), NUMBER.findall(shown)))

def test_the_comparison_of_numbers():
    assert same("a 1.234 [2. 3]", "a 1.235 [2. 3]") and not same("a 1.234", "a 1.237")
    assert not same("12606656", "12606657") and not same("True False", "True True")

def test_every_block_prints_what_the_page_shows(document):
    """Run in order, in one namespace."""
    names = {}
    for code, shown in BLOCK.findall(document):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "document", "exec"), names)
        assert same(printed.getvalue(), shown), f"shown:\n{shown}\nprinted:\n{printed.getvalue()}"

def test_what_is_named_in_backticks_exists(document):
    """Files, flags, names with an underscore, as words of the source; and pairs of functions."""
    files = [file for pattern in ("*.py", "*.cu", "experiments/**/*.py", "tests/**/*.*")
             for file in ROOT.glob(pattern) if file.suffix in (".py", ".cu", ".h")]
    known = {file.name for file in files}
    for file in files:
        known |= set(re.findall(r"--[\w-]+|\w+", file.read_text(encoding="utf-8")))
    for name in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", document, flags=re.DOTALL)):
        if name.endswith("_*"):  # gate_* is gate_forward and gate_backward
            assert {name[:-1] + "forward", name[:-1] + "backward"} <= known, name
        elif re.fullmatch(r"[\w./]+\.py|--[\w-]+|\w+_\w+", name):
            assert name in known or (ROOT / name).exists(), name

def test_every_link_picture_and_quoted_kernel_exists(document):
    for file in re.findall(r"\]\((?!https?:|#)([^)#]+)", document):
        assert (ROOT / file).exists(), file
    kernels = (ROOT / "kernels.cu").read_text(encoding="utf-8")
    for kernel in re.findall(r"```cuda\n(.*?)```", document, re.DOTALL):
        assert kernel in kernels
