"""A model on disk: one .npz, written whole or not at all, and read with suspicion.

Arrays `param/NAME`; the optimiser's as `adam_m/NAME`, `adam_v/NAME` where a run can be resumed; and
`meta`, one JSON document as bytes (configuration, vocabulary, step, …). NumPy alone reads it too:
np.load(path, allow_pickle=False). Either module's arrays, NumPy's or CuPy's, make the same file.
"""

from __future__ import annotations

import json
import math
import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from grassmann import Config, Params, param_shapes

FORMAT = 1  # version of the file; a loader refuses any other
MOST_META = 1 << 25  # bytes: more than a vocabulary of all of Unicode takes

def save_checkpoint(path: str | os.PathLike, params: Params, config: Config, **extra) -> None:
    """Write parameters, configuration and `extra`.

    In `extra`, a dict of arrays named like the parameters becomes arrays `KEY/NAME`; the rest must
    be JSON. The file is written beside its place, flushed to the disk and renamed: whatever
    happens, `path` is the old file or the new one, whole. Raises OSError, and ValueError for what
    `load_checkpoint` would refuse (values that are not finite, another model's parameters, …): no
    good checkpoint is ever replaced by a bad one.
    """
    groups = {"param": on_host(params)}
    groups |= {key: on_host(value) for key, value in extra.items() if is_arrays(value)}
    check(groups, config, extra)
    rest = {key: value for key, value in extra.items() if key not in groups}
    document = json.dumps({"format": FORMAT, "config": asdict(config), "extra": rest}).encode()
    back = json.loads(document)
    if len(document) > MOST_META:
        raise ValueError(f"the extra values take more than {MOST_META >> 20} MiB")
    if back["extra"] != rest or Config(**back["config"]) != config:
        raise ValueError("the extra values don't come back from JSON as they are")
    arrays = {f"{key}/{name}": a for key, group in groups.items() for name, a in group.items()}
    unfinished = Path(f"{os.fspath(path)}.tmp")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, meta=np.frombuffer(document, np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)

def load_checkpoint(
    path: str | os.PathLike, place: Callable[[Params], Params] = dict
) -> tuple[Params, Config, dict]:
    """Read what `save_checkpoint` wrote: (params, config, extra). `place`: gpu.Flat for a card.

    Nothing in the file is executed, and no array is read before its size fits its shape. Raises
    OSError if the file cannot be read, and ValueError, with one line, if it is not a whole
    checkpoint of this version.
    """
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy's, of array headers that are out of the ordinary
            meta, names = json.loads(read(archive, "meta", MOST_META).tobytes()), archive.namelist()
            if meta["format"] != FORMAT:
                raise ValueError(f"format version {meta['format']!r}, this program reads {FORMAT}")
            if not meta["config"]["n_layer"] < len(names):
                raise ValueError("layers are missing")
            config, extra = Config(**meta["config"]), dict(meta["extra"])
            shapes = param_shapes(config)
            keys = {name.split("/")[0] for name in names if name != "meta.npy"} | {"param"}
            arrays = [f"{key}/{name}.npy" for key in keys for name in shapes]
            if sorted(names) != sorted(["meta.npy", *arrays]):
                raise ValueError("its arrays are not those of its configuration")
            groups = {key: {name: read(archive, f"{key}/{name}", 8 * math.prod(shape))
                            for name, shape in shapes.items()} for key in keys}
        check(groups, config, extra)
    except OSError:
        raise
    except Exception as error:  # parsers of bytes that can be anything raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a usable checkpoint: {reason[:200]}") from error
    groups = {key: place(group) for key, group in groups.items()}
    return groups.pop("param"), config, extra | groups

def check(groups: dict[str, Params], config: Config, extra: dict) -> None:
    """What a checkpoint must be, when it is written and when it is read. Raises ValueError."""
    if "param" in extra or any("/" in key for key in extra):
        raise ValueError("extra values need names other than param, without a /")
    shapes = param_shapes(config)
    for key, group in groups.items():
        if group.keys() != shapes.keys():
            raise ValueError(f"the arrays of {key} are not the parameters of this configuration")
        for name, a in group.items():
            dtype = groups["param"]["E"].dtype
            if a.shape != shapes[name] or a.dtype != dtype or dtype not in (np.float32, np.float64):
                raise ValueError(f"{key}/{name} has shape {a.shape} and dtype {a.dtype}, expected "
                                 f"{shapes[name]} and {dtype} (float32 or float64)")
            if not np.isfinite(a).all():
                raise ValueError(f"{key}/{name} has values that are not finite")
    vocab = extra.get("vocab")
    if vocab is not None and (
            not isinstance(vocab, list) or any(type(point) is not int for point in vocab)
            or vocab != sorted(set(vocab)) or len(vocab) != config.vocab_size
            or vocab[0] < 0 or vocab[-1] > 0x10FFFF):
        raise ValueError("its vocabulary is not one of vocab_size code points in ascending order")

def read(archive: zipfile.ZipFile, name: str, most: int) -> np.ndarray:
    """One array, of at most so many bytes; zipfile compares its CRC. Raises ValueError."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most + 4096:  # with its header
        raise ValueError(f"{name} is compressed, or too large for its shape")
    with archive.open(info) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{name} has a header of another version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        content = member.read()
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    return np.array(array, order="C")  # a copy that can be written to

def is_arrays(value: object) -> bool:
    return isinstance(value, dict) and {hasattr(a, "dtype") for a in value.values()} == {True}

def on_host(arrays: Params) -> Params:
    """CuPy's arrays are fetched."""
    return {name: a.get() if hasattr(a, "get") else np.asarray(a) for name, a in arrays.items()}
