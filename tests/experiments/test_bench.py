"""The benchmark's counts and PyTorch models are right; its sections run, also without PyTorch."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose

import grassmann
from charlm.checkpoint import save_checkpoint
from charlm.text import Corpus
from charlm.training import Training
from experiments import bench, bench_models, common
from grassmann import Config

PAPER = {"taps": False, "normalize": True, "positions": True}
SIZES = {"n_layer": 2, "d_model": 16, "rank": 4, "context": 24}
LINEAR = {"W_1": "0.weight", "W_2": "2.weight", "W_qkv": "qkv.weight", "W_out": "out.weight"}
BIASES = {"w": "weight", "b": "bias", "b_1": "0.bias", "b_2": "2.bias"}
IN_TORCH = LINEAR | BIASES | {"E": "E.weight", "P": "P.weight"}


def need_torch(module="torch"):
    return pytest.importorskip(module, reason="no PyTorch: experiments/requirements.txt has it")


@pytest.fixture(params=["with PyTorch", "without"])
def has_torch(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr(bench, "torch", None)
    return request.param == "with PyTorch" and need_torch() is not None


def tiny(threads: int = 1, quick: bool = False, **training) -> bench.Setup:
    """Settings of train_char.py, only smaller; 1,000 random letters."""
    tokens = np.random.default_rng(0).integers(0, 7, 1000).astype(np.uint8)
    corpus = Corpus("", [*range(7)], tokens[:900], tokens[900:], 0)
    return bench.Setup(corpus, threads, quick, Training(**{"batch_size": 3} | training), SIZES)


def in_torch(params: dict) -> dict:
    """grassmann.py's weights under PyTorch's names. Its Linears keep their matrices transposed."""
    torch = need_torch()
    renamed = {}
    for name, value in params.items():
        *path, last = name.split(".")
        if last in LINEAR:
            value = value.T
        their_name = ".".join([*path, IN_TORCH.get(last, last)])
        renamed[their_name] = torch.tensor(value)
    return renamed


def test_the_clock_takes_turns(monkeypatch):
    """It leaves out the first round, the first call of a turn, and missing runs."""
    now = 0.0
    turns = []

    def run(name: str, seconds: float) -> None:
        nonlocal now
        turns.append(name)
        first = len(turns) < 7 or turns[-2] != name
        now += 9.0 if first else seconds

    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: now))
    runs = {"a": lambda: run("a", 2.0), "b": lambda: run("b", 3.0), "c": None}
    found = common.alternate(runs, 2, 2)
    assert "".join(turns) == "aaabbb" * 3
    assert found["a"] == [2.0, 2.0]
    assert found["b"] == [3.0, 3.0]
    assert np.isnan(found["c"]).all()


def test_multiply_adds_by_hand():
    """2 layers, d = 8, r = 3, so n = 3; d_ff = 32, V = 5, batch 2, context 4: T = 8 tokens."""
    config = Config(5, 4, 2, 8, 3, ((1,), (1, 2)), d_ff=32)
    # per token and layer: W_red 8·3, W_plu 3·8, W_gate 16·8, W_1 8·32, W_2 32·8; the head 8·5
    layer = 24 + 24 + 128 + 256 + 256
    assert bench_models.multiply_adds(config, 2) == 3 * 8 * (2 * layer + 40)
    config = Config(5, 4, 2, 8, mixer="attention", n_head=2)
    # W_qkv 8·24, W_out 8·8; scores and weighted sums 4·8 each
    layer = 192 + 64 + 256 + 256 + 2 * 32
    assert bench_models.multiply_adds(config, 2) == 3 * 8 * (2 * layer + 40)


def test_sizes_of_the_gpt():
    """nanoGPT's laptop recipe has 0.80M with 65 letters; the wider one is as large as our model."""
    setup = bench.Setup(Corpus("", [*range(65)], None, None, 0), 1)
    ours = sum(p.size for p in grassmann.init_params(setup.config()).values())
    assert bench.n_parameters(setup.gpt_config()) == 804_096
    assert bench.n_parameters(setup.config()) == ours
    assert bench.n_parameters(bench.gpt_of_size(setup, ours)) == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize("taps", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_layer_in_pytorch(taps, normalize, rng):
    """Outputs, gradients and first weights are those of grassmann.py, also of parallel tokens."""
    torch_layer = need_torch("experiments.torch_layer")
    torch = need_torch()
    torch.manual_seed(0)
    offsets = torch_layer.OFFSETS
    assert offsets == Config(7).offsets
    layer = torch_layer.GrassmannMix(128, offsets[3], 32, taps, normalize)
    assert [*layer.children()] == []  # nanoGPT draws every nn.Linear's weights anew
    config = Config(7, taps=taps, normalize=normalize, offsets=offsets)
    w = grassmann.Scope(grassmann.init_params(config), "blocks.3.mix.")
    for name, p in layer.named_parameters():
        assert p.std().item() == pytest.approx(w[name].std(), rel=0.2)
        p.data = torch.tensor(w[name])
    h, dout = rng.standard_normal((2, 2, 20, 128), np.float32)
    h[:, 5:8] = h[:, 4:5]
    h[:, 8:12] = 0.3 * h[:, 4:5]
    out, cache = grassmann.mix_forward(h, w, config, 3)
    dh, grads = grassmann.mix_backward(dout, cache)
    x = torch.tensor(h, requires_grad=True)
    layer(x).backward(torch.tensor(dout))
    assert_allclose(layer(x).detach(), out, rtol=1e-5, atol=1e-5)
    start = layer(x[:, :3]).detach()
    assert_allclose(start, out[:, :3], rtol=1e-5, atol=1e-5)
    assert_allclose(x.grad, dh, rtol=1e-5, atol=1e-5)
    for name, p in layer.named_parameters():
        assert_allclose(p.grad, grads[name], rtol=1e-5, atol=1e-5)


def test_a_trained_layer_in_pytorch(ordinary_params, tmp_path, rng):
    """What is loaded from a checkpoint computes what grassmann.py computes with it."""
    torch_layer = need_torch("experiments.torch_layer")
    torch = need_torch()
    for changes in ({}, {"taps": False, "normalize": True}):
        config = Config(7, 24, 2, 16, 5, **changes)
        params = {name: p.astype(np.float32) for name, p in ordinary_params(config).items()}
        path = tmp_path / "best.npz"
        save_checkpoint(path, params, config)
        h = rng.standard_normal((2, 20, 16), np.float32)
        for layer in range(2):
            mix = torch_layer.load(path, layer)
            w = grassmann.Scope(params, f"blocks.{layer}.mix.")
            expected, _ = grassmann.mix_forward(h, w, config, layer)
            out = mix(torch.tensor(h)).detach()
            assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"memory": True}, {"mixer": "attention"}])
def test_a_layer_of_another_kind_is_not_loaded(ordinary_params, tmp_path, changes):
    torch_layer = need_torch("experiments.torch_layer")
    config = Config(7, 24, 2, 16, 5, **changes)
    save_checkpoint(tmp_path / "best.npz", ordinary_params(config), config)
    with pytest.raises(ValueError, match="layers of another kind"):
        torch_layer.load(tmp_path / "best.npz", 0)


def test_the_gpt_in_pytorch(ordinary_params):
    """The same logits with the same weights, also with its cache. It has no biases."""
    torch = need_torch()
    config = Config(7, 24, 3, 16, mixer="attention", positions=True)
    params = {name: p * (".b" not in name) for name, p in ordinary_params(config).items()}
    tokens = np.random.default_rng(1).integers(0, 7, (4, 24))
    model = bench.Model(config)
    assert bench.n_parameters(config) == sum(p.numel() for p in model.parameters())
    model.double().load_state_dict(in_torch(params), strict=False)
    for block in model.blocks:
        block.ffn[1].approximate = "tanh"
    expected = grassmann.forward(params, config, tokens)
    tokens = torch.tensor(tokens)
    past = [{}, {}, {}]
    with torch.inference_mode():
        assert_allclose(model(tokens), expected, atol=1e-10)
        for start, end in ((0, 12), (12, 13), (13, 14)):
            logits = model(tokens[:, start:end], past, start)
            assert_allclose(logits, expected[:, start:end], atol=1e-10)


@pytest.mark.parametrize(
    "changes, grad_clip, error",
    [({}, 1e9, 1e-10), (PAPER, 1e9, 1e-10), (PAPER, 1.0, 1e-6)],
)
def test_both_sides_train_alike(ordinary_params, changes, grad_clip, error):
    """Ten steps in float64 from the same weights. PyTorch clips by norm + 1e-6."""
    setup = tiny(grad_clip=grad_clip, warmup_iters=3, iters=10, lr=1e-2)
    config = setup.config(**changes)
    need_torch()
    ours = bench.Ours(setup, config)
    theirs = bench.Theirs(setup, config)
    ours.params = ordinary_params(config)
    ours.optimizer = grassmann.adamw_init(ours.params)
    theirs.model.double().load_state_dict(in_torch(ours.params))
    for _ in range(10):
        ours.step()
        theirs.step()
    for name, expected in in_torch(ours.params).items():
        assert_allclose(theirs.model.state_dict()[name], expected, rtol=0, atol=error)
    assert theirs.validate() == pytest.approx(ours.validate(), abs=error)


@pytest.mark.slow
@pytest.mark.parametrize("section, dashes", [(bench.step, 10), (bench.generation, 2)])
def test_sections_that_compare(section, dashes, has_torch):
    rows = section(tiny(threads=2, quick=True))
    missing = 0 if has_torch else dashes
    assert common.markdown(rows).count("–") == missing


def test_race(has_torch):
    """The loss equals a training run's."""
    ours, *others = bench.race(tiny(), iters=60)
    run = bench.Ours(tiny(iters=60), tiny().config())
    for _ in range(60):
        run.step()
    assert ours["loss"] == run.validate()
    assert len(others) == (2 if has_torch else 0)


def test_length():
    """Lengths of 64 and 256 in 1,024 tokens; attention only up to its longest table."""
    rows = bench.length(tiny(threads=3), tokens=1024, longest_table=128)
    assert [row["length"] for row in rows] == [64, 256]
    assert [row["windows"] for row in rows] == [16, 4]
    assert [math.isnan(row["attention"]) for row in rows] == [False, True]
    for column in ("grassmann x", "memory x", "reading x"):
        assert rows[0][column] == 1
        assert rows[1][column] != 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--only speed", "speed"),
        ("--data short.txt", "characters"),
        ("--threads 0", "threads"),
        ("--gpu", "CuPy"),
        ("--gpu --only race", "not a section of --gpu"),
        ("--report", "need --gpu"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # there is no GPU
    monkeypatch.setattr(sys, "argv", ["bench.py", *options.split()])
    # pytest's streams stay as they are
    monkeypatch.setattr(bench.command_line, "plain_output", print)
    Path("short.txt").write_text("To be.")
    with pytest.raises(SystemExit):
        bench.main()
    lines = capsys.readouterr().err
    assert error in lines
    assert lines.count("\n") == 1
