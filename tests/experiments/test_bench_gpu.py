"""The benchmark on a GPU, without one: PyTorch on the CPU, gpu.py on the CPU stand-in."""

import platform
import shutil

import numpy as np
import pytest

import grassmann
from charlm.text import Corpus
from experiments import bench_gpu
from experiments.bench_models import Setup

SIZES = {"n_layer": 2, "d_model": 16, "rank": 4, "context": 24}
TEXT = np.random.default_rng(0).integers(0, 11, 600).astype(np.uint8)
SETUP = Setup(Corpus("", [*range(11)], TEXT, TEXT, 0), 1, True, sizes=SIZES)


@pytest.mark.parametrize("broken", [False, True])
def test_pytorch_in_every_precision(broken, monkeypatch, capsys):
    """Compiled models run as traced, or fail, which is noted. Their batches are ours."""
    torch = pytest.importorskip("torch", reason="no PyTorch: experiments/requirements.txt has it")
    trace, how = torch.compile, {"backend": "eager", "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda f, **_: trace(None if broken else f, **how))
    monkeypatch.setattr(bench_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(bench_gpu, "SIZES", {"laptop": (SIZES, 3)})
    every = [
        (p, model)
        for p in ("bfloat16", "tf32", "float32")
        for model in ("default", "GPT", "paper's layer")
    ]
    for by, expected in [("eager", every), ("compiled", [] if broken else every)]:
        assert [
            (row["precision"], row["model"]) for row in bench_gpu.theirs(SETUP, "laptop", by)
        ] == expected
    assert (capsys.readouterr().out.count("compiled: ") == 9) == broken
    setup = bench_gpu.of_size(SETUP, "laptop")
    model = bench_gpu.OnGPU(setup, setup.config(), False, True)
    assert np.array_equal(model.batch(), grassmann.get_batch(TEXT, 3, 24, 0, 0))
    assert (
        model.loss(*model.batch()).dtype == torch.float32
        and model.model(model.batch()[0]).dtype == torch.float32
    )


@pytest.mark.slow
def test_how_much_a_step_starts():
    """For train_char.py's model and the larger model: nodes of the graph, calls of the host."""
    rows, notes = bench_gpu.run(
        "floor", None, False, {"GB/s": 1e9, "TFLOP/s": 1e9, "us a node": 2.0}
    )
    assert [(row["nodes"], row["calls of the host"]) for row in rows] == [
        (114, 3),
        (116, 3),
        (162, 3),
        (164, 3),
    ], notes
    assert (
        180 < rows[0]["MB"] < 200
        and 3.0 < rows[0]["GFLOP"] < 3.2
        and rows[0]["floor, ms"] == pytest.approx(0.228)
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("g++") or platform.libc_ver()[0] != "glibc", reason="no g++ with glibc"
)
def test_a_report(tmp_path, monkeypatch, capsys):
    """In a rehearsal: a section is printed and written when it is done, and ends if too slow."""
    for name, (function, _) in bench_gpu.SECTIONS.items():
        monkeypatch.setitem(
            bench_gpu.SECTIONS, name, (function, 0.1 if name == "laptop-ours" else 600)
        )
    bench_gpu.main(["rates", "laptop-ours", "training"], None, tmp_path, True)
    page = (tmp_path / "gpu-a-stand-in.md").read_text(encoding="utf-8")
    assert page == "# On a GPU\n" + capsys.readouterr().out
    assert page.count("| a stand-in |") == 1 and "it took too long" in page and "\n| 4 | " in page


def test_a_row_of_any_table_has_a_place_in_the_one_table():
    row = {"size": "laptop", "by": "gpu.py", "ms": 1.23456, "host, us": 50.0}
    expected = {"section": "ours", "what": "laptop gpu.py", "result": "ms 1.235, host, us 50"}
    assert bench_gpu.summary("ours", row) == expected
