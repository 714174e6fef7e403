"""Make what lies in the repository from a run of one's own: shakespeare.npz and explorer/explorer.html.

  python train_char.py --data shakespeare && python tests/explorer/ship.py out/best.npz

The weights are rounded to float16, so that the page is small and yet the same model; without an
argument only the page is made anew, from shakespeare.npz.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

if len(sys.argv) > 1:
    params, config, extra = load_checkpoint(sys.argv[1])
    params = {name: a.astype(np.float16).astype(np.float32) for name, a in params.items()}
    save_checkpoint(ROOT / "shakespeare.npz", params, config, **extra)
subprocess.run([sys.executable, "-m", "explorer", "shakespeare.npz", "--text", "@explorer/passage.txt",
                "--out", "explorer/explorer.html"], cwd=ROOT, check=True)
