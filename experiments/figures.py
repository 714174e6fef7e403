"""Draw the figures of README.md, tutorial.md and docs/ into docs/figures: python -m experiments.figures

Their colours are readable on a white and on a black page, and the background is left clear.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import contextlib
import csv
import math
import re
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgba

import grassmann as G
from charlm.checkpoint import load_checkpoint
from charlm.text import encode

plt.switch_backend("Agg")  # draw without a window
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "figures"
INK, BLUE, ORANGE = "#808080", "#3b8bc9", "#e07b28"
MIDDLE = {"ha": "center", "va": "center"}
STARTS_WITH_S = 109  # the number of the message that finds words that begin with s
STYLE = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.transparent": True,
    "svg.hashsalt": "grassmann",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def parallelogram(axes: plt.Axes, u, v, names: tuple[str, str], origin=(0, 0)) -> None:
    """The one with sides u and v, in two dimensions."""
    axes.fill(*np.add(origin, [0 * u, u, u + v, v]).T, color=BLUE, alpha=0.25, lw=0)
    for vector, other, colour, name in ((u, v, BLUE, names[0]), (v, u, ORANGE, names[1])):
        tip, arrow = origin + vector, {"arrowstyle": "-|>", "lw": 2, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", tip, origin, arrowprops=arrow | {"color": colour})
        outside = 11 * (vector - other) / np.linalg.norm(vector - other)
        axes.annotate(
            f"${name}$", tip, outside, textcoords="offset points", color=colour, size=12, **MIDDLE
        )


def layer() -> plt.Figure:
    """The mixing layer in five steps, with the sizes d = 8, r = 4, n = 6."""
    figure = plt.figure(figsize=(9.4, 4.5), layout="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 9.4), ylim=(0, 4.5))  # in inches
    axes.axis("off")
    rng = np.random.default_rng(1)
    for x, word, formula, shape in [
        (1.05, "1  reduce", r"z_t = h_t W_{\rm red} + b_{\rm red}", r"d \to r"),
        (2.6, "2  look back", r"s_t = \sum_\Delta\, w_\Delta \odot z_{t-\Delta}", r"r \to r"),
        (4.75, "3  wedge", r"p_{ij} = z_i s_j - z_j s_i", r"r, r \to n"),
        (6.75, "4  project", r"g = p\, W_{\rm plu} + b_{\rm plu}", r"n \to d"),
        (8.45, "5  gate", r"\alpha \odot h_t + (1 - \alpha) \odot g", r"d, d \to d"),
    ]:
        axes.text(x, 4.25, word, size=13, weight="bold", **MIDDLE)
        axes.text(x, 0.5, f"${formula}$", size=11.5, **MIDDLE)
        axes.text(x, 0.17, f"${shape}$", size=11, **MIDDLE)
    for x, y, size, name, blue in [  # vectors; `blue`: how much of each comes from token t
        (0.45, 3.05, 8, "h_t", 1),
        (1.75, 3.05, 4, "z_t", 1),
        (3.1, 1.55, 4, "s_t", 0),
        (0.45, 1.55, 8, r"h_{t-\Delta}", 0),
        (1.75, 1.55, 4, r"z_{t-\Delta}", 0),
        (6.2, 2.3, 6, "p", 0.5),
        (7.3, 2.3, 8, "g", 0.5),
        (9.1, 2.3, 8, r"{\rm out}_t", 0.75),
    ]:
        for k, alpha in enumerate(rng.uniform(0.3, 1, size)):
            cell = {"height": 0.105, "y": y + 0.125 * (k + 0.42 - size / 2), "alpha": alpha}
            axes.barh(left=x - 0.08, width=0.16 * blue, color=BLUE, **cell)
            axes.barh(left=x + 0.08, width=0.16 * (blue - 1), color=ORANGE, **cell)
        colour = {1: BLUE, 0: ORANGE}.get(blue, INK)
        axes.text(x, y - 0.0625 * size - 0.18, f"${name}$", size=12, color=colour, **MIDDLE)
    head = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
    for y, *ends in [
        (3.05, 0.6, 1.6, 1.9, 4.3),
        (1.55, 0.6, 1.6, 1.9, 2.95, 3.25, 3.7),
        (2.3, 5.55, 6.05, 6.35, 7.15, 7.45, 8.1, 8.5, 8.95),
    ]:
        for start, end in zip(ends[::2], ends[1::2], strict=True):
            axes.annotate("", (end, y), (start, y), arrowprops=head)
    axes.plot([0.45, 0.45, 8.3], [3.62, 3.85, 3.85], color=INK, lw=1)  # h_t goes to the gate, too
    circle = {"boxstyle": "circle", "fc": "none", "ec": INK}
    axes.annotate(r"$\alpha$", (8.3, 2.3), size=13, bbox=circle, **MIDDLE)
    axes.annotate("", (8.3, 2.5), (8.3, 3.855), arrowprops=head)
    z, s, origin = np.array([0.5, 1.35]), np.array([1.28, 0.13]), np.array([4, 1.5])
    corners = [-0.25 * (z + s), 1.3 * z - 0.25 * s, 1.3 * (z + s), 1.3 * s - 0.25 * z]
    axes.fill(*(origin + corners).T, color=INK, alpha=0.12, lw=0)
    parallelogram(axes, z, s, ("z_t", "s_t"), origin)
    axes.text(*origin + (z + s) / 2, r"$z_t \wedge s_t$", size=14, **MIDDLE)
    return figure


def wedge() -> plt.Figure:
    """The three shadows of one parallelogram in R^3: their signed areas are Plücker coordinates."""
    u, v = np.array([1.0, 2, 0]), np.array([0.0, 1, 1])
    figure, panels = plt.subplots(1, 3, figsize=(7.5, 2.8), sharex=True, sharey=True)
    for axes, i, j, p in zip(panels, *G.pairs(3), G.plucker(u, v), strict=True):
        parallelogram(axes, u[[i, j]], v[[i, j]], ("u", "v"))
        axes.set(
            aspect="equal",
            xlim=(-0.4, 3.4),
            ylim=(-0.4, 3.4),
            xlabel=f"axis {i + 1}",
            ylabel=f"axis {j + 1}",
            title=f"$p_{{{i + 1}{j + 1}}} = {p:g}$",
        )
        axes.axhline(0, color=INK, lw=0.6)
        axes.axvline(0, color=INK, lw=0.6)
    return figure


def backward() -> plt.Figure:
    """The ops of the layer, forward and back; at h and z two gradients meet."""
    figure = plt.figure(figsize=(9, 2.3), layout="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 9), ylim=(0.2, 2.5))  # in inches
    axes.axis("off")
    box = {"boxstyle": "round,pad=0.35", "fc": "none", "ec": INK}
    for word, place in {
        "reduce": (1.35, 1.5),
        "look back": (3.55, 0.55),
        "wedge": (5, 1.5),
        "project": (6.45, 1.5),
        "gate": (7.75, 1.5),
    }.items():
        axes.text(*place, word, size=12, bbox=box, **MIDDLE)
    for x, name, sign in (
        (0.3, "$h$", "+"),
        (2.4, "$z$", "+"),
        (8.7, "out", ""),
    ):  # +: what is used twice
        axes.text(x, 1.5, name, size=14, **MIDDLE)
        axes.text(x, 1.18, sign, color=ORANGE, size=14, weight="bold", **MIDDLE)

    arrow = {"arrowstyle": "-|>", "lw": 1.4, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12}

    def both_ways(start, end, name="") -> None:
        """Forward from start to end in grey, back in orange, each on its side of the line, and so the names."""
        (x, y), (u, v) = start, end
        side = np.array([y - v, u - x]) / np.hypot(u - x, v - y)
        for sign, ends, colour, label in (
            (1, (start, end), INK, name),
            (-1, (end, start), ORANGE, r"{\rm d}" + name),
        ):
            a, b = (np.add(point, 0.07 * sign * side) for point in ends)
            axes.annotate("", b, a, arrowprops=arrow | {"color": colour})
            if name:
                axes.text(
                    *np.add(start, end) / 2 + 0.27 * sign * side,
                    f"${label}$",
                    color=colour,
                    size=13,
                    **MIDDLE,
                )

    for ends in (
        ((0.5, 1.5), (0.85, 1.5)),
        ((1.85, 1.5), (2.25, 1.5)),
        ((2.6, 1.5), (4.5, 1.5)),
        ((2.55, 1.3), (3.1, 0.85)),
        ((3.95, 0.85), (4.65, 1.25), "s"),
        ((5.5, 1.5), (5.9, 1.5), "p"),
        ((7.0, 1.5), (7.35, 1.5), "g"),
        ((8.15, 1.5), (8.45, 1.5)),
    ):
        both_ways(*ends)
    for start, end, y, colour in (
        (0.23, 7.82, 2.35, INK),
        (7.68, 0.37, 2.21, ORANGE),
    ):  # h goes to the gate, too
        axes.plot([start, start, end], [1.75, y, y], color=colour, lw=1.4)
        axes.annotate("", (end, 1.75), (end, y), arrowprops=arrow | {"color": colour})
    return figure


def pairs() -> plt.Figure:
    """What planes of letter pairs are for in the first layer of shakespeare.npz: their area, and one number of g."""
    params, _, extra = load_checkpoint(ROOT / "explorer" / "shakespeare.npz")
    vocab, first = extra["vocab"], G.Scope(params, "blocks.0.")
    letters = "\n ,.'aeiouybcdfghklmnprstvw"
    states, _ = G.layernorm_forward(
        params["E"][encode(letters, vocab)], first["ln1.w"], first["ln1.b"]
    )
    z, _ = G.linear_forward(states, first["mix.W_red"], first["mix.b_red"])
    p = G.plucker(
        *np.broadcast_arrays(z[None], (first["mix.taps"][0] * z)[:, None])
    )  # (before, letter, n)
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 5), sharey=True)
    names, places = ["↵", "␣", *letters[2:]], range(len(letters))
    for axes, values, title in zip(
        panels,
        (np.linalg.norm(p, axis=-1), p @ first["mix.W_plu"][:, STARTS_WITH_S]),
        ("area of the plane", f"number {STARTS_WITH_S} of the message"),
        strict=True,
    ):
        shade = np.abs(values) / np.abs(values).max()
        colours = np.where(values[..., None] > 0, to_rgba(BLUE), to_rgba(ORANGE))
        colours[..., 3] = shade**2
        axes.imshow(colours, interpolation="none")
        axes.set(title=title, xlabel="letter", ylabel="letter before" * (axes is panels[0]))
        axes.set(xticks=places, xticklabels=names, yticks=places, yticklabels=names)
    return figure


def thread() -> plt.Figure:
    """The validation loss of the tutorial's models, whose blocks are run for it, and the losses of counting."""
    page = (FOLDER.parent / "tutorial.md").read_text(encoding="utf-8").partition("## 10. ")[0]
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        with contextlib.redirect_stdout(None):
            exec(compile(block, "tutorial.md", "exec"), names)
    figure, axes = plt.subplots(figsize=(7.5, 4))
    ends = []
    for k, (name, losses) in enumerate(
        (n, c) for n, c in names["curves"].items() if n != "trained"
    ):
        dotted = name.startswith(("average", "attention", "rotary"))
        axes.plot(
            np.arange(20, 301, 20),
            losses,
            lw=1.5,
            color=f"C{k + (k > 6)}",
            ls=":" if dotted else "-",
        )
        ends.append([losses[-1], name, f"C{k + (k > 6)}"])
    for name, loss in names["counted"].items():
        axes.plot([20, 300], [loss, loss], color=INK, lw=1, ls="--")
        ends.append([loss, f"counted {name}", INK])
    height = math.inf
    for loss, name, colour in sorted(ends, reverse=True):  # labels one below the other
        height = min(loss, height - 0.085)
        axes.text(305, height, name, color=colour, va="center")
    axes.set(
        xlabel="step",
        ylabel="validation loss, nats",
        xlim=(0, 375),
        xticks=range(0, 301, 50),
        ylim=(1.45, 3.2),
    )
    return figure


def receptive_field() -> plt.Figure:
    """Which tokens the last state of the default model has seen, layer by layer."""
    config, tokens, seen = G.Config(vocab_size=1), range(-32, 1), {0}
    figure, axes = plt.subplots(figsize=(7.5, 2.8))
    for layer in reversed(range(config.n_layer)):
        back = (0, *config.offsets[layer])
        for delta, t in product(back, seen):
            colour = BLUE if delta else INK
            axes.plot([t, t - delta], [layer + 1, layer], color=colour, lw=0.8, alpha=0.7)
        axes.scatter(list(seen), [layer + 1] * len(seen), color=ORANGE, s=22, zorder=3)
        seen = {t - delta for t in seen for delta in back}
    colours = [ORANGE if t in seen else INK for t in tokens]
    axes.scatter(tokens, [0] * len(tokens), color=colours, s=22, zorder=3)
    axes.set(
        xlabel="token, counted back from the one whose successor is predicted", xticks=tokens[::-4]
    )
    axes.set_yticks(
        range(config.n_layer + 1), ["input", *(f"layer {i + 1}" for i in range(config.n_layer))]
    )
    return figure


def finite_differences() -> plt.Figure:
    """Error of the central difference against the step, in float64 and float32: two U's."""
    sizes, name = {"context": 8, "n_layer": 2, "d_model": 8, "rank": 4}, "blocks.0.mix.W_plu"
    config = G.Config(vocab_size=7, d_ff=32, offsets=((1, 2), (1, 3)), **sizes)
    x, y = np.random.default_rng(1).integers(0, 7, (2, 2, 8))
    figure, axes = plt.subplots(figsize=(6, 3.4))
    steps = 10.0 ** np.arange(-11, 0.01, 0.25)
    for dtype, colour in ((np.float64, BLUE), (np.float32, ORANGE)):
        params = {k: W + dtype(0.1) for k, W in G.init_params(config, dtype=dtype).items()}
        W = params[name]
        direction = np.random.default_rng(2).standard_normal(W.shape).astype(dtype)
        grad = G.loss_and_grads(params, config, x, y)[1][name]
        slope, scale = (
            float((grad * direction).sum()),
            np.linalg.norm(grad) * np.linalg.norm(direction),
        )
        moved = (params | {name: W + dtype(t) * direction} for step in steps for t in (step, -step))
        up, down = np.reshape(
            [G.loss_and_grads(params, config, x, y)[0] for params in moved], (-1, 2)
        ).T
        errors = np.maximum(np.abs((up - down) / (2 * steps) - slope) / scale, 1e-12)
        axes.loglog(steps, errors, color=colour, label=dtype.__name__, marker="o", ms=2.5, lw=1)
    axes.axhline(1e-6, color=INK, ls=":", lw=1)
    axes.annotate(
        "the tests' limit", (1, 1e-6), xytext=(0, 4), textcoords="offset points", ha="right"
    )
    axes.set(xlabel="step of the difference", ylabel="error / (|gradient| |direction|)")
    axes.legend(frameon=False)
    return figure


def dispute() -> plt.Figure:
    """By how many percent perplexities are above attention's: those of others, and beside them those of compare.md."""
    results, (figure, axes) = (
        FOLDER.parent / "experiments" / "results",
        plt.subplots(figsize=(9.4, 4.6)),
    )
    rows = csv.DictReader((results / "published.csv").read_text(encoding="utf-8").splitlines())
    published = [row for row in rows if row["cell"]]
    cells = [*dict.fromkeys(row["cell"] for row in published)]
    for row in published:
        place = (
            cells.index(row["cell"]),
            100 * (float(row["Grassmann"]) / float(row["attention"]) - 1),
        )
        axes.plot(*place, "D", color=ORANGE, ms=5)
        axes.annotate(row["label"], place, xytext=(7, -3), textcoords="offset points", size=7.5)
    page = (results / "compare.md").read_text(encoding="utf-8")
    for left, marker, text in ((0.24, "o", ""), (0.12, "s", " in subwords: 4,096 byte pairs")):
        table = (
            page.partition(f"\n## 10. The dispute{text}\n")[2]
            .partition("\n## ")[0]
            .partition("gap to attention")[2]
        )
        for model, gap in re.findall(r"^\| (.*?) \|.*\| (\S+)%.* \|$", table, re.MULTILINE):
            cell = re.sub(r" x \d+", "", model)  # of a rescaled model too, whose mark is empty
            axes.plot(
                cells.index(cell) - left,
                float(gap),
                marker,
                color=BLUE,
                mfc=BLUE if cell == model else "none",
            )
    axes.axhline(color=INK, lw=0.8)
    axes.set_xticks(range(len(cells)), [cell.replace(", ", "\n") for cell in cells])
    axes.set(xlim=(-0.5, len(cells) + 0.05), ylabel="perplexity above attention's, %")
    return figure


if __name__ == "__main__":
    command_line.Parser(__doc__).parse_args()
    for draw in (
        layer,
        wedge,
        backward,
        receptive_field,
        finite_differences,
        pairs,
        thread,
        dispute,
    ):
        with plt.rc_context(STYLE):
            file = FOLDER / f"{draw.__name__}.svg"
            draw().savefig(file, metadata={"Date": None})
        print(file)
