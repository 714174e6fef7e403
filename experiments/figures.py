"""Draw the figures of README.md, tutorial.md and docs/ into docs/figures.

python -m experiments.figures

Their colours are readable on a white and on a black page, and the background is left clear.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import contextlib
import csv
import math
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgba

import grassmann as G
from charlm.checkpoint import load_checkpoint
from charlm.text import SHAKESPEARE_SHA256, encode, read_corpus
from charlm.trained import SHIPPED
from charlm.training import Training
from experiments.common import Learner
from experiments.compare import CONTROLS, Laboratory, final
from experiments.texts import Text

plt.switch_backend("Agg")  # draw without a window
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "figures"
RESULTS = ROOT / "experiments" / "results"
INK = "#808080"
BLUE = "#3b8bc9"
ORANGE = "#e07b28"
MIDDLE = {"ha": "center", "va": "center"}
HEAD = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0}
THICK = {"lw": 1.4, "mutation_scale": 12}
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


def canvas(width, top, bottom=0):
    """A figure without axes, with coordinates in inches."""
    figure = plt.figure(figsize=(width, top - bottom), layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(bottom, top))
    axes.axis("off")
    return figure, axes


def arrow(axes, start, end, color=INK, **look):
    axes.annotate("", end, start, arrowprops=HEAD | {"color": color} | look)


def parallelogram(axes, u, v, names, origin=(0, 0)):
    """The one with sides u and v, in two dimensions."""
    corners = np.add(origin, [0 * u, u, u + v, v])
    axes.fill(*corners.T, color=BLUE, alpha=0.25, lw=0)
    side(axes, origin, u, u - v, names[0], BLUE)
    side(axes, origin, v, v - u, names[1], ORANGE)


def side(axes, origin, vector, outwards, name, color):
    """An arrow, with its name outside of the parallelogram."""
    tip = origin + vector
    arrow(axes, origin, tip, color, lw=2)
    axes.annotate(
        f"${name}$",
        tip,
        11 * outwards / np.linalg.norm(outwards),
        textcoords="offset points",
        color=color,
        size=12,
        **MIDDLE,
    )


def layer():
    """The mixing layer in five steps, with the sizes d = 8, r = 4, n = 6."""
    figure, axes = canvas(9.4, 4.5)
    for x, word, formula, shape in (
        (1.05, "1  reduce", r"z_t = h_t W_{\rm red} + b_{\rm red}", r"d \to r"),
        (2.6, "2  look back", r"s_t = \sum_\Delta\, w_\Delta \odot z_{t-\Delta}", r"r \to r"),
        (4.75, "3  wedge", r"p_{ij} = z_i s_j - z_j s_i", r"r, r \to n"),
        (6.75, "4  project", r"g = p\, W_{\rm plu} + b_{\rm plu}", r"n \to d"),
        (8.45, "5  gate", r"\alpha \odot h_t + (1 - \alpha) \odot g", r"d, d \to d"),
    ):
        axes.text(x, 4.25, word, size=13, weight="bold", **MIDDLE)
        axes.text(x, 0.5, f"${formula}$", size=11.5, **MIDDLE)
        axes.text(x, 0.17, f"${shape}$", size=11, **MIDDLE)
    rng = np.random.default_rng(1)
    for x, y, size, name, blue in (  # vectors; `blue`: how much of each comes from token t
        (0.45, 3.05, 8, "h_t", 1),
        (1.75, 3.05, 4, "z_t", 1),
        (3.1, 1.55, 4, "s_t", 0),
        (0.45, 1.55, 8, r"h_{t-\Delta}", 0),
        (1.75, 1.55, 4, r"z_{t-\Delta}", 0),
        (6.2, 2.3, 6, "p", 0.5),
        (7.3, 2.3, 8, "g", 0.5),
        (9.1, 2.3, 8, r"{\rm out}_t", 0.75),
    ):
        for k, alpha in enumerate(rng.uniform(0.3, 1, size)):
            cell = {
                "y": y + 0.125 * (k + 0.42 - size / 2),
                "height": 0.105,
                "alpha": alpha,
            }
            axes.barh(left=x - 0.08, width=0.16 * blue, color=BLUE, **cell)
            axes.barh(left=x + 0.08, width=0.16 * (blue - 1), color=ORANGE, **cell)
        color = {1: BLUE, 0: ORANGE}.get(blue, INK)
        below = y - 0.0625 * size - 0.18
        axes.text(x, below, f"${name}$", size=12, color=color, **MIDDLE)
    for y, *ends in (
        (3.05, 0.6, 1.6, 1.9, 4.3),
        (1.55, 0.6, 1.6, 1.9, 2.95, 3.25, 3.7),
        (2.3, 5.55, 6.05, 6.35, 7.15, 7.45, 8.1, 8.5, 8.95),
    ):
        for start, end in zip(ends[::2], ends[1::2], strict=True):
            arrow(axes, (start, y), (end, y))
    axes.plot([0.45, 0.45, 8.3], [3.62, 3.85, 3.85], color=INK, lw=1)  # h_t goes to the gate, too
    circle = {"boxstyle": "circle", "fc": "none", "ec": INK}
    axes.annotate(r"$\alpha$", (8.3, 2.3), size=13, bbox=circle, **MIDDLE)
    arrow(axes, (8.3, 3.855), (8.3, 2.5))
    z = np.array([0.5, 1.35])
    s = np.array([1.28, 0.13])
    origin = np.array([4, 1.5])
    plane = [
        -0.25 * (z + s),
        1.3 * z - 0.25 * s,
        1.3 * (z + s),
        1.3 * s - 0.25 * z,
    ]
    axes.fill(*(origin + plane).T, color=INK, alpha=0.12, lw=0)
    parallelogram(axes, z, s, ("z_t", "s_t"), origin)
    axes.text(*origin + (z + s) / 2, r"$z_t \wedge s_t$", size=14, **MIDDLE)
    return figure


def wedge():
    """The three shadows of one parallelogram in R^3: their signed areas are Plücker coordinates."""
    u = np.array([1.0, 2, 0])
    v = np.array([0.0, 1, 1])
    figure, panels = plt.subplots(1, 3, figsize=(7.5, 2.8), sharex=True, sharey=True)
    numbers = G.plucker(u, v)
    for axes, i, j, p in zip(panels, *G.pairs(3), numbers, strict=True):
        plane = [i, j]
        parallelogram(axes, u[plane], v[plane], ("u", "v"))
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


def both_ways(axes, start, end, name):
    """Forward from start to end in grey, back in orange, each on its side, and so the names."""
    start = np.array(start)
    end = np.array(end)
    middle = (start + end) / 2
    x, y = (end - start) / np.linalg.norm(end - start)
    apart = np.array([-y, x])
    gap = 0.07 * apart
    arrow(axes, start + gap, end + gap, **THICK)
    arrow(axes, end - gap, start - gap, ORANGE, **THICK)
    if name:
        axes.text(*middle + 0.27 * apart, f"${name}$", size=13, **MIDDLE)
        gradient(axes, *middle - 0.27 * apart, name)


def gradient(axes, x, y, name, before=""):
    """The name of a gradient, in orange."""
    axes.text(x, y, rf"${before}{{\rm d}}{name}$", color=ORANGE, size=13, **MIDDLE)


def backward():
    """The ops of the layer, forward and back; at h and z two gradients meet."""
    figure, axes = canvas(9, 2.5)
    box = {"boxstyle": "round,pad=0.35", "fc": "none", "ec": INK}
    for word, x, y in (
        ("reduce", 1.35, 1.5),
        ("look back", 3.55, 0.55),
        ("wedge", 5, 1.5),
        ("project", 6.45, 1.5),
        ("gate", 7.75, 1.5),
    ):
        axes.text(x, y, word, size=12, bbox=box, **MIDDLE)
    for x, name in ((0.3, "$h$"), (2.4, "$z$"), (8.7, "out")):
        axes.text(x, 1.5, name, size=14, **MIDDLE)
    gradient(axes, 0.3, 1.16, "h", before="+")  # h and z are used twice
    gradient(axes, 2.25, 1.16, "z", before="+")
    gradient(axes, 1.35, 1.12, r"W_{\rm red}")
    gradient(axes, 3.55, 0.18, "w")
    gradient(axes, 6.45, 1.12, r"W_{\rm plu}")
    gradient(axes, 7.75, 1.12, r"W_{\rm gate}")
    for start, end, name in (
        ((0.5, 1.5), (0.85, 1.5), ""),
        ((1.85, 1.5), (2.25, 1.5), ""),
        ((2.6, 1.5), (4.5, 1.5), ""),
        ((2.55, 1.3), (3.1, 0.85), ""),
        ((3.95, 0.85), (4.65, 1.25), "s"),
        ((5.5, 1.5), (5.9, 1.5), "p"),
        ((7.0, 1.5), (7.35, 1.5), "g"),
        ((8.15, 1.5), (8.45, 1.5), ""),
    ):
        both_ways(axes, start, end, name)
    around(axes, 0.23, 7.82, 2.35, INK)
    around(axes, 7.68, 0.37, 2.21, ORANGE)
    return figure


def around(axes, start, end, height, color):
    """Over everything, from x = start down to x = end: h goes to the gate, too."""
    axes.plot([start, start, end], [1.75, height, height], color=color, lw=1.4)
    arrow(axes, (end, height), (end, 1.75), color, **THICK)


def pairs():
    """What planes of letter pairs are for in the first layer of shakespeare.npz."""
    params, _, extra = load_checkpoint(SHIPPED)
    w = G.Scope(params, "blocks.0.")
    letters = "\n ,.'aeiouybcdfghklmnprstvw"
    embedded = params["E"][encode(letters, extra["vocab"])]
    states, _ = G.layernorm_forward(embedded, w["ln1.w"], w["ln1.b"])
    z, _ = G.linear_forward(states, w["mix.W_red"], w["mix.b_red"])
    before = w["mix.taps"][0] * z
    p = G.plucker(*np.broadcast_arrays(z[None], before[:, None]))  # (before, letter, n)
    message = p @ w["mix.W_plu"]
    energy = np.square(message)
    share = energy.max((0, 1)) / energy.sum((0, 1))  # of each number's energy, in one pair
    number = np.argsort(share)[len(share) // 2]  # the median
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 5), sharey=True)
    shade(panels[0], np.linalg.norm(p, axis=-1), letters)
    shade(panels[1], message[..., number], letters)
    panels[0].set_title("area of the plane")
    panels[1].set_title(f"number {number} of the message")
    panels[0].set_ylabel("letter before")
    return figure


def shade(axes, values, letters):
    """A square for each pair of letters, as opaque as its value is large."""
    colors = np.where(values[..., None] > 0, to_rgba(BLUE), to_rgba(ORANGE))
    colors[..., 3] = np.abs(values) / np.abs(values).max()
    axes.imshow(colors, interpolation="none")
    names = ["↵", "␣", *letters[2:]]
    axes.set_xticks(range(len(letters)), names)
    axes.set_yticks(range(len(letters)), names)
    axes.set_xlabel("letter")


def run_page():
    """The names that the blocks of tutorial.md define, up to section 10."""
    page = (ROOT / "tutorial.md").read_text(encoding="utf-8").partition("## 10. ")[0]
    names = {}
    with contextlib.redirect_stdout(None):
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(compile(block, "tutorial.md", "exec"), names)
    return names


def thread():
    """The validation losses of the tutorial's models, and the losses of counting."""
    page = run_page()
    curves = {name: losses for name, losses in page["curves"].items() if name != "trained"}
    figure, axes = plt.subplots(figsize=(7.5, 4))
    ends = []
    for k, (name, losses) in enumerate(curves.items()):
        dotted = name.startswith(("average", "attention", "rotary"))
        color = f"C{k + (k > 6)}"  # not the grey
        style = ":" if dotted else "-"
        axes.plot(range(20, 301, 20), losses, lw=1.5, color=color, ls=style)
        ends.append((losses[-1], name, color))
    for name, loss in page["counted"].items():
        axes.plot([20, 300], [loss, loss], color=INK, lw=1, ls="--")
        ends.append((loss, f"counted {name}", INK))
    height = math.inf
    for loss, name, color in sorted(ends, reverse=True):  # labels one below the other
        height = min(loss, height - 0.085)
        axes.text(305, height, name, color=color, va="center")
    axes.set(
        xlabel="step",
        ylabel="validation loss, nats",
        xlim=(0, 375),
        ylim=(1.45, 3.2),
    )
    axes.set_xticks(range(0, 301, 50))
    return figure


def receptive_field():
    """Which tokens the last state of the default model has seen, layer by layer."""
    config = G.Config(vocab_size=1)
    seen = {0}
    figure, axes = plt.subplots(figsize=(7.5, 2.8))
    for layer in reversed(range(config.n_layer)):
        back = (0, *config.offsets[layer])
        for delta in back:
            color = BLUE if delta else INK
            for t in seen:
                axes.plot(
                    [t, t - delta],
                    [layer + 1, layer],
                    color=color,
                    lw=0.8,
                    alpha=0.7,
                )
        axes.scatter(list(seen), [layer + 1] * len(seen), color=ORANGE, s=22, zorder=3)
        seen = {t - delta for t in seen for delta in back}
    tokens = range(-32, 1)
    colors = [ORANGE if t in seen else INK for t in tokens]
    axes.scatter(tokens, [0] * len(tokens), color=colors, s=22, zorder=3)
    axes.set_xlabel("token, counted back from the one whose successor is predicted")
    axes.set_xticks(tokens[::-4])
    names = ["input", *(f"layer {i + 1}" for i in range(config.n_layer))]
    axes.set_yticks(range(config.n_layer + 1), names)
    return figure


def finite_differences():
    """Error of the central difference against the step, in float64 and float32: two U's."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    steps = 10.0 ** np.arange(-11, 0.01, 0.25)
    for dtype, color in ((np.float64, BLUE), (np.float32, ORANGE)):
        errors = errors_of_differences(dtype, steps)
        axes.loglog(
            steps,
            errors,
            color=color,
            label=dtype.__name__,
            marker="o",
            ms=2.5,
            lw=1,
        )
    axes.axhline(1e-6, color=INK, ls=":", lw=1)
    axes.text(1e-7, 1.5e-6, "the tests' limit")
    axes.set_xlabel("step of the difference")
    axes.set_ylabel("error / (|gradient| |direction|)")
    axes.legend(frameon=False)
    return figure


def errors_of_differences(dtype, steps):
    """For each step, along a random direction in one matrix of a small model."""
    name = "blocks.0.mix.W_plu"
    config = G.Config(7, 8, 2, 8, 4, ((1, 2), (1, 3)), 32)
    x, y = np.random.default_rng(1).integers(0, 7, (2, 2, 8))
    params = G.init_params(config, dtype=dtype)
    for value in params.values():
        value += dtype(0.1)
    W = params[name]
    direction = np.random.default_rng(2).standard_normal(W.shape).astype(dtype)
    _, grads = G.loss_and_grads(params, config, x, y)
    slope = float((grads[name] * direction).sum())
    scale = np.linalg.norm(grads[name]) * np.linalg.norm(direction)
    errors = []
    for step in steps:
        params[name] = W + dtype(step) * direction
        up, _ = G.loss_and_grads(params, config, x, y)
        params[name] = W - dtype(step) * direction
        down, _ = G.loss_and_grads(params, config, x, y)
        error = abs((up - down) / (2 * step) - slope) / scale
        errors.append(max(error, 1e-12))
    return errors


def dispute():
    """By how many percent perplexities are above attention's: published ones, and compare.md's."""
    rows = csv.DictReader((RESULTS / "published.csv").read_text(encoding="utf-8").splitlines())
    published = [row for row in rows if row["cell"]]
    cells = [*dict.fromkeys(row["cell"] for row in published)]
    figure, axes = plt.subplots(figsize=(9.4, 4.6))
    for row in published:
        gap = 100 * (float(row["Grassmann"]) / float(row["attention"]) - 1)
        place = cells.index(row["cell"]), gap
        axes.plot(*place, "D", color=ORANGE, ms=5)
        axes.annotate(row["label"], place, xytext=(7, -3), textcoords="offset points", size=7.5)
    page = (RESULTS / "compare.md").read_text(encoding="utf-8")
    for left, marker, text in ((0.24, "o", ""), (0.12, "s", " in subwords: 4,096 byte pairs")):
        section = page.partition(f"\n## 10. The dispute{text}\n")[2].partition("\n## ")[0]
        table = section.partition("gap to attention")[2]
        for model, gap in re.findall(r"^\| (.*?) \|.*\| (\S+)%.* \|$", table, re.MULTILINE):
            cell = re.sub(r" x \d+", "", model)  # of a rescaled model too, whose mark is empty
            inside = BLUE if cell == model else "none"
            x = cells.index(cell) - left
            axes.plot(x, float(gap), marker, color=BLUE, mfc=inside)
    axes.axhline(color=INK, lw=0.8)
    names = [cell.replace(", ", "\n") for cell in cells]
    axes.set_xticks(range(len(cells)), names)
    axes.set(xlim=(-0.5, len(cells) + 0.05), ylabel="perplexity above attention's, %")
    return figure


def memory():
    """A trained memory reads a verse; below it all keys and values, which attention would keep."""
    z, k, v = read_verse(rank=8, length=32)
    figure, axes = canvas(9, 4.6, 0.3)
    for left, t in ((0.5, 2), (2.9, 8), (5.6, 32)):
        M = k[:t].T @ v[:t]
        numbers(axes, left, 2.3, shares(M))
        kept = np.concatenate([k[:t], v[:t]], 1)
        numbers(axes, left, 0.5, np.clip(kept.T / 3, -1, 1), width=0.07)
        axes.text(left, 3.7, f"after {t} tokens", size=10)
    axes.text(0.5, 4.2, "memory: $r \\times r$ numbers, whatever the length", size=11)
    axes.text(0.5, 1.75, "attention: $2r$ numbers more with every token", size=11)
    last = z[-1:]
    numbers(axes, 5.35, 2.3, shares(last.T))
    numbers(axes, 5.6, 2.05, shares(last @ M))
    said = "$z_t$ beside the rows,\n$z_t M_t$ below: in every\ncolumn a sum"
    axes.text(7.1, 3.0, said, size=10)
    return figure


def read_verse(rank, length):
    """z, keys and values (length, rank) of a small model after 300 steps on Genesis."""
    corpus = read_corpus(str(ROOT / "docs" / "genesis.txt"), 64)
    config = G.Config(
        len(corpus.vocab),
        context=64,
        n_layer=1,
        d_model=32,
        rank=rank,
        offsets=((1, 2, 3, 4),),
        memory=True,
    )
    learner = Learner(config, Training(iters=300), corpus.train)
    for _ in range(300):
        learner.step()
    verse = corpus.train[None, :length]
    _, cache = G.model_forward(learner.params, config, verse)
    z, k, v, *_ = cache["blocks"][0]["mix"]["memory"]
    return z[0], k[0], v[0]


def shares(values):
    """The values, as shares of the largest."""
    return values / np.abs(values).max()


def numbers(axes, x, y, values, width=0.16):
    """A cell for each number of a matrix: blue above 0, orange below, opaque where it is large."""
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            above = len(values) - 1 - row
            place = x + width * column, y + width * above
            color = BLUE if value > 0 else ORANGE
            alpha = abs(float(value))
            axes.add_patch(plt.Rectangle(place, width, width, color=color, alpha=alpha, lw=0))
    height = width * len(values)
    frame = {"fill": False, "ec": INK, "lw": 0.8}
    axes.add_patch(plt.Rectangle((x, y), width * len(values[0]), height, **frame))


def five_rows():
    """From attention to our model: test losses of question 1 of compare.py, a dot per seed."""
    lab = Laboratory(RESULTS / "runs.jsonl", "shakespeare")
    known = Text("", SHAKESPEARE_SHA256, 65, [], (), (), (), 1)  # its runs, without the text
    lab.texts["shakespeare", 0] = known
    names = {
        "attention": "attention",
        "rotary attention": "rotary positions",
        "rotary attention with taps": "and taps",
        "attention with taps and our gate": "and our gate",
        "Grassmann": "our model",
    }
    rows = [row for row in lab.answer(CONTROLS) if row.label in names]
    figure, axes = plt.subplots(figsize=(6, 2.4))
    for k, row in enumerate(rows):
        color = ORANGE if row.label == "Grassmann" else BLUE
        losses = [final(run) for run in row.results]
        axes.plot(losses, [k] * len(losses), "o", color=color, alpha=0.7)
    axes.set_yticks(range(len(rows)), [names[row.label] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("test loss, nats per character; a dot per seed")
    return figure


FIGURES = (
    layer,
    wedge,
    backward,
    receptive_field,
    finite_differences,
    pairs,
    thread,
    dispute,
    memory,
    five_rows,
)

if __name__ == "__main__":
    command_line.Parser(__doc__).parse_args()
    for draw in FIGURES:
        with plt.rc_context(STYLE):
            file = FOLDER / f"{draw.__name__}.svg"
            draw().savefig(file, metadata={"Date": None})
        print(file)
