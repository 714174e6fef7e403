"""The geometry of Gr(2, r) that experiments/flow.py measures with, and the program in use."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

import experiments.flow as F
import grassmann as G
from charlm.checkpoint import save_checkpoint
from charlm.text import encode, vocabulary

TEXT = "".join(f"{k} times {k} is {k * k}\n" for k in range(200))
VOCAB = vocabulary(TEXT)


def planes(rng, *shape, r=7):
    u, v = rng.standard_normal((2, *shape, r))
    return F.plane(u, v)


def rotation(rng, r=7):
    Q, _ = np.linalg.qr(rng.standard_normal((r, r)))
    return Q


def turned(Q, angles):
    """The plane of the first two columns of Q, turned by two angles towards the next two."""
    here = Q[:, :2]
    there = Q[:, 2:4]
    return np.cos(angles) * here + np.sin(angles) * there


def flow_through(path, text):
    """The flow of one layer through these planes (T, r, 2)."""
    z, s = path.transpose(2, 0, 1)[:, None]
    gate = np.full((1, len(path)), 0.5)
    return F.Flow(text, z, s, gate)


def model(**variant):
    sizes = {
        "vocab_size": len(VOCAB),
        "context": 8,
        "n_layer": 2,
        "d_model": 8,
        "rank": 4,
        "offsets": ((1, 2), (3,)),
    }
    config = G.Config(**sizes | variant)
    params = G.init_params(config)
    rng = np.random.default_rng(3)
    for value in params.values():
        value += 0.1 * rng.standard_normal(value.shape)
    return params, config


def save(path, data=None, **variant):
    params, config = model(**variant)
    settings = {"data": data}
    save_checkpoint(path, params, config, vocab=VOCAB, most_common=0, settings=settings)
    return path


# ---- planes and distances ------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-12, 1, 1e12])
def test_a_plane_is_an_orthonormal_basis_of_what_it_spans(rng, factor):
    u, v = rng.standard_normal((2, 7))
    basis = F.plane(u, factor * (v - 1000 * u))
    assert_allclose(basis.T @ basis, np.eye(2), atol=1e-14)
    projector = basis @ basis.T
    for inside in (u, v):
        assert_allclose(projector @ inside, inside, atol=1e-9)


def test_parallel_vectors_span_no_plane(rng):
    u, v = rng.standard_normal((2, 7))
    for other in (0 * u, -3 * u, u + 1e-7 * v):
        none = F.plane(u, other)
        assert np.isnan(none).all()
        assert np.isnan(F.distance(none, F.plane(u, v)))
    nearly = F.plane(u, u + 1e-3 * v)
    assert np.isfinite(nearly).all()


def test_0_has_no_nearest_plane():
    assert np.isnan(F.nearest_plane(np.zeros(21))).all()


@pytest.mark.parametrize(
    "angles",
    [
        (0, 1e-9),
        (1e-12, 1e-4),
        (0.3, 1.2),
        (0, np.pi / 2),
    ],
)
def test_small_angles_and_right_ones_are_exact_in_any_basis(rng, angles):
    Q = rotation(rng)
    A = Q[:, :2] @ rotation(rng, 2)
    B = turned(Q, angles) @ rotation(rng, 2)
    for pair in ((A, B), (B, A)):
        assert_allclose(F.principal_angles(*pair), angles, rtol=1e-9, atol=2e-15)


def overlap(A, p):
    """How much of a bivector p lies in a plane."""
    unit = G.plucker(A[..., 0], A[..., 1])
    return np.abs(unit @ p)


@pytest.mark.parametrize("r", [2, 3, 7])
def test_no_plane_is_nearer_than_the_nearest(rng, r):
    p = rng.standard_normal(r * (r - 1) // 2)
    best = F.nearest_plane(p)
    most = overlap(best, p)
    x, y = best.T[:, None] + 0.01 * rng.standard_normal((2, 3000, r))
    for others in (F.plane(x, y), planes(rng, 3000, r=r)):
        assert most >= overlap(others, p).max() - 1e-12


# ---- paths ---------------------------------------------------------------------------------------


def test_the_coastline_of_a_line(rng):
    Q = rotation(rng)
    angles = np.linspace([0, 0], [0.6, 0.8], 1025)
    line = np.stack([turned(Q, pair) for pair in angles])
    table = F.coastline(flow_through(line, "a" * 1025), 0)
    rulers = table[table["scale"] == "ruler"]
    assert rulers["size"].tolist() == [1, 2, 4, 8, 16]
    assert_allclose(rulers["step"], rulers["size"] / 1024)
    assert_allclose(rulers["noise"], 1 / 3, atol=0.02)  # of two points of a line


def test_a_word_line_or_block_has_the_plane_nearest_to_the_sum_of_its_bivectors(rng):
    text = "one two\nthree  four five\n" * 4
    flow = flow_through(planes(rng, len(text)), text)
    table = F.coastline(flow, 0)
    p = G.plucker(flow.z[0], flow.s[0])
    for scale, pattern in (("word", "[a-z]+"), ("line", ".+"), ("block", "(?s:....)")):
        spans = [slice(*match.span()) for match in re.finditer(pattern, text)]
        path = F.nearest_plane(np.stack([p[span].sum(0) for span in spans]))
        (row,) = table[table["scale"] == scale]
        step = F.distance(path[1:], path[:-1]).mean()
        assert row["step"] == pytest.approx(step)
        assert row["size"] == pytest.approx(len(text) / len(spans))


def test_the_share_of_variance_that_labels_explain(rng):
    labels = np.repeat(np.arange(4), 500)
    A = planes(rng, 2000)
    A[:1000] = planes(rng, 4)[labels[:1000]]
    projectors = A @ A.swapaxes(1, 2)
    total = projectors.var(0).sum()
    within = projectors.reshape(4, 500, 7, 7).var(1).sum() / 4
    assert F.explained(A, labels) == pytest.approx(1 - within / total)


def test_kinds_of_characters():
    kinds = F.character_kinds("An o\n 3x,")
    assert kinds.tolist() == [
        "capital",
        "in a word",
        "space",
        "word start",
        "line end",
        "space",
        "word start",
        "in a word",
        "punctuation",
    ]


@pytest.mark.parametrize(
    "variant, start, seen",
    [
        ({}, 0, 0),
        ({"positions": True}, 2492, 4),  # a token sees at least half a context of 8
        ({"memory": True}, 0, 0),
    ],
    ids=["taps", "positions", "memory"],
)
def test_the_flow_is_what_the_layers_compute(variant, start, seen):
    """Also in a long text, which is read in pieces."""
    params, config = model(**variant)
    flow = F.read_flow(params, config, TEXT[:2500], VOCAB)
    tokens = encode(TEXT[start:2500], VOCAB)
    _, cache = G.model_forward(params, config, tokens[None])
    for i, block in enumerate(cache["blocks"]):
        mix = block["mix"]
        gate = mix["alpha"].mean(-1)
        for found, expected in ((flow.z, mix["z"]), (flow.s, mix["s"]), (flow.gate, gate)):
            assert_allclose(found[i, start + seen :], expected[0, seen:], atol=1e-5)


def test_a_step_is_the_distance_from_the_plane_before(rng):
    path = planes(rng, 30)
    path[7] = np.nan
    flow = flow_through(path, "a b" * 10)
    steps = F.distance(path[:-1], path[1:])
    assert_allclose(flow.step[0, 1:], steps)
    means = F.by_kind(flow.text, flow.step)
    assert means["space"] == pytest.approx(np.nanmean(steps[::3]))


# ---- the program ---------------------------------------------------------------------------------


def run_flow(*args):
    command = [sys.executable, "-m", "experiments.flow", *args]
    root = Path(F.__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", timeout=300)


def printed_row(printed, name):
    """The numbers of each layer in the first row with this name."""
    cells = re.search(rf"^\| {name} \|(.*)\|$", printed, re.MULTILINE)[1]
    return [[float(x) for x in cell.split(" / ")] for cell in cells.split("|")]


@pytest.mark.parametrize(
    "share, shuffled, kind",
    [
        (0.97, 0.97, "no flow"),
        (0.95, 0.98, "hardly a flow"),
        (0.5, 0.98, "a flow"),
        (1.1, 1.3, "no flow"),
    ],
)
def test_a_flow_has_shorter_steps_than_random_order_and_than_shuffled_text(share, shuffled, kind):
    row = {"scale": "ruler", "size": 1, "step": share, "noise": 1}
    other = row | {"step": shuffled}
    assert F.verdict([row], [other]).startswith(f"{kind}, since a step")


def test_from_a_checkpoint_to_tables_of_the_text_held_out(tmp_path):
    data = tmp_path / "text.txt"
    data.write_text(TEXT, encoding="utf-8")
    process = run_flow(save(tmp_path / "best.npz", data=str(data)))
    assert process.stderr == ""
    printed = process.stdout
    params, config = model()
    text = TEXT[-(len(TEXT) // 10) :].lstrip()
    assert f"\n{len(text)} characters. " in printed
    flow = F.read_flow(params, config, text, VOCAB)
    plain = F.read_flow(G.init_params(config), config, text, VOCAB)
    letters = np.array([*text])
    spaces = letters == " "
    gates = printed.partition("| mean gate α at |")[2]
    near = {"abs": 0.0051}  # half of the last digit
    for i in range(2):
        steps = [np.nanmean(each.step[i, spaces]) for each in (flow, plain)]
        row = printed_row(printed, "space")
        assert row[i] == pytest.approx(steps, **near)
        row = printed_row(gates, "space")
        gate = flow.gate[i, spaces].mean()
        assert row[i] == pytest.approx([gate], **near)
        row = printed_row(printed, "share of variance explained by the character")
        explained = F.explained(flow.planes[i], letters)
        assert row[i][0] == pytest.approx(explained, abs=6e-4)
        row = printed_row(printed, "word")
        shares = F.step_shares(F.coastline(flow, i))
        assert row[i][0] == pytest.approx(shares["word"], **near)


def test_a_missing_file_is_one_sentence(tmp_path):
    process = run_flow(tmp_path / "none.npz")
    assert process.returncode == 2
    assert re.fullmatch(r".*flow.*: .*none\.npz does not exist.*\n", process.stderr)


@pytest.mark.parametrize(
    "variant, text, reason",
    [
        ({"rank": 2}, TEXT, "has no flow"),
        ({"mixer": "attention", "offsets": None}, TEXT, "has no flow"),
        ({}, "short", "of at least 20 characters"),
        ({}, TEXT[:50] + "€#", r"never saw '#', '\\u20ac', which this text has"),
        ({"taps": False}, "1" * 50, "half of this text or more spans"),
    ],
)
def test_what_has_no_flow_is_refused(tmp_path, variant, text, reason):
    path = save(tmp_path / "best.npz", **variant)
    with pytest.raises(G.UserError, match=reason):
        F.measure(path, text)


def test_the_text_held_out_begins_with_a_paragraph(tmp_path):
    data = tmp_path / "text.txt"
    last = "second paragraph" + "y" * 974
    data.write_text("x" * 9000 + "first\n\n   " + last, encoding="utf-8")
    for where in (str(data), [str(data)], str(tmp_path)):
        extra = {"settings": {"data": where}}
        assert F.text_of_run("c", extra) == last
    extra["text_sha256"] = "0"
    with pytest.raises(G.UserError, match=r"it has changed since\); give one with --file"):
        F.text_of_run("c", extra)


@pytest.mark.parametrize("settings", [3, {}, {"data": ["no"]}, {"data": "\0"}])
def test_a_text_that_is_gone_is_asked_for(settings):
    with pytest.raises(G.UserError, match=r"here \(there is no file .*\); give one with --file"):
        F.text_of_run("c", {"settings": settings})
