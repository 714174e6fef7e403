"""Break the mathematics on purpose, in one place at a time, and see whether the tests notice.

    python tests/mutate.py                  every mutation, ten minutes or so
    python tests/mutate.py plucker          mutations with "plucker" in their line

A test that cannot fail proves nothing. MUTATIONS lists possible mistakes. For a function or class
it has an expression or statement that occurs there once, and one or more versions of it with a
mistake. The tests run with the broken module in place of the right module until a test fails. Exit
code 1 if no test fails, if the list does not fit the code, or if a test fails without any mutation.
"""

import ast
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MATHEMATICS = [
    f"tests/test_{name}.py"
    for name in ("layers", "wedge", "model", "gradients", "training", "numerics")
]

RUN = """
import importlib.util, pytest, sys
from charlm import command_line
command_line.prepare()
_, file, name, *options = sys.argv
package, _, short = name.rpartition(".")
spec = importlib.util.spec_from_file_location(name, file)
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module  # before a test imports the right module
if package:
    setattr(importlib.import_module(package), short, module)
spec.loader.exec_module(module)
sys.exit(pytest.main(options))
"""

MUTATIONS = {  # in grassmann.py unless a module is named
    "": [("0.044715", "0.0447")],
    "linear_forward": [("y += b", "y -= b"), ("x.shape[-1] != len(W)", "False")],
    "linear_backward": [("W.T", "W"), ("dy.sum(0)", "dy.mean(0)")],
    "layernorm_forward": [
        ("np.sqrt(var + eps)", "np.sqrt(var) + eps"),
        ("x - mean(x)", "x"),
        ("np.square(x, dtype=np.float64)", "np.square(x)"),
    ],
    "layernorm_backward": [
        ("dx_hat - mean(dx_hat)", "dx_hat"),
        ("x_hat * (dot(dx_hat, x_hat) / len(w))", "0"),
        ("dy * x_hat", "dx_hat * x_hat"),
    ],
    "gelu_forward": [("x.clip(-10, 10)", "x")],
    "gelu_backward": [("1.5 * GELU_CA", "GELU_CA"), ("tanh * tanh", "tanh")],
    "draw_rows": [
        ("begin + first * row", "begin"),
        ("start - done", "start"),
        ("(shape[0] if n is None else n) * row", "size"),
        ("odd + size + 1", "odd + size"),
        (
            "np.random.Generator(bits).random(odd + size, np.float32)[odd:]",
            "np.random.Generator(bits).random(odd + size, np.float32)[:size]",
        ),
    ],
    "dropout_forward": [("1 - rate", "1"), ("draw(x.shape) >= rate", "draw(x.shape) < rate")],
    "embedding_backward": [("np.add", "np.maximum")],
    "cross_entropy_forward": [
        ("logits - logits.max(-1, keepdims=True)", "logits"),
        ("losses.mean()", "losses.sum()"),
    ],
    "cross_entropy_backward": [
        ("dlogits[np.arange(len(targets)), targets] -= 1", "pass"),
        ("dloss / len(targets)", "dloss"),
    ],
    "pairs": [("np.triu_indices(r, 1)", "np.tril_indices(r, -1)[::-1]", "np.triu_indices(r, 0)")],
    "plucker_forward": [("u.take(j, 0) * v.take(i, 0)", "-u.take(j, 0) * v.take(i, 0)")],
    "plucker_backward": [
        ("-dp", "dp"),
        ("A[i, j], A[j, i] = dp, -dp", "A[j, i], A[i, j] = dp, -dp"),
        ('-np.einsum("ijt,jt->it", A, u)', 'np.einsum("ijt,jt->it", A, u)'),
    ],
    "unit_area_forward": [
        ("1e-5", "1e-4", "1e-6"),
        ("(uu > tiny) & (vv > tiny)", "uu > tiny"),
        ("spans / np.where(spans, perp2, 1)", "1 / np.maximum(perp2, 1e-12)"),
        ("dot(v_perp, v_perp)", "np.maximum(vv - uv * uv / uu, 0)"),
        ("np.sqrt(inv_perp2)", "spans / np.sqrt(vv)"),
        ("np.sqrt(inv_perp2) / np.sqrt(uu)", "np.sqrt(inv_perp2 / uu)"),
        ("parallel**2 * vv", "parallel**2"),
        ("vv * inv_perp2 / uu", "np.sqrt(vv * inv_perp2 / uu)"),
    ],
    "unit_area_backward": [
        ("dq * inv_area - along * v_normal", "dq * inv_area"),
        ("-along * u_normal", "along * u_normal"),
    ],
    "partner_forward": [
        ("s[:, delta:] += term", "s[:, :-delta] += term"),
        ("term = z[:, :-delta]", "term = z[:, 1 : 1 - delta or None]"),
        ("s, cache = unit_area_forward(z, s)", "_, cache = unit_area_forward(z, s)"),
        ("s * share", "s"),
        ("np.array(offsets)", "0 * np.array(offsets)"),
        ("np.arange(z.shape[1])[:, None]", "np.arange(-1, z.shape[1] - 1)[:, None]"),
    ],
    "partner_backward": [
        ("ds * share", "ds"),
        ("dz[:, :-delta] += dterm", "dz[:, delta:] += dterm"),
        ("dz[:, delta:] += du", "pass"),
        ("(dterm * z[:, :-delta]).sum((0, 1))", "(dterm * z[:, :-delta]).mean((0, 1))"),
        ("dz, ds", "_, ds"),
        ("taps[k] * dterm", "dterm"),
    ],
    "gate_forward": [
        ("g + alpha * difference", "h - alpha * difference"),
        ("0.5 * a", "a"),
        ("0.5 + 0.5 * np.tanh(0.5 * a)", "1 / (1 + np.exp(-a))"),
    ],
    "gate_backward": [
        ("difference * direct * (1 - alpha)", "difference * direct"),
        ("dout - direct", "direct"),
    ],
    "associate": [
        ("M + K_T @ V", "M"),
        ("Q @ K_T * causal", "Q @ K_T"),
        ("Q @ M", "Q @ M.swapaxes(1, 2)"),
    ],
    "memory_forward": [
        ("seen + 1", "seen"),
        ("c * scale, seen + L", "c * scale, L"),
        ("c * scale", "c"),
        ("kv[..., :r] + s", "kv[..., :r]"),
        ("r * np.arange(seen + 1, seen + L + 1)", "np.arange(seen + 1, seen + L + 1)"),
    ],
    "memory_backward": [
        ("dm @ W_mem.T * scale", "dm @ W_mem.T"),
        ("read(dc, v, k)", "read(dc, k, v)"),
        ("read(v_r, dc_r, z_r)", "read(v_r, z_r, dc_r)"),
        ("read(k_r, z_r, dc_r)[0][:, ::-1]", "read(k_r, z_r, dc_r)[0]"),
    ],
    "mix_forward": [
        ('cache["gate"][1]', '1 - cache["gate"][1]'),
        ("window[:, -max(offsets):]", "window[:, 1 - max(offsets):]", "window"),
        ('np.concatenate([past["z"], z], 1)', 'np.concatenate([z, past["z"]], 1)'),
    ],
    "mix_backward": [
        ("dz += dz_partner", "pass"),
        ("dh + dh_red", "dh"),
        ("dh + dh_memory", "dh"),
        ("ds + ds_memory", "ds"),
    ],
    "mix_shapes": [("(2 * d, d)", "(d, d)")],
    "attention_core_forward": [
        ("math.sqrt(q.shape[-1])", "math.sqrt(q.shape[1] * q.shape[-1])"),
        ("keys - L", "keys - L + 1", "max(keys - L - 1, 0)"),
        ("scores - scores.max(-1, keepdims=True)", "scores"),
        ('[past["v"], v]', '[v, past["v"]]'),
    ],
    "attention_core_backward": [
        ("da - dot(a, da)", "da"),
        ("math.sqrt(q.shape[-1])", "1"),
        ("dqk.swapaxes(-1, -2) @ q", "dqk @ q"),
    ],
    "prenorm_block_forward": [("h + ffn", "ffn")],
    "prenorm_block_backward": [
        ("dout + dh", "dh"),
        ("dh + dx", "dx"),
        ('cache["mask_mix"]', 'cache["mask_ffn"]'),
    ],
    "paper_block_forward": [("h + mix", "mix")],
    "paper_block_backward": [("dsum + dh", "dh"), ("dh += dmix", "pass")],
    "default_offsets": [("3 - 4 * (n_layer - 1 - i) // n_layer", "4 * i // n_layer")],
    "Config": [
        (
            "0 < min(layer) <= max(layer) < self.context",
            "max(layer) < self.context",
            "0 < min(layer) <= self.context",
        ),
        ("len(set(layer)) == len(layer) > 0", "len(layer) > 0"),
        ('2 if name == "rank" else 1', "1"),
        ("0 <= self.dropout < 1", "0 <= self.dropout <= 1"),
        ("self.d_model % self.n_head == 0", "self.d_model >= self.n_head"),
        ("len(self.offsets) == self.n_layer", "True"),
        ("not (self.memory and self.normalize)", "True"),
        ("not self.memory and not self.offsets", "not self.offsets", "not self.memory"),
    ],
    "init_params": [
        ("math.sqrt(2 * config.n_layer)", "math.sqrt(config.n_layer)"),
        ("scales.get(kind, 0.02)", 'scales.get(kind.replace("taps", ""), 0.02)'),
        ("config.d_model ** -0.5", "0.02"),
    ],
    "check_model": [
        (
            "given != shapes",
            "given.keys() != shapes.keys()",
            "given.keys() < shapes.keys()",
            "given.keys() > shapes.keys()",
        )
    ],
    "check_tokens": [
        ("tokens.ndim == 2", "True"),
        ("tokens.size > 0", "True"),
        ('tokens.dtype.kind in "iu"', "True"),
        ("low >= 0", "True"),
        ("high <= last", "True"),
    ],
    "model_forward": [
        ('params["ln_f.b"]', '0 * params["ln_f.b"]'),
        ('params["P"][start:end]', 'params["P"][:end - start]'),
        ("end <= config.context", "end < config.context"),
    ],
    "model_backward": [
        ('dE + embedding_backward(dh, cache["embed"])', "dE"),
        ("dh.sum(0)", "dh.mean(0)"),
        ("reversed(range(config.n_layer))", "range(config.n_layer)"),
        ('dh = dropout_backward(dh, cache["mask"])', "pass"),
    ],
    "forward": [("check_model(params, config)", "None"), ("check_tokens(tokens, config)", "None")],
    "loss_and_grads": [
        ("share * loss", "loss"),
        ("cross_entropy_backward(share, c_loss)", "cross_entropy_backward(1.0, c_loss)"),
        ("check_model(params, config)", "None"),
        ("check_tokens(tokens, config)", "check_tokens(x, config)", "check_tokens(y, config)"),
        ("x.shape == y.shape", "True"),
    ],
    "adamw_step": [
        ("(0.9, 0.99)", "(0.9, 0.999)"),
        ("beta_1**t", "beta_1 ** (t + 1)"),
        ("np.sqrt(v / fix_2)", "np.sqrt(v)"),
        ("theta.ndim > 1", "theta.ndim > 0"),
        ("theta *= 1 - lr * weight_decay", "theta *= 1 - weight_decay"),
        ("np.sqrt(v / fix_2) + eps", "np.sqrt(v / fix_2 + eps)"),
        ("g * g - v", "np.abs(g) - v"),
    ],
    "clip_grads": [("g.astype(np.float64)", "g"), ("max_norm / norm", "1 / norm")],
    "get_batch": [
        ("len(tokens) - context", "len(tokens) - context - 1"),
        ("tokens[windows + 1]", "tokens[windows]"),
        ("(seed, step)", "seed + step"),
        ("len(tokens) > context", "len(tokens) >= context"),
    ],
    "validation_loss": [
        ("whole < targets", "False"),
        ("y.size", "context"),
        ("tokens[None, whole:-1]", "tokens[None, whole - 1:-2]"),
        ("len(tokens) > 1", "len(tokens) > 0"),
    ],
    "stream_init": [("check_model(params, config)", "None")],
    "stream_read": [
        ('state["position"] += len(now)', 'state["position"] += 1'),
        ('config.context - state["position"]', "config.context"),
        ("config.context // 2", "config.context // 2 - 1"),
        ("state |= stream_init(params, config)", 'state["position"] = 0'),
        ('state["position"] == config.context', 'state["position"] > config.context'),
        ("len(tokens) > 0", "True"),
        (
            "0 <= min(tokens) <= max(tokens) < config.vocab_size",
            "max(tokens) < config.vocab_size",
            "0 <= min(tokens)",
        ),
    ],
    "sample": [
        ("logits.argmax()", "logits.argmin()"),
        ("(logits - logits.max()) / temperature", "(logits - logits.max()) * temperature"),
        ("np.partition(logits, -top_k)[-top_k]", "np.sort(logits)[1 - top_k]"),
        ("np.isfinite(logits).all()", "True"),
    ],
    "generate": [
        ("np.random.default_rng(seed)", "np.random.default_rng(0)"),
        ("[0]", "[1]"),
        ("check_tokens(np.array([prompt]), config)", "None"),
        ("0 <= temperature < math.inf", "temperature < math.inf"),
        ("operator.index(n) >= 0", "True"),
        ("operator.index(top_k) >= 1", "operator.index(top_k) >= 0"),
    ],
    "charlm.training.__post_init__": [
        ("least <= value < 1e300", "value < 1e300", "0 <= value < 1e300"),
        ('name == "min_lr" and value is None', "value is None"),
    ],
    "charlm.training.rate": [
        ("step + 1", "step"),
        ("0.5 * (self.lr - min_lr)", "0.5 * self.lr"),
        ("min(1.0, progress)", "progress"),
    ],
    "charlm.training.train_step": [
        ('hasattr(model, "train_step")', "False"),
        ("training.seed", "0"),
        ("training.batch_size", "2"),
    ],
    "charlm.training.step_on_batch": [
        ("(t.seed, step)", "(t.seed, 0)"),
        ("model.clip_grads(grads, t.grad_clip)", "model.clip_grads(grads, 1.0)"),
        ("t.rate(step)", "t.lr"),
        ("t.weight_decay", "0.1"),
    ],
    "charlm.training.loss_and_grads": [
        ("(*seed, 1)", "(*seed, 0)"),
        ("int(rows[0])", "0"),
        ("(int(rows[0]), len(x))", "(int(rows[0]), len(rows))"),
        ("grads[name] += g", "grads[name] = g"),
        ("loss += shard_loss", "pass"),
        ("threads >= 0", "True"),
    ],
    "charlm.own_layer.load_layer": [
        ("callable(vars(module).get(part))", "True"),
        ("hashlib.sha256(content)", 'hashlib.sha256(b"")'),
    ],
    "charlm.own_layer.gradient_errors": [
        ("np.isfinite(error)", "True"),
        ("abs(derived - measured)", "derived - measured"),
    ],
    "charlm.own_layer.sees_the_future": [
        ("(changed[half:] + 1) % config.vocab_size", "changed[half:]")
    ],
    "charlm.own_layer.check_layer": [("2", "1"), ("change < 1e-8", "True")],
    "charlm.checkpoint.save_checkpoint": [
        ('Path(f"{os.fspath(path)}.tmp")', "Path(path)"),
        ("unfinished.unlink(missing_ok=True)", "None"),
        ("check_content(groups, config, extra)", "None"),
        ('json.loads(document)["extra"] == rest', "True"),
    ],
    "charlm.checkpoint.load_checkpoint": [
        ("check_content(groups, config, extra)", "None"),
        ('meta["format"] == FORMAT', "True"),
        ("member.compress_type == zipfile.ZIP_STORED", "True"),
    ],
    "charlm.checkpoint.check_content": [
        ("dtype in (np.float32, np.float64)", "True"),
        ("check_model(group, config)", "None"),
        ("a.dtype == dtype", "True"),
        ("np.isfinite(a).all()", "True"),
        ("vocab == sorted(set(vocab))", "True"),
    ],
}


def source(module: str) -> str:
    return (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def broken(where: str, old: str, new: str) -> tuple[str, str, str]:
    """The module, the function, and the module's source with the mistake."""
    module, _, name = f"grassmann.{where}".removeprefix("grassmann." * ("." in where)).rpartition(
        "."
    )
    tree = ast.parse(source(module))
    (one,), (other,) = ast.parse(old).body, ast.parse(new).body
    if isinstance(one, ast.Expr):
        one, other = one.value, other.value
    code = ast.unparse(one)
    scopes = [node for node in ast.walk(tree) if getattr(node, "name", None) == name] or [tree]
    places = [
        (parent, field, k)
        for parent in ast.walk(scopes[0])
        for field, value in ast.iter_fields(parent)
        for k, node in enumerate(value if isinstance(value, list) else [value])
        if type(node) is type(one) and ast.unparse(node) == code
    ]
    if len(scopes) != 1 or len(places) != 1:
        sys.exit(f"{where}: {old!r} occurs {len(places)} times, not once: update the list")
    ((parent, field, k),) = places
    if isinstance(value := getattr(parent, field), list):
        other = [*value[:k], other, *value[k + 1 :]]
    setattr(parent, field, other)
    return module, name, ast.unparse(ast.fix_missing_locations(tree))


def killer(mutant: tuple[str, str, str]) -> str | None:
    """The first test that fails, or None. Test files that name the function run first."""
    module, name, code = mutant
    op = re.sub("_(forward|backward)$", "", name)
    tests = sorted(
        MATHEMATICS, key=lambda test: op not in (ROOT / test).read_text(encoding="utf-8")
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "mutant.py")
        file.write_text(code, encoding="utf-8")
        tests = ["tests/programs/test_checkpoints.py"] if module == "charlm.checkpoint" else tests
        run = subprocess.run(
            [sys.executable, "-c", RUN, file, module, "-x", "-q", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)( - |$)", run.stdout, re.MULTILINE)
    if run.returncode and not failed:
        sys.exit(f"pytest ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return failed[1] if failed else None


def main() -> int:
    every = [
        (where, old, new)
        for where, mistakes in MUTATIONS.items()
        for old, *news in mistakes
        for new in news
    ]
    chosen = [
        mutation for mutation in every if all(word in " ".join(mutation) for word in sys.argv[1:])
    ]
    if not chosen:
        sys.exit(f"{__doc__}\nno mutation has {' '.join(sys.argv[1:])} in its line")
    mutants, survivors = [broken(*mutation) for mutation in chosen], 0
    for module in {module == "charlm.checkpoint": module for module, *_ in mutants}.values():
        if failed := killer((module, "", source(module))):
            sys.exit(f"without any mutation {failed} fails: repair that first")
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        for mutation, found in zip(chosen, workers.map(killer, mutants), strict=True):
            survivors += not found
            print(f"{': '.join(mutation)[:90]:90} {found or 'SURVIVED'}", flush=True)
    print(f"{len(mutants)} mutations, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
