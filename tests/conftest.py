"""Put the project on the path, and say at the end how good the gradients were."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cpu  # noqa: F401, I001  (before NumPy)

import finite_differences
import numpy as np
import pytest


# Where the tests run in the background, or under nohup, these signals are ignored, and so in the programs that they
# start. What is tested is how the programs take them.
for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), usual)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pytest_terminal_summary(terminalreporter):
    if finite_differences.errors:
        error, where = max(finite_differences.errors)
        terminalreporter.write_line(f"worst gradient error {error:.1e} ({where})")
