"""Measure the flow: the planes that a text passes through, as a trained model sees them.

  python -m experiments.flow explorer/shakespeare.npz the text held out from its training
  python -m experiments.flow out/best.npz --text "To be, or not to be, that is the question."
  python -m experiments.flow --file my.txt         a text in a file

In each layer a token and its partner span a plane, a point of the Grassmannian Gr(2, r). A text is a path of such
points. The program reads up to 16,384 characters. First it prints for each layer whether there is a flow, then
tables: steps and gate by kind of character; steps at different scales, against steps in random order; and how much of a
plane the character explains. The explorer (python -m explorer) shows a text character by character. The first token has
no partner and spans no plane. With positions, windows overlap by half a context.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import grassmann as G
from charlm.own_layer import load_layer
from charlm.text import encode, read_file
from charlm.trained import held_out, load_trained
from experiments.common import markdown
from grassmann import Array, Config, Params, UserError, require

MEASURED, LEAST = 16384, 20  # characters: at most, at least
KINDS = ("in a word", "word start", "capital", "punctuation", "space", "line end")

# ---- planes of Gr(2, r): any orthonormal basis (r, 2); nan where there is no plane ---------------


def plane(u: Array, v: Array, parallel: float = 1e-5) -> Array:
    """A basis of the plane that u and v span: (..., r), (..., r) -> (..., r, 2). nan if there is no
    plane, as in `unit_area_forward`: a zero vector, or sin θ at most `parallel`."""
    basis, R = np.linalg.qr(np.stack([u, v], -1))
    area = np.abs(R[..., 0, 0] * R[..., 1, 1])  # of the parallelogram, |u| |v| sin θ
    least = parallel * np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1)
    return np.where((area > least)[..., None, None], basis, np.nan)


def principal_angles(A: Array, B: Array) -> Array:
    """Two angles, 0 to π/2, ascending: (..., r, 2), (..., r, 2) -> (..., 2). Their cosines are the singular values of
    AᵀB. Their sines, exact for small angles, are those of B - A AᵀB, the part of B outside A (Björck, Golub 1973)."""
    inside = np.swapaxes(A, -1, -2) @ B  # (..., 2, 2)
    cosines, sines = (
        np.linalg.svd(np.nan_to_num(M), compute_uv=False)  # LAPACK refuses nan
        for M in (inside, B - A @ inside)
    )
    return np.where(np.isnan(inside[..., 0]), np.nan, np.arctan2(sines[..., ::-1], cosines))


def distance(A: Array, B: Array) -> Array:
    """Length of the shortest path, sqrt(θ₁² + θ₂²) <= π/√2: (..., r, 2), (..., r, 2) -> (...)."""
    return np.linalg.norm(principal_angles(A, B), axis=-1)


def nearest_plane(p: Array) -> Array:
    """The plane nearest to a bivector: (..., n) -> (..., r, 2); nan for p = 0. Let A be antisymmetric, with
    p above its diagonal. The dot product of p with a unit bivector x ∧ y is xᵀ A y, at most A's largest
    singular value. This value is double, and its vectors are eigenvectors of A² = -AᵀA."""
    i, j = G.pairs(int((2 * p.shape[-1]) ** 0.5) + 1)  # n = r(r-1)/2
    A = np.zeros((*p.shape[:-1], j[-1] + 1, j[-1] + 1))
    A[..., i, j], A[..., j, i] = p, -p
    return np.where(p.any(-1)[..., None, None], np.linalg.eigh(A @ A)[1][..., :2], np.nan)


# ---- the flow of a text --------------------------------------------------------------------------


@dataclass
class Flow:
    """What N layers compute from T characters. Raises UserError if half or more of them have no plane."""

    text: str
    z: Array  # (N, T, r)  reduced states
    s: Array  # (N, T, r)  their partners
    gate: Array  # (N, T)  mean of α over the width: 1 passes on the token's state, 0 the plane's message

    def __post_init__(self) -> None:
        self.planes = plane(self.z, self.s)  # (N, T, r, 2)
        if 2 * np.isfinite(self.planes[..., 0, 0]).sum(1).min() <= len(self.text):
            raise UserError("half of this text or more spans no plane; give a more varied one")
        self.step = np.full(self.gate.shape, np.nan)  # (N, T)  distance from the plane before
        self.step[:, 1:] = distance(self.planes[:, :-1], self.planes[:, 1:])


def read_flow(params: Params, config: Config, text: str, vocab: list[int]) -> Flow:
    """Read a text in pieces. Each begins early enough to see the whole past (with positions: half a context)."""
    if unknown := sorted(set(text) - set(map(chr, vocab))):
        raise UserError(f"the model never saw {ascii(unknown[:10])[1:-1]}, which this text has")
    tokens = encode(text, vocab)
    before = sum(map(max, config.offsets))  # how far back the last layer sees
    size = len(tokens) if config.memory else 1024  # a memory sees everything
    if config.positions:
        size, before = config.context - config.context // 2, config.context // 2
    pieces = []
    for start in tqdm(range(0, len(tokens), size), "reading", leave=False, disable=None):
        first = max(0, start - before)
        _, cache = G.model_forward(params, config, tokens[None, first : start + size])
        mixes = [block["mix"] for block in cache["blocks"]]
        require(
            all("z" in mix and "s" in mix for mix in mixes),
            "this layer's cache has no z and s that span planes",
        )
        seen = [
            (mix["z"][0], mix["s"][0], mix.get("alpha", np.nan * mix["z"])[0].mean(-1))
            for mix in mixes
        ]
        pieces.append([np.stack(a)[:, start - first :] for a in zip(*seen, strict=True)])
    return Flow(text, *(np.concatenate(a, 1, dtype=float) for a in zip(*pieces, strict=True)))


def character_kinds(text: str) -> Array:
    """The kind of each character, one of KINDS."""
    c, before = np.array([*text]), np.array([" ", *text[:-1]])
    tests = {
        "line end": c == "\n",
        "space": np.char.isspace(c),
        "punctuation": ~np.char.isalnum(c),
        "capital": np.char.isupper(c),
        "in a word": np.char.isalnum(before),
    }
    return np.select([*tests.values()], [*tests], "word start")  # the first that holds


def by_kind(text: str, values: Array) -> dict[str, Array]:
    """For each kind of character in the text, the mean of values (N, T) per layer (N)."""
    kinds = np.where(np.isfinite(values).any(0), character_kinds(text), "none")
    return {k: np.nanmean(values[:, kinds == k], axis=1) for k in KINDS if (kinds == k).any()}


def coastline(flow: Flow, layer: int) -> Array:
    """The path of one layer in steps of different sizes, a table with these columns:

    scale ("ruler": every k-th plane; "block" of k, "word", "line": the plane nearest to the sum of
    its bivectors), size (characters per step), step (mean, rad), noise (mean distance of two of these
    planes at random: the step in random order)
    """
    T, rng, rows = len(flow.text), np.random.default_rng(0), []
    bivectors = G.plucker(flow.z[layer], flow.s[layer])  # (T, n)
    rulers = [2**k for k in range(20) if 2**k <= max(4, T // 64)]
    paths = [("ruler", k, flow.planes[layer, ::k]) for k in rulers]
    spans = [("block", k, [(t, t + k) for t in range(0, T - k + 1, k)]) for k in rulers[2::2]]
    for scale, pattern in (("word", r"\S+"), ("line", r"[^\n]+")):
        found = [match.span() for match in re.finditer(pattern, flow.text)]
        spans += [(scale, T / len(found), found)] if len(found) > 4 else []
    for scale, size, bounds in spans:
        sums = np.stack([bivectors[start:end].sum(0) for start, end in bounds])
        paths.append((scale, size, nearest_plane(sums)))
    for scale, size, path in paths:
        i, further = rng.integers(len(path), size=4000), rng.integers(1, len(path), size=4000)
        noise = np.nanmean(distance(path[i], path[(i + further) % len(path)]))
        rows.append((scale, size, np.nanmean(distance(path[:-1], path[1:])), noise))
    return np.rec.fromrecords(rows, names="scale,size,step,noise")


def explained(planes: Array, labels: Array) -> float:
    """The share of the variance of the planes' projectors, planes (T, r, 2), that labels (T) explain."""
    planes, labels = (x[np.isfinite(planes[:, 0, 0])] for x in (planes, labels))  # nan: no plane
    groups = [planes, *(planes[labels == label] for label in np.unique(labels))]
    sides = [np.concatenate(group, axis=1) for group in groups]  # (r, 2T)
    total, *within = (np.square(A @ A.T).sum() / (A.shape[1] / 2) for A in sides)  # |Σ A Aᵀ|² / T
    return (sum(within) - total) / (2 * len(planes) - total)  # a single projector has |A Aᵀ|² = 2


# ---- the program ---------------------------------------------------------------------------------


def text_of_run(checkpoint: Path, extra: dict) -> str:
    """The text held out from the training. Raises UserError if it is not found."""
    try:
        return held_out(extra)
    except UserError as error:
        raise UserError(
            f"the text that {checkpoint} was trained on is not here ({error}); "
            "give one with --text or --file"
        ) from None


def verdict(table: Array, shuffled: Array) -> str:
    """Says whether one layer's path is a flow. Its steps must be shorter than in random order, and shorter than the
    steps of the shuffled text."""
    share, other = step_shares(table)["ruler 1"], step_shares(shuffled)["ruler 1"]
    nearer = min(1, other) - share
    kind = "no flow" if nearer < 0.01 else "hardly a flow" if nearer < 0.1 else "a flow"
    return (
        f"{kind}, since a step to the next character is {share:.2f} of a step in random order "
        f"(in the shuffled text {other:.2f})"
    )


def print_table(title: str, rows: Iterable[tuple[str, list[str]]]) -> None:
    """Print a table in Markdown with a column for each layer."""
    print(
        "\n"
        + markdown(
            [
                {title: name} | {f"layer {i}": cell for i, cell in enumerate(cells, 1)}
                for name, cells in rows
            ]
        )
    )


def beside(*values: Array, digits: int = 2) -> list[str]:
    """Several numbers for each layer, as "1.90 / 1.85"; – for nan."""
    cells = (" / ".join(f"{x:.{digits}f}" for x in layer) for layer in zip(*values, strict=True))
    return [cell.replace("nan / nan", "–") for cell in cells]


def step_shares(table: Array) -> dict[str, float]:
    """The mean step at each scale, as a share of the mean step in random order."""
    return {
        row["scale"] + (f" {row['size']:.0f}" if row["scale"] in ("ruler", "block") else ""): row[
            "step"
        ]
        / row["noise"]
        for row in table
    }


def main() -> None:
    command_line.plain_output()
    parser, best = command_line.Parser(__doc__), command_line.BEST
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, default=best, help=f"the model (default: {best})")
    add("--text", help="a text (default: the text held out from the training)")
    add("--file", type=Path, help="a text in a UTF-8 file")
    add("--mixer", help="the file of your own layer, if the model was trained with one")
    args = parser.parse_args()
    with command_line.short_errors(
        parser, args.checkpoint, "not enough memory for this model and this text"
    ):
        if args.mixer:
            load_layer(args.mixer)
        measure(args.checkpoint, read_file(args.file) if args.file else args.text)


def measure(checkpoint: Path, text: str | None) -> None:
    """Read a text (None: the held-out text), measure, print. Raises UserError and OSError."""
    params, config, extra = load_trained(G, checkpoint)
    require(
        config.mixer != "attention" and config.rank > 2,
        f"{checkpoint} has no flow: it is a Transformer, or of rank 2 (one plane)",
    )
    text = (text_of_run(checkpoint, extra) if text is None else text)[:MEASURED]
    require(len(text) >= LEAST, f"give a text of at least {LEAST} characters")
    rng, vocab = np.random.default_rng(0), extra["vocab"]
    shuffled = "".join(text[t] for t in rng.permutation(len(text)))
    flows = {
        "trained": read_flow(params, config, text, vocab),
        "untrained": read_flow(G.init_params(config), config, text, vocab),
        "trained, shuffled text": read_flow(params, config, shuffled, vocab),
    }
    flow, untrained, other = flows.values()
    random_step = distance(*plane(*rng.standard_normal((2, 2, 4000, config.rank)))).mean()
    measured = {
        name: [coastline(flow, i) for i in range(config.n_layer)]
        for name, flow in tqdm(flows.items(), "measuring", leave=False, disable=None)
    }
    steps = [by_kind(text, f.step) for f in (flow, untrained)]
    gates, all_steps = by_kind(text, flow.gate), [np.nanmean(f.step, 1) for f in (flow, untrained)]
    for i, tables in enumerate(
        zip(measured["trained"], measured["trained, shuffled text"], strict=True)
    ):
        print(f"Layer {i + 1}: {verdict(*tables)}.")
    print(
        f"\n{len(text)} characters. Steps: 0 to {np.pi / np.sqrt(2):.2f}, random planes {random_step:.2f}. "
        "ruler k: every k-th plane. block k, word, line: the plane nearest to the sum of its bivectors."
    )
    print_table(
        "mean step to: trained / untrained",
        [
            ("all", beside(*all_steps)),
            *((kind, beside(*(means[kind] for means in steps))) for kind in steps[0]),
        ],
    )
    print_table("mean gate α at", ((kind, beside(gates[kind])) for kind in gates))
    shares = [
        [step_shares(table) for table in tables] for tables in measured.values()
    ]  # nan: too few words or lines
    print_table(
        f"step, as a share of that in random order: {' / '.join(measured)}",
        (
            (name, beside(*([layer.get(name, np.nan) for layer in flow] for flow in shares)))
            for name in shares[0][0]
        ),
    )
    letters = [
        [explained(planes, np.array([*f.text])) for planes in f.planes] for f in (flow, other)
    ]
    print_table(
        "text / shuffled text",
        [("share of variance explained by the character", beside(*letters, digits=3))],
    )


if __name__ == "__main__":
    main()
