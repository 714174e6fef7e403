"""What learns most in so many seconds of one core: towards a `--preset best` of a quarter of an hour.

  python -m experiments.budget --data shakespeare          all that is in PLANS, eight hours
  python -m experiments.budget --data shakespeare --only "six layers of 160"

Each plan trains on the first 95% of the training text, for its seconds of processor time (not of the clock:
others may use the machine, too), with the rate going to 0 along a cosine over just that time. It is
measured on the last 5%, in windows of 256, as nanoGPT's are. What train_char.py validates on is not
touched. A line per plan goes into --out/budget.jsonl, with its settings and the losses of two running means
of the weights, too, and the same command goes on where it was stopped.
"""

import cli  # noqa: I001  (before NumPy)

import json
import math
import time
from pathlib import Path

import numpy as np

import grassmann as G
from experiments import mixers
from grassmann import Array, Config, Params
from text import read_corpus

OFFSETS = ((1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 6, 8), (1, 2, 4, 8, 12, 16), (1, 2, 4, 8, 16, 32, 64))
MODEL = {"context": 256, "d_model": 160, "dropout": 0.2}
HOW = {"seconds": 1500, "lr": 2.5e-3, "batch_size": 4, "muon": False, "decay": 0.1,
       "undropped": 0.0,  # for so much of its time no dropout
       "noise": 0.0,  # this part of the characters read is exchanged for others of the batch
       "seed": 0}

def layers(*which: int, **changes) -> dict:
    """A model of as many layers, with the offsets of these."""
    return {"n_layer": len(which), "offsets": tuple(OFFSETS[k] for k in which), **changes}

SIX, EIGHT = layers(*range(6)), layers(0, 1, 2, 2, 3, 3, 4, 5, d_model=136)
SHORT = {"seconds": 150, "dropout": 0.0}
PLANS = {  # what differs from MODEL and HOW
    "six layers of 160": SIX,
    "half the rate": SIX | {"lr": 1.25e-3},
    "twice the rate": SIX | {"lr": 5e-3},
    "five times the decay": SIX | {"decay": 0.5},
    "fifteen times the decay": SIX | {"decay": 1.5},
    "dropout from the middle on": SIX | {"undropped": 0.5},
    "with memory": SIX | {"memory": True},
    "one layer of attention": SIX | {"mixer": "hybrid"},
    "Muon": SIX | {"muon": True},
    "learned planes": layers(*range(6), d_model=184, mixer="learned planes", rank=64),
    "noise in what is read": SIX | {"noise": 0.05},
    "eight layers of 136": EIGHT,
    "six layers of 160, seed 1": SIX | {"seed": 1},
    "eight layers of 136, seed 1": EIGHT | {"seed": 1},
    "twelve layers of 104": layers(0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, d_model=104),
    "ten layers of 120, rank 20": layers(0, 1, 1, 2, 2, 3, 3, 4, 4, 5, d_model=120, rank=20),
    "four layers of 208, rank 24": layers(0, 1, 3, 5, d_model=208, rank=24),
    "four layers of 256, rank 24": layers(0, 1, 3, 5, d_model=256, rank=24),
    "short": SHORT | SIX,
    "short, half the batch": SHORT | SIX | {"batch_size": 2, "lr": 2e-3},
    "short, twice the batch": SHORT | SIX | {"batch_size": 8, "lr": 3.5e-3},
    "short, eight layers of 136": SHORT | EIGHT,
    "short, four layers of 208, rank 24": SHORT | layers(0, 1, 3, 5, d_model=208, rank=24),
}
mixers.install()
DECAYS = (0.99, 0.998)  # of the running means

def orthogonal(M: Array, steps: int = 5) -> Array:
    """A matrix with the singular vectors of M and singular values near 1, by Newton and Schulz.

    X ← a X + (b A + c A²) X with A = X Xᵀ acts on each singular value alone; these a, b, c are Muon's
    (Jordan, kellerjordan.github.io/posts/muon): quick, and content with values from 0.7 to 1.2.
    """
    X = M.T if len(M) > M.shape[1] else M
    X = X / (np.linalg.norm(X) + 1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * (A @ A)) @ X
    return X.T if len(M) > M.shape[1] else X

def muon_step(params: Params, grads: Params, state: dict, step: int, lr: float, weight_decay: float = 0.1) -> None:
    """Muon on the matrices inside the blocks, as large as AdamW's steps are (Liu, arXiv 2502.16982); AdamW else."""
    inside = {name for name in params if name.startswith("blocks") and params[name].ndim == 2 and "taps" not in name}
    G.adamw_step({name: p for name, p in params.items() if name not in inside}, grads, state, step, lr,
                 weight_decay=weight_decay)
    for name in inside:
        theta, g, m = params[name], grads[name], state["adam_m"][name]
        m += 0.05 * (g - m)
        theta *= 1 - lr * weight_decay
        theta -= lr * 0.2 * math.sqrt(max(theta.shape)) * orthogonal(0.05 * g + 0.95 * m)

def settings(name: str, seconds: float | None = None) -> dict:
    """All that a plan sets, for its own seconds or so many."""
    return MODEL | HOW | PLANS[name] | ({"seconds": seconds} if seconds else {})

def train(plan: dict, config: Config, text: Array) -> list[list]:
    """[step, loss of the weights, loss of each running mean] at each quarter of the plan's time."""
    cut, params, step, lost, found = len(text) * 95 // 100, G.init_params(config, plan["seed"]), 0, 0.0, []
    mixers.scale_features(params)
    state, means = G.adamw_init(params), [{name: p.copy() for name, p in params.items()} for _ in DECAYS]
    advance, started = muon_step if plan["muon"] else G.adamw_step, time.process_time()
    while len(found) < 4:
        done = (time.process_time() - started - lost) / plan["seconds"]  # of its time
        if done >= (len(found) + 1) / 4:
            before = time.process_time()
            found.append([step, *(G.validation_loss(w, config, text[cut:]) for w in (params, *means))])
            lost += time.process_time() - before
            continue
        x, y = G.get_batch(text[:cut], plan["batch_size"], config.context, plan["seed"], step)
        if plan["noise"]:
            rng = np.random.default_rng((plan["seed"], step, 2))
            x = np.where(rng.random(x.shape) < plan["noise"], rng.permutation(x.ravel()).reshape(x.shape), x)
        dropout = (plan["seed"], step, 1) if done >= plan["undropped"] else None
        _, grads = G.loss_and_grads(params, config, x, y, dropout)
        G.clip_grads(grads, 1.0)
        rate = max(done, 6e-4) / 0.03 if done < 0.03 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.03) / 0.97)
        advance(params, grads, state, step, plan["lr"] * rate, weight_decay=plan["decay"])
        for mean, decay in zip(means, DECAYS, strict=True):
            decay = min(decay, (step + 1) / (step + 10))
            for name, value in mean.items():
                value += (1 - decay) * (params[name] - value)
        step += 1
    return found

def row(name: str, run: dict) -> str:
    """Of the table."""
    *before, (steps, loss, *_) = run["found"]
    return (f"| {name} | {run['parameters'] / 1e6:.2f} | {run['settings']['seconds']:g} | {steps:,} "
            f"| {', '.join(f'{quarter[1]:.3f}' for quarter in before)} | {loss:.3f} |")

def main() -> None:
    cli.plain_output()
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", help="a UTF-8 text file, or 'shakespeare' (default: Python's own documentation)")
    parser.add_argument("--only", nargs="+", choices=PLANS, metavar="PLAN", default=[*PLANS], help="some of them, by name")
    parser.add_argument("--seconds", type=cli.number(float, 0, 10**6, above=True), help="for each, in place of its own")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of budget.jsonl (default: out)")
    args = parser.parse_args()
    with cli.short_errors(parser, args.out):
        corpus = read_corpus(args.data, 1024)
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / "budget.jsonl"
        finished = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
        print("| plan | million parameters | seconds | steps | loss at a quarter, half, three quarters | in the end |\n"
              + "|---" * 6 + "|")
        for name in args.only:
            plan = json.loads(json.dumps(settings(name, args.seconds)))  # as it comes back from the file
            key = {"settings": plan, "text": corpus.sha256}
            run = next((run for run in finished if run.items() >= key.items()), None)
            if run is None:
                config = Config(len(corpus.vocab), **{k: v for k, v in plan.items() if k not in HOW})
                run = key | {"parameters": sum(map(math.prod, G.param_shapes(config).values())),
                             "found": train(plan, config, corpus.train)}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(run) + "\n")
            print(row(name, run), flush=True)

if __name__ == "__main__":
    main()
