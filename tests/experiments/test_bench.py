"""The benchmark's counts and PyTorch models are right; its sections run, also without PyTorch."""

import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import grassmann
from charlm.checkpoint import save_checkpoint
from charlm.text import Corpus
from charlm.training import Training
from experiments import bench, bench_models, common
from grassmann import Config

PAPER = {"taps": False, "normalize": True, "positions": True}
SIZES = {"n_layer": 2, "d_model": 16, "rank": 4, "context": 24}
LINEAR = {"W_1": "0.weight", "W_2": "2.weight", "W_qkv": "qkv.weight", "W_out": "out.weight"}
IN_TORCH = LINEAR | {
    "w": "weight",
    "b": "bias",
    "E": "E.weight",
    "P": "P.weight",
    "b_1": "0.bias",
    "b_2": "2.bias",
}


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
    return {
        ".".join([*path, IN_TORCH.get(last, last)]): torch.tensor(
            value.T if last in LINEAR else value
        )
        for *path, last, value in ((*name.split("."), value) for name, value in params.items())
    }


def test_the_clock_takes_turns(monkeypatch):
    """It leaves out the first round, the first call of a turn, and missing runs."""
    now, turns = [0.0], []

    def run(name: str, seconds: float) -> None:
        turns.append(name)
        now[0] += 9.0 if len(turns) < 7 or turns[-2] != name else seconds

    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = common.alternate(
        {"a": lambda: run("a", 2.0), "b": lambda: run("b", 3.0), "c": None}, 2, 2
    )
    assert turns == ["a"] * 3 + ["b"] * 3 + (["a"] * 3 + ["b"] * 3) * 2
    assert (
        found.pop("a") == [2.0, 2.0] and found.pop("b") == [3.0, 3.0] and np.isnan(found["c"]).all()
    )


def test_multiply_adds_by_hand():
    """2 layers, d = 8, r = 3, so n = 3; d_ff = 32, V = 5, batch 2, context 4: T = 8 tokens."""
    config = Config(5, 4, 2, 8, 3, ((1,), (1, 2)), d_ff=32)
    # per token and layer: W_red 8·3, W_plu 3·8, W_gate 16·8, W_1 8·32, W_2 32·8; the head 8·5
    assert bench_models.multiply_adds(config, 2) == 3 * 8 * (2 * (24 + 24 + 128 + 256 + 256) + 40)
    config = Config(5, 4, 2, 8, mixer="attention", n_head=2)
    # W_qkv 8·24, W_out 8·8; scores and weighted sums 4·8 each
    assert bench_models.multiply_adds(config, 2) == 3 * 8 * (
        2 * (192 + 64 + 256 + 256 + 2 * 32) + 40
    )


def test_sizes_of_the_gpt():
    """nanoGPT's laptop recipe has 0.80M with 65 letters; the wider one is as large as our model."""
    setup = bench.Setup(Corpus("", [*range(65)], None, None, 0), 1)
    ours = sum(p.size for p in grassmann.init_params(setup.config()).values())
    assert (
        bench.n_parameters(setup.gpt_config()) == 804_096
        and bench.n_parameters(setup.config()) == ours
    )
    assert bench.n_parameters(bench.gpt_of_size(setup, ours)) == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize(
    ("taps", "normalize"), [(True, False), (False, True), (True, True), (False, False)]
)
def test_the_layer_in_pytorch(taps, normalize, rng):
    """Outputs, gradients and first weights are those of grassmann.py, also of parallel tokens."""
    torch_layer, torch = need_torch("experiments.torch_layer"), need_torch()
    torch.manual_seed(0)
    offsets, layer = (
        torch_layer.OFFSETS,
        torch_layer.GrassmannMix(128, (1, 2, 4, 8, 12, 16), 32, taps, normalize),
    )
    config = Config(7, taps=taps, normalize=normalize, offsets=offsets)
    w = grassmann.Scope(grassmann.init_params(config), "blocks.3.mix.")
    assert offsets == Config(7).offsets and not [
        *layer.children()
    ]  # nanoGPT draws every nn.Linear's weights anew
    for name, p in layer.named_parameters():
        assert p.std().item() == pytest.approx(w[name].std(), rel=0.2)
        p.data = torch.tensor(w[name])
    h, dout = rng.standard_normal((2, 2, 20, 128), np.float32)
    h[:, 5:8], h[:, 8:12] = h[:, 4:5], 0.3 * h[:, 4:5]
    out, cache = grassmann.mix_forward(h, w, config, 3)
    dh, grads = grassmann.mix_backward(dout, cache)
    x = torch.tensor(h, requires_grad=True)
    layer(x).backward(torch.tensor(dout))
    found = {name: p.grad for name, p in layer.named_parameters()} | {
        "h": x.grad,
        "": layer(x),
        "3": layer(x[:, :3]),
    }
    for name, expected in (grads | {"h": dh, "": out, "3": out[:, :3]}).items():
        np.testing.assert_allclose(found[name].detach(), expected, rtol=1e-5, atol=1e-5)


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
            np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"memory": True}, {"mixer": "attention"}])
def test_a_layer_of_another_kind_is_not_loaded(ordinary_params, tmp_path, changes):
    torch_layer = need_torch("experiments.torch_layer")
    config = Config(7, 24, 2, 16, 5, **changes)
    save_checkpoint(tmp_path / "best.npz", ordinary_params(config), config)
    with pytest.raises(ValueError, match="layers of another kind"):
        torch_layer.load(tmp_path / "best.npz", 0)


def test_the_gpt_in_pytorch(ordinary_params):
    """The same logits with the same weights, also with its cache. It has no biases."""
    torch, config = need_torch(), Config(7, 24, 3, 16, mixer="attention", positions=True)
    params = {name: p * (".b" not in name) for name, p in ordinary_params(config).items()}
    model, tokens, past = (
        bench.Model(config),
        np.random.default_rng(1).integers(0, 7, (4, 24)),
        [{}, {}, {}],
    )
    assert bench.n_parameters(config) == sum(p.numel() for p in model.parameters())
    model.double().load_state_dict(in_torch(params), strict=False)
    for block in model.blocks:
        block.ffn[1].approximate = "tanh"
    expected, tokens = grassmann.forward(params, config, tokens), torch.tensor(tokens)
    with torch.inference_mode():
        parts = [
            model(tokens),
            *(model(tokens[:, a:b], past, a) for a, b in [(0, 12), (12, 13), (13, 14)]),
        ]
    np.testing.assert_allclose(
        torch.cat(parts, 1), np.hstack([expected, expected[:, :14]]), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("offsets", [None, [[1, 2, 4, 8, 12, 16]] * 2])
@pytest.mark.parametrize(
    ("changes", "grad_clip", "error"), [({}, 1e9, 1e-10), (PAPER, 1e9, 1e-10), (PAPER, 1.0, 1e-6)]
)
def test_both_sides_train_alike(ordinary_params, offsets, changes, grad_clip, error):
    """Ten steps in float64 from the same weights. PyTorch clips by norm + 1e-6."""
    setup = tiny(grad_clip=grad_clip, warmup_iters=3, iters=10, lr=1e-2)
    config = setup.config(offsets=offsets, **changes)
    need_torch()
    ours, theirs = bench.Ours(setup, config), bench.Theirs(setup, config)
    ours.params = ordinary_params(config)
    ours.optimizer = grassmann.adamw_init(ours.params)
    theirs.model.double().load_state_dict(in_torch(ours.params))
    for _ in range(10):
        ours.step()
        theirs.step()
    for name, expected in in_torch(ours.params).items():
        np.testing.assert_allclose(theirs.model.state_dict()[name], expected, rtol=0, atol=error)
    assert theirs.validate() == pytest.approx(ours.validate(), abs=error)


def test_gpt_writer_reads_its_context(monkeypatch):
    """Of a context of 24, the last half at once, then one by one."""
    torch, read, cycle = need_torch(), [], [(0, 12), *((position, 1) for position in range(12, 24))]
    monkeypatch.setattr(
        bench,
        "Model",
        lambda config: (
            lambda x, past=None, start=0: (
                read.append((start, x.shape[1])) or torch.zeros(*x.shape, 7)
            )
        ),
    )
    write = bench.gpt_writer(tiny(), np.zeros(100, np.uint8))
    for _ in range(27):
        write()
    assert read == cycle * 2 + cycle[:1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "n_rows", "dashes"),
    [  # dashes where PyTorch is missing
        (bench.step, 6, 10),
        (bench.generation, 1, 2),
    ],
)
def test_sections_that_compare(section, n_rows, dashes, has_torch):
    rows = section(tiny(threads=2, quick=True))
    assert len(rows) == n_rows and common.markdown(rows).count("–") == (0 if has_torch else dashes)


def test_race(has_torch):
    """The loss equals a training run's."""
    ours, *others = bench.race(tiny(), iters=60)
    run = bench.Ours(tiny(iters=60), tiny().config())
    for _ in range(60):
        run.step()
    assert ours["loss"] == run.validate() and len(others) == (2 if has_torch else 0)


def test_length(monkeypatch):
    """Lengths of 64 and 256: all tokens are read; attention only up to its longest table."""
    read, stream_read = Counter(), grassmann.stream_read
    monkeypatch.setattr(
        grassmann, "stream_read", lambda *args: read.update([len(args[-1])]) or stream_read(*args)
    )
    rows = bench.length(tiny(threads=3), tokens=1024, longest_table=128)
    assert [(row["length"], row["windows"]) for row in rows] == [(64, 16), (256, 4)]
    assert [math.isnan(row["attention"]) for row in rows] == [False, True]
    assert rows[0]["grassmann x"] == rows[0]["memory x"] == 1 != rows[1]["memory x"]
    assert (
        rows[0]["reading x"] == 1 != rows[1]["reading x"]
        and read.keys() == {64, 256}
        and read[64] == 4 * read[256]
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--only speed", "speed"),
        ("--data short.txt", "characters"),
        ("--threads 0", "threads"),
        ("--gpu", "CuPy"),
        ("--gpu --only race", "not a section of --gpu"),
        ("--report", "need --gpu"),
        ("--only race --quick", None),
    ],
)
def test_command_line(options, error, tmp_path, monkeypatch, capsys):
    """Prints tables, or one line that says what is wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # there is no GPU
    monkeypatch.setattr(sys, "argv", ["bench.py", *options.split()])
    monkeypatch.setattr(
        bench.command_line, "plain_output", print
    )  # pytest's streams stay as they are
    Path("short.txt").write_text("To be.")
    try:
        bench.main()
        assert "skipped by --quick" in capsys.readouterr().out
    except SystemExit as stop:
        lines = capsys.readouterr().err
        assert stop.code == 2 and error and error in lines and lines.count("\n") == 1
