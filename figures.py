"""Draw the figures of tutorial.md: python figures.py writes figures/*.svg, from the project's own code.

The colours are readable on a white and on a black page, and the background is left clear.
"""

import cpu  # noqa: F401, I001  (before NumPy)

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

import grassmann as G
from runs import MODEL_DEFAULTS, default_offsets

FOLDER = Path(__file__).resolve().parent / "figures"
INK, BLUE, ORANGE = "#808080", "#3b8bc9", "#e07b28"
STYLE = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "savefig.transparent": True, "svg.hashsalt": "grassmann", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "figure.constrained_layout.use": True,
}  # fmt: skip


def save(figure, name: str) -> None:
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def parallelogram(axes, u: np.ndarray, v: np.ndarray, names: str = "uv") -> None:
    """The parallelogram with sides u and v, in two dimensions."""
    corners = np.array([0 * u, u, u + v, v])
    axes.fill(*corners.T, color=BLUE, alpha=0.25, lw=0)
    for vector, colour, name in ((u, BLUE, names[0]), (v, ORANGE, names[1])):
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", vector, (0, 0), arrowprops=arrow)
        axes.annotate(f"${name}$", vector, xytext=(5, 3), textcoords="offset points", color=colour, size=12)


def wedge() -> None:
    """The three shadows of one parallelogram in R^3: their signed areas are the Plücker coordinates."""
    u, v = np.array([1.0, 2, 0]), np.array([0.0, 1, 1])
    figure, panels = plt.subplots(1, 3, figsize=(7.5, 2.8), sharex=True, sharey=True)
    for axes, i, j, p in zip(panels, *G.pairs(3), G.plucker(u, v), strict=True):
        parallelogram(axes, u[[i, j]], v[[i, j]])
        axes.set(aspect="equal", xlim=(-0.4, 3.4), ylim=(-0.4, 3.4), xlabel=f"axis {i + 1}", ylabel=f"axis {j + 1}")
        axes.set_title(f"$p_{{{i + 1}{j + 1}}} = {p:g}$")
        axes.axhline(0, color=INK, lw=0.6)
        axes.axvline(0, color=INK, lw=0.6)
    save(figure, "wedge")


def receptive_field() -> None:
    """Which tokens the last state of the default model has seen, layer by layer."""
    n_layer, length = MODEL_DEFAULTS["n_layer"], 33
    offsets = default_offsets(n_layer, MODEL_DEFAULTS["context"], taps=True)
    figure, axes = plt.subplots(figsize=(7.5, 2.8))
    seen = {0}
    for layer in reversed(range(n_layer)):
        for delta in (0, *offsets[layer]):
            for t in seen:
                axes.plot([t, t - delta], [layer + 1, layer], color=BLUE if delta else INK, lw=0.8, alpha=0.7)
        axes.scatter(list(seen), [layer + 1] * len(seen), color=ORANGE, s=22, zorder=3)
        seen = {t - delta for t in seen for delta in (0, *offsets[layer])}
    tokens = range(1 - length, 1)
    axes.scatter(tokens, [0] * length, color=[ORANGE if t in seen else INK for t in tokens], s=22, zorder=3)
    axes.set(xlabel="token, counted back from the one whose successor is predicted", xticks=tokens[::-4])
    axes.set_yticks(range(n_layer + 1))
    axes.set_yticklabels(["input", *(f"layer {i + 1}" for i in range(n_layer))])
    save(figure, "receptive_field")


def finite_differences() -> None:
    """Error of the central difference against the step, in float64 and in float32: two U-shaped curves."""
    config = G.Config(vocab_size=7, context=8, n_layer=2, d_model=8, rank=4, offsets=((1, 2), (1, 3)))
    x, y = np.random.default_rng(1).integers(0, 7, (2, 2, 8))
    figure, axes = plt.subplots(figsize=(6, 3.4))
    steps = 10.0 ** np.arange(-11, 0.01, 0.25)
    for dtype, colour in ((np.float64, BLUE), (np.float32, ORANGE)):
        params = {name: value + dtype(0.1) for name, value in G.init_params(config, dtype=dtype).items()}
        W = params["blocks.0.mix.W_plu"]
        start, direction = W.copy(), np.random.default_rng(2).standard_normal(W.shape).astype(dtype)
        slope = float((G.loss_and_grads(params, config, x, y)[1]["blocks.0.mix.W_plu"] * direction).sum())
        errors = []
        for step in steps:
            up, down = (np.copyto(W, start + dtype(s) * direction) or float(G.loss_and_grads(params, config, x, y)[0])
                        for s in (step, -step))  # fmt: skip
            errors.append(abs((up - down) / (2 * step) - slope) / abs(slope))
        axes.loglog(steps, np.maximum(errors, 1e-12), color=colour, label=dtype.__name__, marker="o", ms=2.5, lw=1)
    axes.axhline(1e-6, color=INK, ls=":", lw=1)
    axes.annotate("the tests' limit", (1e-11, 1e-6), xytext=(0, 4), textcoords="offset points")
    axes.set(xlabel="step of the difference", ylabel="relative error of the slope")
    axes.legend(frameon=False)
    save(figure, "finite_differences")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for draw in (wedge, receptive_field, finite_differences):
            draw()
            print(FOLDER / f"{draw.__name__}.svg")
