"""Make the explorer of a model, one HTML file: python -m explorer [out/best.npz]

The page holds the weights, and the model in plain JavaScript. It opens by a double click, needs
nothing from the network and can be sent to anyone. It shows text that was held out from training.
If the text of the run is gone, it shows text that the model writes.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import base64
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np

import grassmann
from charlm.text import SHAKESPEARE_SHA256, decode, encode, read_file, start_token
from charlm.trained import find_trained, held_out, load_trained
from grassmann import Config, Params, UserError, require

HERE = Path(__file__).resolve().parent


def page(params: Params, config: Config, extra: dict, name: str, text: str) -> str:
    """The page, with `text` on it.

    Raises UserError if the model does not know a character of the text.
    """
    tokens = encode(text, extra["vocab"])
    weights = np.concatenate([a.ravel() for a in params.values()])
    with np.errstate(over="ignore"):  # float16 if this loses nothing
        dtype = "<f2" if (weights.astype("<f2") == weights).all() else "<f4"
    packed = weights.astype(dtype).tobytes()
    about = f"{name}: {weights.size:,} parameters, {len(extra['vocab']):,} different characters"
    loss = best_loss(extra)
    if loss is not None:
        about += f", {loss / np.log(2):.2f} bits a character on held-out text"
    model = {
        "about": about,
        "config": asdict(config),
        "vocab": extra["vocab"],
        "start": extra["most_common"],
        "text": text,
        "at": surprising_place(params, config, tokens, text),
        "params": [[k, a.shape] for k, a in params.items()],
        "dtype": dtype,
        "sum": sum(packed),
    }
    parts = {name: read_file(HERE / name) for name in ("style.css", "model.js", "explorer.js")}
    parts["model"] = json.dumps(model).replace("<", "\\u003c")  # no </script> in a script
    parts["weights"] = base64.b64encode(packed).decode()
    return re.sub(r"\[\[([\w.]+)\]\]", lambda found: parts[found[1]], read_file(HERE / "page.html"))


def best_loss(extra: dict) -> float | None:
    """The validation loss that a checkpoint names. Raises UserError if it is not a number."""
    best = extra.get("best")
    fine = (
        isinstance(best, list)
        and len(best) == 2
        and type(best[1]) in (int, float)
        and 0 <= best[1] < 1e6
    )
    require(
        fine or best is None,
        f"its best validation loss is {str(best)[:40]!r}; expected [step, loss]",
    )
    return best[1] if fine else None


def opening_text(params: Params, config: Config, extra: dict) -> str:
    """The first lines of the held-out text, or if this is not found, text that the model writes."""
    if extra.get("text_sha256") == SHAKESPEARE_SHA256:  # held-out lines that need no download
        return read_file(HERE / "passage.txt")
    try:
        require(
            bool(extra.get("text_sha256")),
            "only a text with the hash of the run's text may come into a page",
        )
        text = held_out(extra)[:800]
        return text.rpartition("\n")[0] or text
    except UserError:
        start = start_token(extra["vocab"], extra["most_common"])
        tokens = grassmann.generate(params, config, [start], 400, temperature=0.8)
        return decode(tokens, extra["vocab"])


def surprising_place(params: Params, config: Config, tokens: np.ndarray, text: str) -> int:
    """The most surprising character of the most surprising word of the first lines."""
    n = min(len(tokens), config.context if config.positions else 200)
    if n < 2:
        return 0
    logits = grassmann.forward(params, config, tokens[None, :n].astype(int))[0]
    losses = [
        grassmann.cross_entropy_forward(a[None], b[None])[0]
        for a, b in zip(logits, tokens[1:n], strict=False)
    ]
    surprise = np.array([0, *losses])
    words = [slice(*word.span()) for word in re.finditer(r"\S+", text[:n])] or [slice(n)]
    later = [
        word for word in words if word.start >= 40
    ] or words  # at the start everything is a surprise
    word = max(later, key=lambda word: surprise[word].sum())
    return word.start + int(surprise[word].argmax())


def main() -> None:
    command_line.plain_output()
    parser = command_line.Parser(__doc__)
    parser.prog = "python -m explorer"
    add = parser.add_argument
    add(
        "checkpoint",
        nargs="?",
        type=Path,
        default=command_line.BEST,
        help=f"the model (default: {command_line.BEST})",
    )
    add("--text", help="the text on the page; @FILE reads a file (default: held-out text)")
    add("--out", type=Path, help="the page (default: explorer.html, beside the checkpoint)")
    args = parser.parse_args()
    with command_line.short_errors(parser, args.checkpoint, "not enough memory for this model"):
        checkpoint = find_trained(args.checkpoint)
        out = args.out or checkpoint.with_name("explorer.html")
        write(out, checkpoint, args.text)
    with command_line.short_errors(parser, "standard output"):
        print(f"{out}: open it in a browser")


def write(out: Path, checkpoint: Path, text: str | None) -> None:
    """Write the page next to its place, then rename it. Raises UserError and OSError."""
    taken = out.suffix.lower() == ".npz" or (
        out.exists() and checkpoint.exists() and out.samefile(checkpoint)
    )
    require(
        not taken,
        f"--out {out} is a checkpoint; give the page another name, as in --out explorer.html",
    )
    require(
        out.is_file() or not os.path.lexists(out),
        f"--out {out} is not a file; give one, as in --out explorer.html",
    )
    require(out.parent.is_dir(), f"--out {out}: there is no folder {out.parent}")
    cannot = (
        f"the explorer cannot show {checkpoint}: its mixer is %s, "
        "and only the Grassmann mixer has planes to draw"
    )
    try:
        params, config, extra = load_trained(grassmann, checkpoint)
    except UserError as error:
        own = "a layer of your own" in str(error)  # its file is not loaded here
        raise UserError(cannot % "a layer of your own" if own else str(error)) from None
    require(config.mixer == "grassmann", cannot % config.mixer)
    if text is None:
        text = opening_text(params, config, extra)
    elif text.startswith("@"):
        text = read_file(Path(text[1:]))
    whole, unfinished = (
        page(params, config, extra, checkpoint.name, text),
        out.with_name(f"{out.name}.tmp"),
    )
    try:
        unfinished.write_text(whole, encoding="utf-8", newline="\n")
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
