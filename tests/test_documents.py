"""The pages: their code runs and prints what they show, and what they name exists."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")
PAGES = [page for folder in (".", "docs", "experiments") for page in (ROOT / folder).glob("*.md")]


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request) -> Path:
    return request.param


@pytest.fixture
def document(page) -> str:
    return page.read_text(encoding="utf-8")


def same(printed: str, shown: str) -> bool:
    """The same words, and the same numbers to a unit of the last digit; errors, which have an exponent, roughly."""

    def near(a, b):
        if "e" in b:
            return 1 / 30 < float(a) / float(b) < 30
        digits = len(b.partition(".")[2])
        return abs(float(a) - float(b)) <= 1.01 * 10**-digits * (digits > 0)

    words = NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    return words and all(map(near, NUMBER.findall(printed), NUMBER.findall(shown)))


def test_the_comparison_of_numbers():
    assert same("a 1.234 [2. 3]", "a 1.235 [2. 3]") and not same("a 1.234", "a 1.237")
    assert not same("12606656", "12606657") and not same("True False", "True True")
    assert same("3e-11 of 1e+00", "9e-12 of 2e+00") and not same("3e-11", "3e-9")


@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["quick", "whole"]
)
def test_every_block_prints_what_the_page_shows(document, whole):
    """Run in order, in one namespace; what takes a minute only with -m slow."""
    names = {}
    for code, shown in (
        block for block in BLOCK.findall(document) if whole or "takes a minute" not in block[0]
    ):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "document", "exec"), names)
        assert same(printed.getvalue(), shown), f"shown:\n{shown}\nprinted:\n{printed.getvalue()}"


def test_what_is_named_in_backticks_exists(document):
    """Files, pairs of functions, flags and names with an underscore, in the source or the page's own code."""
    files = [
        file
        for pattern in ("*.py", "*/*.py", "*/*.cu", "tests/**/*.*")
        for file in ROOT.glob(pattern)
        if file.suffix in (".py", ".cu", ".h")
    ]
    known = {name for code, _ in BLOCK.findall(document) for name in re.findall(r"\w+", code)}
    for file in files:
        known |= {file.name, *re.findall(r"--[\w-]+|\w+", file.read_text(encoding="utf-8"))}
    for name in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", document, flags=re.DOTALL)):
        if name.endswith("_*"):  # gate_* is gate_forward and gate_backward
            assert {name[:-1] + "forward", name[:-1] + "backward"} <= known, name
        elif re.fullmatch(r"[\w./]+\.py|--[\w-]+|\w+_\w+", name):
            assert name in known or (ROOT / name).exists(), name


def test_every_link_picture_table_and_section_exists(page, document):
    assert not re.search(r"\n\n\|.*\n(?!\|[-|]+\n)", document), (
        "a row below an empty line is no table"
    )
    for file, section in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document):
        target = page.parent / file if file else page
        assert target.exists(), file
        if section and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in {
                re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings
            }, section


def test_what_is_quoted_from_the_code_stands_there(document):
    """Blocks of ```py and ```cuda are quotes. A line "# …" stands for lines that were left out."""
    for kind, file in (("py", "grassmann.py"), ("cuda", "gpu_kernels/kernels.cu")):
        source = (ROOT / file).read_text(encoding="utf-8")
        for quoted in re.findall(rf"```{kind}\n(.*?)```", document, re.DOTALL):
            assert all(
                piece in source for piece in re.split(r"^ *# …\n", quoted, flags=re.MULTILINE)
            ), quoted
