"""Damage a checkpoint at random, again and again: it loads unchanged or is refused with one line.

    python tests/programs/fuzz_checkpoints.py 1000

A damaged part is packed again with the right CRC. Such a file may load with other contents.
"""

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

import kill_and_resume  # noqa: F401  (before NumPy)
import numpy as np

import grassmann as G
from charlm.checkpoint import load_checkpoint, save_checkpoint

MOST_MEMORY = 10_000_000  # bytes; the checkpoint itself has about 40,000
WORDS = [
    b"",
    b"(",
    b")",
    b"[" * 9999,
    b'{"a":' * 9999,
    b"9" * 5000,
    b"-",
    b"'",
    b'"',
    b"\\d",
    b"#",
    b"\0",
    b"\n",
    b"L",
    b"1if",
    b"1000000000000, ",
    b"True, ",
    b"|O",
    b">f4",
    b"<f2",
    b"NaN",
]
VALUES = [
    None,
    True,
    0,
    1,
    -1,
    3,
    1.5,
    1e308,
    10**9,
    10**30,
    "",
    "x\ny",
    [],
    {},
    [[]],
    [1, 2],
    [[1], [2]],
    [[1, 2], [4], [1]],
    {"a": 1},
    float("nan"),
    float("inf"),
    ["x"],
]


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The content with a bit flipped; or with bytes removed, repeated or replaced; or cut off."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 1, 2, 8, 100, 5000]))
    stretch = content[start:end]
    new = rng.choice(
        [
            bytes([stretch[0] ^ 1 << rng.randrange(8)]) + stretch[1:],
            b"",
            2 * stretch,
            rng.randbytes(len(stretch)),
            bytes(len(stretch)),
            rng.choice(WORDS),
        ]
    )
    return content[:start] + new + content[end : rng.choice([None, None, None, end])]


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
    np.save(
        file := io.BytesIO(),
        np.frombuffer(rng.choice([damaged(rng, text), json.dumps(meta).encode()]), np.uint8),
    )
    return (members | {"meta.npy": file.getvalue()}).items()


def verdict(path: Path, expected: str | None) -> str:
    """ "refused" or "loaded". Raises an error if anything is wrong."""
    tracemalloc.start()
    try:
        params, config, extra = load_checkpoint(path)
    except (G.UserError, OSError) as error:
        assert "\n" not in str(error)
        return "refused"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_MEMORY, f"it took {peak / 1e6:.0f} MB of memory"
    assert expected is None or repr((params, config, extra)) == expected, "it loaded other contents"
    return "loaded"


def main(count: int = 1000) -> None:
    tried = Counter()
    config = G.Config(5, 6, 2, d_model=4, rank=3, offsets=((1, 2), (4,)), positions=True)
    extra = {
        "vocab": [10, 97, 98, 0xD800, 0x1F642],
        "most_common": 1,
        "best": [5, 1.25],
        "settings": {"data": None, "offsets": [[1, 2], [4]], "lr": 0.004},
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        np.printoptions(threshold=sys.maxsize, floatmode="unique"),
    ):  # repr shows every digit
        warnings.simplefilter("ignore")  # of repeated names
        path, params = Path(folder, "damaged.npz"), G.init_params(config, seed=1)
        save_checkpoint(path, params, config, **G.adamw_init(params), **extra)
        good, expected = path.read_bytes(), repr(load_checkpoint(path))
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        for k in range(count):
            rng, part = random.Random(k), [None, member, description][k % 3]
            path.write_bytes(damaged(rng, good))
            if part:
                with zipfile.ZipFile(path, "w") as archive:
                    for pair in part(rng, members):
                        archive.writestr(*pair)
            tried[
                f"{part.__name__ if part else 'file'} {verdict(path, None if part else expected)}"
            ] += 1
    print(f"{count} files, nothing wrong: {dict(sorted(tried.items()))}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
