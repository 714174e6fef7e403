"""A trained model: its file is found and read, and it writes. And the text held out from it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from charlm.checkpoint import load_checkpoint
from charlm.command_line import BEST
from charlm.text import encode, load_text, start_token, text_sha256, visible
from grassmann import Config, Params, UserError, require

SHIPPED = Path(__file__).resolve().parents[1] / "explorer" / "shakespeare.npz"


def find_trained(path: Path) -> Path:
    """The file to read: instead of a missing best.npz last.npz, instead of out/ our own model."""
    others = []
    if path.name == "best.npz":
        others.append(path.with_name("last.npz"))
    if path == BEST:
        others.append(SHIPPED)
    if path.exists():
        return path
    for other in others:
        if other.exists():
            print(visible(f"there is no {path} yet; using {other}"), file=sys.stderr)
            return other
    return path


def load_trained(model: ModuleType, path: Path) -> tuple[Params, Config, dict]:
    """(params, config, extra) of a file that train_char.py wrote, for grassmann or gpu.

    Raises UserError and OSError.
    """
    found = find_trained(path)
    require(found.exists(), f"{path} does not exist; train_char.py writes it")
    params, config, extra = load_checkpoint(found, getattr(model, "Flat", dict))
    require(
        extra.get("vocab") is not None and extra.get("most_common") in range(config.vocab_size),
        f"{found} was not written by train_char.py",
    )
    return params, config, extra


def continue_text(
    model: ModuleType, params: Params, config: Config, extra: dict, prompt: str, length: int, **how
) -> Iterator[str]:
    """Yields `length` characters after the prompt, each as it is drawn.

    `extra` comes from the checkpoint. `how` may have temperature, top_k and seed. Raises UserError
    at once, for instance if the model does not know a character of the prompt.
    """
    vocab = extra["vocab"]
    start = encode(prompt, vocab).tolist() or [start_token(vocab, extra["most_common"])]
    tokens = model.generate(params, config, start, length, **how)
    return (chr(vocab[token]) for token in tokens)


def write_text(prompt: str, characters: Iterable[str]) -> None:
    """Print the prompt, then each character at once. Escapes control characters on a terminal."""
    show = visible if sys.stdout.isatty() else str
    print(show(prompt), end="")
    for character in characters:
        print(show(character), end="", flush=True)
    print()


def held_out(extra: dict) -> str:
    """The held-out text of a checkpoint's run, from the start of a paragraph.

    The run's settings say where the text is. Raises UserError if it is gone or has changed.
    """
    settings = extra.get("settings")
    data = settings.get("data", "?") if isinstance(settings, dict) else "?"
    if data is not None:
        data = [str(name) for name in (data if isinstance(data, list) else [data])]
    for name in data or ():
        there = name == "shakespeare" or "*" in name or Path(name).is_file() or Path(name).is_dir()
        require(there, f"there is no file {name!r}")
    try:
        with contextlib.redirect_stdout(None):  # what load_text says is about --data
            text = load_text(data)
    except UserError as error:
        raise UserError(str(error).partition("; ")[0]) from None
    require(extra.get("text_sha256") in (None, text_sha256(text)), "it has changed since")
    text = text[len(text) - len(text) // 10 :]
    return text[text.find("\n\n", 0, 1000) + 1 :].lstrip()
