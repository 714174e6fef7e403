"""The geometry of Gr(2, r) that flow.py measures with, and the program as its users meet it."""

import csv
import math
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from kill_and_resume import ROOT, TEXT

import grassmann as G
from flow import (
    KINDS,
    Flow,
    between_means,
    coastline,
    distance,
    explained,
    flat_map,
    follow,
    held_out,
    invariants,
    kinds,
    look,
    mean_plane,
    nearest_plane,
    plane,
    principal_angles,
    slope,
    states,
    steps_by_kind,
    turning_angles,
)
from text import encode, vocabulary

R = 7
VOCAB = vocabulary(TEXT)
PICTURES = ["coastline.png", "gate.png", "map.png", "path.png"]
TABLES = ["characters.csv", "coastline.csv", "invariants.csv", "kinds.csv"]


def planes(rng, *shape, r=R):
    return plane(*rng.standard_normal((2, *shape, r)))


def rotation(rng, r=R):
    return np.linalg.qr(rng.standard_normal((r, r)))[0]


def geodesic(rng, angles, r=R):
    """Planes on one shortest path: turned by `angles` (T) times (0.6, 0.8) from one plane towards another at right
    angles to it."""
    Q = rotation(rng, r)
    turn = np.multiply.outer(angles, [0.6, 0.8])[:, None, :]  # (T, 1, 2)
    return np.cos(turn) * Q[:, :2] + np.sin(turn) * Q[:, 2:4]


# ---- planes and distances -----------------------------------------------------------------------------


def test_a_plane_is_an_orthonormal_basis_of_what_it_spans(rng):
    u, v = rng.standard_normal((2, 50, R))
    for factor in (1e-12, 1, 1e12):
        A = plane(u, factor * (v - 1000 * u))
        assert np.allclose(A.swapaxes(1, 2) @ A, np.eye(2), atol=1e-14)
        for x in (u, v):  # inside: projecting changes nothing
            assert np.allclose((A @ (A.swapaxes(1, 2) @ x[..., None]))[..., 0], x, atol=1e-9)


def test_no_plane_is_nan_and_stays_nan(rng):
    u, v = rng.standard_normal((2, R))
    none = [plane(u, 0 * u), plane(0 * u, u), plane(u, -3 * u), plane(u, u + 1e-7 * v)]
    assert np.isnan(none).all() and np.isfinite(plane(u, u + 1e-3 * v)).all()
    A = plane(u, v)
    assert np.isnan(distance(np.stack([A, *none]), A)).tolist() == [False, True, True, True, True]
    assert np.isnan(nearest_plane(np.zeros(R * (R - 1) // 2))).all()


def test_the_same_plane_is_at_distance_zero_whatever_its_basis_and_sign(rng):
    u, v = rng.standard_normal((2, 1000, R))
    a, b, c, d = rng.standard_normal((4, 1000, 1))
    A = plane(u, v)
    for other in (plane(v, u), plane(-u, v), plane(a * u + b * v, c * u + d * v), A[..., ::-1], -A):
        assert distance(A, other).max() < 1e-11
    assert distance(A, A).max() < 1e-15


def test_small_angles_and_right_ones_are_exact(rng):
    Q = rotation(rng)
    for first, second in ((0, 1e-9), (1e-12, 1e-4), (0.3, 1.2), (0, np.pi / 2), (np.pi / 2 - 1e-9, np.pi / 2)):
        angles = np.array([first, second])
        turned = np.cos(angles) * Q[:, :2] + np.sin(angles) * Q[:, 2:4]
        assert np.allclose(principal_angles(Q[:, :2], turned), angles, rtol=1e-9, atol=2e-15)
        assert np.isclose(distance(Q[:, :2], turned), math.hypot(first, second), rtol=1e-9, atol=2e-15)


def test_distance_is_symmetric_and_obeys_the_triangle_inequality(rng):
    A, B = planes(rng, 2000), planes(rng, 2000)
    C = np.concatenate([planes(rng, 1000), plane(*(A + 0.1 * B)[1000:].transpose(2, 0, 1))])
    assert np.allclose(distance(A, B), distance(B, A), atol=1e-14)
    assert (distance(A, B) <= distance(A, C) + distance(C, B) + 1e-14).all()
    assert distance(A, B).max() <= math.pi / math.sqrt(2) and distance(A, B).min() > 0


def test_distance_does_not_change_with_a_rotation(rng):
    A, B, Q = planes(rng, 500), planes(rng, 500), rotation(rng)
    assert np.allclose(distance(Q @ A, Q @ B), distance(A, B), atol=1e-13)


def test_principal_angles_are_scipys(rng):
    linalg = pytest.importorskip("scipy.linalg")
    A, B = planes(rng, 100), planes(rng, 100)
    B[:50] = plane(*(A + 10.0 ** -rng.uniform(0, 12, (100, 1, 1)) * B)[:50].transpose(2, 0, 1))
    theirs = [linalg.subspace_angles(a, b)[::-1] for a, b in zip(A, B, strict=True)]
    assert np.allclose(principal_angles(A, B), theirs, rtol=1e-9, atol=1e-15)


def test_the_nearest_plane_of_a_plane_is_itself(rng):
    u, v = rng.standard_normal((2, 200, R))
    for scale in (1e-30, 1, 1e30):
        assert distance(nearest_plane(G.plucker(scale * u, v)), plane(u, v)).max() < 1e-7


@pytest.mark.parametrize("r", [2, 3, 4, 7, 12])
def test_the_nearest_plane_beats_random_and_neighbouring_ones(rng, r):
    p = rng.standard_normal(r * (r - 1) // 2)
    best = nearest_plane(p)
    near = plane(*np.moveaxis(best + 0.01 * rng.standard_normal((3000, r, 2)), -1, 0))
    u, v = np.moveaxis(np.concatenate([best[None], planes(rng, 3000, r=r), near]), -1, 0)
    overlap = np.abs(G.plucker(u, v) @ p)
    assert overlap[0] >= overlap.max() - 1e-12


def test_no_plane_has_no_mean():
    with pytest.raises(ValueError, match="no plane"):
        mean_plane(np.full((3, 4, 2), np.nan))


def test_the_mean_plane_of_copies_and_of_planes_around_one(rng):
    A = planes(rng)
    turned = np.stack([A @ rotation(rng, 2) for _ in range(20)] + [np.full((R, 2), np.nan)])
    mean, weight = mean_plane(turned)
    assert distance(mean, A) < 1e-7 and np.isclose(weight, 1)
    path = geodesic(rng, np.array([0, 0.4, -0.4, 0.1, -0.1]))
    middle, around = path[0], path[1:]
    assert distance(mean_plane(around)[0], middle) < 1e-7
    Q = rotation(rng)
    assert distance(mean_plane(Q @ around)[0], Q @ middle) < 1e-7
    assert np.allclose(
        between_means(np.stack([turned[:4], around]), np.stack([around, around])), [distance(A, middle), 0], atol=1e-7
    )
    everywhere = planes(rng, 20000)
    assert np.isclose(mean_plane(everywhere)[1], 2 / R, atol=0.01)


def test_a_shortest_path_does_not_turn_and_its_way_back_turns_by_pi(rng):
    path = geodesic(rng, np.array([0, 0.1, 0.15, 0.4, 0.1, 0.1]))
    assert np.allclose(turning_angles(path), [0, 0, np.pi, np.nan], atol=1e-6, equal_nan=True)
    one, two, three = np.eye(6).reshape(6, 3, 2).transpose(1, 0, 2)  # at right angles to each other
    assert np.allclose(turning_angles(np.stack([one, two, three])), 2 * np.pi / 3)


# ---- paths --------------------------------------------------------------------------------------------


def flow_of(path, text=None):
    """The flow of one layer through these planes (T, r, 2)."""
    z, s = path.transpose(2, 0, 1)[:, None]
    return Flow(text or "ab " * (len(path) // 3) + "c" * (len(path) % 3), z, s, np.full((1, len(path)), 0.5))


def by_ruler(rows, key):
    return np.array([row[key] for row in rows if row["scale"] == "ruler"])


def test_the_length_of_a_shortest_path_does_not_depend_on_the_ruler(rng):
    rows = coastline(flow_of(geodesic(rng, np.linspace(0, 1, 1025))), 0)
    assert by_ruler(rows, "size").tolist() == [1, 2, 4, 8, 16]
    assert np.allclose(by_ruler(rows, "length"), 1 / 1024) and by_ruler(rows, "steps")[0] == 1024
    assert np.allclose(by_ruler(rows, "noise"), 1 / 3, atol=0.02)  # the mean distance of two points of a line
    assert abs(rows[0]["slope"]) < 1e-6


def test_the_length_of_noise_falls_as_the_ruler_grows_and_that_of_a_random_walk_less(rng):
    noise = coastline(flow_of(planes(rng, 4096, r=16)), 0)
    assert abs(noise[0]["slope"] + 1) < 0.01
    assert all(abs(row["step"] / row["noise"] - 1) < 0.05 for row in noise)
    walk = [np.eye(16)[:, :2]]
    for _ in range(4095):
        walk.append(np.linalg.qr(walk[-1] + 0.003 * rng.standard_normal((16, 2)))[0])
    assert abs(coastline(flow_of(np.stack(walk)), 0)[0]["slope"] + 0.5) < 0.05


def test_slope_is_that_of_the_rulers():
    rows = [{"scale": "ruler", "size": k, "length": 3 * k**-0.7} for k in (1, 2, 4)]
    assert np.isclose(slope([*rows, {"scale": "word", "size": 5, "length": 100}]), -0.7)
    assert np.isnan(slope([{"scale": "ruler", "size": k, "length": 0.0} for k in (1, 2, 4)]))


def test_a_span_has_the_plane_nearest_to_the_sum_of_its_bivectors(rng):
    text = "one two\nthree  four five\n" * 4
    flow = flow_of(planes(rng, len(text)), text)
    rows = coastline(flow, 0)
    p = G.plucker(flow.z[0], flow.s[0])
    for scale, pattern in (("word", r"[a-z]+"), ("line", r".+")):
        path = nearest_plane(np.stack([p[slice(*m.span())].sum(0) for m in re.finditer(pattern, text)]))
        (row,) = [row for row in rows if row["scale"] == scale]
        assert np.isclose(row["step"], distance(path[1:], path[:-1]).mean())
        assert np.isclose(row["size"], len(text) / len(path)) and row["steps"] == len(path) - 1
    (row,) = [row for row in rows if row["scale"] == "block"]
    assert np.isclose(
        row["step"],
        distance(*(nearest_plane(p.reshape(-1, 4, p.shape[1]).sum(1))[a] for a in (slice(1, None), slice(-1)))).mean(),
    )


def test_the_map_keeps_distances_when_two_dimensions_are_enough(rng):
    angles = rng.uniform(0, 0.5, 30)
    Q = rotation(rng)
    path = np.stack(
        [
            np.broadcast_to(Q[:, 0], (30, R)),
            np.multiply.outer(np.cos(angles), Q[:, 1]) + np.multiply.outer(np.sin(angles), Q[:, 2]),
        ],
        -1,
    )
    path[3] = np.nan
    points, share = flat_map(path)
    assert np.isclose(share, 1) and np.isnan(points[3]).all()
    chordal = np.linalg.norm(
        path[:, None] @ path.swapaxes(1, 2)[:, None] - (path @ path.swapaxes(1, 2))[None], axis=(2, 3)
    )
    assert np.allclose(np.linalg.norm(points[:, None] - points[None], axis=2), chordal, atol=1e-7, equal_nan=True)


def test_the_share_of_variance_that_labels_explain(rng):
    labels = np.repeat(np.arange(4), 500)
    centres = planes(rng, 4)
    assert np.isclose(explained(centres[labels], labels), 1)
    assert 0 <= explained(planes(rng, 2000), labels) < 0.01
    A = planes(rng, 2000)
    mixed = np.concatenate([centres[labels[:1000]], A[1000:]])
    projectors = (mixed @ mixed.swapaxes(1, 2)).reshape(2000, -1)
    within = sum(projectors[labels == k].var(0).sum() for k in range(4)) / 4
    assert np.isclose(explained(mixed, labels), 1 - within / projectors.var(0).sum())


def test_kinds_of_characters():
    text = "An old\n  man, 3x\n"
    word = ["word start", "in a word", "in a word"]
    first, second = ["capital", "in a word", "space", *word, "line end"], ["space", "space", *word, "punctuation"]
    expected = [*first, *second, "space", "word start", "in a word", "line end"]
    assert kinds(text).tolist() == expected and set(KINDS) == set(expected)


# ---- the flow of a model ------------------------------------------------------------------------------

VARIANTS = {
    "prenorm": {},
    "paper": {"block": "paper", "taps": False, "normalize": True, "positions": True},
    "average": {"taps": False, "offsets": ((1, 2), (1, 3))},
}


def model(**variant):
    how = {"vocab_size": len(VOCAB), "context": 8, "n_layer": 2, "d_model": 8, "rank": 4, "offsets": ((1, 2), (3,))}
    config = G.Config(**(how | variant))
    params = G.init_params(config, 3)
    return {
        name: value + 0.1 * np.sin(np.arange(value.size).reshape(value.shape)).astype(value.dtype)
        for name, value in params.items()
    }, config


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_states_are_those_that_the_model_computes(variant, monkeypatch):
    """z, s as the wedge meets them, and α as the gate's output tells: out = α h + (1-α) g."""
    params, config = model(**variant)
    params = {name: value.astype(np.float64) for name, value in params.items()}
    tokens = encode(TEXT[:8], VOCAB)
    found = states(params, config, tokens)
    seen, wedge, gate = [], G.plucker_forward, G.gate_forward

    def watched_wedge(u, v):
        seen.append([u[0], v[0]])
        return wedge(u, v)

    def watched_gate(h, g, W, b):
        out, cache = gate(h, g, W, b)
        seen[-1].append(((out - g) / (h - g))[0].mean(1))
        return out, cache

    monkeypatch.setattr(G, "plucker_forward", watched_wedge)
    monkeypatch.setattr(G, "gate_forward", watched_gate)
    G.forward(params, config, tokens[None])
    assert len(seen) == config.n_layer
    for ours, theirs in zip(found, zip(*seen, strict=True), strict=True):
        assert np.allclose(ours, np.stack(theirs))


@pytest.mark.parametrize("variant", ["prenorm", "average"])
def test_a_long_text_is_read_in_pieces_as_if_in_one(variant):
    params, config = model(**VARIANTS[variant])
    text = TEXT[:2500]
    flow, tokens = follow(params, config, text, VOCAB), encode(text, VOCAB)
    for ours, whole in zip((flow.z, flow.s, flow.gate), states(params, config, tokens), strict=True):
        assert ours.shape[:2] == (config.n_layer, 2500) and np.allclose(ours, whole, atol=1e-5)


def test_with_positions_every_token_sees_half_a_context_back():
    params, config = model(**VARIANTS["paper"])
    flow, tokens = follow(params, config, TEXT[:21], VOCAB), encode(TEXT[:21], VOCAB)
    for t, start in ((0, 0), (3, 0), (4, 0), (7, 0), (8, 4), (11, 4), (20, 16)):
        z, _, gate = states(params, config, tokens[start : start + 8])
        assert np.allclose(flow.z[:, t], z[:, t - start], atol=1e-5), t
        assert np.allclose(flow.gate[:, t], gate[:, t - start], atol=1e-5)


def test_the_first_token_has_no_plane_and_steps_are_distances():
    params, config = model()
    flow = follow(params, config, TEXT[:200], VOCAB)
    missing = ~np.isfinite(flow.planes).all((2, 3))
    assert missing.sum(1).tolist() == [1, 3]  # as many as the smallest offset of the layer
    assert np.isnan(flow.step[:, 0]).all() and np.isnan(flow.step[1, :4]).all()
    assert np.allclose(flow.step[0, 2:], distance(flow.planes[0, 1:-1], flow.planes[0, 2:]))
    kind = kinds(flow.text)
    assert np.isclose(steps_by_kind(flow)["space"][1], np.nanmean(flow.step[1, kind == "space"]))


def test_a_text_without_planes_is_refused():
    params, config = model(taps=False, offsets=((1,), (1,)))
    with pytest.raises(ValueError, match="span no plane"):
        follow(params, config, "1" * 50, VOCAB)


def test_invariants_do_not_change_with_a_rotation(rng):
    params, config = model()
    flow = follow(params, config, TEXT[:400], VOCAB)
    Q = rotation(rng, 4)
    turned = Flow(flow.text, flow.z @ Q, -3 * flow.s @ Q + flow.z @ Q, flow.gate)
    one, other = invariants(flow), invariants(turned)
    assert one.keys() == other.keys()
    for name in one:
        assert np.allclose(one[name], other[name], rtol=1e-6, equal_nan=True), name
    assert np.isnan(one["stability: agreement with the layer before"]).tolist() == [True, False]
    same = invariants(
        Flow(flow.text, flow.z[[0, 0]] @ np.stack([Q, np.eye(4)]), flow.s[[0, 0]] @ np.stack([Q, np.eye(4)]), flow.gate)
    )
    assert np.isclose(same["stability: agreement with the layer before"][1], 1)


# ---- the program --------------------------------------------------------------------------------------


def run_flow(*args, **how):
    command = [sys.executable, str(ROOT / "flow.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, **how)


def refused(*args, **how):
    """The one line with which the program stops. It must not be a traceback."""
    process = run_flow(*args, **how)
    assert process.returncode == 2 and process.stdout == "", process
    assert re.fullmatch(r"flow\.py: .+\n", process.stderr), process.stderr
    return process.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model of TEXT, and the text beside it."""
    folder = tmp_path_factory.mktemp("flow")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    params, config = model()
    G.save_checkpoint(folder / "best.npz", params, config, vocab=VOCAB, settings={"data": str(folder / "text.txt")})
    return folder / "best.npz"


@pytest.fixture(scope="module")
def drawn(checkpoint):
    """What the program prints, and where it writes."""
    process = run_flow(checkpoint)
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout, checkpoint.parent / "flow"


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_program_draws_all_pictures(drawn):
    printed, out = drawn
    assert sorted(file.name for file in out.iterdir()) == sorted(PICTURES + TABLES)
    for name in PICTURES:
        png = (out / name).read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", png[16:20])[0] == 1660 and len(png) > 10000
        assert name in printed


def test_the_tables_hold_what_the_functions_return(drawn, checkpoint):
    """Of the text that was held out, the last tenth."""
    printed, out = drawn
    params, config, _ = G.load_checkpoint(checkpoint)
    flow = follow(params, config, TEXT[-(len(TEXT) // 10) :].lstrip(), VOCAB)
    rows = table(out / "characters.csv")
    assert "".join(row["character"] for row in rows) == 2 * flow.text
    for key, values in (("step", flow.step), ("gate", flow.gate)):
        assert np.array_equal([float(row[key]) for row in rows], values.ravel(), equal_nan=True)
    points = flat_map(flow.planes[1][:80])[0]
    shown = rows[len(flow.text) :][:80]
    assert np.array_equal([[float(row["map_x"]), float(row["map_y"])] for row in shown], points, equal_nan=True)
    assert rows[80]["map_x"] == ""
    lengths = [row for row in table(out / "coastline.csv") if row["flow"] == "trained"]
    for row, known in zip(lengths, [row for i in (0, 1) for row in coastline(flow, i)], strict=True):
        assert [row["scale"], *(float(row[key]) for key in list(known)[1:])] == list(known.values())
    assert {row["flow"] for row in table(out / "coastline.csv")} == {"trained", "untrained", "trained, shuffled text"}
    means = {(row["model"], row["layer"], row["kind"]): float(row["step"]) for row in table(out / "kinds.csv")}
    assert means["trained", "2", "space"] == steps_by_kind(flow)["space"][1]
    untrained = follow(G.init_params(config), config, flow.text, VOCAB)
    assert means["untrained", "2", "space"] == steps_by_kind(untrained)["space"][1]
    known = invariants(flow)
    for row in table(out / "invariants.csv"):
        value = known.get(row["invariant"], [np.nan] * 2)[int(row["layer"]) - 1]
        assert float(row["text"]) == value or np.isnan(value)
        assert row["invariant"] in printed
    shuffled = "".join(flow.text[t] for t in np.random.default_rng(0).permutation(len(flow.text)))
    steps = [known["mean step"][1], invariants(follow(params, config, shuffled, VOCAB))["mean step"][1]]
    assert f"| {steps[0]:.3f} / {steps[1]:.3f} |" in printed and steps[0] != steps[1]


def test_two_texts_side_by_side(checkpoint, tmp_path, capsys):
    one, other = TEXT[:300], TEXT[-300:]
    (tmp_path / "other.txt").write_text(other, encoding="utf-8")
    out = tmp_path / "new" / "folder"
    look(checkpoint, [one, tmp_path / "other.txt"], out)
    assert "| text / second text |" in capsys.readouterr().out
    params, config, _ = G.load_checkpoint(checkpoint)
    flows = [follow(params, config, text, VOCAB) for text in (one, other)]
    rows = table(out / "invariants.csv")
    for key, flow in zip(("text", "other"), flows, strict=True):
        found = [float(row[key]) for row in rows if row["invariant"] == "mean step"]
        assert found == invariants(flow)["mean step"]
    found = [row for row in rows if row["invariant"].startswith("mean planes")]
    assert [float(row["text"]) for row in found] == between_means(flows[0].planes, flows[1].planes)
    halves = between_means(flows[0].planes[:, :150], flows[0].planes[:, 150:])
    assert [float(row["other"]) for row in found] == halves


def test_strange_texts_are_drawn(tmp_path):
    """What no font has, what is a sign of markup, no words and lines to speak of."""
    strange = "$x^2$ \\frac{ \t\0\ud800 \u4e2d \u200b %s _{^ $$ \n\r"
    vocab = vocabulary(strange)
    params, config = model(vocab_size=len(vocab))
    G.save_checkpoint(tmp_path / "strange.npz", params, config, vocab=vocab)
    (tmp_path / "strange.txt").write_bytes(strange.encode("utf-8", "surrogatepass"))
    process = run_flow(tmp_path / "strange.npz", "--file", tmp_path / "strange.txt")
    assert (process.returncode, process.stderr) == (0, "")
    assert len(list((tmp_path / "flow").iterdir())) == 8
    rows = [row for row in table(tmp_path / "flow" / "coastline.csv") if row["size"] == "1"]
    assert {row["steps"] for row in rows if row["layer"] == "1"} == {str(len(strange) - 2)}  # shuffled: as many


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as plain_output does
def test_a_path_that_stands_still_is_drawn(checkpoint, tmp_path):
    look(checkpoint, ["1" * 40], tmp_path)
    assert len(list(tmp_path.iterdir())) == 8


def test_refusals(checkpoint, tmp_path):
    assert "does not exist; train_char.py writes it" in refused(tmp_path / "none.npz")
    assert "two texts at most" in refused(checkpoint, *["--text", TEXT[:50]] * 3)
    (tmp_path / "file").write_text("")
    assert "file: File exists" in refused(checkpoint, "--text", TEXT[:50], "--out", tmp_path / "file")
    for text, reason in (
        ("12 times 1 is 12", "a text of 16 characters is too short to measure, it needs 20"),
        (TEXT[:50] + "#", "not in the vocabulary: '#'"),
        (tmp_path / "none.txt", "cannot read .*none.txt"),
    ):
        with pytest.raises(ValueError, match=reason):
            look(checkpoint, [text], tmp_path / "out")


def test_models_without_a_flow_are_refused(tmp_path):
    for name, variant, reason in (
        ("attention", {"mixer": "attention"}, "is a Transformer, whose tokens span no planes"),
        ("flat", {"rank": 2}, "has rank 2"),
        ("nameless", {}, "has no vocabulary"),
    ):
        params, config = model(**variant)
        G.save_checkpoint(tmp_path / name, params, config, **({"vocab": VOCAB} if variant else {}))
        with pytest.raises(ValueError, match=reason):
            look(tmp_path / name, [TEXT[:50]], tmp_path)
    with pytest.raises(ValueError, match="file is not a usable checkpoint"):
        (tmp_path / "file").write_text("no checkpoint")
        look(tmp_path / "file", [TEXT[:50]], tmp_path)


def test_the_text_held_out_is_found_or_asked_for(tmp_path):
    (tmp_path / "text.txt").write_text("x" * 9000 + "first\n\n   second paragraph" + "y" * 974, encoding="utf-8")
    assert held_out("c", {"settings": {"data": str(tmp_path / "text.txt")}}) == "second paragraph" + "y" * 974
    for extra in ({}, {"settings": 3}, {"settings": {}}, {"settings": {"data": 5}}):
        with pytest.raises(ValueError, match=r"c does not say .* give a text with --text or --file"):
            held_out("c", extra)
    with pytest.raises(ValueError, match=r"cannot read .*none\.txt.*; give a text with --text or --file"):
        held_out("c", {"settings": {"data": str(tmp_path / "none.txt")}})
