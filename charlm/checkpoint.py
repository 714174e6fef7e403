"""A model on disk: one .npz, which is written whole or not at all, and checked when it is read.

It has arrays `param/NAME`, the optimiser's `adam_m/NAME` and `adam_v/NAME` if training can be
resumed, and `meta`, one JSON document as bytes (configuration, vocabulary, step, …). np.load
reads it too. CuPy arrays make the same file.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from grassmann import Array, Config, Params, UserError, check_model, param_shapes, require

FORMAT = 1  # the file's version; load_checkpoint refuses any other version


def save_checkpoint(path: str | os.PathLike, params: Params, config: Config, **extra) -> None:
    """Write parameters, configuration and `extra`.

    In `extra`, a dict of arrays named like the parameters becomes arrays `KEY/NAME`; the rest
    must be JSON. The new file is written next to `path`, flushed to the disk and then renamed. So
    `path` is always a whole file, the old or the new. Raises OSError, and UserError for anything
    that `load_checkpoint` would refuse.
    """
    groups = {"param": on_host(params)}
    groups |= {
        key: on_host(value)
        for key, value in extra.items()
        if hasattr(value, "keys") and "E" in value
    }
    check_content(groups, config, extra)
    rest = {key: value for key, value in extra.items() if key not in groups}
    document = json.dumps({"format": FORMAT, "config": asdict(config), "extra": rest}).encode()
    require(json.loads(document)["extra"] == rest, "JSON would change the extra values")
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


def load_checkpoint(path: str | os.PathLike, place: Callable = dict) -> tuple[Params, Config, dict]:
    """Read what `save_checkpoint` wrote: (params, config, extra).

    `place` makes the dicts; for a GPU it is gpu.Flat. Nothing in the file is executed or unpacked.
    Raises OSError if it cannot be read, and UserError, with one line, if it is not a whole
    checkpoint of this version.
    """
    require(not Path(path).exists() or Path(path).is_file(), f"{path} is not a file")
    try:
        with zipfile.ZipFile(path) as file:
            require(
                all(member.compress_type == zipfile.ZIP_STORED for member in file.infolist()),
                "it is compressed",
            )
            meta, found = json.loads(read_array(file, "meta").tobytes()), file.namelist()
            require(
                meta["format"] == FORMAT,
                f"format version {meta['format']!r}, this program reads {FORMAT}",
            )
            require(meta["config"]["n_layer"] < len(found), "layers are missing")
            config, extra = Config(**meta["config"]), dict(meta["extra"])
            shapes, keys = (
                param_shapes(config),
                {name.split("/")[0] for name in found} - {"meta.npy"} | {"param"},
            )
            names = ["meta.npy", *(f"{key}/{name}.npy" for key in keys for name in shapes)]
            require(sorted(found) == sorted(names), "its arrays do not fit its configuration")
            groups = {
                key: {name: read_array(file, f"{key}/{name}") for name in shapes} for key in keys
            }
        check_content(groups, config, extra)
    except OSError:
        raise
    except Exception as error:  # arbitrary bytes make the parsers raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a usable checkpoint: {reason[:200]}") from error
    groups = {key: place(group) for key, group in groups.items()}
    return groups.pop("param"), config, extra | groups


def read_array(archive: zipfile.ZipFile, name: str) -> Array:
    """Read an array. It takes no more memory than the file has bytes, whatever its header says."""
    with archive.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        return np.array(
            np.frombuffer(file.read(), dtype).reshape(shape, order="F" if by_columns else "C"),
            order="C",
        )


def check_content(groups: dict[str, Params], config: Config, extra: dict) -> None:
    """Check a checkpoint, before it is written and after it is read. Raises UserError."""
    dtype, vocab = groups["param"]["E"].dtype, extra.get("vocab")
    require(
        dtype in (np.float32, np.float64), f"parameters must be float32 or float64, not {dtype}"
    )
    for key, group in groups.items():
        check_model(group, config)
        for name, a in group.items():
            require(a.dtype == dtype, f"{key}/{name} is {a.dtype}, E is {dtype}")
            require(
                np.isfinite(a).all(),
                f"{key}/{name} has values that are not finite: lower the learning rate",
            )
    require(
        vocab is None
        or (
            type(vocab) is list
            and all(type(point) is int and 0 <= point <= 0x10FFFF for point in vocab)
            and vocab == sorted(set(vocab))
            and len(vocab) == config.vocab_size
        ),
        "its vocabulary must be vocab_size code points in ascending order",
    )


def on_host(arrays: Params) -> Params:
    """The arrays as NumPy arrays. CuPy arrays are copied from the GPU."""
    return {name: a.get() if hasattr(a, "get") else np.asarray(a) for name, a in arrays.items()}
