"""Checkpoints: what is saved comes back, and a file that is damaged or hostile is refused with one line."""

import os
import random
import subprocess
import sys
import tracemalloc
import zipfile
import zlib

import fuzz_checkpoints
import numpy as np
import pytest
from fuzz_checkpoints import (
    KINDS,
    everything,
    flip_bits,
    from_npy,
    good_checkpoint,
    meta_of,
    pack,
    seal,
    to_npy,
    unpack,
    verdict,
    with_meta,
)
from kill_and_resume import ROOT
from test_cli import program, refused

from grassmann import Config, adamw_init, init_params, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The contents of the good checkpoint."""
    path = tmp_path_factory.mktemp("good") / "good.npz"
    path.write_bytes(good_checkpoint())
    return everything(path)


@pytest.fixture
def judge(tmp_path, expected):
    """judge(content) -> "refused", "unchanged" or what is wrong with loading a file of this content."""

    def judge(content, **how):
        (tmp_path / "file.npz").write_bytes(content)
        return verdict(tmp_path / "file.npz", expected, **how)

    return judge


# ---- what is saved comes back -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", [
    {}, {"positions": True, "normalize": True}, {"block": "paper", "taps": False}, {"mixer": "attention", "n_head": 2},
    {"d_ff": 5, "dropout": 0.25},
])  # fmt: skip
def test_round_trip(tmp_path, variant, dtype):
    config = Config(vocab_size=5, context=6, n_layer=2, d_model=4, rank=3, offsets=((1, 2), (4,)), **variant)
    params = init_params(config, seed=3, dtype=dtype)
    extra = {"vocab": [0, 10, 0xD800, 0xDFFF, 0x10FFFF], "step": 10**12, "best": None, "x": {"y": [1.1, "é\0\ud800"]}}
    save_checkpoint(tmp_path / "file.npz", params, config, **extra, **adamw_init(params))
    loaded, loaded_config, loaded_extra = load_checkpoint(str(tmp_path / "file.npz"))
    assert loaded_config == config and list(loaded) == list(params)
    for name, value in params.items():
        assert loaded[name].dtype == dtype and loaded[name].shape == value.shape
        assert loaded[name].tobytes() == value.tobytes()
        assert loaded[name].flags.writeable and loaded[name].flags.c_contiguous
    state = {key: loaded_extra.pop(key) for key in ("adam_m", "adam_v")}
    assert all(not value.any() for group in state.values() for value in group.values())
    assert loaded_extra == extra
    assert [file.name for file in tmp_path.iterdir()] == ["file.npz"]


def test_special_values_survive(tmp_path):
    """Negative zero, the smallest and the largest numbers; arrays that are views."""
    config = Config(vocab_size=2, context=2, n_layer=1, d_model=3, rank=2, offsets=((1,),))
    params = init_params(config)
    largest = np.finfo(np.float32)
    params["E"] = np.array([[-0.0, 1e-45, largest.tiny], [largest.max, largest.min, largest.eps]], np.float32)
    params["blocks.0.ffn.W_1"] = np.asfortranarray(params["blocks.0.ffn.W_1"])
    save_checkpoint(tmp_path / "file.npz", params, config)
    loaded = load_checkpoint(tmp_path / "file.npz")[0]
    for name, value in params.items():
        assert loaded[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_never_saved(tmp_path, value):
    path = tmp_path / "file.npz"
    path.write_bytes(good_checkpoint())
    params, config, extra = load_checkpoint(path)
    extra["adam_v"]["E"][0, 0] = value
    with pytest.raises(ValueError, match="adam_v/E has values that are not finite"):
        save_checkpoint(path, params, config, **extra)
    assert path.read_bytes() == good_checkpoint()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / "file.npz"
    path.write_bytes(good_checkpoint())
    params, config, extra = load_checkpoint(path)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, params, config, **extra | {"step": 8})
    assert path.read_bytes() == good_checkpoint()
    assert [file.name for file in tmp_path.iterdir()] == ["file.npz"]


# ---- damage -------------------------------------------------------------------------------------------


def test_the_good_file_is_good(judge):
    assert judge(good_checkpoint()) == "unchanged"
    assert judge(pack(unpack(good_checkpoint()))) == judge(pack(seal(unpack(good_checkpoint())))) == "unchanged"


def test_truncated_anywhere(judge):
    good = good_checkpoint()
    members = [place for place in range(len(good)) if good[place : place + 2] == b"PK"]
    for length in {*range(0, len(good), 997), *members, *(place + 30 for place in members), len(good) - 1}:
        if length < len(good):
            assert judge(good[:length]) == "refused", length


def test_a_flipped_bit_in_an_array(judge):
    """One bit of one number, with the right CRC: our own checksum must find it."""
    members = unpack(good_checkpoint())
    for name, content in list(members.items())[::2]:
        assert judge(pack(members | {name: content[:-1] + bytes([content[-1] ^ 1])})) == "refused", name


def test_members_missing_renamed_or_repeated(judge):
    members = unpack(good_checkpoint())
    for name, content in list(members.items())[::6]:
        others = [(other, c) for other, c in members.items() if other != name]
        for instead in ([], [("x" + name, content)], [(name, content), (name, content)], [(name[:-4], content)]):
            assert judge(pack(others + instead)) == "refused", (name, instead)


def test_swapped_arrays_of_the_same_shape(judge):
    members = unpack(good_checkpoint())
    layers = [f"param/blocks.{i}.mix.W_red.npy" for i in range(2)]
    for one, other in (layers, ("param/E.npy", "adam_m/E.npy")):
        assert members[one] != members[other]
        assert judge(pack(members | {one: members[other], other: members[one]})) == "refused"


def test_order_and_compression_do_not_matter(judge):
    members = unpack(good_checkpoint())
    assert judge(pack(list(members.items())[::-1])) == "unchanged"
    assert judge(pack(members, zipfile.ZIP_DEFLATED)) == "unchanged"
    assert judge(good_checkpoint() + b"appended") == "unchanged"


ARRAYS = {
    "transposed": lambda a: a.T.copy(),
    "one row less": lambda a: a[:-1],
    "one axis more": lambda a: a[None],
    "flat": lambda a: a.ravel(),
    "empty": lambda a: a[:0],
    "scalar": lambda a: a[0, 0],
    "float16": lambda a: a.astype(np.float16),
    "float64": lambda a: a.astype(np.float64),
    "int32": lambda a: a.astype(np.int32),
    "complex": lambda a: a.astype(np.complex64),
    "text": lambda a: a.astype("U8"),
    "record": lambda a: a.view([("x", "<f4")]),
    "big-endian": lambda a: a.astype(">f4"),
    "Fortran order": np.asfortranarray,
    "NaN": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 5, np.float32(np.nan), a),
    "infinite": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 5, np.float32(-np.inf), a),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("checksum", ["old checksum", "its own checksum"])
def test_changed_arrays(judge, kind, checksum):
    members = unpack(good_checkpoint())
    for name in ("param/E.npy", "adam_v/blocks.1.ffn.W_2.npy"):
        changed = members | {name: to_npy(ARRAYS[kind](from_npy(members[name])))}
        assert judge(pack(changed if checksum == "old checksum" else seal(changed))) == "refused"


def test_nothing_is_executed(judge, capfd):
    """Pickled objects, as a member or as the file."""
    members = unpack(good_checkpoint())
    hello = b"cbuiltins\nprint\n(S'executed'\ntR."
    objects = to_npy(np.array([[print] * 4] * 5, object), allow_pickle=True)
    for name in ("param/E.npy", "meta.npy"):
        assert judge(pack(members | {name: hello})) == judge(pack(members | {name: objects})) == "refused"
    assert judge(hello) == judge(pack(members | {"evil.pkl": hello})) == "refused"
    assert capfd.readouterr().out == ""


def with_header(content, header):
    """An .npy file with another header of version 1.0."""
    length = int.from_bytes(content[8:10], "little")
    return content[:8] + len(header).to_bytes(2, "little") + header + content[10 + length :]


HEADERS = {
    "huge shape": b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }",
    "negative shape": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-5, -4), }",
    "shape of zeros": b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1000000000000), }",
    "many axes": b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1, " * 1000 + b"5, 4), }",
    "booleans": b"{'descr': '<f4', 'fortran_order': False, 'shape': (True, True), }",
    "Python 2": b"{'descr': '<f4', 'fortran_order': False, 'shape': (5L, 4L), }",
    "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (5, 4), }",
    "unclosed": b"{'descr': '<f4', 'fortran_order': False, 'shape': (5, 4",
    "escapes": b"{'descr': '\\d', 'fortran_order': False, 'shape': (5, 4), }",
    "unhashable": b"{[]: '<f4', 'fortran_order': False, 'shape': (5, 4), }",
    "a call": b"{'descr': '<f4', 'fortran_order': print(1), 'shape': (5, 4), }",
    "deeply nested": b"(" * 60_000,
    "long": b"{'descr': '<f4', 'fortran_order': False, 'shape': (5, 4), }" + b" " * 65_000,
    "a long number": b"9" * 60_000,
    "empty": b"",
    "not ASCII": b"\xff" * 100,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_hostile_array_headers(judge, kind):
    members = unpack(good_checkpoint())
    for name in ("param/E.npy", "meta.npy"):
        assert judge(pack(members | {name: with_header(members[name], HEADERS[kind])})) == "refused"


REMOVED = object()


def changed_meta(members, place, value):
    """The members with another value at a place such as "config.rank", and the checksum that belongs to it."""
    meta = part = meta_of(members)
    *path, last = place.split(".")
    for key in path:
        part = part[key]
    part.pop(last)
    if value is not REMOVED:
        part[last] = value
    return seal(with_meta(members, meta))


def each(values):
    """(place, value) for pytest, which shows both."""
    return [
        pytest.param(place, value, id=f"{place}-{'removed' if value is REMOVED else str(value)[:20]}")
        for place, several in values.items()
        for value in several
    ]


HOSTILE = {
    "format": [0, 2, "1", None, REMOVED],
    "config": [None, [], {}, "x", REMOVED],
    "extra": [None, [], "x", 5, REMOVED],
    "config.d_model": [10**9, 0, -4, 5, 4.0, "4", None, [4], REMOVED],
    "config.n_layer": [10**9, 10**30, 1, 3],
    "config.vocab_size": [10**12, 4],
    "config.rank": [10**9, 10**300, 4],
    "config.context": [10**9, 5],
    "config.d_ff": [10**12, 15],
    "config.offsets": [5, None, [], "12", {"1": 2}, [[1, 2], [99]], [[1, 2, 3], [4]], [[1.0, 2.0], [4.0]], [[[]], [4]]],
    "config.dropout": [float("nan"), 1, "0"],
    "config.taps": [False, 1],
    "config.positions": [False],
    "config.block": ["paper", ["prenorm"]],
    "config.mixer": ["attention", None],
    "extra.vocab": [
        5, {}, "abcde", [1, 2, 3], [5, 4, 3, 2, 1], [1, 1, 2, 3, 4], [-1, 1, 2, 3, 4], [1, 2, 3, 4, 0x110000],
        [1, 2, 3, 4, 10**30], ["a", "b", "c", "d", "e"], [[1], [2], [3], [4], [5]], [1.0, 2.0, 3.0, 4.0, 5.0],
        [1, 2, 3, 4, None], [1, [2], 3, 4, 5],
    ],
}  # fmt: skip


@pytest.mark.parametrize("place, value", each(HOSTILE))
def test_hostile_descriptions(judge, place, value):
    """Even with a correct checksum."""
    members = unpack(good_checkpoint())
    assert judge(pack(changed_meta(members, place, value)), sealed=True) == "refused"


def test_many_layers_of_nothing(judge):
    """With attention there need not be a tuple of offsets per layer."""
    members = changed_meta(unpack(good_checkpoint()), "config.mixer", "attention")
    for n_layer in (10**9, 10**30):
        assert judge(pack(changed_meta(members, "config.n_layer", n_layer)), sealed=True) == "refused"


@pytest.mark.parametrize("document", [
    b"", b"{", b"null", b"[]", b"{}", b'"x"', b"5", b"NaN", b"\xff", b"[" * 10**6, b'{"a":' * 10**5, b"1" * 10**5,
    b'{"format": 1e999}', b'{"format": 1}', b"[" + b"0," * 10**5 + b"0]", b"\0" * 1000,
], ids=range(16))  # fmt: skip
def test_descriptions_that_are_none(judge, document):
    assert judge(pack(with_meta(unpack(good_checkpoint()), document))) == "refused"


@pytest.mark.parametrize("array", [np.zeros(100, np.float32), np.zeros((10, 10), np.uint8), np.uint8(5)])
def test_a_description_that_is_another_array(judge, array):
    assert judge(pack(unpack(good_checkpoint()) | {"meta.npy": to_npy(array)})) == "refused"


# ---- more than fits -----------------------------------------------------------------------------------


def bomb(name, claimed):
    """A checkpoint with one member that inflates to 1 GB of zeros, and says it has `claimed` bytes."""
    press = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = press.compress(bytes(1 << 24)) + press.flush(zlib.Z_FULL_FLUSH)
    members = unpack(good_checkpoint())
    content = bytearray(pack(members | {name: part * 64 + press.flush()}))
    entry = content.rindex(b"PK\1\2", 0, content.rindex(name.encode()))  # in the list of members at the end
    content[entry + 10 : entry + 12] = (8).to_bytes(2, "little")  # method: deflated, not stored
    content[entry + 24 : entry + 28] = claimed.to_bytes(4, "little")  # size when inflated
    return bytes(content)


@pytest.mark.parametrize("name", ["param/E.npy", "adam_v/ln_f.w.npy", "meta.npy", "stranger.npy"])
@pytest.mark.parametrize("claimed", [1 << 30, 1000], ids=["honest", "lying"])
def test_a_zip_bomb_is_not_inflated(tmp_path, name, claimed):
    path = tmp_path / "bomb.npz"
    path.write_bytes(bomb(name, claimed))
    tracemalloc.start()
    with pytest.raises(ValueError, match="not a usable checkpoint"):
        load_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_bomb_explodes(tmp_path):
    """That the bomb of the test above is one, for a program that trusts it."""
    (tmp_path / "bomb.npz").write_bytes(bomb("param/E.npy", 1 << 30))
    with zipfile.ZipFile(tmp_path / "bomb.npz") as archive, archive.open("param/E.npy") as member:
        assert sum(len(member.read(1 << 24)) for _ in range(4)) == 1 << 26  # the rest likewise


@pytest.mark.parametrize("size", [10**6, 2**32 - 2])
def test_a_directory_that_lies_about_sizes_takes_no_memory(judge, size):
    good = bytearray(good_checkpoint())
    entry = good.index(b"PK\1\2")
    for field in (20, 24):  # compressed and inflated size of the first member
        lying = good.copy()
        lying[entry + field : entry + field + 4] = size.to_bytes(4, "little")
        assert judge(bytes(lying)) in ("refused", "unchanged")


# ---- files that are none ------------------------------------------------------------------------------


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing.npz")
    with pytest.raises(OSError):
        load_checkpoint(tmp_path)
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    with pytest.raises(OSError):
        load_checkpoint(tmp_path / "loop.npz")
    if os.path.exists("/dev/null"):
        with pytest.raises(ValueError):
            load_checkpoint("/dev/null")


# ---- at random ----------------------------------------------------------------------------------------


def test_random_damage(capsys):
    assert fuzz_checkpoints.main(["--count", str(3 * len(KINDS))]) == 0, capsys.readouterr().out
    assert "nothing wrong" in capsys.readouterr().out


def test_the_fuzzer_notices(judge):
    """Files that load, but not as they were."""
    members = unpack(good_checkpoint())
    other = from_npy(members["param/E.npy"]).copy()
    other[0, 0] += 1
    assert judge(pack(seal(members | {"param/E.npy": to_npy(other)}))) == "loaded other arrays"
    meta = meta_of(members)
    meta["extra"]["step"] = 8
    assert judge(pack(seal(with_meta(members, meta)))) == "loaded other contents"


def damaged_files():
    """A few files for the programs."""
    good, members = good_checkpoint(), unpack(good_checkpoint())
    rng = random.Random(0)
    return {
        "cut": good[:-100],
        "flipped": flip_bits(rng, good[:3000]) + good[3000:],
        "without weights": pack({"meta.npy": members["meta.npy"]}),
        "NaN": pack(seal(members | {"param/P.npy": to_npy(np.full((6, 4), np.nan, np.float32))})),
        "header": pack(members | {"param/E.npy": with_header(members["param/E.npy"], HEADERS["unclosed"])}),
        "Python 2": pack(members | {"param/E.npy": with_header(members["param/E.npy"], HEADERS["Python 2"])}),
        "nested": pack(with_meta(members, b"[" * 10**6)),
        "bomb": bomb("param/E.npy", 1000),
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_sample_refuses_damaged_files(tmp_path, kind):
    path = tmp_path / "file.npz"
    path.write_bytes(damaged_files()[kind])
    process = program("sample.py", path)
    assert "not a usable checkpoint" in refused(process) and process.stdout == ""


UNUSABLE = {"vocab": [REMOVED, None, [97.0, 98.0, 99.0, 100.0, 101.0]], "most_common": [REMOVED, None, 99, -1, [], "x"]}


@pytest.mark.parametrize("place, value", each(UNUSABLE))
def test_sample_refuses_what_it_cannot_use(tmp_path, place, value):
    """Whole checkpoints, of which something that sampling needs is missing or of the wrong kind."""
    members = changed_meta(unpack(good_checkpoint()), "extra.vocab", [97, 98, 99, 100, 101])  # without a newline
    (tmp_path / "file.npz").write_bytes(pack(changed_meta(members, f"extra.{place}", value)))
    refused(program("sample.py", tmp_path / "file.npz"))


UNUSABLE = {
    "settings": [REMOVED, {}, []], "step": [REMOVED, "x"], "recent": [["x"]], "best": [5], "settings.lr": ["x"],
    "settings.data": [5], "settings.eval_every": [0],
}  # fmt: skip


@pytest.mark.parametrize("place, value", each(UNUSABLE))
def test_resume_refuses_what_it_cannot_use(tmp_path, interrupted, place, value):
    (tmp_path / "last.npz").write_bytes(pack(changed_meta(unpack(interrupted), f"extra.{place}", value)))
    refused(program("train_char.py", "--resume", "--out", tmp_path))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """last.npz of a run that has steps left to do."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "text.txt").write_text("ab\n" * 20)
    model = "--context 4 --n-layer 1 --d-model 4 --rank 2 --batch-size 2 --iters 3 --threads 1 --data text.txt --out ."
    command = [sys.executable, ROOT / "train_char.py", *model.split()]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return pack(changed_meta(unpack((folder / "last.npz").read_bytes()), "extra.settings.iters", 5))


def test_the_interrupted_run_can_be_resumed(tmp_path, interrupted):
    (tmp_path / "last.npz").write_bytes(interrupted)
    assert program("train_char.py", "--resume", "--out", tmp_path).returncode == 0
