"""Compare the weight of the project with its limits: python tests/weigh.py (exit code 1: too much)

Weight is counted in Python's own tokens, without comments, docstrings, line ends and indentation.
Packing lines does not change it. Pace is the number of tokens on an average line of code.
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TOKENS = {
    "grassmann.py": 8_200,
    "grassmann.py train_char.py sample.py charlm/*.py": 19_500,
    "gpu.py gpu_kernels/*.py": 7_000,
    "experiments/*.py": 25_000,
    "tests/**/*.py": 55_000,
}
PACE = {
    "grassmann.py gpu.py gpu_kernels/*.py tests/**/*.py": 12,
    "train_char.py sample.py charlm/*.py experiments/*.py explorer/*.py docs/*.py": 11,
}
WORDS = {
    "README.md": 900,
    "tutorial.md": 7_500,
    "experiments/README.md": 4_000,
    "docs/claim.md": 1_200,
}

LAYOUT = {
    tokenize.ENCODING,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_tokens(file: Path) -> list[int]:
    """The line of each token that counts."""
    source = file.read_text(encoding="utf-8")
    lines = []
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            continue
        docstring = token.type == tokenize.STRING and before in LAYOUT
        if token.type not in LAYOUT and not docstring:
            lines.append(token.start[0])
        before = token.type
    return lines


def prose(page: str) -> str:
    """The page without its blocks of code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```\n", "", text, flags=re.S | re.M)


def files(patterns: str) -> list[Path]:
    return [path for pattern in patterns.split() for path in sorted(ROOT.glob(pattern))]


def rows() -> Iterator[tuple[float, float, str]]:
    """How much, at most, of what."""
    for patterns, most in TOKENS.items():
        total = sum(len(code_tokens(file)) for file in files(patterns))
        yield total, most, f"tokens of {patterns}"
    for patterns, most in PACE.items():
        paces = []
        for file in files(patterns):
            lines = code_tokens(file)
            pace = round(len(lines) / max(1, len(set(lines))), 1)
            paces.append((pace, file.relative_to(ROOT).as_posix()))
        paces.sort(reverse=True)
        dense = [row for row in paces if row[0] > most] or paces[:1]
        for pace, name in dense:
            yield pace, most, f"tokens on a line of code in {name}"
    kernels = (ROOT / "gpu_kernels" / "kernels.cu").read_text(encoding="utf-8").splitlines()
    yield len(kernels), 340, "lines of kernels.cu"
    yield max(map(len, kernels)), 100, "columns of kernels.cu"
    for page, most in WORDS.items():
        yield len(prose(page).split()), most, f"words of {page} outside code blocks"


def main() -> int:
    too_much = 0
    for found, most, what in rows():
        warning = "   TOO MUCH" if found > most else ""
        too_much += found > most
        print(f"{found:8,} of {most:7,} {what}{warning}")
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
