"""The benchmark: its counts and its PyTorch models are right, every section runs on a tiny model, with and without
PyTorch. What the clock says is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bench
import grassmann
from grassmann import Config

ROOT = Path(bench.__file__).parent
SIZES = {"n_layer": 2, "d_model": 16, "rank": 4, "context": 24, "batch_size": 3, "eval_every": 50, "warmup_iters": 5}


def tiny(threads: int = 1, quick: bool = False) -> bench.Setup:
    """Settings of train_char.py, only smaller; 500 random letters."""
    settings = bench.MODEL_DEFAULTS | bench.PACE_DEFAULTS | SIZES
    tokens = np.random.default_rng(0).integers(0, 7, 500).astype(np.uint8)
    return bench.Setup(settings, 7, tokens[:400], tokens[400:], threads, quick)


def need_torch():
    return pytest.importorskip("torch", reason="compares with PyTorch: pip install -r requirements-bench.txt")


def random_params(config: Config, seed: int = 0) -> dict:
    """Weights of ordinary size, so that no branch of the model is negligible."""
    rng = np.random.default_rng(seed)
    return {name: 0.5 * rng.standard_normal(shape) for name, shape in grassmann.param_shapes(config).items()}


def copy_weights(params: dict, model) -> None:
    """From grassmann.py's names to those of bench.Model; a Linear keeps its matrix transposed."""
    torch = need_torch()
    places = {"ffn.W_1": "ffn.0.weight", "ffn.b_1": "ffn.0.bias", "ffn.W_2": "ffn.2.weight", "ffn.b_2": "ffn.2.bias",
              "mix.b_plu": "mix.b_plu"}  # fmt: skip
    places |= {f"mix.W_{name}": f"mix.{name}.weight" for name in ("red", "plu", "gate", "qkv", "out")}
    places |= {f"mix.b_{name}": f"mix.{name}.bias" for name in ("red", "gate")}
    places |= {f"{name}.{a}": f"{name}.{b}" for name in ("ln1", "ln2") for a, b in (("w", "weight"), ("b", "bias"))}
    outside, state = {"E": "E.weight", "P": "P.weight", "ln_f.w": "ln_f.weight", "ln_f.b": "ln_f.bias"}, {}
    for name, value in params.items():
        place = outside.get(name)
        if place is None:
            _, i, rest = name.split(".", 2)
            place = f"blocks.{i}.{places[rest]}"
        state[place] = value.T if ".W_" in name else value
    model.double().load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})


# ---- counts -------------------------------------------------------------------------------------------


def test_multiply_adds_by_hand():
    """2 layers, d = 8, r = 3, so n = 3; d_ff = 32, V = 5, batch 2, context 4: T = 8 tokens."""
    config = Config(vocab_size=5, context=4, n_layer=2, d_model=8, rank=3, offsets=((1,), (1, 2)))
    # per token and layer: W_red 8·3, W_plu 3·8, W_gate 16·8, W_1 8·32, W_2 32·8; the head 8·5
    assert bench.multiply_adds(config, batch_size=2) == 3 * 8 * (2 * (24 + 24 + 128 + 256 + 256) + 40)


def test_multiply_adds_of_attention_by_hand():
    config = Config(5, 4, 2, 8, 3, (), mixer="attention", n_head=2)
    # W_qkv 8·24, W_out 8·8; scores and weighted sums 4·8 each
    assert bench.multiply_adds(config, batch_size=2) == 3 * 8 * (2 * (192 + 64 + 256 + 256 + 2 * 32) + 40)


def test_sizes_of_the_gpt():
    """nanoGPT's laptop recipe has 0.80M parameters, with Tiny Shakespeare's 65 letters 804,096; the wider one as many
    as our model within 1%."""
    letters = np.arange(65, dtype=np.uint8)
    setup = bench.Setup(bench.MODEL_DEFAULTS | bench.PACE_DEFAULTS, 65, letters, letters, threads=1)
    assert bench.n_parameters(setup.gpt_config(), bias=False) == 804_096
    ours = bench.n_parameters(setup.config())
    assert ours == sum(p.size for p in grassmann.init_params(setup.config()).values())
    wide = bench.gpt_of_size(setup, ours)
    assert wide.d_model % wide.n_head == 0
    assert bench.n_parameters(wide, bias=False) == pytest.approx(ours, rel=0.01)


def test_the_count_is_that_of_the_pytorch_model():
    need_torch()
    setup = tiny()
    for config in (setup.gpt_config(), bench.gpt_of_size(setup, 9000)):
        assert bench.n_parameters(config, bias=False) == sum(p.numel() for p in bench.gpt(config).parameters())


# ---- the PyTorch models -------------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [((1,), (2,), (4,)), ((1, 2, 4, 8, 12, 16),) * 3])
def test_plain_grassmann_is_our_model(offsets):
    """The same logits with the same weights: tokens without a partner, repeated letters and full windows included."""
    torch = need_torch()
    config = Config(7, 24, 3, 16, 5, offsets, taps=False, normalize=True, positions=True)
    model, params = bench.plain_grassmann(config), random_params(config)
    copy_weights(params, model)
    tokens = np.random.default_rng(1).integers(0, 7, (4, 24))
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(logits, grassmann.forward(params, config, tokens), rtol=0, atol=1e-10)


def gpt_and_ours() -> tuple:
    """The GPT and mixer="attention" of grassmann.py with the same weights, biases 0; GELU in its tanh form in both."""
    config = tiny().gpt_config()
    params, model = random_params(config), bench.gpt(config)
    biases = {name: np.zeros_like(p) for name, p in params.items() if name.split(".")[-1].startswith("b")}
    for block in model.blocks:
        block.ffn[1].approximate = "tanh"
    copy_weights({name: p for name, p in params.items() if name not in biases}, model)
    return model, params | biases, config


def test_gpt_is_our_attention_model():
    torch = need_torch()
    model, params, config = gpt_and_ours()
    tokens = np.random.default_rng(1).integers(0, 7, (4, 24))
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(logits, grassmann.forward(params, config, tokens), rtol=0, atol=1e-10)


def test_key_value_cache():
    """With the cache, one token at a time, the GPT gives what it gives without."""
    torch = need_torch()
    model, _, config = gpt_and_ours()
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 7, (1, 24)))
    with torch.inference_mode():
        past = [{} for _ in range(config.n_layer)]
        pieces = [model(tokens[:, :12], past)] + [model(tokens[:, k : k + 1], past, k) for k in range(12, 24)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("grad_clip", "tolerance"), [(1e9, 1e-10), (1.0, 1e-6)])
def test_both_sides_train_alike(grad_clip, tolerance):
    """Ten steps of the plain Grassmann model, in float64: the same weights and the same validation loss.

    Clipping differs by design: PyTorch divides by norm + 1e-6, we divide by the norm.
    """
    need_torch()
    setup = tiny()
    setup.settings["grad_clip"] = grad_clip
    config = setup.config(taps=False, normalize=True, positions=True)
    ours, theirs = bench.Ours(setup, config), bench.Theirs(setup, bench.plain_grassmann(config))
    ours.params = random_params(config)
    ours.optimizer = grassmann.adamw_init(ours.params)
    copy_weights(ours.params, theirs.model)
    for _ in range(10):
        ours.step(1e-2)
        theirs.step(1e-2)
    for theirs_name, name in (("E.weight", "E"), ("blocks.1.ffn.0.bias", "blocks.1.ffn.b_1")):
        weights = theirs.model.get_parameter(theirs_name).detach().numpy()
        np.testing.assert_allclose(weights, ours.params[name], rtol=0, atol=tolerance)
    assert theirs.validate() == pytest.approx(ours.validate(), abs=tolerance)


# ---- the sections -------------------------------------------------------------------------------------


@pytest.fixture(params=["with PyTorch", "without"])
def side(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr(bench, "torch", None)
    else:
        need_torch()
    return request.param


def missing(rows: list[dict]) -> bool:
    return any(value == bench.NEEDS_TORCH for row in rows for value in row.values())


def test_our_writer_is_generate(monkeypatch):
    """It reads each character once, and draws what grassmann.generate draws."""
    setup, read, stream_step = tiny(), [], grassmann.stream_step
    text, params = setup.train_tokens[:30].tolist(), random_params(setup.config())
    expected = list(grassmann.generate(params, setup.config(), text, 9, temperature=0.8, seed=0))
    monkeypatch.setattr(grassmann, "init_params", lambda config: params)
    monkeypatch.setattr(grassmann, "stream_step", lambda *args: read.append(args[3]) or stream_step(*args))
    write = bench.our_writer(setup, setup.train_tokens[:30])
    for _ in expected:
        write()
    assert read == text + expected


@pytest.mark.parametrize("cache", [False, True])
def test_gpt_writer_reads_its_context(cache, monkeypatch):
    """A context of 24: all of it for each character; with a cache its last half, then character by character."""
    torch = need_torch()
    read = []

    def model(tokens, past=None, start=0):
        read.append((start, tokens.shape[1]))
        return torch.zeros(1, tokens.shape[1], 7)

    monkeypatch.setattr(bench, "gpt", lambda config: model)
    setup = tiny()
    write = bench.gpt_writer(setup, setup.train_tokens[:100], cache)
    for _ in range(27):
        write()
    cycle = [(0, 12)] + [(position, 1) for position in range(12, 24)]
    assert read == (cycle * 2 + cycle[:1] if cache else [(0, 24)] * 27)


@pytest.mark.parametrize("section", ["step", "efficiency", "generation"])
def test_sections_that_compare(section, side):
    rows = bench.SECTIONS[section](tiny(quick=True))
    assert missing(rows) == (side == "without")
    assert all(np.isfinite(value) for row in rows for value in row.values() if not isinstance(value, str))
    bench.print_table(rows)
    json.dumps(rows)


def test_race(side):
    """60 steps instead of 2,000. The two runs chosen by time have the steps that time allows."""
    rows = {row["run"]: row for row in bench.race(tiny(), iters=60)}
    assert missing(rows.values()) == (side == "without")
    ours = rows["ours, as many steps"]
    assert [k for k, *_ in ours["curve"]] == [50, 60]
    assert ours["curve"][-1] == [60, ours["seconds"], ours["loss"]]
    if side == "without":
        assert len(rows) == 1
        return
    published = rows["GPT, as published"]
    assert (published["learning rate"], published["steps"], published["of the GPT's"]) == (1e-3, 60, 1)
    for name, share in (("ours, in a fifth of the GPT's time", 0.2), ("ours, in the GPT's time", 1)):
        steps = share * published["seconds"] / (ours["seconds"] / 60)
        assert rows[name]["steps"] == max(1, round(steps)) == rows[name]["curve"][-1][0]


def test_race_validates_as_the_model_does():
    """The loss of the table is that of train_char.py's protocol, after as many steps as were asked for."""
    setup = tiny()
    row = bench.race(setup, iters=7)[0]
    run = bench.Ours(setup, setup.config())
    for k in range(7):
        run.step(grassmann.learning_rate(k, 7, setup.settings["lr"], setup.settings["lr"] / 10, 5))
    assert row["loss"] == grassmann.validation_loss(run.params, run.config, setup.val_tokens)


def test_race_is_skipped_by_quick():
    assert "skipped" in bench.race(tiny(quick=True))[0]["run"]


def test_efficiency_when_everything_takes_a_second(monkeypatch):
    """The products at the step's own shapes are the step's multiply-adds: then it achieves the whole rate."""
    loops = []
    monkeypatch.setattr(bench, "torch", None)
    monkeypatch.setattr(bench, "product_loop", lambda *args: loops.append(args) or (lambda: None))
    monkeypatch.setattr(bench, "alternate", lambda runs, rounds, calls: {k: [1.0] if runs[k] else [] for k in runs})
    row = bench.efficiency(tiny(threads=2))[0]
    assert row["multiply-adds per step"] == bench.multiply_adds(tiny().config(), batch_size=3)
    assert row["rate, own shapes"] == pytest.approx(2e-9 * row["multiply-adds per step"])
    assert row["of the rate"] == pytest.approx(1)
    assert row["rate, large"] == pytest.approx(2 * 3 * 2 * 2048**3 / 1e9)  # threads, products, operations
    own, large = ({m for m, _, _ in shapes} for shapes, _, _ in loops)
    assert own == {3 * 24 // 2} and large == {2048}


def test_ops_are_put_back():
    before = dict(vars(grassmann))
    rows = {row["op"]: row for row in bench.ops(tiny(quick=True))}
    assert vars(grassmann) == before
    assert rows["plucker_forward"]["calls"] == rows["plucker_backward"]["calls"] == 2  # once a layer
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_exclusive_times(monkeypatch):
    """A clock that goes on by one second whenever it is read: an op that calls nothing takes one."""
    clock = iter(range(10**6))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    x, ones, zeros = np.ones((2, 4)), np.ones(4), np.zeros(4)
    weights = {"W_1": np.ones((4, 4)), "b_1": zeros, "W_2": np.ones((4, 4)), "b_2": zeros}
    with bench.exclusive_times() as spent:
        grassmann.layernorm_forward(x, ones, zeros)
        grassmann.ffn_forward(x, weights)
    assert spent["layernorm_forward"] == [1, 1]
    assert spent["linear_forward"] == [2, 2]
    assert spent["gelu_forward"] == [1, 1]
    assert spent["ffn_forward"] == [1, 7 - 3]  # read at 0, then twice by each of three ops, at last at 7


def test_length_stops_where_it_does_not_fit(monkeypatch):
    """400 letters: windows of 64 to 256 fit, of 512 don't; attention is told to stop at 128. All in 1,024 tokens."""
    steps, loss_and_grads = set(), grassmann.loss_and_grads

    def spy(params, config, x, y, seed, threads):
        steps.add((*x.shape, threads))
        return loss_and_grads(params, config, x, y, seed, threads)

    monkeypatch.setattr(grassmann, "loss_and_grads", spy)
    rows = bench.length(tiny(threads=3), tokens=1024, longest_table=128)
    assert steps == {(16, 64, 2), (8, 128, 2), (4, 256, 2)}  # 2 threads, since 2 windows are the fewest
    assert [row["length"] for row in rows] == [64, 128, 256, 512]
    assert [row["windows"] for row in rows] == [16, 8, 4, 2]
    assert [row["grassmann"] == "does not fit" for row in rows] == [False, False, False, True]
    assert [row["attention"] == "does not fit" for row in rows] == [False, False, True, True]
    assert [row["x ours"] == "does not fit" for row in rows] == [False, False, True, True]


def test_offsets():
    setup = tiny(quick=True)
    rows = bench.offsets(setup)
    assert [row["offsets"] for row in rows] == [1, 2, 4, 8, 16]
    last_four = bench.n_parameters(setup.config(offsets=((1, 2, 3, 4),) * 2))
    taps = 2 * 4  # in 2 layers, of 4 numbers each
    assert [row["parameters"] - last_four for row in rows] == [-3 * taps, -2 * taps, 0, 4 * taps, 12 * taps]


def test_memory():
    """A new process each; no PyTorch in this test, whose import takes seconds."""
    if sys.platform == "win32":
        pytest.skip("there is no peak memory to ask for on Windows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "torch", None)
        ours, gpt = bench.memory(tiny(), repeats=1)
    assert ours["MB"] >= 0
    assert gpt["MB"] == bench.NEEDS_TORCH


def test_peak_memory_grows():
    if sys.platform == "win32":
        pytest.skip("there is no peak memory to ask for on Windows")
    before = bench.peak_memory()
    block = np.ones(int((before + 64) * 2**17))  # 8 bytes each: 64 MB more than the whole process ever held
    assert bench.peak_memory() - before > 64
    assert block[-1] == 1


# ---- the clock and the table --------------------------------------------------------------------------


def test_alternate_takes_turns(monkeypatch):
    """Each in its turn: one call that is not timed and `calls` that are; the first round is left out."""
    log = []
    runs = {"A": lambda: log.append("A"), "B": lambda: log.extend("bB"), "absent": None}
    monkeypatch.setattr(bench.time, "perf_counter", lambda: len(log))  # A takes a second, B takes two
    times = bench.alternate(runs, rounds=2, calls=3)
    assert "".join(log) == ("AAAA" + "bBbBbBbB") * 3
    assert times == {"A": [1, 1], "B": [2, 2], "absent": []}


def test_quotient_is_taken_within_a_round():
    assert bench.quotient([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2  # the medians' quotient would be 3
    assert bench.quotient([], [1.0]) == bench.NEEDS_TORCH


@pytest.mark.parametrize(
    ("value", "text"),
    [(940544, "940,544"), (1.80123, "1.801"), (0.0374, "0.037"), (22.531, "22.53"), (-0.25, "-0.250"),
     (12345.6, "12,346"), ("needs torch", "needs torch")],
)  # fmt: skip
def test_cell(value, text):
    assert bench.cell(value) == text


def test_command_line(tmp_path):
    """The command on a small text: a table, and the same numbers as JSON; nothing else on the disk."""
    (tmp_path / "tiny.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    command = [sys.executable, ROOT / "bench.py", "--quick", "--only", "offsets", "race", "--data", "tiny.txt"]
    done = subprocess.run([*command, "--threads", "1"], cwd=tmp_path, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "bench.json").read_text())
    assert list(results["sections"]) == ["offsets", "race"]
    assert results["header"]["NumPy"] == np.__version__ and results["header"]["threads"] == 1
    for row in results["sections"]["offsets"]:
        assert f"{row['parameters']:,}" in done.stdout and bench.cell(row["ms"]) in done.stdout
    assert "skipped by --quick" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "tiny.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--only", "speed"], "speed"), (["--data", "short.txt"], "characters"), (["--data", "none.txt"], "none.txt"),
     (["--json", "no/where.json"], "where.json"), (["--threads", "0"], "threads")],
)  # fmt: skip
def test_errors_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("To be.")
    monkeypatch.setattr(sys, "argv", ["bench.py", *options])
    monkeypatch.setattr(bench, "plain_output", lambda: None)  # pytest's streams stay as they are
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
