"""Look at the flow: the planes that a text passes through, as a trained model sees it.

  python flow.py                                               out/best.npz, on the text held out from its training
  python flow.py out/best.npz --text "To be, or not to be, that is the question."
  python flow.py out/best.npz --file one.txt --file two.txt    two texts, side by side in the table

In each layer a token and its partner span a plane, a point of the Grassmannian Gr(2, r); a text is a path of such
points. Drawn are its speed (path), a view of it in two dimensions (map), the gate, and its length at different
scales (coastline); a table of invariants is printed. All numbers are written as CSV too.

Where a token and its partner span no plane (the first token has no partner) the path has a gap: nan in the CSV
files, left out of all means. The first 80 characters are drawn, the first 16,384 measured. A model with positions
reads text beyond its context in windows, each begun half a context after the last.
"""

import cpu  # noqa: F401, I001  (before NumPy)

import csv
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap

import grassmann as G
from cli import Parser, load_trained, plain_output, short_errors
from figures import BLUE, INK, ORANGE, STYLE
from grassmann import Array, Config, Params
from text import encode, load_text

SHOWN, MEASURED, LEAST = 80, 16384, 20  # characters drawn, measured at most, needed at least
KINDS = ("in a word", "word start", "capital", "punctuation", "space", "line end")
COLOURS = LinearSegmentedColormap.from_list("flow", [BLUE, "#a06cc4", ORANGE])  # of layers, and of positions


# ---- planes: the geometry of Gr(2, r) -----------------------------------------------------------------
# A plane is an orthonormal basis (r, 2), and nothing depends on which. nan stands for no plane.


def plane(u: Array, v: Array, parallel: float = 1e-5) -> Array:
    """An orthonormal basis of the plane that u and v span: (..., r), (..., r) -> (..., r, 2).

    nan where there is none: a zero vector, or an angle whose sine is at most `parallel` (as in `unit_area_forward`).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        a, v = (w / np.linalg.norm(w, axis=-1, keepdims=True) for w in (u, v))
        b = v - G.dot(a, v) * a
        sine = np.linalg.norm(b, axis=-1, keepdims=True)
        b = b / sine
        b = b - G.dot(a, b) * a  # once more, and they are orthogonal to the last bit
        b = b / np.linalg.norm(b, axis=-1, keepdims=True)
    return np.where((sine > parallel)[..., None], np.stack([a, b], -1), np.nan)


def known(planes: Array) -> Array:
    """Which of them are planes: (..., r, 2) -> (...)."""
    return np.isfinite(planes).all((-2, -1))


def singular_values(M: Array) -> Array:
    """Of matrices (..., k, 2), descending -> (..., 2); nan for one with a nan, where LAPACK would refuse them all."""
    values = np.full((*M.shape[:-2], 2), np.nan)
    values[known(M)] = np.linalg.svd(M[known(M)], compute_uv=False)
    return values


def principal_angles(A: Array, B: Array) -> Array:
    """The two angles between planes A and B, ascending, from 0 to π/2: (..., r, 2), (..., r, 2) -> (..., 2).

    Their cosines are the singular values of AᵀB, their sines those of B - A AᵀB, the part of B outside A. A cosine
    says little about a small angle and a sine little about a right one, so both are used (Björck and Golub 1973).
    """
    inside = np.swapaxes(A, -1, -2) @ B
    return np.arctan2(singular_values(B - A @ inside)[..., ::-1], singular_values(inside))


def distance(A: Array, B: Array) -> Array:
    """Length of the shortest path on Gr(2, r) from A to B, sqrt(θ₁² + θ₂²) <= π/√2: (..., r, 2) twice -> (...)."""
    return np.linalg.norm(principal_angles(A, B), axis=-1)


def nearest_plane(p: Array) -> Array:
    """The plane nearest to a bivector, which need not be a plane's: (..., n) -> (..., r, 2); nan for p = 0.

    Let A be the antisymmetric matrix with p above the diagonal. The inner product of p with a unit bivector x ∧ y is
    xᵀ A y, and no more than the largest singular value of A. Singular values come in equal pairs; the vectors of the
    first pair, eigenvectors of A² = -AᵀA, span the plane.
    """
    r = math.isqrt(2 * p.shape[-1]) + 1  # n = r(r-1)/2
    i, j = G.pairs(r)
    A = np.zeros((*p.shape[:-1], r, r))
    A[..., i, j], A[..., j, i] = p, -p
    return np.where(p.any(-1)[..., None, None], np.linalg.eigh(A @ A)[1][..., :2], np.nan)


def sum_of_projectors(planes: Array) -> Array:
    """Σ A Aᵀ: (T, r, 2) -> (r, r). A projector knows neither the basis of its plane nor its sign."""
    X = np.concatenate(planes, axis=1)  # (r, 2T)
    return X @ X.T


def mean_plane(planes: Array) -> tuple[Array, float]:
    """The extrinsic mean of planes (T, r, 2): the plane (r, 2) whose projector is nearest to the mean projector.

    It is spanned by that one's two leading eigenvectors. Second comes their eigenvalues' mean, the weight of the
    mean plane: 1 if all planes are the same, 2/r if they point everywhere alike. Raises ValueError without a plane.
    """
    planes = planes[known(planes)]
    if not len(planes):
        raise ValueError("a part of this text spans no plane at all; give a more varied one")
    values, vectors = np.linalg.eigh(sum_of_projectors(planes) / len(planes))
    return vectors[:, -2:], values[-2:].mean()


def turning_angles(path: Array) -> Array:
    """By how much a path turns at each plane but the first and last, 0 straight on, π back: (T, r, 2) -> (T-2).

    It is π less the angle that a triangle with these three distances has on paper (Menger's way to speak of
    curvature where there are only distances). Three equidistant planes turn by 2π/3. nan beside a step below 1e-4:
    at rest, float32 states move by their rounding.
    """
    a, b, c = distance(path[:-2], path[1:-1]), distance(path[1:-1], path[2:]), distance(path[:-2], path[2:])
    product = np.where(np.minimum(a, b) > 1e-4, 2 * a * b, np.nan)
    return math.pi - np.arccos(np.clip((a**2 + b**2 - c**2) / product, -1, 1))


# ---- the flow of a text -------------------------------------------------------------------------------


@dataclass
class Flow:
    """What a model with N layers makes of a text of T characters. Raises ValueError if few of them have planes."""

    text: str
    z: Array  # (N, T, r)  reduced states
    s: Array  # (N, T, r)  their partners
    gate: Array  # (N, T)  α, its mean over the width: 1 keeps the token's state, 0 takes the plane's geometry

    def __post_init__(self):
        self.planes = plane(self.z, self.s)  # (N, T, r, 2)
        if 2 * known(self.planes).sum(1).min() <= len(self.text):
            raise ValueError("at half of this text a token and its partner span no plane; give a more varied one")
        self.step = np.full(self.gate.shape, np.nan)  # (N, T)  distance from the plane before
        self.step[:, 1:] = distance(self.planes[:, :-1], self.planes[:, 1:])


def follow(params: Params, config: Config, text: str, vocab: list[int]) -> Flow:
    """Read a text, in pieces that begin so early that the model sees all it can (with positions: half a context)."""
    tokens = encode(text, vocab)
    size, before = 1024, sum(map(max, config.offsets))  # so far back does a token of the last layer see
    if config.positions:
        size, before = config.context - config.context // 2, config.context // 2
    pieces = []
    for start in range(0, len(tokens), size):
        first = max(0, start - before)
        pieces.append([a[:, start - first :] for a in states(params, config, tokens[first : start + size])])
    return Flow(text, *(np.concatenate(arrays, axis=1) for arrays in zip(*pieces, strict=True)))


def states(params: Params, config: Config, tokens: Array) -> tuple[Array, ...]:
    """z, s and gate of `Flow`, in float64: the steps of `mix_forward`, in the blocks of `model_forward`."""
    h = params["E"][tokens[None]]  # (1, T, d)
    if config.positions:
        h = h + params["P"][: len(tokens)]
    block_forward = G.prenorm_block_forward if config.block == "prenorm" else G.paper_block_forward
    seen = []
    for i in range(config.n_layer):
        w = G.sub(params, f"blocks.{i}.")
        a = G.layernorm_forward(h, w["ln1.w"], w["ln1.b"])[0] if config.block == "prenorm" else h
        z = G.linear_forward(a, w["mix.W_red"], w["mix.b_red"])[0]
        s = G.partner_forward(z, w.get("mix.taps"), config.offsets[i], config.normalize)[0]
        g = G.linear_forward(G.plucker(z, s), w["mix.W_plu"], w["mix.b_plu"])[0]
        logit = G.linear_forward(np.concatenate([a, g], -1), w["mix.W_gate"], w["mix.b_gate"])[0]
        alpha = 0.5 + 0.5 * np.tanh(0.5 * logit)  # the sigmoid
        seen.append((z[0], s[0], alpha[0].mean(-1)))
        h = block_forward(h, w, config, i)[0]
    return tuple(np.stack(arrays).astype(np.float64) for arrays in zip(*seen, strict=True))


def kinds(text: str) -> Array:
    """Which of KINDS each character is."""

    def kind(before: str, c: str) -> str:
        if c.isspace():
            return "line end" if c == "\n" else "space"
        if not c.isalnum():
            return "punctuation"
        return "capital" if c.isupper() else "in a word" if before.isalnum() else "word start"

    return np.array([kind(before, c) for before, c in zip(" " + text, text, strict=False)])


def steps_by_kind(flow: Flow) -> dict[str, Array]:
    """Mean step per layer (N) to each kind of character that the text has."""
    kind = kinds(flow.text)[1:]
    return {k: np.nanmean(flow.step[:, 1:][:, kind == k], axis=1) for k in KINDS if (kind == k).any()}


def flat_map(planes: Array) -> tuple[Array, float]:
    """Planes (T, r, 2) -> points (T, 2) and the share of the variance that they show.

    Principal components of the projectors. Only their inner products are needed, tr(A Aᵀ B Bᵀ) = |AᵀB|²: centre that
    T x T table and take its two leading eigenvectors.
    """
    points, A = np.full((len(planes), 2), np.nan), planes[known(planes)]
    table = np.square(np.einsum("tia,uib->tuab", A, A)).sum((2, 3))
    table = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    values, vectors = np.linalg.eigh(table)
    points[known(planes)] = vectors[:, :-3:-1] * np.sqrt(np.maximum(values[:-3:-1], 0))
    return points, values[-2:].sum() / values.sum()


def coastline(flow: Flow, layer: int) -> list[dict]:
    """The path of one layer in steps of different sizes, a dict for each.

    scale     "ruler": every k-th plane, k = 1, 2, 4, …; "block", "word", "line": one plane for each block of
              k = 4, 16, … characters, each word, each line: the plane nearest to the sum of its bivectors
    size      characters per step          steps     how many
    step      their mean, in radians       length    of the path, step / size: radians per character
    noise     mean distance of two of these planes drawn at random: the step if their order did not matter
    slope     of all lengths by ruler
    """
    T, rng = len(flow.text), np.random.default_rng(0)
    bivectors = G.plucker(flow.z[layer], flow.s[layer])  # (T, n)
    rows = []

    def measure(scale: str, size: float, path: Array) -> None:
        steps = distance(path[:-1], path[1:])
        step, count = np.nanmean(steps), np.isfinite(steps).sum()
        i, further = rng.integers(len(path), size=4000), rng.integers(1, len(path), size=4000)
        noise = np.nanmean(distance(path[i], path[(i + further) % len(path)]))
        rows.append({"scale": scale, "size": size, "steps": count, "step": step, "length": step / size, "noise": noise})

    def spans(bounds: Iterable[tuple[int, int]]) -> Array:
        return nearest_plane(np.stack([bivectors[start:end].sum(0) for start, end in bounds]))

    rulers = [2**k for k in range(20) if 2**k <= max(4, T // 64)]
    for k in rulers:
        measure("ruler", k, flow.planes[layer, ::k])
    for k in rulers[2::2]:
        measure("block", k, spans((start, start + k) for start in range(0, T - k + 1, k)))
    for scale, pattern in (("word", r"\S+"), ("line", r"[^\n]+")):
        bounds = [found.span() for found in re.finditer(pattern, flow.text)]
        if len(bounds) > 4:
            measure(scale, T / len(bounds), spans(bounds))
    return [row | {"slope": slope(rows)} for row in rows]


def slope(rows: list[dict]) -> float:
    """Of length against ruler, on log-log axes: 0 for a smooth path, -1/2 for a random walk, -1 for noise."""
    rulers = [(row["size"], row["length"]) for row in rows if row["scale"] == "ruler" and row["length"] > 0]
    return np.polyfit(*np.log(rulers).T, 1)[0] if len(rulers) > 1 else np.nan


def explained(planes: Array, labels: Array) -> float:
    """Share of the variance of the projectors of planes (T, r, 2) that lies between labels (T), not within one."""

    def weight(chosen: Array) -> float:  # that of their mean, |Σ A Aᵀ / T|² T; a single projector has |A Aᵀ|² = 2
        return np.square(sum_of_projectors(chosen)).sum() / len(chosen)

    planes, labels = planes[known(planes)], labels[known(planes)]
    between = sum(weight(planes[labels == label]) for label in np.unique(labels))
    return (between - weight(planes)) / (2 * len(planes) - weight(planes))


def invariants(flow: Flow) -> dict[str, list[float]]:
    """Numbers of a text that do not change with a rotation of R^r: name -> one for each layer.

    Each layer has an R^r of its own, and a plane of one has no distance to a plane of another. What can be compared
    is which places of the text lie close together: the last row correlates, over 4,000 random pairs of places, their
    distance in this layer with that in the layer before.
    """
    i, j = np.random.default_rng(0).integers(len(flow.text), size=(2, 4000))
    characters, table, before = np.array([ord(c) for c in flow.text]), {}, None
    for planes, steps in zip(flow.planes, flow.step, strict=True):
        mean, weight = mean_plane(planes)
        turns, apart = turning_angles(planes), distance(planes[i], planes[j])
        both = (i != j) & np.isfinite(apart) & (before is None or np.isfinite(before))
        row = {
            "weight of the mean plane, 2/r to 1": weight,
            "spread: mean distance from the mean plane": np.nanmean(distance(planes, mean)),
            "mean step": np.nanmean(steps),
            "total curvature: sum of all turns": np.nansum(turns),
            "mean turn": np.nanmean(turns),
            "share of variance explained by the character": explained(planes, characters),
            "stability: agreement with the layer before": (
                np.nan if before is None else np.corrcoef(before[both], apart[both])[0, 1]
            ),
        }
        before = apart
        for name, value in row.items():
            table.setdefault(name, []).append(float(value))
    return table


def between_means(planes: Array, others: Array) -> list[float]:
    """Distance between the mean planes of two paths (N, T, r, 2), for each layer."""
    return [float(distance(mean_plane(a)[0], mean_plane(b)[0])) for a, b in zip(planes, others, strict=True)]


# ---- pictures, for white pages and black ones ---------------------------------------------------------


def visible(c: str) -> str:
    """A character as it is drawn."""
    return {"\n": "↵", " ": "␣"}.get(c, c if c.isprintable() else "□")


def under(axes, text: str) -> None:
    """The text as the labels of an axis."""
    axes.set_xticks(range(len(text)))
    labels = [" " if c == " " else visible(c) for c in text]
    axes.set_xticklabels(labels, family="monospace", size=8.5)
    axes.tick_params(axis="x", length=0, pad=2)
    axes.set_xlim(-0.5, len(text) - 0.5)


def draw_path(flow: Flow, by_kind: dict[str, dict], random: float):
    """The steps along the text, and their means by kind of character, trained and untrained."""
    n, shown = len(flow.step), flow.text[:SHOWN]
    figure, panels = plt.subplots(n, 2, figsize=(10, 0.4 + 1.35 * n), width_ratios=[5, 1], squeeze=False)
    for i, ((axes, side), colour) in enumerate(zip(panels, COLOURS(np.linspace(0, 1, n)), strict=True)):
        axes.plot(flow.step[i, :SHOWN], color=colour, lw=1.2, marker="o", ms=2.5)
        axes.axhline(random, color=INK, lw=0.8, ls=":")
        for t in np.flatnonzero(kinds(shown) == "line end"):
            axes.axvline(t + 0.5, color=INK, lw=0.5)
        under(axes, shown)
        axes.set_ylabel(f"layer {i + 1}\nstep (rad)")
        for steps, fill in zip(by_kind.values(), (colour, "none"), strict=True):
            side.scatter([step[i] for step in steps.values()], list(steps), s=22, facecolor=fill, edgecolor=colour)
        side.axvline(random, color=INK, lw=0.8, ls=":")
        side.tick_params(labelsize=8)
    panels[0, 0].set_title("distance from each plane to the next (dotted: random planes)", size=10)
    panels[0, 1].set_title("mean (○ untrained)", size=10)
    return figure


def draw_map(text: str, maps: list[tuple[Array, float]]):
    """The path in the two main directions of each layer."""
    columns = min(len(maps), 2)
    rows = -(-len(maps) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(10, 0.4 + 4 * rows), squeeze=False)
    for axes in panels.flat[len(maps) :]:
        axes.axis("off")
    how = {"family": "monospace", "weight": "bold", "ha": "center", "va": "center"}
    for i, (axes, (points, share)) in enumerate(zip(panels.flat, maps, strict=False)):
        axes.plot(*points.T, color=INK, lw=0.6, alpha=0.35)
        for (x, y), c, colour in zip(points, text, COLOURS(np.linspace(0, 1, len(points))), strict=False):
            if math.isfinite(x):
                axes.text(x, y, visible(c), color=colour, **how)
        axes.set_title(f"layer {i + 1} ({share:.0%} of the variance)", size=10)
        axes.set(xticks=[], yticks=[])
    figure.supxlabel("from the first character (blue) to the last (orange)", size=10, color=INK)
    return figure


def draw_gate(flow: Flow):
    """The mean gate of each layer, over the text."""
    shown = flow.gate[:, :SHOWN]
    figure, axes = plt.subplots(figsize=(10, 1.1 + 0.32 * len(shown)))
    far = np.abs(shown - 0.5).max()
    picture = axes.imshow(shown, aspect="auto", cmap="RdBu", vmin=0.5 - far, vmax=0.5 + far, interpolation="nearest")
    under(axes, flow.text[:SHOWN])
    axes.set_yticks(range(len(shown)))
    axes.set_yticklabels(f"layer {i + 1}" for i in range(len(shown)))
    figure.colorbar(picture, label="mean gate α", pad=0.01)
    axes.set_title("mean gate: blue keeps the token's own state, red takes the plane's geometry", size=10)
    return figure


def draw_coastline(measured: dict[str, list[list[dict]]], random: float):
    """Length against ruler above, steps against noise below, for several flows side by side."""
    how = {"sharex": True, "sharey": "row", "squeeze": False, "height_ratios": [1, 1.3]}
    figure, panels = plt.subplots(2, len(measured), figsize=(10, 7), **how)
    styles = {"ruler": ("-", 0, "every k-th plane"), "block": ("o--", 3.5, "blocks of k characters"),
              "word": ("s", 7, "words"), "line": ("^", 8, "lines")}  # fmt: skip
    for (top, bottom), (name, layers) in zip(panels.T, measured.items(), strict=True):
        for i, (rows, colour) in enumerate(zip(layers, COLOURS(np.linspace(0, 1, len(layers))), strict=True)):
            for scale, (style, ms, _) in styles.items():
                chosen = [row for row in rows if row["scale"] == scale]
                k, length = [row["size"] for row in chosen], [row["length"] for row in chosen]
                label = f"layer {i + 1}: slope {rows[0]['slope']:.2f}" if scale == "ruler" else None
                if scale != "block":
                    top.loglog(k, length, style, color=colour, ms=ms, lw=1.4, label=label)
                bottom.semilogx(k, [row["step"] / row["noise"] for row in chosen], style, color=colour, ms=ms, lw=1.2)
        k = np.array([row["size"] for row in layers[0] if row["scale"] == "ruler"])
        top.loglog(k, random / k, ":", color=INK, lw=1.5)
        bottom.axhline(1, ls=":", color=INK, lw=1.5)
        top.set_title(name, size=10)
        top.legend(frameon=False, fontsize=8.5)
        bottom.set_xlabel("characters per step")
    for style, ms, label in (*styles.values(), (":", 0, "noise")):
        bottom.plot([], [], style, color=INK, ms=ms, label=label)
    bottom.legend(frameon=False, fontsize=8.5)
    panels[0, 0].set_ylabel("length of the path\n(rad per character)")
    panels[1, 0].set_ylabel("step, as a share of that of\nthe same planes in random order")
    return figure


# ---- the program --------------------------------------------------------------------------------------


def load(checkpoint: Path) -> tuple[Params, Config, dict]:
    """A checkpoint that has a flow. Raises ValueError."""
    params, config, extra = load_trained(G, checkpoint)
    if config.mixer == "attention":
        raise ValueError(f"{checkpoint} is a Transformer, whose tokens span no planes: there is no flow to see")
    if config.rank == 2:
        raise ValueError(f"{checkpoint} has rank 2, and R² is a single plane: there is no flow to see")
    return params, config, extra


def held_out(checkpoint: Path, extra: dict) -> str:
    """The text that the run was validated on, from the start of a paragraph. Raises ValueError."""
    settings, advice = extra.get("settings"), "give a text with --text or --file"
    data = settings.get("data", 0) if isinstance(settings, dict) else 0
    if not isinstance(data, str | None):
        raise ValueError(f"{checkpoint} does not say what it was trained on; {advice}")
    try:
        text = load_text(data)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None
    text = text[-(len(text) // 10) :]
    return text[text.find("\n\n", 0, 1000) + 1 :].lstrip()


def write_csv(path: Path, header: str, rows: Iterable[Iterable]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([header.split(), *rows])


def compare(flow: Flow, other: Flow, name: str, out: Path) -> None:
    """The table of two texts side by side: Markdown, and invariants.csv."""
    first, second, half = invariants(flow), invariants(other), len(flow.text) // 2
    row = f"mean planes: to that of the {name} / from half to half of the text"
    first[row] = between_means(flow.planes, other.planes)
    second[row] = between_means(flow.planes[:, :half], flow.planes[:, half:])
    layers = range(len(flow.planes))
    print(f"| text / {name} |", *(f"layer {i + 1} |" for i in layers))
    print("|---|" + "---|" * len(layers))
    for key in first:
        digits = 0 if first[key][-1] > 100 else 3
        cells = (f"{a:.{digits}f} / {b:.{digits}f} |" for a, b in zip(first[key], second[key], strict=True))
        print(f"| {key} |", *(cell.replace("nan / nan", "–") for cell in cells))
    rows = ((i + 1, key, first[key][i], second[key][i]) for key in first for i in layers)
    write_csv(out / "invariants.csv", "layer invariant text other", rows)


def look(checkpoint: Path, given: list[str | Path], out: Path) -> None:
    """Read the texts, measure, print, write. Raises ValueError and OSError."""
    params, config, extra = load(checkpoint)
    texts = [load_text(str(text)) if isinstance(text, Path) else text for text in given]
    texts = texts or [held_out(checkpoint, extra)]
    if min(map(len, texts)) < LEAST:
        raise ValueError(f"a text of {min(map(len, texts))} characters is too short to measure, it needs {LEAST}")
    text, *second = (text[:MEASURED] for text in texts)
    out.mkdir(parents=True, exist_ok=True)

    rng, layers = np.random.default_rng(0), range(config.n_layer)
    flow, untrained = (follow(p, config, text, extra["vocab"]) for p in (params, G.init_params(config)))
    shuffled = follow(params, config, "".join(text[t] for t in rng.permutation(len(text))), extra["vocab"])
    other = follow(params, config, second[0], extra["vocab"]) if second else shuffled
    compare(flow, other, "second text" if second else "shuffled text", out)

    random = distance(*plane(*rng.standard_normal((2, 2, 4000, config.rank)))).mean()
    by_kind = {"trained": steps_by_kind(flow), "untrained": steps_by_kind(untrained)}
    maps = [flat_map(planes[:SHOWN]) for planes in flow.planes]
    flows = {"trained": flow, "untrained": untrained, "trained, shuffled text": shuffled}
    measured = {name: [coastline(f, i) for i in layers] for name, f in flows.items()}
    written = [c.replace("\0", "\\x00") for c in text]  # (Python 3.10 can't write a NUL into a CSV file)
    rows = ((i + 1, t, c, kind, flow.step[i, t], flow.gate[i, t], *(maps[i][0][t] if t < SHOWN else ("", "")))
            for i in layers for t, (c, kind) in enumerate(zip(written, kinds(text), strict=True)))  # fmt: skip
    write_csv(out / "characters.csv", "layer position character kind step gate map_x map_y", rows)
    rows = [(name, i + 1, kind, steps[i]) for name in by_kind for kind, steps in by_kind[name].items() for i in layers]
    write_csv(out / "kinds.csv", "model layer kind step", [*rows, ("random planes", "", "", random)])
    rows = [(name, i + 1, *row.values()) for name in flows for i in layers for row in measured[name][i]]
    write_csv(out / "coastline.csv", "flow layer scale size steps step length noise slope", rows)
    with mpl.rc_context(STYLE):
        pictures = {"path": draw_path(flow, by_kind, random), "map": draw_map(text, maps), "gate": draw_gate(flow),
                    "coastline": draw_coastline(measured, random)}  # fmt: skip
        for name, figure in pictures.items():
            figure.savefig(out / f"{name}.png", dpi=166)
            plt.close(figure)
    print(f"\n{out}: {', '.join(f'{name}.png' for name in pictures)}, and their numbers as CSV")


def main() -> None:
    plain_output()
    warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks is drawn as boxes
    parser = Parser(__doc__)
    add = parser.add_argument
    best = Path("out/best.npz")
    add("checkpoint", nargs="?", type=Path, default=best, help=f"the model (default: {best})")
    text = {"dest": "texts", "action": "append"}
    add("--text", **text, metavar="TEXT", help="a text (default: what was held out from the training)")
    add("--file", **text, metavar="FILE", type=Path, help="one in a UTF-8 file; a second text is compared")
    add("--out", type=Path, help="folder for pictures and CSV files (default: flow, beside the checkpoint)")
    args = parser.parse_args()
    out = args.out or args.checkpoint.parent / "flow"
    with short_errors(parser, out, "not enough memory for this model and this text"):
        if len(args.texts or []) > 2:
            raise ValueError("--text and --file: two texts at most")
        look(args.checkpoint, args.texts or [], out)


if __name__ == "__main__":
    main()
