"""Make the explorer of a model, one HTML file: python -m explorer [out/best.npz]

The page holds the weights, and the model in plain JavaScript: it opens by a double click, asks for
nothing from the network and can be sent to anyone (its links into the lesson lead nowhere then).
Without an argument it shows out/best.npz, or shakespeare.npz where nothing has been trained yet.
"""

from cli import Parser, load_trained, plain_output, short_errors  # noqa: I001  (before NumPy)

import base64
import html
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import numpy as np

import grassmann
from grassmann import Config, Params
from text import encode, read_file

HERE = Path(__file__).resolve().parent
TRAINED, SHIPPED = Path("out/best.npz"), HERE.parent / "shakespeare.npz"

def page(params: Params, config: Config, extra: dict, name: str, text: str, tutorial: str) -> str:
    """The page. On it stands `text` (empty: what the model writes); `tutorial`: its address."""
    weights = np.concatenate([a.ravel() for a in params.values()])
    with np.errstate(over="ignore"):  # float16 where that loses nothing
        dtype = "<f2" if (weights.astype("<f2") == weights).all() else "<f4"
    packed, vocab, best = weights.astype(dtype).tobytes(), extra["vocab"], extra.get("best")
    bits = f", {best[1] / np.log(2):.2f} bits a character on text held out" if best else ""
    model = {
        "about": f"{name}: {weights.size:,} parameters, an alphabet of {len(vocab):,}{bits}",
        "config": asdict(config), "vocab": vocab, "start": extra["most_common"], "text": text,
        "params": [[k, a.shape] for k, a in params.items()], "dtype": dtype, "sum": sum(packed),
    }
    parts = {name: read_file(HERE / name) for name in ("style.css", "model.js", "explorer.js")}
    parts["model"] = json.dumps(model).replace("<", "\\u003c")  # no </script> in a script
    parts["weights"], parts["tutorial"] = base64.b64encode(packed).decode(), html.escape(tutorial)
    return re.sub(r"\[\[([\w.]+)\]\]", lambda found: parts[found[1]], read_file(HERE / "page.html"))

def main() -> None:
    plain_output()
    parser = Parser(__doc__)
    parser.prog = "python -m explorer"
    add = parser.add_argument
    ran = TRAINED.exists() or TRAINED.with_name("last.npz").exists()
    add("checkpoint", nargs="?", type=Path, default=TRAINED if ran else SHIPPED,
        help=f"the model (default: {TRAINED}, or {SHIPPED.name})")
    add("--text", default="", help="on it at first; @FILE reads a file (default: the model's)")
    add("--out", type=Path, help="the page (default: explorer.html, beside the checkpoint)")
    args = parser.parse_args()
    out = args.out or args.checkpoint.with_name("explorer.html")
    with short_errors(parser, out, "not enough memory for this model"):
        params, config, extra = load_trained(grassmann, args.checkpoint)
        if config.mixer != "grassmann":
            raise ValueError(f"{args.checkpoint} mixes by {config.mixer}: it has no planes")
        text = read_file(Path(args.text[1:])) if args.text.startswith("@") else args.text
        encode(text, extra["vocab"])  # raises what the model does not know
        lesson = HERE.parent / "tutorial.md"
        try:
            link = quote(Path(os.path.relpath(lesson, out.resolve().parent)).as_posix())
        except ValueError:  # on another drive of Windows
            link = lesson.as_uri()
        whole = page(params, config, extra, args.checkpoint.name, text, link)
        out.write_text(whole, encoding="utf-8", newline="\n")
    print(f"{out}: open it in a browser")


if __name__ == "__main__":
    main()
