"""Checkpoints: what is saved comes back; what is damaged or hostile is refused with one line."""

import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

import cli
import grassmann as G
from checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocab_size": 5, "context": 6, "n_layer": 2, "d_model": 4, "rank": 3, "n_head": 2,
         "offsets": ((1, 2), (4,))}
EXTRA = {"vocab": [0, 65, 0xD800, 0xDFFF, 0x10FFFF], "most_common": 1, "step": 10**12,
         "best": None, "losses": [0.1, 1e-300], "settings": {"data": "é\0\ud800", "deep": [[True]]}}
PICKLED = b"cbuiltins\nprint\n(S'executed'\ntR."

def model(dtype=np.float32, **changes):
    config = G.Config(**SIZES | changes)
    return G.init_params(config, 1, dtype), config

def as_bytes(params, config, extra):
    """All that a checkpoint holds, to compare it bit for bit."""
    groups = {"param": params} | {key: extra[key] for key in ("adam_m", "adam_v")}
    bits = {key: [(name, a.dtype, a.shape, a.tobytes()) for name, a in group.items()]
            for key, group in groups.items()}
    return config, extra | bits

def everything(path):
    return as_bytes(*load_checkpoint(path))

@pytest.fixture
def path(tmp_path):
    """A good checkpoint of a run that is under way."""
    params, config = model()
    save_checkpoint(tmp_path / "file.npz", params, config, **G.adamw_init(params), **EXTRA)
    return tmp_path / "file.npz"

@pytest.fixture
def arrays(path):
    """What is in it, as NumPy reads it."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)

def with_meta(arrays, places: dict | bytes) -> dict:
    """The arrays with another description, or values in it, at places such as "config.rank"."""
    meta = json.loads(arrays["meta"].tobytes())
    for place, value in places.items() if isinstance(places, dict) else ():
        group, _, key = place.partition(".")
        meta[group] = meta[group] | {key: value} if key else value
    document = places if isinstance(places, bytes) else json.dumps(meta).encode()
    return arrays | {"meta": np.frombuffer(document, np.uint8)}

@pytest.fixture
def refused(path):
    def refused(arrays=None):
        """The file, or one of these arrays, is refused with one line, without much memory."""
        if arrays:
            np.savez(path, **arrays)
        tracemalloc.start()
        with pytest.raises(ValueError) as error:
            load_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()
        assert str(error.value).startswith(f"{path} is not a usable checkpoint: ")
        assert len(str(error.value).splitlines()) == 1
    return refused

@pytest.fixture
def not_saved(path):
    def not_saved(arrays, **extra):
        """save_checkpoint refuses that, and the good file stays."""
        good = path.read_bytes()
        with pytest.raises(ValueError):
            save_checkpoint(path, arrays, model()[1], **extra)
        assert path.read_bytes() == good and os.listdir(path.parent) == [path.name]
    return not_saved

# ---- what is saved comes back --------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip(tmp_path, variant, dtype):
    """Twice: the second file replaces the first. `place` puts the arrays where they shall lie."""
    params, config = model(dtype, **variant, positions=True, dropout=0.25)
    params["E"][0] = -0.0, np.finfo(dtype).tiny / 4, np.finfo(dtype).max, -np.finfo(dtype).max
    params["P"], adam = np.asfortranarray(params["P"]), G.adamw_init(params)
    for path in (tmp_path / "a.npz", str(tmp_path / "a.npz")):
        save_checkpoint(path, params, config, **EXTRA, **adam)
    assert everything(path) == as_bytes(params, config, EXTRA | adam)
    arrays = load_checkpoint(path)[0].values()
    assert all(a.flags.writeable and a.flags.c_contiguous for a in arrays)
    placed, _, extra = load_checkpoint(path, lambda arrays: ("placed", *arrays))
    assert placed == extra["adam_m"] == ("placed", *params) and os.listdir(tmp_path) == ["a.npz"]

def test_files_of_earlier_versions_load(path, arrays):
    """They had a checksum in `meta`, and another order. What is appended does no harm."""
    before = everything(path)
    np.savez(path, **dict(reversed(with_meta(arrays, {"sha256": "0" * 64}).items())))
    path.write_bytes(path.read_bytes() + b"appended")
    assert everything(path) == before

@pytest.mark.skipif(sys.platform != "linux", reason="limits and signals as on Linux")
@pytest.mark.parametrize("accident", [
    "os.fsync = lambda file: os.kill(os.getpid(), 9)",  # written, not yet named
    "os.replace = lambda *names: open('none/none')",
    *(f"resource.setrlimit(resource.RLIMIT_FSIZE, 2 * ({size},))" for size in (0, 5000, 20000)),
])
def test_an_accident_while_writing_leaves_the_old_file(path, accident):
    """Killed, or on a full disk, without a warning; the next save works and leaves nothing else."""
    good, script = path.read_bytes(), f"""
import os, resource, checkpoint
params, config, extra = checkpoint.load_checkpoint("file.npz")
{accident}
try: checkpoint.save_checkpoint("file.npz", params, config, **extra)
except OSError: print("failed", os.listdir())"""
    process = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script], capture_output=True, text=True,
        cwd=path.parent, env=os.environ | {"PYTHONPATH": str(ROOT)})
    expected = "" if process.returncode == -9 else "failed ['file.npz']\n"
    assert (process.stdout, process.stderr) == (expected, "")
    assert path.read_bytes() == good
    save_checkpoint(path, *model(), step=9)
    assert load_checkpoint(path)[2] == {"step": 9} and os.listdir(path.parent) == [path.name]

# ---- damage, and authors who mean harm -----------------------------------------------------------

def test_a_damaged_byte_anywhere(path, refused):
    """Loaded as it was (a date, a flag without meaning) or refused; cut off anywhere, refused."""
    good, before = path.read_bytes(), everything(path)
    for place in range(0, len(good), 197):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        try:
            assert everything(path) == before, place
        except (ValueError, OSError) as error:
            assert len(str(error).splitlines()) == 1
        path.write_bytes(good[:place])
        refused()

ARRAYS = {
    "transposed": lambda a: a.T.copy(), "one row less": lambda a: a[:-1], "flat": np.ravel,
    "one axis more": lambda a: a[None], "empty": lambda a: a[:0], "scalar": lambda a: a[0, 0],
    "large": lambda a: np.zeros((5, 10**7), np.float32),
    **{dtype: lambda a, dtype=dtype: a.astype(dtype)
       for dtype in ("float16", "float64", "int32", "complex64", "U8", "O", ">f4")},
    **{value: lambda a, value=value: np.where(a == a[2, 3], np.float32(value), a)
       for value in ("nan", "inf", "-inf")},
}

@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("group", ["param", "adam_v"])
def test_a_wrong_array_is_neither_saved_nor_loaded(refused, not_saved, arrays, kind, group):
    params, wrong = model()[0], ARRAYS[kind](model()[0]["E"])
    not_saved(**{"arrays": params, group.replace("param", "arrays"): params | {"E": wrong}})
    refused(arrays | {f"{group}/E": wrong})

@pytest.mark.parametrize("dtype", ["float16", "int32", ">f4", ">f8"])
def test_all_arrays_of_a_wrong_dtype(refused, not_saved, arrays, dtype):
    not_saved({name: a.astype(dtype) for name, a in model()[0].items()})
    refused({name: a if name == "meta" else a.astype(dtype) for name, a in arrays.items()})

@pytest.mark.parametrize("vocab", [
    5, {}, "abcde", [], [1, 2, 3], [5, 4, 3, 2, 1], [1, 1, 2, 3, 4], [-1, 1, 2, 3, 4], [[1]] * 5,
    [1, 2, 3, 4, 0x110000], [1, 2, 3, 4, 10**30], [*"abcde"], [1.0, 2.0, 3.0, 4.0, 5.0],
    [1, 2, 3, 4, None], [1, [2], 3, 4, 5], [False, 1, 2, 3, 4], ["x" * 10**5, *[""] * 10**4],
], ids=lambda vocab: str(vocab)[:20])
def test_a_wrong_vocabulary_is_neither_saved_nor_loaded(refused, not_saved, arrays, vocab):
    not_saved(model()[0], vocab=vocab)
    refused(with_meta(arrays, {"extra.vocab": vocab}))

def test_what_load_would_not_give_back_is_not_saved(not_saved):
    params, _ = model()
    for wrong in ({"E": params["E"]}, model(n_layer=1, offsets=((1,),))[0]):
        not_saved(wrong)
        not_saved(params, adam_m=wrong)
    not_saved({})
    for value in ((1, 2), {1: 2}, [(1,)], float("nan"), "x" * (1 << 25)):
        not_saved(params, key=value)
    for key in ("a/b", "param"):
        not_saved(params, **{key: 5})

WRONG = {
    "format": [0, 2, "1", None], "config": [None, [], {}, "x"], "extra": [None, "x", 5],
    "extra.param": [5], "extra.a/b": [5], "config.stranger": [1], "config.context": [4],
    "config.d_model": [10**9, 0, 5, 4.0, "4", None], "config.n_layer": [10**30, 1, 3, "2"],
    "config.vocab_size": [10**12, 4], "config.rank": [10**9, 10**300], "config.taps": [False],
    "config.offsets": [5, None, "12", [[1, 2], [99]], [[1, 2, 3], [4]], [[1.0, 2], [4]]],
    "config.dropout": [float("nan"), 1], "config.positions": [True],
    "config.block": ["paper", ["prenorm"]], "config.mixer": ["attention", None],
}

@pytest.mark.parametrize("places", [
    *({place: value} for place in WRONG for value in WRONG[place]),
    *({"config.mixer": "attention", "config.offsets": offsets, "config.n_layer": n_layer}
      for offsets in ([], None) for n_layer in (10**9, 10**30)),  # many layers of nothing
    b"", b"{", b"null", b"[]", b"{}", b'"x"', b"NaN", b"\xff", b"[" * 10**6, b'{"a":' * 10**5,
    b"1" * 10**5, b'{"format": 1e999}', b'{"format": 1}', b" " * (1 << 26),
], ids=lambda places: str(places)[:40])
def test_wrong_descriptions(refused, arrays, places):
    refused(with_meta(arrays, places))

@pytest.mark.parametrize(("shape", "descr"), [
    ("(1000000, 1000000)", "<f4"), ("(50000, 50000)", "<f4"), ("(0, 1000000000000)", "<f4"),
    ("(-5, -4)", "<f4"), ("(5L, 4L)", "<f4"), ("(" + "1, " * 1000 + "5, 4)", "<f4"), ("f()", "<f4"),
    ("(5, 4)", "|O"), ("(5, 4)", "\\d"), ("(5, 4", "<f4"), ("(" * 60_000, "<f4"),
    ("9" * 60_000, "<f4"), ("", "<f4"), ("(5, 4)" + " " * 65_000, "<f4"), ("\xff", "<f4"),
], ids=lambda text: text[:20])
@pytest.mark.parametrize("name", ["param/E.npy", "meta.npy"])
def test_hostile_array_headers(path, refused, name, shape, descr):
    new = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}".encode("latin-1")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    length = len(new).to_bytes(2, "little")
    members[name] = members[name][:8] + length + new + members[name][128:]
    with zipfile.ZipFile(path, "w") as archive:
        for member in members.items():
            archive.writestr(*member)
    refused()

@pytest.mark.parametrize("name", ["meta", "param/E", "adam_v/blocks.1.mix.taps"])
def test_wrong_members(path, refused, arrays, name, capfd):
    """Pickled, missing, renamed, one too many; compressed, so that no bomb is inflated."""
    array = arrays.pop(name)
    for wrong in ({name: np.array([[print] * 4] * 5)}, {}, {"x" + name: array},
                  {name: array, "param/Q": array}, {name: array, "stranger": array}):
        refused(arrays | wrong)
    np.savez_compressed(path, **arrays, **{name: array})
    refused()
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", PICKLED)
    refused()
    assert capfd.readouterr().out == ""

@pytest.mark.parametrize("content", [b"", b"PK\5\6" + bytes(18), b"PK\5\6" + b"\xff" * 18, PICKLED])
def test_files_that_are_none(path, refused, content, capfd):
    path.write_bytes(content)
    refused()
    for missing in (path / "inside", path.parent):
        with pytest.raises(OSError):
            load_checkpoint(missing)
    assert capfd.readouterr().out == ""

@pytest.mark.parametrize("places", [
    {"extra.vocab": None}, {"extra.most_common": 5}, {"extra.most_common": []}, {"extra": {}}])
def test_programs_refuse_what_train_char_did_not_write(path, arrays, places):
    np.savez(path, **with_meta(arrays, places))
    with pytest.raises(ValueError, match=r"was not written by train_char\.py"):
        cli.load_trained(G, path)

def test_random_damage():
    command = [sys.executable, ROOT / "tests/programs/fuzz_checkpoints.py", "--count", "120"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert "120 files, nothing wrong" in process.stdout, process.stdout + process.stderr
