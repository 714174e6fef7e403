"""Measure the flow: the planes that a text passes through, as a trained model sees them.

  python -m experiments.flow explorer/shakespeare.npz      the text held out from its training
  python -m experiments.flow out/best.npz --file my.txt    a text of your own

In each layer a token and its partner span a plane, a point of the Grassmannian Gr(2, r). A text is
a path of such points. The program reads up to 16,384 characters. First it says for each layer
whether there is a flow. Then it prints three tables: steps and gate by kind of character; steps at
different scales, against steps in random order; and how much of a plane the character explains. The
explorer (python -m explorer) shows a text character by character. The first token has no partner
and spans no plane. With positions, windows overlap by half a context.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import grassmann as G
from charlm.text import encode, read_file
from charlm.trained import held_out, load_trained
from experiments.common import markdown
from grassmann import Array, UserError, require

MEASURED = 16384  # characters at most
LEAST = 20  # characters
PIECE = 1024  # characters read at once
KINDS = ("in a word", "word start", "capital", "punctuation", "space", "line end")

# ---- planes of Gr(2, r): any orthonormal basis (r, 2); nan where there is no plane ---------------


def plane(u, v, parallel=1e-5):
    """A basis of the plane that u and v span: (..., r), (..., r) -> (..., r, 2).

    nan if there is no plane, as in `unit_area_forward`: a zero vector, or sin θ at most `parallel`.
    """
    basis, R = np.linalg.qr(np.stack([u, v], -1))
    area = np.abs(R[..., 0, 0] * R[..., 1, 1])  # of the parallelogram, |u| |v| sin θ
    lengths = np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1)
    return where(area > parallel * lengths, basis)


def where(spans, basis):
    """The basis of a plane, or nan: (...), (..., r, 2) -> (..., r, 2)."""
    return np.where(spans[..., None, None], basis, np.nan)


def singular_values(M):
    return np.linalg.svd(np.nan_to_num(M), compute_uv=False)  # LAPACK refuses nan


def principal_angles(A, B):
    """Two angles, 0 to π/2, ascending: (..., r, 2), (..., r, 2) -> (..., 2).

    Their cosines are the singular values of AᵀB. Their sines, which are exact for small angles, are
    those of B - A AᵀB, the part of B outside A (Björck and Golub 1973).
    """
    inside = np.swapaxes(A, -1, -2) @ B  # (..., 2, 2)
    cosines = singular_values(inside)
    sines = singular_values(B - A @ inside)
    angles = np.arctan2(sines[..., ::-1], cosines)
    missing = np.isnan(inside[..., 0])
    return np.where(missing, np.nan, angles)


def distance(A, B):
    """Length of the shortest path, sqrt(θ₁² + θ₂²) <= π/√2: (..., r, 2), (..., r, 2) -> (...)."""
    return np.linalg.norm(principal_angles(A, B), axis=-1)


def nearest_plane(p):
    """The plane nearest to a bivector: (..., n) -> (..., r, 2); nan for p = 0.

    Let A be antisymmetric, with p above its diagonal. The dot product of p with a unit bivector
    x ∧ y is xᵀ A y, at most A's largest singular value. This value is double, and its vectors are
    eigenvectors of A² = -AᵀA.
    """
    r = int((2 * p.shape[-1]) ** 0.5) + 1  # n = r(r-1)/2
    i, j = G.pairs(r)
    A = np.zeros((*p.shape[:-1], r, r))
    A[..., i, j] = p
    A[..., j, i] = -p
    _, vectors = np.linalg.eigh(A @ A)
    return where(p.any(-1), vectors[..., :2])


# ---- the flow of a text --------------------------------------------------------------------------


@dataclass
class Flow:
    """What N layers compute from T characters. Raises UserError if half of them have no plane."""

    text: str
    z: Array  # (N, T, r)  reduced states
    s: Array  # (N, T, r)  their partners
    gate: Array  # (N, T)  mean of α over the width: 1 keeps the token's state, 0 takes the message

    def __post_init__(self):
        self.planes = plane(self.z, self.s)  # (N, T, r, 2)
        found = np.isfinite(self.planes[..., 0, 0]).sum(1)
        if 2 * found.min() <= len(self.text):
            raise UserError("half of this text or more spans no plane; give a more varied one")
        self.step = np.full(self.gate.shape, np.nan)  # (N, T)  distance from the plane before
        before = self.planes[:, :-1]
        self.step[:, 1:] = distance(before, self.planes[:, 1:])


def read_flow(params, config, text, vocab):
    """Read a text in pieces. Each begins early enough to see the whole past.

    With positions it sees half a context.
    """
    unknown = sorted(set(text) - set(map(chr, vocab)))
    if unknown:
        shown = ascii(unknown[:10])[1:-1]
        raise UserError(f"the model never saw {shown}, which this text has")
    tokens = encode(text, vocab)
    size = PIECE
    before = sum(map(max, config.offsets))  # how far back the last layer sees
    if config.memory:
        size = len(tokens)  # a memory sees everything
    if config.positions:
        before = config.context // 2
        size = config.context - before
    pieces = []
    for start in tqdm(range(0, len(tokens), size), "reading", leave=False, disable=None):
        first = max(0, start - before)
        _, cache = G.model_forward(params, config, tokens[None, first : start + size])
        mixes = [block["mix"] for block in cache["blocks"]]
        z = np.concatenate([mix["z"] for mix in mixes])  # (N, characters, r)
        s = np.concatenate([mix["s"] for mix in mixes])
        alpha = np.concatenate([mix["alpha"] for mix in mixes])
        seen = start - first
        new = [z[:, seen:], s[:, seen:], alpha[:, seen:].mean(-1)]
        pieces.append(new)
    whole = [np.concatenate(part, 1, dtype=float) for part in zip(*pieces, strict=True)]
    return Flow(text, *whole)


def character_kinds(text):
    """The kind of each character, one of KINDS."""
    c = np.array([*text])
    before = np.array([" ", *text[:-1]])
    tests = {
        "line end": c == "\n",
        "space": np.char.isspace(c),
        "punctuation": ~np.char.isalnum(c),
        "capital": np.char.isupper(c),
        "in a word": np.char.isalnum(before),
    }
    return np.select([*tests.values()], [*tests], "word start")  # the first that holds


def by_kind(text, values):
    """For each kind of character in the text, the mean of values (N, T) per layer (N)."""
    found = np.isfinite(values).any(0)
    kinds = np.where(found, character_kinds(text), "none")
    present = [kind for kind in KINDS if kind in kinds]
    return {kind: np.nanmean(values[:, kinds == kind], axis=1) for kind in present}


def coastline(flow, layer):
    """The path of one layer in steps of different sizes, a table with these columns:

    scale   "ruler": every k-th plane; "block" of k characters, "word", "line": the plane nearest to
            the sum of its bivectors
    size    characters per step
    step    mean length of a step, rad
    noise   mean distance of two of these planes at random: the step in random order
    """
    T = len(flow.text)
    bivectors = G.plucker(flow.z[layer], flow.s[layer])  # (T, n)
    longest = max(4, T // 64)
    rulers = [2**k for k in range(20) if 2**k <= longest]
    paths = [("ruler", k, flow.planes[layer, ::k]) for k in rulers]
    spans = []
    for k in rulers[2::2]:
        blocks = [(t, t + k) for t in range(0, T - k + 1, k)]
        spans.append(("block", k, blocks))
    for scale, pattern in (("word", r"\S+"), ("line", r"[^\n]+")):
        found = [match.span() for match in re.finditer(pattern, flow.text)]
        if len(found) > 4:
            spans.append((scale, T / len(found), found))
    for scale, size, bounds in spans:
        sums = np.stack([bivectors[start:end].sum(0) for start, end in bounds])
        paths.append((scale, size, nearest_plane(sums)))
    rng = np.random.default_rng(0)
    rows = []
    for scale, size, path in paths:
        step = np.nanmean(distance(path[:-1], path[1:]))
        i = rng.integers(len(path), size=4000)
        further = rng.integers(1, len(path), size=4000)
        j = (i + further) % len(path)
        noise = np.nanmean(distance(path[i], path[j]))
        rows.append((scale, size, step, noise))
    return np.rec.fromrecords(rows, names="scale,size,step,noise")


def explained(planes, labels):
    """The share of the variance of the planes' projectors that labels explain.

    planes (T, r, 2), labels (T). A single projector has |A Aᵀ|² = 2.
    """
    found = np.isfinite(planes[:, 0, 0])
    planes = planes[found]
    labels = labels[found]
    total = squared_sum(planes)
    within = 0
    for label in np.unique(labels):
        within += squared_sum(planes[labels == label])
    return (within - total) / (2 * len(planes) - total)


def squared_sum(planes):
    """|Σ A Aᵀ|² / T for planes (T, r, 2)."""
    side = np.concatenate(planes, axis=1)  # (r, 2T)
    return np.square(side @ side.T).sum() / len(planes)


# ---- the program ---------------------------------------------------------------------------------


def text_of_run(checkpoint, extra):
    """The text held out from the training. Raises UserError if it is not found."""
    try:
        return held_out(extra)
    except UserError as error:
        raise UserError(
            f"the text that {checkpoint} was trained on is not here ({error}); give one with --file"
        ) from None


def verdict(table, shuffled):
    """Says whether one layer's path is a flow.

    Its steps must be shorter than in random order, and shorter than the steps of the shuffled text.
    """
    share = step_shares(table)["ruler 1"]
    other = step_shares(shuffled)["ruler 1"]
    nearer = min(1, other) - share
    kind = "a flow"
    if nearer < 0.1:
        kind = "hardly a flow"
    if nearer < 0.01:
        kind = "no flow"
    return (
        f"{kind}, since a step to the next character is {share:.2f} of a step in random order "
        f"(in the shuffled text {other:.2f})"
    )


def step_shares(table):
    """The mean step at each scale, as a share of the mean step in random order."""
    shares = {}
    for row in table:
        name = row["scale"]
        if name in ("ruler", "block"):
            name += f" {row['size']:.0f}"
        shares[name] = row["step"] / row["noise"]
    return shares


def print_table(title, rows, digits=2):
    """Print a table with a column for each layer, and several numbers in a cell: "1.90 / 1.85"."""
    lines = []
    for name, values in rows.items():
        line = {title: name}
        for layer, cell in enumerate(zip(*values, strict=True), 1):
            numbers = " / ".join(f"{x:.{digits}f}" for x in cell)
            line[f"layer {layer}"] = numbers.replace("nan / nan", "–")
        lines.append(line)
    print("\n" + markdown(lines))


def main():
    command_line.plain_output()
    parser = command_line.Parser(__doc__)
    best = command_line.BEST
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, default=best, help=f"the model (default: {best})"
    )
    parser.add_argument("--file", type=Path, help="a UTF-8 text (default: the held-out text)")
    args = parser.parse_args()
    memory = "not enough memory for this model and this text"
    with command_line.short_errors(parser, args.checkpoint, memory):
        measure(args.checkpoint, read_file(args.file) if args.file else None)


def measure(checkpoint, text):
    """Read a text (None: the held-out text), measure, print. Raises UserError and OSError."""
    params, config, extra = load_trained(G, checkpoint)
    require(
        config.mixer == "grassmann" and config.rank > 2,
        f"{checkpoint} has no flow: it has another mixer, or rank 2 (one plane)",
    )
    if text is None:
        text = text_of_run(checkpoint, extra)
    text = text[:MEASURED]
    require(len(text) >= LEAST, f"give a text of at least {LEAST} characters")
    rng = np.random.default_rng(0)
    vocab = extra["vocab"]
    order = rng.permutation(len(text))
    shuffled = "".join(text[t] for t in order)
    trained = read_flow(params, config, text, vocab)
    untrained = read_flow(G.init_params(config), config, text, vocab)
    other = read_flow(params, config, shuffled, vocab)
    pairs = rng.standard_normal((2, 2, 4000, config.rank))
    random_step = distance(*plane(*pairs)).mean()

    flows = (trained, untrained, other)
    tables = [[coastline(flow, i) for i in range(config.n_layer)] for flow in flows]
    for i in range(config.n_layer):
        said = verdict(tables[0][i], tables[2][i])
        print(f"Layer {i + 1}: {said}.")
    print(
        f"\n{len(text)} characters. Steps: 0 to {np.pi / np.sqrt(2):.2f}, random planes "
        f"{random_step:.2f}. ruler k: every k-th plane. block k, word, line: the plane nearest to "
        "the sum of its bivectors."
    )
    print_kinds(trained, untrained)
    print_scales(tables)
    print_letters(trained, other)


def print_kinds(trained, untrained):
    """Steps and gates at each kind of character."""
    means = [np.nanmean(flow.step, 1) for flow in (trained, untrained)]
    rows = {"all": means}
    steps = by_kind(trained.text, trained.step)
    before = by_kind(trained.text, untrained.step)
    for kind in steps:
        rows[kind] = [steps[kind], before[kind]]
    print_table("mean step to: trained / untrained", rows)
    gates = by_kind(trained.text, trained.gate)
    print_table("mean gate α at", {kind: [gates[kind]] for kind in gates})


def print_scales(tables):
    """Steps at each scale, of all layers of three flows. nan: too few words or lines."""
    shares = [[step_shares(table) for table in of_flow] for of_flow in tables]
    rows = {}
    for name in shares[0][0]:
        rows[name] = [[layer.get(name, np.nan) for layer in of_flow] for of_flow in shares]
    title = "step, as a share of that in random order: trained / untrained / trained, shuffled text"
    print_table(title, rows)


def print_letters(trained, other):
    """How much of a plane its character explains."""
    shares = []
    for flow in (trained, other):
        letters = np.array([*flow.text])
        shares.append([explained(planes, letters) for planes in flow.planes])
    row = {"share of variance explained by the character": shares}
    print_table("text / shuffled text", row, digits=3)


if __name__ == "__main__":
    main()
