"""Draw the figures of README.md, tutorial.md and docs/, figures/*.svg: python -m experiments.figures

Their colours are readable on a white and on a black page, and the background is left clear.
"""

import cli

cli.prepare()  # before NumPy

import contextlib
import csv
import math
import re
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import grassmann as G

plt.switch_backend("Agg")  # draw without a window
FOLDER = Path(__file__).resolve().parent.parent / "figures"
INK, BLUE, ORANGE = "#808080", "#3b8bc9", "#e07b28"
STYLE = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "savefig.transparent": True, "svg.hashsalt": "grassmann", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True,
}

def parallelogram(axes: plt.Axes, u, v, names: tuple[str, str], origin=(0, 0)) -> None:
    """The one with sides u and v, in two dimensions."""
    axes.fill(*np.add(origin, [0 * u, u, u + v, v]).T, color=BLUE, alpha=0.25, lw=0)
    for vector, colour, name in zip((u, v), (BLUE, ORANGE), names, strict=True):
        tip, arrow = origin + vector, {"arrowstyle": "-|>", "lw": 2, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", tip, origin, arrowprops=arrow | {"color": colour})
        label = {"xytext": (5, 3), "textcoords": "offset points", "color": colour, "size": 12}
        axes.annotate(f"${name}$", tip, **label)

def layer() -> plt.Figure:
    """The mixing layer in five steps, with the sizes d = 8, r = 4, n = 6."""
    figure = plt.figure(figsize=(9.4, 4.5), layout="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 9.4), ylim=(0, 4.5))  # in inches
    axes.axis("off")
    rng, middle = np.random.default_rng(1), {"ha": "center", "va": "center"}
    for x, word, formula, shape in [
            (1.05, "1  reduce", r"z_t = h_t W_{\rm red} + b_{\rm red}", r"d \to r"),
            (2.6, "2  look back", r"s_t = \sum_\Delta\, w_\Delta \odot z_{t-\Delta}", r"r \to r"),
            (4.75, "3  wedge", r"p_{ij} = z_i s_j - z_j s_i", r"r, r \to n"),
            (6.75, "4  project", r"g = p\, W_{\rm plu} + b_{\rm plu}", r"n \to d"),
            (8.45, "5  gate", r"\alpha \odot h_t + (1 - \alpha) \odot g", r"d, d \to d")]:
        axes.text(x, 4.25, word, size=13, weight="bold", **middle)
        axes.text(x, 0.5, f"${formula}$", size=11.5, **middle)
        axes.text(x, 0.17, f"${shape}$", size=11, **middle)
    for x, y, size, name, blue in [  # vectors; `blue`: how much of each comes from token t
            (0.45, 3.05, 8, "h_t", 1), (1.75, 3.05, 4, "z_t", 1), (3.1, 1.55, 4, "s_t", 0),
            (0.45, 1.55, 8, r"h_{t-\Delta}", 0), (1.75, 1.55, 4, r"z_{t-\Delta}", 0),
            (6.2, 2.3, 6, "p", 0.5), (7.3, 2.3, 8, "g", 0.5), (9.1, 2.3, 8, r"{\rm mix}_t", 0.75)]:
        for k, alpha in enumerate(rng.uniform(0.3, 1, size)):
            cell = {"height": 0.105, "y": y + 0.125 * (k + 0.42 - size / 2), "alpha": alpha}
            axes.barh(left=x - 0.08, width=0.16 * blue, color=BLUE, **cell)
            axes.barh(left=x + 0.08, width=0.16 * (blue - 1), color=ORANGE, **cell)
        colour = {1: BLUE, 0: ORANGE}.get(blue, INK)
        axes.text(x, y - 0.0625 * size - 0.18, f"${name}$", size=12, color=colour, **middle)
    head = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
    for y, *ends in [(3.05, 0.6, 1.6, 1.9, 4.3), (1.55, 0.6, 1.6, 1.9, 2.95, 3.25, 3.7),
                     (2.3, 5.55, 6.05, 6.35, 7.15, 7.45, 8.1, 8.5, 8.95)]:
        for start, end in zip(ends[::2], ends[1::2], strict=True):
            axes.annotate("", (end, y), (start, y), arrowprops=head)
    axes.plot([0.45, 0.45, 8.3], [3.62, 3.85, 3.85], color=INK, lw=1)  # h_t goes to the gate, too
    circle = {"boxstyle": "circle", "fc": "none", "ec": INK}
    axes.annotate(r"$\alpha$", (8.3, 2.3), size=13, bbox=circle, **middle)
    axes.annotate("", (8.3, 2.5), (8.3, 3.855), arrowprops=head)
    z, s, origin = np.array([0.5, 1.35]), np.array([1.28, 0.13]), np.array([4, 1.5])
    corners = [-0.25 * (z + s), 1.3 * z - 0.25 * s, 1.3 * (z + s), 1.3 * s - 0.25 * z]
    axes.fill(*(origin + corners).T, color=INK, alpha=0.12, lw=0)
    parallelogram(axes, z, s, ("z_t", "s_t"), origin)
    axes.text(*origin + (z + s) / 2, r"$z_t \wedge s_t$", size=14, **middle)
    return figure

def wedge() -> plt.Figure:
    """The three shadows of one parallelogram in R^3: their signed areas are Plücker coordinates."""
    u, v = np.array([1.0, 2, 0]), np.array([0.0, 1, 1])
    figure, panels = plt.subplots(1, 3, figsize=(7.5, 2.8), sharex=True, sharey=True)
    for axes, i, j, p in zip(panels, *G.pairs(3), G.plucker(u, v), strict=True):
        parallelogram(axes, u[[i, j]], v[[i, j]], ("u", "v"))
        axes.set(aspect="equal", xlim=(-0.4, 3.4), ylim=(-0.4, 3.4), xlabel=f"axis {i + 1}",
                 ylabel=f"axis {j + 1}", title=f"$p_{{{i + 1}{j + 1}}} = {p:g}$")
        axes.axhline(0, color=INK, lw=0.6)
        axes.axvline(0, color=INK, lw=0.6)
    return figure

def backward() -> plt.Figure:
    """The ops of the layer, forward and back; at h and z two gradients meet."""
    figure = plt.figure(figsize=(9, 2.9), layout="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 9), ylim=(0, 2.9))  # in inches
    axes.axis("off")
    middle, box = {"ha": "center", "va": "center"}, {"boxstyle": "round,pad=0.35", "fc": "none", "ec": INK}
    places = {"reduce": (1.5, 1.5), "look back": (3.1, 0.75), "wedge": (4.75, 1.5), "project": (6.2, 1.5),
              "gate": (7.6, 1.5)}
    for word, place in places.items():
        axes.text(*place, word, size=12, bbox=box, **middle)
    axes.text(0.35, 1.5, "$h$", size=14, **middle)
    axes.text(8.65, 1.5, "out", size=12, **middle)

    def both_ways(start, end, name, bend=0.0) -> None:
        """Forward from start to end in grey, back in orange, both a little beside the line."""
        (x, y), (u, v) = start, end
        length = np.hypot(u - x, v - y)
        side = 0.07 * np.array([y - v, u - x]) / length
        for ends, colour, sign in (((start, end), INK, 1), ((end, start), ORANGE, -1)):
            a, b = (np.add(point, sign * side) for point in ends)
            arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 0, "shrinkB": 0,
                     "connectionstyle": f"arc3,rad={sign * bend}"}
            axes.annotate("", b, a, arrowprops=arrow)
        x, y = np.add(start, end) / 2
        y -= bend * length / 2
        if name:
            axes.text(x, y + 0.23, f"${name}$", color=INK, size=12, **middle)
            axes.text(x, y - 0.23, f"$d{name}$", color=ORANGE, size=12, **middle)

    both_ways((0.5, 1.5), (1.0, 1.5), "")
    both_ways((2.0, 1.6), (4.3, 1.6), "z")
    both_ways((1.95, 1.3), (2.6, 0.85), "")
    both_ways((3.65, 0.85), (4.35, 1.3), "s")
    both_ways((5.2, 1.5), (5.7, 1.5), "p")
    both_ways((6.7, 1.5), (7.2, 1.5), "g")
    both_ways((8.0, 1.5), (8.4, 1.5), "")
    both_ways((0.4, 1.75), (7.5, 1.8), "", bend=-0.12)
    for x, y in ((0.35, 1.2), (2.0, 1.18)):
        axes.text(x, y, "+", color=ORANGE, size=13, weight="bold", **middle)
    return figure

def planes() -> plt.Figure:
    """A token's plane and its neighbour's, which share a line, and the angle between them."""
    figure, axes = plt.subplots(figsize=(5.2, 3))
    axes.set(aspect="equal", xlim=(-0.1, 2.1), ylim=(-0.75, 1.05))
    axes.axis("off")
    flat = np.array([[0.95, -0.55], [1.0, 0.35], [-0.1, 0.95]])  # where the three axes of space point
    angle = np.radians(55)
    shared, one, other = np.array([[1, 0, 0], [0, 1, 0], [0, np.cos(angle), np.sin(angle)]]) @ flat
    for second, colour in ((one, BLUE), (other, ORANGE)):
        axes.fill(*np.transpose([0 * shared, shared, shared + second, second]), color=colour, alpha=0.25, lw=0)
    turn = np.linspace(0, angle, 30)
    arc = 0.4 * np.stack([0 * turn, np.cos(turn), np.sin(turn)], 1) @ flat
    axes.plot(*arc.T, color=INK, lw=1)
    axes.annotate(r"$\theta_2$", arc[15], xytext=(6, 2), textcoords="offset points", color=INK, size=13)
    for tip, name, colour in ((shared, "z_t", INK), (one, "s_t", BLUE), (other, "z_{t+1}", ORANGE)):
        axes.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "-|>", "lw": 2, "color": colour,
                                                   "shrinkA": 0, "shrinkB": 0})
        axes.annotate(f"${name}$", tip, xytext=(6, 2), textcoords="offset points", color=colour, size=13)
    return figure

def thread() -> plt.Figure:
    """The training loss of the tutorial's models, whose blocks are run for it."""
    page = (FOLDER.parent / "tutorial.md").read_text(encoding="utf-8").partition("## 9. ")[0]
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        with contextlib.redirect_stdout(None):
            exec(compile(block, "tutorial.md", "exec"), names)
    figure, axes = plt.subplots(figsize=(7.5, 3.6))
    ends = []
    for k, (name, losses) in enumerate((n, c) for n, c in names["curves"].items() if n != "trained"):
        smooth = np.convolve(losses, np.full(15, 1 / 15), "valid")
        dotted = name.startswith(("average", "one layer", "one of rotary"))
        axes.plot(np.arange(len(smooth)) + 8, smooth, lw=1.4, color=f"C{k}", ls=":" if dotted else "-")
        ends.append([smooth[-1], name, f"C{k}"])
    height = math.inf
    for loss, name, colour in sorted(ends, reverse=True):  # labels one below the other
        height = min(loss, height - 0.09)
        axes.text(len(losses) - 3, height, name, color=colour, va="center")
    axes.set(xlabel="step", ylabel="training loss, nats", xlim=(0, 395), xticks=range(0, 301, 50), ylim=(1.25, 3.2))
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
    axes.set(xlabel="token, counted back from the one whose successor is predicted", xticks=tokens[::-4])
    axes.set_yticks(range(config.n_layer + 1), ["input", *(f"layer {i + 1}" for i in range(config.n_layer))])
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
        slope = float((G.loss_and_grads(params, config, x, y)[1][name] * direction).sum())
        moved = (params | {name: W + dtype(t) * direction} for step in steps for t in (step, -step))
        losses = [float(G.loss_and_grads(params, config, x, y)[0]) for params in moved]
        up, down = np.reshape(losses, (-1, 2)).T
        errors = np.maximum(np.abs((up - down) / (2 * steps) - slope) / abs(slope), 1e-12)
        axes.loglog(steps, errors, color=colour, label=dtype.__name__, marker="o", ms=2.5, lw=1)
    axes.axhline(1e-6, color=INK, ls=":", lw=1)
    axes.annotate("the tests' limit", (1e-11, 1e-6), xytext=(0, 4), textcoords="offset points")
    axes.set(xlabel="step of the difference", ylabel="relative error of the slope")
    axes.legend(frameon=False)
    return figure

def dispute() -> plt.Figure:
    """By how many percent perplexities are above attention's: those of others, and beside them those of compare.md."""
    results, (figure, axes) = FOLDER.parent / "experiments" / "results", plt.subplots(figsize=(9.4, 4.6))
    rows = csv.DictReader((results / "published.csv").read_text(encoding="utf-8").splitlines())
    published = [row for row in rows if row["cell"]]
    cells = [*dict.fromkeys(row["cell"] for row in published)]
    for row in published:
        place = cells.index(row["cell"]), 100 * (float(row["Grassmann"]) / float(row["attention"]) - 1)
        axes.plot(*place, "D", color=ORANGE, ms=5)
        axes.annotate(row["label"], place, xytext=(7, -3), textcoords="offset points", size=7.5)
    page = (results / "compare.md").read_text(encoding="utf-8")
    for left, marker, text in ((0.24, "o", ""), (0.12, "s", " in subwords: 4,096 byte pairs")):
        table = page.partition(f"\n## 10. The dispute{text}\n")[2].partition("\n## ")[0].partition("gap to attention")[2]
        for model, gap in re.findall(r"^\| (.*?) \|.*\| (\S+)%.* \|$", table, re.MULTILINE):
            cell = re.sub(r" x \d+", "", model)  # of a rescaled model too, whose mark is empty
            axes.plot(cells.index(cell) - left, float(gap), marker, color=BLUE, mfc=BLUE if cell == model else "none")
    axes.axhline(color=INK, lw=0.8)
    axes.set_xticks(range(len(cells)), [cell.replace(", ", "\n") for cell in cells])
    axes.set(xlim=(-0.5, len(cells) + 0.05), ylabel="perplexity above attention's, %")
    return figure


if __name__ == "__main__":
    cli.Parser(__doc__).parse_args()
    for draw in (layer, wedge, backward, receptive_field, finite_differences, planes, thread, dispute):
        with plt.rc_context(STYLE):
            file = FOLDER / f"{draw.__name__}.svg"
            draw().savefig(file, metadata={"Date": None})
        print(file)
