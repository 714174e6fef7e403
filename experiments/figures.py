"""Draw the figures of README.md and tutorial.md, figures/*.svg: python -m experiments.figures

Their colours are readable on a white and on a black page, and the background is left clear.
"""

import cli  # noqa: I001  (before NumPy)

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
    axes.set_xlabel("token, counted back from the one whose successor is predicted")
    axes.set_xticks(tokens[::-4])
    names = ["input", *(f"layer {i + 1}" for i in range(config.n_layer))]
    axes.set_yticks(range(len(names)), names)
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


if __name__ == "__main__":
    cli.Parser(__doc__).parse_args()
    for draw in (layer, wedge, receptive_field, finite_differences):
        with plt.rc_context(STYLE):
            file = FOLDER / f"{draw.__name__}.svg"
            draw().savefig(file, metadata={"Date": None})
        print(file)
