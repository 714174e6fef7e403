"""Damage a checkpoint at random, again and again: it must load unchanged or be refused with one line.

  python tests/fuzz_checkpoints.py --count 1000

Prints a table of what was done and how it ended. Exits with 1 if a file raised anything but ValueError or OSError,
printed a warning, took absurd memory, or loaded with other contents.
"""

import argparse
import functools
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cpu  # noqa: F401, E402, I001  (before NumPy)

import numpy as np  # noqa: E402

from grassmann import Config, _digest, adamw_init, init_params, load_checkpoint, save_checkpoint  # noqa: E402

MOST_MEMORY = 10_000_000  # bytes; the checkpoint itself has about 40,000

# ---- a checkpoint, its members, and back --------------------------------------------------------------


@functools.cache
def good_checkpoint() -> bytes:
    """A small checkpoint of a training run that is under way."""
    config = Config(vocab_size=5, context=6, n_layer=2, d_model=4, rank=3, offsets=((1, 2), (4,)), positions=True)
    params = init_params(config, seed=1)
    state = adamw_init(params)
    for k, mean in enumerate(state["adam_m"].values()):
        mean += k
    settings = {"data": None, "context": 6, "offsets": [[1, 2], [4]], "min_lr": None, "lr": 0.004, "iters": 9}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "good.npz")
        save_checkpoint(
            path, params, config, **state, vocab=[10, 97, 98, 0xD800, 0x1F642], most_common=1, step=7, best=[5, 1.25],
            settings=settings, text_sha256="0" * 64, seconds=1.5, recent=[1.5, 1.25],
        )  # fmt: skip
        return path.read_bytes()


def unpack(checkpoint: bytes) -> dict[str, bytes]:
    """Name -> .npy file."""
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(members, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The inverse, from a dict or from pairs (which may repeat a name)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of repeated names
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, content)
    return file.getvalue()


def to_npy(array, **how) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


def from_npy(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


def meta_of(members: dict[str, bytes]) -> dict:
    return json.loads(from_npy(members["meta.npy"]).tobytes())


def with_meta(members: dict[str, bytes], meta) -> dict[str, bytes]:
    """The members with another JSON document: any value, or bytes as they are."""
    document = meta if isinstance(meta, bytes) else json.dumps(meta).encode()
    return members | {"meta.npy": to_npy(np.frombuffer(document, np.uint8))}


def seal(members: dict[str, bytes]) -> dict[str, bytes]:
    """The members with the checksum that belongs to them, as from an author who means harm."""
    meta = meta_of(members)
    if not isinstance(meta, dict):
        return members
    meta.pop("sha256", None)
    arrays = {name[:-4]: from_npy(content) for name, content in members.items() if name != "meta.npy"}
    meta["sha256"] = _digest({name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}, meta)
    return with_meta(members, meta)


# ---- damage: functions of a random generator and the good file ----------------------------------------


def stretch(rng, content: bytes) -> tuple[int, int]:
    start = rng.randrange(len(content))
    return start, min(len(content), start + rng.choice([1, 2, 8, 100, 5000]))


def truncate(rng, good):
    return good[: rng.randrange(len(good))]


def flip_bits(rng, good):
    content = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def flip_bits_of_the_directory(rng, good):
    """The list of members at the end of a zip file: names, sizes, places, checksums."""
    start = good.index(b"PK\1\2")
    return good[:start] + flip_bits(rng, good[start:])


def overwrite(rng, good):
    start, end = stretch(rng, good)
    return good[:start] + (rng.randbytes(end - start) if rng.random() < 0.5 else bytes(end - start)) + good[end:]


def cut_out(rng, good):
    start, end = stretch(rng, good)
    return good[:start] + good[end:]


def insert(rng, good):
    start, end = stretch(rng, good)
    return good[:start] + rng.choice([rng.randbytes(end - start), good[start:end]]) + good[start:]


def append(rng, good):
    return good + rng.randbytes(rng.choice([1, 10, 1000]))


def remove_member(rng, good):
    members = unpack(good)
    del members[rng.choice(list(members))]
    return pack(members)


def rename_member(rng, good):
    members = unpack(good)
    old = rng.choice(list(members))
    new = rng.choice([old[:-4], old + ".npy", "../" + old, old.upper(), "x", "param/", "meta.npy", "/" + old])
    return pack([(new if name == old else name, content) for name, content in members.items()])


def repeat_member(rng, good):
    members = list(unpack(good).items())
    name, content = rng.choice(members)
    members.insert(rng.randrange(len(members)), (name, flip_bits(rng, content)))
    return pack(members)


def add_member(rng, good):
    name = rng.choice(["param/Q.npy", "readme.txt", "adam_w/E.npy", "settings/E.npy", "param/E", "a/b/c.npy", "meta"])
    return pack(unpack(good) | {name: to_npy(np.zeros((5, 4), np.float32))})


def swap_members(rng, good):
    members = unpack(good)
    one, other = rng.sample(list(members), 2)
    if members[one] == members[other]:
        return good
    members[one], members[other] = members[other], members[one]
    return pack(members)


def shuffle_and_compress(rng, good):
    """Not damage: this one should load."""
    members = list(unpack(good).items())
    rng.shuffle(members)
    return pack(members, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))


def other_compression(rng, good):
    return pack(unpack(good), rng.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))


def change_array(rng, good):
    """Another shape, dtype or byte order, or values that are not finite; with its own checksum or without."""
    members = unpack(good)
    name = rng.choice([name for name in members if name != "meta.npy"])
    a = from_npy(members[name])
    bad = a.copy()
    bad.flat[rng.randrange(a.size)] = rng.choice([np.nan, np.inf, -np.inf])
    wrong = [
        bad, a.reshape(-1, 1), a[None], a.ravel()[:-1], a.ravel()[:0], a.T if a.ndim > 1 else a[:, None], a.flat[0],
        a.astype(np.float16), a.astype(np.float64), a.astype(np.int32), a.astype(np.complex64), a.astype(bool),
        a.astype("S4"), a.astype("U4"), a.astype(">f4"), a.view([("x", "<f4")]), a.view(np.uint8), a.view("V4"),
        np.zeros(a.shape, "M8[s]"), np.tile(a, 2),
    ]  # fmt: skip
    members[name] = to_npy(rng.choice(wrong))
    return pack(members if rng.random() < 0.3 else seal(members))


def fortran_order(rng, good):
    members = unpack(good)
    name = rng.choice([name for name in members if name != "meta.npy" and from_npy(members[name]).ndim > 1])
    members[name] = to_npy(np.asfortranarray(from_npy(members[name])))
    return pack(members)


def pickled_member(rng, good):
    members = unpack(good)
    hello = b"cbuiltins\nprint\n(S'executed'\ntR."  # a pickle that prints when it is loaded
    name = rng.choice(list(members))
    members[name] = rng.choice([to_npy(np.array([print, 1, None], object), allow_pickle=True), hello, b""])
    return pack(members)


def change_header(rng, good):
    """The header of an .npy file: a dict that is written out like in Python."""
    members = unpack(good)
    name = rng.choice(list(members))
    content = members[name]
    length = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + length], content[10 + length :]
    at = rng.randrange(header.index(b"}") + 1)
    header = rng.choice([
        header[:at] + bytes([rng.randrange(256)]) + header[at + 1 :],
        header[:at] + rng.choice([b"(", b")", b"L", b"-", b"'", b"\\d", b"[" * 99, b"1if", b"#", b"\0"]) + header[at:],
        header[:at],
        header.replace(b"(", b"(1000000000000, "), header.replace(b"(", b"(-1, "), header.replace(b"(", b"(True, "),
        header.replace(b"'shape': (", b"'shape': (" + b"1, " * 100), header.replace(b"<f4", b"|O"),
        header.replace(b"descr", b"d" * 9000), b"(" * 5000, b"9" * 5000, b"{1: 2}", b"{[]: 1}", b"[]", b"", b"\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (5L, 4L), }\n", b"{'descr': '<f4', 'shape': ", b"print(1)",
    ])  # fmt: skip
    magic = content[:8] if rng.random() < 0.8 else b"\x93NUMPY" + bytes([rng.randrange(5), rng.randrange(3)])
    length = len(header) if rng.random() < 0.8 else rng.randrange(65536)
    members[name] = magic + length.to_bytes(2, "little") + header + data[: rng.choice([None, -1, 0])]
    return pack(members, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))


HOSTILE = [
    None, True, False, 0, 1, -1, 1.5, 1e308, 10**9, 10**30, -(10**30), "", "x", "\n", "x\ny", "é" * 1000, [], {}, [[]],
    [1], [1, 2], [[1], [2]], [[1, 2], [4], [1]], {"a": 1}, float("nan"), float("inf"), ["x"], [None], [1.5, 2.5], 2, 3,
]  # fmt: skip


def replace_somewhere(rng, value, new):
    """A copy of a JSON value in which one place, at any depth, has been replaced, removed or added."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return new
    copy = value.copy()
    place = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    if rng.random() < 0.1:
        del copy[place]
    elif rng.random() < 0.05 and isinstance(copy, dict):
        copy[rng.choice(["param", "sha256", "x"])] = new
    else:
        copy[place] = replace_somewhere(rng, copy[place], new)
    return copy


def change_meta(rng, good):
    members = unpack(good)
    return pack(with_meta(members, replace_somewhere(rng, meta_of(members), rng.choice(HOSTILE))))


def change_meta_and_seal(rng, good):
    """With a correct checksum the change is the author's will: only the arrays must be the same."""
    members = unpack(good)
    return pack(seal(with_meta(members, replace_somewhere(rng, meta_of(members), rng.choice(HOSTILE)))))


def not_json(rng, good):
    document = rng.choice([
        b"", b"{", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b"\xff\xfe", b"\0" * 100, b"null", b'"x"',
        b"[" + b"0," * 100_000 + b"0]", b"NaN", rng.randbytes(100), from_npy(unpack(good)["meta.npy"]).tobytes()[:-2],
    ])  # fmt: skip
    return pack(with_meta(unpack(good), document))


def not_a_zip(rng, good):
    return rng.choice([
        b"", b"PK", b"PK\3\4", b"PK\5\6" + bytes(18), b"PK\5\6" + b"\xff" * 18, rng.randbytes(5000), bytes(9999),
        b"\x80\x04]\x94.", to_npy(np.zeros(5)), b"just text\n" * 99,
    ])  # fmt: skip


KINDS = [
    truncate, flip_bits, flip_bits_of_the_directory, overwrite, cut_out, insert, append, remove_member, rename_member,
    repeat_member, add_member, swap_members, shuffle_and_compress, other_compression, change_array, fortran_order,
    pickled_member, change_header, change_meta, change_meta_and_seal, not_json, not_a_zip,
]  # fmt: skip


# ---- the judge ----------------------------------------------------------------------------------------


def everything(path) -> tuple[dict, object]:
    """The arrays of a checkpoint as bytes, and the rest."""
    params, config, extra = load_checkpoint(path)
    groups = {"param": params} | {key: extra.pop(key) for key in ("adam_m", "adam_v") if key in extra}
    arrays = {}
    for key, group in groups.items():
        arrays |= {(key, name): (a.dtype.str, a.shape, a.tobytes()) for name, a in group.items()}
    return arrays, (config, extra)


def verdict(path: Path, expected: tuple, sealed: bool = False) -> str:
    """ "refused", "unchanged", or what is wrong. A sealed file may have other contents, but not other arrays."""
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning is more than one line
            arrays, rest = everything(path)
        reason = None
    except (ValueError, OSError) as error:
        reason = str(error)
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if peak > MOST_MEMORY:
        return f"took {peak / 1e6:.0f} MB of memory"
    if reason is not None:
        return "refused" if len(reason.splitlines()) == 1 else f"was not refused with one line: {reason!r}"
    if arrays != expected[0]:
        return "loaded other arrays"
    if rest != expected[1] and not sealed:
        return "loaded other contents"
    try:
        "".join(map(chr, rest[1].get("vocab") or []))
    except (TypeError, ValueError) as error:
        return f"loaded a vocabulary that is none: {error}"
    return "unchanged"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="files (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other damage (default: 0)")
    args = parser.parse_args(argv)
    tried, wrong = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "damaged.npz")
        path.write_bytes(good_checkpoint())
        expected = everything(path)
        for k in range(args.count):
            damage = KINDS[k % len(KINDS)]
            path.write_bytes(damage(random.Random(f"{args.seed} {k}"), good_checkpoint()))
            result = verdict(path, expected, sealed=damage is change_meta_and_seal)
            tried[damage, result] += 1
            if result not in ("refused", "unchanged"):
                wrong.append(f"file {k}, {damage.__name__}: {result}")
    print(f"{'':27} tried  refused  loaded unchanged")
    for damage in KINDS[: args.count]:
        counts = [tried[damage, "refused"], tried[damage, "unchanged"]]
        total = sum(count for (kind, _), count in tried.items() if kind is damage)
        print(f"{damage.__name__.replace('_', ' '):27} {total:5}  {counts[0]:7}  {counts[1]:16}")
    print("\n".join(wrong) or f"{args.count} files, nothing wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
