"""Make explorer/shakespeare.npz and explorer/explorer.html from a run of your own.

  python train_char.py --data shakespeare && python tests/explorer/ship.py out/best.npz

The weights are rounded to float16, which keeps the page small. Without an argument, only the page
is made again.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from charlm.checkpoint import load_checkpoint, save_checkpoint
from explorer.__main__ import write

if len(sys.argv) > 1:
    params, config, extra = load_checkpoint(sys.argv[1])
    params = {name: a.astype("float16").astype("float32") for name, a in params.items()}
    save_checkpoint(ROOT / "explorer" / "shakespeare.npz", params, config, **extra)
write(ROOT / "explorer" / "explorer.html", ROOT / "explorer" / "shakespeare.npz", None)
