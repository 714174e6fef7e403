"""Break grassmann.py on purpose, in one place at a time, and see whether the tests notice.

    python tests/mutate.py            every mutation, some minutes on two cores
    python tests/mutate.py wedge      those whose name contains "wedge"

A test that cannot fail proves nothing. Every line of MUTATIONS is a mistake that one could make, as (name, the
source as it is, the source with the mistake). A copy of the project in a temporary folder gets one of them and
runs the mathematical tests until one fails. Exit code 1 if a mutation survives them all, 2 if the list no longer
fits the source (each piece must occur exactly once) or the tests fail without any mutation.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("optimizer", "wedge", "gradients", "model", "numerics")]
AT_ONCE = 2

MUTATIONS = [
    # configuration and initial weights
    ("offset 0 allowed", "min(layer) < 1", "min(layer) < 0"),
    ("offset as large as the context allowed", "max(layer) >= self.context", "max(layer) > self.context"),
    ("repeated offsets allowed", "len(set(layer)) < len(layer)", "len(set(layer)) > len(layer)"),
    ("rank 1 allowed", '2 if name == "rank" else 1', "1"),
    ("dropout 1 allowed", "0 <= self.dropout < 1", "0 <= self.dropout <= 1"),
    ("heads need not divide the width", "self.d_model % self.n_head", "self.d_model < self.n_head"),
    ("init: residual scale without the 2", "math.sqrt(2 * config.n_layer)", "math.sqrt(config.n_layer)"),
    ("init: taps as small as matrices", '"taps": 0.5', '"taps": 0.02'),
    ("init: W_red as small as other matrices", "config.d_model**-0.5", "0.02"),
    ("gate matrix without g", '"mix.W_gate": (2 * d, d)', '"mix.W_gate": (d, d)'),
    # small ops
    ("linear: bias subtracted", "    y += b\n", "    y -= b\n"),
    ("linear: no bias", "    y += b\n", ""),
    ("linear backward: W not transposed", "np.matmul(dy, W.T", "np.matmul(dy, W"),
    ("linear backward: mean for sum", "rows.T @ dy, dy.sum(0)", "rows.T @ dy, dy.mean(0)"),
    ("layernorm: eps outside the root", "np.sqrt(var + eps)", "(np.sqrt(var) + eps)"),
    ("layernorm: mean not subtracted", "x = x - mean(x)", "x = x - 0"),
    ("layernorm: sample variance", "np.float64))  #", "np.float64)) * len(w) / (len(w) - 1)  #"),
    ("layernorm backward: not through the mean", "(dx_hat - mean(dx_hat) -", "(dx_hat -"),
    ("layernorm backward: not through σ", " - x_hat * (dot(dx_hat, x_hat) / len(w)))", ")"),
    ("layernorm backward: dw of the wrong input", "return dx, (dy * x_hat)", "return dx, (dx_hat * x_hat)"),
    ("gelu: wrong constant", "0.044715\n", "0.0447\n"),
    ("gelu: cube not clipped", "x.clip(-10, 10)", "x"),
    ("gelu backward: x³ derived as x²", "(1.5 * GELU_CA)", "GELU_CA"),
    ("gelu backward: tanh not squared", "(1 - tanh * tanh)", "(1 - tanh)"),
    ("dropout: not rescaled", ".astype(x.dtype) / (1 - rate)", ".astype(x.dtype)"),
    ("dropout: keeps what it should drop", "np.float32) >= rate", "np.float32) < rate"),
    ("dropout backward: no mask", "return dy if keep is None else dy * keep", "return dy"),
    ("embedding backward: largest for sum", "np.add.reduceat", "np.maximum.reduceat"),
    ("cross-entropy: sum for mean", "losses.mean()", "losses.sum()"),
    ("cross-entropy: exp can overflow", "logits - logits.max(-1, keepdims=True)", "logits - 0"),
    ("cross-entropy backward: target forgotten", "targets] -= 1", "targets] -= 0"),
    ("cross-entropy backward: mean forgotten", "dlogits * (dloss / len(targets))", "dlogits * dloss"),
    # the wedge product
    ("wedge: symmetric product", "v.take(j, 0) - u", "v.take(j, 0) + u"),
    ("wedge: a sign", "    p = u.take(i", "    p = -u.take(i"),
    ("wedge: columns before rows", "np.triu_indices(r, 1)", "np.tril_indices(r, -1)[::-1]"),
    ("wedge: the diagonal too", "np.triu_indices(r, 1)", "np.triu_indices(r, 0)"),
    ("wedge backward: A symmetric", "A[j, i] = -A[i, j]", "A[j, i] = A[i, j]"),
    ("wedge backward: A transposed", "A[j, i] = -A[i, j]", "A[j, i] = A[i, j]; A[i, j] = -A[j, i]"),
    ("wedge backward: dv with the sign of du", '-np.einsum("ijt,jt->it", A, u)', 'np.einsum("ijt,jt->it", A, u)'),
    # unit area
    ("unit area: threshold 1e-4", "parallel: float = 1e-5", "parallel: float = 1e-4"),
    ("unit area: threshold 1e-6", "parallel: float = 1e-5", "parallel: float = 1e-6"),
    ("unit area: the paper's fixed ε", "(plane / np.where(plane, a, 1) for", "(1 / np.maximum(a, 1e-6) for"),
    ("unit area: area by a difference", "np.sqrt(uu) * height_v", "np.sqrt(np.maximum(uu * vv - uv * uv, 0))"),
    ("unit area: divided by |u||v|", "area = np.sqrt(uu) * height_v", "area = np.sqrt(uu) * np.sqrt(vv)"),
    ("unit area: threshold not relative", "parallel * np.sqrt(vv)", "parallel"),
    ("unit area backward: area taken as constant", "dq * inv_area - along * v_normal", "dq * inv_area"),
    ("unit area backward: nothing for u", "return -along * u_normal", "return 0 * u_normal"),
    ("unit area backward: wrong sign for u", "return -along * u_normal", "return along * u_normal"),
    ("unit area backward: normal not divided twice", "u_perp * inv_hu * inv_hu", "u_perp * inv_hu"),
    # the mixing layer
    ("taps: look ahead", "later, earlier = s[:, delta:], z[:, :-delta]",
     "later, earlier = s[:, :-delta], z[:, delta:]"),
    ("taps: one offset off", "later, earlier = s[:, delta:], z[:, :-delta]",
     "later, earlier = s[:, delta - 1 :], z[:, : 1 - delta or None]"),
    ("taps: normalize ignored", "            s, cache = unit_area_forward(z, s)\n",
     "            cache = unit_area_forward(z, s)[1]\n"),
    ("average: look ahead", "s[:, delta:] += q", "s[:, :-delta] += q"),
    ("average: sum for mean", "return s * share, (z", "return s, (z"),
    ("average: offsets counted that are not there", "[:, None] >= np.array(offsets)",
     "[:, None] >= 0 * np.array(offsets)"),
    ("average: one valid offset too few", "[:, None] >= np.array(offsets)", "[:, None] > np.array(offsets)"),
    ("average backward: mean forgotten", "ds = ds * share", "ds = ds * 1"),
    ("average backward: nothing for u", "dz[:, delta:] += du", "dz[:, delta:] += 0 * du"),
    ("taps backward: mean for sum", ".sum((0, 1))", ".mean((0, 1))"),
    ("taps backward: nothing for u", "dz, ds = unit_area_backward(ds, caches[0])",
     "_, ds = unit_area_backward(ds, caches[0])"),
    ("taps backward: weight forgotten", "+= taps[k] * ds[:, delta:]", "+= ds[:, delta:]"),
    ("gate: h and g exchanged", "return g + alpha * difference", "return h - alpha * difference"),
    ("gate: sigmoid(2a)", "np.tanh(0.5 * a)", "np.tanh(a)"),
    ("gate: from -1 to 1", "alpha = 0.5 + 0.5 * np.tanh", "alpha = np.tanh"),
    ("gate backward: slope α for α(1-α)", "direct * (1 - alpha), cache", "direct, cache"),
    ("gate backward: α for 1-α", "(dout - direct) + dhg", "direct + dhg"),
    ("mix backward: nothing from the partner", "linear_backward(dz + dz_partner, c_red)", "linear_backward(dz, c_red)"),
    ("mix backward: h reached through the gate only", "return dh + dh_red, grads", "return dh, grads"),
    # attention
    ("attention: not scaled", "scores = q @ k.swapaxes(-1, -2) / math.sqrt(d // n_head)",
     "scores = q @ k.swapaxes(-1, -2)"),
    ("attention: scaled by the whole width", "math.sqrt(d // n_head)", "math.sqrt(d)"),
    ("attention: sees one token ahead", "k.shape[2] - L, dtype=bool", "k.shape[2] - L + 1, dtype=bool"),
    ("attention: in a stream a token does not see itself", "k.shape[2] - L, dtype=bool",
     "max(k.shape[2] - L - 1, 0), dtype=bool"),
    ("attention backward: softmax without its sum", "a * (da - dot(a, da))", "a * da"),
    ("attention backward: not scaled", "(da - dot(a, da)) / math.sqrt(d_h)", "(da - dot(a, da))"),
    ("attention backward: dscores not transposed", "dscores.swapaxes(-1, -2) @ q", "dscores @ q"),
    # blocks and model
    ("prenorm backward: residual forgotten", "dh = dout + df\n", "dh = df\n"),
    ("prenorm backward: first residual forgotten", "return dh + da, grads", "return da, grads"),
    ("prenorm backward: masks exchanged", "dropout_backward(dh, keep_mix)", "dropout_backward(dh, keep_ffn)"),
    ("prenorm: FFN of what is not normalised", "ffn_forward(f, sub(w", "ffn_forward(h, sub(w"),
    ("paper block: attention without residual", "        a = h + a\n", "        a = 1 * a\n"),
    ("paper block: FFN without residual", "layernorm_forward(h + f, w", "layernorm_forward(f, w"),
    ("paper block backward: residual forgotten", "dropout_backward(dsum + df, keep_mix)",
     "dropout_backward(df, keep_mix)"),
    ("paper block backward: attention's residual forgotten", "        dh += da\n", "        dh += 0\n"),
    ("model: no final LayerNorm", 'h, c_ln = layernorm_forward(h, params["ln_f.w"]',
     '_, c_ln = layernorm_forward(h, params["ln_f.w"]'),
    ("model: positions from 0 in a stream", 'params["P"][start:end]', 'params["P"][: end - start]'),
    ("model: context one shorter", "if end > config.context", "if end >= config.context"),
    ("head backward: dlogits subtracted from E", "dlogits.T @ rows", "-dlogits.T @ rows"),
    ("model backward: head not tied", 'grads["E"] = dE + emb', 'grads["E"] = emb'),
    ("model backward: embedding not tied", "dE + embedding_backward(dh, c_embed)", "dE"),
    ("model backward: mean over positions", "= dh.sum(0)", "= dh.mean(0)"),
    ("model backward: blocks in forward order", "reversed(range(config.n_layer))", "range(config.n_layer)"),
    ("model backward: first dropout forgotten", "    dh = dropout_backward(dh, keep)\n", ""),
    ("shards: loss not weighted", "return loss * share, ", "return loss, "),
    ("shards: gradients not weighted", "cross_entropy_backward(share, c_loss)", "cross_entropy_backward(1.0, c_loss)"),
    ("shards: all with the same dropout", "[*np.atleast_1d(seed), rows[0]]", "np.atleast_1d(seed)"),
    ("shards: only the last gradient", "grads[name] += g\n", "grads[name] = g\n"),
    # optimiser
    ("adamw: bias correction of m one step late", "1 - beta_1 ** (step + 1)", "1 - beta_1 ** (step + 2)"),
    ("adamw: no bias correction of v", "np.sqrt(v / fix_2)", "np.sqrt(v)"),
    ("adamw: decay of biases", "theta.ndim > 1", "theta.ndim > 0"),
    ("adamw: decay not times lr", "theta *= 1 - lr * weight_decay", "theta *= 1 - weight_decay"),
    ("adamw: decay by the gradient (Adam with L2)", "theta *= 1 - lr * weight_decay", "g = g + weight_decay * theta"),
    ("adamw: eps inside the root", "(np.sqrt(v / fix_2) + eps)", "np.sqrt(v / fix_2 + eps)"),
    ("adamw: g not squared", "(g * g - v)", "(np.abs(g) - v)"),
    ("clip: the norm overflows", "g.astype(np.float64)", "g"),
    ("clip: the small ones", "if norm > max_norm", "if norm < max_norm"),
    ("clip: to length 1", "g *= max_norm / norm", "g *= 1 / norm"),
    ("learning rate: first step 0", "lr * (step + 1) / (warmup_iters + 1)", "lr * step / (warmup_iters + 1)"),
    ("learning rate: down to 0", "0.5 * (lr - min_lr)", "0.5 * lr"),
    ("learning rate: up again after the end", "min(1.0, progress)", "progress"),
    # batches and validation
    ("batch: last window never drawn", "len(tokens) - context, batch_size", "len(tokens) - context - 1, batch_size"),
    ("batch: the answer is the question", "tokens[windows + 1]", "tokens[windows]"),
    ("batch: seed plus step", "default_rng((seed, step))", "default_rng(seed + step)"),
    ("validation: last window forgotten", "if whole < targets:", "if False:"),
    ("validation: every window weighs the same", "* chunk[1].size", "* context"),
    ("validation: last window starts one late", "tokens[None, whole:-1], tokens[None, whole + 1 :]",
     "tokens[None, whole + 1 : -1], tokens[None, whole + 2 :]"),
    # streaming and sampling
    ("stream: window one short", "window[:, -max(offsets) :]", "window[:, 1 - max(offsets) :]"),
    ("stream: window of the smallest offset", "window[:, -max(offsets) :]", "window[:, -min(offsets) :]"),
    ("stream: window grows", "window[:, -max(offsets) :]", "window"),
    ("stream: past after the present", 'np.concatenate([past["z"], z], 1)', 'np.concatenate([z, past["z"]], 1)'),
    ("stream: attention forgets values", 'np.concatenate([past["k"], k], 2), np.concatenate([past["v"], v], 2)',
     'np.concatenate([past["k"], k], 2), np.concatenate([v, past["v"]], 2)'),
    ("stream: position stands still", 'state["position"] += len(tokens)', 'state["position"] += 0'),
    ("stream: position of one token after re-reading", 'state["position"] += len(tokens)', 'state["position"] += 1'),
    ("stream: re-reads one token fewer", "- config.context // 2 :]", "- config.context // 2 + 1 :]"),
    ("stream: re-reads without forgetting", "state |= stream_init(params, config)",
     'state |= stream_init(params, config) | {"past": state["past"]}'),
    ("stream: re-reads one token late", 'state["position"] == config.context', 'state["position"] > config.context'),
    ("sample: smallest at temperature 0", "int(logits.argmax())", "int(logits.argmin())"),
    ("sample: times temperature", ") / temperature).cumsum", ") * temperature).cumsum"),
    ("sample: top k less one", "logits[logits < np.partition", "logits[logits <= np.partition"),
    ("sample: k smallest", "np.partition(logits, -top_k)[-top_k]", "np.partition(logits, top_k)[top_k]"),
    ("generate: seed ignored", "rng, state = np.random.default_rng(seed)", "rng, state = np.random.default_rng(0)"),
    ("generate: empty prompt starts from 1", "or [0]", "or [1]"),
    ("generate: largest token refused", "max(prompt) >= config.vocab_size", "max(prompt) >= config.vocab_size - 1"),
    # checkpoints
    ("checkpoint: checksum not checked", "if checksum != _digest(arrays, meta)", "if False"),
    ("checkpoint: arrays that cannot be written to", ".reshape(found).copy()", ".reshape(found)"),
    ("checkpoint: transposed arrays saved in memory order", "np.ascontiguousarray(a) for key, group",
     "a for key, group"),
]  # fmt: skip


def broken(source: str, name: str, old: str, new: str) -> str:
    if source.count(old) != 1:
        give_up(f"{name}: {old!r} occurs {source.count(old)} times in grassmann.py, not once: update the list")
    mutated = source.replace(old, new)
    compile(mutated, name, "exec")  # a mistake in the list, not in the model, is found here
    return mutated


def give_up(message: str):
    print(message, file=sys.stderr)
    sys.exit(2)


def first_failure(folder: Path) -> str | None:
    """The test that fails first, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    failed = re.search(r"^FAILED (\S.*?)( - |$)", run.stdout, re.MULTILINE)
    if not failed:
        give_up(f"pytest ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return failed[1]


def main() -> int:
    source = (ROOT / "grassmann.py").read_text(encoding="utf-8")
    mutants = [(name, broken(source, name, old, new)) for name, old, new in MUTATIONS]
    mutants = [mutant for mutant in mutants if all(word in mutant[0] for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(AT_ONCE) as workers:
        folders = SimpleQueue()
        for k in range(AT_ONCE):
            folder = Path(temporary) / str(k)
            (folder / "tests").mkdir(parents=True)
            for file in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "pytest.ini"]:
                shutil.copy(file, folder / file.relative_to(ROOT))
            folders.put(folder)

        def killer(mutated: str) -> str | None:
            folder = folders.get()
            (folder / "grassmann.py").write_text(mutated, encoding="utf-8")
            shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # as old as the mutant, to the second
            found = first_failure(folder)
            folders.put(folder)
            return found

        if failed := killer(source):
            give_up(f"without any mutation {failed} fails: repair that first")
        survivors = 0
        for (name, _), killed_by in zip(mutants, workers.map(killer, [code for _, code in mutants]), strict=True):
            survivors += killed_by is None
            print(f"{name:55} {killed_by or 'SURVIVED'}", flush=True)
    print(f"{len(mutants)} mutations, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
