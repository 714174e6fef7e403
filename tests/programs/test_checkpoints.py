"""Checkpoints: what is saved comes back; a damaged or hostile file is refused with one line."""

import os
import subprocess
import sys
import zipfile

import fuzz_checkpoints
import numpy as np
import pytest
from kill_and_resume import contents

import grassmann as G
from charlm.checkpoint import load_checkpoint, save_checkpoint

SIZES = {
    "vocab_size": 5,
    "context": 6,
    "n_layer": 2,
    "d_model": 4,
    "rank": 3,
    "offsets": ((1, 2), (4,)),
}
EXTRA = {
    "vocab": [0, 65, 0xD800, 0xDFFF, 0x10FFFF],
    "most_common": 1,
    "step": 10**12,
    "best": None,
    "losses": [0.1, 1e-300],
    "settings": {"data": "é\0\ud800", "deep": [[True]]},
}
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
        """The file, or a file with these arrays, is refused with one line, without much memory."""
        if arrays:
            np.savez(path, **arrays)
        assert fuzz_checkpoints.verdict(path, None) == "refused"

    return refused


@pytest.fixture
def not_saved(path):
    def not_saved(arrays, **extra):
        """save_checkpoint refuses these arrays, and the good file stays."""
        good = path.read_bytes()
        with pytest.raises(ValueError):
            save_checkpoint(path, arrays, model()[1], **extra)
        assert path.read_bytes() == good and os.listdir(path.parent) == [path.name]

    return not_saved


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip(tmp_path, dtype):
    """Twice: the second file replaces the first. `place` makes the dicts of arrays."""
    params, config = model(dtype, positions=True, dropout=0.25, memory=True)
    params["E"][0] = -0.0, np.finfo(dtype).tiny / 4, np.finfo(dtype).max, -np.finfo(dtype).max
    params["P"], adam = np.asfortranarray(params["P"]), G.adamw_init(params)
    for path in (tmp_path / "a.npz", str(tmp_path / "a.npz")):
        save_checkpoint(path, params, config, **EXTRA, **adam)
    loaded, again, extra = load_checkpoint(path)
    for ours, theirs in (
        (loaded, params),
        (extra["adam_m"], adam["adam_m"]),
        (extra["adam_v"], adam["adam_v"]),
    ):
        assert [(n, a.dtype, a.shape, a.tobytes()) for n, a in ours.items()] == [
            (n, a.dtype, a.shape, a.tobytes()) for n, a in theirs.items()
        ]
    assert (again, {key: extra[key] for key in EXTRA}) == (config, EXTRA)
    assert all(a.flags.writeable and a.flags.c_contiguous for a in loaded.values())
    placed, _, extra = load_checkpoint(path, lambda arrays: ("placed", *arrays))
    assert placed == extra["adam_m"] == ("placed", *params) and os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits and signals as on Linux")
@pytest.mark.parametrize(
    "accident",
    [
        "os.fsync = lambda file: os.kill(os.getpid(), 9)",  # written, not yet named
        "resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (5000,))",
    ],
)
def test_an_accident_while_writing_leaves_the_old_file(path, accident):
    """If it is killed, or if the disk is full. The next save works and leaves no other file."""
    folder = os.path.dirname(load_checkpoint.__code__.co_filename)
    good, script = (
        path.read_bytes(),
        f"""
import os, resource, checkpoint
params, config, extra = checkpoint.load_checkpoint("file.npz")
{accident}
try: checkpoint.save_checkpoint("file.npz", params, config, **extra)
except OSError: print("failed", os.listdir())""",
    )
    process = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script],
        capture_output=True,
        text=True,
        cwd=path.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([folder, *sys.path])},
    )
    expected = "" if process.returncode == -9 else "failed ['file.npz']\n"
    assert (process.stdout, process.stderr) == (expected, "") and path.read_bytes() == good
    save_checkpoint(path, *model(), step=9)
    assert contents(path)["step"] == 9 and os.listdir(path.parent) == [path.name]


def test_wrong_arrays_are_neither_saved_nor_loaded(refused, not_saved, arrays):
    """Wrong shapes, dtypes or values, of model or optimiser; and values that JSON would change."""
    good = model()[0]
    for array in [
        good["E"].T.copy(),
        good["E"][:-1],
        *map(good["E"].astype, ("float64", "int32", "O", ">f4")),
        *(
            np.where(good["E"] == good["E"][2, 3], np.float32(bad), good["E"])
            for bad in ("nan", "-inf")
        ),
    ]:
        not_saved(good | {"E": array})
        not_saved(good, adam_v=good | {"E": array})
        refused(arrays | {"param/E": array})
        refused(arrays | {"adam_v/E": array})
    for dtype in ("float16", ">f8"):  # all of them
        not_saved({name: a.astype(dtype) for name, a in good.items()})
        refused({name: a if name == "meta" else a.astype(dtype) for name, a in arrays.items()})
    for wrong in ({"E": good["E"]}, model(n_layer=1, offsets=((1,),))[0]):
        not_saved(wrong)
        not_saved(good, adam_m=wrong)
    for value in ((1, 2), {1: 2}, float("nan")):
        not_saved(good, key=value)


VOCAB = [
    "abcde",
    [1, 2, 3],
    [5, 4, 3, 2, 1],
    [-1, 1, 2, 3, 4],
    [1, 2, 3, 4, 0x110000],
    [False, 1, 2, 3, 4.0],
]
WRONG = {
    "format": [0, 2, "1", None],
    "extra": [None, 5],
    "extra.vocab": VOCAB,
    "config": [None, "x"],
    "config.stranger": [1],
    "config.n_layer": [10**30, 1, 3],
    "config.d_model": [10**9, 5],
    "config.taps": [False],
}


def test_wrong_descriptions(refused, not_saved, path, with_meta, arrays):
    for vocab in VOCAB:
        not_saved(model()[0], vocab=vocab)
    for wrong in [with_meta(path, place, value) for place in WRONG for value in WRONG[place]]:
        refused(wrong)
    for document in (b"", b"null", b"{}", b"\xff", b"[" * 10**6, b"1" * 10**5):
        refused(arrays | {"meta": np.frombuffer(document, np.uint8)})


def test_wrong_members(path, refused, arrays, capfd):
    """Missing, extra or compressed arrays (bombs); pickles; headers that promise gigabytes."""
    whole, taps = dict(arrays), arrays.pop(name := "adam_v/blocks.1.mix.taps")
    for wrong in (arrays, whole | {"param/Q": taps}, whole | {name: np.array([[print] * 4] * 5)}):
        refused(wrong)
    np.savez_compressed(path, **whole)
    refused()
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': %b}"
    headers = header % b"(20000, 20000)", header % (b"(" * 60_000)
    for content in (
        PICKLED,
        *(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header for header in headers),
    ):
        np.savez(path, **arrays)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{name}.npy", content)
        refused()
    assert capfd.readouterr().out == ""


def test_random_damage():
    fuzz_checkpoints.main(60)
