"""Make the explorer of a model, one HTML file: python -m explorer [out/best.npz]

The page holds the weights, and the model in plain JavaScript: it opens by a double click, asks for
nothing from the network and can be sent to anyone. Without an argument it shows the model of
out/best.npz, or shakespeare.npz where nothing has been trained yet.
"""

import cli  # noqa: I001  (before NumPy)

import base64
import html
import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

import grassmann
from cli import Parser, load_trained, plain_output, short_errors
from grassmann import Config, Params
from text import encode, read_file

HERE = Path(__file__).resolve().parent
TRAINED, SHIPPED = Path("out/best.npz"), HERE.parent / "shakespeare.npz"


def packed(params: Params) -> tuple[bytes, str]:
    """All weights in a row: as float16 where that loses nothing, else as float32."""
    weights = np.concatenate([a.ravel() for a in params.values()])
    with np.errstate(over="ignore"):
        dtype = "<f2" if (weights.astype("<f2") == weights).all() else "<f4"
    return weights.astype(dtype).tobytes(), dtype


def page(params: Params, config: Config, extra: dict, name: str, text: str, tutorial: str) -> str:
    """The page. `text` stands on it at first (empty: what the model writes); `tutorial`: its address."""
    weights, dtype = packed(params)
    model = {
        "name": name, "config": asdict(config), "vocab": extra["vocab"], "start": extra["most_common"],
        "best": extra.get("best"), "text": text, "dtype": dtype, "adler32": zlib.adler32(weights),
        "params": [[name, a.shape] for name, a in params.items()],
    }
    parts = {name.upper(): read_file(HERE / name) for name in ("style.css", "model.js", "explorer.js")}
    parts["MODEL"] = json.dumps(model).replace("<", "\\u003c")  # no </script> in a script
    parts["WEIGHTS"], parts["TUTORIAL"] = base64.b64encode(weights).decode(), html.escape(tutorial)
    whole = read_file(HERE / "page.html")
    for key, part in parts.items():
        whole = whole.replace(f"{{{{{key}}}}}", part)
    return whole


def main() -> None:
    plain_output()
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, help=f"the model (default: {TRAINED}, or {SHIPPED.name})")
    add("--text", help="what stands on the page at first; @FILE reads a file (default: what the model writes)")
    add("--out", type=Path, help="the page (default: explorer.html, beside the checkpoint)")
    args = parser.parse_args()
    ran = TRAINED.exists() or TRAINED.with_name("last.npz").exists()
    checkpoint = args.checkpoint or (TRAINED if ran else SHIPPED)
    out = args.out or checkpoint.with_name("explorer.html")
    with short_errors(parser, out, "not enough memory for this model"):
        params, config, extra = load_trained(grassmann, checkpoint)
        if config.mixer == "attention":
            raise ValueError(f"{checkpoint} is a Transformer: its characters span no planes to look at")
        text = args.text or ""
        if text.startswith("@"):
            text = read_file(Path(text[1:]))
        encode(text, extra["vocab"])
        try:
            tutorial = os.path.relpath(HERE.parent / "tutorial.md", out.resolve().parent)
        except ValueError:  # on another drive
            tutorial = str(HERE.parent / "tutorial.md")
        whole = page(params, config, extra, checkpoint.name, text, Path(tutorial).as_posix())
        out.write_text(whole, encoding="utf-8", newline="\n")
    print(f"{out}: open it in a browser")


if __name__ == "__main__":
    main()
