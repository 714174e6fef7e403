"""The geometry of Gr(2, r) that experiments/flow.py measures with, and the program in use."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import experiments.flow as F
import grassmann as G
from charlm.checkpoint import save_checkpoint
from charlm.text import encode, vocabulary

TEXT = "".join(f"{k} times {k} is {k * k}\n" for k in range(200))
VOCAB = vocabulary(TEXT)


def planes(rng, *shape, r=7):
    return F.plane(*rng.standard_normal((2, *shape, r)))


def rotation(rng, r=7):
    return np.linalg.qr(rng.standard_normal((r, r)))[0]


def geodesic(rng, angles):
    """A shortest path: turned by `angles` (T) times (0.6, 0.8) from one plane towards another."""
    Q, turn = rotation(rng), np.multiply.outer(angles, [0.6, 0.8])[:, None, :]  # (T, 1, 2)
    return np.cos(turn) * Q[:, :2] + np.sin(turn) * Q[:, 2:4]


def flow_through(path, text=None):
    """The flow of one layer through these planes (T, r, 2)."""
    z, s = path.transpose(2, 0, 1)[:, None]
    return F.Flow(text or ("ab " * len(path))[: len(path)], z, s, np.full((1, len(path)), 0.5))


def model(**variant):
    sizes = {"context": 8, "n_layer": 2, "d_model": 8, "rank": 4, "offsets": ((1, 2), (3,))}
    config = G.Config(**{"vocab_size": len(VOCAB)} | sizes | variant)
    params = G.init_params(config, 3)
    for value in params.values():
        value += 0.1 * np.sin(np.arange(value.size).reshape(value.shape)).astype(value.dtype)
    return params, config


def save(path, vocab=VOCAB, data=None, **variant):
    params, config = model(vocab_size=len(vocab), **variant)
    save_checkpoint(path, params, config, vocab=vocab, most_common=0, settings={"data": data})
    return path


# ---- planes and distances ------------------------------------------------------------------------


def test_a_plane_is_an_orthonormal_basis_of_what_it_spans_or_nan(rng):
    u, v = rng.standard_normal((2, 50, 7))
    for factor in (1e-12, 1, 1e12):
        A = F.plane(u, factor * (v - 1000 * u))
        assert np.allclose(A.swapaxes(1, 2) @ A, np.eye(2), atol=1e-14)
        for x in (u, v):  # inside: projecting changes nothing
            assert np.allclose((A @ (A.swapaxes(1, 2) @ x[..., None]))[..., 0], x, atol=1e-9)
    u, v, A = u[0], v[0], F.plane(u[0], v[0])
    none = [F.plane(u, 0 * u), F.plane(0 * u, u), F.plane(u, -3 * u), F.plane(u, u + 1e-7 * v)]
    assert np.isnan(none).all() and np.isfinite(F.plane(u, u + 1e-3 * v)).all()
    assert np.isnan(F.distance(np.stack([A, *none]), A)).tolist() == [False, True, True, True, True]
    assert np.isnan(F.nearest_plane(np.zeros(21))).all()


@pytest.mark.parametrize(
    "angles", [(0, 1e-9), (1e-12, 1e-4), (0.3, 1.2), (0, np.pi / 2), (np.pi / 2 - 1e-9, np.pi / 2)]
)
def test_small_angles_and_right_ones_are_exact(rng, angles):
    """Whatever the bases of the two planes, and in either order."""
    Q, one, other = rotation(rng), rotation(rng, 2), rotation(rng, 2)
    A, B = Q[:, :2] @ one, (np.cos(angles) * Q[:, :2] + np.sin(angles) * Q[:, 2:4]) @ other
    for pair in ((A, B), (B, A)):
        assert np.allclose(F.principal_angles(*pair), angles, rtol=1e-9, atol=2e-15)
        assert np.isclose(F.distance(*pair), np.hypot(*angles), rtol=1e-9, atol=2e-15)


@pytest.mark.parametrize("r", [2, 3, 4, 7, 12])
def test_the_nearest_plane_of_a_plane_is_itself_and_no_other_is_nearer(rng, r):
    u, v = rng.standard_normal((2, 200, r))
    for scale in (1e-30, 1, 1e30):
        assert F.distance(F.nearest_plane(G.plucker(scale * u, v)), F.plane(u, v)).max() < 1e-7
    p = rng.standard_normal(r * (r - 1) // 2)
    best = F.nearest_plane(p)
    near = F.plane(*np.moveaxis(best + 0.01 * rng.standard_normal((3000, r, 2)), -1, 0))
    u, v = np.moveaxis(np.concatenate([best[None], planes(rng, 3000, r=r), near]), -1, 0)
    overlap = np.abs(G.plucker(u, v) @ p)
    assert overlap[0] >= overlap.max() - 1e-12


# ---- paths ---------------------------------------------------------------------------------------


def test_the_coastline_of_a_line_and_of_noise(rng):
    line = F.coastline(flow_through(geodesic(rng, np.linspace(0, 1, 1025))), 0)
    rulers = line[line["scale"] == "ruler"]
    assert rulers["size"].tolist() == [1, 2, 4, 8, 16] and np.allclose(
        rulers["step"], rulers["size"] / 1024
    )
    assert np.allclose(rulers["noise"], 1 / 3, atol=0.02)  # mean distance of two points of a line
    noise = F.coastline(flow_through(planes(rng, 4096, r=16)), 0)
    assert (abs(noise["step"] / noise["noise"] - 1) < 0.05).all()


def test_a_word_line_or_block_has_the_plane_nearest_to_the_sum_of_its_bivectors(rng):
    text = "one two\nthree  four five\n" * 4
    flow = flow_through(planes(rng, len(text)), text)
    table, p = F.coastline(flow, 0), G.plucker(flow.z[0], flow.s[0])
    for scale, pattern in (("word", "[a-z]+"), ("line", ".+"), ("block", "(?s:....)")):
        spans = [p[slice(*match.span())].sum(0) for match in re.finditer(pattern, text)]
        path, (row,) = F.nearest_plane(np.stack(spans)), table[table["scale"] == scale]
        assert np.isclose(row["step"], F.distance(path[1:], path[:-1]).mean())
        assert np.isclose(row["size"], len(text) / len(path))


def test_the_share_of_variance_that_labels_explain(rng):
    labels, A = np.repeat(np.arange(4), 500), planes(rng, 2000)
    A[:1000] = planes(rng, 4)[labels[:1000]]
    projectors = (A @ A.swapaxes(1, 2)).reshape(2000, -1)
    within = sum(projectors[labels == k].var(0).sum() for k in range(4)) / 4
    assert np.isclose(F.explained(A, labels), 1 - within / projectors.var(0).sum())


def test_kinds_of_characters():
    names = {kind[0]: kind for kind in F.KINDS[::-1]} | {"w": "word start"}
    kinds = F.character_kinds("An old\n  man, 3x\n").tolist()
    assert kinds == [names[k] for k in "ciswiilsswiipswil"]


@pytest.mark.parametrize(
    "variant, windows",
    [
        ({}, [(0, 0, 2500)]),
        ({"taps": False, "offsets": ((1, 2), (1, 3))}, [(0, 0, 2500)]),
        (
            {"block": "paper", "taps": False, "normalize": True, "positions": True},
            [(0, 0, 8), (4, 8, 12), (16, 20, 24)],
        ),
        ({"memory": True}, [(0, 0, 2500)]),
    ],
    ids=["prenorm", "average", "paper", "memory"],
)
def test_the_flow_is_what_the_layers_compute(variant, windows):
    """Also a long text, read in pieces. With positions, a token sees at least half a context."""
    params, config = model(**variant)
    flow = F.read_flow(params, config, TEXT[: windows[-1][-1]], VOCAB)
    for start, first, end in windows:
        _, cache = G.model_forward(params, config, encode(TEXT[start:end], VOCAB)[None])
        for i, block in enumerate(cache["blocks"]):
            z, s, p, alpha = (
                block["mix"][name][0, first - start :] for name in ("z", "s", "p", "alpha")
            )
            for ours, theirs in ((flow.z, z), (flow.s, s), (flow.gate, alpha.mean(1))):
                assert np.allclose(ours[i, first:end], theirs, atol=1e-5)
            apart = F.distance(flow.planes[i, first:end], F.nearest_plane(p.astype(float)))
            assert np.nanmax(apart) < 1e-3 and (np.isfinite(apart) == p.any(1)).all()
    A, spaces = flow.planes[0], F.character_kinds(flow.text) == "space"
    assert np.isnan(flow.step[:, :2]).all()  # the first token has no partner
    assert np.allclose(flow.step[0, 2:], F.distance(A[1:-1], A[2:]), equal_nan=True)
    assert np.isclose(F.by_kind(flow.text, flow.step)["space"][1], np.nanmean(flow.step[1, spaces]))


# ---- the program ---------------------------------------------------------------------------------


def run_flow(*args):
    command, root = [sys.executable, "-m", "experiments.flow", *args], Path(F.__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", timeout=300)


def printed_row(printed, name):
    """The numbers of each layer in the first row with this name."""
    row = next(line for line in printed.splitlines() if line.startswith(f"| {name} |"))
    return [[float(x) for x in cell.split(" / ")] for cell in row.split("|")[2:-1]]


def test_a_flow_has_shorter_steps_than_random_order_and_than_shuffled_text():
    for share, shuffled, kind in (
        (1.0, 1.0, "no flow"),
        (0.97, 0.97, "no flow"),
        (0.95, 0.98, "hardly a flow"),
        (0.5, 0.98, "a flow"),
        (1.1, 1.3, "no flow"),
    ):
        tables = (
            np.rec.fromrecords([("ruler", 1, x, 1)], names="scale,size,step,noise")
            for x in (share, shuffled)
        )
        assert F.verdict(*tables).startswith(f"{kind}, since a step")


def test_from_a_checkpoint_to_tables_of_the_text_held_out(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    process = run_flow(save(tmp_path / "best.npz", data=str(tmp_path / "text.txt")))
    assert (process.returncode, process.stderr) == (0, "")
    printed, (params, config) = process.stdout, model()
    flow = F.read_flow(params, config, TEXT[-(len(TEXT) // 10) :].lstrip(), VOCAB)
    plain = F.read_flow(G.init_params(config), config, flow.text, VOCAB)
    *verdicts, empty, count = printed.splitlines()[:4]
    assert empty == "" and count.startswith(f"{len(flow.text)} characters")
    spaces, near = F.character_kinds(flow.text) == "space", {"atol": 0.0051, "rtol": 0}
    for name, where in (("all", spaces | True), ("space", spaces)):
        means = [[np.nanmean(f.step[i, where]) for f in (flow, plain)] for i in range(2)]
        assert np.allclose(printed_row(printed, name), means, **near)
    gates = printed_row(printed.split("| mean gate α at |")[1], "space")
    assert np.allclose(gates, flow.gate[:, spaces].mean(1, keepdims=True), **near)
    for i, sentence in enumerate(verdicts):
        row = printed_row(printed, "share of variance explained by the character")
        assert row[i][0] == pytest.approx(
            F.explained(flow.planes[i], np.array([*flow.text])), abs=6e-4
        )
        table = F.coastline(flow, i)
        shares = table["step"] / table["noise"]
        for name, scale in {"ruler 4": "ruler", "block 4": "block", "word": "word"}.items():
            row = (table["scale"] == scale) & ((table["size"] == 4) | (scale == "word"))
            assert np.allclose(printed_row(printed, name)[i][0], shares[row], **near)
        assert sentence.startswith(f"Layer {i + 1}: ") and "flow, since a step" in sentence
        assert f"is {shares[0]:.2f} of a step in random order" in sentence


def test_strange_texts_and_paths_that_stand_still_are_measured(tmp_path):
    strange, file = (
        "$x^2$ \\frac{ \t\0\ud800 \u4e2d \u200b %s _{^ $$ \n\r",
        tmp_path / "strange.txt",
    )
    file.write_bytes(strange.encode("utf-8", "surrogatepass"))
    process = run_flow(save(tmp_path / "strange.npz", vocab=vocabulary(strange)), "--file", file)
    assert (process.returncode, process.stderr) == (0, "")


def test_what_has_no_flow_is_refused_in_one_sentence(tmp_path):
    path, some = save(tmp_path / "best.npz"), TEXT[:50]
    process = run_flow(tmp_path / "none.npz")
    assert (process.returncode, process.stdout) == (2, "")
    assert re.fullmatch(r".*flow.*: .*none\.npz does not exist.*\n", process.stderr)
    for variant, text, reason in (
        ({"rank": 2}, some, "has no flow"),
        ({"mixer": "attention", "offsets": None}, some, "has no flow"),
        ({}, "short", "of at least 20 characters"),
        ({}, some + "€#", r"never saw '#', '\\u20ac', which this text has"),
        ({"taps": False, "offsets": ((1,), (1,))}, "1" * 50, "half of this text or more spans"),
    ):
        with pytest.raises(G.UserError, match=reason):
            F.measure(save(path, **variant), text)


def test_the_text_held_out_is_found_or_asked_for(tmp_path):
    text = "x" * 9000 + "first\n\n   second paragraph" + "y" * 974
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    named = {
        "settings": {"data": [str(tmp_path / "text.txt")]}
    }  # a list: so train_char.py writes it
    same = {"text_sha256": hashlib.sha256(text.encode()).hexdigest()}
    for extra in ({}, same, {"settings": {"data": str(tmp_path)}}):
        assert F.text_of_run("c", named | extra) == "second paragraph" + "y" * 974
    for settings in (
        3,
        {},
        *({"data": name} for name in (5, os.devnull, [str(tmp_path / "no")], "\0")),
    ):
        with pytest.raises(ValueError, match=r"here \(there is no file .*\); give one with --file"):
            F.text_of_run("c", {"settings": settings})
    for extra in (named, {"settings": {"data": None}}):
        with pytest.raises(ValueError, match=r"it has changed since\); give one with --file"):
            F.text_of_run("c", extra | {"text_sha256": "0" * 64})
