"""Compare lines, words and parentheses with the limits of this project: python tests/limits.py (exit code 1: too many)"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GPU = "gpu.py", "gpu_cuda.py", "kernels.cu"


def lines(*patterns: str) -> int:
    return sum(
        len(path.read_bytes().splitlines()) for pattern in patterns for path in ROOT.glob(pattern)
    )


def prose(page: str) -> str:
    return re.sub(
        r"^```.*?^```\n", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M
    )


def parentheses(
    page: str,
) -> int:  # sentences with one, of 1,000, without tables, formulas, code and links
    text = re.sub(r"^\|.*$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)", "", prose(page), flags=re.M)
    sentences = re.split(r"(?<=[.?!:])\s", text)
    return 1000 * sum("(" in sentence for sentence in sentences) // len(sentences)


ROWS = [  # what, how much, at most
    ("lines at the root, without the GPU's", lines("*.py") - lines(*GPU[:2]), 1900),
    *(
        (f"lines of {name}", lines(name), most)
        for name, most in (
            ("train_char.py", 290),
            ("cli.py", 120),
            ("parallel.py", 85),
            ("checkpoint.py", 100),
            ("training.py", 110),
        )
    ),
    (f"lines of {', '.join(GPU)}", lines(*GPU), 1050),
    ("lines of Python in experiments", lines("experiments/**/*.py"), 2400),
    ("lines of tests", lines("tests/**/*.py", "tests/**/*.h"), 5000),
    ("lines of tests/gpu", lines("tests/gpu/*.py", "tests/gpu/*.h"), 1000),
    *(
        (f"words of {page} outside code blocks", len(prose(page).split()), most)
        for page, most in (
            ("README.md", 900),
            ("tutorial.md", 7500),
            ("experiments/README.md", 4000),
            ("docs/claim.md", 1200),
        )
    ),
    ("sentences in 1,000 of tutorial.md with a parenthesis", parentheses("tutorial.md"), 125),
]
for what, found, most in ROWS:
    print(f"{found:6,} of {most:6,} {what}{'   TOO MANY' * (found > most)}")
raise SystemExit(any(found > most for _, found, most in ROWS))
