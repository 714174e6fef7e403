"""The commands and the Python of README.md, as a reader runs them."""

import re
import subprocess
import sys

import pytest
from kill_and_resume import MODEL, ROOT, TEXT

README = (ROOT / "README.md").read_text(encoding="utf-8")
[LINES] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(
    r"(?m)^(?:cat my\.txt \| )?\.venv/bin/python (?:train_char|sample)\.py.*", README
)


def test_the_lines_of_python_work_in_another_folder(plain, tmp_path):
    """As after pip install -e: this folder is on the path."""
    env = plain | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LINES]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr == ""
    assert len(done.stdout) == 60 + 1
    assert "cat sat on" in done.stdout


@pytest.mark.slow
def test_the_commands_are_accepted(plain, tmp_path):
    """Those that train get a tiny model, unless --init gives its sizes."""
    (tmp_path / "my.txt").write_text("The \n" + TEXT)
    (tmp_path / "explorer").symlink_to(ROOT / "explorer")
    for name in ("train_char.py", "sample.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    tried = [line.partition("#")[0] for line in COMMANDS if "shakespeare " not in line]
    tried = [line for line in tried if "--gpu" not in line and "--data my.txt" not in line]
    assert len(tried) >= 4
    for line in tried:
        command = line.replace(".venv/bin/python", sys.executable)
        if "--init" in line:
            command = command.replace("--iters 500", "--iters 2")
        elif "--resume" in line:
            command += " --iters 4"
        elif "train_char" in line:
            command += f" --iters 2 {' '.join(MODEL)}"
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=plain, capture_output=True)
        assert done.returncode == 0, (command, done.stderr)
