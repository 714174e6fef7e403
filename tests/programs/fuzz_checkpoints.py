"""Damage a checkpoint at random, again and again: it loads unchanged or is refused with one line.

    python tests/programs/fuzz_checkpoints.py --count 1000

The damage is done to the file, or to a part of it that is then packed anew, with the right CRC: such a
file may load with other contents, if they could be saved. Exits with 1 at a file that raised anything but
ValueError or OSError, took absurd memory or loaded with wrong contents.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import tracemalloc
import warnings
import zipfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cli

cli.prepare()  # before NumPy

import numpy as np

import grassmann as G
from checkpoint import load_checkpoint, save_checkpoint

MOST_MEMORY = 10_000_000  # bytes; the checkpoint itself has about 40,000
WORDS = [b"", b"(", b")", b"[" * 9999, b'{"a":' * 9999, b"9" * 5000, b"-", b"'", b'"', b"\\d", b"#",
         b"\0", b"\n", b"L", b"1if", b"1000000000000, ", b"True, ", b"|O", b">f4", b"<f2", b"NaN"]
VALUES = [None, True, 0, 1, -1, 3, 1.5, 1e308, 10**9, 10**30, "", "x\ny", [], {}, [[]], [1, 2],
          [[1], [2]], [[1, 2], [4], [1]], {"a": 1}, float("nan"), float("inf"), ["x"]]

def damaged(rng: random.Random, content: bytes) -> bytes:
    """A bit flipped, or a stretch of bytes removed, repeated, or replaced by others; or cut off."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 1, 2, 8, 100, 5000]))
    stretch = content[start:end]
    new = rng.choice([bytes([stretch[0] ^ 1 << rng.randrange(8)]) + stretch[1:], b"", 2 * stretch,
                      rng.randbytes(len(stretch)), bytes(len(stretch)), rng.choice(WORDS)])
    return content[:start] + new + content[end : rng.choice([None, None, None, end])]

def names(rng, members):
    """Members removed, renamed, exchanged, repeated or added."""
    pairs = list(members.items())
    (name, content), place = rng.choice(pairs), rng.randrange(len(pairs))
    new = rng.choice([name, name[:-4], "../" + name, name.upper(), "param/", "meta.npy", "x/E.npy"])
    pairs[place : place + rng.randrange(2)] = rng.choice([
        [], [(new, pairs[place][1])], [(pairs[place][0], content)], [(new, damaged(rng, content))]])
    return pairs

def member(rng, members):
    """The bytes of an array, or of the header that says its dtype and shape."""
    name = rng.choice(list(members))
    content, length = members[name], rng.choice([128, len(members[name])])
    return (members | {name: damaged(rng, content[:length]) + content[length:]}).items()

def description(rng, members):
    """The JSON document: its text, or one place, at any depth, replaced or added."""
    text = np.load(io.BytesIO(members["meta.npy"])).tobytes()
    part = meta = json.loads(text)
    while True:
        key = rng.choice(list(part) if isinstance(part, dict) else range(len(part)))
        if not part[key] or not isinstance(part[key], (dict, list)) or rng.random() < 0.2:
            break
        part = part[key]
    part[key if isinstance(part, list) or rng.random() < 0.9 else "param"] = rng.choice(VALUES)
    np.save(file := io.BytesIO(), np.frombuffer(rng.choice([damaged(rng, text), json.dumps(meta).encode()]), np.uint8))
    return (members | {"meta.npy": file.getvalue()}).items()

def verdict(path: Path, expected: str | None) -> str:
    """"refused", "unchanged", "changed" (if nothing is expected), or what is wrong."""
    tracemalloc.start()
    try:
        found, error = load_checkpoint(path), ""
    except (ValueError, OSError) as refusal:
        found, error = None, str(refusal)
    except Exception as other:
        return f"raised {type(other).__name__}: {other}"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if peak > MOST_MEMORY or "\n" in error:
        return f"took {peak / 1e6:.0f} MB of memory and said {error!r}"
    if error:
        return "refused"
    if expected:
        return "unchanged" if repr(found) == expected else "loaded other contents"
    try:
        params, config, extra = found
        save_checkpoint(path, params, config, **extra)
    except ValueError as refusal:
        return "changed" if "JSON" in str(refusal) else f"loaded what cannot be saved: {refusal}"
    return "changed"

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="files (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other damage")
    args = parser.parse_args(argv)
    config = G.Config(5, 6, 2, d_model=4, rank=3, offsets=((1, 2), (4,)), positions=True)
    params, tried = G.init_params(config, seed=1), Counter()
    extra = {"vocab": [10, 97, 98, 0xD800, 0x1F642], "most_common": 1, "best": [5, 1.25],
             "settings": {"data": None, "offsets": [[1, 2], [4]], "lr": 0.004}}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), np.printoptions(
            threshold=sys.maxsize, floatmode="unique"):  # repr shows every digit
        warnings.simplefilter("ignore")  # of repeated names
        path = Path(folder, "damaged.npz")
        save_checkpoint(path, params, config, **G.adamw_init(params), **extra)
        good, expected = path.read_bytes(), repr(load_checkpoint(path))
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        for k in range(args.count):
            rng = random.Random(f"{args.seed} {k}")
            part = [None, names, member, description][k % 4]
            if part is None:
                path.write_bytes(damaged(rng, good))
            else:
                with zipfile.ZipFile(path, "w") as archive:
                    for name, content in part(rng, members):
                        archive.writestr(name, content)
            result = verdict(path, None if part else expected)
            tried[part.__name__ if part else "file", result] += 1
            if result not in ("refused", "unchanged", "changed"):
                sys.exit(f"file {k}: {result}")
    print(*(f"{what:11} {result:9} {n:4}" for (what, result), n in sorted(tried.items())), sep="\n")
    print(f"{args.count} files, nothing wrong")

if __name__ == "__main__":
    main()
