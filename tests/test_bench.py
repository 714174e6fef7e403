"""The benchmark: its counts and its PyTorch models are right, every section runs on a tiny model, with and without
PyTorch; on the GPU too, which the CPU plays. What the clock says is not tested."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
from test_gpu import gpu_on_cpu, needs_compiler

import bench
import bench_gpu
import bench_models
import grassmann
from grassmann import Config
from runs import MODEL_DEFAULTS, PACE_DEFAULTS

ROOT = Path(bench.__file__).parent
SIZES = {"n_layer": 2, "d_model": 16, "rank": 4, "context": 24, "batch_size": 3, "eval_every": 50, "warmup_iters": 5,
         "dropout": 0.0}  # fmt: skip


def tiny(threads: int = 1, quick: bool = False) -> bench.Setup:
    """Settings of train_char.py, only smaller; 500 random letters."""
    settings = MODEL_DEFAULTS | PACE_DEFAULTS | SIZES
    tokens = np.random.default_rng(0).integers(0, 7, 500).astype(np.uint8)
    return bench.Setup(settings, 7, tokens[:400], tokens[400:], threads, quick)


def need_torch():
    return pytest.importorskip("torch", reason="compares with PyTorch: pip install -r requirements-bench.txt")


def random_params(config: Config, seed: int = 0) -> dict:
    """Weights of ordinary size, so that no branch of the model is negligible."""
    rng = np.random.default_rng(seed)
    return {name: 0.5 * rng.standard_normal(shape) for name, shape in grassmann.param_shapes(config).items()}


def copy_weights(params: dict, model) -> None:
    """From grassmann.py's names to those of bench_models.Model; a Linear keeps its matrix transposed."""
    torch = need_torch()
    places = {"ffn.W_1": "ffn.0.weight", "ffn.b_1": "ffn.0.bias", "ffn.W_2": "ffn.2.weight", "ffn.b_2": "ffn.2.bias",
              "mix.b_plu": "mix.b_plu", "mix.taps": "mix.taps"}  # fmt: skip
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
    setup = bench.Setup(MODEL_DEFAULTS | PACE_DEFAULTS, 65, letters, letters, threads=1)
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
@pytest.mark.parametrize("paper", [True, False])
def test_torch_grassmann_is_our_model(offsets, paper):
    """The same logits with the same weights: tokens without a partner, repeated letters and full windows included."""
    torch = need_torch()
    config = Config(7, 24, 3, 16, 5, offsets, taps=not paper, normalize=paper, positions=paper)
    model, params = bench.torch_grassmann(config), random_params(config)
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
    """Ten steps of the paper's layer, in float64: the same weights and the same validation loss.

    Clipping differs by design: PyTorch divides by norm + 1e-6, we divide by the norm.
    """
    need_torch()
    setup = tiny()
    setup.settings["grad_clip"] = grad_clip
    config = setup.config(taps=False, normalize=True, positions=True)
    ours, theirs = bench.Ours(setup, config), bench.Theirs(setup, bench.torch_grassmann(config))
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
    """The loss of the table is that after as many steps as were asked for, at the learning rates of a whole run."""
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
    own, large = ([{m for m, _, _ in shapes} for shapes in shards] for shards, _, _ in loops)
    assert own == [{2 * 24}, {24}] and large == [{2048}, {2048}]


def test_efficiency_has_the_shards_of_the_step(monkeypatch):
    """As many tokens in each as `loss_and_grads` gives to a thread, also with more threads than windows."""
    loops, tokens, model_forward = [], [], grassmann.model_forward

    def spy(params, config, x, **how):
        tokens.append(x.size)
        return model_forward(params, config, x, **how)

    monkeypatch.setattr(bench, "torch", None)
    monkeypatch.setattr(grassmann, "model_forward", spy)
    monkeypatch.setattr(bench, "product_loop", lambda *args: loops.append(args) or (lambda: None))
    monkeypatch.setattr(bench, "alternate", lambda runs, rounds, calls: {k: [1.0] if runs[k] else [] for k in runs})
    for threads in (1, 2, 3, 100):
        loops.clear()
        tokens.clear()
        bench.efficiency(tiny(threads))
        bench.Ours(tiny(threads), tiny().config()).step()
        assert sorted(tokens) == sorted(shard[0][0] for shard in loops[0][0])


@pytest.mark.parametrize("side", ["NumPy", "PyTorch"])
def test_product_loop(side, monkeypatch):
    """Every product of every shard, on so many threads (of ours)."""
    if side == "PyTorch":
        need_torch()
    asked, in_threads = [], grassmann.in_threads

    def spy(multiply, work, threads):
        asked.append((threads, [[[tuple(a.shape) for a in three] for three in shard] for shard in work]))
        return in_threads(multiply, work, threads)

    monkeypatch.setattr(grassmann, "in_threads", spy)
    bench.product_loop([[(4, 3, 2), (4, 2, 5)], [(2, 3, 2)]], 3, side)()
    first, second = [(4, 3), (3, 2), (4, 2)], [(4, 2), (2, 5), (4, 5)]
    assert asked == [(3 if side == "NumPy" else 1, [[first, second], [[(2, 3), (3, 2), (2, 2)]]])]


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


def test_both_sides_have_as_many_threads(monkeypatch):
    """Those that were asked for in training, one in writing."""
    torch, ours, theirs = need_torch(), set(), set()
    loss_and_grads, forward = grassmann.loss_and_grads, bench_models.Model.forward

    def our_step(params, config, x, y, seed, threads):
        ours.add(threads)
        return loss_and_grads(params, config, x, y, seed, threads)

    def their_forward(*args):
        theirs.add(torch.get_num_threads())
        return forward(*args)

    monkeypatch.setattr(grassmann, "loss_and_grads", our_step)
    monkeypatch.setattr(bench_models.Model, "forward", their_forward)
    before = torch.get_num_threads()
    try:
        bench.step(tiny(threads=3, quick=True))
        assert ours == theirs == {3}
        theirs.clear()
        bench.generation(tiny(threads=3, quick=True))
        assert theirs == {1}
    finally:
        torch.set_num_threads(before)


def test_length_stops_where_it_does_not_fit(monkeypatch):
    """400 letters: windows of 64 to 256 fit, of 512 don't; attention is told to stop at 128. All in 1,024 tokens."""
    steps, loss_and_grads, checked = set(), grassmann.loss_and_grads, set()
    monkeypatch.setattr(bench, "check_memory", lambda config, windows, threads: checked.add(threads))

    def spy(params, config, x, y, seed, threads):
        steps.add((*x.shape, threads))
        return loss_and_grads(params, config, x, y, seed, threads)

    monkeypatch.setattr(grassmann, "loss_and_grads", spy)
    rows = bench.length(tiny(threads=3), tokens=1024, longest_table=128)
    assert steps == {(16, 64, 2), (8, 128, 2), (4, 256, 2)}  # 2 threads, since 2 windows are the fewest
    assert checked == {2}
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


def killed(setup, side) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_memory():
    """A new process each. For their gradients 2,400 tokens keep what enters the products of the gate and the FFN in
    each of 2 layers, 32 + 16 + 32 numbers of 4 bytes: 1.5 MB."""
    if sys.platform == "win32":
        pytest.skip("there is no peak memory to ask for on Windows")
    setup = tiny()
    setup.settings["batch_size"] = 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "torch", None)
        ours, gpt = bench.memory(setup, repeats=1)
    assert ours["MB"] > 1.5
    assert gpt["MB"] == bench.NEEDS_TORCH


def test_memory_does_not_count_imports():
    """A tiny model trains in 20 MB at most; what PyTorch still has to import for it takes 60 more."""
    need_torch()
    if sys.platform == "win32":
        pytest.skip("there is no peak memory to ask for on Windows")
    ours, gpt = bench.memory(tiny(), repeats=1)
    assert ours["MB"] < 40 and gpt["MB"] < 40


def test_memory_when_the_process_is_killed(monkeypatch):
    monkeypatch.setattr(bench, "torch", None)
    monkeypatch.setattr(bench, "training_memory", killed)
    with pytest.raises(ValueError, match="killed"):
        bench.memory(tiny(), repeats=1)


def test_peak_memory_grows():
    if sys.platform == "win32":
        pytest.skip("there is no peak memory to ask for on Windows")
    before = bench.peak_memory()
    block = np.ones(int((before + 64) * 2**17))  # 8 bytes each: 64 MB more than the whole process ever held
    assert bench.peak_memory() - before > 64
    assert block[-1] == 1


# ---- on a GPU -----------------------------------------------------------------------------------------


def test_bytes_by_hand():
    """The model of `test_multiply_adds_by_hand`: 8 tokens; E has 5·8 numbers, ln_f 16, a layer 4·8 for two LayerNorms,
    24 + 3 for W_red, 24 + 8 for W_plu, 128 + 8 for the gate, 256 + 32 and 256 + 8 for the FFN, 3 for each tap."""
    config = Config(vocab_size=5, context=4, n_layer=2, d_model=8, rank=3, offsets=((1,), (1, 2)))
    parameters = 40 + 16 + 2 * (32 + 27 + 32 + 136 + 288 + 264) + 3 * 3
    # what the products of a token take and give: W_red 8 and 3, W_plu 3 and 8, the gate 16 and 8, W_1, W_2; the head
    activations = 8 * (2 * (11 + 11 + 24 + 40 + 40) + 13)
    assert bench_gpu.bytes_moved(config, 2, "float32") == 4 * (11 * parameters + 5 * activations)
    assert bench_gpu.bytes_moved(config, 2, "tf32") == bench_gpu.bytes_moved(config, 2, "float32")
    assert bench_gpu.bytes_moved(config, 2, "bfloat16") == 4 * 11 * parameters + 2 * 5 * activations


def test_bytes_of_attention_by_hand():
    config = Config(5, 4, 1, 8, 3, (), mixer="attention", n_head=2)
    parameters = 40 + 8 + (16 + 192 + 64 + 256 + 256)  # no biases
    activations = 8 * ((8 + 24) + (8 + 8) + 40 + 40 + 13)
    assert bench_gpu.bytes_moved(config, 2, "float32") == 4 * (11 * parameters + 5 * activations)


def test_models_move_to_another_device():
    """Nothing stays behind: a device that holds no numbers refuses those of the CPU, as a card does."""
    torch, config = need_torch(), tiny().config(taps=False)
    for model in (bench.gpt(config), bench.torch_grassmann(config)):
        logits = model.to("meta")(torch.zeros(2, 24, dtype=torch.int64, device="meta"))
        assert logits.device.type == "meta" and logits.shape == (2, 24, 7)


@pytest.fixture
def cpu_plays_the_card(monkeypatch):
    """gpu.py on the stand-in for CuPy, PyTorch on the CPU, both sizes tiny; what is compiled runs as it was traced."""
    torch, stand_in = need_torch(), gpu_on_cpu()
    compile_, small = torch.compile, {"n_layer": 2, "d_model": 8, "n_head": 2, "context": 12, "batch_size": 2}
    monkeypatch.setitem(sys.modules, "gpu", stand_in)
    monkeypatch.setattr(torch, "compile", lambda f, mode, **how: compile_(f, backend="eager", **how))
    tiny_ones = {"DEVICE": "cpu", "LARGE": 64, "COPIED": 999, "SIZES": dict.fromkeys(bench_gpu.SIZES, small)}
    for name, value in tiny_ones.items():
        monkeypatch.setattr(bench_gpu, name, value)
    monkeypatch.setattr(bench_gpu, "card", lambda: {"card": "a CPU that plays one"})
    return stand_in


@needs_compiler
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_gpu_command(cpu_plays_the_card, precision, tmp_path, monkeypatch, capsys):
    """Two of the sections: one table, and the same numbers as JSON. Every contestant has run, on its side."""
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="no ml_dtypes")
    cuda_on_cpu.LAUNCHES.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    sections = ["laptop-float32", f"nanogpt-{precision}"]
    options = ["--quick", "--threads", "1", "--data", "tiny.txt", "--json", "t.json"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "--gpu", *options, "--only", *sections])
    monkeypatch.setattr(bench, "plain_output", lambda: None)  # pytest's streams stay as they are
    bench.main()
    results, out = json.loads((tmp_path / "t.json").read_text()), capsys.readouterr().out
    assert results["header"]["card"] in out
    assert list(results["sections"]) == sections and set(sections) < bench_gpu.SECTIONS.keys()
    for name, rows in results["sections"].items():
        theirs = ("PyTorch", "compiled, reduce-overhead")
        models = {"default": ("gpu.py", *theirs), "GPT": theirs, "paper's layer": ("gpu.py", *theirs)}
        assert [(row["model"], row["by"]) for row in rows] == [(name, by) for name in models for by in models[name]]
        for row in rows:
            assert f"{row['size']}-{row['precision']}" == name and len(row["turns, ms"]) == 2 and not row["failure"]
            assert all(value > 0 for value in row.values() if isinstance(value, (int, float)))
            assert bench.cell(row["ms"]) in out and bench.cell(row["x floor"]) in out
    assert out.count("x floor") == 1
    assert {"wedge_backward", "gate_forward", "adamw"} <= cuda_on_cpu.LAUNCHES


@needs_compiler
@pytest.mark.parametrize("mode", [None, "max-autotune"])
def test_both_sides_of_the_card_train_alike(cpu_plays_the_card, mode):
    """The same batches, and after ten steps from the same weights the same weights."""
    torch, setup = need_torch(), tiny()
    config = setup.config(taps=False, normalize=True, positions=True)
    ours = bench.Ours(setup, config, backend=cpu_plays_the_card)
    theirs = bench_gpu.OnCard(setup, bench.torch_grassmann(config), "float32", mode)
    params = {name: p.astype(np.float32) for name, p in random_params(config).items()}
    ours.params = cpu_plays_the_card.Flat(params)
    ours.optimizer = cpu_plays_the_card.adamw_init(ours.params)
    copy_weights(params, theirs.model)
    theirs.model.float()
    for k in range(10):
        x, y = grassmann.get_batch(setup.train_tokens, 3, 24, setup.settings["seed"], k)
        assert all(np.array_equal(a.numpy(), b) for a, b in zip(theirs.batch(), (x, y), strict=True))
        ours.step(1e-2)
        theirs.step(1e-2)
    for theirs_name, name in (("E.weight", "E"), ("blocks.1.mix.gate.bias", "blocks.1.mix.b_gate")):
        weights, mine = theirs.model.get_parameter(theirs_name), cpu_plays_the_card.cp.asnumpy(ours.params[name])
        torch.testing.assert_close(weights.detach(), torch.from_numpy(mine), rtol=0, atol=1e-3)
    assert ours.validate() == pytest.approx(theirs.validate(), abs=1e-3)


@needs_compiler
@pytest.mark.parametrize("broken", [["max-autotune"], ["reduce-overhead", "max-autotune"]])
def test_what_does_not_compile(cpu_plays_the_card, monkeypatch, broken):
    """It has a row that says so, and the rest is measured."""
    torch = need_torch()
    compile_ = torch.compile

    def fails(f, mode, **how):
        def loss(x, y):
            raise SyntaxError("no\nPTX")

        return loss if mode in broken else compile_(f, mode=mode, **how)

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(bench_gpu, "alternate", lambda runs, *_: bench.alternate(runs, 1, 1))
    rows = bench_gpu.SECTIONS["laptop-tf32"](tiny())
    bench.print_table(rows)
    failed = [(row["model"], row["by"]) for row in rows if row["failure"]]
    assert failed == [(model, f"compiled, {mode}") for model in ("default", "GPT", "paper's layer") for mode in broken]
    assert len(rows) == 8 + len(failed) - 3 * (len(broken) == 2)
    for row in rows:
        if row["failure"]:
            assert row["failure"] == ["SyntaxError: no PTX"]
            assert row["ms"] == row["x ours"] == row["x floor"] == "fails: SyntaxError"
        else:
            assert row["ms"] > 0 and row["x ours"] > 0


@needs_compiler
def test_gpu_table_with_a_known_clock(cpu_plays_the_card, monkeypatch):
    """The product takes 1 s, the copy 2, our steps 4 and 6, eager ones 12, compiled ones 9 or in the second mode 3."""
    seconds = {"product": 1.0, "copy": 2.0, ("default", "gpu.py"): 4.0, ("paper's layer", "gpu.py"): 6.0}
    for model in ("default", "GPT", "paper's layer"):
        seconds |= {(model, "PyTorch"): 12.0, (model, "compiled, reduce-overhead"): 9.0}
        seconds[model, "compiled, max-autotune"] = 3.0
    monkeypatch.setattr(bench_gpu, "alternate", lambda runs, *_: {key: [seconds[key]] * 3 for key in runs})
    setup = tiny()
    rows = bench_gpu.SECTIONS["nanogpt-float32"](setup)
    assert [(row["model"], row["by"], row["ms"], row["x ours"]) for row in rows] == [
        ("default", "gpu.py", 4e3, 1), ("default", "PyTorch", 12e3, 3),
        ("default", "compiled, max-autotune", 3e3, 0.75),
        ("GPT", "PyTorch", 12e3, 3), ("GPT", "compiled, max-autotune", 3e3, 0.75),
        ("paper's layer", "gpu.py", 6e3, 1), ("paper's layer", "PyTorch", 12e3, 2),
        ("paper's layer", "compiled, max-autotune", 3e3, 0.5),
    ]  # fmt: skip
    config = setup.config(n_layer=2, d_model=8, context=12)
    arithmetic = bench.multiply_adds(config, 2) / 64**3
    memory = bench_gpu.bytes_moved(config, 2, "float32") / (999 * 4)  # two seconds for 999 numbers, read and written
    row = rows[0]
    assert (row["arithmetic, µs"], row["memory, µs"]) == pytest.approx((1e6 * arithmetic, 1e6 * memory))
    assert row["floor"] == "memory" and memory > arithmetic
    assert row["x floor"] == pytest.approx(4 / memory)
    assert row["at TFLOP/s"] == pytest.approx(2e-12 * 64**3) and row["at GB/s"] == pytest.approx(999 * 4e-9)
    monkeypatch.setattr(bench_gpu, "LARGE", 2)
    assert bench_gpu.SECTIONS["nanogpt-float32"](setup)[0]["floor"] == "arithmetic"


@needs_compiler
def test_precision_is_that_of_both_sides(cpu_plays_the_card):
    torch, gpu = need_torch(), cpu_plays_the_card
    for precision, theirs in (("float32", "highest"), ("tf32", "high")):
        with bench_gpu.both_sides(precision):
            assert torch.get_float32_matmul_precision() == theirs
            assert gpu._precision == precision
            gpu._graph("a model that was measured")
        assert (torch.get_float32_matmul_precision(), gpu._precision) == ("highest", "float32")
        assert gpu._graph.cache_info().currsize == 0
    model = bench.torch_grassmann(tiny().config(taps=False))
    dtypes, layer = [], model.blocks[0].mix.plu
    layer.register_forward_hook(lambda layer, inputs, output: dtypes.append(output.dtype))
    for precision in ("float32", "bfloat16"):
        bench_gpu.OnCard(tiny(), model, precision, None).step()
    assert dtypes == [torch.float32, torch.bfloat16] and layer.weight.dtype == torch.float32


def test_what_the_card_is(monkeypatch):
    """The names come from the card's own libraries, which nobody here has."""
    torch, space = need_torch(), types.SimpleNamespace
    cp = space(__version__="14.0", cuda=space(runtime=space(runtimeGetVersion=lambda: 13000)))
    monkeypatch.setattr(bench_gpu, "our_side", lambda precision: space(cp=cp))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H1000")
    monkeypatch.setattr(subprocess, "run", lambda *args, **how: space(stdout="580.1\n580.1\n"))
    card = bench_gpu.card()
    assert (card["card"], card["driver"], card["CuPy"]) == ("H1000", "580.1", "14.0, CUDA 13000")
    monkeypatch.setattr(subprocess, "run", lambda *args, **how: (_ for _ in ()).throw(FileNotFoundError()))
    assert bench_gpu.card()["driver"] == "nvidia-smi does not tell"


@pytest.mark.parametrize("missing", ["CuPy", "PyTorch", "PyTorch for CUDA"])
def test_missing_for_the_gpu_is_one_line(missing, monkeypatch, capsys):
    if missing == "CuPy":
        monkeypatch.delitem(sys.modules, "gpu", raising=False)
        monkeypatch.setitem(sys.modules, "cupy", None)
    else:
        monkeypatch.setitem(sys.modules, "gpu", types.SimpleNamespace(set_precision=lambda precision: None))
        no_gpu = types.SimpleNamespace(__version__="2.0", cuda=types.SimpleNamespace(is_available=lambda: False))
        monkeypatch.setattr(bench_gpu, "torch", None if missing == "PyTorch" else no_gpu)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--gpu"])
    monkeypatch.setattr(bench, "plain_output", lambda: None)
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    words = {"CuPy": "requirements-gpu.txt", "PyTorch": "requirements-bench.txt", "PyTorch for CUDA": "no CUDA GPU"}
    assert words[missing] in error and error.count("\n") == 1


# ---- the clock and the table --------------------------------------------------------------------------


def test_alternate_takes_turns(monkeypatch):
    """Each in its turn: one call that is not timed and `calls` that are; the first round is left out."""
    log = []
    runs = {"A": lambda: log.append("A"), "B": lambda: log.extend("bB"), "absent": None}
    monkeypatch.setattr(bench.time, "perf_counter", lambda: len(log))  # A takes a second, B takes two
    times = bench.alternate(runs, rounds=2, calls=3)
    assert "".join(log) == ("AAAA" + "bBbBbBbB") * 3
    assert times == {"A": [1, 1], "B": [2, 2], "absent": []}


def test_alternate_waits_for_a_gpu(monkeypatch):
    """Calls only start work; the clock is read where nothing is under way."""
    log, under_way = [], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: log.append(len(under_way)) or 10.0 * len(log))
    times = bench.alternate({"A": lambda: under_way.append(1)}, rounds=2, calls=3, finish=under_way.clear)
    assert log == [0] * 6 and times == {"A": [10 / 3] * 2}


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
    [(["--only", "speed"], "speed"), (["--gpu", "--only", "step"], "laptop-tf32"),
     (["--data", "short.txt"], "characters"), (["--data", "none.txt"], "none.txt"),
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
