"""The pages: their code runs and prints what they show, and what they name exists."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")
FOLDERS = (ROOT, ROOT / "docs", ROOT / "experiments")
PAGES = [page for folder in FOLDERS for page in folder.glob("*.md")]
QUOTED = {"py": "grassmann.py", "cuda": "gpu_kernels/kernels.cu"}
SOURCES = ("*.py", "*/*.py", "*/*.cu", "tests/**/*.py", "tests/**/*.h")


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request) -> Path:
    return request.param


@pytest.fixture
def document(page) -> str:
    return page.read_text(encoding="utf-8")


def near(printed: str, shown: str) -> bool:
    """The same number to a unit of the last digit. An error, which has an exponent, roughly."""
    a = float(printed)
    b = float(shown)
    if "e" in shown:
        return 1 / 30 < a / b < 30
    digits = len(shown.partition(".")[2])
    return a == b if digits == 0 else abs(a - b) <= 1.01 * 10**-digits


def same(printed: str, shown: str) -> bool:
    """The same words, and nearly the same numbers."""
    if NUMBER.sub("#", printed) != NUMBER.sub("#", shown):
        return False
    return all(map(near, NUMBER.findall(printed), NUMBER.findall(shown)))


def test_the_comparison_of_numbers():
    assert same("a 1.234 [2. 3]", "a 1.235 [2. 3]")
    assert not same("a 1.234", "a 1.237")
    assert not same("12606656", "12606657")
    assert not same("True False", "True True")
    assert same("3e-11 of 1e+00", "9e-12 of 2e+00")
    assert not same("3e-11", "3e-9")


slow = pytest.param(True, marks=pytest.mark.slow)


@pytest.mark.parametrize("whole", [False, slow], ids=["quick", "whole"])
def test_every_block_prints_what_the_page_shows(document, whole):
    """Run in order, in one namespace; what takes a minute only with -m slow."""
    names = {}
    for code, shown in BLOCK.findall(document):
        if "takes a minute" in code and not whole:
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, "document", "exec"), names)
        printed = output.getvalue()
        assert same(printed, shown), f"shown:\n{shown}\nprinted:\n{printed}"


@pytest.fixture(scope="session")
def source_names() -> set[str]:
    """Names of files, flags and words in them."""
    names = set()
    for pattern in SOURCES:
        for file in ROOT.glob(pattern):
            names.add(file.name)
            names.update(re.findall(r"--[\w-]+|\w+", file.read_text(encoding="utf-8")))
    return names


def test_what_is_named_in_backticks_exists(document, source_names):
    """Files, pairs of functions, flags and names with an underscore.

    They are in the source, or in the page's own code.
    """
    known = set(source_names)
    for code, _ in BLOCK.findall(document):
        known.update(re.findall(r"\w+", code))
    prose = re.sub(r"```.*?```", "", document, flags=re.DOTALL)
    for name in re.findall(r"`([^`\n]+)`", prose):
        if name.endswith("_*"):  # gate_* is gate_forward and gate_backward
            assert name[:-1] + "forward" in known
            assert name[:-1] + "backward" in known
        elif re.fullmatch(r"[\w./]+\.py|--[\w-]+|\w+_\w+", name):
            assert name in known or (ROOT / name).exists(), name


def test_no_row_of_a_table_stands_below_an_empty_line(document):
    assert not re.search(r"\n\n\|.*\n(?!\|[-|]+\n)", document)


def sections(page: Path) -> set[str]:
    """The names by which links reach the page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_link_picture_and_section_exists(page, document):
    for file, section in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document):
        target = page.parent / file if file else page
        assert target.exists(), file
        if section and target.suffix == ".md":
            assert section in sections(target)


@pytest.mark.parametrize("kind", QUOTED)
def test_what_is_quoted_from_the_code_stands_there(document, kind):
    """Blocks of ```py and ```cuda are quotes. A line "# …" stands for lines that were left out."""
    source = (ROOT / QUOTED[kind]).read_text(encoding="utf-8")
    for quoted in re.findall(rf"```{kind}\n(.*?)```", document, re.DOTALL):
        for piece in re.split(r"^ *# …\n", quoted, flags=re.MULTILINE):
            assert piece in source
