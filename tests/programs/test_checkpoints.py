"""Checkpoints: what is saved comes back; what is damaged or hostile is refused with one line."""

import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import fuzz_checkpoints
import numpy as np
import pytest
from kill_and_resume import ROOT, contents

import checkpoint
import grassmann as G
from checkpoint import load_checkpoint, save_checkpoint

SIZES = {"vocab_size": 5, "context": 6, "n_layer": 2, "d_model": 4, "rank": 3, "offsets": ((1, 2), (4,))}
EXTRA = {"vocab": [0, 65, 0xD800, 0xDFFF, 0x10FFFF], "most_common": 1, "step": 10**12,
         "best": None, "losses": [0.1, 1e-300], "settings": {"data": "é\0\ud800", "deep": [[True]]}}
PICKLED = b"cbuiltins\nprint\n(S'executed'\ntR."

def model(dtype=np.float32, **changes):
    config = G.Config(**SIZES | changes)
    return G.init_params(config, 1, dtype), config

@pytest.fixture
def path(tmp_path):
    """A good checkpoint of a run that is under way."""
    params, config = model()
    save_checkpoint(tmp_path / "file.npz", params, config, **G.adamw_init(params), **EXTRA)
    return tmp_path / "file.npz"

@pytest.fixture
def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)

@pytest.fixture
def refused(path):
    def refused(arrays=None):
        """The file, or one of these arrays, is refused with one line, without much memory."""
        if arrays:
            np.savez(path, **arrays)
        most = path.stat().st_size * 5 + 10_000_000
        tracemalloc.start()
        with pytest.raises(G.UserError) as error:
            load_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < most
        tracemalloc.stop()
        assert str(error.value).startswith(f"{path} is not a usable checkpoint: ") and "\n" not in str(error.value)
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

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip(tmp_path, dtype):
    """Twice: the second file replaces the first. `place` puts the arrays where they shall lie."""
    params, config = model(dtype, positions=True, dropout=0.25, memory=True)
    params["E"][0] = -0.0, np.finfo(dtype).tiny / 4, np.finfo(dtype).max, -np.finfo(dtype).max
    params["P"], adam = np.asfortranarray(params["P"]), G.adamw_init(params)
    for path in (tmp_path / "a.npz", str(tmp_path / "a.npz")):
        save_checkpoint(path, params, config, **EXTRA, **adam)
    loaded, again, extra = load_checkpoint(path)
    for ours, theirs in ((loaded, params), (extra["adam_m"], adam["adam_m"]), (extra["adam_v"], adam["adam_v"])):
        assert [(n, a.dtype, a.shape, a.tobytes()) for n, a in ours.items()] == [
            (n, a.dtype, a.shape, a.tobytes()) for n, a in theirs.items()]
    assert (again, {key: extra[key] for key in EXTRA}) == (config, EXTRA)
    assert all(a.flags.writeable and a.flags.c_contiguous for a in loaded.values())
    placed, _, extra = load_checkpoint(path, lambda arrays: ("placed", *arrays))
    assert placed == extra["adam_m"] == ("placed", *params) and os.listdir(tmp_path) == ["a.npz"]

@pytest.mark.skipif(sys.platform != "linux", reason="limits and signals as on Linux")
@pytest.mark.parametrize("accident", ["os.fsync = lambda file: os.kill(os.getpid(), 9)",  # written, not yet named
                                      "resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (5000,))"])
def test_an_accident_while_writing_leaves_the_old_file(path, accident):
    """Killed, or on a full disk, without a warning and with no other file; the next save leaves nothing else either."""
    good, ours = path.read_bytes(), Path(checkpoint.__file__).parent  # with tests/mutate.py the broken one
    script = f"""
import os, resource, checkpoint
params, config, extra = checkpoint.load_checkpoint("file.npz")
{accident}
try: checkpoint.save_checkpoint("file.npz", params, config, **extra)
except OSError: print("failed", os.listdir())"""
    process = subprocess.run([sys.executable, "-X", "dev", "-c", script], capture_output=True, text=True,
                             cwd=path.parent, env=os.environ | {"PYTHONPATH": f"{ours}{os.pathsep}{ROOT}"})
    expected = "" if process.returncode == -9 else "failed ['file.npz']\n"
    assert (process.stdout, process.stderr) == (expected, "") and path.read_bytes() == good
    save_checkpoint(path, *model(), step=9)
    assert contents(path)["step"] == 9 and os.listdir(path.parent) == [path.name]

def test_wrong_arrays_are_neither_saved_nor_loaded(refused, not_saved, arrays):
    """By shape, dtype, or values; of the model, or of the optimiser. Nor what JSON would not give back."""
    good = model()[0]
    for array in [good["E"].T.copy(), good["E"][:-1], good["E"][None], good["E"][0, 0],
                  *map(good["E"].astype, ("float16", "float64", "int32", "O", ">f4")),
                  *(np.where(good["E"] == good["E"][2, 3], np.float32(bad), good["E"]) for bad in ("nan", "-inf"))]:
        not_saved(good | {"E": array})
        not_saved(good, adam_v=good | {"E": array})
        refused(arrays | {"param/E": array})
        refused(arrays | {"adam_v/E": array})
    for dtype in ("float16", "int32", ">f8"):  # all of them
        not_saved({name: a.astype(dtype) for name, a in good.items()})
        refused({name: a if name == "meta" else a.astype(dtype) for name, a in arrays.items()})
    for wrong in ({"E": good["E"]}, model(n_layer=1, offsets=((1,),))[0]):
        not_saved(wrong)
        not_saved(good, adam_m=wrong)
    for value in ((1, 2), {1: 2}, [(1,)], float("nan")):
        not_saved(good, key=value)

VOCAB = [5, {}, "abcde", [1, 2, 3], [5, 4, 3, 2, 1], [1, 1, 2, 3, 4], [-1, 1, 2, 3, 4], [1, 2, 3, 4, 0x110000],
         [1.0, 2.0, 3.0, 4.0, 5.0], [1, [2], 3, 4, 5], [False, 1, 2, 3, 4]]
WRONG = {
    "format": [0, 2, "1", None], "config": [None, [], "x"], "extra": [None, "x", 5], "config.stranger": [1],
    "config.context": [4], "config.d_model": [10**9, 0, 5, 4.0, "4", None], "config.n_layer": [10**30, 1, 3, "2"],
    "config.vocab_size": [10**12, 4], "config.rank": [10**9, 10**300], "config.taps": [False],
    "config.offsets": [5, "12", [[1, 2], [99]], [[1, 2, 3], [4]], [[1.0, 2], [4]]], "extra.vocab": VOCAB,
    "config.dropout": [float("nan"), 1], "config.positions": [True], "config.block": ["paper", ["prenorm"]],
    "config.mixer": ["attention", None]}

def test_wrong_descriptions(refused, not_saved, path, with_meta, arrays):
    for vocab in VOCAB:
        not_saved(model()[0], vocab=vocab)
    for wrong in [with_meta(path, place, value) for place in WRONG for value in WRONG[place]]:
        refused(wrong)
    for document in (b"", b"{", b"null", b"[]", b"{}", b"NaN", b"\xff", b"[" * 10**6, b"1" * 10**5, b'{"format": 1}'):
        refused(arrays | {"meta": np.frombuffer(document, np.uint8)})

def test_hostile_headers_of_arrays(path, refused):
    """Numbers of gigabytes that are not there, expressions, brackets without end."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for shape, descr in [
            ("(1000000, 1000000)", "<f4"), ("(50000, 50000)", "|u1"), ("(0, 1000000000000)", "<f4"), ("(-5, -4)", "<f4"),
            ("(" + "1, " * 1000 + "5, 4)", "<f4"), ("f()", "<f4"), ("(5, 4)", "|O"), ("(5, 4)", "x"),
            ("(5, 4", "<f4"), ("(" * 60_000, "<f4"), ("9" * 60_000, "<f4"), ("", "<f4"), ("\xff", "<f4")]:
        new = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}".encode("latin-1")
        for name in ("param/E.npy", "meta.npy"):
            member = members[name][:8] + len(new).to_bytes(2, "little") + new + members[name][128:]
            with zipfile.ZipFile(path, "w") as archive:
                for pair in (members | {name: member}).items():
                    archive.writestr(*pair)
            refused()

@pytest.mark.parametrize("name", ["meta", "adam_v/blocks.1.mix.taps"])
def test_wrong_members_and_files(path, refused, arrays, name, capfd):
    """Pickled, missing, renamed, one too many; compressed, so that no bomb is inflated; cut off, or no archive."""
    array = arrays.pop(name)
    for wrong in ({name: np.array([[print] * 4] * 5)}, {}, {"x" + name: array}, {name: array, "param/Q": array}):
        refused(arrays | wrong)
    np.savez_compressed(path, **arrays, **{name: array})
    refused()
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", PICKLED)
    refused()
    for content in (path.read_bytes()[:-1], b"", b"PK\5\6" + b"\xff" * 18, PICKLED):
        path.write_bytes(content)
        refused()
    assert capfd.readouterr().out == ""

def test_random_damage():
    fuzz_checkpoints.main(60)
