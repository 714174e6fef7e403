"""Make docs/tutorial.ipynb from tutorial.md, and run it to fill in its outputs.

python -m experiments.notebook
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import re
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbformat import v4

ROOT = Path(__file__).resolve().parent.parent
FIRST = """\
# Fetch the repository and the packages that it needs, each only if it is missing.
import importlib.util, os
for folder in ("..", "grassmann"):
    if os.path.exists(f"{folder}/grassmann.py"):
        os.chdir(folder)
if not os.path.exists("grassmann.py"):
    !git clone -q URL-OF-THIS-REPOSITORY grassmann
    %cd grassmann
if not all(map(importlib.util.find_spec, ("numpy", "matplotlib", "tqdm"))):
    %pip install -q -r requirements.txt
gpu = "--gpu" if importlib.util.find_spec("cupy") and os.path.exists("/dev/nvidia0") else \"\""""
LAST = [
    "## Your turn\n\nTrain a model of your own text, on the GPU if there is one.",
    "# !python train_char.py --data my.txt --preset tiny $gpu",
]


def notebook():
    """The page as cells, without the outputs that the page shows: running the cells makes them."""
    page = (ROOT / "tutorial.md").read_text(encoding="utf-8")
    page = re.sub(r"(```python\n.*?```\n)```text\n.*?```\n", r"\1", page, flags=re.DOTALL)
    page = re.sub(r"\]\((?!https?:|#)", "](../", page).replace("](../docs/", "](")
    made = jupytext.reads(page, "md")
    made.cells = [
        v4.new_code_cell(FIRST),
        *made.cells,
        v4.new_markdown_cell(LAST[0]),
        v4.new_code_cell(LAST[1]),
    ]
    for k, cell in enumerate(made.cells):
        cell.id = f"cell-{k}"  # the same each time
    made.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    return made


def run(made):
    """The notebook with outputs. Raises nbclient's CellExecutionError."""
    where = {"metadata": {"path": str(ROOT)}}
    NotebookClient(made, timeout=600, resources=where, coalesce_streams=True).execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # the times of the run
    return made


if __name__ == "__main__":
    command_line.Parser(__doc__).parse_args()
    jupytext.write(run(notebook()), ROOT / "docs" / "tutorial.ipynb")
    print(ROOT / "docs" / "tutorial.ipynb")
